"""A sequence's results are its own: bitwise the same whatever lies in the sequences beside it, and without them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cases import Case, case
from gradients import assert_same_gradients, attend, leaves, upstream
from problems import Problem, make_problem, same

HEAD_DIMS = [64, 96, 128, 192, 256]
BLOCKS = [(128, 128), (64, 64), (192, 48), (16, 16), (48, 80), (20, 64)]
# No multiples of tiles; the second is the neighbour of the others. The first has several stages of keys: rows are only
# rescaled from the second stage on, and then some tile's last rows may be the neighbour's.
LENS = (315, 61, 333)
# What multiplies the neighbour's queries, keys and values.
FACTORS = [8.0, 1e3, math.inf, -math.inf, math.nan]


def places() -> list[object]:
    """Head dims are one code path on the CPU."""
    on_gpu = [pytest.param("cuda", torch.float16, d, id=f"cuda-{d}", marks=pytest.mark.gpu) for d in HEAD_DIMS]
    return [pytest.param("cpu", torch.float32, 64, id="cpu-64"), *on_gpu]


def results(
    problem: Problem, grads: tuple[Tensor, Tensor] | None, deterministic: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(out, lse), and gradients of q, k and v."""
    inputs = leaves(problem)
    outputs = attend(*inputs, problem.mask(), return_lse=True, deterministic=deterministic)
    grads = upstream(problem, outputs[1].detach(), 7) if grads is None else grads
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, inputs, grads))


@pytest.mark.parametrize("device,dtype,head_dim", places())
@pytest.mark.parametrize("q_block,k_block", BLOCKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_values_of_neighbours(
    grouped: bool, causal: bool, q_block: int, k_block: int, device: str, dtype: torch.dtype, head_dim: int
):
    """Heads that share a mask share tiles, too: `grouped`."""
    heads = {"heads_q": 8, "heads_k": 2, "mask_heads": 2} if grouped else {"heads_q": 2, "heads_k": 2, "mask_heads": 2}
    pattern = "alike" if q_block == 16 else "random"
    spec = case(
        "neighbours",
        lens_q=LENS,
        q_block=q_block,
        k_block=k_block,
        causal=causal,
        head_dim=head_dim,
        pattern=pattern,
        density=0.7,
        **heads,
    )
    problem = make_problem(spec, device, dtype)
    clean = {d: results(problem, None, d) for d in (False, True)}
    grads = upstream(problem, clean[True][0][1], 7)
    keep = torch.ones(sum(LENS), dtype=torch.bool, device=device)
    keep[LENS[0] : LENS[0] + LENS[1]] = False
    own = [x.clone() for x in (problem.q, problem.k, problem.v)]
    for factor in FACTORS:
        for target, source in zip((problem.q, problem.k, problem.v), own, strict=True):
            target.copy_(torch.where(keep[:, None, None], source, source * factor))
        for deterministic in (False, True):
            (out, lse), got = results(problem, grads, deterministic)
            (clean_out, clean_lse), want = clean[deterministic]
            assert same(out[keep], clean_out[keep]), f"neighbours times {factor} change {_count(out, clean_out, keep)}"
            assert same(lse[:, keep], clean_lse[:, keep]), f"neighbours times {factor} change the log-sum-exp"
            got, want = [x[keep] for x in got], [x[keep] for x in want]
            if deterministic:
                assert all(same(x, y) for x, y in zip(got, want, strict=True)), f"neighbours times {factor}"
            else:
                assert_same_gradients(got, want, spec)


def _count(out: Tensor, want: Tensor, keep: Tensor) -> str:
    return f"{int((out[keep] != want[keep]).sum())} of {out[keep].numel()} results of other sequences"


@pytest.mark.parametrize("device,dtype,head_dim", places())
@pytest.mark.parametrize("q_block,k_block", BLOCKS)
@pytest.mark.parametrize("packed", [True, False])
def test_alone_and_in_a_batch(packed: bool, q_block: int, k_block: int, device: str, dtype: torch.dtype, head_dim: int):
    spec = case(
        "batch",
        lens_q=LENS if packed else (75,) * 3,
        lens_k=(330, 40, 300) if packed else (130,) * 3,
        packed=packed,
        q_block=q_block,
        k_block=k_block,
        causal=True,
        head_dim=head_dim,
        heads_q=8,
        mask_heads=2,
        pattern="alike" if q_block == 16 else "random",
    )
    problem = make_problem(spec, device, dtype)
    out, lse = problem.run()
    q_begin = k_begin = 0
    for b, (len_q, len_k) in enumerate(zip(spec.lens_q, spec.keys, strict=True)):
        rows, keys = (slice(begin, begin + n) for begin, n in ((q_begin, len_q), (k_begin, len_k)))
        q_begin, k_begin = rows.stop, keys.stop
        if not packed:
            rows = keys = slice(b, b + 1)
        one = dataclasses.replace(spec, lens_q=(len_q,), lens_k=(len_k,))
        alone = Problem(one, problem.q[rows], problem.k[keys], problem.v[keys], [problem.block_masks[b]])
        alone_out, alone_lse = alone.run()
        in_batch = (out[rows], lse[:, rows] if packed else lse[rows])
        for got, want in zip((alone_out, alone_lse), in_batch, strict=True):
            if device == "cpu":  # where libraries choose by a product's shape in which order they add
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            else:
                assert same(got, want), f"{int((got != want).sum())} results of sequence {b} differ"


@pytest.mark.parametrize("device,dtype,head_dim", places()[:3])
def test_other_sequences_masks(device: str, dtype: torch.dtype, head_dim: int):
    """A neighbour that attends to nothing, or to all, changes no other sequence."""
    spec: Case = case("masks", lens_q=LENS, causal=True, head_dim=head_dim, k_block=16)
    problem = make_problem(spec, device, dtype)
    out, lse = problem.run()
    keep = torch.ones(sum(LENS), dtype=torch.bool, device=device)
    keep[LENS[0] : LENS[0] + LENS[1]] = False
    for value in (False, True):
        problem.block_masks[1] = torch.full_like(problem.block_masks[1], value)
        other_out, other_lse = problem.run()
        assert same(other_out[keep], out[keep]) and same(other_lse[:, keep], lse[:, keep])
