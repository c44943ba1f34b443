"""Under autocast the call computes in the autocast dtype, as PyTorch's own attention does."""

from __future__ import annotations

import pytest
import torch

import hbsattn
from cases import case
from gradients import any_order, attend
from problems import judge, make_problem, same

PLACES = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
]
SPEC = case("autocast", causal=True, lens_q=(100, 37), k_block=32)
# Dtypes of q, k and v; None: that of autocast.
MIXES = {
    "float32": (torch.float32,) * 3,
    "norms_in_float32": (torch.float32, torch.float32, None),
    "values_in_float32": (None, None, torch.float32),
    "none_to_cast": (None, None, None),
}


@pytest.mark.parametrize("device,dtype", PLACES)
@pytest.mark.parametrize("mix", MIXES)
def test_autocast(mix: str, device: str, dtype: torch.dtype):
    problem = make_problem(SPEC, device, dtype)
    inputs = [
        x.detach().to(wanted or dtype).requires_grad_()
        for x, wanted in zip((problem.q, problem.k, problem.v), MIXES[mix], strict=True)
    ]
    mask = problem.mask()
    with torch.autocast(device, dtype=dtype):
        out, lse = attend(*inputs, mask, return_lse=True, deterministic=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    judge(problem, out.detach(), lse.detach())
    cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
    want, want_lse = attend(*cast, mask, return_lse=True, deterministic=True)
    assert same(out, want) and same(lse, want_lse)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    want_grads = torch.autograd.grad(want, cast, grad_out)
    outside = torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    with torch.autocast(device, dtype=dtype):
        inside = torch.autograd.grad(out, inputs, grad_out)
    for x, a, b, expected in zip(inputs, outside, inside, want_grads, strict=True):
        assert a.dtype == b.dtype == x.dtype
        assert same(a, expected.to(x.dtype)) and same(b, a)


@pytest.mark.parametrize("device,dtype", PLACES)
def test_backward_alone_inside_autocast(device: str, dtype: torch.dtype):
    problem = make_problem(SPEC, device, dtype)
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with any_order():
        out = hbsattn.block_sparse_attention(*inputs, problem.mask(), deterministic=True)
    want = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    with torch.autocast(device, dtype=dtype):
        got = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(same(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("device,dtype", PLACES)
def test_smallest(device: str, dtype: torch.dtype):
    mask = hbsattn.BlockMask.from_dense(
        torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device), 1, 1, seqlen_q=1, seqlen_k=1
    )
    q = torch.zeros((1, 1, 1, 1), device=device)
    with torch.autocast(device, dtype=dtype):
        out = hbsattn.block_sparse_attention(q, q, q, mask)
    assert out.dtype == dtype and out.item() == 0.0


@pytest.mark.parametrize("device,dtype", PLACES)
def test_outside_of_autocast(device: str, dtype: torch.dtype):
    """Dtypes that differ are refused by name; autocast that is off, or of another device, casts nothing."""
    problem = make_problem(SPEC, device, dtype)
    arguments = (problem.q.float(), problem.k.float(), problem.v, problem.mask())
    with pytest.raises((TypeError, ValueError), match=r"\bv has dtype|\bq has dtype|\bk has dtype"):
        hbsattn.block_sparse_attention(*arguments)
    for kind in ("cpu", "cuda"):
        with torch.autocast(kind, dtype=dtype, enabled=kind != device), pytest.raises((TypeError, ValueError)):
            hbsattn.block_sparse_attention(*arguments)
