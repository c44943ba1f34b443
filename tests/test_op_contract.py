"""The ops as PyTorch sees them: schemas, fake kernels, tracing, compilation, export, autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import cases
import hbsattn
from cases import DEVICE_DTYPES, Case, case
from plans import call_of, layout_of, plan_backward, plan_items
from problems import (
    Problem,
    block_lists,
    block_masks,
    build_mask,
    csr_lists,
    cu_seqlens,
    dense_mask,
    judge,
    local_rows,
    make_problem,
    same,
)

ops = torch.ops.hbsattn
OPS = (
    "make_sequences",
    "make_dense",
    "pack_dense",
    "pack_indices",
    "pack_csr",
    "forward",
    "check_forward",
    "check_mask",
)
CUDA_OPS = ("plan_items", "plan_backward", "plan_and_forward")
BACKWARD_OPS = ("check_backward", "backward")

SPECS = [
    case("packed", q_block=48, k_block=16, causal=True, heads_q=8, mask_heads=2, windows=((30, 0, 9), (-1, -1, 0))),
    case("sinks", q_block=16, causal=True, sinks=True),
    case("dropout", q_block=48, k_block=16, causal=True, dropout_p=0.3),
    case("softcap", q_block=48, causal=True, softcap=3.0),
    case("batched", lens_q=(90, 90), lens_k=(70, 70), packed=False),
    case("empty", pattern="none"),
    case("zero_length", lens_q=(0, 70, 50), lens_k=(40, 0, 90)),
    case("sets_of_heads", lens_q=(70, 30), heads_q=8, heads_k=1, mask_heads=1, q_block=8192),
]


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def op_arguments(name: str, spec: Case, device: str) -> tuple[Any, ...]:
    problem = make_problem(spec, device, dtype_of(device))
    mask = problem.mask()
    sizes = (spec.q_block, spec.k_block)
    table = (mask.rows, *layout_of(mask)[:3], spec.causal)
    if name == "make_sequences":
        if not spec.packed:
            return (None, None, torch.device(device), 2, spec.lens_q[0], spec.keys[0], spec.blocks(0)[0], *sizes)
        lens = (cu_seqlens(spec.lens_q, device), cu_seqlens(spec.keys, device))
        return (*lens, torch.device(device), len(spec.lens_q), 0, 0, -1, *sizes)
    if name == "make_dense":
        lens = (cu_seqlens(spec.lens_q, device), cu_seqlens(spec.keys, device)) if spec.packed else (None, None)
        seqlens = (0, 0) if spec.packed else (spec.lens_q[0], spec.keys[0])
        stride = -1 if spec.mask_form == "flat" else spec.blocks(0)[0]
        dense = dense_mask(spec, problem.block_masks, spec.mask_form).to(device)
        return (dense, *lens, len(spec.lens_q), *seqlens, stride, *table)
    flat = spec.mask_form == "flat"
    if name == "pack_dense":
        return (dense_mask(spec, problem.block_masks, spec.mask_form).to(device), mask.sequences, flat, *table)
    if name == "pack_indices":
        lists = local_rows(spec, problem.block_masks)
        lists = lists if flat else dense_mask(spec, problem.block_masks, "batched")
        return (*(x.to(device) for x in block_lists(lists, 0)), mask.sequences, flat, *table)
    if name == "pack_csr":
        lists = csr_lists(local_rows(spec, problem.block_masks), 0)
        return (*(x.to(device) for x in lists), mask.sequences, *table)
    if name == "check_mask":
        return (mask.batch, mask.heads, *table)
    shape = (spec.heads_q, spec.heads_k, spec.head_dim, problem.q.element_size(), True)
    tables = (mask.bits, mask.sequences, mask._rules, layout_of(mask))
    altered = spec.dropout_p > 0 or spec.softcap > 0
    if name == "plan_items":
        return (*tables, shape, altered)
    if name == "plan_backward":
        return (*tables, shape, problem.k.shape[-3], spec.packed, spec.causal, (True, True, True), altered)
    numbers = {"dropout_seed": problem.dropout_seed, "dropout_p": spec.dropout_p, "softcap": spec.softcap}
    call = call_of(problem.q, problem.k, problem.v, mask, sinks=problem.sinks, **numbers)
    if name in ("check_forward", "plan_and_forward"):
        return call
    plans = (None, None)
    if device == "cuda":
        plan = plan_backward(mask, *shape, rows_k=problem.k.shape[-3], altered=altered)
        plans = (plan_items(mask, *shape, for_backward=altered), plan)
    return (*call, *plans)


def backward_arguments(spec: Case, device: str) -> tuple[Any, ...]:
    arguments = op_arguments("forward", spec, device)
    *call, _, plan = arguments
    out, lse = ops.forward(*arguments)
    return (*call, torch.ones_like(out), torch.zeros_like(lse), out, lse, plan, False, [True, True, True, spec.sinks])


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, spec: Case, device: str):
    torch.library.opcheck(getattr(ops, name).default, op_arguments(name, spec, device))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_opcheck_with_gradients(device: str):
    q, k, v, *rest = op_arguments("forward", SPECS[0], device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.forward.default, (*leaves, *rest))  # traces the backward, too


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_opcheck_backward(spec: Case, device: str):
    *call, grad_out, grad_lse, out, lse, plan, deterministic, needs = backward_arguments(spec, device)
    for grad in (grad_lse, None):
        arguments = (*call, grad_out, grad, out, lse, plan, deterministic, needs)
        torch.library.opcheck(ops.backward.default, arguments)
    torch.library.opcheck(ops.check_backward.default, (*call, grad_out, grad_lse, out, lse))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (False, False, True), (False,) * 3])
@pytest.mark.parametrize("needs_sinks", [False, True])
def test_gradients_that_nobody_needs(needs: tuple[bool, bool, bool], needs_sinks: bool, device: str):
    """They are empty, and those of sinks are what they are when all are needed."""
    spec = case("needs", causal=True, lens_k=(90, 40, 500), sinks=True)
    *arguments, _ = backward_arguments(spec, device)
    of_all = ops.backward(*arguments, [True] * 4)
    if device == "cuda":
        mask = make_problem(spec, device, dtype_of(device)).mask()
        shape = (spec.heads_q, spec.heads_k, spec.head_dim, 2, True)
        arguments[PLAN] = plan_backward(mask, *shape, rows_k=arguments[1].shape[-3], needs=needs)
        if not any(needs):
            arguments[PLAN] = None
    grads = ops.backward(*arguments, [*needs, needs_sinks])
    for grad, like, needed in zip(grads, of_all, (*needs, needs_sinks), strict=True):
        assert grad.shape == (like.shape if needed else (0,))
    assert not needs_sinks or same(grads[3], of_all[3])


# What `backward` takes behind the call, by position.
GRAD_OUT, GRAD_LSE, OUT, LSE, PLAN = range(17, 22)
SINKS, DROPOUT_SEED, LAYOUT, _, SCALE, DROPOUT_P, SOFTCAP = range(9, 16)
ITEMS = 17  # of `forward`

# Position among the arguments, what becomes of it, and what the message says.
BACKWARD_ERRORS: dict[str, tuple[int, Any, str]] = {
    "grad_out_shape": (GRAD_OUT, lambda x: x[1:], r"grad_out has shape .*; expected"),
    "grad_out_dtype": (GRAD_OUT, lambda x: x.half(), r"grad_out has dtype float16; expected \w+, that of q"),
    "grad_lse_dtype": (GRAD_LSE, lambda x: x.double(), r"grad_lse has dtype float64; expected float32"),
    "grad_lse_shape": (GRAD_LSE, lambda x: x.T, r"grad_lse has shape .*; expected"),
    "out_shape": (OUT, lambda x: x[1:], r"out has shape .*; expected"),
    "lse_shape": (LSE, lambda x: x.T, r"lse has shape .*; expected"),
    "softmax_scale": (SCALE, lambda _: math.nan, r"softmax_scale is nan; expected"),
    "layout": (LAYOUT, lambda x: x[1:], r"layout has 4 numbers; expected 5"),
    "sinks_shape": (SINKS, lambda x: x[1:], r"sinks has shape \[3\]; expected \[4\]"),
    "sinks_dtype": (SINKS, lambda x: x.half(), r"sinks has dtype float16; expected float32"),
    "sinks_strides": (SINKS, lambda x: x[:1].expand(4), r"sinks is not contiguous"),
    "dropout_seed": (DROPOUT_SEED, lambda _: None, r"dropout_seed is None and dropout_p is 0.3"),
    "dropout_seed_shape": (DROPOUT_SEED, lambda x: x[1:], r"dropout_seed has shape \[1\]; expected \[2\]"),
    "dropout_seed_dtype": (DROPOUT_SEED, lambda x: x.int(), r"dropout_seed has dtype int32; expected int64"),
    "dropout_seed_strides": (DROPOUT_SEED, lambda x: x[:1].expand(2), r"dropout_seed is not contiguous"),
    "dropout_p_nan": (DROPOUT_P, lambda _: math.nan, r"dropout_p is nan; expected a number from 0 to below 1"),
    "softcap_nan": (SOFTCAP, lambda _: math.nan, r"softcap is nan; expected 0, or a number from 0.01 to 1e6"),
    "softcap_of_no_float": (SOFTCAP, lambda _: 1e-50, r"softcap is 1e-50; expected 0, or a number from 0.01 to 1e6"),
    "softcap_below_0": (SOFTCAP, lambda _: -1.0, r"softcap is -1(\.0*)?; expected 0, or a number from 0.01 to 1e6"),
    "dropout_p_of_all": (DROPOUT_P, lambda _: 1.0, r"dropout_p is 1(\.0*)?; expected a number from 0 to below 1"),
}
PLAN_ERRORS: dict[str, tuple[int, Any, str]] = {
    "grad_out_device": (GRAD_OUT, lambda x: x.cpu(), r"grad_out is on cpu; expected cuda"),
    "plan_length": (PLAN, lambda x: x[16:], r"plan has shape .*; expected"),
    "plan_rank": (PLAN, lambda x: x.view(-1, 16), r"plan has 2 dimensions"),
    "sinks_device": (SINKS, lambda x: x.cpu(), r"sinks is on cpu; expected cuda"),
    "dropout_seed_device": (DROPOUT_SEED, lambda x: x.cpu(), r"dropout_seed is on cpu; expected cuda"),
    "no_plan": (PLAN, lambda _: None, r"plan is None; expected what plan_backward makes"),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", [*BACKWARD_ERRORS, *PLAN_ERRORS])
def test_backward_refuses(name: str, device: str):
    if name in PLAN_ERRORS and device == "cpu":
        pytest.skip("a CPU has no plans")
    position, change, message = {**BACKWARD_ERRORS, **PLAN_ERRORS}[name]
    spec = case("refused", lens_k=(90, 40, 500), k_block=16, sinks=True, dropout_p=0.3)
    arguments = list(backward_arguments(spec, device))
    arguments[position] = change(arguments[position])
    with pytest.raises((ValueError, TypeError), match=message):
        ops.backward(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", CUDA_OPS)
def test_opcheck_plan(name: str, spec: Case):
    torch.library.opcheck(getattr(ops, name).default, op_arguments(name, spec, "cuda"))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_make_dense(spec: Case, device: str):
    """What the two ops give that it stands for."""
    bits, sequences = ops.make_dense(*op_arguments("make_dense", spec, device))
    assert same(sequences, ops.make_sequences(*op_arguments("make_sequences", spec, device)))
    dense, _, *rest = op_arguments("pack_dense", spec, device)
    assert same(bits, ops.pack_dense(dense, sequences, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_plan_and_forward(spec: Case, inference: bool):
    """What the two ops give that it stands for. The list is a normal tensor: later calls rewrite it in any mode."""
    tensors = op_arguments("plan_and_forward", spec, "cuda")
    plain = op_arguments("forward", spec, "cuda")
    with torch.inference_mode(inference):
        out, lse, items = ops.plan_and_forward(*tensors)
        want = ops.forward(*plain)
    assert same(out, want[0]) and same(lse, want[1]) and not items.is_inference()
    assert items.shape == plain[ITEMS].shape


@pytest.mark.gpu
def test_plan_and_forward_has_no_derivative():
    q, *rest = op_arguments("plan_and_forward", SPECS[0], "cuda")
    with pytest.raises(NotImplementedError, match=r"plan_and_forward has no derivative; expected hbsattn::forward"):
        ops.plan_and_forward(q.requires_grad_(), *rest)


@pytest.mark.parametrize("name", [*OPS, *CUDA_OPS, *BACKWARD_OPS])
def test_arguments_are_tensors_and_constants(name: str):
    schema = getattr(ops, name).default._schema
    kinds = {str(argument.type) for argument in schema.arguments}
    assert kinds <= {"Tensor", "Optional[Tensor]", "int", "bool", "float", "Device", "List[int]", "List[bool]"}
    assert not schema.is_mutable
    assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_outputs_are_fresh(device: str, dtype: torch.dtype):
    """Contiguous outputs, whatever the inputs' layout, in memory of their own."""
    problem = make_problem(case("fresh", layout="heads_first"), device, dtype)
    out, lse = problem.run()
    assert out.is_contiguous() and lse.is_contiguous()
    storages = {x.untyped_storage().data_ptr() for x in (problem.q, problem.k, problem.v)}
    assert out.untyped_storage().data_ptr() not in storages


