"""What PyTorch wraps around a call: function transforms, forward-mode derivatives, inference mode, counters of FLOPs.

A transform gives the right result, or an error that names the operator; it never gives a wrong one in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cases
import hbsattn
from cases import case
from gradients import any_order, attend, differentiate, judge_gradients
from problems import Problem, judge, make_problem, same

SPEC = case("transforms", lens_q=(20, 9), q_block=16, k_block=16, causal=True, heads_q=2, heads_k=2, mask_heads=2)
NAMES = r"hbsattn|block_sparse_attention"


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def setup(device: str, used: bool) -> tuple[Problem, hbsattn.BlockMask]:
    problem = make_problem(SPEC, device, dtype_of(device))
    mask = problem.mask()
    if used:
        problem.run(mask)
    return problem, mask


def right_or_refused(call: Callable[[], Any], want: Callable[[], Any]) -> None:
    try:
        with any_order():
            got = call()
    except (RuntimeError, TypeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        message = str(error)
        assert any(name in message for name in NAMES.split("|")), f"the error does not name the operator: {message}"
        return
    torch.testing.assert_close(got, want(), rtol=2e-2, atol=2e-2)


USED = pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
DEVICE = pytest.mark.parametrize("device", cases.DEVICES)


@DEVICE
@USED
def test_grad(used: bool, device: str):
    problem, mask = setup(device, used)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hbsattn.block_sparse_attention(q, k, v, mask).float().square().sum()

    inputs = (problem.q, problem.k, problem.v)

    def want() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with any_order():
            return torch.autograd.grad(loss(*leaves), leaves)

    right_or_refused(lambda: torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), want)


@DEVICE
@USED
@pytest.mark.parametrize("way", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobian(way: Callable[..., Any], used: bool, device: str):
    problem, mask = setup(device, used)

    def row(q: Tensor) -> Tensor:
        return hbsattn.block_sparse_attention(q, problem.k, problem.v, mask)[3, 1]

    def want() -> Tensor:
        q = problem.q.detach().requires_grad_()
        with any_order():
            return torch.stack([torch.autograd.grad(x, q, retain_graph=True)[0] for x in row(q)])

    right_or_refused(lambda: way(row)(problem.q), want)


def two_keys(device: str) -> tuple[Tensor, Tensor, hbsattn.BlockMask]:
    """q = 1, k = v = (0, 1): out is the logistic function of q, whose slope at 1 is 0.19661."""
    ones = torch.ones((1, 1, 1, 2), dtype=torch.bool, device=device)
    mask = hbsattn.BlockMask.from_dense(ones, 1, 1, seqlen_q=1, seqlen_k=2)
    q = torch.ones((1, 1, 1, 1), device=device, dtype=dtype_of(device))
    return q, torch.tensor([0.0, 1.0], device=device, dtype=q.dtype).view(1, 2, 1, 1), mask


@DEVICE
@USED
def test_jvp(used: bool, device: str):
    q, k, mask = two_keys(device)
    if used:
        hbsattn.block_sparse_attention(q, k, k, mask)

    def call() -> float:
        _, tangent = torch.func.jvp(
            lambda x: hbsattn.block_sparse_attention(x, k, k, mask), (q,), (torch.ones_like(q),)
        )
        return tangent.item()

    right_or_refused(call, lambda: 0.19661)


@DEVICE
@USED
@pytest.mark.parametrize("trains", [False, True])
def test_dual_numbers(trains: bool, used: bool, device: str):
    q, k, mask = two_keys(device)
    if used:
        hbsattn.block_sparse_attention(q, k, k, mask)
    q.requires_grad_(trains)

    def call() -> float:
        with forward_ad.dual_level():
            out = hbsattn.block_sparse_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, k, mask)
            tangent = forward_ad.unpack_dual(out).tangent
            return 0.0 if tangent is None else tangent.item()  # no tangent is a tangent of 0

    right_or_refused(call, lambda: 0.19661)


@DEVICE
@USED
def test_vmap(used: bool, device: str):
    problem, mask = setup(device, used)
    queries = torch.stack([problem.q, 2 * problem.q, -problem.q])

    def call() -> Tensor:
        return torch.vmap(lambda q: hbsattn.block_sparse_attention(q, problem.k, problem.v, mask))(queries)

    def want() -> Tensor:
        return torch.stack([hbsattn.block_sparse_attention(q, problem.k, problem.v, mask) for q in queries])

    right_or_refused(call, want)


@DEVICE
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
@pytest.mark.parametrize("made", ["built", "used_first", "used_with_gradients_first"])
def test_masks_of_inference_mode(made: str, source: str, device: str):
    """A mask that was built, or first used, in inference mode trains afterwards."""
    problem = make_problem(SPEC, device, dtype_of(device))
    mask = None if made == "built" else problem.mask(source=source)
    with torch.inference_mode():
        if mask is None:
            mask = problem.mask(source=source)
        inference = problem.run(mask)
    if made == "used_with_gradients_first":
        differentiate(problem, mask=mask)
        with torch.inference_mode():
            problem.run(mask)
    judge(problem, *problem.run(mask))
    assert same(inference[0], problem.run(mask)[0])
    for deterministic in (False, True):
        judge_gradients(problem, differentiate(problem, mask=mask, deterministic=deterministic))


@DEVICE
@pytest.mark.parametrize("spec", [SPEC, case("longer", lens_q=(150, 37), lens_k=(90, 200))], ids=lambda s: s.name)
def test_flop_counter(spec: cases.Case, device: str):
    """Those of the active pairs alone, two products forward and five backward."""
    problem = make_problem(spec, device, dtype_of(device))
    mask = problem.mask()
    flops = mask.flops(spec.head_dim, spec.heads_q)
    assert flops > 0
    with FlopCounterMode(display=False) as counter:
        problem.run(mask)
    assert counter.get_total_flops() == flops
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with FlopCounterMode(display=False) as counter:
        out = attend(*inputs, mask)
        assert counter.get_total_flops() == flops
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert counter.get_total_flops() == flops * 7 // 2
