"""Times calls so short that the host decides: what a program waits for before it may go on, beside PyTorch's SDPA.

    python benchmarks/small_calls.py [--json FILE]

*Host*: by the host's clock, a burst of calls that are enqueued on an idle GPU, over their number. All contestants of a
problem take turns, in shuffled order, with garbage collection off. Printed are the least and the median of all bursts:
compare with SDPA's in the same column, as hosts differ by a factor of two.

*GPU*: the way from the bool mask to the result, `from_dense` and the first call, captured in one CUDA graph, so that no
host can be too slow for it. Once with the L2 cache flushed before each replay, once in a row of replays.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import environment
import hbsattn
import timing

BURST = 10  # calls of one sample: enough that reading the clock does not count, too few to fill the queue of launches
WARM_UP = 30  # calls of each contestant before the first sample
REPLAYS = 40  # in a row
LARGEST_ERROR = 0.05  # of bfloat16 results beside SDPA's: a few of their last bits

Call = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    name: str
    batch: int
    seqlen: int
    block: int
    density: float
    causal: bool
    heads: int = 8
    head_dim: int = 128


FEW_TOKENS = Problem("256 tokens", batch=1, seqlen=256, block=64, density=0.5, causal=False)
SHORT = Problem(
    "batch 8, s 1024, density 0.1, causal", batch=8, seqlen=1024, block=128, density=0.1, causal=True, heads=32
)


class Calls:
    """The calls on one problem. All tensors and the ready masks are made before."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (problem.batch, problem.seqlen, problem.heads, problem.head_dim)
        self.problem = problem
        self.qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(3)]
        self.grad = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
        blocks = problem.seqlen // problem.block
        drawn = torch.rand(problem.batch, problem.heads, blocks, blocks, device=device, generator=generator)
        # Its own block is on for each query, so that none is without keys.
        self.block_mask = (drawn < problem.density) | torch.eye(blocks, dtype=torch.bool, device=device)
        # Packed tensors take a flat mask: one sequence of it.
        self.cu_seqlens = torch.tensor([0, problem.seqlen], dtype=torch.int32, device=device)
        self.packed_qkv = [x[0] for x in self.qkv]
        self.batched, self.packed = self.build(), self.build_packed()
        self.leaves = [x.detach().clone().requires_grad_() for x in self.qkv]
        self.dense_qkv = [x.transpose(1, 2) for x in self.qkv]
        self.dense_leaves = [x.transpose(1, 2).detach().clone().requires_grad_() for x in self.qkv]
        self.dense_grad = self.grad.transpose(1, 2)

    def build(self) -> hbsattn.BlockMask:
        problem = self.problem
        return hbsattn.BlockMask.from_dense(self.block_mask, problem.block, problem.block, causal=problem.causal)

    def build_packed(self) -> hbsattn.BlockMask:
        problem, lens = self.problem, self.cu_seqlens
        lengths = {"cu_seqlens_q": lens, "cu_seqlens_k": lens, "max_seqlen_q": problem.seqlen}
        return hbsattn.BlockMask.from_dense(
            self.block_mask[0], problem.block, problem.block, causal=problem.causal, **lengths
        )

    def attend(self) -> Tensor:
        return hbsattn.block_sparse_attention(*self.qkv, self.batched)

    def attend_packed(self) -> Tensor:
        return hbsattn.block_sparse_attention(*self.packed_qkv, self.packed)

    def build_and_attend(self) -> Tensor:
        return hbsattn.block_sparse_attention(*self.qkv, self.build())

    def train(self) -> tuple[Tensor, ...]:
        out = hbsattn.block_sparse_attention(*self.leaves, self.batched)
        return torch.autograd.grad(out, self.leaves, self.grad)

    def dense(self) -> Tensor:
        return scaled_dot_product_attention(*self.dense_qkv, is_causal=self.problem.causal)

    def train_dense(self) -> tuple[Tensor, ...]:
        out = scaled_dot_product_attention(*self.dense_leaves, is_causal=self.problem.causal)
        return torch.autograd.grad(out, self.dense_leaves, self.dense_grad)

    def contestants(self) -> dict[str, Call]:
        calls: dict[str, Call] = {"ready mask, batched": self.attend}
        if self.problem.batch == 1:
            calls["ready mask, packed"] = self.attend_packed
        calls["from_dense"] = self.build
        calls["from_dense and forward"] = self.build_and_attend
        calls["SDPA forward"] = self.dense
        calls["forward and backward"] = self.train
        calls["SDPA forward and backward"] = self.train_dense
        return calls

    def find_error(self) -> float:
        """The largest difference between results of ours and SDPA's with the same mask, element by element."""
        problem = self.problem
        seen = self.block_mask.repeat_interleave(problem.block, 2).repeat_interleave(problem.block, 3)
        if problem.causal:
            seen = seen.tril()
        want = scaled_dot_product_attention(*self.dense_qkv, attn_mask=seen).transpose(1, 2).float()
        results = [self.attend(), self.build_and_attend()]
        if problem.batch == 1:
            results.append(self.attend_packed().unsqueeze(0))
        return max(float((out.float() - want).abs().max()) for out in results)


