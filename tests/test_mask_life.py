"""The life of a mask: copies, moves, writes in place and what is cached on it through all that."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cases
import hbsattn
from cases import Case, case
from hbsattn import BlockMask, _plans
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

SPEC = case("life", lens_q=(100, 37), lens_k=(90, 150), q_block=32, k_block=16, causal=True)
BATCHED = case("batched_life", lens_q=(70, 70), lens_k=(90, 90), q_block=32, k_block=16, packed=False)
TOKENS = case("tokens", lens_q=(40, 25), q_block=1, k_block=16, source="indices", causal=True)
SPECS = {
    "dense": SPEC,
    "indices": dataclasses.replace(SPEC, source="indices"),
    "csr": dataclasses.replace(SPEC, source="csr"),
    "padded": dataclasses.replace(SPEC, form="batched"),
    "batched": BATCHED,
}


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def problem_of(spec: Case, device: str, seed: int = 0) -> Problem:
    return make_problem(spec, device, dtype_of(device), seed)


def counted(mask: BlockMask, calls: list[int]) -> Tensor:
    """A plan of the mask: active blocks of each row. `calls` grows when it is made."""

    def make(mask: BlockMask) -> tuple[Tensor]:
        calls.append(1)
        return (mask.to_dense().sum(-1) if mask._bits is None else (mask.bits != 0).sum(-1),)

    return mask._plan(("counted",), make)[0]


@pytest.fixture
def keep_lists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)


# Copies


def reloaded(mask: BlockMask, weights_only: bool) -> BlockMask:
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def mapped(mask: BlockMask, change: Callable[[Any], Any]) -> BlockMask:
    """As FullyShardedDataParallel maps the tensors of its inputs."""
    mask = dataclasses.replace(mask)
    fields = {field.name: change(getattr(mask, field.name)) for field in dataclasses.fields(mask)}
    return dataclasses.replace(mask, **fields)


COPIES: dict[str, Callable[[BlockMask], BlockMask]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "save": lambda mask: reloaded(mask, False),
    "save_weights": lambda mask: reloaded(mask, True),
    "replace": lambda mask: dataclasses.replace(mask),
    "mapped": lambda mask: mapped(mask, lambda x: x),
    "cloned": lambda mask: mapped(mask, lambda x: x.clone() if isinstance(x, Tensor) else x),
    "moved": lambda mask: mask.to("cpu").to(mask.device),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str, lists: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    """The same mask in all, also after use, and none shares plans."""
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: lists)
    problem = problem_of(TOKENS, device)
    mask = problem.mask()
    assert (mask._lists is not None) == lists
    problem.run(mask)
    calls: list[int] = []
    counted(mask, calls)
    other = COPIES[name](mask)
    assert repr(other) == repr(mask) and same(other.to_dense(), mask.to_dense()) and (other._bits is None) == lists
    judge(problem, *problem.run(other))
    if other is not mask:
        assert same(counted(other, calls), counted(mask, calls)) and len(calls) == 2


@pytest.mark.parametrize("device", cases.DEVICES)
def test_replaced_causal(device: str):
    """Plans are those of the mask that they are used with, not of the one that it was copied from."""
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 8).to(device, dtype_of(device))
    q = torch.zeros_like(v)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), 2, 2)
    assert hbsattn.block_sparse_attention(q, q, v, mask)[0, :, 0, 0].tolist() == [0.5, 0.5]
    causal = dataclasses.replace(mask, causal=True)
    assert hbsattn.block_sparse_attention(q, q, v, causal)[0, :, 0, 0].tolist() == [0.0, 0.5]


@pytest.mark.parametrize("device", cases.DEVICES)
def test_replaced_causal_is_trimmed(device: str):
    """Whatever the bits hold beyond the diagonal."""
    problem = problem_of(dataclasses.replace(SPEC, causal=False), device)
    causal = dataclasses.replace(problem.mask(), causal=True)
    want = build_mask(SPEC, problem.block_masks, device)
    assert same(causal.to_dense(), want.to_dense())
    assert causal.density == want.density and causal.flops(64, 4) == want.flops(64, 4)
    judge(Problem(SPEC, problem.q, problem.k, problem.v, problem.block_masks), *problem.run(causal))


@pytest.mark.gpu
def test_mapped_to_another_device():
    problem = problem_of(SPEC, "cuda")
    mask = build_mask(SPEC, problem.block_masks, "cpu")
    make_problem(SPEC, "cpu", torch.float32).run(mask)
    for other in (
        mapped(mask, lambda x: x.cuda() if isinstance(x, Tensor) else x),
        mask.cuda(),
        mask.cuda(0),
        mask.to(0),
    ):
        assert other.device.type == "cuda"
        judge(problem, *problem.run(other))
    assert mask.cuda().cpu().device.type == "cpu"


def test_moves():
    mask = problem_of(SPEC, "cpu").mask()
    assert mask.cpu() is mask and mask.to("cpu") is mask and mask.to(torch.device("cpu")) is mask
    for wrong in (torch.float16, None, True):
        with pytest.raises(TypeError, match=r"device is .*; expected a torch.device, a str or an int"):
            mask.to(wrong)


def test_identity():
    mask, other = (problem_of(SPEC, "cpu").mask() for _ in range(2))
    assert mask == mask and mask != other and len({mask, other, mask}) == 2


@pytest.mark.parametrize("arguments", [(), (torch.ones(1, 1, 1, 1, dtype=torch.bool), 128, 128)])
def test_called_itself(arguments: tuple[Any, ...]):
    with pytest.raises(
        TypeError, match=r"expected BlockMask\.from_dense, BlockMask\.from_indices or BlockMask\.from_csr"
    ):
        BlockMask(*arguments)


# Writes in place


@pytest.mark.parametrize("device", cases.DEVICES)
def test_bits_written_in_place(device: str):
    """A mask whose bits were written plans anew, and no other does."""
    problem = problem_of(SPEC, device)
    mask, calls = problem.mask(), []
    problem.run(mask)
    kept = counted(mask, calls)
    assert counted(mask, calls) is kept and len(calls) == 1
    bits = mask.bits.clone()

    mask.bits.zero_()
    out, lse = problem.run(mask)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert not counted(mask, calls).any() and len(calls) == 2

    mask.bits.copy_(bits)
    judge(problem, *problem.run(mask))

    other = problem_of(SPEC, device, seed=5)
    mask.bits[...] = other.mask().bits
    judge(Problem(SPEC, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))
    assert counted(mask, calls).data_ptr() == kept.data_ptr(), "a graph reads the plan where it was"


@pytest.mark.parametrize("device", cases.DEVICES)
def test_sequences_written_in_place(device: str):
    mask, calls = problem_of(SPEC, device).mask(), []
    counted(mask, calls)
    mask.sequences.copy_(mask.sequences.clone())
    counted(mask, calls)
    assert len(calls) == 2


def contents(spec: Case, masks: list[Tensor], device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """What the constructor of a case takes."""
    if spec.source == "dense":
        return (dense_mask(spec, masks, spec.mask_form, seed).to(device),)
    if spec.source == "csr":
        return tuple(x.to(device) for x in csr_lists(local_rows(spec, masks), seed))
    return tuple(x.to(device) for x in block_lists(local_rows(spec, masks), seed))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", SPECS)
def test_update(name: str, device: str):
    """New contents in the same memory, plans included."""
    spec = SPECS[name]
    problem, other = (problem_of(spec, device, seed) for seed in (0, 5))
    mask, calls = problem.mask(), []
    judge(problem, *problem.run(mask))
    plan = counted(mask, calls)
    places = [x.data_ptr() for x in (mask.bits, mask.sequences, plan)]

    assert mask.update_(*contents(spec, other.block_masks, device)) is mask
    want = other.mask()
    assert same(mask.bits, want.bits) and same(plan, counted(want, [])) and len(calls) == 2
    assert counted(mask, calls) is plan and len(calls) == 2
    assert [x.data_ptr() for x in (mask.bits, mask.sequences, plan)] == places
    judge(Problem(spec, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_update_of_lists(device: str, keep_lists: None):
    problem, other = (problem_of(TOKENS, device, seed) for seed in (0, 5))
    mask = problem.mask()
    bits = mask._kept_bits()
    assert mask._lists is not None and mask._makes_bits()
    mask.update_(*contents(TOKENS, other.block_masks, device))
    assert mask._lists is not None and mask._kept_bits() is bits and same(bits, other.mask().bits)
    judge(Problem(TOKENS, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_update_of_lengths(source: str, device: str):
    """Another cut of the same totals, in as many blocks."""
    first = dataclasses.replace(SPEC, lens_q=(64, 96), lens_k=(96, 64), source=source)
    second = dataclasses.replace(first, lens_q=(96, 64), lens_k=(64, 96))
    longest = {"max_seqlen_q": 96, "max_seqlen_k": 96}
    lens = [
        {"cu_seqlens_q": cu_seqlens(x.lens_q, device), "cu_seqlens_k": cu_seqlens(x.keys, device)}
        for x in (first, second)
    ]
    build = getattr(BlockMask, f"from_{source}")
    problem, other = problem_of(first, device), problem_of(second, device, 5)
    given = [contents(p.case, p.block_masks, device) for p in (problem, other)]
    mask = build(*given[0], 32, 16, **lens[0], **longest, causal=True)
    judge(problem, *problem.run(mask))
    mask.update_(*given[1], **lens[1])
    assert same(mask.sequences, build(*given[1], 32, 16, **lens[1], **longest, causal=True).sequences)
    judge(other, *other.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_update_between_forward_and_backward(device: str):
    """Autograd tells that the mask of the forward pass is gone."""
    problem = problem_of(SPEC, device)
    mask = problem.mask()
    q = problem.q.requires_grad_()
    out = hbsattn.block_sparse_attention(q, problem.k, problem.v, mask)
    mask.update_(*contents(SPEC, problem.block_masks, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def ones(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


UPDATE_ERRORS: dict[str, tuple[str, Callable[[BlockMask], Any], type[Exception], str]] = {
    "count": (
        "dense",
        lambda m: m.update_(),
        TypeError,
        "0 tensors; expected block_mask, as mask was built by from_dense",
    ),
    "form": ("indices", lambda m: m.update_(ones(4, 6, 5)), TypeError, "1 tensors; expected counts and indices"),
    "shape": (
        "dense",
        lambda m: m.update_(ones(1, 6, 16)),
        ValueError,
        r"block_mask has shape \(1, 6, 16\); expected \(2, 6, 16\)",
    ),
    "dtype": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16).int()),
        TypeError,
        "block_mask has dtype torch.int32; expected torch.bool",
    ),
    "device": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16, device="meta")),
        ValueError,
        "block_mask is on meta; expected cpu, where mask is",
    ),
    "csr": (
        "csr",
        lambda m: m.update_(m.sequences[:, :4], m.sequences[0]),
        ValueError,
        r"indptr has shape \(2, 4\); expected \(2, 7\)",
    ),
    "lengths_batched": (
        "batched",
        lambda m: m.update_(ones(2, 2, 3, 6), cu_seqlens_q=cu_seqlens((70, 70), "cpu")),
        ValueError,
        "cu_seqlens_q is a Tensor; expected None, as mask was built for batched tensors",
    ),
    "lengths_one": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16), cu_seqlens_q=cu_seqlens((100, 37), "cpu")),
        ValueError,
        "cu_seqlens_k is None; expected an int32 Tensor",
    ),
    "lengths_batch": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16), cu_seqlens_q=m.sequences[:, 0], cu_seqlens_k=m.sequences[:, 0]),
        ValueError,
        "cu_seqlens_q has 1 sequences; expected 2, those of mask",
    ),
    "lengths_too_long": (
        "padded_bounded",
        lambda m: m.update_(
            ones(1, 2, 4, 10), cu_seqlens_q=cu_seqlens((110, 27), "cpu"), cu_seqlens_k=cu_seqlens((90, 150), "cpu")
        ),
        ValueError,
        "max_seqlen_q is 100; expected at least 110, the longest sequence",
    ),
}


@pytest.mark.parametrize("name", UPDATE_ERRORS)
def test_update_refuses(name: str):
    made, call, kind, pattern = UPDATE_ERRORS[name]
    spec = dataclasses.replace(SPEC if made != "batched" else BATCHED, mask_heads=2)
    if made in ("dense", "indices", "csr"):
        spec = dataclasses.replace(spec, source=made)
    mask = build_mask(spec, block_masks(spec, 0), "cpu")
    if made == "padded_bounded":
        lens = {"cu_seqlens_q": cu_seqlens(spec.lens_q, "cpu"), "cu_seqlens_k": cu_seqlens(spec.keys, "cpu")}
        mask = BlockMask.from_dense(ones(1, 2, 4, 10), 32, 16, **lens, max_seqlen_q=100, max_seqlen_k=150)
    before = mask.bits.clone(), mask.sequences.clone()
    with pytest.raises(kind, match=pattern):
        call(mask)
    assert same(mask.bits, before[0]) and same(mask.sequences, before[1])


def test_update_refuses_other_widths_of_lists(keep_lists: None):
    mask = problem_of(TOKENS, "cpu").mask()
    counts, indices = mask._lists.counts, mask._lists.indices
    with pytest.raises(ValueError, match=r"indices has shape .*; expected .*, as mask stays lists"):
        mask.update_(counts, indices[..., :1])


# What is cached, and when


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_trains_after_inference_mode(source: str, device: str):
    """A mask that was built or first used in inference mode, or copied there."""
    spec = dataclasses.replace(SPEC, source=source)
    problem = problem_of(spec, device)
    with torch.inference_mode():
        built = build_mask(spec, problem.block_masks, device)
        problem.run(built)
    used = build_mask(spec, problem.block_masks, device)
    with torch.inference_mode():
        problem.run(used)
        copied = copy.deepcopy(used)
        moved = used.to("cpu").to(device)
        changed = mapped(used, lambda x: x.clone() if isinstance(x, Tensor) else x)
        given = [x.clone() for x in contents(spec, problem.block_masks, device)]
    updated = build_mask(spec, problem.block_masks, device)
    with torch.inference_mode():
        updated.update_(*given)
    for mask in (built, used, copied, moved, changed, updated):
        assert not mask.bits.is_inference() and not mask.sequences.is_inference()
        assert not counted(mask, []).is_inference()
        inputs = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
        out = hbsattn.block_sparse_attention(*inputs, mask)
        assert all(x.any() for x in torch.autograd.grad(out.sum(), inputs))


def test_nothing_is_kept_of_a_transform():
    """Nor from masks that one builds."""
    mask, calls = problem_of(SPEC, "cpu").mask(), []
    built = []

    def loss(x: Tensor) -> Tensor:
        counted(mask, calls)
        built.append(BlockMask.from_dense(x.view(1, 1, 2, 2) > 0, 16, 16))
        counted(built[-1], calls)
        return x.sum()

    x = torch.randn(4)
    torch.func.grad(loss)(x)
    torch.vmap(lambda x: counted(mask, calls).sum() * x)(x)
    assert len(calls) == 3
    counted(mask, calls)
    counted(mask, calls)
    assert len(calls) == 4


def test_nothing_is_kept_while_tracing():
    mask, calls = problem_of(SPEC, "cpu").mask(), []

    def make(mask: BlockMask) -> tuple[Tensor]:
        calls.append(1)
        return (mask.bits + 1,)

    make_fx(lambda x: x + mask._plan(("traced",), make)[0])(torch.zeros(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        mask._plan(("traced",), make)
    assert len(calls) == 2
    assert mask._plan(("traced",), make)[0] is mask._plan(("traced",), make)[0] and len(calls) == 3


def test_compiled_after_a_write():
    """A compiled call does not keep what belongs to bits of before."""
    torch._dynamo.reset()
    problem = problem_of(SPEC, "cpu")
    mask = problem.mask()
    problem.run(mask)
    compiled = torch.compile(hbsattn.block_sparse_attention, backend="aot_eager", fullgraph=True)
    arguments = (problem.q, problem.k, problem.v, mask)
    judge(problem, *compiled(*arguments, return_lse=True))
    mask.bits.zero_()
    assert not compiled(*arguments).any()
    other = problem_of(SPEC, "cpu", seed=5)
    mask.update_(*contents(SPEC, other.block_masks, "cpu"))
    other.q, other.k, other.v = problem.q, problem.k, problem.v
    judge(other, *compiled(*arguments, return_lse=True))


def test_compiled_update():
    torch._dynamo.reset()
    problem, other = (problem_of(SPEC, "cpu", seed) for seed in (0, 5))
    mask, calls = problem.mask(), []
    problem.run(mask)
    plan = counted(mask, calls).clone()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(block_mask: Tensor) -> tuple[Tensor, Tensor]:
        mask.update_(block_mask)
        return hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, mask, return_lse=True)

    expected = Problem(SPEC, problem.q, problem.k, problem.v, other.block_masks)
    judge(expected, *attend(*contents(SPEC, other.block_masks, "cpu")))
    judge(expected, *problem.run(mask))
    assert not same(counted(mask, calls), plan) and len(calls) == 2


def test_threads(monkeypatch: pytest.MonkeyPatch):
    """Plans are looked for while other threads add some, on streams of their own."""
    mask = problem_of(SPEC, "cpu").mask()
    wrong: list[str] = []
    start, stream = threading.Barrier(4), threading.local()
    monkeypatch.setattr(_plans, "_raw_stream", lambda _: stream.number)
    mask._plans._stream_device = 0

    def work(thread: int) -> None:
        start.wait()
        try:
            for i in range(300):
                stream.number = 300 * thread + i
                found = mask._plan(("number", thread), lambda mask: (torch.full((1,), thread),))[0]
                if found.item() != thread or mask._plans._find_of_other_stream(("none",)) is not None:
                    wrong.append(f"{thread}: {found}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert len(mask._plans._made) == 1200


def test_a_stream_is_added_while_plans_are_looked_for():
    mask = problem_of(SPEC, "cpu").mask()
    counted(mask, [])
    made = mask._plans._made

    class Key:
        def __hash__(self) -> int:  # another thread's turn
            made[len(made)] = {}
            return 1

    assert mask._plans._find_of_other_stream(Key()) is None and len(made) == 2


def test_two_threads_get_one_plan():
    """Both make it, one is kept: graphs and later calls read the same memory."""
    mask = problem_of(SPEC, "cpu").mask()
    both = threading.Barrier(2)
    got: list[Tensor] = []

    def make(mask: BlockMask) -> tuple[Tensor]:
        both.wait()
        return (mask.bits.sum(),)

    threads = [threading.Thread(target=lambda: got.append(mask._plan(("sum",), make)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and got[0] is got[1]


def test_capture_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch):
    """Whether a stream of the mask's device captures, whatever the current device is."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert _plans.is_capturing(torch.device("cuda:1")) and not _plans.is_capturing(torch.device("cuda:0"))
    assert not _plans.is_capturing(torch.device("cuda")) and current == [0]


