"""Masks of single pairs: which blocks are on and which are partial, found by looking at every pair.

Unlike the other constructors, these wait for the device: how many partial blocks there are is data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._checks import check_tensor, hint_at_flex, type_name
from hbsattn._contents import check_lengths
from hbsattn._layout import K_BEGIN, Q_BEGIN, MaskLayout, ceil_div
from hbsattn._ops import ops
from hbsattn._partial import Grid, Partial, Values, classify, fill
from hbsattn._placement import Lengths, Place, count_sequences, make_sequences, place_blocks
from hbsattn._plans import is_capturing, is_traced

Sizes = tuple[int, int]


class Made(NamedTuple):
    """What a mask of `heads` is made of."""

    place: Place
    sequences: Tensor
    bits: Tensor
    partial: Partial | None
    heads: int


def from_elements(elements: Tensor, sizes: Sizes, lengths: Lengths, causal: bool) -> Made:
    hint = "" if isinstance(elements, Tensor) else hint_at_flex(elements)
    if hint:
        raise TypeError(f"elements is a {type_name(elements)}; expected a Tensor of torch.bool{hint}")
    check_tensor("elements", elements, (3, 4), (torch.bool,))
    check_waits("from_elements", elements)
    shape = tuple(elements.shape)
    if lengths.packed:
        lengths, (lens_q, lens_k) = read_lengths("elements", elements.device, lengths, *sizes)
        if elements.dim() == 3:
            if shape[1:] != (sum(lens_q), sum(lens_k)):
                raise ValueError(
                    f"elements has shape {shape}; expected (heads, {sum(lens_q)}, {sum(lens_k)}), the queries and keys "
                    "of all sequences"
                )
            lead = (shape[0], sum(ceil_div(length, sizes[0]) for length in lens_q))
        else:
            for side, longest, given in (
                ("q", max(lens_q, default=0), shape[2]),
                ("k", max(lens_k, default=0), shape[3]),
            ):
                if longest > given:
                    raise ValueError(
                        f"elements has shape {shape}; expected room for the longest sequence of cu_seqlens_{side}, "
                        f"{longest}"
                    )
            lead = (*shape[:2], ceil_div(lengths.max_seqlen_q, sizes[0]))
    else:
        if elements.dim() != 4:
            raise ValueError(
                f"elements has 3 dimensions, shape {shape}; expected (batch or 1, heads, queries, keys), or "
                "cu_seqlens_q and cu_seqlens_k"
            )
        lengths = lengths._replace(seqlen_q=shape[2], seqlen_k=shape[3])
        lead = (*shape[:2], ceil_div(shape[2], sizes[0]))
    place = place_blocks("elements", elements.device, lead, None, lengths, *sizes)
    heads_first = elements if elements.dim() == 3 else elements.transpose(0, 1)

    def values(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if elements.dim() == 4:
            return heads_first[head, sequence.clamp(max=shape[0] - 1), query, key]
        return heads_first[head, table[Q_BEGIN][sequence] + query, table[K_BEGIN][sequence] + key]

    sequences = make_sequences(lengths, place, elements.device)
    table = sequences.to(torch.int64).unbind(1)
    return make(values, place, sequences, shape[-3], causal, shared=not lengths.packed and shape[0] == 1)


def make(values: Values, place: Place, sequences: Tensor, heads: int, causal: bool, shared: bool = False) -> Made:
    """`shared`: all sequences are alike, so that the first one tells."""
    ops.check_mask.default(place.batch, heads, place.rows, *place.layout(causal))
    grid = make_grid(place, sequences, causal, shared)
    return finish(place, sequences, *fill(values, grid, *classify(values, grid, heads)), shared)


def make_grid(place: Place, sequences: Tensor, causal: bool, shared: bool) -> Grid:
    """That of the first sequence, if they are `shared`."""
    rows = place.rows // max(place.batch, 1) if shared else place.rows
    return Grid(sequences[:1] if shared else sequences, rows, MaskLayout(*place.layout(causal)), place.packed)


def finish(place: Place, sequences: Tensor, bits: Tensor, partial: Partial | None, shared: bool) -> Made:
    if shared and place.batch > 1:
        bits = bits.repeat(1, place.batch, 1)
        partial = None if partial is None else partial.of_batch(place.batch)
    return Made(place, sequences, bits, partial, bits.shape[0])


def read_lengths(
    name: str, device: torch.device, lengths: Lengths, q_block_size: int, k_block_size: int
) -> tuple[Lengths, tuple[list[int], list[int]]]:
    """The lengths of packed sequences, and `lengths` with the longest of them where none is given."""
    count_sequences(lengths.cu_seqlens_q, lengths.cu_seqlens_k, device, name)
    if lengths.seqlen_q is not None or lengths.seqlen_k is not None:
        return lengths, ([], [])  # which place_blocks refuses
    check_lengths(name, (1, 1, torch.iinfo(torch.int64).max), None, lengths, q_block_size, k_block_size)
    lens = tuple(x.diff().tolist() for x in (lengths.cu_seqlens_q, lengths.cu_seqlens_k))
    longest = [max(x, default=0) for x in lens]
    if lengths.max_seqlen_q is not None:
        longest[0] = lengths.max_seqlen_q
    if lengths.max_seqlen_k is not None:
        longest[1] = lengths.max_seqlen_k
    return lengths._replace(max_seqlen_q=longest[0], max_seqlen_k=longest[1]), lens


def check_waits(name: str, *tensors: Tensor) -> None:
    """Refuses to be traced or captured: there the device's answers are not known."""
    if is_traced(*tensors):
        raise ValueError(f"{name} is called in a traced program; expected a call outside: it reads the device")
    if any(is_capturing(tensor.device) for tensor in tensors):
        raise ValueError(f"{name} is called while a CUDA graph is captured; expected a call before: it waits")
