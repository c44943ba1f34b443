"""The demo: `python -m hbsattn` runs block-sparse attention over a packed batch, checks it and times it.

Sequences of different lengths lie one after another. For each key head and query block, mean-pooled queries and keys
score the key blocks, and the best ones stay. The result is compared with dense attention under the same mask in
float64, and the time with dense attention over everything.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import hbsattn


@dataclass(frozen=True)
class Workload:
    device: str
    dtype: torch.dtype
    lengths: tuple[int, ...]
    heads_q: int
    heads_k: int
    head_dim: int
    q_block: int
    k_block: int
    keep: float  # share of the visible key blocks that each query block keeps
    check_rows: int  # query rows that the check holds scores for at a time
    runs: int


GPU = Workload("cuda", torch.bfloat16, (16384, 9000, 4096, 2500, 777), 32, 8, 128, 128, 64, 0.1, 1024, 21)
CPU = Workload("cpu", torch.float32, (4096, 2500, 1100, 77), 8, 2, 64, 128, 64, 0.1, 512, 5)


def say(text: str) -> None:
    print(text, flush=True)


def step(number: int, text: str) -> None:
    say(f"[{number}/5] {text}")


def choose_workload(device: str) -> Workload:
    """The GPU's workload if hbsattn runs there: one tiny call tells."""
    if device != "cpu" and (device == "cuda" or torch.cuda.is_available()):
        try:
            x = torch.zeros(1, 16, 1, GPU.head_dim, dtype=GPU.dtype, device="cuda")
            block_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
            hbsattn.block_sparse_attention(x, x, x, hbsattn.BlockMask.from_dense(block_mask, 16, 16))
            return GPU
        except ValueError as error:
            if device == "cuda":
                raise
            say(f"No GPU that hbsattn can use ({error}); running on the CPU backend.")
    elif device != "cpu":
        say("No GPU here; running on the CPU backend.")
    return CPU


