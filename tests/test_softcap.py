"""Scores with a softcap beside the dense formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import cases
import hbsattn
from cases import BACKWARD_METHODS, DEVICE_DTYPES, DEVICES, TOKENS, WINDOWS, Case, case
from gradients import (
    attend,
    call_and_differentiate,
    differentiate,
    inputs,
    judge_everything,
    judge_frozen,
    judge_gradients,
    leaves,
    reference,
    upstream,
)
from problems import judge, make_problem, same

# Normal inputs have scores of about 1, and now and then 4: caps from below them to far above.
SPECS = [
    case("128x128", q_block=128, k_block=128, lens_q=(300, 90), lens_k=(700, 90), head_dim=128, softcap=1.0),
    case("128x128_causal", q_block=128, k_block=128, lens_q=(300, 90), head_dim=64, causal=True, softcap=0.3),
    case("64x64", head_dim=64, causal=True, softcap=2.0),
    case("64x128", k_block=128, head_dim=128, lens_k=(500, 37, 200), softcap=50.0),
    case("128x64", q_block=128, head_dim=96, packed=False, lens_q=(150, 150), lens_k=(210, 210), softcap=1.0),
    case("16x16", q_block=16, k_block=16, heads_q=8, mask_heads=2, causal=True, softcap=0.7),
    case("192x192", q_block=192, k_block=192, lens_q=(400, 191, 5), lens_k=(300, 190, 60), head_dim=128, softcap=2.0),
    case("128x32", q_block=128, k_block=32, lens_q=(300, 20), head_dim=128, causal=True, softcap=1.0),
    case("100x100", q_block=100, k_block=100, lens_q=(230, 40), head_dim=128, causal=True, softcap=1.0),
    case("7x128", q_block=7, k_block=128, heads_q=8, mask_heads=2, head_dim=72, softcap=0.5),
    case("128x7", q_block=128, k_block=7, head_dim=64, causal=True, softcap=3.0),
    case("tokens", **TOKENS, lens_q=(70, 5), head_dim=128, causal=True, softcap=1.0),
    case("tokens_alike", **TOKENS, pattern="alike", lens_q=(40,), k_block=16, head_dim=128, softcap=2.0),
    case("stacks", q_block=6, heads_q=24, heads_k=1, mask_heads=1, k_block=48, head_dim=96, softcap=1.0),
    case("wide_192", q_block=64, k_block=64, head_dim=192, causal=True, softcap=1.0),
    case("wide_256", q_block=128, k_block=48, head_dim=256, lens_q=(150, 37), lens_k=(300, 37), softcap=2.0),
    case("short_values", q_block=128, k_block=128, head_dim=192, value_dim=128, lens_q=(300,), softcap=1.0),
    case("windows", causal=True, windows=WINDOWS, k_block=16, softcap=1.0),
    case("sinks", q_block=16, k_block=80, heads_q=8, heads_k=2, mask_heads=2, sinks=True, softcap=2.0),
    case("dropout", q_block=128, k_block=64, causal=True, head_dim=128, sinks=True, dropout_p=0.2, softcap=1.0),
    case("dropout_ragged", q_block=48, k_block=20, causal=True, dropout_p=0.2, softcap=2.0),
    case("dropout_wide", q_block=64, k_block=64, head_dim=192, causal=True, dropout_p=0.2, softcap=1.0),
    case("longer_values", head_dim=64, value_dim=128, q_block=128, causal=True, softcap=1.0),
    case("alike", pattern="alike", heads_q=8, mask_heads=8, k_block=16, lens_q=(300,), head_dim=128, softcap=1.0),
    case("zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True, softcap=1.0),
    case("q_longer", lens_q=(200, 130, 64), lens_k=(90, 129, 10), causal=True, density=0.7, softcap=1.0),
    case("empty_rows", pattern="empty_rows", q_block=16, head_dim=128, softcap=1.0),
    case("hidden", values="hidden", q_block=128, causal=True, head_dim=128, softcap=5.0),
    case("large_scores", q_block=128, k_block=128, head_dim=128, scale=3.0, softcap=30.0),
    case("padded", head_dim=20, layout="padded", causal=True, softcap=1.0),
    case("odd_strides", layout="odd", lens_q=(90, 90), packed=False, softcap=1.0),
]


def by_name(spec: Case) -> str:
    return spec.name


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    judge_everything(make_problem(spec, device, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", BACKWARD_METHODS, ids=by_name)
def test_backward_methods(method: Case, deterministic: bool):
    """Every way in which gradients are computed without a cap."""
    problem = make_problem(dataclasses.replace(method, causal=True, density=0.9, softcap=1.0), "cuda", torch.float16)
    mask = problem.mask()
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=deterministic))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_random(seed: int, device: str, dtype: torch.dtype):
    spec = cases.random_case(1100 + seed, any_block_size=seed % 2 == 0, max_len=200, windowed=seed % 4 == 0)
    cap = (0.5, 1.0, 3.0, 50.0)[seed % 4]
    spec = dataclasses.replace(spec, scale=None, values="normal", sinks=seed % 3 == 0, softcap=cap)
    problem = make_problem(spec, device, dtype, seed)
    judge(problem, *problem.run())
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("cap", [0.01, 0.05, 1.0, 20.0, 300.0, 1e4, 1e6])
def test_caps_of_every_size(cap: float, device: str, dtype: torch.dtype):
    """From those that make all scores alike to those that no score comes near, where the result is that without."""
    spec = case("size", q_block=128, k_block=128, lens_q=(300,), head_dim=128, causal=True, softcap=cap)
    problem = make_problem(spec, device, dtype)
    out, lse = problem.run()
    if dtype != torch.float16 or cap < 1e3:  # whose gradients the formula in float16 cannot have
        judge(problem, out, lse)
        grads = differentiate(problem)
        if device == "cuda" and dtype == torch.float32 and cap < 0.05:
            # The slope of such a cap comes from a log-sum-exp many times as large.
            for got, want in zip(grads, reference(problem, 7, True, torch.float64), strict=True):
                assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
        else:
            judge_gradients(problem, grads)
    if cap == 1e6:
        plain_out, plain_lse = attend(problem.q, problem.k, problem.v, problem.mask(), return_lse=True)
        torch.testing.assert_close(lse, plain_lse, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(out.float(), plain_out.float(), atol=1e-2 if device == "cuda" else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_scores_in_between(device: str, dtype: torch.dtype):
    """One key a query: lse is the capped score itself, over all of tanh."""
    count, cap = 2048, 7.0
    q = torch.zeros(count, 1, 64, device=device, dtype=dtype)
    q[:, 0, 0] = torch.linspace(-40, 40, count, device=device).to(dtype)
    k = torch.zeros(1, 1, 64, device=device, dtype=dtype)
    k[0, 0, 0] = 1
    lens_q, lens_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (count, 1))
    ones = torch.ones(1, count // 64, 1, dtype=torch.bool, device=device)
    mask = hbsattn.BlockMask.from_dense(ones, 64, 64, cu_seqlens_q=lens_q, cu_seqlens_k=lens_k)
    _, lse = attend(q, k, k, mask, softmax_scale=1.0, softcap=cap, return_lse=True)
    scores = q[:, 0, 0].double()
    want = cap * torch.tanh(scores / cap)
    assert bool(((lse[0] - want).abs() <= 1e-6 * cap + 2e-6 * want.abs()).all())


def test_gradients_in_float64():
    """Finite differences."""
    spec = case("check", lens_q=(9, 5), q_block=4, k_block=3, head_dim=3, density=0.7, sinks=True, softcap=0.8)
    problem = make_problem(spec, "cpu", torch.float64)
    mask, options = problem.mask(), problem.options() | {"return_lse": True}
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return hbsattn.block_sparse_attention(q, k, v, mask, **options | {"sinks": sinks})

    assert torch.autograd.gradcheck(call, (*leaves(problem)[:3], sinks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", ["q", "k", "v", "kv", "s"])
@pytest.mark.parametrize("k_block", [16, 64])
def test_frozen(k_block: int, names: str, device: str):
    spec = case("frozen", causal=True, sinks=True, q_block=128, k_block=k_block, head_dim=128, softcap=1.0)
    judge_frozen(make_problem(spec, device, dtype_of(device)), names)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_no_cap(device: str, dtype: torch.dtype):
    problem = make_problem(case("none", causal=True), device, dtype)
    mask, tensors = problem.mask(), leaves(problem)
    plain = call_and_differentiate(tensors, mask)
    for cap in (0, 0.0, torch.tensor(0.0)):
        got = call_and_differentiate(tensors, mask, softcap=cap)
        assert all(same(x, y) for x, y in zip(got, plain, strict=True))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_one_mask_serves_calls_with_and_without(device: str, dtype: torch.dtype):
    """In turns, with gradients and without: each has the plan of its own tiles."""
    capped = make_problem(case("turns", q_block=192, causal=True, softcap=1.0), device, dtype)
    plain = dataclasses.replace(capped, case=dataclasses.replace(capped.case, softcap=0.0))
    mask = capped.mask()
    for problem in (capped, plain, capped, plain):
        judge(problem, *problem.run(mask))
        judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("device", DEVICES)
def test_masks_that_stay_lists(device: str, monkeypatch: pytest.MonkeyPatch):
    spec = case("lists", q_block=1, k_block=16, lens_q=(90, 40), source="indices", causal=True, softcap=1.0)
    problem = make_problem(spec, device, dtype_of(device))
    monkeypatch.setattr("hbsattn._chunks.CHUNK_BYTES", 4096)
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)
    mask = problem.mask()
    assert mask._lists is not None
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str):
    """In one graph, whatever the cap is."""
    spec = case("compiled", lens_q=(128, 128), packed=False, causal=True, softcap=1.0)
    problem = make_problem(spec, device, dtype_of(device))
    mask, tensors = problem.mask(), leaves(problem)

    @torch.compile(fullgraph=True)
    def call(q: Tensor, k: Tensor, v: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, mask, softcap=cap, return_lse=True)

    for cap in (1.0, 2.0, 0.0):
        other = dataclasses.replace(problem, case=dataclasses.replace(spec, softcap=cap))
        out, lse = call(*tensors, cap)
        judge(other, out.detach(), lse.detach())
        torch.autograd.grad(out.float().sum() + lse.sum(), tensors)


@pytest.mark.gpu
def test_graph():
    """A captured call with gradients gives what it gives outside."""
    problem = make_problem(case("graph", causal=True, softcap=1.0), "cuda", torch.bfloat16)
    mask = problem.mask()
    tensors, want = leaves(problem), differentiate(problem, mask=mask, deterministic=True)
    grads = upstream(problem, problem.run(mask)[1], 7)
    options = problem.options() | {"return_lse": True, "deterministic": True}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(attend(*tensors, mask, **options), tensors, grads)
    graph.replay()
    assert all(same(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "cap,error,message",
    [
        (1e-50, ValueError, r"softcap is 1e-50; expected 0, or a number from 0.01 to 1e6"),
        (-1e-50, ValueError, r"softcap is -1e-50; expected 0"),
        (1000001, ValueError, r"softcap is 1000001.0; expected 0, or a number from 0.01 to 1e6"),
        (-1.0, ValueError, r"softcap is -1(\.0*)?; expected 0, or a number from 0.01 to 1e6"),
        (0.009, ValueError, r"softcap is .*; expected 0, or a number from 0.01 to 1e6"),
        (2e6, ValueError, r"softcap is .*; expected 0, or a number"),
        (math.nan, ValueError, r"softcap is nan; expected 0, or a number"),
        (math.inf, ValueError, r"softcap is inf; expected 0, or a number"),
        (True, TypeError, r"softcap is True; expected a real number"),
        ("50", TypeError, r"softcap is '50'; expected a real number"),
        (None, TypeError, r"softcap is None; expected a real number"),
        (torch.ones(2), TypeError, r"softcap is a Tensor \(2,\)"),
    ],
)
def test_refused(cap: object, error: type[Exception], message: str, trains: bool, device: str):
    problem = make_problem(case("refused"), device, dtype_of(device))
    tensors = leaves(problem) if trains else inputs(problem)
    with pytest.raises(error, match=message):
        attend(*tensors, problem.mask(), softcap=cap)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_scales_that_no_cap_goes_with(scale: float, device: str):
    problem = make_problem(case("refused"), device, dtype_of(device))
    with pytest.raises(ValueError, match=r"softmax_scale / softcap is .*; expected a number from 3e-8 to 1e7"):
        attend(*inputs(problem), problem.mask(), softmax_scale=scale, softcap=1.0)
