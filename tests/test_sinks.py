"""Sinks of heads beside the dense formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import cases
import hbsattn
from cases import BACKWARD_METHODS, DEVICE_DTYPES, DEVICES, Case, case
from gradients import attend, differentiate, inputs, judge_gradients, leaves, upstream
from problems import Problem, judge, make_problem, same

SPECS = [
    case("packed", causal=True),
    case("batched", lens_q=(150, 150), lens_k=(130, 130), packed=False, causal=True),
    case("zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True),
    case("no_keys", lens_q=(40, 40), lens_k=(0, 0), packed=False),
    case("empty_rows", pattern="empty_rows", q_block=16, head_dim=128),
    case("empty_mask", pattern="none"),
    case("q_longer", lens_q=(200, 130, 64), lens_k=(90, 129, 10), causal=True, density=0.7),
    case("groups", heads_q=8, heads_k=2, mask_heads=2, q_block=16, k_block=80, causal=True),
    case("group_of_tails", heads_q=8, heads_k=1, mask_heads=1, q_block=112, k_block=96, lens_q=(111, 113)),
    case("tails", lens_q=(127, 129, 65), lens_k=(63, 255, 131), q_block=128, k_block=48, head_dim=72),
    case("long", lens_q=(300, 90), lens_k=(700, 90), q_block=128, k_block=128, head_dim=128, density=0.7),
    case("192_rows", q_block=192, k_block=48, lens_q=(400, 191, 5), lens_k=(300, 190, 60), causal=True, head_dim=96),
    case("192_rows_of_64", q_block=192, k_block=64, lens_q=(400,), lens_k=(700,), density=0.8),
    case("wide", q_block=64, k_block=48, head_dim=256, lens_k=(500, 37, 200)),
    case("wide_192", q_block=16, k_block=64, head_dim=192, causal=True, pattern="alike"),
    case("tokens", q_block=1, heads_q=16, heads_k=1, mask_heads=1, lens_q=(70, 5), head_dim=128, causal=True),
    case("stacks_of_24", q_block=1, k_block=33, heads_q=24, heads_k=2, mask_heads=2, lens_q=(40, 1, 9)),
    case("alike", pattern="alike", heads_q=8, mask_heads=8, k_block=16, lens_q=(300,), lens_k=(700,), head_dim=128),
    case("windows", causal=True, windows=((0, 0, 5), (-1, -1, 0), (40, 9, 0), (7, -1, 70)), k_block=16),
    case("padded", head_dim=20, layout="padded", causal=True),
    case("odd_strides", layout="odd", lens_q=(90, 90), packed=False),
]
SPECS = [dataclasses.replace(spec, sinks=True) for spec in SPECS]


def by_name(spec: Case) -> str:
    return spec.name


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    """Results and gradients."""
    problem = make_problem(spec, device, dtype)
    judge(problem, *problem.run())
    judge_gradients(problem, differentiate(problem))
    judge_gradients(problem, differentiate(problem, with_lse=False), with_lse=False)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", BACKWARD_METHODS, ids=by_name)
def test_backward_methods(method: Case, deterministic: bool):
    """Every way in which gradients are computed, in both dtypes; those of sinks are the same in every run."""
    for dtype in (torch.bfloat16, torch.float16):
        problem = make_problem(dataclasses.replace(method, causal=True, density=0.9, sinks=True), "cuda", dtype)
        judge(problem, *problem.run())
        mask = problem.mask()
        first = differentiate(problem, mask=mask, deterministic=deterministic)
        judge_gradients(problem, first)
        second = differentiate(problem, mask=mask, deterministic=deterministic)
        assert all(same(x, y) for x, y in zip(first, second, strict=True)) or not deterministic
        assert same(first[3], second[3])


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_random(seed: int, device: str, dtype: torch.dtype):
    spec = cases.random_case(700 + seed, any_block_size=seed % 2 == 0, max_len=200, windowed=seed % 4 == 0)
    spec = dataclasses.replace(spec, scale=None, values="normal", sinks=True)
    problem = make_problem(spec, device, dtype, seed)
    judge(problem, *problem.run())
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_a_sink_is_a_result_of_its_own(device: str, dtype: torch.dtype):
    """Merged with what the keys give: a result of 0 whose log-sum-exp is the sink."""
    problem = make_problem(case("merged", causal=True, sinks=True), device, dtype)
    mask = problem.mask()
    options = {"return_lse": True}
    out, lse = hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, mask, **options)
    of_sinks = problem.sinks[:, None].expand(lse.shape)
    want, want_lse = hbsattn.merge(out, lse, torch.zeros_like(out), of_sinks.to(lse.dtype))
    got, got_lse = problem.run(mask)
    torch.testing.assert_close(got_lse, want_lse, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2 if device == "cuda" else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_what_changes_nothing(device: str, dtype: torch.dtype):
    """Sinks of -inf."""
    problem = make_problem(case("plain", causal=True, pattern="empty_rows"), device, dtype)
    mask = problem.mask()
    none = torch.full((4,), -math.inf, device=device)
    tensors = (problem.q, problem.k, problem.v)
    plain = hbsattn.block_sparse_attention(*tensors, mask, return_lse=True)
    for options in ({"sinks": none}, {"sinks": none.to(torch.bfloat16)}):
        got = hbsattn.block_sparse_attention(*tensors, mask, return_lse=True, **options)
        assert all(same(x, y) for x, y in zip(got, plain, strict=True))
    sinks = none.requires_grad_()
    out, lse = attend(*tensors, mask, sinks=sinks, return_lse=True)
    (grad,) = torch.autograd.grad((out, lse), (sinks,), upstream(problem, lse.detach(), 3))
    assert same(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_gradients_of_sinks_alone(device: str, dtype: torch.dtype):
    """In the dtype of the sinks, whatever it is, and wherever they come from."""
    problem = make_problem(case("alone", causal=True, sinks=True, heads_q=8, mask_heads=2), device, dtype)
    want = differentiate(problem)[3]
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        sinks = problem.sinks.to(kind).requires_grad_()
        out, lse = attend(problem.q, problem.k, problem.v, problem.mask(), sinks=sinks, return_lse=True)
        (grad,) = torch.autograd.grad((out, lse), (sinks,), upstream(problem, lse.detach(), 7))
        assert grad.dtype == kind and grad.shape == sinks.shape
        if kind != torch.bfloat16:
            assert same(grad.float(), want.float())
    one = torch.tensor(1.0, device=device, requires_grad=True)
    out = attend(problem.q, problem.k, problem.v, problem.mask(), sinks=one.expand(8))
    out.float().sum().backward()
    assert one.grad.shape == () and bool(one.grad.isfinite())


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_in_float64(device: str):
    """Finite differences."""
    if device == "cuda":
        pytest.skip("float64 is for the CPU")
    problem = make_problem(
        case("check", lens_q=(9, 5), q_block=4, k_block=3, head_dim=3, density=0.7), "cpu", torch.float64
    )
    mask = problem.mask()
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return hbsattn.block_sparse_attention(q, k, v, mask, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(call, (*leaves(problem), sinks))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_frozen(name: str, device: str, dtype: torch.dtype):
    """One tensor alone asks for its gradient, which is that of all."""
    problem = make_problem(case("frozen", causal=True, sinks=True, q_block=128), device, dtype)
    mask = problem.mask()
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "sinks": problem.sinks}
    tensors[name] = tensors[name].detach().requires_grad_()
    out, lse = attend(mask=mask, return_lse=True, **tensors)
    (grad,) = torch.autograd.grad((out, lse), (tensors[name],), upstream(problem, lse.detach(), 7))
    place = list(tensors).index(name)
    all_grads = list(differentiate(problem, mask=mask))
    all_grads[place] = grad
    judge_gradients(problem, tuple(all_grads))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_hidden_nan(device: str, dtype: torch.dtype):
    """NaN behind the diagonal stays there."""
    spec = case("nan", lens_q=(128,), q_block=128, k_block=128, causal=True, density=1.0, sinks=True)
    problem = make_problem(spec, device, dtype)
    want = problem.run()
    problem.k[100:] = torch.nan
    out, lse = problem.run()
    assert same(out[:100], want[0][:100]) and same(lse[:, :100], want[1][:, :100])
    assert bool(out[100:, 0].isnan().all())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_masks_that_stay_lists(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Chunks of queries have the same sinks."""
    spec = case("lists", q_block=1, k_block=16, lens_q=(90, 40), source="indices", causal=True, sinks=True)
    problem = make_problem(spec, device, dtype)
    plain = problem.run()
    monkeypatch.setattr("hbsattn._chunks.CHUNK_BYTES", 4096)
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)
    mask = problem.mask()
    assert mask._lists is not None
    judge(problem, *problem.run(mask))
    torch.testing.assert_close(problem.run(mask)[1], plain[1])


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str):
    spec = case("compiled", lens_q=(128, 128), packed=False, causal=True, sinks=True)
    problem = make_problem(spec, device, torch.float32 if device == "cpu" else torch.bfloat16)
    mask = problem.mask()
    tensors = leaves(problem)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, mask, sinks=sinks, return_lse=True)

    out, lse = call(*tensors)
    judge(problem, out.detach(), lse.detach())
    judge_gradients(problem, torch.autograd.grad((out, lse), tensors, upstream(problem, lse.detach(), 7)))


