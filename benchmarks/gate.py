"""The correctness gate: no time of a result that is wrong.

Sampled query rows of the output, or the gradients of sampled heads, are compared with the formula in float64 by the
judge of the test-suite (tests/oracle). The rule is the library's: the error is at most twice what the same formula
makes at the dtype of the inputs, plus 1e-5. Norms of gradients, besides, are right within 1%.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import masks
from workloads import DROPOUT_SEED, Window, Workload, make_head_sinks

HEADS_SAMPLED = 8
ROWS_SAMPLED = 16
KEY_HEADS_SAMPLED = 3  # for gradients; fewer, at least one, where their query heads have more pairs than PAIRS_SAMPLED
PAIRS_SAMPLED = 1 << 33
PAIRS_AT_ONCE = 1 << 26
_block_of_token = functools.lru_cache(maxsize=4)(masks.block_of_token)  # the same for all steps through a sequence
SLACK = 1e-5
LSE_TOLERANCE = 1e-3
NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Verdict:
    """Largest errors over the sampled rows. `lse_error` is None for a result without log-sum-exp."""

    rows: int
    error: float
    allowed: float
    lse_error: float | None

    @property
    def passed(self) -> bool:
        lse_passed = self.lse_error is None or self.lse_error <= LSE_TOLERANCE
        return self.error <= self.allowed and lse_passed  # comparisons with NaN are false

    def __str__(self) -> str:
        lse = "" if self.lse_error is None else f", of the LSE {self.lse_error:.1e} (allowed {LSE_TOLERANCE:.0e})"
        return f"largest error in {self.rows} rows {self.error:.2e} (allowed {self.allowed:.2e}){lse}"


def check(
    workload: Workload,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    out: Tensor,
    lse: Tensor | None = None,
    seed: int = 0,
) -> Verdict:
    """Judges sampled rows of out (batch, seqlen, heads, head_dim) and lse (batch, heads, seqlen)."""
    shape = (*q.shape[:-1], v.shape[-1])
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}, the rows of q and the columns of v")
    choice = random.Random(seed)
    error = allowed_error = lse_error = 0.0
    sampled = 0
    for batch, head in _sample_heads(workload, choice):
        rows = torch.tensor(_sample_rows(workload, choice), device=q.device)
        group = workload.heads // workload.heads_k
        inputs = (
            q[batch, rows, head : head + 1],
            k[batch, :, head // group : head // group + 1],
            v[batch, :, head // group : head // group + 1],
        )
        mask_head = head // (workload.heads // block_mask.shape[1])
        blocks = block_mask[batch % block_mask.shape[0], mask_head : mask_head + 1]
        windows = workload.head_windows[mask_head : mask_head + 1]
        keys = torch.arange(workload.seqlen, device=q.device)
        attends = _attending(workload, blocks, windows, rows, keys)
        scores = _Scores(workload, batch, slice(head, head + 1), q.device)
        want, want_lse, _ = scores.attend(*(x.double() for x in inputs), attends, rows, keys)
        unavoidable, _, _ = scores.attend(*inputs, attends, rows, keys)
        error = _larger(error, _distance(out[batch, rows, head], want[:, 0]))
        allowed_error = max(allowed_error, 2 * _distance(unavoidable[:, 0], want[:, 0]) + SLACK)
        if lse is not None:
            lse_error = _larger(lse_error, _distance(lse[batch, head, rows], want_lse[0]))
        sampled += len(rows)
    return Verdict(sampled, error, allowed_error, None if lse is None else lse_error)


@dataclass(frozen=True)
class GradientVerdict:
    """The gradient, of those of sampled heads, that is worst, and the ratio of norms that is farthest from 1."""

    rows: int
    name: str
    error: float
    allowed: float
    norm_ratio: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and abs(self.norm_ratio - 1) <= NORM_TOLERANCE

    def __str__(self) -> str:
        error = f"largest error of {self.name} in {self.rows} rows {self.error:.2e} (allowed {self.allowed:.2e})"
        return f"{error}, norms off by a factor of {self.norm_ratio:.3f}"


class Gradients:
    """The gradients of a workload at sampled key heads and the query heads that read them."""

    def __init__(
        self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, block_mask: Tensor, seed: int = 0
    ) -> None:
        self._shapes = (q.shape, k.shape, v.shape)
        self._samples: list[tuple[tuple, Tensor, float]] = []  # where in which gradient, what is there, error allowed
        group = workload.heads // workload.heads_k
        mask_group = block_mask.shape[1] // workload.heads_k
        for pick in _sample_key_heads(workload, random.Random(seed)):
            batch, head = divmod(pick, workload.heads_k)
            queries = (batch, slice(None), slice(head * group, (head + 1) * group))
            keys = (batch, slice(None), slice(head, head + 1))
            heads = slice(head * mask_group, (head + 1) * mask_group)
            blocks = block_mask[batch % block_mask.shape[0], heads]
            inputs = [x.detach() for x in (q[queries], k[keys], v[keys], grad_out[queries])]
            windows = workload.head_windows[heads]
            scores = _Scores(workload, batch, queries[2], q.device)
            wanted = _differentiate(workload, scores, *(x.double() for x in inputs), blocks, windows)
            unavoidable = _differentiate(workload, scores, *inputs, blocks, windows)
            for i, (where, want, near) in enumerate(zip((queries, keys, keys), wanted, unavoidable, strict=True)):
                self._samples.append(((i, where), want, 2 * _distance(near, want) + SLACK))

    def check(self, grads: tuple[Tensor, ...], frozen: str = "") -> GradientVerdict:
        """Judges the gradients of q, k and v, but for those with letters in `frozen`, which `grads` leaves out."""
        trained = [i for i, name in enumerate("qkv") if name not in frozen]
        shapes = [tuple(self._shapes[i]) for i in trained]
        if [tuple(grad.shape) for grad in grads] != shapes:
            raise ValueError(f"gradients have shapes {[tuple(g.shape) for g in grads]}; expected {shapes}")
        found = []
        for (i, where), want, allowed in self._samples:
            if i not in trained:
                continue
            grad = grads[trained.index(i)][where].double()
            norm = float(want.norm())
            ratio = float(grad.norm()) / norm if norm else 1.0
            found.append(("qkv"[i], _distance(grad, want), allowed, ratio, len(want)))
        # A NaN is the worst of all.
        name, error, allowed, *_ = max(found, key=lambda one: (one[1] != one[1], one[1] / one[2]))
        norm_ratio = max((one[3] for one in found), key=lambda ratio: (ratio != ratio, abs(ratio - 1)))
        return GradientVerdict(sum(one[4] for one in found), f"grad_{name}", error, allowed, norm_ratio)


class _Scores:
    """The formula with what a workload makes of scores, for some query heads of a batch entry."""

    def __init__(self, workload: Workload, batch: int, heads: slice, device: torch.device) -> None:
        self._scale, self._softcap = workload.head_dim**-0.5, workload.softcap
        self._dropout = round(workload.dropout * _dropout.NUMBERS) / _dropout.NUMBERS
        sinks = make_head_sinks(workload, device)
        self._sinks = None if sinks is None else sinks[heads]
        self._streams = batch * workload.heads + torch.arange(workload.heads, device=device)[heads]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attends: Tensor, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rows` and `keys`: places of q and of k and v in their sequence."""
        sinks = None if self._sinks is None else self._sinks.to(q.dtype)
        kept = None
        if self._dropout:
            places = self._streams.view(-1, 1, 1), rows.view(1, -1, 1), keys.view(1, 1, -1)
            kept = _dropout.is_kept(self._dropout, *DROPOUT_SEED, *places)
        return _oracle.one_sequence(q, k, v, attends, self._scale, sinks, kept, self._dropout, self._softcap)


