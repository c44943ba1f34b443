"""How a mask lies over its sequences: what its constructors work out from shapes and lengths, and what does not fit."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._layout import K_LEN, ceil_div, count_blocks, locate_rows
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


class Place(NamedTuple):
    """Where the blocks of a mask lie, as its constructor worked it out."""

    sequences: Tensor
    batch: int
    rows: int
    cols: int
    packed: bool
    seqlen_q: int | None
    seqlen_k: int | None


def place_blocks(
    name: str,
    device: torch.device,
    lead: Sequence[int],
    cols: int | None,
    lengths: Lengths,
    q_block_size: int,
    k_block_size: int,
) -> Place:
    """Fits a mask to its lengths. `lead` is (heads, rows) for a flat mask or (batch or 1, heads, query blocks), `cols`
    the columns of a dense one.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size = lengths
    for keyword, value in zip(Lengths._fields[2:], lengths[2:], strict=True):
        if value is not None and not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{keyword} is {value!r}; expected an int")
    flat, row_blocks = len(lead) == 2, lead[-1]
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        if seqlen_q is not None or seqlen_k is not None:
            given = f"seqlen_q is {seqlen_q}" if seqlen_q is not None else f"seqlen_k is {seqlen_k}"
            raise ValueError(f"{given}; expected None with cu_seqlens_q and cu_seqlens_k, which give the lengths")
        batch = _batch_of(cu_seqlens_q, cu_seqlens_k)
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
        if seqlen_k is None:
            if cols is None:
                raise ValueError("seqlen_k is None; expected an int for index lists and CSR without cu_seqlens_k")
            seqlen_k = cols * k_block_size
        _check_blocks("seqlen_q", seqlen_q, q_block_size, row_blocks, f"query blocks of {name}")
        if cols is not None:
            _check_blocks("seqlen_k", seqlen_k, k_block_size, cols, f"key blocks of {name}")
        cols = ceil_div(seqlen_k, k_block_size)
    if not flat and lead[0] not in (1, batch):
        raise ValueError(f"{name} has a batch of {lead[0]}; expected 1 or {batch}")
    sequences = ops.make_sequences.default(
        cu_seqlens_q,
        cu_seqlens_k,
        device,
        batch,
        0 if packed else seqlen_q,
        0 if packed else seqlen_k,
        q_block_size,
        k_block_size,
        -1 if flat else row_blocks,
    )
    return Place(sequences, batch, row_blocks if flat else batch * row_blocks, cols, packed, seqlen_q, seqlen_k)


def _batch_of(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens is not None:
            check_is_tensor(name, cu_seqlens, CU_SEQLENS)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        side, other = ("q", "k") if cu_seqlens_q is None else ("k", "q")
        raise ValueError(f"cu_seqlens_{side} is None; expected {CU_SEQLENS}, as cu_seqlens_{other} is given")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}; expected (batch + 1,)")
    return cu_seqlens_q.shape[0] - 1


