"""The rooms of the house and what each may not hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_SUFFIXES = {".h", ".cuh", ".cu", ".cpp", ".py"}
MAX_LINES = 700
MAX_COLUMNS = 120

TORCH = r"^\s*#\s*include\s*[<\"](torch|ATen|c10|pybind11)/"
CUTLASS = r"^\s*#\s*include\s*[<\"](cute|cutlass)/"
PRINTS = r"\b(printf|fprintf|puts|std::cout|std::cerr|exit|abort|assert)\s*(\(|<<)"
ALLOCATES = r"\bcuda(Malloc\w*|Free\w*|HostAlloc)\s*\("
SYNCHRONIZES = r"\bcuda(DeviceSynchronize|StreamSynchronize|EventSynchronize|Memcpy)\s*\("
READS_ENVIRONMENT = r"\b(std::)?getenv\s*\("
# How work is cut into tiles for kernels, and what of it a cache holds, is decided in csrc/plan alone. Python may know
# how long a list can get, and the CPU backend how it cuts its own work; not the rules' names, nor rows of tiles,
# numbers of multiprocessors or shares of a cache.
TILE_RULES = (
    r"(?i)\b(choose_\w*tile\w*|count_tile_heads|count_(packed|united)\w*|packed_heads|shape_(key_)?tiles|pays_to_unite"
    r"|\w*section_?(bytes|items)|part_(bytes|slots)|running_(keys|bytes)|together_bytes|\w*own_tiles"
    r"|(backward|goes)_by_queries|l2_bytes|num_sms|multi_?processor\w*)\b"
)
TILE_NUMBERS = r"(?<![\w.])(132|192)(?![\w.])|(?<![\w.])(5|10|32|36|50|60) ?(<< ?20|\* ?2 ?\*\* ?20)\b"

# Room: what its lines may not match, with the reason.
RULES: dict[str, list[tuple[str, str]]] = {
    "csrc": [
        (PRINTS, "the library neither prints nor exits"),
        (SYNCHRONIZES, "nothing waits for the device"),
        (READS_ENVIRONMENT, "the library does not read the environment"),
        (r"\bTODO\b|\bFIXME\b|\bXXX\b", "no open ends"),
    ],
    "csrc/include": [
        (TORCH, "public headers know no torch"),
        (CUTLASS, "public headers know no CUTLASS"),
        (r"^\s*template\s*<", "public headers hold no templates"),
        (r"^\s*#\s*include\s*\"(?!hbsattn/)", "public headers include only each other"),
        (r"^\s*#\s*include\s*[<\"]cuda", "public headers need no CUDA"),
    ],
    "csrc/core": [
        (TORCH, "core is free of torch"),
        (CUTLASS, "core never parses CuTe"),
        (ALLOCATES, "core allocates no device memory"),
        (r"^\s*#\s*include\s*\"torch/", "core does not know its callers"),
        (r"^\s*#\s*include\s*\"kernels/(?!(sm[89]0/config|instances)\.h\")", "core sees configs and instances.h alone"),
        (r"<<<", "core launches no kernels itself"),
    ],
    "csrc/plan": [
        (TORCH, "plans do not know that tensors exist"),
        (CUTLASS, "plans are for any compiler"),
        (r"^\s*#\s*include\s*[<\"]cuda", "plans are for any compiler"),
        (r"^\s*#\s*include\s*\"(core|torch|kernels)/", "no arrow points back"),
    ],
    "csrc/kernels": [
        (TORCH, "kernels do not know that tensors exist"),
        (ALLOCATES, "kernels allocate no device memory"),
        (r"^\s*#\s*include\s*\"(core|torch)/", "no arrow points back"),
        (r"InvalidType\s*\(", "kernels do not check what users pass"),
    ],
    "csrc/kernels/sm90": [(r"^\s*#\s*include\s*\".*sm80/", "architectures do not include each other")],
    "csrc/kernels/sm80": [(r"^\s*#\s*include\s*\".*sm90/", "architectures do not include each other")],
    "csrc/torch": [
        (CUTLASS, "the torch layer knows no CUTLASS"),
        (r"<<<|cudaLaunch", "the torch layer launches no kernels itself"),
        (r"^\s*#\s*include\s*\"(core|kernels)/", "the torch layer enters where C++ callers do"),
    ],
    "hbsattn": [
        (r"^\s*(import|from)\s+(triton|tests|numpy|benchmarks)\b", "the product imports neither triton nor tests"),
        (r"\bprint\(", "the product is silent"),
        (r"get_device_(capability|properties|name)", "the product's Python knows no architecture"),
        (TILE_RULES, "the product's Python knows no rule for tiles"),
        (TILE_NUMBERS, "the product's Python knows no sizes of tiles or caches"),
        (r"\bTODO\b|\bFIXME\b|\bXXX\b", "no open ends"),
    ],
    "tests/oracle": [(r"^\s*(import|from)\s+(hbsattn|problems)\b", "an oracle does not call what it judges")],
    "benchmarks": [(r"\bhbsattn\._\w|from hbsattn import _|from hbsattn\._", "benchmarks import public names alone")],
}
# Programs print. The demo also asks for the device it runs on.
PROGRAMS = {"hbsattn/__main__.py", "csrc/kernels/generate_instances.py", "csrc/kernels/sm80/fits.py"}

CALL_PATH = ["hbsattn/attention.py", "hbsattn/_ops.py", "hbsattn/_plans.py", "hbsattn/_chunks.py"]
CALL_PATH += ["hbsattn/hbsa_interface.py"]


def files_of(room: str) -> list[Path]:
    found = [p for p in (ROOT / room).rglob("*") if p.suffix in SOURCE_SUFFIXES and "third_party" not in p.parts]
    return sorted(p for p in found if "build" not in p.relative_to(ROOT).parts)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines without comments and, in Python, without docstrings."""
    text = path.read_text()
    lines = text.splitlines()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        return [(n, line.split("  #")[0]) for n, line in enumerate(lines, 1) if not line.lstrip().startswith("#")]
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return [(n, line.split("//")[0]) for n, line in enumerate(text.splitlines(), 1)]