def _differentiate(
    workload: Workload,
    scores: _Scores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    blocks: Tensor,
    windows: tuple[Window, ...],
) -> list[Tensor]:
    """The gradients of q (seqlen, heads, head_dim), k and v (seqlen, 1, head_dim) by the formula at their dtype, some
    rows and the keys that any of them attends to at a time. Sums over these are in float64; the results are rounded to
    the dtype.
    """
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    step = max(PAIRS_AT_ONCE // (q.shape[1] * workload.seqlen), 1)
    row_block = _block_of_token(workload, workload.q_block, q.device)
    key_block = _block_of_token(workload, workload.k_block, q.device)
    for begin in range(0, workload.seqlen, step):
        end = min(begin + step, workload.seqlen)
        rows = slice(int(row_block[begin]), int(row_block[end - 1]) + 1)
        keys = blocks[:, rows].flatten(0, 1).any(0)[key_block].nonzero().flatten()
        if workload.causal:
            keys = keys[keys < end]
        row_numbers = torch.arange(begin, end, device=q.device)
        attends = _attending(workload, blocks, windows, row_numbers, keys)
        if workload.windows:
            seen = attends.flatten(0, 1).any(0)
            keys, attends = keys[seen], attends[..., seen]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q[begin:end], k[keys], v[keys])]
            out, _, _ = scores.attend(*inputs, attends, row_numbers, keys)
            found = torch.autograd.grad(out, inputs, grad_out[begin:end])
        grads[0][begin:end] = found[0]
        grads[1][keys] += found[1]
        grads[2][keys] += found[2]
    return [grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)]


