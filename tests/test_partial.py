"""Masks of single pairs: partial blocks, and the constructors that find them, beside the dense formula."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cases
from cases import DEVICE_DTYPES, DEVICES, Case, case
from gradients import differentiate, judge_gradients
from hbsattn import BlockMask, _partial, block_sparse_attention, explain, patterns
from masks import counted, mapped
from partial import SPECS, assert_elements, build, by_name, draw_elements, lengths_of, make_partial
from plans import call_of
from problems import judge, make_problem, same

ops = torch.ops.hbsattn


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    """Results and gradients."""
    problem = make_partial(spec, device, dtype)
    mask = build(spec, problem.block_masks, device)
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("spec", SPECS[::4], ids=by_name)
def test_float64(spec: Case):
    problem = make_partial(spec, "cpu", torch.float64)
    mask = build(spec, problem.block_masks, "cpu")
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_deterministic(spec: Case, dtype: torch.dtype):
    problem = make_partial(spec, "cuda", dtype)
    mask = build(spec, problem.block_masks, "cuda")
    first = differentiate(problem, mask=mask, deterministic=True)
    judge_gradients(problem, first)
    assert all(same(x, y) for x, y in zip(first, differentiate(problem, mask=mask, deterministic=True), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", cases.BACKWARD_METHODS, ids=by_name)
def test_backward_methods(method: Case, causal: bool, deterministic: bool):
    """Every way in which gradients are computed."""
    spec = dataclasses.replace(method, causal=causal, density=0.9)
    problem = make_partial(spec, "cuda", torch.bfloat16)
    mask = build(spec, problem.block_masks, "cuda")
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=deterministic))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_what_a_mask_tells(spec: Case, device: str):
    masks = draw_elements(spec)
    mask = build(spec, masks, device)
    assert_elements(spec, mask, masks)
    if spec.causal or spec.windows:
        return
    blocks = [torch.nn.functional.pad(x, (0, -x.shape[2] % spec.k_block, 0, -x.shape[1] % spec.q_block)) for x in masks]
    blocks = [
        x.unflatten(2, (-1, spec.k_block)).unflatten(1, (-1, spec.q_block)).any(-1).any(2) for x in blocks if x.numel()
    ]
    assert int(mask.to_dense().sum()) == sum(int(x.sum()) for x in blocks)
    assert ("partial=True" in repr(mask)) == (mask._partial is not None)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_any_small_mask(device: str, dtype: torch.dtype):
    hypothesis = pytest.importorskip("hypothesis", reason="the property test needs hypothesis")
    draw = hypothesis.strategies

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        lens=draw.lists(draw.tuples(draw.integers(0, 200), draw.integers(0, 200)), min_size=1, max_size=3),
        packed=draw.booleans(),
        blocks=draw.tuples(draw.integers(1, 140), draw.integers(1, 140)),
        density=draw.sampled_from((0.02, 0.3, 0.98, 1.0)),
        windows=draw.sampled_from(((), ((20, 30, 3), (-1, 0, 0)))),
        causal=draw.booleans(),
        at_once=draw.sampled_from((1, 1000, 1 << 24)),
        seed=draw.integers(0, 2**20),
    )
    def check(lens, packed, blocks, density, windows, causal, at_once, seed):
        lens = lens if packed else [lens[0]] * len(lens)
        spec = case(
            "hypothesis",
            lens_q=tuple(n for n, _ in lens),
            lens_k=tuple(n for _, n in lens),
            packed=packed,
            mask_heads=2,
            q_block=blocks[0],
            k_block=blocks[1],
            causal=causal,
            head_dim=16,
            windows=windows,
        )
        problem = make_problem(spec, device, dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        problem.block_masks = [torch.rand((2, n, m), generator=generator) < density for n, m in lens]
        problem.case = dataclasses.replace(spec, q_block=1, k_block=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
            mask = build(spec, problem.block_masks, device)
            assert_elements(spec, mask, problem.block_masks)
        judge(problem, *problem.run(mask))
        judge_gradients(problem, differentiate(problem, mask=mask))

    check()


def by_seed(seed: int, max_len: int) -> Case:
    """Scores of the usual size: how many digits large ones have is no matter of masks."""
    spec = cases.random_case(seed, any_block_size=seed % 2 == 0, max_len=max_len, windowed=seed % 3 == 0)
    return dataclasses.replace(spec, scale=None)


def has_many_numbers(spec: Case) -> bool:
    """Whether the largest of a few rounding errors says something: the judge compares it with the formula's."""
    return min(sum(spec.lens_q), sum(spec.lens_k)) >= 32 and spec.head_dim >= 16


