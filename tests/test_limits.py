"""A test that hangs ends the run, which says which one it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hbsattn

HANGS = """
import time
import pytest

@pytest.mark.timeout(5)
@pytest.mark.parametrize("number", [3])
def test_waits(number):
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_hang_is_named(tmp_path: Path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_hangs.py").write_text(HANGS)
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1])}
    environment["PYTHONPATH"] += os.pathsep + os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "test_hangs.py::test_waits[3] is not done after 5 s" in done.stdout
    assert "time.sleep(600)" in done.stdout, "the stack is missing"
