"""Many tiles, many times: what goes wrong once in a thousand tiles, when a warp comes late, shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import BACKWARD_METHODS, Case, case
from gradients import differentiate, judge_gradients
from problems import judge, make_problem, same

pytestmark = pytest.mark.gpu

LARGE = {"lens_q": (2300, 1411, 77), "lens_k": (1900, 1500, 260), "heads_q": 8, "mask_heads": 8, "causal": True}
SPECS = [
    case(f"{q_block}x{k_block}_{head_dim}", q_block=q_block, k_block=k_block, head_dim=head_dim, density=0.4, **LARGE)
    for head_dim in (64, 128)
    for q_block, k_block in ((64, 64), (128, 128), (192, 16), (128, 24))
]
SPECS.append(case("united", q_block=16, k_block=16, pattern="alike", density=0.3, head_dim=128, **LARGE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_forward_again_and_again(spec: Case, dtype: torch.dtype):
    problem = make_problem(spec, "cuda", dtype)
    mask = problem.mask()
    first = problem.run(mask)
    judge(problem, *first)
    for _ in range(100):
        again = problem.run(mask)
        assert all(same(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("spec", [s for s in BACKWARD_METHODS if s.head_dim <= 128], ids=lambda s: s.name)
def test_gradients_again_and_again(spec: Case, dtype: torch.dtype):
    spec = dataclasses.replace(spec, lens_q=(1300, 411, 77), lens_k=(900, 500, 260), causal=True, density=0.5)
    problem = make_problem(spec, "cuda", dtype)
    mask = problem.mask()
    first = differentiate(problem, mask=mask, deterministic=True)
    judge_gradients(problem, first)
    for _ in range(20):
        again = differentiate(problem, mask=mask, deterministic=True)
        assert all(same(x, y) for x, y in zip(first, again, strict=True))
    for _ in range(10):
        judge_gradients(problem, differentiate(problem, mask=mask))