# CUDA graphs


def captured(call: Callable[[], Any], *, raw: bool = False) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`raw`: without the synchronization and the warm-up that `torch.cuda.graph` brings or asks for."""
    graph = torch.cuda.CUDAGraph()
    if raw:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            result = call()
            graph.capture_end()
    else:
        with torch.cuda.graph(graph):
            result = call()
    return graph, result


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_graph_replays_after_update(name: str, planned: bool):
    spec = SPECS[name]
    problems = [problem_of(spec, "cuda", seed) for seed in (0, 5, 7)]
    mask, first = problems[0].mask(), problems[0]
    if planned:
        first.run(mask)
    graph, (out, lse) = captured(lambda: first.run(mask))
    for problem in problems * 2:
        mask.update_(*contents(spec, problem.block_masks, "cuda"))
        graph.replay()
        torch.cuda.synchronize()
        judge(Problem(spec, first.q, first.k, first.v, problem.block_masks), out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [True, False])
def test_captured_update(planned: bool):
    """The update is in the graph, which reads its contents where they lie."""
    problems = [problem_of(SPEC, "cuda", seed) for seed in (0, 5, 7)]
    mask, first = problems[0].mask(), problems[0]
    first.run(mask if planned else first.mask())
    static = [x.clone() for x in contents(SPEC, first.block_masks, "cuda")]
    graph, (out, lse) = captured(lambda: first.run(mask.update_(*static)))
    for problem in problems * 2:
        for target, value in zip(static, contents(SPEC, problem.block_masks, "cuda"), strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = Problem(SPEC, first.q, first.k, first.v, problem.block_masks)
        judge(expected, out, lse)
        judge(expected, *first.run(mask))


@pytest.mark.gpu
@pytest.mark.parametrize("settled", [True, False])
def test_raw_capture_waits_for_a_plan(settled: bool):
    """The plan is made on one stream, late, and a graph that was captured meanwhile on another one uses it."""
    problem = problem_of(SPEC, "cuda")
    problem.run()
    mask = problem.mask()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        problem.run(mask)
        if settled:
            side.synchronize()
            problem.run(mask)
    graph, (out, lse) = captured(lambda: problem.run(mask), raw=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.replay()
    torch.cuda.synchronize()
    judge(problem, out, lse)


@pytest.mark.gpu
def test_graph_of_bits_written_in_place():
    """An eager call after the write renews the plan that the graph reads."""
    problem, other = (problem_of(SPEC, "cuda", seed) for seed in (0, 5))
    mask = problem.mask()
    problem.run(mask)
    torch.cuda.synchronize()
    graph, (out, lse) = captured(lambda: problem.run(mask))
    mask.bits.copy_(other.mask().bits)
    problem.run(mask)
    graph.replay()
    torch.cuda.synchronize()
    judge(Problem(SPEC, problem.q, problem.k, problem.v, other.block_masks), out, lse)
