"""Gradients against those of the dense formula, on both backends, under poison."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cases
import hbsattn
from cases import Case, case
from gradients import assert_same_gradients, attend, differentiate, judge_gradients, leaves, upstream
from hbsattn._layout import Call
from problems import attended_keys, make_problem, same
from test_key_plan import plan_lines

GPU_DTYPES = [torch.bfloat16, torch.float16]
BAD_FOR_GRADIENTS = ("expanded_heads", "expanded_batch", "qkv")  # views whose gradients are those of other tensors


def by_name(spec: Case) -> str:
    return spec.name


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


# On the CPU every case in float32, and a part of them in the other dtypes, which share its code.
DIFFERENTIABLE = [s for s in cases.CASES if s.layout not in BAD_FOR_GRADIENTS]
OTHER_CPU_DTYPES = [
    pytest.param(spec, "cpu", dtype, id=f"{spec.name}-cpu-{str(dtype).removeprefix('torch.')}")
    for dtype, specs in ((torch.float64, DIFFERENTIABLE[::5]), (torch.bfloat16, DIFFERENTIABLE[2::5]))
    for spec in specs
    if spec.values == "normal"  # scores of 1e4 have no digits left in bfloat16
]


@pytest.mark.slow
@pytest.mark.parametrize("spec,device,dtype", OTHER_CPU_DTYPES)
def test_cases_in_other_dtypes(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    inputs = [x.clone() for x in (problem.q, problem.k, problem.v)]
    judge_gradients(problem, differentiate(problem))
    for before, after in zip(inputs, (problem.q, problem.k, problem.v), strict=True):
        assert same(before, after), "an input was modified"


ADVERSARIAL = [
    case("one_block_for_all", pattern="one_column", lens_q=(300, 100), q_block=16, k_block=64, head_dim=64),
    case("one_block_for_all_wide", pattern="one_column", lens_q=(700,), q_block=128, k_block=128, head_dim=128),
    case("one_query_for_all_blocks", density=1.0, lens_q=(1,), lens_k=(700,), k_block=16),
    case("one_query_block_for_all_blocks", density=1.0, lens_q=(16,), lens_k=(700,), q_block=16, head_dim=128),
    case("padded_tail", lens_q=(192,), lens_k=(192,), q_block=128, k_block=128, values="negative", scale=1.0),
    case("hidden_logits", values="hidden", scale=1.0, causal=True, density=1.0, lens_q=(200,)),
    case("half_the_rows_empty", pattern="empty_rows", q_block=16, k_block=16),
    case("half_the_rows_empty_wide", pattern="empty_rows", q_block=64, k_block=128, head_dim=128, causal=True),
    case("plain_64", lens_q=(512,), q_block=128, k_block=128, head_dim=64, causal=True),
]


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("spec", ADVERSARIAL, ids=by_name)
def test_adversarial(spec: Case, with_lse: bool, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    judge_gradients(problem, differentiate(problem, with_lse=with_lse), with_lse=with_lse)


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_low_log_sum_exp(causal: bool, device: str, dtype: torch.dtype):
    """Logits near -200, whose exponentials are 0 in float32, and lengths that end in the middle of a tile."""
    spec = case("low", lens_q=(192, 65), q_block=128, k_block=128, density=1.0, causal=causal, head_dim=128)
    problem = make_problem(spec, device, dtype)
    problem.q[..., 0], problem.k[..., 0] = 50.0, -200.0 * spec.head_dim**0.5 / 50.0
    _, lse = problem.run()
    assert float(lse.max()) < -88.7
    judge_gradients(problem, differentiate(problem))


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_tiles_in_parts(size: int, causal: bool):
    """One key block that all queries of a group attend to: the work on it is divided, and added up again."""
    spec = case(
        "sink",
        pattern="one_column",
        lens_q=(5000,),
        lens_k=(5000,),
        heads_q=4,
        q_block=size,
        k_block=size,
        causal=causal,
    )
    problem = make_problem(dataclasses.replace(spec, head_dim=size), "cuda", torch.bfloat16)
    mask = problem.mask()
    assert int(plan_lines(problem.case, mask, size)[:, 14].max()) > 1
    first = differentiate(problem, mask=mask)
    judge_gradients(problem, first)
    for _ in range(5):
        again = differentiate(problem, mask=mask)
        assert same(first[1], again[1]) and same(first[2], again[2])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases.block_size_pairs(), ids=by_name)
def test_block_size_pairs(spec: Case):
    problem = make_problem(spec, "cuda", GPU_DTYPES[(spec.q_block // 16 + spec.k_block // 16) % 2])
    judge_gradients(problem, differentiate(problem))


def groups() -> list[Case]:
    """Packed and causal, with heads in groups: the masks' heads, sizes of blocks and head dims take turns."""
    found = []
    for n, (q_block, k_block) in enumerate(
        [(128, 128), (64, 64), (128, 64), (64, 128), (16, 16), (32, 128), (128, 16)]
    ):
        for group in (2, 4, 8):
            spec = case(
                f"group_{group}_blocks_{q_block}x{k_block}",
                lens_q=(2 * q_block + 3, 130, 1, 0, 257),
                lens_k=(2 * k_block + 5, 300, 40, 20, 257),
                heads_q=2 * group,
                heads_k=2,
                mask_heads=(1, 2, 2 * group)[n % 3],
                head_dim=(64, 96, 128)[(n + group) % 3],
                q_block=q_block,
                k_block=k_block,
                causal=True,
                density=0.5,
            )
            found.append(spec)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("spec", groups(), ids=by_name)