# Inductor's first C++ compilation alone takes a minute, so on the CPU the tracers must do.
@pytest.mark.parametrize(
    "device,backend",
    [
        ("cpu", "aot_eager"),
        pytest.param("cuda", "aot_eager", marks=pytest.mark.gpu),
        pytest.param("cuda", "inductor", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device: str, dynamic: bool, backend: str):
    """One graph, for a mask made before and, with new lengths, without recompiling into another result."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def attend(q, k, v, mask):
        return hbsattn.block_sparse_attention(q * 1.0, k, v, mask, return_lse=True)

    for lens in ((100, 37, 200), (64, 130, 11)):
        problem = make_problem(case("compile", lens_q=lens, causal=True), device, dtype_of(device))
        mask = problem.mask()
        out, lse = attend(problem.q, problem.k, problem.v, mask)
        judge(problem, out, lse)
        # The plan was not left behind by the tracer.
        judge(problem, *problem.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("trains", [False, True])
def test_one_graph_for_all_lengths(device: str, trains: bool):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(q, k, v, mask):
        return hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (700, 1300, 517, 900):
            problem = make_problem(case("lengths", lens_q=(n, 37, 20), causal=True), device, dtype_of(device))
            inputs = [x.requires_grad_(trains) for x in (problem.q, problem.k, problem.v)]
            out, lse = attend(*inputs, problem.mask())
            judge(problem, out.detach(), lse.detach())
            if trains:
                torch.autograd.grad(out.sum(), inputs)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_compile_the_mask_too(device: str):
    torch._dynamo.reset()
    problem = make_problem(case("compile", causal=True), device, dtype_of(device))
    lens = cu_seqlens(problem.case.lens_q, device)
    block_mask = dense_mask(problem.case, problem.block_masks, "flat").to(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v, block_mask, lens):
        mask = hbsattn.BlockMask.from_dense(block_mask, 64, 64, cu_seqlens_q=lens, cu_seqlens_k=lens, causal=True)
        return hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)

    out, lse = attend(problem.q, problem.k, problem.v, block_mask, lens)
    judge(problem, out, lse)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_of_a_traced_new_mask(dropout_p: float, trains: bool):
    """For CUDA, also where there is none: fake tensors can be on any device. Lengths are symbols of one graph."""
    traced = []

    def attend(q: torch.Tensor, block_mask: torch.Tensor) -> torch.Tensor:
        mask = hbsattn.BlockMask.from_dense(block_mask, 64, 64, causal=True)
        return hbsattn.block_sparse_attention(q, q[:, :, :2], q[:, :, :2], mask, dropout_p=dropout_p)

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        traced.append([node.target for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "hbsattn"])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        for n in (256, 512, 1024):
            q = torch.empty(1, n, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=trains)
            block_mask = torch.empty(1, 2, n // 64, n // 64, device="cuda", dtype=torch.bool)
            out = compiled(q, block_mask)
            assert out.shape == q.shape and out.device == q.device and out.dtype == q.dtype
    # Planning is an op of its own, so that the equal plans of several layers become one.
    call = [ops.check_forward, ops.plan_items, *([ops.plan_backward] if trains else []), ops.forward]
    assert traced == [[op.default for op in (ops.make_dense, *call)]]


@pytest.mark.parametrize("device", cases.DEVICES)
def test_export(device: str):
    problem = make_problem(case("export", causal=True), device, dtype_of(device))
    mask = problem.mask()

    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)

    inputs = (problem.q, problem.k, problem.v)
    program = torch.export.export(Attend(), inputs)
    judge(problem, *program.module()(*inputs))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_gradients_are_fresh(device: str):
    """Contiguous gradients, whatever the inputs' layout, in memory of their own."""
    problem = make_problem(case("fresh", layout="heads_first", sinks=True), device, dtype_of(device))
    arguments = list(backward_arguments(problem.case, device))
    arguments[:3] = problem.q, problem.k, problem.v
    grads = ops.backward(*arguments)
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *grads)}
    assert all(x.is_contiguous() for x in grads)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == 4
    inputs = {x.untyped_storage().data_ptr() for x in tensors}
    assert len(storages) == len(inputs) + 4