@pytest.mark.gpu
def test_a_graph_reads_sinks_anew():
    problem = make_problem(case("graph", causal=True, sinks=True), "cuda", torch.bfloat16)
    mask = problem.mask()
    problem.run(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = problem.run(mask)
    for change in (1.0, -3.0):
        problem.sinks.add_(change)
        graph.replay()
        judge(problem, *results)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_inputs_stay(device: str, dtype: torch.dtype):
    problem = make_problem(case("stay", sinks=True), device, dtype)
    before = [x.clone() for x in (problem.q, problem.k, problem.v, problem.sinks)]
    differentiate(problem)
    after = (problem.q, problem.k, problem.v, problem.sinks)
    assert all(same(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"sinks": 3.0}, TypeError, r"sinks is a float; expected a Tensor"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks has shape \(3,\); expected \(4,\)"),
        ({"sinks": torch.zeros(4, 1)}, ValueError, r"sinks has 2 dimensions"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, r"sinks has dtype torch.int32; expected"),
    ],
)
def test_refused(options: dict[str, object], error: type[Exception], words: str, device: str):
    problem = make_problem(case("refused"), device, torch.float32 if device == "cpu" else torch.bfloat16)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with pytest.raises(error, match=words):
        hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, problem.mask(), **options)


@pytest.mark.gpu
def test_sinks_on_another_device():
    problem = make_problem(case("device"), "cuda", torch.bfloat16)
    with pytest.raises(ValueError, match=r"sinks is on cpu; expected cuda"):
        hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, problem.mask(), sinks=torch.zeros(4))


