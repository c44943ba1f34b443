"""Rows that attend to nothing, by the mask, by causality or by the lengths: out 0, lse -inf, gradients 0."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import cases
import hbsattn
from cases import BACKWARD_METHODS, Case, case
from gradients import attend, judge_gradients, leaves, upstream
from problems import Problem, cu_seqlens, dense_mask, judge, make_problem, same


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16


# On the CPU, where contents are checked, a flat mask has no more rows than its sequences have blocks.
@pytest.mark.parametrize(
    "form,device",
    [
        ("batched", "cpu"),
        pytest.param("batched", "cuda", marks=pytest.mark.gpu),
        pytest.param("flat", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_rows_past_the_last_sequence(spec: Case, form: str, deterministic: bool, device: str):
    """Packed tensors longer than their sequences, as padded batches are; the rows behind hold NaN."""
    spec = dataclasses.replace(spec, lens_q=(100, 37), lens_k=(90, 130), causal=True)
    dtype = dtype_of(device)
    problem = make_problem(spec, device, dtype)
    # The mask has rows and columns for all that the tensors hold, as one that serves many batches has.
    block_mask = dense_mask(spec, problem.block_masks, form)
    sequences = 1 if form == "flat" else len(spec.lens_q)
    rows, cols = (-(-n // (size * sequences)) for n, size in ((287, spec.q_block), (290, spec.k_block)))
    room = [max(n - there, 0) for n, there in ((cols, block_mask.shape[-1]), (rows, block_mask.shape[-2]))]
    block_mask = torch.nn.functional.pad(block_mask, (0, room[0], 0, room[1]), value=True)
    lens = {"cu_seqlens_q": cu_seqlens(spec.lens_q, device), "cu_seqlens_k": cu_seqlens(spec.keys, device)}
    mask = hbsattn.BlockMask.from_dense(block_mask.to(device), spec.q_block, spec.k_block, causal=True, **lens)
    padded = []
    for x, rows in ((problem.q, 150), (problem.k, 70), (problem.v, 70)):  # up to 287 and 290
        padding = torch.full((rows, *x.shape[1:]), math.nan, dtype=dtype, device=device)
        padded.append(torch.cat([x, padding]).requires_grad_())
    out, lse = attend(*padded, mask, return_lse=True, deterministic=deterministic)
    rows_q, rows_k = sum(spec.lens_q), sum(spec.keys)
    judge(problem, out[:rows_q].detach(), lse[:, :rows_q].detach())
    assert not out[rows_q:].any() and bool((lse[:, rows_q:] == -math.inf).all())
    grad_out, grad_lse = upstream(problem, lse[:, :rows_q].detach(), 7)
    grad_out = torch.cat([grad_out, torch.full_like(out[rows_q:], math.nan)])
    grad_lse = torch.cat([grad_lse, torch.full_like(lse[:, rows_q:], math.nan)], 1)
    grads = torch.autograd.grad((out, lse), padded, (grad_out, grad_lse))
    judge_gradients(problem, tuple(x[:rows] for x, rows in zip(grads, (rows_q, rows_k, rows_k), strict=True)))
    for grad, rows in zip(grads, (rows_q, rows_k, rows_k), strict=True):
        assert not grad[rows:].any(), "rows that no sequence covers have gradients"


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_the_mask_lacks(deterministic: bool):
    """A flat mask of one row for three sequences: on CUDA, where lengths are not known before a launch."""
    lens = cu_seqlens((1, 1, 1), "cuda")
    block_mask = torch.ones((1, 1, 1), dtype=torch.bool, device="cuda")
    mask = hbsattn.BlockMask.from_dense(block_mask, 128, 128, cu_seqlens_q=lens, cu_seqlens_k=lens)
    inputs = [torch.randn(3, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    out, lse = attend(*inputs, mask, return_lse=True, deterministic=deterministic)
    assert same(out[0], inputs[2][0].detach())
    assert not out[1:].any() and bool((lse[:, 1:] == -math.inf).all())
    for grad in torch.autograd.grad(out, inputs, torch.ones_like(out)):
        assert not grad[1:].any()


EMPTY = [dataclasses.replace(s, lens_q=(200, 40), lens_k=(60, 50), causal=True) for s in BACKWARD_METHODS]
EMPTY += [case("two_queries_one_key", lens_q=(2,), lens_k=(1,), density=1.0, causal=True)]
EMPTY += [case("two_queries_of_63_keys", lens_q=(64,), lens_k=(63,), density=1.0, causal=True)]
EMPTY += [case("empty_rows", pattern="empty_rows", q_block=16), case("no_rows", pattern="none")]


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spec", EMPTY, ids=lambda s: s.name)
def test_nan_in_the_gradient_of_lse(spec: Case, deterministic: bool, device: str):
    """What logaddexp of two -inf hands over: a row with nothing to attend takes no part."""
    problem: Problem = make_problem(spec, device, dtype_of(device))
    inputs = leaves(problem)
    out, lse = attend(*inputs, problem.mask(), return_lse=True, deterministic=deterministic)
    empty = lse.detach() == -math.inf
    assert bool(empty.any())
    grad_out, grad_lse = upstream(problem, lse.detach(), 7)
    grads = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse.masked_fill(empty, math.nan)))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0].transpose(-2, -3)[empty].any()
    judge_gradients(problem, grads)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_merging_by_lse(device: str):
    """Two halves of the keys, merged by their log-sum-exps, are the whole, and differentiate like it."""
    spec = case("merge", lens_q=(60,), lens_k=(128,), pattern="empty_rows", q_block=16, k_block=64)
    problem = make_problem(spec, device, dtype_of(device))
    mask = dense_mask(spec, problem.block_masks, "flat").to(device)
    lens = {"cu_seqlens_q": cu_seqlens((60,), device), "cu_seqlens_k": cu_seqlens((64,), device)}
    q, k, v = leaves(problem)
    parts = []
    for half in (0, 1):
        part = hbsattn.BlockMask.from_dense(mask[:, :, half : half + 1], 16, 64, **lens)
        keys = slice(64 * half, 64 * half + 64)
        parts.append(attend(q, k[keys], v[keys], part, return_lse=True))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    total = lse.masked_fill(lse == -math.inf, 0.0)
    out = sum(x * (y - total).exp().T.unsqueeze(-1) for x, y in parts)
    grad_out, grad_lse = upstream(problem, lse.detach(), 7)
    grads = torch.autograd.grad((out, lse), (q, k, v), (grad_out.to(out.dtype), grad_lse))
    want_out, want_lse, _ = problem.oracle()
    torch.testing.assert_close(out.double(), want_out, rtol=0.02, atol=2e-2 if device == "cuda" else 1e-5)
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    assert all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("k_block", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
def test_rows_beside_keys_of_others(device: str, dtype: torch.dtype, deterministic: bool, k_block: int):
    """A NaN in a key that later rows of a block see, and its first ones, which see no key, do not."""
    spec = case("others", lens_q=(128,), lens_k=(88,), q_block=128, k_block=k_block, causal=True, density=1.0)
    problem = make_problem(spec, device, dtype)
    problem.k[10] = math.nan
    q, k, v = leaves(problem)
    out, lse = attend(q, k, v, problem.mask(), return_lse=True, deterministic=deterministic)
    grad_q = torch.autograd.grad((out, lse), q, upstream(problem, lse.detach(), 7))[0]
    assert not out[:40].any() and bool((lse[:, :40] == -math.inf).all()) and not grad_q[:40].any()
    assert bool(grad_q[50:].isnan().any())
