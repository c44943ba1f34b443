"""Poisoned memory for every test, and GPU tests that skip in sight.

`torch.use_deterministic_algorithms` with `fill_uninitialized_memory` fills whatever `empty` returns with NaN, in C++
too, so an output that a kernel forgets to write shows.
"""

from __future__ import annotations

import os

# Deterministic cuBLAS needs this before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import hbsattn


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"the CUDA device has compute capability {capability[0]}.{capability[1]}, the kernels need 9.0"
    if not hbsattn.build_info()["cuda"]:
        return "hbsattn was built without CUDA"
    return None


NO_GPU = _why_no_gpu()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device that the kernels support")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if NO_GPU is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    if skipped:
        terminalreporter.write_line(f"GPU tests skipped: {len(skipped)} ({NO_GPU})", yellow=True)


@pytest.fixture(autouse=True)
def poison():
    """NaN in all memory that nobody has written yet."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_debug():
    """Debug checks off, also after a test that turned them on."""
    hbsattn.set_debug(False)
    yield
    hbsattn.set_debug(False)