@pytest.mark.parametrize("device", DEVICES)
def test_no_second_derivative(device: str):
    problem = make_problem(case("twice", sinks=True), device, torch.float32 if device == "cpu" else torch.bfloat16)
    *_, sinks = tensors = leaves(problem)
    out = attend(*tensors[:3], problem.mask(), sinks=sinks)
    (grad,) = torch.autograd.grad(out.float().square().sum(), (sinks,), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_neighbours_of_sinks(device: str, dtype: torch.dtype):
    """One sequence beside others, or alone."""
    spec = case("neighbours", lens_q=(100, 37, 200), sinks=True, causal=True)
    problem = make_problem(spec, device, dtype)
    out, lse = problem.run()
    one = dataclasses.replace(spec, lens_q=(37,))
    rows = slice(100, 137)
    alone = Problem(one, problem.q[rows], problem.k[rows], problem.v[rows], [problem.block_masks[1]], problem.sinks)
    torch.testing.assert_close(alone.run()[0], out[rows])
    torch.testing.assert_close(alone.run()[1], lse[:, rows])


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_rows_of_no_sequence(device: str, dtype: torch.dtype):
    """They have no sink: 0 and -inf, and no part in its gradient."""
    problem = make_problem(case("rows", lens_q=(60, 41), sinks=True), device, dtype)
    q, k, v, sinks = (
        x.detach().requires_grad_() for x in (*(torch.cat([x, x[:9]]) for x in inputs(problem)[:3]), problem.sinks)
    )
    out, lse = attend(q, k, v, problem.mask(), sinks=sinks, return_lse=True)
    assert not out[101:].any() and bool((lse[:, 101:] == -math.inf).all())
    judge(problem, out[:101].detach(), lse[:, :101].detach())
    grads = upstream(problem, lse[:, :101].detach(), 7)
    got = torch.autograd.grad((out[:101], lse[:, :101]), (q, k, v, sinks), grads)
    judge_gradients(problem, (*(x[:101] for x in got[:3]), got[3]))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_sinks_that_are_as_good_as_none(device: str, dtype: torch.dtype):
    """The least numbers there are: no NaN, also of rows without keys."""
    spec = case("least", lens_q=(200,), lens_k=(90,), causal=True, density=1.0, q_block=128)
    problem = make_problem(spec, device, dtype)
    plain = problem.run()
    want = differentiate(problem)
    problem.sinks = torch.full((4,), torch.finfo(torch.float32).min, device=device)
    assert all(same(x, y) for x, y in zip(problem.run(), plain, strict=True))
    *grads, of_sinks = differentiate(problem)
    assert not of_sinks.any()
    for got, like in zip(grads, want, strict=True):
        torch.testing.assert_close(got, like)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_nan_of_a_row_without_a_sink(device: str, dtype: torch.dtype):
    """A weight of 0 silences it for the head without one."""
    problem = make_problem(case("nan_row", sinks=True), device, dtype)
    sinks = problem.sinks.clone().requires_grad_()
    out, lse = attend(problem.q, problem.k, problem.v, problem.mask(), sinks=sinks, return_lse=True)
    grad_out, grad_lse = upstream(problem, lse.detach(), 7)
    grad_out[50] = torch.nan
    (grad,) = torch.autograd.grad((out, lse), (sinks,), (grad_out, grad_lse))
    assert grad.isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_no_batch(device: str, dtype: torch.dtype):
    mask = hbsattn.BlockMask.from_dense(
        torch.ones((1, 4, 1, 1), dtype=torch.bool, device=device), 64, 64, seqlen_q=16, seqlen_k=16, batch_size=0
    )
    q = torch.empty((0, 16, 4, 8), dtype=dtype, device=device, requires_grad=True)
    sinks = torch.zeros(4, device=device, requires_grad=True)
    out = attend(q, q, q, mask, sinks=sinks)
    out.sum().backward()
    assert out.shape == q.shape and not sinks.grad.any()
