"""Masks of one place: whether two are, and what they have together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbsattn._checks import check_same_device
from hbsattn._contents import can_read
from hbsattn._partial import intersect
from hbsattn._plans import normal_tensors

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

PLACE = ("q_block_size", "k_block_size", "causal", "packed", "seqlen_q", "seqlen_k", "batch", "rows", "cols")


def check_place(mask: BlockMask, other: BlockMask) -> None:
    """Refuses a mask whose bits lie otherwise."""
    check_same_device("the other mask", other.sequences, mask.device, "the first")
    for name in PLACE:
        mine, given = getattr(mask, name), getattr(other, name)
        if mine != given:
            raise ValueError(f"{name} of the other mask is {given}; expected {mine}, that of the first")
    if can_read(mask.sequences, other.sequences) and not torch.equal(mask.sequences, other.sequences):
        raise ValueError("cu_seqlens of the other mask differ; expected those of the first")


def join(mask: BlockMask, other: BlockMask, of_bits: Callable[[Tensor, Tensor], Tensor]) -> BlockMask:
    """`of_bits`: what becomes of the bits. Only bitwise_and takes partial blocks."""
    check_place(mask, other)
    for whose, one in (("the first", mask), ("the other", other)):
        if one._rules is not None:
            raise ValueError(
                f"{whose} mask has windows; expected masks without: join those, and call windowed on the result"
            )
        if one._partial is not None and of_bits is not torch.bitwise_and:
            raise ValueError(f"{whose} mask has partial blocks; expected masks without: those are joined by & alone")
    heads = max(mask.heads, other.heads)
    if min(mask.heads, other.heads) == 0 or heads % mask.heads or heads % other.heads:
        raise ValueError(f"masks have {mask.heads} and {other.heads} heads; expected one to be a multiple of the other")
    with normal_tensors():
        bits = (m.bits.repeat_interleave(heads // m.heads, dim=0) if m.heads < heads else m.bits for m in (mask, other))
        partial = (m._partial_blocks and m._partial_blocks.of_heads(heads) for m in (mask, other))
        return mask._with_bits(*intersect(of_bits(*bits), mask.cols, *partial))
