"""Poisoned memory for every test, GPU tests that skip in sight, and limits that name the test which hangs.

A call that waits for a GPU cannot be interrupted, so a test that exceeds its limit ends the process, after its name
and the stacks of all threads are printed. Limits are for hangs, not for speed: the slowest test on a CPU
takes seconds, of which a loaded machine may make minutes.

`torch.use_deterministic_algorithms` with `fill_uninitialized_memory` fills whatever `empty` returns with NaN, in C++
too, so an output that a kernel forgets to write shows.
"""

from __future__ import annotations

import contextlib
import os
import threading

# Deterministic cuBLAS needs this before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import pytest_timeout
import torch

import hbsattn
from hbsattn.utils import use_kernels


def _why_not(kernels: str, shared_kilobytes: int | None = None) -> str | None:
    """Why the current device does not run these kernels. Those of sm80 run wherever any do."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        with use_kernels(kernels, shared_kilobytes=shared_kilobytes):
            return None
    except ValueError as error:
        return str(error)


NO_GPU, NO_SM90 = _why_not("sm80"), _why_not("sm90")


# Seconds of one test: fast and slow ones on a GPU, and all others.
GPU_LIMIT, SLOW_GPU_LIMIT, CPU_LIMIT = 60, 240, 900


# Tensors on the CPU are small, and on a loaded machine threads wait for each other longer than they compute.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=("auto", "sm90", "sm80"), default="auto", help="for all CUDA calls of a run")
    parser.addoption("--shared-kilobytes", type=int, help="that their CTAs may have: see hbsattn.utils.use_kernels")


def pytest_configure(config: pytest.Config) -> None:
    kernels, shared_kilobytes = config.getoption("--kernels"), config.getoption("--shared-kilobytes")
    if kernels != "auto" or shared_kilobytes is not None:
        if (reason := _why_not(kernels, shared_kilobytes)) is not None:
            raise pytest.UsageError(f"--kernels {kernels}: {reason}")
        choice = contextlib.ExitStack()
        choice.enter_context(use_kernels(kernels, shared_kilobytes=shared_kilobytes))
        config.add_cleanup(choice.close)
    config.addinivalue_line("markers", "gpu: needs a CUDA device that the kernels support")
    config.addinivalue_line("markers", "sm90: on a GPU, of what the kernels for 9.0 and their plans alone have")
    config.addinivalue_line("markers", "float32: on a GPU, where one family has kernels for it, whichever is asked for")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """In place of pytest-timeout's own timer, which prints stacks alone: names the test before it ends the process."""

    def end() -> None:
        item.config.get_terminal_writer().sep("+", f"{item.nodeid} is not done after {settings.timeout:g} s")
        pytest_timeout.timeout_timer(item, settings)

    timer = threading.Timer(settings.timeout, end)
    timer.daemon = True
    timer.start()
    item.cancel_timeout = timer.cancel  # which pytest-timeout calls
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--kernels")
    other_kernels = "--kernels sm80" if chosen == "sm80" else NO_SM90
    # On a GPU of 9.0, a run for each family has these once.
    in_other_run = "--kernels sm90" if chosen == "sm90" else "--kernels sm80" if other_kernels != NO_SM90 else None
    for item in items:
        gpu, slow = item.get_closest_marker("gpu"), item.get_closest_marker("slow")
        if gpu and NO_GPU is not None:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif gpu and item.get_closest_marker("sm90") and other_kernels is not None:
            item.add_marker(pytest.mark.skip(reason=f"of the kernels for 9.0: {other_kernels}"))
        elif gpu and item.get_closest_marker("float32") and in_other_run is not None:
            item.add_marker(pytest.mark.skip(reason=f"the same without {in_other_run}"))
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout((SLOW_GPU_LIMIT if slow else GPU_LIMIT) if gpu else CPU_LIMIT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in r.keywords]
    if skipped:
        why = NO_GPU or "see their reasons: -rs"
        terminalreporter.write_line(f"GPU tests skipped: {len(skipped)} ({why})", yellow=True)


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
