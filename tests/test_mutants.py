"""The mutation check fits the sources: each planted fault finds its place, and names tests that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "mutants"))

import run as runner
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]


def test_all_fit():
    assert not runner.check()
    assert sum(not mutant.unseen for mutant in MUTANTS) >= 16


@pytest.mark.parametrize(
    "change,message",
    [
        ({"find": "no such text"}, r"expected 'no such text' once .* it is in none of them \(0 times\)"),
        ({"find": "item"}, r"expected 'item' once"),
        ({"files": "nowhere/*.cu"}, r"no file under csrc/ matches 'nowhere/\*\.cu'"),
        ({"tests": ("tests/test_nothing.py",)}, r"tests/test_nothing\.py does not exist"),
        ({"tests": ()}, "either tests or a reason"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str):
    good = {"name": "good", "files": "plan/*.h", "find": "kGranule = 16", "replace": "kGranule = 8"}
    good["tests"] = ("tests/test_mutants.py",)
    assert not runner.check([Mutant(**good)])
    (wrong,) = runner.check([Mutant(**{**good, **change})])
    assert re.search(message, wrong), wrong


def test_planted_in_a_copy(tmp_path: Path):
    (tmp_path / "csrc/plan").mkdir(parents=True)
    (tmp_path / "csrc/plan/a.h").write_text("one\ntwo\n")
    path = runner.plant(Mutant("m", "plan/*.h", "two", "three", ("x",)), tmp_path)
    assert path.read_text() == "one\nthree\n"


COLLECT = """
import sys
import pytest

sys.path.insert(0, "tests/mutants")
from mutants import MUTANTS

for tests in sorted({mutant.tests for mutant in MUTANTS if mutant.tool == "pytest" and mutant.tests}):
    code = pytest.main(["--collect-only", "-q", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests])
    assert code == 0, f"{tests}: {code!r}; expected some tests"
"""


@pytest.mark.slow
def test_named_tests_are_collected():
    """Some tests are found for each mutant, also where they would be skipped."""
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