def check_block_sizes(q_block_size: int, k_block_size: int) -> None:
    for name, value in (("q_block_size", q_block_size), ("k_block_size", k_block_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected an int")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def check_is_tensor(name: str, value: object, accepted: str = "a Tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {accepted}")


def check_tensor(name: str, tensor: Tensor, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    accepted = " or ".join(map(str, dtypes))
    check_is_tensor(name, tensor, f"a Tensor of {accepted}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {accepted}")
    if tensor.dim() not in dims:
        raise ValueError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; expected {' or '.join(map(str, dims))}"
        )


def _check_blocks(name: str, seqlen: int, block_size: int, blocks: int, what: str) -> None:
    if ceil_div(seqlen, block_size) != blocks:
        low, high = max((blocks - 1) * block_size + 1, 0), blocks * block_size
        raise ValueError(f"{name} is {seqlen}; expected {low} to {high}, the {blocks} {what}")


def to_int32(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int64:
        # Clamped first: a large value must stay out of range.
        tensor = tensor.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return tensor.contiguous()


# Debug mode: these read device memory.


def check_total(name: str, tensor: Tensor, sequences: Tensor, begin: int, length: int) -> None:
    total = int(sequences[-1, begin] + sequences[-1, length]) if sequences.shape[0] else 0
    if tensor.shape[0] != total:
        raise ValueError(f"{name} has {tensor.shape[0]} rows; expected {total}, cu_seqlens_{name}[-1]")


def check_lengths(
    name: str, lead: Sequence[int], cols: int | None, lengths: Lengths, q_block_size: int, k_block_size: int
) -> None:
    if lengths.cu_seqlens_q is None or lengths.cu_seqlens_k is None:
        return
    flat = len(lead) == 2
    sides = (
        ("q", "query", lengths.cu_seqlens_q, lengths.max_seqlen_q, q_block_size, lead[-1]),
        ("k", "key", lengths.cu_seqlens_k, lengths.max_seqlen_k, k_block_size, cols),
    )
    for side, word, cu_seqlens, longest, block_size, extent in sides:
        ends = cu_seqlens.tolist()
        if ends[0] != 0:
            raise ValueError(f"cu_seqlens_{side}[0] is {ends[0]}; expected 0")
        for i in range(1, len(ends)):
            if ends[i] < ends[i - 1]:
                raise ValueError(
                    f"cu_seqlens_{side}[{i}] is {ends[i]}; expected at least {ends[i - 1]}, the one before"
                )
        sizes = [end - begin for begin, end in pairwise(ends)]
        if longest is not None and max(sizes, default=0) > longest:
            raise ValueError(f"max_seqlen_{side} is {longest}; expected at least {max(sizes)}, the longest sequence")
        blocks = [ceil_div(size, block_size) for size in sizes]
        if extent is None:
            continue
        if flat and sum(blocks) != extent:
            raise ValueError(f"{name} has {extent} {word} blocks; expected {sum(blocks)}, those of all sequences")
        if not flat and max(blocks, default=0) > extent:
            raise ValueError(
                f"{name} has {extent} {word} blocks; expected at least {max(blocks)}, those of the longest sequence"
            )


def _check_range(entries: Tensor, row: Tensor, place: Place, q_block_size: int, k_block_size: int) -> None:
    """Checks listed key blocks, each of its row of the bit matrix."""
    sequence, _, used = locate_rows(place.sequences, place.rows, q_block_size)
    if place.batch == 0:
        return
    limit = torch.where(
        used, count_blocks(place.sequences, K_LEN, k_block_size)[sequence], torch.iinfo(torch.int32).max
    )
    wrong = used[row] & ((entries < 0) | (entries >= limit[row]))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"indices has the entry {int(entries[at])} in row {int(row[at])}; expected 0 to {int(limit[row[at]]) - 1}, "
            "the key blocks of the row's sequence"
        )


def check_lists(counts: Tensor, indices: Tensor, place: Place, q_block_size: int, k_block_size: int) -> None:
    width = indices.shape[-1]
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > width):
        raise ValueError(
            f"counts has values from {int(counts.min())} to {int(counts.max())}; expected 0 to {width}, the last "
            "dimension of indices"
        )
    if counts.dim() == 3:
        counts, indices = counts.expand(place.batch, -1, -1), indices.expand(place.batch, -1, -1, -1)
    at = (torch.arange(width, device=counts.device) < counts.unsqueeze(-1)).nonzero(as_tuple=True)
    row = at[1] if counts.dim() == 2 else at[0] * counts.shape[2] + at[2]
    _check_range(indices[at], row, place, q_block_size, k_block_size)


def check_rows(indptr: Tensor, indices: Tensor, place: Place, q_block_size: int, k_block_size: int) -> None:
    entries = indices.shape[0]
    sizes = indptr[:, 1:] - indptr[:, :-1]
    if indptr.numel() and (int(indptr.min()) < 0 or int(indptr.max()) > entries or bool((sizes < 0).any())):
        raise ValueError(
            f"indptr has values from {int(indptr.min())} to {int(indptr.max())}; expected rows that do not decrease, "
            f"from 0 to {entries}, the entries of indices"
        )
    for head in range(indptr.shape[0]):
        row = torch.repeat_interleave(torch.arange(place.rows, device=indptr.device), sizes[head])
        listed = indices[int(indptr[head, 0]) : int(indptr[head, -1])]
        _check_range(listed, row, place, q_block_size, k_block_size)
