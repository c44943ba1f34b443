"""Where and with what a run was made."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import hbsattn

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "hbsattn",
    "torch",
    "triton",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "flashinfer-python",
    "block-sparse-attn",
    "fastvideo-kernel",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
)


def describe(commit: str | None) -> dict[str, object]:
    """Machine, versions, commit and date. `commit`: for a copy of the repository without its history."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver, power_limit, max_clock = _query_gpu("driver_version", "power.limit", "clocks.max.sm")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _git("describe", "--always", "--dirty", "--abbrev=40"),
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "power_limit": power_limit,
        "max_sm_clock": max_clock,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "versions": _versions(),
        "build": {key: str(value) for key, value in hbsattn.build_info().items()},
    }


def lines(described: dict[str, object]) -> list[str]:
    """The same for people."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    return [
        f"{described['gpu']}, {described['multiprocessors']} SMs, driver {described['driver']}, CUDA "
        f"{described['cuda']}, cuDNN {described['cudnn']}, power limit {described['power_limit']}",
        f"{versions}, Python {described['python']}",
        f"commit {described['commit']}, {described['date']}",
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _git(*arguments: str) -> str | None:
    return _run("git", *arguments)


def _query_gpu(*fields: str) -> list[str | None]:
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
    answer = _run("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return values if len(values) == len(fields) else [None] * len(fields)
