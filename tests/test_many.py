"""More sequences than a CTA has threads, and lists longer than what a warp packs at a time."""

from __future__ import annotations

import math

import pytest
import torch

import cases
import hbsattn
from cases import DEVICE_DTYPES, case
from gradients import attend, differentiate, judge_gradients
from problems import cu_seqlens, judge, make_problem

SEQUENCES, LONGEST = 3000, 9


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("q_block,k_block", [(16, 16), (128, 128), (3, 2)])
def test_many_sequences(q_block: int, k_block: int, deterministic: bool, device: str):
    """Lengths of 0 to 9, others for keys, causal; some attend to nothing. The reference has all padded, in float64."""
    generator = torch.Generator().manual_seed(4)
    lens = torch.randint(0, LONGEST + 1, (2, SEQUENCES), generator=generator)
    lens[:, 1000:1100] = 0
    active = torch.rand(SEQUENCES, generator=generator) < 0.8
    mask = torch.zeros((SEQUENCES, 1, -(-LONGEST // q_block), -(-LONGEST // k_block)), dtype=torch.bool)
    mask |= active[:, None, None, None]
    keywords = {f"cu_seqlens_{x}": cu_seqlens(tuple(n.tolist()), device) for x, n in zip("qk", lens, strict=True)}
    block_mask = hbsattn.BlockMask.from_dense(mask.to(device), q_block, k_block, causal=True, **keywords)
    shapes = [(int(lens[0].sum()), 2, 64), *[(int(lens[1].sum()), 2, 64)] * 2]
    inputs = [torch.randn(s, generator=generator).to(device, dtype_of(device)).requires_grad_() for s in shapes]
    out, lse = attend(*inputs, block_mask, return_lse=True, deterministic=deterministic)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    grads = torch.autograd.grad(out, inputs, grad_out)

    position = torch.arange(LONGEST)
    there = [(position < n[:, None]).to(device) for n in lens]  # (sequences, longest)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = (
        torch.zeros((SEQUENCES, LONGEST, 2, 64), dtype=torch.float64, device=device).masked_scatter(
            which[:, :, None, None], x
        )
        for which, x in zip((there[0], there[1], there[1]), doubles, strict=True)
    )
    allowed = there[0][:, :, None] & there[1][:, None, :] & active.to(device)[:, None, None]
    allowed &= (position[None, None, :] <= position[None, :, None] + (lens[1] - lens[0])[:, None, None]).to(device)
    allowed = allowed[:, None]
    scores = torch.einsum("sqhd,skhd->shqk", q, k) / 8
    scores = scores.masked_fill(~allowed, -math.inf)
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty | ~allowed, 0.0)
    want = torch.einsum("shqk,skhd->sqhd", weights, v)[there[0]]
    want_lse = scores.logsumexp(-1).transpose(1, 2)[there[0]].T.detach()
    want_grads = torch.autograd.grad(want, doubles, grad_out.double())
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    some = want_lse > -math.inf
    torch.testing.assert_close(lse.double()[some], want_lse[some], rtol=4e-6, atol=2e-5)
    tolerance = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2 * tolerance, atol=2 * tolerance)


WIDE = {"q_block": 16, "k_block": 1, "heads_q": 2, "mask_heads": 1, "density": 0.02, "head_dim": 16}


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_wide_rows(source: str, device: str, dtype: torch.dtype):
    """More than 16,384 key blocks in a row, of which the lists name some on either side of every boundary."""
    spec = case("wide", lens_q=(20,), lens_k=(40_000,), source=source, **WIDE)
    problem = make_problem(spec, device, dtype)
    (mask,) = problem.block_masks
    for column in (0, 31, 32, 1023, 1024, 16383, 16384, 16385, 32767, 32768, 39_999):
        mask[:, :, column] = True
    judge(problem, *problem.run())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_long_lists(device: str, dtype: torch.dtype):
    """More than 16,384 entries in a list: nearly all of its blocks."""
    spec = case("long", lens_q=(5,), lens_k=(20_000,), source="indices", **{**WIDE, "density": 0.95})
    problem = make_problem(spec, device, dtype)
    judge(problem, *problem.run())


@pytest.mark.gpu
def test_many_query_blocks():
    """More than 16,384 rows of the mask in a column, for gradients, which transpose it."""
    spec = case("tall", lens_q=(17_000,), lens_k=(20,), q_block=1, k_block=16, density=0.3, heads_q=2, mask_heads=1)
    problem = make_problem(spec, "cuda", torch.float16)
    judge_gradients(problem, differentiate(problem))
