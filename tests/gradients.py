"""Gradients of a problem, those of the dense formula, and the rule that judges them.

The rule is that of problems.py: the largest error against float64 is at most twice that of the same formula in PyTorch
at the input dtype, plus 1e-5 and, for bfloat16, 1e-3 of the largest gradient, or of 1 if that is larger. Norms agree
within a hundredth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hbsattn
from cases import Case
from oracle import plan
from problems import Problem, compare, judge, same

SLACK = {torch.bfloat16: 1e-3}  # beside that of `compare`, of the largest gradient up to 1
SMALL_NORM = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-6}

Gradients = tuple[Tensor, ...]  # of q, k and v, and of sinks if there are some


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """Allows algorithms that are not deterministic, which the tests' poison forbids as a side effect."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: hbsattn.BlockMask, **options: Any) -> Any:
    """A call whose backward need not be deterministic; the call decides that, so backward itself runs under poison."""
    with any_order():
        return hbsattn.block_sparse_attention(q, k, v, mask, **options)


def call_and_differentiate(tensors: tuple[Tensor, ...], mask: hbsattn.BlockMask, **options: object) -> list[Tensor]:
    """Its result, and gradients of the sum of its squares."""
    out = attend(*tensors, mask, deterministic=True, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]


def inputs(problem: Problem) -> tuple[Tensor, ...]:
    tensors = (problem.q, problem.k, problem.v)
    return tensors if problem.sinks is None else (*tensors, problem.sinks)


def leaves(problem: Problem) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() for x in inputs(problem))


