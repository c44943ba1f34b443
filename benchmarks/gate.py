"""The correctness gate: no time of a result that is wrong.

Sampled query rows are compared with the formula in float64 by the judge of the test-suite (tests/oracle). The rule is
the library's: the error is at most twice what the same formula makes at the dtype of the inputs, plus 1e-5.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workloads import Workload

HEADS_SAMPLED = 8
ROWS_SAMPLED = 16
LSE_TOLERANCE = 1e-3


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
    if out.shape != q.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected that of q, {tuple(q.shape)}")
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
        attends = _attending(workload, block_mask[batch % block_mask.shape[0]], head, rows)
        scale = workload.head_dim**-0.5
        want, want_lse = _oracle.one_sequence(*(x.double() for x in inputs), attends, scale)
        unavoidable, _ = _oracle.one_sequence(*inputs, attends, scale)
        error = _larger(error, _distance(out[batch, rows, head], want[:, 0]))
        allowed_error = max(allowed_error, 2 * _distance(unavoidable[:, 0], want[:, 0]) + 1e-5)
        if lse is not None:
            lse_error = _larger(lse_error, _distance(lse[batch, head, rows], want_lse[0]))
        sampled += len(rows)
    return Verdict(sampled, error, allowed_error, None if lse is None else lse_error)


def _attending(workload: Workload, block_mask: Tensor, head: int, rows: Tensor) -> Tensor:
    """Which keys these rows attend to: bool (1, rows, seqlen). block_mask: (heads, query blocks, key blocks)."""
    key = torch.arange(workload.seqlen, device=rows.device)
    head = head // (workload.heads // block_mask.shape[0])
    attends = block_mask[head, rows // workload.q_block][:, key // workload.k_block]
    if workload.causal:
        attends = attends & (key[None] <= rows[:, None])
    return attends[None]


def _sample_heads(workload: Workload, choice: random.Random) -> list[tuple[int, int]]:
    """Pairs of a sequence and a head: the first, the last, and some between."""
    last = workload.batch * workload.heads - 1
    picks = {0, last, *(choice.randint(0, last) for _ in range(HEADS_SAMPLED - 2))}
    return [divmod(pick, workload.heads) for pick in sorted(picks)]


def _sample_rows(workload: Workload, choice: random.Random) -> list[int]:
    """The rows at the ends of the sequence and of the first block, and some between."""
    last = workload.seqlen - 1
    edges = {0, min(workload.q_block - 1, last), min(workload.q_block, last), last}
    return sorted(edges | {choice.randint(0, last) for _ in range(ROWS_SAMPLED - len(edges))})


def _distance(a: Tensor, b: Tensor) -> float:
    # Equal infinities, the LSE of rows that attend to nothing, are no distance apart.
    return float(torch.where(a == b, 0.0, (a.double() - b.double()).abs()).max())


def _larger(a: float, b: float) -> float:
    return b if not b <= a else a  # NaN, too, replaces a number


def _load_oracle():
    path = Path(__file__).resolve().parent.parent / "tests" / "oracle" / "dense.py"
    spec = importlib.util.spec_from_file_location("hbsattn_tests_dense_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_oracle = _load_oracle()
