"""Block masks of the workloads, and the exact count of the work in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workloads import NO_WINDOW, Window, Workload

KEPT = 0.9  # the share of a common list that each of the query blocks that draw from it keeps

# Scores of top-k masks: as many topics as this, vectors of normal elements with this deviation; each lasts for so many
# tokens, and queries and keys are its vector plus standard normal noise.
TOPICS = 24
TOPIC_SCALE = 0.9
TOPIC_TOKENS = 150

# Products of each attending pair, of q's head dim and of v's: scores, and out; in the backward scores, dQ and dK, and
# dP and dV.
PRODUCTS = {"forward": (1, 1), "backward": (3, 2), "training": (4, 3)}
# Those of a backward whose other gradients nobody asks for: scores and dP, and dQ alone, or dK and dV.
FROZEN_PRODUCTS = {"": (3, 2), "kv": (2, 1), "q": (2, 2)}


@dataclass(frozen=True)
class Blocks:
    """The blocks of all sequences in one entry of the batch: int64 (blocks) each.

    begin, end: tokens, counted through all sequences.
    sequence: which one the block belongs to.
    number: of the block within its sequence.
    """

    begin: Tensor
    end: Tensor
    sequence: Tensor
    number: Tensor


def cut(workload: Workload, size: int, device: torch.device | str) -> Blocks:
    """Cuts each sequence into blocks of `size` tokens, the last of which may be short."""
    lengths = torch.tensor(workload.sequences, device=device)
    counts = (lengths + size - 1) // size
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    number = torch.arange(len(sequence), device=device) - (counts.cumsum(0) - counts)[sequence]
    last = lengths.cumsum(0)[sequence]
    begin = last - lengths[sequence] + number * size
    return Blocks(begin, (begin + size).minimum(last), sequence, number)


def block_of_token(workload: Workload, size: int, device: torch.device | str) -> Tensor:
    """The block of each token: int64 (seqlen)."""
    blocks = cut(workload, size, device)
    return torch.repeat_interleave(torch.arange(len(blocks.begin), device=device), blocks.end - blocks.begin)


def make_mask(workload: Workload, device: torch.device | str, seed: int) -> Tensor:
    """The block mask: bool (batch, mask heads, query blocks, key blocks), not always cut at the diagonal.

    Of packed sequences it is flat: blocks of all, one after another, each sequence seeing its own alone.
    """
    shape = (workload.batch, workload.mask_heads, *workload.blocks)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    if workload.density < 1:
        generator = torch.Generator(device).manual_seed(seed)
        for head in mask.flatten(0, 1):  # one at a time: the random numbers need four times the mask's memory
            head.copy_(_draw(workload, generator))
        if workload.pattern.startswith("half-"):
            mask[:, ::2] = True
    if workload.lengths:
        q, k = cut(workload, workload.q_block, device), cut(workload, workload.k_block, device)
        mask &= q.sequence[:, None] == k.sequence
    return mask


def block_lists(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as lists: counts int32 (..., rows) and indices int32 (..., rows, the longest list)."""
    counts = block_mask.sum(-1, dtype=torch.int32)
    indices = block_mask.to(torch.uint8).topk(int(counts.max())).indices.to(torch.int32)
    return counts, indices


def visible_blocks(workload: Workload, device: torch.device | str, window: Window = NO_WINDOW) -> tuple[Tensor, Tensor]:
    """Which blocks hold a pair that attends in heads with this window, and which hold no other: bool (query blocks, key
    blocks) twice.
    """
    q, k = cut(workload, workload.q_block, device), cut(workload, workload.k_block, device)
    same = q.sequence[:, None] == k.sequence
    pairs = _pairs_of_blocks(workload, device, window)
    return same & (pairs > 0), same & (pairs == (q.end - q.begin)[:, None] * (k.end - k.begin))


