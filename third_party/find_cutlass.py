"""Finds the CUTLASS headers; setup.py imports this file, CMake runs it.

In this order: the directory in HBSATTN_CUTLASS_DIR, a checkout in third_party/cutlass, the PyPI package nvidia-cutlass
of the running interpreter. Run as a script it prints "<include directory>;<version>".
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

MINIMUM_VERSION = (4, 2)
PACKAGE = "nvidia-cutlass==4.2.0.0"


class CutlassError(RuntimeError):
    """No usable CUTLASS; the message says what to do."""


class Cutlass(NamedTuple):
    include: Path  # holds cutlass/cutlass.h and cute/tensor.hpp
    version: str  # e.g. "4.2.0"


def _version(include: Path) -> tuple[int, ...] | None:
    """The version of the headers in `include`; None if there are none."""
    header = include / "cutlass" / "version.h"
    if not header.is_file():
        return None
    text = header.read_text()
    return tuple(int(re.search(rf"#define CUTLASS_{part}\s+(\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH"))


def _package_include() -> Path | None:
    """The headers in the PyPI package, found without running its code, whose imports are heavy."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "source" / "include"


def find_cutlass() -> Cutlass:
    """Returns the headers to build with. Raises CutlassError if there are none, or too old ones."""
    directory = os.environ.get("HBSATTN_CUTLASS_DIR")
    if directory:
        include = Path(directory).expanduser().resolve() / "include"
        if _version(include) is None:
            raise CutlassError(
                f"HBSATTN_CUTLASS_DIR is {directory}, which has no include/cutlass/version.h; "
                "expected the root of a CUTLASS checkout"
            )
    else:
        candidates = [Path(__file__).resolve().parent / "cutlass" / "include", _package_include()]
        include = next((c for c in candidates if c is not None and _version(c) is not None), None)
        if include is None:
            raise CutlassError(
                "the CUTLASS headers were not found; expected one of\n"
                f"  the PyPI package:   pip install --no-deps {PACKAGE}\n"
                "  a checkout here:    git clone --depth 1 -b v4.2.0 https://github.com/NVIDIA/cutlass "
                "third_party/cutlass\n"
                "  one elsewhere:      export HBSATTN_CUTLASS_DIR=/path/to/cutlass\n"
                "To build without CUDA, set HBSATTN_CUDA=OFF (for CMake, -DHBSATTN_CUDA=OFF)."
            )
    version = _version(include)
    if version < MINIMUM_VERSION:
        raise CutlassError(
            f"CUTLASS in {include} is version {'.'.join(map(str, version))}; "
            f"expected {'.'.join(map(str, MINIMUM_VERSION))} or newer"
        )
    return Cutlass(include, ".".join(map(str, version)))


if __name__ == "__main__":
    try:
        found = find_cutlass()
    except CutlassError as error:
        sys.exit(f"error: {error}")
    print(f"{found.include};{found.version}")
