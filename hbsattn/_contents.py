"""Checks of what tensors hold, which read memory: always that of a CPU, that of a device in debug mode."""

import os
from itertools import pairwise

import torch
from torch import Tensor

from hbsattn._checks import check_bool
from hbsattn._layout import K_LEN, ceil_div, count_blocks, locate_rows
from hbsattn._placement import Lengths, Place
from hbsattn._plans import is_capturing, is_traced
from hbsattn._sources import Lists, Rows, Source

_WORDS = {True: ("1", "true", "on", "yes"), False: ("", "0", "false", "off", "no")}


def _read_environment() -> bool:
    value = os.environ.get("HBSATTN_DEBUG", "")
    for enabled, words in _WORDS.items():
        if value.strip().lower() in words:
            return enabled
    raise ValueError(f"HBSATTN_DEBUG is {value!r}; expected 1, true, on, yes, 0, false, off, no or nothing")


_debug = _read_environment()


def set_debug(enabled: bool) -> None:
    """Switches the checks that read a CUDA device's memory, and so wait for it; HBSATTN_DEBUG=1 starts with them on.

    They verify cumulative lengths, block counts and listed indices when a mask is built or updated, and lengths when it
    is used, and raise ValueError. On a CPU these checks are always on. They are skipped while a CUDA graph is captured
    or a program is traced.
    """
    global _debug
    _debug = check_bool("enabled", enabled)


def can_read(*tensors: Tensor) -> bool:
    """Whether to check what these tensors hold."""
    device = tensors[0].device
    if not (device.type == "cpu" or (_debug and device.type == "cuda")):
        return False
    return not (is_traced(*tensors) or is_capturing(device))


def check_contents(
    source: Source,
    lead: tuple[int, ...],
    lengths: Lengths,
    place: Place,
    sequences: Tensor,
    q_block_size: int,
    k_block_size: int,
) -> None:
    """Checks lengths, and lists or rows. `lead`: as `place_blocks` has it."""
    name = source.names[0]
    if lengths.packed:
        check_lengths(name, lead, source.cols, lengths, q_block_size, k_block_size)
    if isinstance(source, Lists):
        _check_lists(source.counts, source.indices, place, sequences)
    elif isinstance(source, Rows):
        _check_rows(source.indptr, source.indices, place, sequences)


def check_total(name: str, tensor: Tensor, sequences: Tensor, begin: int, length: int) -> None:
    """Rows past the end of the last sequence are padding."""
    total = int(sequences[-1, begin] + sequences[-1, length]) if sequences.shape[0] else 0
    if tensor.shape[0] < total:
        hint = "; heads come after the length: (total, heads, head_dim)" if tensor.shape[1] >= total else ""
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows; expected at least {total}, which is cu_seqlens_{name}[-1]{hint}"
        )


def check_lengths(
    name: str, lead: tuple[int, ...], cols: int | None, lengths: Lengths, q_block_size: int, k_block_size: int
) -> None:
    """Checks cumulative lengths, which must be there."""
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


def _check_range(entries: Tensor, row: Tensor, place: Place, sequences: Tensor, padded: bool = False) -> None:
    """Checks listed key blocks, each of its row of the bit matrix. Padded lists may name what the longest sequence has:
    one may serve several sequences.
    """
    sequence, _, used = locate_rows(sequences, place.rows, place.q_block)
    if place.batch == 0:
        return
    blocks = count_blocks(sequences, K_LEN, place.k_block)[sequence]
    limit = torch.full_like(blocks, place.cols) if padded else blocks
    wrong = used[row] & ((entries < 0) | (entries >= limit[row]))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        whose = "a sequence of max_seqlen_k" if padded and place.packed else "the row's sequence"
        raise ValueError(
            f"indices has the entry {int(entries[at])} in row {int(row[at])}; expected 0 to {int(limit[row[at]]) - 1}, "
            f"the key blocks of {whose}"
        )


def _check_lists(counts: Tensor, indices: Tensor, place: Place, sequences: Tensor) -> None:
    width = indices.shape[-1]
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > width):
        raise ValueError(
            f"counts has values from {int(counts.min())} to {int(counts.max())}; expected 0 to {width}, the last "
            "dimension of indices"
        )
    padded = counts.dim() == 3
    if padded:
        counts, indices = counts.expand(place.batch, -1, -1), indices.expand(place.batch, -1, -1, -1)
    at = (torch.arange(width, device=counts.device) < counts.unsqueeze(-1)).nonzero(as_tuple=True)
    row = at[0] * counts.shape[2] + at[2] if padded else at[1]
    _check_range(indices[at], row, place, sequences, padded)


def _check_rows(indptr: Tensor, indices: Tensor, place: Place, sequences: Tensor) -> None:
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
        _check_range(listed, row, place, sequences)