def count_pairs(workload: Workload, mask: Tensor) -> int:
    """Pairs of a query and a key that attend, over all heads and sequences."""
    heads: dict[Window, list[int]] = {}
    for head, window in enumerate(workload.head_windows):
        heads.setdefault(window, []).append(head)
    pairs = 0
    for window, alike in heads.items():
        active = (mask if len(heads) == 1 else mask[:, alike]).sum((0, 1), dtype=torch.int64)
        pairs += int((active * _pairs_of_blocks(workload, mask.device, window)).sum())
    return pairs * (workload.heads // mask.shape[1]) * (workload.batch // mask.shape[0])


def count_visible_pairs(workload: Workload) -> int:
    """The pairs of an all-true mask without windows."""
    pairs = sum(n * (n + 1) // 2 if workload.causal else n * n for n in workload.sequences)
    return pairs * workload.heads * workload.batch


def count_flops(workload: Workload, pairs: int) -> int:
    """Floating-point operations of the workload's task."""
    return flops_of_pair(workload) * pairs


def flops_of_pair(workload: Workload) -> int:
    """Floating-point operations of the task for an attending pair: a multiplication and an addition for each element of
    a product."""
    of_q, of_v = FROZEN_PRODUCTS[workload.frozen] if workload.task == "backward" else PRODUCTS[workload.task]
    return 2 * (of_q * workload.head_dim + of_v * workload.columns_of_v)


def _pairs_of_blocks(workload: Workload, device: torch.device | str, window: Window) -> Tensor:
    """The pairs in blocks of one sequence that causality and a window allow: int64 (query blocks, key blocks)."""
    q, k = cut(workload, workload.q_block, device), cut(workload, workload.k_block, device)
    left, right = (workload.seqlen if side < 0 else side for side in window[:2])
    behind = 0 if workload.causal else workload.seqlen  # how far behind its query a key may be, if no window is

    def up_to(distance: int, end: Tensor) -> Tensor:
        """Pairs with keys of the block before `end` that are at most so far behind the query."""
        begin, width = k.begin - distance, end - k.begin
        return _sum_to(q.end[:, None] - begin, width) - _sum_to(q.begin[:, None] - begin, width)

    if window == NO_WINDOW:
        return up_to(behind, k.end)

    def inside(end: Tensor) -> Tensor:
        return up_to(min(right, behind), end) - up_to(-left - 1, end)

    sink_end = (k.begin - k.number * workload.k_block + window[2]).clamp(k.begin, k.end)
    return up_to(behind, sink_end) + inside(k.end) - inside(sink_end)


def _draw(workload: Workload, generator: torch.Generator) -> Tensor:
    """The mask of one head: bool (query blocks, key blocks)."""
    q = cut(workload, workload.q_block, generator.device)
    k = cut(workload, workload.k_block, generator.device)
    visible, _ = visible_blocks(workload, generator.device)
    always = _always_on(workload, q, k)
    if workload.pattern == "top-k":
        return (_draw_best(workload, q, k, visible, generator) | always) & visible
    if workload.per_row is None:
        return _draw_density(workload, generator) | always
    if workload.pattern in ("local", "half-streaming"):
        last = visible.sum(1, keepdim=True) - 1
        return visible & (always | (k.number > last - (workload.per_row - workload.sink_blocks)))
    return _draw_rows(workload, visible, always, generator)


def _always_on(workload: Workload, q: Blocks, k: Blocks) -> Tensor:
    """The blocks that do not depend on chance: sinks, and a row's own keys."""
    on = (k.number < workload.sink_blocks).expand(len(q.begin), -1)
    if workload.diagonal:
        on = on | ((k.begin < q.end[:, None]) & (k.end > q.begin[:, None]))
    return on


def _draw_density(workload: Workload, generator: torch.Generator) -> Tensor:
    q_blocks, k_blocks = workload.blocks
    if workload.alike == 1:
        return _uniform(q_blocks, k_blocks, generator) < workload.density
    common = _uniform(-(-q_blocks // workload.alike), k_blocks, generator) < workload.density
    common = common.repeat_interleave(workload.alike, 0)[:q_blocks]
    mask = common & (_uniform(q_blocks, k_blocks, generator) < KEPT)
    return mask | (_uniform(q_blocks, k_blocks, generator) < (1 - KEPT) * workload.density)


def _draw_rows(workload: Workload, visible: Tensor, always: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `per_row` visible blocks, or all if they are fewer; those that are always on are among them."""
    q_blocks, k_blocks = workload.blocks
    score = _uniform(q_blocks, k_blocks, generator)
    if workload.alike > 1:
        first = visible[:: workload.alike]  # what the first of the rows sees, so do the others
        common = _highest(_uniform(*first.shape, generator), first, workload.per_row)
        common = common.repeat_interleave(workload.alike, 0)[:q_blocks]
        score += common & (_uniform(q_blocks, k_blocks, generator) < KEPT)
    return _highest(score.masked_fill(always, 2.0), visible, workload.per_row)


def _draw_best(workload: Workload, q: Blocks, k: Blocks, visible: Tensor, generator: torch.Generator) -> Tensor:
    """For each row the share `density` of its visible blocks whose keys, on average, suit its queries best.

    Averages of blocks are drawn as such: those of the topics' vectors, and noise that is smaller the more are averaged.
    """
    device, dim = generator.device, workload.head_dim
    topics = TOPIC_SCALE * torch.randn(TOPICS, dim, device=device, generator=generator)
    runs = -(-workload.seqlen // TOPIC_TOKENS)
    topic = torch.randint(TOPICS, (runs,), device=device, generator=generator)
    topic = topic.repeat_interleave(TOPIC_TOKENS)[: workload.seqlen]

    def average(size: int, blocks: Blocks, heads: int) -> Tensor:
        tokens = (blocks.end - blocks.begin)[:, None]
        place = block_of_token(workload, size, device) * TOPICS + topic
        share = torch.bincount(place, minlength=len(blocks.begin) * TOPICS).view(-1, TOPICS) / tokens
        noise = torch.randn(len(blocks.begin), dim, device=device, generator=generator)
        return share @ topics + noise / (tokens * heads).sqrt()

    queries = average(workload.q_block, q, workload.heads // workload.mask_heads)
    score = queries @ average(workload.k_block, k, 1).T
    rank = score.masked_fill(~visible, -torch.inf).argsort(1, descending=True).argsort(1)
    return rank < torch.ceil(workload.density * visible.sum(1, keepdim=True))


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
