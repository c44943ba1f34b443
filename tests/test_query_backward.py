"""Gradients by tiles of queries, which serve small key blocks, and who decides on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import Case, case
from gradients import differentiate, goes_by_queries, judge_gradients
from hbsattn import _layout
from hbsattn._ops import ops
from problems import make_problem

pytestmark = pytest.mark.gpu

GPU_DTYPES = [torch.bfloat16, torch.float16]


def by_queries() -> list[Case]:
    """Small key blocks and full tiles of queries: all tails, head dims and kinds of groups."""
    found = []
    for n, (q_block, k_block) in enumerate(
        [
            (128, 16),
            (128, 32),
            (256, 16),
            (100, 48),
            (128, 7),
            (112, 13),
            (200, 24),
            (16, 16),
            (32, 40),
            (80, 16),
            (73, 9),
        ]
    ):
        for causal in (False, True):
            packs = q_block <= 32  # the heads of a group fill tiles
            heads_q = (4, 16)[packs]
            spec = case(
                f"{q_block}x{k_block}{'_causal' if causal else ''}",
                lens_q=(3 * q_block + 5, 130, 1, 0, 300) if n % 3 else (300, 300),
                lens_k=(290, 333, 20, 40, 0) if n % 3 else (310, 310),
                packed=n % 3 > 0,
                heads_q=heads_q,
                heads_k=1 if packs else (1, 2, 4)[n % 3],
                mask_heads=1 if packs else (1, 4)[n % 2],
                head_dim=(128, 64, 96, 40, 120)[(n + causal) % 5],
                q_block=q_block,
                k_block=k_block,
                causal=causal,
                density=(0.3, 0.9)[n % 2],
            )
            found.append(spec)
    return found


@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("spec", by_queries(), ids=lambda s: s.name)
def test_by_queries(spec: Case, dtype: torch.dtype):
    assert goes_by_queries(spec)
    problem = make_problem(spec, "cuda", dtype)
    mask = problem.mask()
    for _ in range(2):
        judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_many_tiles_by_queries(head_dim: int, causal: bool):
    """More tiles than thread blocks, and rows that end in the middle of tiles."""
    spec = case(
        "many", lens_q=(3001, 1111), q_block=128, k_block=16, density=0.3, causal=causal, head_dim=head_dim, heads_q=8
    )
    problem = make_problem(dataclasses.replace(spec, mask_heads=8), "cuda", torch.bfloat16)
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pack_heads", [False, True])
@pytest.mark.parametrize("head_dim", [128, 136])
@pytest.mark.parametrize(
    "q_block,k_block", [(128, 16), (128, 63), (128, 64), (32, 16), (64, 16), (65, 16), (160, 16), (193, 16), (40, 16)]
)
def test_who_needs_columns(q_block: int, k_block: int, head_dim: int, pack_heads: bool, deterministic: bool):
    """The op and its Python side agree: columns of the mask may be missing where tiles of queries do the work."""
    spec = case("method", q_block=q_block, k_block=k_block, head_dim=head_dim, mask_heads=1, lens_q=(100, 50))
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    items = mask._items(spec.heads_q, spec.heads_k, head_dim, 2, pack_heads)
    tensors = (problem.q, problem.k, problem.v)
    numbers = (mask.cols, q_block, k_block, False, pack_heads, 0.1, deterministic)
    out, lse, _ = ops.forward(*tensors, mask.bits, mask.sequences, items, *numbers)
    nothing = (mask.bits.new_empty((0, 0, 0)), mask.bits.new_empty((0, 16)))
    arguments = (torch.ones_like(out), None, *tensors, out, lse, mask.bits, mask.sequences, items, *nothing, *numbers)
    sizes = (1, q_block, k_block, spec.heads_q, spec.heads_k, head_dim, pack_heads, deterministic)
    if _layout.backward_by_queries(*sizes):
        ops.backward(*arguments)
    else:
        with pytest.raises(ValueError, match="columns has shape"):
            ops.backward(*arguments)


def test_lists_for_backward():
    """Where the forward's tiles are not those of gradients, neither takes the other's list."""
    spec = case("lists", lens_q=(400,), q_block=192, k_block=64, head_dim=128)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=True))
    out, lse = problem.run(mask)
    numbers = (mask.cols, spec.q_block, spec.k_block, False)
    heads = (spec.heads_q, spec.heads_k, 128, 2)
    columns = ops.transpose_bits(mask.bits, mask.cols)
    keys = ops.plan_keys(columns, mask.sequences, mask.rows, *numbers[1:], *heads, True)
    lists = [ops.plan_items(mask.bits, mask.sequences, *numbers, *heads, True, x) for x in (False, True)]
    assert lists[0].shape[0] != lists[1].shape[0]
    tensors = (problem.q, problem.k, problem.v)
    rest = (*numbers, True, 0.125)
    with pytest.raises(ValueError, match="number of work items is .* for a backward"):
        saved = (*tensors, out, lse, mask.bits, mask.sequences, lists[0], columns, keys)
        ops.backward(torch.ones_like(out), None, *saved, *rest, True)
    with pytest.raises(ValueError, match="number of work items is"):
        ops.forward(*tensors, mask.bits, mask.sequences, lists[1], *rest)