def make_tensors(w: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v whose tokens drift between topics, so that attention has something to find."""
    total, group = sum(w.lengths), w.heads_q // w.heads_k
    topics = 0.9 * torch.randn(24, w.heads_k, w.head_dim, device=w.device)
    segments = torch.randint(len(topics), (math.ceil(total / 150),), device=w.device).repeat_interleave(150)[:total]
    topic = topics[segments]
    q = torch.randn(total, w.heads_q, w.head_dim, device=w.device) + topic.repeat_interleave(group, 1)
    k = torch.randn(total, w.heads_k, w.head_dim, device=w.device) + topic
    v = torch.randn(total, w.heads_k, w.head_dim, device=w.device)
    return q.to(w.dtype), k.to(w.dtype), v.to(w.dtype)


def pool(x: Tensor, block: int) -> Tensor:
    """Means of the blocks of one sequence: (length, heads, head_dim) -> (heads, blocks, head_dim), float32."""
    index = torch.arange(x.shape[0], device=x.device) // block
    sums = x.new_zeros(math.ceil(x.shape[0] / block), *x.shape[1:], dtype=torch.float32).index_add_(0, index, x.float())
    return (sums / torch.bincount(index).view(-1, 1, 1)).transpose(0, 1)


def choose_blocks(w: Workload, q: Tensor, k: Tensor) -> Tensor:
    """Chooses the key blocks of one sequence: bool (heads_k, q blocks, k blocks)."""
    pooled_q = pool(q, w.q_block).unflatten(0, (w.heads_k, -1)).mean(1)
    scores = pooled_q @ pool(k, w.k_block).mT
    first = torch.arange(scores.shape[1], device=q.device).unsqueeze(-1) * w.q_block
    last = (first + w.q_block).clamp(max=q.shape[0]) - 1
    column = torch.arange(scores.shape[2], device=q.device)
    visible = column * w.k_block <= last
    rank = scores.masked_fill(~visible, -torch.inf).argsort(-1, descending=True).argsort(-1)
    best = rank < torch.ceil(w.keep * visible.sum(-1, keepdim=True))
    diagonal = (column + 1) * w.k_block > first
    return (best | (column == 0) | diagonal) & visible


@dataclass
class Report:
    out_error: float  # of hbsattn, against float64
    lse_error: float
    torch_error: float  # of the formula in PyTorch in the input's dtype, against float64
    mass: float  # share of dense attention that the kept blocks hold, on average


def compare(
    w: Workload, q: Tensor, k: Tensor, v: Tensor, block_masks: list[Tensor], out: Tensor, lse: Tensor
) -> Report:
    """Compares out and lse with dense attention under the same mask, in float64, some rows of a head at a time."""
    scale, group = w.head_dim**-0.5, w.heads_q // w.heads_k
    out_errors, lse_errors, torch_errors, masses = [], [], [], []
    begin = 0
    for length, block_mask in zip(w.lengths, block_masks, strict=True):
        key = torch.arange(length, device=q.device)
        for head in range(w.heads_q):
            keys, values = (x[begin : begin + length, head // group] for x in (k, v))
            for first in range(0, length, w.check_rows):
                row = torch.arange(first, min(first + w.check_rows, length), device=q.device)
                causal = key <= row.unsqueeze(-1)
                visible = block_mask[head // group, row // w.q_block][:, key // w.k_block] & causal
                queries = q[begin + row, head]
                scores = (queries.double() @ keys.double().mT * scale).masked_fill_(~causal, -torch.inf)
                all_lse = scores.logsumexp(-1)
                scores.masked_fill_(~visible, -torch.inf)
                exact, exact_lse = scores.softmax(-1) @ values.double(), scores.logsumexp(-1)
                rough = (queries @ keys.mT * scale).masked_fill_(~visible, -torch.inf).softmax(-1) @ values
                out_errors.append((out[begin + row, head] - exact).abs().max())
                lse_errors.append((lse[head, begin + row] - exact_lse).abs().max())
                torch_errors.append((rough - exact).abs().max())
                masses.append((exact_lse - all_lse).exp().sum())
        begin += length
        say(f"      length {length}: max error so far {torch.stack(out_errors).max():.2e}")
    # Tensors take the maximum, as theirs keeps a NaN.
    out_error, lse_error, torch_error = (float(torch.stack(e).max()) for e in (out_errors, lse_errors, torch_errors))
    return Report(out_error, lse_error, torch_error, float(sum(masses)) / (w.heads_q * begin))


def time_once(device: str, call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    # A rest before each launch: under a power limit the clock otherwise depends on what ran before.
    torch.cuda.synchronize()
    time.sleep(0.02)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_alternating(device: str, calls: list[Callable[[], object]], runs: int) -> list[float]:
    """The median milliseconds of each call, one call after the other in every run."""
    for call in calls:
        call()
    times = [[time_once(device, call) for call in calls] for _ in range(runs)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def dense_call(w: Workload, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, Callable[[], object]]:
    """Dense causal attention of each sequence with PyTorch's fastest backend, K and V repeated for all query heads
    beforehand."""
    group = w.heads_q // w.heads_k
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
    sequences = list(zip(*(x.split(w.lengths, dim=2) for x in heads), strict=True))

    def run() -> None:
        for sequence in sequences:
            scaled_dot_product_attention(*sequence, is_causal=True)

    if w.device == "cpu":
        return "SDPA", run

    best = ("SDPA", run, math.inf)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def run_backend(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                run()

        try:
            (elapsed,) = time_alternating(w.device, [run_backend], 3)
        except RuntimeError:  # not in this build of PyTorch
            continue
        if elapsed < best[2]:
            best = (f"SDPA ({backend.name.lower()})", run_backend, elapsed)
    return best[:2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hbsattn", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    w = choose_workload(parser.parse_args().device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if w.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"hbsattn on {name}, torch {torch.__version__}")

    step(1, f"packed sequences of {', '.join(map(str, w.lengths))} tokens, {w.heads_q} query and {w.heads_k} key heads")
    say(f"      of dimension {w.head_dim}, {str(w.dtype).removeprefix('torch.')}, causal")
    q, k, v = make_tensors(w)
    cu_seqlens = torch.tensor([0, *w.lengths], device=w.device).cumsum(0, dtype=torch.int32)

    step(
        2,
        f"choosing key blocks of {w.k_block} for query blocks of {w.q_block}, the best {w.keep:.0%} for each key head",
    )
    block_masks = [choose_blocks(w, *x) for x in zip(q.split(w.lengths), k.split(w.lengths), strict=True)]
    block_mask = torch.stack([torch.block_diag(*heads) for heads in zip(*block_masks, strict=True)]).bool()

    def build_mask() -> hbsattn.BlockMask:
        return hbsattn.BlockMask.from_dense(
            block_mask,
            w.q_block,
            w.k_block,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_k=max(w.lengths),
            causal=True,
        )

    mask = build_mask()
    say(
        f"      {mask.heads} heads of {mask.rows} query blocks, which keep {mask.density:.1%} of the visible key blocks"
    )

    step(3, "attention")
    out, lse = hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)

    step(4, "comparing with dense attention under the same mask, in float64")
    report = compare(w, q, k, v, block_masks, out, lse)
    bound, lse_bound = 2 * report.torch_error + 1e-5, 1e-5 if w.dtype == torch.float32 else 1e-3
    passed = report.out_error <= bound and report.lse_error <= lse_bound  # false for NaN, too
    say(f"      the kept blocks hold {report.mass:.1%} of the dense attention")
    say(f"      output: max error {report.out_error:.2e}, accepted {bound:.2e} (twice PyTorch's in this dtype + 1e-5)")
    say(f"      log-sum-exp: max error {report.lse_error:.2e}, accepted {lse_bound:.0e}")
    say(f"      {'PASS' if passed else 'FAIL'}")
    if not passed:
        return 1

    step(5, f"timing, median of {w.runs} runs, ours and dense alternating")
    dense_name, dense = dense_call(w, q, k, v)
    with torch.no_grad():
        ours_ms, dense_ms, new_ms = time_alternating(
            w.device,
            [
                lambda: hbsattn.block_sparse_attention(q, k, v, mask),
                dense,
                lambda: hbsattn.block_sparse_attention(q, k, v, build_mask()),
            ],
            w.runs,
        )
    dense_flops = 4 * w.head_dim * w.heads_q * sum(n * (n + 1) // 2 for n in w.lengths)
    for label, elapsed, flops in (
        ("hbsattn", ours_ms, mask.flops(w.head_dim, w.heads_q)),
        (f"dense {dense_name}", dense_ms, dense_flops),
    ):
        rate = f"  {flops / elapsed / 1e9:6.0f} TFLOP/s on active pairs" if w.device == "cuda" else ""
        say(f"      {label:28} {elapsed:9.3f} ms{rate}")
    say(f"      {'hbsattn, with a new mask':28} {new_ms:9.3f} ms  the first call of any number")
    if w.device == "cuda":  # the CPU kernel is for correctness
        say(f"      speed-up over dense: {dense_ms / ours_ms:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