def run_random(spec: Case, device: str, dtype: torch.dtype, seed: int) -> None:
    problem = make_partial(spec, device, dtype, seed)
    try:
        mask = build(spec, problem.block_masks, device)
        assert_elements(spec, mask, problem.block_masks)
        judge(problem, *problem.run(mask))
        judge_gradients(problem, differentiate(problem, mask=mask, deterministic=seed % 2 == 0))
    except Exception as error:
        raise AssertionError(f"seed {seed}, {dtype}, {spec}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5000, 5030))
def test_random(seed: int):
    run_random(by_seed(seed, 250), "cpu", (torch.float32, torch.float64)[seed % 2], seed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [seed for seed in range(5100, 5300) if has_many_numbers(by_seed(seed, 700))])
def test_random_on_gpu(seed: int):
    run_random(by_seed(seed, 700), "cuda", (torch.bfloat16, torch.float16)[seed // 2 % 2], seed)


# Blocks that are whole, and matrices that are alike


@pytest.mark.parametrize("device", DEVICES)
def test_whole_blocks_are_not_partial(device: str):
    """What is on wherever lengths and causality let it, is whole, and what is on nowhere there is off."""
    elements = torch.ones(1, 1, 100, 120, dtype=torch.bool, device=device).tril(20)
    mask = BlockMask.from_elements(elements, 16, 48, causal=True)
    assert mask._partial is None and mask.density == 1.0
    assert same(
        mask.bits, BlockMask.from_dense(torch.ones(1, 1, 7, 3, device=device).bool(), 16, 48, **S(100, 120)).bits
    )
    elements = ~elements
    mask = BlockMask.from_elements(elements, 16, 48, causal=True)
    assert mask._partial is None and not mask.bits.any()


def S(seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    return {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "causal": True}


@pytest.mark.parametrize("device", DEVICES)
def test_equal_matrices_are_kept_once(device: str):
    elements = torch.ones(256, 256, dtype=torch.bool, device=device).tril().expand(3, 2, -1, -1)
    mask = BlockMask.from_elements(elements, 32, 32)
    assert mask._matrices.shape == (3 * 2 * 8,) and mask._elements.shape == (1, 32, 2)
    assert mask._partial[0, 0].tolist()[0] == [1, 0] and mask._partial[1, 2].tolist()[0] == [4, 3 * 8 + 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_hashes_that_are_the_same(at_once: int, device: str, monkeypatch: pytest.MonkeyPatch):
    """Different matrices are told apart by themselves: then each is kept."""
    spec = SPECS[0]
    masks = draw_elements(spec)
    want = build(spec, masks, device)
    monkeypatch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr(_partial, "_factors", lambda count, seed: torch.zeros(count, dtype=torch.int64))
    mask = build(spec, masks, device)
    assert mask._elements.shape[0] == mask._matrices.shape[0] > want._elements.shape[0]
    assert same(mask.bits, want.bits) and same(mask._partial, want._partial)
    assert same(mask.to_elements(), want.to_elements())


class LargestResult(TorchDispatchMode):
    """The bytes of the largest result of an op, `known` memory aside."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_as_large_as_all_pairs(device: str, monkeypatch: pytest.MonkeyPatch):
    at_once = 1 << 14
    monkeypatch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
    elements = (torch.rand((2, 2, 512, 512), generator=torch.Generator().manual_seed(0)) < 0.5).to(device)
    documents = torch.arange(512, device=device) // 100
    made = [
        lambda: BlockMask.from_elements(elements, 16, 16),
        lambda: BlockMask.from_mask_mod(
            lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k),
            16,
            16,
            heads=2,
            seqlen_q=512,
            seqlen_k=512,
            batch_size=2,
            device=device,
        ),
    ]
    for make in made:
        with LargestResult(elements) as largest:
            mask = make()
        assert largest.bytes <= max(8 * at_once, mask._elements.nbytes) < elements.nbytes / 4
        with LargestResult(elements) as largest:
            mask.flops(64, 2)
        assert largest.bytes <= max(8 * at_once, mask._elements.nbytes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["padded", "one_for_all", "transposed", "expanded"])
def test_forms_of_elements(form: str, device: str):
    """Of packed sequences with a batch dimension, and of any strides."""
    spec = case("forms", lens_q=(90, 20, 64), lens_k=(70, 33, 100), mask_heads=2, k_block=32)
    generator = torch.Generator().manual_seed(3)
    elements = torch.rand((3, 2, 110, 101), generator=generator) < 0.7
    if form == "one_for_all":
        elements = elements[:1]
    if form == "expanded":
        elements = elements[:1, :1].expand(3, 2, -1, -1)
    given = elements.to(device)
    if form == "transposed":
        given = given.mT.contiguous().mT
    mask = BlockMask.from_elements(given, 64, 32, **lengths_of(spec, device))
    masks = [
        elements[b % len(elements), :, :n, :m] for b, (n, m) in enumerate(zip(spec.lens_q, spec.keys, strict=True))
    ]
    assert_elements(spec, mask, masks)


# Masks made from masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS[:8], ids=by_name)
def test_and(spec: Case, device: str):
    """Of partial blocks with partial and with whole ones, of one head with many."""
    mine, other = draw_elements(spec), draw_elements(spec, 1)
    masks = [build(spec, x, device) for x in (mine, other)]
    both = [x & y for x, y in zip(mine, other, strict=True)]
    assert_elements(spec, masks[0] & masks[1], both)
    one = [x[:1] for x in other]
    assert_elements(spec, masks[0] & build(spec, one, device), [x & y for x, y in zip(mine, one, strict=True)])
    if not spec.packed:
        lengths = {"seqlen_q": spec.lens_q[0], "seqlen_k": spec.keys[0], "batch_size": len(spec.lens_q)}
        blocks = patterns.Blocks(spec.q_block, spec.k_block, causal=spec.causal, device=device, **lengths)
        window = patterns.window(blocks, 0, 0)
        want = [x & y for x, y in zip(mine, window.to_elements().cpu(), strict=True)]
        assert_elements(spec, masks[0] & window, want)
        assert_elements(spec, window & masks[0], want)
    nothing = masks[0] & build(spec, [~x for x in mine], device)
    assert nothing._partial is None and not nothing.bits.any()


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_heads_of_every_kind(device: str, dtype: torch.dtype):
    """Some of partial blocks, of two masks, some with windows, and some without either."""
    spec = case("kinds", packed=False, lens_q=(150, 150), lens_k=(210, 210), causal=True, heads_q=8, heads_k=2)
    spec = dataclasses.replace(spec, mask_heads=8, windows=((-1, -1, 0),) * 6 + ((9, -1, 3),) * 2)
    problem = make_partial(spec, device, dtype)
    drawn = [draw_elements(dataclasses.replace(spec, windows=()), seed) for seed in (0, 1)]
    first, second = (build(dataclasses.replace(spec, windows=()), x, device) for x in drawn)
    lengths = {"seqlen_q": 150, "seqlen_k": 210, "batch_size": 2, "device": device}
    plain = patterns.dense(patterns.Blocks(64, 64, causal=True, **lengths))
    mask = patterns.select_heads([first, second, plain, second.windowed(9, -1, 3)], [0, 1, 1, 2, 0, 2, 3, 3])
    whole = torch.ones_like(drawn[0][0][0])
    problem.block_masks = [
        torch.stack([x[0], y[1], y[2], whole, x[4], whole, y[6], y[7]]) for x, y in zip(*drawn, strict=True)
    ]
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))
    assert patterns.select_heads([first, plain], [1] * 8)._partial is None


COPIES: list[Callable[[BlockMask], BlockMask]] = [
    lambda mask: mapped(mask, lambda x: x.clone() if isinstance(x, Tensor) else x),
    dataclasses.replace,
    lambda mask: mask.cpu().to(mask.device),
    lambda mask: pickle.loads(pickle.dumps(mask)),
    copy.deepcopy,
]


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
@pytest.mark.parametrize("change", COPIES)
def test_copies(change: Callable[[BlockMask], BlockMask], device: str, dtype: torch.dtype):
    problem = make_partial(SPECS[0], device, dtype)
    mask = build(SPECS[0], problem.block_masks, device)
    other = change(mask)
    assert repr(other) == repr(mask)
    for field in ("_bits", "_partial", "_matrices", "_elements"):
        assert same(getattr(other, field), getattr(mask, field))
    judge(problem, *problem.run(other))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_inference_mode(device: str, dtype: torch.dtype):
    """A mask that was made there trains elsewhere."""
    problem = make_partial(SPECS[1], device, dtype)
    with torch.inference_mode():
        mask = build(SPECS[1], problem.block_masks, device)
        judge(problem, *problem.run(mask))
    assert not mask._elements.is_inference()
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("device", DEVICES)
def test_a_write_is_noticed(device: str):
    """Plans are made anew."""
    problem = make_partial(SPECS[16], device, torch.float32 if device == "cpu" else torch.bfloat16)
    mask, calls = build(SPECS[16], problem.block_masks, device), []
    counted(mask, calls)
    counted(mask, calls)
    assert len(calls) == 1
    mask._partial.zero_()
    counted(mask, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_contents_that_lie(device: str, dtype: torch.dtype):
    """Places and numbers past the end are cut to those that there are."""
    problem = make_partial(SPECS[0], device, dtype)
    mask = build(SPECS[0], problem.block_masks, device)
    for value in (2**31 - 1, -(2**31), 10**6):
        for field in ("_partial", "_matrices"):
            changed = getattr(mask, field).clone()
            (changed[..., 1] if field == "_partial" else changed).fill_(value)
            out, _ = problem.run(dataclasses.replace(mask, **{field: changed}))
            assert bool(torch.isfinite(out).all())


@pytest.mark.gpu
def test_cuda_graph():
    """It reads the tables where they are."""
    problem = make_partial(SPECS[1], "cuda", torch.bfloat16)
    mask = build(SPECS[1], problem.block_masks, "cuda")
    problem.run(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = problem.run(mask)
    graph.replay()
    judge(problem, *result)
    elements = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        elements = elements.clone()
        with pytest.raises(ValueError, match="from_elements is called while a CUDA graph is captured"):
            BlockMask.from_elements(elements, 16, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(backend: str, device: str):
    """A mask that was made outside goes into a program, with its gradients."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problem = make_partial(SPECS[3], device, dtype)
    mask = build(SPECS[3], problem.block_masks, device)
    attend = torch.compile(block_sparse_attention, backend=backend, fullgraph=True)
    tensors = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    got = attend(*tensors, mask, deterministic=True)
    want = block_sparse_attention(*tensors, mask, deterministic=True)
    assert same(got, want)
    grads = [torch.autograd.grad(x.float().square().sum(), tensors) for x in (got, want)]
    assert all(same(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[16]], ids=by_name)
def test_opcheck(spec: Case, device: str):
    problem = make_partial(spec, device, torch.float32 if device == "cpu" else torch.bfloat16)
    mask = build(spec, problem.block_masks, device)
    call = call_of(problem.q, problem.k, problem.v, mask)
    torch.library.opcheck(ops.check_forward.default, call)
    if device == "cuda":
        torch.library.opcheck(ops.plan_and_forward.default, call)
        return
    leaves = [x.detach().requires_grad_() for x in call[:3]]
    torch.library.opcheck(ops.forward.default, (*leaves, *call[3:], None, None))
    out, lse = ops.forward(*call, None, None)
    results = (torch.ones_like(out), torch.zeros_like(lse), out, lse)
    torch.library.opcheck(ops.backward.default, (*call, *results, None, False, [True, True, True, False]))


def test_flop_counter():
    """Pairs that a partial block hides are no work."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_partial(SPECS[1], "cpu", torch.float32)
    mask = build(SPECS[1], problem.block_masks, "cpu")
    with FlopCounterMode(display=False) as counter:
        problem.run(mask)
    assert counter.get_total_flops() == mask.flops(SPECS[1].head_dim, SPECS[1].heads_q)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_explain(device: str, dtype: torch.dtype):
    problem = make_partial(SPECS[1], device, dtype)
    plans = explain(problem.q, problem.k, problem.v, build(SPECS[1], problem.block_masks, device))
    assert set(plans) == {"forward", "backward"} and all(plan["kernel"] for plan in plans.values())


def test_plot():
    from hbsattn._plot import OFF, PARTLY, WHOLLY, block_states

    elements = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    elements[..., :32, :32] = True
    states = block_states(BlockMask.from_elements(elements, 32, 32), 0, 0)
    assert states.tolist() == [[WHOLLY, OFF], [WHOLLY, PARTLY]]


# Bad input

# Position among the arguments of an attention op, what becomes of it, and what the message says.
PARTIAL, MATRICES, OF_ELEMENTS, LAYOUT = 6, 7, 8, 11
OP_ERRORS: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "no_partial": (PARTIAL, lambda _: None, r"partial is None; expected a tensor, as layout has partial blocks"),
    "no_matrices": (MATRICES, lambda _: None, r"matrices is None; expected a tensor"),
    "no_elements": (OF_ELEMENTS, lambda _: None, r"elements is None; expected a tensor"),
    "no_flag": (LAYOUT, lambda x: (*x[:4], 0), r"partial is a tensor; expected None, as layout has no partial blocks"),
    "short_layout": (LAYOUT, lambda x: x[:4], r"layout has 4 numbers; expected 5"),
    "partial_dtype": (PARTIAL, lambda x: x.long(), r"partial has dtype int64; expected int32"),
    "partial_shape": (PARTIAL, lambda x: x[:, 1:].contiguous(), r"partial has shape \[.*\]; expected \["),
    "partial_rank": (PARTIAL, lambda x: x[..., 0].contiguous(), r"partial has 3 dimensions"),
    "partial_strides": (PARTIAL, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), r"partial has strides"),
    "matrices_dtype": (MATRICES, lambda x: x.long(), r"matrices has dtype int64; expected int32"),
    "matrices_rank": (MATRICES, lambda x: x[None], r"matrices has 2 dimensions"),
    "matrices_empty": (MATRICES, lambda x: x[:0], r"matrices has shape \[0\]; expected the number of a matrix"),
    "elements_dtype": (OF_ELEMENTS, lambda x: x.int(), r"elements has dtype int32; expected int16"),
    "elements_shape": (OF_ELEMENTS, lambda x: x[:, 1:].contiguous(), r"elements has shape \[.*\]; expected \["),
    "elements_granules": (OF_ELEMENTS, lambda x: x[..., :1].contiguous(), r"elements has shape \[.*\]; expected \["),
    "elements_empty": (OF_ELEMENTS, lambda x: x[:0], r"elements has shape \[0, .*\]; expected a matrix, or more"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OP_ERRORS)
def test_ops_refuse(name: str, device: str):
    problem = make_partial(SPECS[0], device, torch.float32 if device == "cpu" else torch.bfloat16)
    arguments = list(call_of(problem.q, problem.k, problem.v, build(SPECS[0], problem.block_masks, device)))
    position, change, message = OP_ERRORS[name]
    arguments[position] = change(arguments[position])
    for check in (ops.check_forward, lambda *call: ops.forward(*call, None, None)):
        with pytest.raises((ValueError, TypeError), match=message):
            check(*arguments)
