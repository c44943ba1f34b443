"""Masks of single tokens that stay lists: their bits are made chunk by chunk, for as many queries as a call can hold.

Bits take rows * cols / 8 bytes for each head, lists only what is listed: a million tokens that attend to 16 of 8,192
blocks each have 1 GB of bits and 64 MB of lists. With blocks of one query, a run of rows is a run of tokens, so a call
on a slice of q with the bits of those rows gives the same slice of the result, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbsattn._layout import DIAGONAL, Q_BEGIN, Q_LEN, ROW_BEGIN, ceil_div
from hbsattn._sources import Lists

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

CHUNK_BYTES = 256 << 20  # of bits that a call makes at a time
INT_BYTES = 4


@dataclass(frozen=True, eq=False)
class Chunk:
    """Queries `begin` to `end`, of each batch entry if they are batched."""

    begin: int
    end: int
    bits_shape: tuple[int, int, int]
    pack: Callable[[], tuple[Tensor, Tensor]]  # makes bits and the table of sequences


def stays_lists(q_block_size: int, heads: int, rows: int, cols: int, listed: int) -> bool:
    """Whether a mask's bits would take more than a chunk, and more than twice what its `listed` entries take."""
    bits = heads * rows * ceil_div(cols, 32) * INT_BYTES
    return q_block_size == 1 and bits > CHUNK_BYTES and bits > 2 * INT_BYTES * listed


def attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    check: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The call for a mask that stays lists, without gradients: chunks of queries with their own bits.

    Gradients go another way: each chunk would give its own, rounded before they are summed, and leaves those of keys
    past its last query unset. So does dropout, which needs the places of queries in their sequence.

    Args:
        check: takes q, k, v, bits and sequences of the first chunk, the bits yet without values, and refuses what does
            not fit, before anything is launched.
        attend: takes q, k, v, bits and sequences of each chunk and returns out and lse.

    Returns:
        out and lse of all queries.
    """
    rows_dim = q.dim() - 3
    rows = q.shape[rows_dim]
    if mask.packed and not rows <= mask.rows <= rows + mask.batch:
        raise ValueError(
            f"q has {rows} rows; expected {max(mask.rows - mask.batch, 0)} to {mask.rows}, as mask has {mask.rows} "
            f"lists and {mask.batch} sequences"
        )
    out = lse = None
    for chunk in make_chunks(mask._lists, mask.sequences, mask._layout, rows, mask.packed):
        length = chunk.end - chunk.begin
        tensors = (q.narrow(rows_dim, chunk.begin, length), k, v)
        if out is None:
            bits = torch.empty(chunk.bits_shape, dtype=torch.int32, device=mask.device)
            check(*tensors, bits, mask.sequences)
            del bits
            out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        bits, sequences = chunk.pack()
        part, part_lse = attend(*tensors, bits, sequences)
        out.narrow(rows_dim, chunk.begin, length).copy_(part)
        if lse is None:
            lse = part_lse.new_empty((*part_lse.shape[:-1], rows))
        lse.narrow(-1, chunk.begin, length).copy_(part_lse)
        del bits, part, part_lse  # before the next ones come
    return out, lse


def make_chunks(lists: Lists, sequences: Tensor, layout: tuple[int, ...], rows: int, packed: bool) -> Iterator[Chunk]:
    """Cuts a mask into chunks, one after another. `rows`: of q, of each batch entry if it is batched."""
    batch, cols = 1 if packed else sequences.shape[0], layout[0]
    row_bytes = max(batch * lists.heads * ceil_div(cols, 32) * INT_BYTES, 1)
    step = max(CHUNK_BYTES // row_bytes, 1)
    for begin in range(0, max(rows, 1), step):
        end = min(begin + step, rows)
        bit_rows = batch * (end - begin)

        def pack(begin: int = begin, end: int = end, bit_rows: int = bit_rows) -> tuple[Tensor, Tensor]:
            table = cut_sequences(sequences, begin, end, packed)
            return lists.cut(begin, end).pack(table, bit_rows, layout[:4]), table

        yield Chunk(begin, end, (lists.heads, bit_rows, ceil_div(cols, 32)), pack)


def cut_sequences(sequences: Tensor, begin: int, end: int, packed: bool) -> Tensor:
    """The table of sequences of rows `begin` to `end`, for blocks of one query.

    A sequence keeps its keys, and its diagonal moves by as many queries as lie before the chunk.
    """
    cut = sequences.clone()
    q_begin = sequences[:, Q_BEGIN] if packed else torch.zeros_like(sequences[:, Q_BEGIN])
    q_len = sequences[:, Q_LEN]
    first = torch.minimum((begin - q_begin).clamp(min=0), q_len.clamp(min=0))
    last = torch.maximum(torch.minimum((end - q_begin).clamp(min=0), q_len.clamp(min=0)), first)
    cut[:, Q_LEN] = last - first
    if packed:
        cut[:, Q_BEGIN] = (q_begin + first - begin).clamp(0, end - begin)
        cut[:, ROW_BEGIN] = cut[:, Q_BEGIN]
    else:
        cut[:, ROW_BEGIN] = torch.arange(len(cut), dtype=cut.dtype, device=cut.device) * (end - begin)
    cut[:, DIAGONAL] += first
    return cut
