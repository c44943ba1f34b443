"""Inputs that need no gradient: the others' gradients are those of a call in which all need one."""

from __future__ import annotations

import itertools

import pytest
import torch

import cases
from cases import BACKWARD_METHODS, Case, case
from gradients import attend, judge_gradients, leaves, upstream
from problems import make_problem, same

SPECS = [*BACKWARD_METHODS, case("causal", causal=True, lens_q=(300, 20), lens_k=(280, 90), k_block=16)]
# On the CPU there is one way to compute gradients.
PLACES = [pytest.param(s, "cuda", id=f"{s.name}-cuda", marks=pytest.mark.gpu) for s in SPECS]
PLACES += [pytest.param(s, "cpu", id=f"{s.name}-cpu") for s in (SPECS[1], SPECS[-1])]
SUBSETS = [s for n in (1, 2) for s in itertools.combinations(range(3), n)]


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("trained", SUBSETS, ids=lambda s: "".join("qkv"[i] for i in s))
@pytest.mark.parametrize("spec,device", PLACES)
def test_frozen(spec: Case, trained: tuple[int, ...], deterministic: bool, device: str):
    problem = make_problem(spec, device, dtype_of(device))
    mask = problem.mask()
    inputs = leaves(problem)
    out = attend(*inputs, mask, return_lse=True, deterministic=deterministic)
    grads = upstream(problem, out[1].detach(), 7)
    want = torch.autograd.grad(out, inputs, grads)
    some = [x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    out = attend(*some, mask, return_lse=True, deterministic=deterministic)
    torch.autograd.backward(out, grads)
    judged = list(want)
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in trained)
        if i not in trained:
            continue
        if deterministic or device == "cpu":  # else another kernel may compute what is left to do
            assert same(x.grad, want[i])
        judged[i] = x.grad
    judge_gradients(problem, tuple(judged))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_frozen_after_the_call(device: str):
    """Whoever asks for some gradients of a call in which all inputs need one gets those."""
    problem = make_problem(SPECS[1], device, dtype_of(device))
    inputs = leaves(problem)
    out = attend(*inputs, problem.mask(), return_lse=True, deterministic=True)
    grads = upstream(problem, out[1].detach(), 7)
    want = torch.autograd.grad(out, inputs, grads, retain_graph=True)
    for i, x in enumerate(inputs):
        (got,) = torch.autograd.grad(out, x, grads, retain_graph=True)
        assert same(got, want[i])
