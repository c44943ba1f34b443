"""What the online softmax must not lose: maxima that grow from block to block, and the judges that would see it."""

from __future__ import annotations

import math

import pytest
import torch

from cases import DEVICE_DTYPES, case
from gradients import differentiate, judge_gradients
from problems import Problem, compare_lse, judge, make_problem


def climb(device: str, dtype: torch.dtype, bits: float, up: bool, q_block: int, k_block: int) -> Problem:
    """Scores of all keys of a block exceed those of the block before by `bits` powers of two, or are below them."""
    spec = case(
        "climb",
        lens_q=(130,),
        lens_k=(7 * 128 + 5,),
        q_block=q_block,
        k_block=k_block,
        density=1.0,
        scale=1.0,
        heads_q=2,
        mask_heads=2,
    )
    problem = make_problem(spec, device, dtype)
    step = torch.arange(problem.k.shape[0], device=device) // 128
    height = (step if up else step.max() - step) * (bits * math.log(2))
    problem.q *= 0.1
    problem.q[..., 0], problem.k[..., 0] = 1.0, height[:, None].to(dtype)
    return problem


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("q_block,k_block", [(64, 64), (128, 128), (16, 48), (192, 16), (128, 24)])
@pytest.mark.parametrize("bits", [3, 7.5, 9, 17, 19, 30])
@pytest.mark.parametrize("up", [False, True])
def test_growing_maxima(up: bool, bits: float, q_block: int, k_block: int, device: str, dtype: torch.dtype):
    """Probabilities relative to an old maximum must stay within float16, and sums must follow the new one."""
    problem = climb(device, dtype, bits, up, q_block, k_block)
    judge(problem, *problem.run())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("bits", [7.5, 19])
def test_gradients_of_growing_maxima(bits: float, device: str, dtype: torch.dtype):
    problem = climb(device, dtype, bits, True, 64, 64)
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_exact_values(device: str, dtype: torch.dtype):
    """n equal scores: out is the mean of v, which is exact, and lse the logarithm of n."""
    for keys in (1, 2, 64, 128, 512):
        problem = make_problem(case("exact", lens_q=(70,), lens_k=(keys,), density=1.0), device, dtype)
        problem.q.zero_()
        problem.v.copy_((torch.arange(keys, device=device) % 2 * 2)[:, None, None].expand_as(problem.v))
        out, lse = problem.run()
        assert bool((out == (1.0 if keys > 1 else 0.0)).all())
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(keys)), rtol=0, atol=2e-6)


# The judges themselves: each error here is one that a kernel could have.
PLANTED = {
    "lse_off_by_5e-4": lambda out, lse: (out, lse + 5e-4),
    "lse_of_one_row": lambda out, lse: (out, torch.cat([lse[:, :-1], lse[:, -1:] + 1e-3], 1)),
    "a_row_one_percent_large": lambda out, lse: (torch.cat([out[:-1], out[-1:] * 1.01]), lse),
    "an_element": lambda out, lse: (
        out.index_put((torch.tensor(3), torch.tensor(1), torch.tensor(5)), out[3, 1, 6]),
        lse,
    ),
    "rounded_twice": lambda out, lse: (out.to(torch.bfloat16).to(out.dtype), lse),
    "two_rows_swapped": lambda out, lse: (out.roll(1, 0), lse),
    "nan": lambda out, lse: (out.masked_fill(out == out.max(), math.nan), lse),
    "an_empty_row": lambda out, lse: (out, torch.cat([lse[:, :-1], lse[:, -1:] - math.inf], 1)),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_judges_see(planted: str):
    problem = make_problem(case("judged", lens_q=(200,), q_block=32, k_block=32), "cpu", torch.float16)
    out, lse = problem.run()
    judge(problem, out, lse)
    out, lse = PLANTED[planted](out, lse)
    with pytest.raises(AssertionError):
        judge(problem, out.to(torch.float16), lse)


def test_judges_see_small_gradients():
    """An error of the size of small gradients is not within a slack for large ones."""
    problem = make_problem(case("judged", lens_q=(200,), q_block=32, k_block=32), "cpu", torch.bfloat16)
    problem.v *= 2.0**-9
    grads = differentiate(problem, with_lse=False)
    judge_gradients(problem, grads, with_lse=False)
    assert float(grads[0].abs().max()) < 1e-2
    with pytest.raises(AssertionError):
        judge_gradients(problem, (torch.zeros_like(grads[0]) + 1e-3, *grads[1:]), with_lse=False)


def test_judges_tell_where():
    lse, reference = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    lse[1, 2] = 3e-5
    with pytest.raises(AssertionError, match=r"has an error of 3.0.*e-05, above 2.0.*; 1 of 6 do"):
        compare_lse(lse, reference, reference, torch.bfloat16)