def test_groups(spec: Case):
    problem = make_problem(spec, "cuda", GPU_DTYPES[spec.heads_q // 4 % 2])
    judge_gradients(problem, differentiate(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(2000, 2040))
def test_random_on_gpu(seed: int):
    spec = cases.random_case(seed, any_block_size=seed % 3 == 0, max_len=400)
    problem = make_problem(spec, "cuda", GPU_DTYPES[seed % 2], seed=seed)
    try:
        judge_gradients(problem, differentiate(problem))
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {spec}: {error}") from error


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tiles(head_dim: int, causal: bool):
    """More tiles than thread blocks, so that each takes several."""
    spec = case("many", lens_q=(3000, 1111), q_block=64, k_block=64, density=0.3, causal=causal, head_dim=head_dim)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize(
    "spec", [case("rows", pattern="empty_rows", q_block=16), case("none", pattern="none")], ids=by_name
)
def test_what_attends_to_nothing_has_no_gradient(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    grad_q, grad_k, grad_v = differentiate(problem, seed=3)
    _, lse = problem.run()
    assert bool((grad_q.transpose(-2, -3)[lse == -math.inf] == 0).all())
    if spec.pattern == "none":
        assert not grad_k.any() and not grad_v.any()


# Poison

POISONED = [
    case("packed", density=0.2, k_block=16, q_block=64, heads_q=8, mask_heads=8),
    case("packed_group_mask", density=0.3, k_block=48, q_block=16, heads_q=8, mask_heads=2),
    case("causal", density=0.2, k_block=32, q_block=128, causal=True, lens_q=(300, 200), mask_heads=2),
    case("q_longer", density=0.4, k_block=64, q_block=64, causal=True, lens_q=(300, 200), lens_k=(100, 90)),
    case("batched", density=0.2, lens_q=(250, 250), lens_k=(260, 260), packed=False, k_block=128, layout="padded"),
    case("one_column", pattern="one_column", lens_q=(200, 90), head_dim=128),
    case("empty", pattern="none"),
]


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["blocks", "keys"])
@pytest.mark.parametrize("spec", POISONED, ids=by_name)
def test_unattended_keys_stay_outside(spec: Case, where: str, value: float, device: str, dtype: torch.dtype):
    """`blocks`: all keys of blocks that no query attends to; `keys`: also those of active blocks that causality hides
    from every query. Their own gradients are 0."""
    problem = make_problem(spec, device, dtype, seed=5)
    attended = attended_keys(problem, blocks_alone=where == "blocks")
    keep = (torch.cat(attended) if spec.packed else torch.stack(attended)).to(device)
    for x in (problem.k, problem.v):
        x.masked_fill_(~keep[..., None], value)
    got = differentiate(problem)
    judge_gradients(problem, got)
    for grad in got[1:]:
        assert not grad[~keep].any()


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "q_block,k_block,head_dim", [(64, 32, 64), (64, 16, 128), (128, 16, 128), (32, 16, 128), (64, 32, 256)]
)
def test_values_that_others_attend_to(
    q_block: int, k_block: int, head_dim: int, deterministic: bool, value: float, device: str, dtype: torch.dtype
):
    """Key blocks 0 and 1 may share a tile of keys, as blocks 4 and 5 may. Values of block 1 that are not finite are
    loaded, for the last query block alone. Queries of the first two attend to block 0, not to 1: their results and
    gradients, and those of block 4, to which nobody else attends, are what they are with finite values.
    """
    blocks = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    blocks[..., 0] = blocks[..., :2, 4] = blocks[..., 3, 1] = True
    mask = hbsattn.BlockMask.from_dense(blocks.to(device), q_block, k_block)
    generator = torch.Generator().manual_seed(11)
    sizes = (4 * q_block, 8 * k_block, 8 * k_block, 4 * q_block)
    q, k, v, grad = (torch.randn(1, n, 2, head_dim, generator=generator).to(device, dtype) for n in sizes)
    queries, keys = slice(0, 2 * q_block), slice(4 * k_block, 5 * k_block)
    results = []
    for of_block in (None, value):
        if of_block is not None:
            v[:, k_block : 2 * k_block] = of_block
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, mask, deterministic=deterministic)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, grad)
        assert bool(out[:, 3 * q_block :].isfinite().all()) == (of_block is None)
        results.append((out[:, queries], grad_q[:, queries], grad_k[:, keys], grad_v[:, keys]))
    for name, want, got in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("q_block,k_block", [(16, 16), (48, 48), (128, 128), (128, 16), (128, 24), (32, 16)])
