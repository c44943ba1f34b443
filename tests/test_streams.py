"""One mask, used from several threads, on streams that overlap, and in captures that wait for nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cases
from cases import BACKWARD_METHODS, Case, case
from gradients import assert_same_gradients, attend, differentiate, judge_gradients, leaves, upstream
from problems import Problem, judge, make_problem, same

METHODS = [s for s in BACKWARD_METHODS if s.name in ("by_keys_of_64", "by_queries")]
SLEEP = 200_000_000  # cycles: a tenth of a second


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def run_threads(bodies: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(bodies))

    def run(body: Callable[[], None]) -> None:
        try:
            barrier.wait()
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", METHODS, ids=lambda s: s.name)
def test_two_threads_with_one_mask(spec: Case, device: str):
    """Each on its own stream, from the mask's first use on, in calls of two kinds, so that each makes several plans."""
    problem = make_problem(spec, device, dtype_of(device))
    deterministic = {"deterministic": True}
    want, want_grads = problem.run(), differentiate(problem, **deterministic)
    rounds = 20 if device == "cuda" else 5
    for _ in range(rounds):
        mask = problem.mask()
        if device == "cuda":
            torch.cuda.synchronize()
        results: list[tuple[Tensor, ...]] = []

        def body(mask=mask, results=results) -> None:
            stream = torch.cuda.Stream() if device == "cuda" else None
            with torch.cuda.stream(stream):
                halves = [x[..., : x.shape[-1] // 2] for x in (problem.q, problem.k, problem.v)]
                Problem(spec, *halves, problem.block_masks).run(mask)
                results.append((*problem.run(mask), *differentiate(problem, mask=mask, **deterministic)))
            if stream is not None:
                stream.synchronize()

        run_threads([body, body])
        assert len(results) == 2
        for got in results:
            assert all(same(x, y) for x, y in zip(got, (*want, *want_grads), strict=True))


@pytest.mark.gpu
def test_first_call_of_a_thread():
    """It may be the thread's first use of CUDA: nothing has made the device's context its own yet."""
    problem = make_problem(case("first", density=1.0), "cuda", torch.bfloat16)
    mask = problem.mask()
    want = problem.run(mask)
    problem.run(mask)  # what it allocates is in the cache behind
    torch.cuda.synchronize()
    found = []
    run_threads([lambda: found.append(problem.run(mask))])  # whose first call of CUDA is for a tensor map
    for got, expected in zip(found[0], want, strict=True):
        assert same(got, expected)


def two_streams() -> list[torch.cuda.Stream]:
    """Two streams that run beside each other: the device has fewer queues than a program has streams."""
    first = torch.cuda.Stream()
    for _ in range(32):
        second = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(SLEEP // 4)
        with torch.cuda.stream(second):
            torch.ones(1, device="cuda").add_(1)
        second.synchronize()
        if not first.query():
            return [first, second]
    raise AssertionError("no two streams run beside each other")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", METHODS, ids=lambda s: s.name)
def test_streams_that_overlap(spec: Case):
    """The first stream's call, with the mask's first plan, still waits when the second stream's is done."""
    problem = make_problem(spec, "cuda", torch.bfloat16)
    want, want_grads = problem.run(), differentiate(problem)
    grads = upstream(problem, want[1], 7)
    streams = two_streams()
    for stream in streams:  # each gets memory of its own: to allocate it may wait for the device
        with torch.cuda.stream(stream):
            inputs = leaves(problem)
            torch.autograd.grad(attend(*inputs, problem.mask(), return_lse=True), inputs, grads)
    mask = problem.mask()
    torch.cuda.synchronize()
    results = []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            if i == 0:
                torch.cuda._sleep(10 * SLEEP)
            inputs = leaves(problem)  # autograd has the streams of all who use a leaf wait for each other
            out = attend(*inputs, mask, return_lse=True)
            results.append((out, torch.autograd.grad(out, inputs, grads)))
    streams[1].synchronize()
    assert not streams[0].query(), "the streams did not overlap"
    for out, got in (results[1], results[0]):
        assert all(same(x.detach(), y) for x, y in zip(out, want, strict=True))
        assert_same_gradients(got, want_grads, spec)
        streams[0].synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("used", ["never", "on_another_stream", "on_this_stream"])
def test_capture_without_synchronization(used: str, gradients: bool):
    """`capture_begin` waits for nothing: what another stream has yet to make is not there when the graph first runs."""
    problem, other = (make_problem(METHODS[0], "cuda", torch.bfloat16, seed=s) for s in (0, 9))
    other.block_masks = problem.block_masks
    static = [x.detach().clone().requires_grad_(gradients) for x in (problem.q, problem.k, problem.v)]
    grads = upstream(problem, problem.run()[1], 7)

    def call(mask) -> tuple[Tensor, ...]:
        out = attend(*static, mask, return_lse=True)
        return (*out, *torch.autograd.grad(out, static, grads)) if gradients else out

    mask = problem.mask()
    busy, capturing = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(capturing):
        call(problem.mask())  # a warm-up, with another mask
    torch.cuda.synchronize()
    if used == "on_another_stream":
        with torch.cuda.stream(busy):
            torch.cuda._sleep(10 * SLEEP)
            call(mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(capturing):
        if used == "on_this_stream":
            call(mask)
        graph.capture_begin()
        result = call(mask)
        graph.capture_end()
        graph.replay()
    capturing.synchronize()

    def check(p: Problem) -> None:
        out, lse = (x.detach() for x in result[:2])
        judge(p, out, lse)
        if gradients:
            judge_gradients(p, result[2:])

    check(problem)
    with torch.no_grad():
        for target, value in zip(static, (other.q, other.k, other.v), strict=True):
            target.copy_(value)
    torch.cuda.synchronize()
    with torch.cuda.stream(capturing):
        graph.replay()
    torch.cuda.synchronize()
    check(other)
    judge(problem, *problem.run(mask))  # the mask is as good as before


@pytest.mark.gpu
def test_two_graphs_of_one_mask():
    """A plan that a graph makes belongs to that graph."""
    problem = make_problem(case("graphs", causal=True), "cuda", torch.bfloat16)
    mask = problem.mask()
    problem.run()
    torch.cuda.synchronize()
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(problem.run(mask))
    graphs[1].replay()
    torch.cuda.synchronize()
    judge(problem, *results[1])
    del graphs[0]
    graphs[0].replay()
    torch.cuda.synchronize()
    judge(problem, *results[1])
