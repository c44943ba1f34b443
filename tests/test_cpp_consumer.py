"""A C++ project without torch finds the installed core, links it and calls it.

HBSATTN_CORE_PREFIX names an installed core to use; otherwise one is built here, without CUDA (seconds) unless
HBSATTN_TEST_CMAKE_CUDA=1 (minutes).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each builds with CMake

ROOT = Path(__file__).resolve().parents[1]
PASSED = "GPU: forward and backward passed"
SKIPPED = 77  # what the program ends with where there is no GPU
FLAGS = ("-std=c++17", "-pedantic", "-Wall", "-Wextra", "-Werror")


def cmake() -> str:
    beside_python = Path(sys.executable).with_name("cmake")
    found = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if found is None:
        pytest.skip("cmake was not found")
    return found


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler was found")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install_core(folder: Path, *options: str) -> Path:
    run(cmake(), "-S", ROOT, "-B", folder / "build", f"-DCMAKE_INSTALL_PREFIX={folder / 'prefix'}", *options)
    run(cmake(), "--build", folder / "build", "--parallel", "2")
    run(cmake(), "--install", folder / "build")
    return folder / "prefix"


def run_consumer(prefix: Path, folder: Path) -> bool:
    """Whether it computed, which is then checked. If not, every call said why, and the program that it skipped."""
    run(cmake(), "-S", ROOT / "tests/cpp", "-B", folder / "consumer", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake(), "--build", folder / "consumer")
    done = subprocess.run([folder / "consumer/consumer"], capture_output=True, text=True, timeout=1800)
    computed = PASSED in done.stdout
    assert done.returncode == (0 if computed else SKIPPED), done.stdout
    if not computed:
        *said, last = done.stdout.splitlines()
        assert sum(" is refused, as it should be: " in line for line in said) == 8, done.stdout
        assert last.startswith("SKIPPED: forward and backward were not computed: "), done.stdout
    # CTest counts it in the same way.
    told = run(Path(cmake()).with_name("ctest"), "--test-dir", folder / "consumer")
    assert ("Passed" if computed else "Skipped") in told, told
    return computed


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if prefix := os.environ.get("HBSATTN_CORE_PREFIX"):
        return Path(prefix)
    cuda = "ON" if os.environ.get("HBSATTN_TEST_CMAKE_CUDA") == "1" else "OFF"
    return install_core(tmp_path_factory.mktemp("core"), f"-DHBSATTN_CUDA={cuda}")


def test_consumer(core: Path, tmp_path: Path):
    """On a GPU the numbers are checked; without one every call says why it cannot run."""
    run_consumer(core, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(
    not os.environ.get("HBSATTN_CORE_PREFIX") and os.environ.get("HBSATTN_TEST_CMAKE_CUDA") != "1",
    reason="needs a core built for CUDA: set HBSATTN_CORE_PREFIX or HBSATTN_TEST_CMAKE_CUDA=1",
)
def test_consumer_on_the_gpu(core: Path, tmp_path: Path):
    assert run_consumer(core, tmp_path)


def test_shared_library(tmp_path: Path):
    if os.environ.get("HBSATTN_CORE_PREFIX"):
        pytest.skip("HBSATTN_CORE_PREFIX names the core to test")
    prefix = install_core(tmp_path, "-DHBSATTN_CUDA=OFF", "-DBUILD_SHARED_LIBS=ON")
    assert list(prefix.glob("lib*/libhbsattn.so*"))
    assert not run_consumer(prefix, tmp_path)


def test_consumer_compiles_without_a_cuda_toolkit(core: Path, tmp_path: Path):
    source = ROOT / "tests/cpp/consumer.cpp"
    run(compiler(), *FLAGS, "-I", core / "include", "-c", source, "-o", tmp_path / "consumer.o")


def test_public_headers_stand_alone(core: Path, tmp_path: Path):
    """Each installed header compiles alone, as C++17, with warnings as errors and nothing else to include."""
    headers = sorted((core / "include/hbsattn").iterdir())
    assert {h.name for h in headers} == {"hbsattn.h", "params.h", "status.h"}
    for header in headers:
        source = tmp_path / "alone.cpp"
        source.write_text(f"#include <hbsattn/{header.name}>\nint main() {{ return 0; }}\n")
        run(compiler(), *FLAGS, "-fsyntax-only", "-I", core / "include", source)