def test_neighbours_stay_outside(
    q_block: int, k_block: int, packed: bool, causal: bool, device: str, dtype: torch.dtype
):
    """A sequence of NaN between two others, whose last blocks reach into it and whose first follow it."""
    lens = (75, 61, 70, 64) if packed else (75,) * 4
    heads = {"heads_q": 4, "heads_k": 1, "mask_heads": 1} if q_block == 32 else {}  # which fill a tile together
    blocks = {"q_block": q_block, "k_block": k_block, "density": 1.0}
    spec = case("neighbours", lens_q=lens, packed=packed, causal=causal, **blocks, **heads)
    problem = make_problem(spec, device, dtype)
    clean = differentiate(problem)
    poisoned = slice(lens[0], lens[0] + lens[1]) if packed else slice(1, 2)
    for x in (problem.q, problem.k, problem.v):
        x[poisoned] = math.nan
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask(), return_lse=True)
    grads = upstream(problem, out[1].detach(), 7)
    grads[0][poisoned] = math.nan
    got = torch.autograd.grad(out, (q, k, v), grads)
    keep = torch.ones(problem.q.shape[0], dtype=torch.bool)
    keep[poisoned] = False
    assert_same_gradients([x[keep] for x in got], [x[keep] for x in clean], spec)


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("k_block", [16, 128])
@pytest.mark.parametrize("head_dim", [24, 40, 72, 112, 160])
def test_other_heads_stay_outside(head_dim: int, k_block: int, device: str, dtype: torch.dtype):
    """A head of NaN between two others, whose rows lie right before and behind theirs."""
    heads = {"heads_q": 3, "heads_k": 3, "mask_heads": 3}
    spec = case("heads", head_dim=head_dim, q_block=128, k_block=k_block, density=1.0, **heads)
    problem = make_problem(spec, device, dtype)
    clean = differentiate(problem)
    for x in (problem.q, problem.k, problem.v):
        x[:, 1] = math.nan
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask(), return_lse=True)
    grads = upstream(problem, out[1].detach(), 7)
    grads[0][:, 1] = math.nan
    got = torch.autograd.grad(out, (q, k, v), grads)
    assert_same_gradients([x[:, ::2] for x in got], [x[:, ::2] for x in clean], spec)


