"""Other attention libraries, one file each. What cannot be imported is left out, with the reason.

A file defines RIVALS, a tuple of `Rival` objects; its imports of the library are at its top, so that importing the file
fails where the library is missing. Outputs are checked like our own before they are timed (gate.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from masks import visible_blocks
from workloads import Window, Workload

# In the order in which their columns are shown.
FILES = (
    "sdpa",
    "flex",
    "flash_attn_cute",
    "flash_attn_interface",
    "flashinfer",
    "block_sparse_attn",
    "fastvideo",
    "cudnn_frontend",
)


class Rival(Protocol):
    """A library's attention.

    name: short, lower-case; it identifies the rival in results.
    label: for people.
    dense: whether it ignores block masks and computes every pair.
    differentiable: whether PyTorch can differentiate its call; if not, it does not run where gradients are timed.
    dtypes: of tensors that it is timed with.
    windowed: whether it can hide what the windows of a workload hide; if not, it does not run on those that have some.
    """

    name: str
    label: str
    dense: bool
    differentiable: bool
    dtypes: tuple[torch.dtype, ...]
    windowed: bool

    def refusal(self, workload: Workload) -> str | None:
        """Why the library does not cover this workload; None if it does."""

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        """Converts the mask, compiles what needs compiling, and returns the call to time.

        block_mask: bool (batch, query heads, query blocks, key blocks). The call returns (batch, seqlen, heads,
        head_dim), as q is; layouts are converted here, not in the call. Where gradients are timed, q, k and v require
        them, and PyTorch records what is done here and in the call.
        """


def load(files: list[str]) -> tuple[list[Rival], dict[str, str]]:
    """The rivals of these files, and for each file that does not import the reason."""
    rivals: list[Rival] = []
    missing = {}
    for name in files:
        if name not in FILES:
            raise ValueError(f"no rival is called {name!r}; expected some of {', '.join(FILES)}")
        try:
            rivals.extend(importlib.import_module(f"baselines.{name}").RIVALS)
        except Exception as error:  # a library that is there but broken may raise anything
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return rivals, missing


def index_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of the key blocks that are on: counts int32 (..., rows) and indices int32 (..., rows, key blocks), those
    that are on first and ascending.
    """
    order = torch.sort(blocks.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def split_blocks(workload: Workload, block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that are on, split into those that the diagonal or a window cuts and those that attend as a whole.

    block_mask: bool (batch, query heads, query blocks, key blocks).
    """
    seen = {window: visible_blocks(workload, block_mask.device, window) for window in workload.head_windows}
    heads = [seen[window] for window in windows_of_queries(workload)]
    visible, whole = (torch.stack(blocks) for blocks in zip(*heads, strict=True))
    return block_mask & visible & ~whole, block_mask & whole


def windows_of_queries(workload: Workload) -> list[Window]:
    """The window of each query head."""
    return [window for window in workload.head_windows for _ in range(workload.heads // workload.mask_heads)]


def expect(condition: bool, what: str) -> str | None:
    """A refusal unless the condition holds."""
    return None if condition else f"supports {what} only"
