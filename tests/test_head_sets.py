"""Gradients where tiles of several sets of queries have the same keys, and pass sums on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import hbsattn
from cases import Case, case
from gradients import attend, differentiate, judge_gradients, leaves, upstream
from problems import make_problem, same
from test_key_plan import plan_lines, tile_heads


def by_name(x: object) -> str | None:
    return x.name if isinstance(x, Case) else None


# Groups of heads whose queries outgrow the L2 cache, or that would if their blocks were full: several tiles add up the
# gradients of the same keys.
GROUP = {"heads_q": 8, "heads_k": 1, "mask_heads": 1}
WIDE_BLOCK = 8208  # above head dim 128, blocks that fill tiles of 128 have no sets
STACKED_BLOCK = 8202  # heads are streamed as one
FEW = {**GROUP, "q_block": 8192, "lens_q": (100, 37), "lens_k": (300, 70)}
SETS_OF_HEADS = [
    case("shared", lens_q=(4200,), q_block=128, k_block=128, head_dim=128, density=0.1, **GROUP),
    case("causal", lens_q=(4200,), q_block=64, k_block=128, head_dim=128, density=0.1, causal=True, **GROUP),
    case("in_parts", pattern="one_column", lens_q=(4200,), q_block=128, k_block=128, head_dim=128, **GROUP),
    case("wide", lens_q=(2600,), q_block=80, k_block=48, head_dim=256, density=0.1, **GROUP),
    case("own_masks", k_block=16, head_dim=128, **{**FEW, "mask_heads": 8}),
    case("two_key_heads", k_block=128, head_dim=128, **{**FEW, "heads_q": 16, "heads_k": 2, "mask_heads": 2}),
    case("padded_head_dim", k_block=100, head_dim=120, causal=True, **FEW),
    case("copied_head_dim", k_block=128, head_dim=100, **{**FEW, "q_block": 23040}),  # as 104: 1 head a tile, not 2
    case("batched", k_block=80, head_dim=96, packed=False, **{**FEW, "lens_q": (90, 90), "lens_k": (300, 300)}),
    case("head_dim_64", k_block=128, head_dim=64, **{**FEW, "q_block": 16384}),
    case("head_dim_192", k_block=32, head_dim=192, causal=True, **{**FEW, "q_block": WIDE_BLOCK}),
    case("views", k_block=128, head_dim=128, layout="padded", **FEW),
]


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SETS_OF_HEADS, ids=by_name)
def test_sets_of_heads(spec: Case, dtype: torch.dtype):
    problem = make_problem(spec, "cuda", dtype)
    mask = problem.mask()
    assert tile_heads(spec, mask, spec.head_dim) < spec.heads_q // spec.heads_k
    if spec.name == "in_parts":
        assert int(plan_lines(spec, mask, spec.head_dim)[:, 14].max()) > 1
    judge_gradients(problem, differentiate(problem, mask=mask))
    first, again = (differentiate(problem, mask=mask, deterministic=True) for _ in range(2))
    judge_gradients(problem, first)
    assert all(same(x, y) for x, y in zip(first, again, strict=True))


# Stacks of heads whose queries outgrow it: tiles go through each sequence window by window.
STACK = {"heads_q": 16, "heads_k": 1, "mask_heads": 1, "q_block": 1, "head_dim": 128}
WINDOWS = [
    case("tokens", lens_q=(6000, 130), causal=True, density=0.2, **STACK),
    case("two_key_heads", lens_q=(1500,) * 2, packed=False, density=0.1, **{**STACK, "heads_q": 64, "heads_k": 2}),
    case("in_parts", lens_q=(6000,), lens_k=(1500,), pattern="one_column", k_block=128, **STACK),
    case("wide", lens_q=(3000, 40), lens_k=(500, 70), k_block=48, density=0.3, **{**STACK, "head_dim": 256}),
    case("long_blocks", lens_q=(600, 600, 60), k_block=128, **{**STACK, "q_block": 200, "heads_q": 128}),
]


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", WINDOWS, ids=by_name)
def test_windows_of_queries(spec: Case, dtype: torch.dtype):
    problem = make_problem(spec, "cuda", dtype)
    mask = problem.mask()
    lines = plan_lines(spec, mask, spec.head_dim)
    assert tile_heads(spec, mask, spec.head_dim) == spec.heads_q // spec.heads_k
    assert int(lines[:, 2].max()) >= spec.heads_k
    if spec.name == "in_parts":
        assert int(lines[:, 14].max()) > 1
    judge_gradients(problem, differentiate(problem, mask=mask))
    first, again = (differentiate(problem, mask=mask, deterministic=True) for _ in range(2))
    judge_gradients(problem, first)
    assert all(same(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_sets_of_heads_again_and_again():
    """More tiles than run at once, several sequences, every run another order: the sums are those of all sets."""
    lens = (700, 130, 1, 517)
    spec = case("again", lens_q=lens, k_block=128, head_dim=128, causal=True, density=0.5, **{**GROUP, "q_block": 8192})
    problem = make_problem(dataclasses.replace(spec, heads_q=64, heads_k=8, mask_heads=8), "cuda", torch.float16)
    mask = problem.mask()
    first = differentiate(problem, mask=mask)
    judge_gradients(problem, first)
    for _ in range(100):  # a set that is left out, or comes twice, is a large part of the whole
        for got, want in zip(differentiate(problem, mask=mask), first, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("q_block", [WIDE_BLOCK, STACKED_BLOCK])
@pytest.mark.parametrize("lie", [(0, 337, 0, 337), (0, 128, 64, 192), (337, 200, 100, 0), (0, 0, 0, 337)])
def test_lying_lengths_of_sets(lie: tuple[int, ...], q_block: int, head_dim: int):
    """Sequences that share keys: gradients mean nothing, but they come, and inputs stay."""
    spec = case("lies", lens_q=(100, 37, 200), k_block=128, head_dim=head_dim, **{**GROUP, "q_block": q_block})
    problem = make_problem(spec, "cuda", torch.bfloat16)
    before = [x.clone() for x in (problem.q, problem.k, problem.v)]
    lens = torch.tensor(lie, dtype=torch.int32, device="cuda")
    columns = sum(-(-n // 128) for n in spec.lens_q)
    block_mask = torch.ones((1, 3, columns), dtype=torch.bool, device="cuda")
    mask = hbsattn.BlockMask.from_dense(block_mask, q_block, 128, cu_seqlens_q=lens, cu_seqlens_k=lens)
    assert (tile_heads(spec, mask, head_dim) < 8) == (q_block == WIDE_BLOCK)
    inputs = leaves(problem)
    grads = torch.autograd.grad(attend(*inputs, mask).sum(), inputs)
    torch.cuda.synchronize()
    assert all(x.shape == y.shape for x, y in zip(grads, inputs, strict=True))
    assert all(same(x, y) for x, y in zip(before, (problem.q, problem.k, problem.v), strict=True))


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("q_block", [WIDE_BLOCK, STACKED_BLOCK])
def test_neighbours_of_sets(q_block: int, head_dim: int, causal: bool):
    """A sequence of NaN between two others, whose tiles end in it."""
    lens = (100, 61, 70)
    blocks = {**GROUP, "q_block": q_block, "k_block": 128, "density": 1.0}
    spec = case("neighbours", lens_q=lens, head_dim=head_dim, causal=causal, **blocks)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    assert (tile_heads(spec, mask, head_dim) < 8) == (q_block == WIDE_BLOCK)
    clean = differentiate(problem, mask=mask)
    poisoned = slice(lens[0], lens[0] + lens[1])
    for x in (problem.q, problem.k, problem.v):
        x[poisoned] = math.nan
    inputs = leaves(problem)
    out = attend(*inputs, mask, return_lse=True)
    grads = upstream(problem, out[1].detach(), 7)
    grads[0][poisoned] = math.nan
    keep = torch.ones(sum(lens), dtype=torch.bool)
    keep[poisoned] = False
    for got, want in zip(torch.autograd.grad(out, inputs, grads), clean, strict=True):
        torch.testing.assert_close(got[keep], want[keep])


@pytest.mark.gpu
def test_graph_replay_of_sets():
    """Every replay starts with counters at 0."""
    problem = make_problem(SETS_OF_HEADS[5], "cuda", torch.bfloat16)
    mask = problem.mask()
    inputs = leaves(problem)
    grads = upstream(problem, problem.run(mask)[1], 7)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(attend(*inputs, mask, return_lse=True), inputs, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(attend(*inputs, mask, return_lse=True), inputs, grads)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        judge_gradients(problem, got)
