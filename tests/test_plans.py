"""What is cached on a mask: when a call may use what an earlier one made, on which stream, in which graph."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import hbsattn
from gradients import differentiate, judge_gradients
from hbsattn import BlockMask, _plans
from masks import SPEC, SPECS, contents, counted, mapped, problem_of
from problems import Problem, build_mask, judge, mask_keywords, same


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


def test_mask_of_a_compiled_function_has_streams():
    """On CUDA; fake tensors stand for those of a device. Without, all streams would share plans that none waits for."""
    with FakeTensorMode():
        block_mask = torch.empty(1, 1, 2, 2, dtype=torch.bool, device="cuda")
        make = torch.compile(
            lambda block_mask: hbsattn.BlockMask.from_dense(block_mask, 64, 64), backend="eager", fullgraph=True
        )
        assert make(block_mask)._plans._stream_device == block_mask.device.index


class Watch(TorchDispatchMode):
    """Names of the library's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hbsattn":
            self.called.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_trains_after_compilation_in_inference_mode(source: str, device: str):
    """A mask that a compiled function built there. No constructor of the mask runs outside of the graph."""
    torch._dynamo.reset()
    spec = dataclasses.replace(SPEC, source=source)
    problem = problem_of(spec, device)
    build = {"dense": BlockMask.from_dense, "indices": BlockMask.from_indices, "csr": BlockMask.from_csr}[source]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*given: Tensor) -> BlockMask:
        return build(*given, spec.q_block, spec.k_block, **keywords)

    with torch.inference_mode():
        keywords = mask_keywords(spec, device, source)
        mask = compiled(*contents(spec, problem.block_masks, device))
    assert not mask.bits.is_inference() and not mask.sequences.is_inference()
    judge_gradients(problem, differentiate(problem, mask=mask))
    calls: list[int] = []
    assert counted(mask, calls) is counted(mask, calls) and len(calls) == 1  # it keeps plans


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("inference", [False, True])
def test_ops_of_a_new_mask(inference: bool, device: str):
    """One makes a mask of booleans; one plans and runs its first call, and later calls have the plan."""
    problem = problem_of(SPEC, device)
    with torch.inference_mode(inference), Watch() as watch:
        mask = problem.mask()
        assert watch.called == ["make_dense"]
        first, second = problem.run(mask), problem.run(mask)
    on_cuda = ["plan_and_forward", "forward"]
    assert watch.called[1:] == (["forward"] * 2 if device == "cpu" else on_cuda)
    judge(problem, *first)
    assert all(same(x, y) for x, y in zip(first, second, strict=True))
    if device == "cuda":  # the kept list can be rewritten in the memory where it is, whatever mode it comes from
        other = problem_of(SPEC, device, seed=5)
        mask.update_(*contents(SPEC, other.block_masks, device))
        judge(Problem(SPEC, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))


class FakeEvent:
    """Of CUDA: what is recorded, asked and waited for."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self, external: bool) -> None:
        assert external, "a capture may wait for no other event of outside"
        self.records, self.done = 0, False
        FakeEvent.made.append(self)

    def record(self, stream: FakeStreams) -> None:
        self.records, self.done = self.records + 1, False

    def query(self) -> bool:
        assert not FakeStreams.capturing, "a capture may not ask"
        return self.done


class FakeStreams:
    """The current stream of CUDA."""

    number = 0
    capturing = False
    waited: ClassVar[list[FakeEvent]] = []

    def wait_event(self, event: FakeEvent) -> None:
        FakeStreams.waited.append(event)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> type[FakeStreams]:
    """CUDA's streams, for plans of a mask on the CPU."""
    FakeEvent.made, FakeStreams.waited, FakeStreams.number, FakeStreams.capturing = [], [], 0, False
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStreams())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_plans, "_raw_stream", lambda index: FakeStreams.number)
    monkeypatch.setattr(_plans, "is_capturing", lambda device: FakeStreams.capturing)
    return FakeStreams


def on_streams(mask: BlockMask) -> BlockMask:
    mask._plans._device = torch.device("cuda:0")
    mask._plans._stream_device = 0
    return mask


def test_streams_do_not_share_plans(streams: type[FakeStreams]):
    mask, calls = on_streams(problem_of(SPEC, "cpu").mask()), []
    plans = []
    for streams.number in (0, 1, 0, 1):
        plans.append(counted(mask, calls))
    assert len(calls) == 2 and plans[0] is plans[2] and plans[1] is plans[3] and plans[0] is not plans[1]


@pytest.mark.parametrize("done", [False, True])
def test_captures_wait_for_plans_of_other_streams(done: bool, streams: type[FakeStreams]):
    """Unless a plan is known to be there; and what a capture makes is not kept."""
    mask, calls = on_streams(problem_of(SPEC, "cpu").mask()), []
    plan = counted(mask, calls)
    assert not FakeEvent.made, "a plan of one call needs no event"
    assert counted(mask, calls) is plan
    (event,) = FakeEvent.made
    event.done = done
    assert counted(mask, calls) is plan  # asks, as no capture is under way
    streams.capturing = True
    assert counted(mask, calls) is plan and not streams.waited, "the same stream needs no wait"
    streams.number = 1
    assert counted(mask, calls) is plan and len(calls) == 1
    assert streams.waited == ([] if done else [event])

    # Graphs hold on to the event, so a plan that is made again records the same one.
    streams.number, streams.capturing = 0, False
    mask.bits.zero_()
    assert counted(mask, calls) is plan and len(calls) == 2
    assert counted(mask, calls) is plan and len(calls) == 2
    assert FakeEvent.made == [event] and event.records == 2

    # What was used once is not known to be there.
    mask.bits.zero_()
    assert counted(mask, calls) is plan and len(calls) == 3
    streams.number, streams.capturing = 1, True
    assert counted(mask, calls) is not plan and len(calls) == 4
    streams.number, streams.capturing = 0, False

    mask.bits.zero_()
    streams.number, streams.capturing = 1, True
    assert counted(mask, calls) is not plan and counted(mask, calls) is not plan and len(calls) == 6
    streams.capturing = False
    counted(mask, calls)
    assert len(calls) == 7, "what a capture made has no values outside"


def test_update_renews_the_plans_of_all_streams(streams: type[FakeStreams]):
    problem, other = (problem_of(SPEC, "cpu", seed) for seed in (0, 5))
    mask, calls = on_streams(problem.mask()), []
    plans = []
    for streams.number in (0, 1):
        plans.append(counted(mask, calls))
    want = counted(other.mask(), [])
    mask.update_(*contents(SPEC, other.block_masks, "cpu"))
    assert all(same(plan, want) for plan in plans) and len(calls) == 3
    for streams.number in (0, 1):
        assert counted(mask, calls) is plans[streams.number]


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