def time_host(calls: Mapping[str, Call], samples: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Microseconds that the host takes for one call: the least and the median."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(samples):
            shuffle(order)
            for name in order:
                call = calls[name]
                torch.cuda.synchronize()
                call()  # the first one after a wait finds the host's caches cold
                begin = time.perf_counter()
                for _ in range(BURST):
                    call()
                taken[name].append(1e6 * (time.perf_counter() - begin) / BURST)
    finally:
        if enabled:
            gc.enable()
    torch.cuda.synchronize()
    return {name: {"least": min(us), "median": statistics.median(us)} for name, us in taken.items()}


def time_graph(call: Call, timer: timing.Timer, samples: int) -> dict[str, float]:
    """Milliseconds of the GPU for a call that is captured: with the L2 cache flushed before, and in a row."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    empty = torch.cuda.CUDAGraph()
    one = torch.zeros(1, device=result.device)
    with torch.cuda.graph(empty):
        one.add_(1)
    times = timer.spaced({"call": graph.replay, "one tiny kernel": empty.replay}, samples)
    row = timer.span(graph.replay, REPLAYS, 9)
    found = {f"{name}, flushed": value.ms for name, value in times.items()}
    return found | ({"call, in a row": row[0]} if row else {})


def main() -> int:
    parser = argparse.ArgumentParser(description="Times calls that are so short that the host decides.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times here, too")
    parser.add_argument("--samples", type=int, default=200, help="bursts of each contestant; default %(default)s")
    parser.add_argument("--commit", help="what to record as commit where git cannot tell")
    arguments = parser.parse_args()
    if arguments.samples < 1:
        parser.error("--samples is the number of bursts, at least 1")
    if not torch.cuda.is_available():
        print("benchmarks/small_calls.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    described = environment.describe(arguments.commit)
    print("\n".join(environment.lines(described)))
    results: dict[str, object] = {"environment": described, "burst": BURST, "samples": arguments.samples, "host_us": {}}
    for problem in (FEW_TOKENS, SHORT):
        calls = Calls(problem, device)
        error = calls.find_error()
        if not error <= LARGEST_ERROR:
            print(f"{problem.name}: results are {error:.3g} off SDPA's; expected {LARGEST_ERROR}", file=sys.stderr)
            return 1
        print(
            f"\n{problem.name}, {problem.heads} heads, head dim {problem.head_dim}: host, us a call, least and median"
        )
        results["host_us"][problem.name] = times = time_host(calls.contestants(), arguments.samples)
        for name, us in times.items():
            print(f"  {name:28}{us['least']:8.1f}{us['median']:8.1f}")
    print(f"\n{SHORT.name}: GPU, ms from the bool mask to the result, a CUDA graph")
    results["gpu_ms"] = spans = time_graph(Calls(SHORT, device).build_and_attend, timing.Timer(device), 21)
    for name, ms in spans.items():
        print(f"  {name:28}{ms:8.4f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
