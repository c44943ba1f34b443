"""Masks of single tokens that stay lists: their bits are made chunk by chunk, for as many queries as a call can hold.

Bits take rows * cols / 8 bytes for each head, lists only what is listed: a million tokens that attend to 16 of 8,192
blocks each have 1 GB of bits and 64 MB of lists. With blocks of one query, a run of rows is a run of tokens, so a call
on a slice of q with the bits of those rows gives the same slice of the result, up to rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hbsattn._layout import K_LEN, Q_BEGIN, Q_LEN, ROW_BEGIN, ceil_div
from hbsattn._ops import ops

CHUNK_BYTES = 256 << 20  # of bits that a call makes at a time
INT_BYTES = 4


@dataclass(frozen=True, eq=False)
class Lists:
    """What `BlockMask.from_indices` was given: int32 counts (heads, rows) or (batch or 1, heads, rows), and indices, of
    a dimension more."""

    counts: Tensor
    indices: Tensor

    @property
    def heads(self) -> int:
        return self.counts.shape[-2]

    def pack(
        self, sequences: Tensor, rows: int, cols: int, q_block_size: int, k_block_size: int, causal: bool
    ) -> Tensor:
        """Returns the bits, int32 (heads, rows, ceil(cols / 32))."""
        flat = self.counts.dim() == 2
        return ops.pack_indices.default(
            self.counts, self.indices, sequences, flat, rows, cols, q_block_size, k_block_size, causal
        )

    def cut(self, begin: int, end: int) -> "Lists":
        """The lists of some rows, of each batch entry if they are batched."""
        return Lists(self.counts[..., begin:end].contiguous(), self.indices[..., begin:end, :].contiguous())

    def clone(self) -> "Lists":
        return Lists(self.counts.clone(), self.indices.clone())

    def to(self, device: torch.device | str) -> "Lists":
        return Lists(self.counts.to(device), self.indices.to(device))


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


def make_chunks(
    lists: Lists, sequences: Tensor, cols: int, k_block_size: int, causal: bool, rows: int, packed: bool
) -> Iterator[Chunk]:
    """Cuts a mask into chunks, one after another. `rows`: of q, of each batch entry if it is batched."""
    batch = 1 if packed else sequences.shape[0]
    row_bytes = max(batch * lists.heads * ceil_div(cols, 32) * INT_BYTES, 1)
    step = max(CHUNK_BYTES // row_bytes, 1)
    for begin in range(0, max(rows, 1), step):
        end = min(begin + step, rows)
        bit_rows = batch * (end - begin)

        def pack(begin: int = begin, end: int = end, bit_rows: int = bit_rows) -> tuple[Tensor, Tensor]:
            table = cut_sequences(sequences, begin, end, causal, packed)
            return lists.cut(begin, end).pack(table, bit_rows, cols, 1, k_block_size, causal), table

        yield Chunk(begin, end, (lists.heads, bit_rows, ceil_div(cols, 32)), pack)


def cut_sequences(sequences: Tensor, begin: int, end: int, causal: bool, packed: bool) -> Tensor:
    """The table of sequences of rows `begin` to `end`, for blocks of one query.

    A causal sequence keeps the keys that its last query in the chunk sees, so that they end where they did.
    """
    cut = sequences.clone()
    q_begin = sequences[:, Q_BEGIN] if packed else torch.zeros_like(sequences[:, Q_BEGIN])
    q_len = sequences[:, Q_LEN]
    zero = torch.zeros_like(q_len)
    first = torch.minimum((begin - q_begin).clamp(min=0), q_len.clamp(min=0))
    last = torch.maximum(torch.minimum((end - q_begin).clamp(min=0), q_len.clamp(min=0)), first)
    cut[:, Q_LEN] = last - first
    if packed:
        cut[:, Q_BEGIN] = (q_begin + first - begin).clamp(0, end - begin)
        cut[:, ROW_BEGIN] = cut[:, Q_BEGIN]
    else:
        cut[:, ROW_BEGIN] = torch.arange(len(cut), dtype=cut.dtype, device=cut.device) * (end - begin)
    if causal:
        cut[:, K_LEN] = torch.maximum(sequences[:, K_LEN] - (q_len - last), zero)
    return cut
