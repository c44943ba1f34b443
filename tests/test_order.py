"""In which order tiles of queries are taken."""

from __future__ import annotations

import pytest
import torch

import hbsattn
from plans import plan_items

BLOCKS, HEAD = 5, 2  # columns of a record


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("heads", [1, 3, 32])
def test_light_items_of_all_sections_come_last(heads: int):
    """Of heads that are alike: more of them than the L2 cache holds, so that the list has sections."""
    n = 8192 // 128
    mask = hbsattn.BlockMask.from_dense(
        torch.ones((1, 1, n, n), dtype=torch.bool, device="cuda"), 128, 128, seqlen_q=8192, seqlen_k=8192, causal=True
    )
    items = plan_items(mask, heads, heads, 128, 2, True)[: heads * n].cpu()
    blocks = items[:, BLOCKS]
    assert sorted(zip(items[:, HEAD].tolist(), blocks.tolist(), strict=True)) == [
        (head, count) for head in range(heads) for count in range(1, n + 1)
    ]
    half = len(items) // 2
    if heads == 32:
        assert int(blocks[:half].min()) >= int(blocks[half:].max())
    for part in (items[:half], items[half:]):
        begins = (part[1:, BLOCKS] > part[:-1, BLOCKS]).nonzero().flatten()  # of sections, heaviest items first
        assert (heads < 32) == (len(begins) == 0)
