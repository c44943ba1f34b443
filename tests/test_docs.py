"""What the documents say is true: README code runs, named files and make targets exist."""

from __future__ import annotations

import functools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hbsattn

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "csrc/README.md", "benchmarks/README.md"]
FILE_SUFFIXES = "h|cuh|cu|cpp|py|md|txt|toml|cmake|json|yaml|svg|png"


def read(name: str) -> str:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text()


@functools.cache
def all_files() -> set[str]:
    """But for what builds and environments hold."""
    names = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [x for x in folders if x not in ("build", "__pycache__") and (x == ".ci" or x[0] != ".")]
        names |= {(Path(folder) / file).relative_to(ROOT).as_posix() for file in files}
    return names


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read("README.md"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("-m hbsattn", marks=pytest.mark.slow),
        pytest.param("benchmarks/train.py --device cpu --steps 3", marks=pytest.mark.slow),
        "benchmarks/run.py --list",
    ],
)
def test_programs_run(command: str):
    """What `make demo` runs, on a GPU where there is one, and the benchmarks that need none."""
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1])}
    arguments = [sys.executable, *command.split()]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_readme_code_runs():
    """All Python of the README, in order, as one program; on a machine without a GPU its CUDA tensors are CPU ones."""
    blocks = python_blocks()
    assert blocks, "README.md shows no Python"
    program = "\n".join(blocks)
    if not torch.cuda.is_available():
        program = re.sub(r"([\"'])cuda\1", '"cpu"', program).replace(".cuda()", "")
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr}\nof\n{program}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str):
    """Files and folders in backticks or in a listing; a bare name may lie in any room."""
    text = read(document)
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    missing = []
    for token in {t for piece in code for t in re.findall(rf"[\w./*<>-]+\.(?:{FILE_SUFFIXES})\b(?![\w.])", piece)}:
        # Placeholders, the user's own files, and what a build makes or another project holds.
        if re.search(r"[<>]|^/|^~|://|^my_|^build/|^cuda|^torch/|^cute/|^cutlass/", token) or f"<{token}>" in text:
            continue
        pattern = re.escape(token.removeprefix("./")).replace(r"\*", "[^/]*")
        if not any(re.search(rf"(^|/){pattern}$", name) for name in all_files()):
            missing.append(token)
    assert not missing, f"{document} names {sorted(missing)}, which do not exist"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str):
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), flags=re.MULTILINE))
    text = read(document)
    commands = re.findall(r"`make ([^`\n]+)`", text)
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        block = re.sub(r"#.*", "", block)
        commands += re.findall(r"(?:^|&&|;)\s*make ([^&|;\n]+)", block, re.MULTILINE)
    named = {w for c in commands for w in shlex.split(c) if not w.startswith("-") and "=" not in w}
    assert named <= targets, f"{document} names make targets that do not exist: {sorted(named - targets)}"


def test_readme_shows_both_commands():
    text = read("README.md")
    for command in ("make demo", "make test"):
        assert command in text
    assert len(text.splitlines()) <= 150


def test_install_commands_agree():
    """README, Makefile and the hint of a failed import: without these options the checkout may hide what it built."""
    for name in ("README.md", "Makefile", "hbsattn/_ops.py"):
        text = read(name)
        for option in ("--no-build-isolation", "--config-settings editable_mode=compat", "-e ."):
            assert option in text, f"{name} lacks {option}"


def test_build_defaults_are_those_of_the_sources(tmp_path: Path):
    """The defaults in the README and in setup.py, and the number of files that hold kernels."""
    script = str(ROOT / "csrc/kernels/generate_instances.py")
    command = [sys.executable, script, str(tmp_path)]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    head_dims = ",".join(sorted({re.search(r"_hd(\d+)_\d+\.cu$", file)[1] for file in files}, key=int))
    dtypes = ",".join(sorted(runpy.run_path(script)["DTYPES"], reverse=True))
    readme, setup = read("README.md"), read("setup.py")
    assert f"`HBSATTN_HEAD_DIMS` | `{head_dims}`" in readme and f'"{head_dims}"' in setup
    assert f"`HBSATTN_DTYPES` | `{dtypes}`" in readme and f'"{dtypes}"' in setup
    assert f"compiles {len(files)} kernel files" in readme


def test_a_kernel_file_holds_all_chosen_dtypes(tmp_path: Path):
    """Those of its row, of which its name tells one that is alone; a build of one has the files of rows with it, each
    with that one. The list names every kernel once."""
    script = str(ROOT / "csrc/kernels/generate_instances.py")
    names = {}
    alone = {"bf16": ["kBFloat16"], "fp16": ["kFloat16"], "fp32": ["kFloat32"]}
    for chosen, dtypes in {"": alone["bf16"] + alone["fp16"], **alone}.items():
        command = [sys.executable, script, str(tmp_path), f"--dtypes={chosen}"]
        files = [
            Path(file) for file in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        ]
        names[chosen] = [file.name for file in files]
        instances = [re.findall(r"run_\w+<(.*)>\(", file.read_text()) for file in files]
        for file, held in zip(files, instances, strict=True):
            expected = next((held for name, held in alone.items() if f"_{name}_" in file.name), dtypes)
            assert re.findall(r"DType::(\w+)", " ".join(held)) == expected
        lists = [(tmp_path / f"instances/{family}_kernels.h").read_text() for family in ("sm90", "sm80")]
        table = re.findall(r"Sm[89]0\w+<[^<>]*>", "".join(lists))
        assert sorted(table) == sorted(config for held in instances for config in held)
    assert sorted(names[""]) == sorted({name for chosen in alone for name in names[chosen]})


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", hbsattn.__version__)


def test_links_inside_the_repository():
    for document in DOCUMENTS:
        folder = (ROOT / document).parent
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", read(document)):
            assert (folder / target).exists(), f"{document} links to {target}"


def test_public_names_are_documented():
    for name in hbsattn.__all__:
        documented = getattr(hbsattn, name)
        assert (documented.__doc__ or "").strip(), f"hbsattn.{name} has no docstring"
