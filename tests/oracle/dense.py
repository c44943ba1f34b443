"""Block-sparse attention straight from its definition: one dense score matrix per sequence and head.

Judges the product, so it imports nothing from it. The float64 evaluation is the reference; the same formula at the
dtype of its inputs (`compute_dtype=None`) says what error that dtype makes unavoidable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Windows = Sequence[tuple[int, int, int]]


def element_mask(
    block_mask: Tensor,
    len_q: int,
    len_k: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    windows: Windows = (),
) -> Tensor:
    """Which (query, key) pairs of one sequence count.

    block_mask: bool (heads, >= q blocks, >= k blocks), on any device. windows: left, right and sink of each head, or
    of all; a left or right of -1 is unbounded. Returns bool (heads, len_q, len_k) there.
    """
    query = torch.arange(len_q, device=block_mask.device)
    key = torch.arange(len_k, device=block_mask.device)
    allowed = block_mask[:, query // q_block_size][:, :, key // k_block_size]
    if causal:
        allowed = allowed & (key[None, :] <= query[:, None] + (len_k - len_q))
    if windows:
        inside = torch.stack([window_mask(query, key, *window) for window in windows])
        allowed = allowed & inside
    return allowed


def window_mask(query: Tensor, key: Tensor, left: int, right: int, sink: int) -> Tensor:
    """Bool (len_q, len_k): what a window of tokens allows. The last query is at the last key."""
    place = query[:, None] + (len(key) - len(query))
    inside = torch.ones((len(query), len(key)), dtype=torch.bool, device=key.device)
    if left >= 0:
        inside = inside & (key >= place - left)
    if right >= 0:
        inside = inside & (key <= place + right)
    return inside | (key < sink)


def one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula at the dtype of q, k (Lk, Hk, D) and v, for q (Lq, Hq, D) and allowed (1 | Hk | Hq, Lq, Lk).

    sinks (Hq): scores of a key more that every query attends to and whose value is 0; -inf is none.
    kept (Hq, Lq, Lk): which weights dropout keeps; they are divided by 1 - dropout_p.
    softcap: scaled scores s become softcap * tanh(s / softcap); 0: they stay. Not sinks.

    The head dim of v may be another than D. Returns out (Lq, Hq, that of v), lse (Hq, Lq) and luck (Lq, Hq), see
    `luck_of_rows`, all at that dtype. Keys that no query of a head attends to never enter: they are replaced by zeros,
    so NaN and Inf in them cannot spread.
    """
    heads_q, heads_k = q.shape[1], k.shape[1]
    allowed = allowed.repeat_interleave(heads_q // allowed.shape[0], dim=0)
    queries = q.transpose(0, 1)
    keys = k.transpose(0, 1).repeat_interleave(heads_q // heads_k, dim=0)
    values = v.transpose(0, 1).repeat_interleave(heads_q // heads_k, dim=0)
    attended = allowed.any(dim=1)[..., None]
    keys = torch.where(attended, keys, torch.zeros((), dtype=keys.dtype, device=keys.device))
    values = torch.where(attended, values, torch.zeros((), dtype=values.dtype, device=values.device))

    scores = torch.matmul(queries, keys.transpose(1, 2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        # The sink's own -inf is one that softmax and logsumexp never see.
        column = torch.where(sinks == -math.inf, 0.0, sinks)[:, None, None]
        scores = torch.cat([scores, column.expand(-1, scores.shape[1], 1)], dim=2)
        has = (sinks > -math.inf)[:, None, None]
        allowed = torch.cat([allowed, has.expand(-1, scores.shape[1], 1)], dim=2)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    empty = ~allowed.any(dim=2)
    # Rows with nothing to attend go through the softmax as zeros, so that their gradients are 0, too.
    scores = scores.masked_fill(~allowed, -math.inf).masked_fill(empty[..., None], 0.0)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(empty[..., None], 0.0)
    if kept is not None:
        kept = torch.nn.functional.pad(kept, (0, scores.shape[2] - kept.shape[2]))  # a sink has no value
        probabilities = probabilities.masked_fill(~kept, 0.0) / (1 - dropout_p)
    out = torch.matmul(probabilities, values)
    if scores.shape[2] == 0:
        lse = torch.full(scores.shape[:2], -math.inf, dtype=scores.dtype, device=scores.device)
    else:
        lse = torch.logsumexp(scores, dim=-1).masked_fill(empty, -math.inf)
    luck = luck_of_rows(probabilities.detach(), values.detach(), out.detach())
    return out.transpose(0, 1), lse, luck.T


def luck_of_rows(probabilities: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """By how many unit roundoffs bad luck alone may move the RMS error of a row above the formula's: (heads, queries).

    That is, in an evaluation that rounds probabilities and out. Rounded probabilities move a row by at most `spread`
    (all their errors alike), the rounding of out by `rms` / sqrt(3) (errors even between -1 and 1). Where many keys
    share the weight, and many columns the error, both evaluations come near their means, and so near each other: luck
    falls with the root of the number of keys that count, sum(p)^2 / sum(p^2), and with that of the number of columns.
    With dropout, a sink leaves no weight of its own in that sum. The factor 1.5 covers every row of 236 simulated
    problems with a sixth to spare, and leaves an error of 1% in sight.
    """
    squares = probabilities.square()
    spread = torch.matmul(squares, values.square().mean(-1, keepdim=True)).squeeze(-1).sqrt()
    rms = out.square().mean(-1).sqrt()
    sums = probabilities.sum(-1)
    share = torch.where(sums > 0, squares.sum(-1).sqrt() / sums, 1.0)
    return (spread + rms / math.sqrt(3)) * (share + 1.5 / math.sqrt(out.shape[-1]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_masks: Sequence[Tensor],
    q_block_size: int,
    k_block_size: int,
    *,
    lens_q: Sequence[int],
    lens_k: Sequence[int],
    causal: bool,
    windows: Windows = (),
    scale: float | None = None,
    sinks: Tensor | None = None,
    kept: Tensor | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    compute_dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a whole batch.

    q: (total_q, Hq, D) or (B, Sq, Hq, D); k, v likewise. block_masks: per sequence, bool (1 | Hk | Hq, q blocks,
    k blocks). lens_q, lens_k: the lengths of the sequences, also for batched tensors. windows: as in `element_mask`;
    sinks, dropout_p, softcap: as in `one_sequence`; kept: bool (B, Hq, queries, keys) of at least the longest sequence.
    compute_dtype: None for the dtype of q.
    Returns out, shaped as q but with the head dim of v, lse (Hq, total_q) or (B, Hq, Sq), and luck, shaped as out
    without its last dimension (see `luck_of_rows`), at compute_dtype.
    """
    dtype = compute_dtype or q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packed = q.dim() == 3
    begins_q = [0, *itertools.accumulate(lens_q)]
    begins_k = [0, *itertools.accumulate(lens_k)]
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)
    luck = torch.zeros(q.shape[:-1], dtype=dtype, device=q.device)
    heads_q = q.shape[-2]
    lse_shape = (heads_q, q.shape[0]) if packed else (q.shape[0], heads_q, q.shape[1])
    lse = torch.full(lse_shape, -math.inf, dtype=dtype, device=q.device)
    for b, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        if len_q == 0:
            continue
        rows_q = slice(begins_q[b], begins_q[b] + len_q) if packed else (b, slice(0, len_q))
        rows_k = slice(begins_k[b], begins_k[b] + len_k) if packed else (b, slice(0, len_k))
        blocks = block_masks[b].to(q.device)
        allowed = element_mask(blocks, len_q, len_k, q_block_size, k_block_size, causal, windows)
        tensors = (q[rows_q].to(dtype), k[rows_k].to(dtype), v[rows_k].to(dtype))
        own_sinks = None if sinks is None else sinks.to(dtype)
        own_kept = None if kept is None else kept[b, :, :len_q, :len_k]
        numbers = (scale, own_sinks, own_kept, dropout_p, softcap)
        out[rows_q], lse_b, luck[rows_q] = one_sequence(*tensors, allowed, *numbers)
        lse[(slice(None), rows_q) if packed else b] = lse_b
    return out, lse, luck