@pytest.mark.parametrize("device", cases.DEVICES)
def test_inference_modes(device: str):
    problem = make_problem(case("modes"), device, dtype_of(device))
    expected = problem.run()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, lse = problem.run()
        assert same(out, expected[0]) and same(lse, expected[1])


@pytest.mark.gpu
def test_profile():
    """The SM clock at the start and end of each CTA comes beside the same results."""
    *call, items, _ = op_arguments("forward", SPECS[0], "cuda")
    plain = ops.forward(*call, items, None)
    *profiled, cycles = ops.profile_forward(*call, items)
    assert same(plain[0], profiled[0]) and same(plain[1], profiled[1])
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert cycles.shape == (2 * processors, 2) and cycles.dtype == torch.int64
    used = cycles[cycles[:, 1] > 0]
    assert used.shape[0] > 0 and bool((used[:, 1] > used[:, 0]).all())


# The doors of the Triton predecessor


def door_arguments(problem: Problem) -> tuple[Any, ...]:
    spec, device = problem.case, str(problem.q.device)
    lens = (cu_seqlens(spec.lens_q, device), cu_seqlens(spec.keys, device))
    block_mask = dense_mask(spec, problem.block_masks, "flat").to(device)
    scale = spec.head_dim**-0.5
    return (problem.q, problem.k, problem.v, *lens, block_mask, spec.q_block, spec.k_block, spec.causal, scale)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_drop_in(causal: bool, device: str, dtype: torch.dtype):
    from hbsattn import HBSAttention
    from hbsattn.hbsa_interface import HBSAttention as from_interface
    from hbsattn.utils import calculate_blocks

    assert HBSAttention is from_interface
    spec = case("door", heads_q=8, heads_k=2, mask_heads=2, q_block=32, k_block=48, causal=causal)
    problem = make_problem(spec, device, dtype)
    arguments = door_arguments(problem)
    judge(problem, HBSAttention(*arguments), None)
    for tile_mode in ("auto", "fix"):
        judge(problem, HBSAttention(*arguments, tile_mode), None)
    plans = (*calculate_blocks(arguments[3], 32), *calculate_blocks(arguments[4], 48))
    judge(problem, HBSAttention(*arguments, "fix", *plans), None)
    names = ("num_q_block", "cu_q_block", "q_block_to_batch", "cu_num_q_block")
    names += ("num_k_block", "cu_k_block", "k_block_to_batch", "cu_num_k_block")
    judge(problem, HBSAttention(*arguments, tile_mode="auto", **dict(zip(names, plans, strict=True))), None)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("tile_mode", ["", "AUTO", "both", None, 3])
