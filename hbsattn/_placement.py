"""How a mask lies over its sequences: what its constructors work out from shapes and lengths, and what does not fit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._checks import check_index, check_is_tensor, check_same_device
from hbsattn._layout import ceil_div
from hbsattn._ops import ops

CU_SEQLENS = "an int32 Tensor (batch + 1)"


class Lengths(NamedTuple):
    """The keywords of the constructors that say where sequences begin and end."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqlen_q: int | None
    seqlen_k: int | None
    batch_size: int | None

    def check(self) -> "Lengths":
        """The same with ints for whatever stands for one."""
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size = self
        return Lengths(
            cu_seqlens_q,
            cu_seqlens_k,
            None if max_seqlen_q is None else check_index("max_seqlen_q", max_seqlen_q),
            None if max_seqlen_k is None else check_index("max_seqlen_k", max_seqlen_k),
            None if seqlen_q is None else check_index("seqlen_q", seqlen_q),
            None if seqlen_k is None else check_index("seqlen_k", seqlen_k),
            None if batch_size is None else check_index("batch_size", batch_size),
        )

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None or self.cu_seqlens_k is not None


class Place(NamedTuple):
    """Where the blocks of a mask lie, as its constructor worked it out."""

    batch: int
    rows: int
    cols: int
    packed: bool
    seqlen_q: int | None
    seqlen_k: int | None
    q_block: int  # what the ops are told: `cut_block` of the size that was given
    k_block: int
    row_stride: int  # rows of the bit matrix between two sequences; -1: they lie without gaps

    def layout(self, causal: bool) -> tuple[int, int, int, bool]:
        """A MaskLayout, for the ops that make bits."""
        return self.cols, self.q_block, self.k_block, causal


def place_blocks(
    name: str,
    device: torch.device,
    lead: Sequence[int],
    cols: int | None,
    lengths: Lengths,
    q_block_size: int,
    k_block_size: int,
) -> Place:
    """Fits a mask to its lengths, and launches nothing. `lead` is (heads, rows) for a flat mask or (batch or 1, heads,
    query blocks), `cols` the columns of a dense one.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size = lengths
    flat, row_blocks = len(lead) == 2, lead[-1]
    packed = lengths.packed
    if packed:
        if seqlen_q is not None or seqlen_k is not None:
            given = f"seqlen_q is {seqlen_q}" if seqlen_q is not None else f"seqlen_k is {seqlen_k}"
            raise ValueError(f"{given}; expected None with cu_seqlens_q and cu_seqlens_k, which give the lengths")
        batch = count_sequences(cu_seqlens_q, cu_seqlens_k, device, name)
        if batch_size not in (None, batch):
            raise ValueError(f"batch_size is {batch_size}; expected {batch}, the sequences of cu_seqlens_q")
        seqlen_q, seqlen_k = max_seqlen_q, max_seqlen_k
        if cols is None and (seqlen_q is None or seqlen_k is None):
            missing = "max_seqlen_q" if seqlen_q is None else "max_seqlen_k"
            raise ValueError(f"{missing} is None; expected an int for index lists and CSR with cu_seqlens_q")
        room = batch * ceil_div(seqlen_q, q_block_size) if seqlen_q is not None else row_blocks
        if flat and row_blocks > room:
            raise ValueError(
                f"{name} has {row_blocks} query blocks; expected at most {room}, those of {batch} sequences of "
                f"max_seqlen_q = {seqlen_q}"
            )
        if not flat and seqlen_q is not None and ceil_div(seqlen_q, q_block_size) > row_blocks:
            raise ValueError(
                f"max_seqlen_q is {seqlen_q}; expected at most {row_blocks * q_block_size}, the {row_blocks} query "
                f"blocks of {name}"
            )
        if cols is not None and seqlen_k is not None and ceil_div(seqlen_k, k_block_size) > cols:
            raise ValueError(
                f"max_seqlen_k is {seqlen_k}; expected at most {cols * k_block_size}, the {cols} key blocks of {name}"
            )
        if seqlen_k is not None:
            cols = ceil_div(seqlen_k, k_block_size)
    else:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            given = f"max_seqlen_q is {max_seqlen_q}" if max_seqlen_q is not None else f"max_seqlen_k is {max_seqlen_k}"
            raise ValueError(f"{given}; expected None without cu_seqlens_q and cu_seqlens_k (seqlen_* are for batched)")
        if flat:
            dims = 4 if cols is not None else 3
            raise ValueError(
                f"{name} has {dims - 1} dimensions; expected {dims} for batched lengths, (batch or 1, heads, ...), or "
                "cu_seqlens_q and cu_seqlens_k for packed ones"
            )
        batch = lead[0] if batch_size is None else batch_size
        if seqlen_q is None:
            seqlen_q = row_blocks * q_block_size
        else:
            _check_blocks("seqlen_q", seqlen_q, q_block_size, row_blocks, "query", name)
        if seqlen_k is not None:
            if cols is not None:
                _check_blocks("seqlen_k", seqlen_k, k_block_size, cols, "key", name)
            cols = ceil_div(seqlen_k, k_block_size)
        elif cols is not None:
            seqlen_k = cols * k_block_size
        else:
            raise ValueError("seqlen_k is None; expected an int for index lists and CSR without cu_seqlens_k")
    if not flat and lead[0] not in (1, batch):
        raise ValueError(f"{name} has a batch of {lead[0]}; expected 1 or {batch}")
    blocks = (q_block_size, k_block_size)
    if not torch.compiler.is_compiling():
        blocks = cut_block(q_block_size, seqlen_q), cut_block(k_block_size, seqlen_k)
    rows = row_blocks if flat else batch * row_blocks
    return Place(batch, rows, cols, packed, seqlen_q, seqlen_k, *blocks, -1 if flat else row_blocks)


def make_sequences(lengths: Lengths, place: Place, device: torch.device) -> Tensor:
    """The table of sequences, int32 (batch, 7)."""
    seqlens = (0, 0) if lengths.packed else (place.seqlen_q, place.seqlen_k)
    blocks = (place.q_block, place.k_block)
    return ops.make_sequences.default(*lengths[:2], device, place.batch, *seqlens, place.row_stride, *blocks)


def cut_block(block_size: int, longest: int | None) -> int:
    """The size of blocks for the ops, where no sequence is longer than `longest`: that given, or one that is not far
    above `longest` and still covers every sequence with one block. Kernels like powers of two, and multiples of 128.
    """
    if longest is None or isinstance(longest, torch.SymInt) or block_size <= longest:
        return block_size
    enough = 1 << max((longest - 1).bit_length(), 4) if longest <= 128 else 128 * ceil_div(longest, 128)
    return min(block_size, enough)


def count_sequences(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device, whose: str) -> int:
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens is not None:
            check_is_tensor(name, cu_seqlens, CU_SEQLENS)
            check_same_device(name, cu_seqlens, device, whose)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        side, other = ("q", "k") if cu_seqlens_q is None else ("k", "q")
        raise ValueError(f"cu_seqlens_{side} is None; expected {CU_SEQLENS}, as cu_seqlens_{other} is given")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}; expected (batch + 1,)")
    return cu_seqlens_q.shape[0] - 1


def _check_blocks(name: str, seqlen: int, block_size: int, blocks: int, word: str, whose: str) -> None:
    if ceil_div(seqlen, block_size) != blocks:
        low, high = max((blocks - 1) * block_size + 1, 0), blocks * block_size
        raise ValueError(
            f"{name} is {seqlen}; expected {low} to {high}, the {blocks} {word} blocks of {whose}; "
            f"that length has {ceil_div(seqlen, block_size)}"
        )