# What autograd brings


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
@pytest.mark.parametrize("layout", ["sum", "expanded_rows", "heads_first", "transposed", "odd", "offset"])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_layouts_of_output_gradients(head_dim: int, layout: str, device: str, dtype: torch.dtype):
    problem = make_problem(case("layouts", causal=True, head_dim=head_dim), device, dtype)
    q, k, v = leaves(problem)
    out, lse = attend(q, k, v, problem.mask(), return_lse=True)
    dense, dense_lse = upstream(problem, lse.detach(), 3)
    finite = lse.detach() > -math.inf
    if layout == "sum":
        dense, dense_lse = torch.ones_like(dense), finite.to(lse.dtype)
        grad, grad_lse = torch.ones((), dtype=dtype, device=device).expand(dense.shape), dense_lse
    elif layout == "expanded_rows":
        grad = dense[:1].expand(dense.shape)
        grad_lse = dense_lse
    elif layout == "heads_first":
        grad, grad_lse = dense.transpose(0, 1).contiguous().transpose(0, 1), dense_lse.T.contiguous().T
    elif layout == "transposed":
        grad, grad_lse = dense.transpose(1, 2).contiguous().transpose(1, 2), dense_lse.T.contiguous().T
    elif layout == "odd":
        grad = torch.nn.functional.pad(dense, (0, 1), value=math.nan)[..., :-1]
        grad_lse = torch.nn.functional.pad(dense_lse, (0, 1), value=math.nan)[..., :-1]
    else:
        grad, grad_lse = (
            torch.nn.functional.pad(x.flatten(), (1, 0), value=math.nan)[1:].view(x.shape) for x in (dense, dense_lse)
        )
    got = torch.autograd.grad((out, lse), (q, k, v), (grad, grad_lse), retain_graph=True)
    want = torch.autograd.grad((out, lse), (q, k, v), (grad.contiguous(), grad_lse.contiguous()))
    assert_same_gradients(got, want, problem.case)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_sum_of_outputs(device: str):
    """The gradient of a sum has no strides at all."""
    problem = make_problem(case("sum", causal=True), device, dtype_of(device))
    q, k, v = leaves(problem)
    mask = problem.mask()
    got = torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))
    want = torch.autograd.grad(attend(q, k, v, mask), (q, k, v), torch.ones_like(q))
    assert_same_gradients(got, want, problem.case)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_views_of_one_tensor(device: str):
    """Gradients of q, k and v that are views, or expanded: they add up in the tensor behind."""
    for layout in ("qkv", "expanded_heads"):
        spec = case("views", layout=layout, heads_q=2, heads_k=2, mask_heads=2, causal=True)
        problem = make_problem(spec, device, dtype_of(device))
        base = torch.cat([problem.q, problem.k, problem.v], dim=-2).detach().requires_grad_()
        q, k, v = base.split(2, dim=-2)
        if layout == "expanded_heads":
            k, v = (x[:, :1].expand(x.shape) for x in (k, v))
        attend(q, k, v, problem.mask()).float().square().sum().backward()
        want = differentiate_copies(problem, q, k, v)
        if layout == "expanded_heads":
            want = (want[0], *(torch.stack([x.sum(1), torch.zeros_like(x[:, 0])], 1) for x in want[1:]))
        torch.testing.assert_close(base.grad, torch.cat(want, dim=-2))