def upstream(problem: Problem, lse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, drawn on the CPU; 0 where lse is -inf."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*problem.q.shape[:-1], problem.v.shape[-1])
    grad_out = torch.randn(shape, generator=generator).to(problem.q.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    return grad_out.to(lse.device), grad_lse.to(lse.device).masked_fill(lse == -math.inf, 0.0)


def differentiate(
    problem: Problem,
    *,
    seed: int = 7,
    with_lse: bool = True,
    mask: hbsattn.BlockMask | None = None,
    deterministic: bool = False,
) -> Gradients:
    q, k, v, *sinks = tensors = leaves(problem)
    mask = problem.mask() if mask is None else mask
    options = problem.options() | {"return_lse": True, "deterministic": deterministic}
    if sinks:
        options["sinks"] = sinks[0]
    out, lse = attend(q, k, v, mask, **options)
    grads = upstream(problem, lse.detach(), seed)
    outputs = (out, lse) if with_lse else (out,)
    return torch.autograd.grad(outputs, tensors, grads[: len(outputs)])


def reference(problem: Problem, seed: int, with_lse: bool, compute_dtype: torch.dtype | None) -> Gradients:
    q, k, v, *sinks = tensors = leaves(problem)
    like = dataclasses.replace(problem, q=q, k=k, v=v, sinks=sinks[0] if sinks else None)
    with any_order():
        out, lse, _ = like.oracle(compute_dtype)
        if not out.requires_grad:  # no sequence has a query
            return tuple(torch.zeros_like(x) for x in tensors)
        grad_out, grad_lse = upstream(problem, lse.detach(), seed)
        grad_lse = grad_lse.to(torch.float32 if problem.q.dtype != torch.float64 else torch.float64)
        outputs, grads = ((out, lse), (grad_out, grad_lse)) if with_lse else ((out,), (grad_out,))
        dtype = compute_dtype or problem.q.dtype
        some = [(x, grad.to(dtype)) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
        outputs, grads = zip(*some, strict=True)
        return torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)


def judge_gradients(problem: Problem, got: Gradients, *, seed: int = 7, with_lse: bool = True) -> None:
    """Asserts that gradients, of what `upstream` draws, are what the contract promises."""
    assert len(got) == len(inputs(problem))
    exact = reference(problem, seed, with_lse, torch.float64)
    same_precision = reference(problem, seed, with_lse, None)
    # Weights come from the log-sum-exp, and grad_S from a difference of two sums of products, both in float32: what
    # they cannot resolve where logits are large, or multiplied by large queries and keys, no gradient can.
    out, lse, _ = problem.oracle()
    largest = float(lse[torch.isfinite(lse)].abs().max()) if bool(torch.isfinite(lse).any()) else 0.0
    digits = 2.0**-23 if problem.q.dtype != torch.float64 else 2.0**-52
    # Products of three of TF32 leave scores no digit to spare, however large they are.
    on_tf32 = problem.q.is_cuda and problem.q.dtype == torch.float32
    relative = 1e-6 + (2 * digits * largest if largest > 64 or on_tf32 else 0.0)
    factors = [float(x[torch.isfinite(x)].abs().amax()) for x in (problem.q, problem.k) if bool(x.isfinite().any())]
    scale = problem.case.scale or problem.q.shape[-1] ** -0.5
    sums = (out.abs() * upstream(problem, lse, seed)[0].abs()).sum(-1)
    # delta comes from the output as it was rounded, which shows where a product of huge values should cancel.
    rounding = torch.finfo(problem.q.dtype).eps / 2 if problem.case.values != "normal" else 0.0
    resolved = max(4 * digits, rounding)
    difference = resolved * float(sums.max()) * scale * max(factors, default=0.0) if sums.numel() else 0.0
    luck = [0.0, 0.0, 0.0, luck_of_sinks(problem, out, lse, seed)]
    for x, result, want, like, unlucky in zip(inputs(problem), got, exact, same_precision, luck, strict=False):
        assert result.shape == x.shape and result.dtype == x.dtype and result.device == x.device
        largest_grad = float(want.abs().max()) if want.numel() else 0.0
        slack = SLACK.get(x.dtype, 0.0) * min(largest_grad, 1.0) + unlucky
        compare(result, want, like, relative * largest_grad + difference + slack)
        norm = float(want.double().norm())
        if norm > SMALL_NORM[x.dtype] and problem.case.values == "normal":
            ratio = float(result.double().norm()) / norm
            # The rounding of out moves the difference of grad_out . v and delta in each row by chance, and the norm of
            # few rows with it.
            allowed = 0.01 + 0.02 / max(lse.numel(), 1) ** 0.5 + unlucky * result.numel() ** 0.5 / norm
            assert abs(ratio - 1) <= allowed, f"the gradient's norm is {ratio:.4f} of what it should be"


def luck_of_sinks(problem: Problem, out: Tensor, lse: Tensor, seed: int) -> float:
    """How far off the gradient of a sink may be as `out` is rounded, and weights before it: one number a head, so few
    that the error of the formula in the same dtype may be small by chance. Four standard deviations of what errors of
    half a unit in `out` add up to.
    """
    if problem.sinks is None or problem.q.dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    weights = (problem.sinks.double().unsqueeze(-1) - lse).exp().nan_to_num(0.0, 0.0, 0.0)
    products = (out * upstream(problem, lse, seed)[0]).square().sum(-1).transpose(-1, -2)
    spread = (weights.square() * products).sum(-1)
    spread = spread if problem.case.packed else spread.sum(0)
    return 4 * torch.finfo(problem.q.dtype).eps / 2 / math.sqrt(3) * float(spread.max().sqrt())


def goes_by_queries(spec: Case) -> bool:
    """Whether tiles of queries, not of keys, compute the gradients of a problem on CUDA, in any order."""
    heads = (spec.heads_q, spec.heads_k)
    return plan.goes_by_queries(spec.mask_heads, spec.q_block, spec.k_block, *heads, spec.head_dim)


def assert_same_gradients(got: Gradients, want: Gradients, spec: Case) -> None:
    """Bitwise equality, but for what CUDA adds up in any order and rounds at the end: the gradient of q, or, if tiles
    of queries compute them, those of k and v. Not for sets of heads, whose tiles pass sums on in any order, too."""
    by_queries = goes_by_queries(spec)
    for x, y, exact in zip(got, want, (by_queries, not by_queries, not by_queries), strict=True):
        if exact or x.device.type == "cpu":
            assert same(x, y)
        else:
            torch.testing.assert_close(x, y)


def judge_everything(problem: Problem) -> None:
    """Results, and gradients with those of log-sum-exps and without; deterministic ones are the same twice."""
    judge(problem, *problem.run())
    mask = problem.mask()
    judge_gradients(problem, differentiate(problem, mask=mask))
    grads = [differentiate(problem, mask=mask, with_lse=False, deterministic=True) for _ in range(2)]
    judge_gradients(problem, grads[0], with_lse=False)
    assert all(same(x, y) for x, y in zip(*grads, strict=True))


def judge_frozen(problem: Problem, names: str) -> None:
    """The gradients of some tensors alone, of q, k, v and s, the sinks, are those of all."""
    tensors = dict(zip("qkvs", inputs(problem), strict=True))
    wanted = [x.detach().requires_grad_() for name, x in tensors.items() if name in names]
    tensors |= zip(names, wanted, strict=True)
    q, k, v, sinks = tensors.values()
    out, lse = attend(q, k, v, problem.mask(), **problem.options() | {"sinks": sinks, "return_lse": True})
    grads = torch.autograd.grad((out, lse), wanted, upstream(problem, lse.detach(), 7))
    of_all = dict(zip("qkvs", differentiate(problem), strict=True)) | dict(zip(names, grads, strict=True))
    judge_gradients(problem, tuple(of_all.values()))
