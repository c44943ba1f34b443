"""The work lists of a mask, taken apart: what the planning ops make for a call, as tensors of records."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import hbsattn
from hbsattn._ops import kernel_family

ops = torch.ops.hbsattn
RECORD_INTS = 16


class Lists(NamedTuple):
    """Parts of what plan_backward makes; csrc/torch/plan_parts.h has the order."""

    columns: Tensor  # (mask heads, cols, words)
    key_items: Tensor  # (records, 16)
    items: Tensor  # (records, 16)


def uses_sm80() -> bool:
    """Whether CUDA calls use the kernels for 8.0 and newer, whose forward shares its lists with gradients, and whose
    tiles of keys are planned as those of deterministic calls, and never cut."""
    name = kernel_family()
    suits = torch.cuda.get_device_capability() == (9, 0) and "sm_90a" in hbsattn.build_info()["archs"]
    return name == "sm80" or (name == "auto" and not suits)


def layout_of(mask: hbsattn.BlockMask) -> tuple[int, int, int, int, int]:
    return mask._layout


def call_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: hbsattn.BlockMask,
    *,
    bits: Tensor | None = None,
    rules: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    pack_heads: bool = True,
    scale: float = 0.125,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    allow_tf32: bool = False,
) -> tuple[Any, ...]:
    """What each op of an attention call takes first. `bits` and `rules`: instead of the mask's own."""
    tables = (mask.bits if bits is None else bits, mask.sequences, mask._rules if rules is None else rules)
    partial = (mask._partial, mask._matrices, mask._elements)
    numbers = (pack_heads, scale, dropout_p, softcap, allow_tf32)
    return (q, k, v, *tables, *partial, sinks, dropout_seed, layout_of(mask), *numbers)


def plan_items(mask: hbsattn.BlockMask, *call: int, for_backward: bool = False) -> Tensor:
    """The forward's list, dead records behind the others. `call`: heads_q, heads_k, head_dim, element size, and whether
    heads share tiles. `for_backward`: that of a forward with dropout or a softcap."""
    return ops.plan_items(mask.bits, mask.sequences, mask._rules, layout_of(mask), call, for_backward)


def plan_backward(
    mask: hbsattn.BlockMask,
    *call: int,
    rows_k: int,
    deterministic: bool = False,
    needs: tuple[bool, bool, bool] = (True, True, True),
    sequences: Tensor | None = None,
    altered: bool = False,
) -> Tensor:
    table = mask.sequences if sequences is None else sequences
    tables = (mask.bits, table, mask._rules)
    return ops.plan_backward(*tables, layout_of(mask), call, rows_k, mask.packed, deterministic, needs, altered)


def take_apart(mask: hbsattn.BlockMask, plan: Tensor, *call: int) -> Lists:
    heads, rows, _ = mask.bits.shape
    shape = (heads, mask.cols, -(-rows // 32))
    columns = heads * mask.cols * shape[2]
    begin = -(-columns // RECORD_INTS) * RECORD_INTS
    records = plan[begin:].view(-1, RECORD_INTS)
    items = plan_items(mask, *call).shape[0] if plan.device.type == "cuda" else 0
    return Lists(plan[:columns].view(shape), records[: records.shape[0] - items], records[records.shape[0] - items :])
