"""The rules of planning, which any compiler compiles, against their definitions on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["plan_rules", "rows"])
def test_plan_rules(name: str, tmp_path: Path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
    program = tmp_path / name
    for command in (
        [compiler, *flags, *include, str(ROOT / f"tests/cpp/{name}.cpp"), "-o", str(program)],
        [str(program)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
