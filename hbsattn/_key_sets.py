"""Masks whose query blocks attend to keys one by one: sets of keys that all queries of a block share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbsattn._elements import Made, check_waits
from hbsattn._layout import MaskLayout, Reach, ceil_div, pack_bits
from hbsattn._ops import ops
from hbsattn._partial import GRANULE, PAIRS_AT_ONCE, Grid, Partial, find_blocks, point_at
from hbsattn._placement import Lengths, make_sequences, place_blocks

# For a mask head and query blocks of a sequence, from the first to before the last: bool (query blocks, keys).
KeySets = Callable[[int, int, int, int], Tensor]


def from_key_sets(
    sets: KeySets, heads: int, q_block_size: int, lengths: Lengths, causal: bool, device: torch.device
) -> Made:
    """A mask for batched tensors, of key blocks of a granule: those of which some keys count are partial."""
    check_waits("from_key_sets", torch.empty(0, device=device))
    seqlen_q, seqlen_k = lengths.seqlen_q, lengths.seqlen_k
    rows = ceil_div(seqlen_q, q_block_size)
    place = place_blocks("mask", device, (1, heads, rows), None, lengths, q_block_size, GRANULE)
    sequences = make_sequences(lengths, place, device)
    ops.check_mask.default(place.batch, heads, place.rows, *place.layout(causal))
    words = torch.zeros((heads, place.rows, place.cols), dtype=torch.int16, device=device)
    step = max(PAIRS_AT_ONCE // max(seqlen_k, 1), 1)
    for head in range(heads if seqlen_k else 0):
        for sequence in range(place.batch):
            for begin in range(0, rows, step):
                end = min(begin + step, rows)
                on = sets(head, sequence, begin, end)
                words[head, sequence * rows + begin : sequence * rows + end] = pack_bits(on, torch.int16)
    every = pack_bits(torch.ones(seqlen_k, dtype=torch.bool, device=device), torch.int16)
    some = words != 0
    reach = Reach(Grid(sequences, place.rows, MaskLayout(*place.layout(causal))).ends)
    bits, short = (reach.trim(pack_bits(x)) for x in (some, some & (words != every)))
    return Made(place, sequences, bits, _to_partial(words, short, place.q_block), heads)


def _to_partial(words: Tensor, short: Tensor, q_block: int) -> Partial | None:
    """The matrices of the blocks of `short`: all rows of one are the same word."""
    found = find_blocks(short, words.shape[2])
    if found.row.shape[0] == 0:
        return None
    kinds, numbers = words[tuple(found)].unique(return_inverse=True)
    elements = kinds.view(-1, 1, 1).expand(-1, q_block, -1).contiguous()
    return Partial(point_at(short), numbers.to(torch.int32), elements)