def test_tile_mode(tile_mode: object, device: str):
    from hbsattn import HBSAttention

    problem = make_problem(case("door"), device, dtype_of(device))
    with pytest.raises(ValueError, match=r"(?s)tile_mode.*auto.*fix"):
        HBSAttention(*door_arguments(problem), tile_mode)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_calculate_blocks(device: str):
    from hbsattn.utils import calculate_blocks

    num_block, cu_block, block_to_batch, cu_num_block = calculate_blocks(cu_seqlens((100, 0, 64, 1), device), 32)
    assert num_block == 7
    assert cu_block.tolist() == [0, 32, 64, 96, 100, 132, 164, 165]
    assert block_to_batch.tolist() == [0, 0, 0, 0, 2, 2, 3]
    assert cu_num_block.tolist() == [0, 4, 4, 6, 7]
    for x in (cu_block, block_to_batch, cu_num_block):
        assert x.dtype == torch.int32 and x.device.type == device


@pytest.mark.parametrize("device", cases.DEVICES)
def test_pack_heads_is_a_hint(device: str):
    """Tiles shared by a group or not: the same function."""
    spec = case("hint", heads_q=8, heads_k=2, mask_heads=1, q_block=16, causal=True)
    problem = make_problem(spec, device, dtype_of(device))
    mask = build_mask(spec, block_masks(spec, 0), device)
    for pack_heads in (True, False):
        items = plan_items(mask, 8, 2, 64, 2, pack_heads) if device == "cuda" else None
        call = call_of(problem.q, problem.k, problem.v, mask, pack_heads=pack_heads)
        out, lse = ops.forward(*call, items, None)
        judge(problem, out, lse)


