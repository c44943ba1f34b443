"""Block masks of the workloads, and the exact count of the work in them."""

from __future__ import annotations

import torch
from torch import Tensor

from workloads import Workload

SINKS = 4  # key blocks at the begin of the sequence that every row of a local mask attends to
KEPT = 0.9  # the share of a common list that each of the query blocks that draw from it keeps

# Floating-point operations for each attending pair and element of a head: a multiplication and an addition in each
# product, of which the forward has two and the backward five.
FLOPS = {"forward": 4, "backward": 10, "training": 14}


def make_mask(workload: Workload, device: torch.device | str, seed: int) -> Tensor:
    """The block mask: bool (batch, mask heads, query blocks, key blocks), not always cut at the diagonal."""
    shape = (workload.batch, workload.mask_heads, *workload.blocks)
    if workload.density >= 1:
        return torch.ones(shape, dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    for head in mask.flatten(0, 1):  # one at a time: the random numbers need four times the mask's memory
        head.copy_(_draw(workload, generator))
    if workload.pattern == "half-dense":
        mask[:, ::2] = True
    return mask


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as lists: counts int32 (..., rows) and indices int32 (..., rows, the longest list)."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    indices = block_mask.to(torch.uint8).topk(int(counts.max())).indices.to(torch.int32)
    return counts, indices


def visible_blocks(workload: Workload, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Which blocks hold a pair that attends, and which hold no other: bool (query blocks, key blocks) twice."""
    q_blocks, k_blocks = workload.blocks
    first_query = torch.arange(q_blocks, device=device)[:, None] * workload.q_block
    first_key = torch.arange(k_blocks, device=device)[None] * workload.k_block
    if not workload.causal:
        visible = torch.ones(q_blocks, k_blocks, dtype=torch.bool, device=device)
        return visible, visible
    last_query = (first_query + workload.q_block).clamp(max=workload.seqlen) - 1
    last_key = (first_key + workload.k_block).clamp(max=workload.seqlen) - 1
    return first_key <= last_query, last_key <= first_query


def count_pairs(workload: Workload, mask: Tensor) -> int:
    """Pairs of a query and a key that attend, over all heads and sequences."""
    q_blocks, k_blocks = workload.blocks
    query = torch.arange(q_blocks, device=mask.device)[:, None] * workload.q_block
    end = (query + workload.q_block).clamp(max=workload.seqlen)
    key = torch.arange(k_blocks, device=mask.device)[None] * workload.k_block
    width = (key + workload.k_block).clamp(max=workload.seqlen) - key
    # Query i attends to the first i + 1 - key of the block's keys, if causal; else to all.
    pairs = _sum_to(end - key, width) - _sum_to(query - key, width) if workload.causal else (end - query) * width
    active = mask.sum((0, 1), dtype=torch.int64)
    return int((active * pairs).sum()) * (workload.heads // mask.shape[1]) * (workload.batch // mask.shape[0])


def count_flops(workload: Workload, pairs: int) -> int:
    """Floating-point operations of the workload's task."""
    return FLOPS[workload.task] * workload.head_dim * pairs


def _draw(workload: Workload, generator: torch.Generator) -> Tensor:
    """The mask of one head: bool (query blocks, key blocks)."""
    if workload.per_row is None:
        return _draw_density(workload, generator)
    visible, _ = visible_blocks(workload, generator.device)
    if workload.pattern == "local":
        last = visible.sum(1, keepdim=True) - 1
        column = torch.arange(visible.shape[1], device=generator.device)[None]
        return visible & ((column < SINKS) | (column > last - (workload.per_row - SINKS)))
    return _draw_rows(workload, visible, generator)


def _draw_density(workload: Workload, generator: torch.Generator) -> Tensor:
    q_blocks, k_blocks = workload.blocks
    if workload.alike == 1:
        mask = _uniform(q_blocks, k_blocks, generator) < workload.density
    else:
        common = _uniform(-(-q_blocks // workload.alike), k_blocks, generator) < workload.density
        common = common.repeat_interleave(workload.alike, 0)[:q_blocks]
        mask = common & (_uniform(q_blocks, k_blocks, generator) < KEPT)
        mask |= _uniform(q_blocks, k_blocks, generator) < (1 - KEPT) * workload.density
    mask[:, 0] = True
    return mask


def _draw_rows(workload: Workload, visible: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `per_row` visible blocks, or all if they are fewer; the first block is among them."""
    q_blocks, k_blocks = workload.blocks
    score = _uniform(q_blocks, k_blocks, generator)
    if workload.alike > 1:
        first = visible[:: workload.alike]  # what the first of the rows sees, so do the others
        common = _highest(_uniform(*first.shape, generator), first, workload.per_row)
        common = common.repeat_interleave(workload.alike, 0)[:q_blocks]
        score += common & (_uniform(q_blocks, k_blocks, generator) < KEPT)
    score[:, 0] = 2.0
    return _highest(score, visible, workload.per_row)


def _highest(score: Tensor, visible: Tensor, count: int) -> Tensor:
    """True at the `count` highest scores of each row, of visible ones only."""
    chosen = score.masked_fill(~visible, -1.0).topk(min(count, score.shape[1]), sorted=False).indices
    return torch.zeros_like(visible).scatter_(1, chosen, True) & visible


def _uniform(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, cols, device=generator.device, generator=generator)


def _sum_to(end: Tensor, width: Tensor) -> Tensor:
    """The sum of min(max(t, 0), width) over all t <= end."""
    rising = end.clamp(min=0).minimum(width)
    return rising * (rising + 1) // 2 + (end - width).clamp(min=0) * width