@pytest.mark.parametrize("room", RULES)
def test_room(room: str):
    broken = []
    for path in files_of(room):
        name = path.relative_to(ROOT).as_posix()
        if name in PROGRAMS:
            continue
        for number, line in code_lines(path):
            broken += [
                f"{name}:{number}: {reason}: {line.strip()}" for rule, reason in RULES[room] if re.search(rule, line)
            ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("room", ["csrc", "hbsattn"])
def test_open_ends_in_comments(room: str):
    found = [
        f"{p.relative_to(ROOT)}:{n}"
        for p in files_of(room)
        for n, line in enumerate(p.read_text().splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line)
    ]
    assert not found, found


def test_call_path_does_not_wait():
    """No read of device memory between the user's call and the op."""
    waits = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|synchronize)\(")
    found = [f"{name}:{n}" for name in CALL_PATH for n, line in code_lines(ROOT / name) if waits.search(line)]
    assert not found, found


@pytest.mark.parametrize("path", files_of("csrc/include"), ids=lambda p: p.name)
def test_public_headers_include_little(path: Path):
    allowed = {"cstddef", "cstdint", "string", "utility", "vector"}
    for _, line in code_lines(path):
        if match := re.match(r"\s*#\s*include\s*<([^>]+)>", line):
            assert match[1] in allowed, f"{path.name} includes <{match[1]}>"


def test_headers_say_who_may_read_them():
    """.h and .cpp are for any C++ compiler; what only nvcc reads is .cuh or .cu."""
    for path in files_of("csrc"):
        text = "\n".join(line for _, line in code_lines(path))
        if path.suffix in (".h", ".cpp"):
            assert not re.search(r"__global__|__device__|<<<", text), f"{path} holds device code"
            assert not re.search(r"#\s*include\s*\"[^\"]+\.cuh\"", text), f"{path} includes a .cuh"
        if path.suffix in (".h", ".cuh"):
            assert "#pragma once" in text, f"{path} has no include guard"


def test_cpu_backend_and_oracle_do_not_meet():
    for path in files_of("hbsattn"):
        assert not re.search(r"\boracle\b", path.read_text()), path
    assert "_cpu" not in (ROOT / "tests/oracle/dense.py").read_text()


@pytest.mark.parametrize("room", ["csrc", "hbsattn", "tests", "benchmarks"])
def test_size(room: str):
    for path in files_of(room):
        lines = path.read_text().splitlines()
        assert len(lines) < MAX_LINES, f"{path.relative_to(ROOT)} has {len(lines)} lines; split it"
        wide = [n for n, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
        assert not wide, f"{path.relative_to(ROOT)} is wider than {MAX_COLUMNS} columns in lines {wide}"


def test_every_source_is_listed():
    """One list of sources serves both builds, and forgets none."""
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    listed = [line.split()[1] for line in lines if line.strip() and not line.startswith("#")]
    assert len(listed) == len(set(listed))
    there = {p.relative_to(ROOT / "csrc").as_posix() for p in files_of("csrc") if p.suffix in (".cpp", ".cu")}
    assert set(listed) == there


def test_no_binaries_and_no_copies():
    """third_party finds other projects and holds none of their code."""
    names = [p.relative_to(ROOT).as_posix() for p in (ROOT / "third_party").iterdir() if p.is_file()]
    assert all(name.endswith((".py", ".cmake", ".md", ".txt")) for name in names), names


def test_the_top_level():
    assert not [d for d in ("docs", "examples", "include", "scripts", "src") if (ROOT / d).exists()]


@pytest.mark.parametrize(
    "line",
    [
        "SECTION_BYTES = 32 << 20  # of the L2 cache",
        "RUNNING_KEYS, RUNNING_BYTES, TOGETHER_BYTES = 132 * 128, 36 << 20, 5 << 20",
        "PART_BYTES = 10 << 20",
        "def choose_tile_rows(rows: int, head_dim: int) -> int:",
        "def count_tile_heads(batch: int) -> int:",
        "    of_192 = 192 * ceil_div(rows, 192)",
        "by_queries = backward_by_queries(*shape)",
        "processors = torch.cuda.get_device_properties(0).multi_processor_count",
    ],
)
def test_tile_policy_shows(line: str):
    """What Python once knew of tiles would be seen if it came back."""
    assert any(re.search(rule, line) for rule, _ in RULES["hbsattn"])
