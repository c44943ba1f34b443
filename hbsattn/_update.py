"""How a mask is rewritten in place: `BlockMask.update_`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbsattn._checks import check_same_device
from hbsattn._contents import can_read, check_contents
from hbsattn._placement import Lengths, Place, count_sequences, make_sequences
from hbsattn._plans import is_capturing, normal_tensors
from hbsattn._sources import FORMS

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask


def update(
    mask: BlockMask, contents: tuple[Tensor, ...], cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """What `BlockMask.update_` documents."""
    if not mask._form:
        raise ValueError(
            "mask was made by a pattern, by windowed, from other masks or of single pairs (from_elements, "
            "from_mask_mod, from_flex); expected one from another constructor, as update_ rewrites what that took"
        )
    kind = FORMS[mask._form]
    if len(contents) != len(kind.names):
        raise TypeError(
            f"update_ is called with {len(contents)} tensors; expected {' and '.join(kind.names)}, as mask was "
            f"built by from_{kind.form}"
        )
    source = kind.check(*contents)
    name = kind.names[0]
    check_same_device(name, source.main, mask.device, "mask")
    if tuple(source.main.shape) != mask._shape:
        raise ValueError(
            f"{name} has shape {tuple(source.main.shape)}; expected {mask._shape}, that which mask was built from"
        )
    lists = mask._lists
    if lists is not None and source.indices.shape != lists.indices.shape:
        raise ValueError(
            f"indices has shape {tuple(source.indices.shape)}; expected {tuple(lists.indices.shape)}, as mask "
            "stays lists"
        )
    with normal_tensors(), torch.no_grad():
        place, lengths, sequences = _place_again(mask, cu_seqlens_q, cu_seqlens_k)
        if can_read(*source.tensors, sequences):
            check_contents(source, _find_lead(mask), lengths, place, sequences, mask.q_block_size, mask.k_block_size)
        if lists is None:
            mask._bits.copy_(source.pack(sequences, place.rows, mask._layout[:4]))
        else:
            lists.counts.copy_(source.counts)
            lists.indices.copy_(source.indices)
        if lengths.packed:
            mask.sequences.copy_(sequences)
    if is_capturing(mask.device):
        object.__setattr__(mask, "_replayed", True)
    if not torch.compiler.is_compiling():  # the plans that a compiled program outdates are made anew when next used
        mask._plans.remake(mask)


def _find_lead(mask: BlockMask) -> tuple[int, ...]:
    """The shape of what the constructor took, without columns, as `place_blocks` has it."""
    if mask._form == "dense":
        return mask._shape[:-1]
    if mask._form == "indices":
        return mask._shape
    flat = (mask.heads, mask.rows)
    return flat if mask.packed else (mask.batch, mask.heads, mask.rows // max(mask.batch, 1))


def _place_again(
    mask: BlockMask, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Place, Lengths, Tensor]:
    """The place of the same blocks over new lengths, or over those that are there, and the table of sequences."""
    longest = (mask.seqlen_q, mask.seqlen_k) if mask.packed else (None, None)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, *longest, None, None, None)
    lead = _find_lead(mask)
    shape = (mask.batch, mask.rows, mask.cols, mask.packed, mask.seqlen_q, mask.seqlen_k)
    place = Place(*shape, mask._q_block, mask._k_block, -1 if len(lead) == 2 else lead[-1])
    if not lengths.packed:
        return place, lengths, mask.sequences
    if not mask.packed:
        given = "cu_seqlens_q" if cu_seqlens_q is not None else "cu_seqlens_k"
        raise ValueError(f"{given} is a Tensor; expected None, as mask was built for batched tensors")
    batch = count_sequences(cu_seqlens_q, cu_seqlens_k, mask.device, "mask")
    if batch != mask.batch:
        raise ValueError(f"cu_seqlens_q has {batch} sequences; expected {mask.batch}, those of mask")
    return place, lengths, make_sequences(lengths, place, mask.device)
