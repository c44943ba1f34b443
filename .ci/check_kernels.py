"""Compiles the kernels through CMake and fails on what makes one slow: a register spill, a serialized wgmma pipeline
(ptxas warns and inserts waits), or a translation unit that takes too long to compile.

The producer warps of some kernels have 24 to 40 registers and may spill a little: they wait most of the time.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "kernels"))

from generate_instances import KERNELS, read_table  # noqa: E402

SECONDS_ALLOWED = 180
# Bytes, stores and loads, by what is in a kernel's name; others may not spill. Those of backward_keys are counted in
# each of the four forms of the warp that streams queries, of which a call runs one. The general forward of head dim 96
# reloads addresses at the start and the end of a tile, outside of all loops. Kernels of altered calls have three forms
# of consumers, of which one reads partial blocks and takes most of it, and loops for weights that are drawn one by one.
# 16 is a word or two. sm80's forward of head dim 128 has all registers that its CTAs leave: it reloads a few words at
# the start and the end of a tile, and in altered calls.
SPILLS_ALLOWED = {
    r"\d+backward_keys_kernel": 450,
    r"Sm90BackwardKeysAltered": 1300,
    r"Sm90GradQueriesAltered": 720,
    r"Sm90ForwardAltered": 780,
    r"Sm90ForwardI\w+Li64ELi192E": 64,
    r"Sm90ForwardI\w+Li96ELi128EEELb1E": 104,
    r"Sm90ForwardShortValues": 16,
    r"Sm80ForwardI\w+Li128ELi(64|128)E": 80,
    r"Sm80BackwardByKeys": 24,
    r"Sm80\w+DTypeE2E": 200,  # float32, whose numbers are in two parts
}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
SERIALIZED = re.compile(r".*(?:\(C75\d\d\)|wgmma\.mma_async instructions are serialized).*")


def run(command: list[str], log: Path) -> str:
    """Runs a command, shows a line per compiled file, and returns all it printed."""
    lines = []
    with log.open("w") as file, subprocess.Popen(command, stdout=-1, stderr=-2, text=True) as process:
        for line in process.stdout:
            lines.append(line)
            file.write(line)
            if re.match(r"\[\d+/\d+\]", line):
                print(line.rstrip()[:120], flush=True)
    if process.returncode:
        sys.exit("".join(lines[-60:]) + f"error: {command[0]} failed")
    return "".join(lines)


def seconds_per_source(build_dir: Path) -> dict[str, float]:
    """Wall time of each compilation, from ninja's own log."""
    times = {}
    for line in (build_dir / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        if output.endswith(".cu.o"):
            times[Path(output).name] = (int(end) - int(start)) / 1000
    return times


def is_of(kernel: re.Match[str], family: str, function: str) -> bool:
    """Whether an entry is a family's kernel of a function: mangled names have their length before them. Functions of
    wide rows stand for others.
    """
    return re.search(rf"\d{family}\d+(?:wide_)?{function}_kernel", kernel["name"]) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "ci-core")
    parser.add_argument("--prefix", type=Path, help="also install the library there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    build_dir = options.build_dir.resolve()

    configure = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "--fresh", "-DHBSATTN_CUDA=ON"]
    configure += ["-DCMAKE_CUDA_FLAGS=-Xptxas=-v", f"-DPython3_EXECUTABLE={sys.executable}"]
    if options.prefix:
        configure.append(f"-DCMAKE_INSTALL_PREFIX={options.prefix.resolve()}")
    build_dir.mkdir(parents=True, exist_ok=True)
    run(configure, build_dir / "configure.log")
    run(["cmake", "--build", str(build_dir), "--target", "clean"], build_dir / "clean.log")
    text = run(["cmake", "--build", str(build_dir), "-j", str(options.jobs)], build_dir / "build.log")

    problems = [f"serialized wgmma: {match[0].strip()}" for match in SERIALIZED.finditer(text)]
    kernels = list(ENTRY.finditer(text))
    for kernel in kernels:
        stores, loads = int(kernel["stores"]), int(kernel["loads"])
        print(f"{kernel['registers']:>4} registers, {stores + loads} bytes spilled: {kernel['name'][:90]}")
        allowed = max([0, *(n for name, n in SPILLS_ALLOWED.items() if re.search(name, kernel["name"]))])
        if stores + loads > allowed:
            problems.append(f"{kernel['name']} spills {stores} bytes and reloads {loads}")
    # Two in each file. Of sm90: for any block size or not; of backward_keys, with the gradient of the queries or not.
    # Its forward tiles of 192 rows, of pairs and of short values have one alone, as have tiles of queries that alter
    # weights. Of sm80: for calls that alter weights or not, and what adds up gradients of queries beside backward_keys;
    # the forward of some tiles has two forms, for much shared memory and for little (kHasSmallForward).
    expected = Counter()
    for family in KERNELS:
        for instance in read_table(family):
            name = instance.name
            alone = name in ("forward_pairs", "forward_altered", "forward_short_values", "grad_queries_altered")
            alone = alone or (name, instance.tile_rows) == ("forward", "192")
            small = name == "forward" and instance.tile_rows == "128" and instance.head_dim in ("96", "128", "192")
            forms = 2 if family == "sm80" and small and instance.dtype != "fp32" else 1
            expected[family, instance.kernel.function] += 1 if alone and family == "sm90" else 2 * forms
            adds = family == "sm80" and name == "backward_keys" and int(instance.head_dim) <= 128
            if adds:  # of float32 a form of the same kernel
                expected[family, "backward_keys" if instance.dtype == "fp32" else "backward_by_keys"] += 1
    for (family, function), count in expected.items():
        found = sum(is_of(kernel, family, function) for kernel in kernels)
        if found != count:
            problems.append(f"the build log names {found} {function} kernels of {family}; expected {count}")
    for source, seconds in sorted(seconds_per_source(build_dir).items()):
        print(f"{seconds:6.1f} s {source}")
        if seconds > SECONDS_ALLOWED:
            problems.append(f"{source} took {seconds:.0f} s; allowed {SECONDS_ALLOWED} s")
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    print(f"{len(kernels)} kernels: spills as allowed, no serialized wgmma, every file within {SECONDS_ALLOWED} s")
    if options.prefix:
        run(["cmake", "--install", str(build_dir)], build_dir / "install.log")


if __name__ == "__main__":
    main()
