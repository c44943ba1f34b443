"""Gradients against those of the dense formula, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cases
import hbsattn
from cases import Case, case
from problems import Problem, compare, make_problem, same

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
BAD_FOR_GRADIENTS = ("expanded_heads", "expanded_batch", "qkv")  # views whose gradients are those of other tensors


def by_name(spec: Case) -> str:
    return spec.name


def leaves(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v))


def upstream(problem: Problem, lse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse, drawn at random; 0 where lse is -inf."""
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(problem.q.shape, generator=generator).to(problem.q.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    return grad_out, grad_lse.masked_fill(lse == -math.inf, 0.0)


def differentiate(problem: Problem, seed: int, with_lse: bool) -> tuple[Tensor, ...]:
    q, k, v = leaves(problem)
    out, lse = hbsattn.block_sparse_attention(
        q, k, v, problem.mask(), softmax_scale=problem.case.scale, return_lse=True
    )
    grads = upstream(problem, lse.detach(), seed)
    outputs = (out, lse) if with_lse else (out,)
    return torch.autograd.grad(outputs, (q, k, v), grads[: len(outputs)])


def reference(problem: Problem, seed: int, with_lse: bool, compute_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    q, k, v = leaves(problem)
    like = Problem(problem.case, q, k, v, problem.block_masks)
    out, lse = like.oracle(compute_dtype)
    if not out.requires_grad:  # no sequence has a query
        return tuple(torch.zeros_like(x) for x in (q, k, v))
    grad_out, grad_lse = upstream(problem, lse.detach(), seed)
    grad_lse = grad_lse.to(torch.float32 if problem.q.dtype != torch.float64 else torch.float64)
    outputs, grads = ((out, lse), (grad_out, grad_lse)) if with_lse else ((out,), (grad_out,))
    dtype = compute_dtype or problem.q.dtype
    some = [(x, grad.to(dtype)) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
    outputs, grads = zip(*some, strict=True)
    return torch.autograd.grad(outputs, (q, k, v), grads, materialize_grads=True)


def judge_gradients(problem: Problem, *, seed: int = 7, with_lse: bool = True) -> None:
    got = differentiate(problem, seed, with_lse)
    exact = reference(problem, seed, with_lse, torch.float64)
    same_precision = reference(problem, seed, with_lse, None)
    # Weights come from the log-sum-exp, and grad_S from a difference of two sums of products, both in float32: what
    # they cannot resolve where logits are large, or multiplied by large queries and keys, no gradient can.
    out, lse = problem.oracle()
    largest = float(lse[torch.isfinite(lse)].abs().max()) if bool(torch.isfinite(lse).any()) else 0.0
    digits = 2.0**-23 if problem.q.dtype != torch.float64 else 2.0**-52
    relative = 1e-6 + (2 * digits * largest if largest > 64 else 0.0)
    factors = [x[torch.isfinite(x)].abs().max() for x in (problem.q, problem.k) if x.numel()]
    scale = problem.case.scale or problem.q.shape[-1] ** -0.5
    sums = (out.abs() * upstream(problem, lse, seed)[0].abs()).sum(-1)
    difference = 4 * digits * float(sums.max()) * scale * float(max(factors)) if sums.numel() else 0.0
    for x, result, want, like in zip((problem.q, problem.k, problem.v), got, exact, same_precision, strict=True):
        assert result.shape == x.shape and result.dtype == x.dtype
        compare(result, want, like, resolution=relative * float(want.abs().max()) + difference if want.numel() else 0.0)
        norm = float(want.double().norm())
        if norm > 1e-6 and result.dtype != torch.bfloat16 and problem.case.values == "normal":
            assert 0.99 <= float(result.double().norm()) / norm <= 1.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [s for s in cases.CASES if s.layout not in BAD_FOR_GRADIENTS], ids=by_name)
def test_cases(spec: Case, dtype: torch.dtype):
    if spec.values != "normal" and dtype == torch.bfloat16:
        pytest.skip("scores of 1e4 have no digits left in bfloat16")
    judge_gradients(make_problem(spec, "cpu", dtype))


ADVERSARIAL = [
    case("one_block_for_all", pattern="one_column", lens_q=(300, 100), q_block=16, k_block=64, head_dim=64),
    case("one_query_for_all_blocks", density=1.0, lens_q=(1,), lens_k=(700,), k_block=16),
    case("padded_tail", lens_q=(192,), lens_k=(192,), q_block=128, k_block=128, values="negative", scale=1.0),
    case("hidden_logits", values="hidden", scale=1.0, causal=True, density=1.0, lens_q=(200,)),
    case("half_the_rows_empty", pattern="empty_rows", q_block=16, k_block=16),
]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("spec", ADVERSARIAL, ids=by_name)
def test_adversarial(spec: Case, with_lse: bool):
    judge_gradients(make_problem(spec, "cpu", torch.float32), with_lse=with_lse)


@pytest.mark.parametrize(
    "spec", [case("rows", pattern="empty_rows", q_block=16), case("none", pattern="none")], ids=by_name
)
def test_what_attends_to_nothing_has_no_gradient(spec: Case):
    problem = make_problem(spec, "cpu", torch.float32)
    grad_q, grad_k, grad_v = differentiate(problem, 3, with_lse=True)
    _, lse = problem.run()
    assert bool((grad_q.transpose(-2, -3)[lse == -math.inf] == 0).all())
    if spec.pattern == "none":
        assert not grad_k.any() and not grad_v.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unattended_keys_stay_outside(value: float):
    """Gradients of keys that no query attends to are 0, whatever these hold."""
    problem = make_problem(case("poisoned", pattern="one_column", lens_q=(200, 90)), "cpu", torch.float32)
    clean = differentiate(problem, 3, with_lse=True)
    unattended = (clean[2] == 0).all(-1)
    assert bool(unattended.any())
    for x in (problem.k, problem.v):
        x.masked_fill_(unattended.unsqueeze(-1), value)
    for before, after in zip(clean, differentiate(problem, 3, with_lse=True), strict=True):
        assert same(before, after)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_gradcheck(group: int, causal: bool):
    spec = case("check", lens_q=(7, 5), lens_k=(6, 9), q_block=3, k_block=2, head_dim=4, causal=causal, density=0.6)
    spec = cases.dataclasses.replace(spec, heads_q=2 * group, heads_k=2, mask_heads=2 * group)
    problem = make_problem(spec, "cpu", torch.float64)
    mask = problem.mask()
    empty = problem.run()[1] == -math.inf

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)
        return out, lse.masked_fill(empty, 0.0)

    assert torch.autograd.gradcheck(attend, leaves(problem))


def test_deterministic():
    problem = make_problem(case("many", lens_q=(400, 333), density=0.8, q_block=16, k_block=16), "cpu", torch.float32)
    first = differentiate(problem, 3, with_lse=True)
    for _ in range(5):
        for a, b in zip(first, differentiate(problem, 3, with_lse=True), strict=True):
            assert same(a, b)


def test_second_derivative_is_refused():
    problem = make_problem(case("second"), "cpu", torch.float32)
    q, k, v = leaves(problem)
    out = hbsattn.block_sparse_attention(q, k, v, problem.mask())
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_only_some_inputs_need_gradients():
    problem = make_problem(case("some"), "cpu", torch.float32)
    k = problem.k.requires_grad_()
    hbsattn.block_sparse_attention(problem.q, k, problem.v, problem.mask()).sum().backward()
    assert k.grad is not None and problem.q.grad is None


def test_compiled():
    problem = make_problem(case("compiled", causal=True), "cpu", torch.float32)
    mask = problem.mask()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hbsattn.block_sparse_attention(q, k, v, mask).square().sum()

    inputs = leaves(problem)
    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b)