def test_build_info():
    info = hbsattn.build_info()
    assert {"cuda", "cuda_version", "cutlass_version", "kernels"} <= set(info)
    assert isinstance(info["cuda"], bool)
    assert bool(info["kernels"]) == info["cuda"]
    for kernel in info["kernels"]:
        assert {
            "name",
            "arch",
            "dtype",
            "head_dim",
            "value_dim",
            "tile_m",
            "tile_n",
            "key_stages",
            "value_stages",
            "shared_bytes",
        } <= set(kernel)
    for key in ("archs", "head_dims", "dtypes"):
        assert bool(info[key]) == info["cuda"]
    if info["cuda"]:
        assert all(any(f"_{way}_" in kernel["name"] for kernel in info["kernels"]) for way in ("forward", "backward"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "int32", "complex64"])
def test_cpu_dtypes(dtype: str):
    """Those that build_info() names run on a CPU, and no others."""
    problem = make_problem(case("dtypes"), "cpu", torch.float32)
    inputs = [x.to(getattr(torch, dtype)) for x in (problem.q, problem.k, problem.v)]
    if dtype in hbsattn.build_info()["cpu_dtypes"]:
        assert hbsattn.block_sparse_attention(*inputs, problem.mask()).dtype == inputs[0].dtype
    else:
        with pytest.raises(TypeError, match=rf"q has dtype {dtype}"):
            hbsattn.block_sparse_attention(*inputs, problem.mask())