def differentiate_copies(problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attend(*copies, problem.mask()).float().square().sum(), copies)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_only_some_outputs_are_used(device: str):
    """What is not used has no gradient; nobody makes zeros for that of the log-sum-exp."""
    problem = make_problem(case("outputs", causal=True), device, dtype_of(device))
    q, k, v = leaves(problem)
    outputs = attend(q, k, v, problem.mask(), return_lse=True)
    grads = upstream(problem, outputs[1].detach(), 5)
    has_grad_lse = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.hbsattn.backward.default:
                has_grad_lse.append(args[len(Call._fields) + 1] is not None)
            return func(*args, **(kwargs or {}))

    with Watch():
        for used in (0, 1):
            got = torch.autograd.grad(outputs[used], (q, k, v), grads[used], retain_graph=True)
            both = [grad if i == used else torch.zeros_like(grad) for i, grad in enumerate(grads)]
            want = torch.autograd.grad(outputs, (q, k, v), both, retain_graph=True)
            assert_same_gradients(got, want, problem.case)
    assert has_grad_lse == [False, True, True, True]


@pytest.mark.parametrize("device", cases.DEVICES)
def test_only_some_inputs_need_gradients(device: str):
    problem = make_problem(case("some"), device, dtype_of(device))
    k = problem.k.requires_grad_()
    attend(problem.q, k, problem.v, problem.mask()).sum().backward()
    assert k.grad is not None and problem.q.grad is None


@pytest.mark.parametrize("device", cases.DEVICES)
def test_no_batch(device: str):
    mask = hbsattn.BlockMask.from_dense(
        torch.zeros((0, 1, 2, 3), dtype=torch.bool, device=device), 64, 32, seqlen_q=100, seqlen_k=70
    )
    q = torch.randn((0, 100, 4, 64), device=device, dtype=dtype_of(device), requires_grad=True)
    k = torch.randn((0, 70, 2, 64), device=device, dtype=dtype_of(device), requires_grad=True)
    attend(q, k, k, mask).sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradcheck(group: int, causal: bool):
    spec = case("check", lens_q=(7, 5), lens_k=(6, 9), q_block=3, k_block=2, head_dim=4, causal=causal, density=0.6)
    spec = dataclasses.replace(spec, heads_q=2 * group, heads_k=2, mask_heads=2 * group)
    problem = make_problem(spec, "cpu", torch.float64)
    mask = problem.mask()
    empty = problem.run()[1] == -math.inf

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)
        return out, lse.masked_fill(empty, 0.0)

    assert torch.autograd.gradcheck(call, leaves(problem))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_second_derivative_is_refused(device: str):
    problem = make_problem(case("second"), device, dtype_of(device))
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask())
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


# Repeatability


@pytest.mark.parametrize("device,dtype", cases.DEVICE_DTYPES)
def test_repeatable(device: str, dtype: torch.dtype):
    """Gradients of k and v are, unless sets of heads share keys; that of q, by queries; on the CPU all of them."""
    for q_block in (16, 128):
        spec = case("many", lens_q=(400, 333), density=0.8, q_block=q_block, k_block=16)
        problem = make_problem(spec, device, dtype)
        mask = problem.mask()
        first = differentiate(problem, mask=mask)
        for _ in range(20 if device == "cuda" else 5):
            assert_same_gradients(differentiate(problem, mask=mask), first, spec)


def test_deterministic_on_cpu():
    problem = make_problem(case("deterministic"), "cpu", torch.float32)
    want = differentiate(problem)
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask(), return_lse=True, deterministic=True)
    grads = upstream(problem, out[1].detach(), 7)
    assert_same_gradients(torch.autograd.grad(out, (q, k, v), grads), want, problem.case)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(DIFFERENTIABLE)), ids=lambda n: DIFFERENTIABLE[n].name)
