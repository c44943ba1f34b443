"""Plants each fault of mutants.py in a copy of the tree, builds it, and expects the named tests to fail.

Needs a GPU. A copy is built, with kernels for one dtype and head dim, and compiled again where a fault was planted.
With --jobs, several copies share the faults, the processor and the GPU.
First all named tests run without a fault; the faults of those that fail then count as missed. A fault that hangs a test
is not caught: the limit of tests/conftest.py ends the test, and the fault counts as missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIES = ROOT / "build" / "mutants"
COPY = COPIES / "0"  # of this process
COPIED = ("csrc", "hbsattn", "tests", "third_party", "CMakeLists.txt", "README.md", "pyproject.toml", "setup.py")
BUILD = {"HBSATTN_CUDA": "ON", "HBSATTN_HEAD_DIMS": "128", "HBSATTN_DTYPES": "fp16"}
HANGS = re.compile(r"is not done after \d+ s")


class MutantError(Exception):
    """A mutant that does not fit the sources."""


def place(mutant: Mutant, root: Path) -> Path:
    """The file that a mutant changes. Its text must be there once, and in no other file."""
    found = {path: path.read_text().count(mutant.find) for path in sorted((root / "csrc").glob(mutant.files))}
    if not found:
        raise MutantError(f"{mutant.name}: no file under csrc/ matches {mutant.files!r}")
    places = [path for path, count in found.items() for _ in range(count)]
    if len(places) != 1:
        where = ", ".join(str(path.relative_to(root)) for path in places) or "none of them"
        raise MutantError(
            f"{mutant.name}: expected {mutant.find!r} once in csrc/{mutant.files}; it is in {where} "
            f"({len(places)} times)"
        )
    return places[0]


def plant(mutant: Mutant, root: Path) -> Path:
    path = place(mutant, root)
    path.write_text(path.read_text().replace(mutant.find, mutant.replace))
    return path


def check(mutants: list[Mutant] = MUTANTS) -> list[str]:
    """What does not fit the sources as they are."""
    wrong = []
    names = [mutant.name for mutant in mutants]
    wrong += [f"{name} is the name of several mutants" for name in sorted(set(names)) if names.count(name) > 1]
    for mutant in mutants:
        if mutant.find == mutant.replace or bool(mutant.tests) == bool(mutant.unseen):
            wrong.append(f"{mutant.name}: expected a change, and either tests or a reason why none can see it")
        wrong += [
            f"{mutant.name}: {argument} does not exist"
            for argument in mutant.tests
            if argument.endswith(".py") and not (ROOT / argument).is_file()
        ]
        try:
            place(mutant, ROOT)
        except MutantError as error:
            wrong.append(str(error))
    return wrong


def run(command: list[str], log: Path, **changes: str) -> int:
    environment = {**os.environ, **BUILD, "PYTHONPATH": str(COPY), **changes}
    with log.open("w") as file:
        return subprocess.run(command, cwd=COPY, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def build(log: Path, tool: str) -> bool:
    # racecheck wants a build of its own: see mbarrier_arrive_warp in csrc/kernels/common/ptx.cuh.
    flags = {"NVCC_APPEND_FLAGS": "-DHBSATTN_EVERY_LANE_ARRIVES"} if tool == "racecheck" else {}
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], log, **flags) == 0


def run_tests(mutant: Mutant, log: Path) -> str:
    """passed, failed, hung or, if pytest could not run them, broken."""
    if mutant.tool == "racecheck":
        tool = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1"]
        code = run([*tool, sys.executable, "tests/sanitize_cases.py", *mutant.tests], log)
        return {0: "passed"}.get(code, "failed" if "RACECHECK SUMMARY" in log.read_text() else "broken")
    options = ["-x", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    code = run([sys.executable, "-m", "pytest", *options, *mutant.tests], log)
    text = log.read_text()
    if HANGS.search(text):
        return "hung"
    if code == 0 and not re.search(r"\b\d+ passed", text):
        return "broken"  # all were skipped
    return {0: "passed", 1: "failed"}.get(code, "broken")


def files_below(folder: Path) -> set[Path]:
    """The sources of a tree, relative to it."""
    roots = [folder / name for name in COPIED]
    files = {path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file()}
    relative = {path.relative_to(folder) for path in files}
    return {path for path in relative if path.suffix != ".so" and "__pycache__" not in path.parts}


def prepare() -> None:
    """Makes the copy what the tree is. What is the same already keeps its time, so that it is not compiled again; what
    a fault left behind gets a new one."""
    wanted = files_below(ROOT)
    for path in files_below(COPY) - wanted:
        (COPY / path).unlink()
    for path in wanted:
        target, content = COPY / path, (ROOT / path).read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def first_failure(log: Path) -> str:
    match = re.search(r"^(FAILED|ERROR) (\S+)", log.read_text(), re.MULTILINE)
    return match[2] if match else ""


def try_all(mutants: list[Mutant]) -> int:
    """Prints a line for each; returns how many were missed."""
    prepare()
    logs = COPY / "logs"
    logs.mkdir(exist_ok=True)
    built = ""

    def build_as(tool: str) -> bool:
        # Objects of another kind of build are of no use, and ninja does not see it.
        nonlocal built
        if built and built != tool:
            shutil.rmtree(COPY / "build", ignore_errors=True)
        built = tool
        return build(logs / "build.log", tool)

    missed = 0
    for tool in sorted({mutant.tool for mutant in mutants}):
        of_tool = [mutant for mutant in mutants if mutant.tool == tool]
        if not build_as(tool):
            sys.exit(f"error: the tree does not build without a fault: {logs / 'build.log'}")
        broken = set()
        for number, tests in enumerate(dict.fromkeys(mutant.tests for mutant in of_tool)):
            log = logs / f"without_a_fault_{tool}_{number}.log"
            outcome = run_tests(next(mutant for mutant in of_tool if mutant.tests == tests), log)
            if outcome != "passed":
                print(f"error: without a fault {' '.join(tests)} {outcome}: {first_failure(log)} in {log}", flush=True)
                broken.add(tests)
        missed += sum(mutant.tests in broken for mutant in of_tool)
        of_tool = [mutant for mutant in of_tool if mutant.tests not in broken]
        for mutant in of_tool:
            start = time.monotonic()
            path = place(mutant, COPY)
            text = path.read_text()
            plant(mutant, COPY)
            log = logs / f"{mutant.name}.log"
            outcome = run_tests(mutant, log) if build_as(tool) else "broken"
            path.write_text(text)
            caught = outcome == "failed"
            missed += not caught
            print(
                f"{'caught' if caught else 'MISSED':8}{mutant.name:42}{time.monotonic() - start:5.0f} s  "
                f"{first_failure(log) if caught and tool == 'pytest' else '' if caught else f'{outcome}: {log}'}",
                flush=True,
            )
    return missed


def share_out(mutants: list[Mutant], jobs: int) -> int:
    """Gives each of several processes its part; returns how many were missed. Who shares tests, or a tool, goes
    together: it shares a build and the run without a fault."""
    alike: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:
        alike.setdefault((mutant.tool,) if mutant.tool != "pytest" else mutant.tests, []).append(mutant)
    parts: list[list[Mutant]] = [[] for _ in range(min(jobs, len(alike)))]
    for group in sorted(alike.values(), key=len, reverse=True):
        min(parts, key=len).extend(group)
    environment = {**os.environ, "MAX_JOBS": str(max((os.cpu_count() or 1) // len(parts), 1))}
    running = []
    for number, part in enumerate(parts):
        names = [argument for mutant in part for argument in ("--only", mutant.name)]
        command = [sys.executable, __file__, "--copy", str(number), *names]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    missed = 0
    for process, part in zip(running, parts, strict=True):
        lines = process.communicate()[0].splitlines()
        print("\n".join(lines[:-1]), flush=True)
        caught = re.match(r"(\d+) of \d+ faults caught", lines[-1]) if lines else None
        missed += len(part) - (int(caught[1]) if caught else 0)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the mutants and their tests")
    parser.add_argument("--check", action="store_true", help="tell whether all fit the sources, and build nothing")
    parser.add_argument("--only", action="append", metavar="NAME", help="try this one; may be given again")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are built and tested at a time")
    parser.add_argument("--copy", default="0", help="the copy that this process works in, build/mutants/COPY")
    options = parser.parse_args()
    global COPY
    COPY = COPIES / options.copy
    unknown = set(options.only or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        sys.exit(f"error: --only names {', '.join(sorted(unknown))}; expected names that --list shows")
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:42}{mutant.unseen or ' '.join(mutant.tests)}")
        return
    if wrong := check(chosen):
        sys.exit("\n".join(f"error: {line}" for line in wrong))
    if options.check:
        return
    seen = [mutant for mutant in chosen if not mutant.unseen]
    for mutant in chosen:
        if mutant.unseen:
            print(f"{'skipped':8}{mutant.name:42}         {mutant.unseen}")
    missed = share_out(seen, options.jobs) if options.jobs > 1 else try_all(seen)
    print(f"{len(seen) - missed} of {len(seen)} faults caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
