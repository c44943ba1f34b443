"""Gradients by tiles of queries, which serve small key blocks, and who decides on them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import Case, case
from gradients import differentiate, goes_by_queries, judge_gradients
from plans import plan_backward, plan_items, take_apart
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


@pytest.mark.sm90
def test_lists_for_backward():
    """Where the forward's tiles are not those of gradients, each has a list of its own."""
    spec = case("lists", lens_q=(400,), q_block=192, k_block=64, head_dim=128)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=True))
    call = (spec.heads_q, spec.heads_k, 128, 2, True)
    plan = plan_backward(mask, *call, rows_k=problem.k.shape[0], deterministic=True)
    lists = [plan_items(mask, *call), take_apart(mask, plan, *call).items]
    live = [int((items[:, 0] >= 0).sum()) for items in lists]
    assert live[0] < live[1]