def test_deterministic_on_gpu(number: int):
    """The dtypes take turns."""
    problem = make_problem(DIFFERENTIABLE[number], "cuda", GPU_DTYPES[number % 2])
    mask = problem.mask()
    first = differentiate(problem, mask=mask, deterministic=True)
    judge_gradients(problem, first)
    for _ in range(3):
        again = differentiate(problem, mask=mask, deterministic=True)
        assert all(same(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
def test_deterministic_in_a_thousand_runs():
    spec = case(
        "thousand", lens_q=(1000, 700), heads_q=8, heads_k=4, head_dim=128, q_block=128, k_block=128, causal=True
    )
    problem = make_problem(spec, "cuda", torch.bfloat16)
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask(), deterministic=True)
    grad_out = torch.randn_like(out)
    first = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
    for _ in range(1000):
        again = torch.autograd.grad(out, (q, k, v), grad_out, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
def test_deterministic_everywhere():
    problem = make_problem(case("deterministic"), "cuda", torch.bfloat16)
    want = differentiate(problem, with_lse=False, deterministic=True)
    q, k, v = leaves(problem)
    assert torch.are_deterministic_algorithms_enabled()
    out, lse = hbsattn.block_sparse_attention(q, k, v, problem.mask(), return_lse=True)
    got = torch.autograd.grad((out,), (q, k, v), upstream(problem, lse.detach(), 7)[:1])
    assert all(same(x, y) for x, y in zip(got, want, strict=True))


# The plan of the backward pass


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("q_block,k_block", [(64, 64), (128, 16), (192, 64)])
def test_plan_is_made_once(q_block: int, k_block: int, deterministic: bool):
    """By the first call with gradients, for all calls of a kind, those of a checkpoint too."""
    problem = make_problem(case("once", causal=True, q_block=q_block, k_block=k_block), "cuda", torch.bfloat16)
    mask = problem.mask()
    q, k, v = leaves(problem)
    planned = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.hbsattn.plan_backward.default:
                planned.append(func)
            return func(*args, **(kwargs or {}))

    def call(*inputs: Tensor) -> Tensor:
        return attend(*inputs, mask, deterministic=deterministic)

    with Watch():
        with torch.no_grad():
            call(q, k, v)
        assert not planned
        for _ in range(2):
            call(q, k, v).sum().backward()
        checkpoint(call, q, k, v, use_reentrant=False).sum().backward()
    assert len(planned) == 1


# Streams, graphs, compilation


@pytest.mark.gpu
def test_no_synchronization():
    problem = make_problem(case("no_sync", lens_q=(500, 333), causal=True), "cuda", torch.bfloat16)
    differentiate(problem)
    mask = problem.mask()
    q, k, v = leaves(problem)
    grad = torch.ones_like(q)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            torch.autograd.grad(attend(q, k, v, mask), (q, k, v), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("k_block", [64, 32])
def test_two_streams_share_a_mask(k_block: int):
    spec = case("streams", lens_q=(1500, 1000, 100), q_block=128, k_block=k_block, causal=True)
    problems = [make_problem(spec, "cuda", torch.bfloat16, seed=s) for s in (0, 1)]
    problems[1].block_masks = problems[0].block_masks
    mask = problems[0].mask()
    expected = [differentiate(p, mask=p.mask()) for p in problems]
    inputs = [leaves(p) for p in problems]
    grads = [upstream(p, p.run(mask)[1], 7) for p in problems]
    mask = problems[0].mask()  # without plans
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                out = attend(*inputs[i], mask, return_lse=True)
                results[i].append(torch.autograd.grad(out, inputs[i], grads[i]))
    torch.cuda.synchronize()
    for i, runs in enumerate(results):
        for got in runs:
            assert_same_gradients(got, expected[i], spec)


@pytest.mark.gpu
def test_stream_order():
    """Backward runs on the stream of the forward, after what was queued there."""
    problem = make_problem(case("stream", lens_q=(500, 333)), "cuda", torch.bfloat16)
    expected = differentiate(problem)
    q, k, v = leaves(problem)
    mask = problem.mask()
    grads = upstream(problem, problem.run(mask)[1], 7)
    late = [torch.zeros_like(x) for x in grads]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = attend(q, k, v, mask, return_lse=True)
        torch.cuda._sleep(20_000_000)
        for target, value in zip(late, grads, strict=True):
            target.copy_(value)
        got = torch.autograd.grad(out, (q, k, v), late)
    stream.synchronize()
    assert_same_gradients(got, expected, problem.case)


@pytest.mark.gpu
@pytest.mark.parametrize("when", ["planned", "packed", "captured"])
def test_graph_replay(when: str):
    """Forward and backward in one graph, for a mask that was used before, that was only packed before, or that the
    graph packs."""
    spec = case("graph", lens_q=(300, 130), heads_q=8, mask_heads=2, q_block=32, k_block=48, causal=True)
    problem, other = (make_problem(spec, "cuda", torch.bfloat16, seed=s) for s in (0, 9))
    other.block_masks = problem.block_masks
    mask = problem.mask()
    lens = torch.tensor([0, 300, 430], dtype=torch.int32, device="cuda")
    block_mask = torch.cat([torch.nn.functional.pad(m, (0, 7 - m.shape[2])) for m in problem.block_masks], 1)
    padded = torch.zeros((2, 2, 10, 7), dtype=torch.bool, device="cuda")
    padded[0], padded[1, :, :5] = block_mask[:, :10], block_mask[:, 10:]
    static = [x.detach().clone().requires_grad_() for x in leaves(problem)]
    static_grads = [x.clone() for x in upstream(problem, problem.run(mask)[1], 7)]
    mask = problem.mask()  # without plans

    def call() -> tuple[Tensor, ...]:
        used = mask
        if when == "captured":
            used = hbsattn.BlockMask.from_dense(padded, 32, 48, cu_seqlens_q=lens, cu_seqlens_k=lens, causal=True)
        return torch.autograd.grad(attend(*static, used, return_lse=True), static, static_grads)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        if when == "planned":
            call()
        else:  # autograd wants a warm-up, with any mask
            torch.autograd.grad(attend(*static, problem.mask(), return_lse=True), static, static_grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for p in (problem, other) * 4:
        with torch.no_grad():
            for target, value in zip(static, (p.q, p.k, p.v), strict=True):
                target.copy_(value)
        for target, value in zip(static_grads, upstream(p, p.run(mask)[1], 7), strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        judge_gradients(p, got)
    # Outside the graph the mask still works, whatever was cached on it during capture.
    judge_gradients(problem, differentiate(problem, mask=mask))


# Inductor's first C++ compilation alone takes a minute, so on the CPU the tracer must do; on CUDA it takes seconds, and
# meets each way of the backward once.
METHODS = [(64, 64, False), (128, 16, False), (192, 64, True)]
COMPILED = [
    pytest.param(*method, device, "aot_eager", dynamic, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for method in METHODS
    for device in ("cpu", "cuda")
    for dynamic in (False, True)
]
COMPILED += [
    pytest.param(*method, "cuda", "inductor", number % 2 == 1, marks=[pytest.mark.gpu, pytest.mark.slow])
    for number, method in enumerate(METHODS)
]


@pytest.mark.parametrize("q_block,k_block,deterministic,device,backend,dynamic", COMPILED)
def test_compiled(q_block: int, k_block: int, deterministic: bool, device: str, backend: str, dynamic: bool):
    torch._dynamo.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: hbsattn.BlockMask) -> Tensor:
        return hbsattn.block_sparse_attention(q, k, v, mask, deterministic=deterministic).square().sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic)
    for lens in ((100, 37, 200), (64, 130, 11)):
        spec = case("compiled", lens_q=lens, causal=True, q_block=q_block, k_block=k_block)
        problem = make_problem(spec, device, dtype_of(device))
        mask = problem.mask()
        inputs = leaves(problem)
        torch.use_deterministic_algorithms(False)
        want = torch.autograd.grad(loss(*inputs, mask), inputs)
        got = torch.autograd.grad(compiled(*inputs, mask), inputs)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b)