def _attending(workload: Workload, blocks: Tensor, windows: tuple[Window, ...], rows: Tensor, keys: Tensor) -> Tensor:
    """Which of these keys these rows attend to: bool (heads, rows, keys).

    blocks: (heads, query blocks, key blocks). windows: of these heads.
    """
    row_block = _block_of_token(workload, workload.q_block, rows.device)[rows]
    key_block = _block_of_token(workload, workload.k_block, rows.device)[keys]
    attends = blocks[:, row_block][:, :, key_block]
    if workload.causal:
        attends = attends & (keys[None] <= rows[:, None])
    if workload.windows:
        left, right, sink = torch.tensor(windows, device=rows.device).T[..., None, None]
        behind = keys[None] - rows[:, None]
        near = ((left < 0) | (behind >= -left)) & ((right < 0) | (behind <= right))
        attends = attends & (near | (_number_of_token(workload, keys.device)[keys] < sink))
    return attends


@functools.lru_cache(maxsize=1)
def _number_of_token(workload: Workload, device: torch.device) -> Tensor:
    """The place of each token in its sequence: int64 (seqlen)."""
    return masks.cut(workload, 1, device).number


def _sample_heads(workload: Workload, choice: random.Random) -> list[tuple[int, int]]:
    """Pairs of a sequence and a head: the first, the last, and some between."""
    last = workload.batch * workload.heads - 1
    picks = {0, last, *(choice.randint(0, last) for _ in range(HEADS_SAMPLED - 2))}
    return [divmod(pick, workload.heads) for pick in sorted(picks)]


def _sample_key_heads(workload: Workload, choice: random.Random) -> list[int]:
    """Key heads of the sequences, counted through the batch: the last, the first, and some between."""
    last = workload.batch * workload.heads_k - 1
    pairs = workload.heads // workload.heads_k * sum(n * n for n in workload.sequences)
    count = max(PAIRS_SAMPLED // (pairs // 2 if workload.causal else pairs), 1)
    if count < KEY_HEADS_SAMPLED:
        return sorted({last, 0} if count > 1 else {last})
    return sorted({0, last, *(choice.randint(0, last) for _ in range(KEY_HEADS_SAMPLED - 2))})


def _sample_rows(workload: Workload, choice: random.Random) -> list[int]:
    """The rows at the ends of the first block, of the first and of the last sequence, and some between."""
    last = workload.seqlen - 1
    edges = {0, min(workload.q_block - 1, last), min(workload.q_block, last), last}
    edges |= {workload.sequences[0] - 1, last + 1 - workload.sequences[-1]}
    return sorted(edges | {choice.randint(0, last) for _ in range(ROWS_SAMPLED - len(edges))})


def _distance(a: Tensor, b: Tensor) -> float:
    # Equal infinities, the LSE of rows that attend to nothing, are no distance apart.
    return float(torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max())


def _larger(a: float, b: float) -> float:
    return b if not b <= a else a  # NaN, too, replaces a number


def _load_oracle(name: str):
    path = Path(__file__).resolve().parent.parent / "tests" / "oracle" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"hbsattn_tests_{name}_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_oracle, _dropout = _load_oracle("dense"), _load_oracle("dropout")
