"""block_sparse_attention against the oracles, on both backends, under poison."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import cases
import hbsattn
from cases import CASES, DEVICE_DTYPES, Case, case
from oracle import dense
from problems import (
    Problem,
    attended_keys,
    block_masks,
    build_mask,
    compare,
    compare_lse,
    compare_rows,
    cu_seqlens,
    dense_mask,
    judge,
    make_problem,
    same,
)

CUDA_DTYPES = [torch.bfloat16, torch.float16]


def by_name(x: object) -> str | None:
    return x.name if isinstance(x, Case) else None


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", CASES, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    inputs = [x.clone() for x in (problem.q, problem.k, problem.v)]
    out, lse = problem.run()
    judge(problem, out, lse)
    for before, after in zip(inputs, (problem.q, problem.k, problem.v), strict=True):
        assert same(before, after), "an input was modified"


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases.block_size_pairs(), ids=by_name)
def test_block_size_pairs(spec: Case):
    dtype = CUDA_DTYPES[(spec.q_block // 16 + spec.k_block // 16) % 2]
    problem = make_problem(spec, "cuda", dtype)
    judge(problem, *problem.run())


@pytest.mark.parametrize("spec", cases.block_size_pairs()[::7], ids=by_name)
def test_block_size_pairs_on_cpu(spec: Case):
    problem = make_problem(spec, "cpu", torch.float32)
    judge(problem, *problem.run())


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("q_block", [16, 48, 64, 128, 192])
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_groups_share_tiles(q_block: int, group: int, device: str, dtype: torch.dtype):
    """All the ways in which the heads of a group fill tiles, with tails in the middle of a tile."""
    for mask_heads, causal in itertools.product((1, 2, 2 * group), (False, True)):
        spec = case(
            "groups",
            heads_q=2 * group,
            heads_k=2,
            mask_heads=mask_heads,
            q_block=q_block,
            k_block=32,
            lens_q=(q_block + 3, q_block - 1, 1),
            lens_k=(65, 200, 31),
            causal=causal,
            head_dim=64,
            density=0.6,
        )
        problem = make_problem(spec, device, dtype)
        judge(problem, *problem.run())


@pytest.mark.parametrize("device", cases.DEVICES)
def test_no_batch(device: str):
    mask = hbsattn.BlockMask.from_dense(
        torch.zeros((0, 1, 2, 3), dtype=torch.bool, device=device), 64, 32, seqlen_q=100, seqlen_k=70
    )
    q = torch.randn((0, 100, 4, 64), device=device, dtype=torch.bfloat16)
    k = torch.randn((0, 70, 2, 64), device=device, dtype=torch.bfloat16)
    out, lse = hbsattn.block_sparse_attention(q, k, k, mask, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 4, 100)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_default_returns_out_alone(device: str, dtype: torch.dtype):
    problem = make_problem(case("default"), device, dtype)
    out = hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, problem.mask())
    assert isinstance(out, torch.Tensor)
    judge(problem, out, None)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_constructors_agree(packed: bool, device: str, dtype: torch.dtype):
    lens = (130, 40, 200) if packed else (130, 130, 130)
    spec = case("constructors", lens_q=lens, lens_k=lens[::-1], packed=packed, q_block=32, k_block=16, causal=True)
    problem = make_problem(spec, device, dtype)
    forms = ["flat", "batched"] if packed else ["batched"]
    masks = [problem.mask(form=f, source=s) for f in forms for s in ("dense", "indices")]
    masks.append(problem.mask(source="csr"))
    results = [problem.run(mask) for mask in masks]
    judge(problem, *results[0])
    for out, lse in results[1:]:
        assert same(out, results[0][0]) and same(lse, results[0][1])


# Poison


POISONED = [
    case("packed", density=0.2, k_block=16, q_block=64, heads_q=8, mask_heads=8),
    case("packed_group_mask", density=0.3, k_block=48, q_block=16, heads_q=8, mask_heads=2),
    case("causal", density=0.2, k_block=32, q_block=128, causal=True, lens_q=(300, 200), mask_heads=2),
    case("q_longer", density=0.4, k_block=64, q_block=64, causal=True, lens_q=(300, 200), lens_k=(100, 90)),
    case("batched", density=0.2, lens_q=(250, 250), lens_k=(260, 260), packed=False, k_block=80, layout="padded"),
    case("batched_causal", density=0.2, lens_q=(250, 250), packed=False, k_block=16, causal=True),
    case("empty", pattern="none"),
    case("united", pattern="alike", density=0.2, k_block=16, q_block=16),
    case("united_causal", pattern="alike", density=0.2, k_block=32, q_block=16, causal=True, lens_q=(300, 90)),
]


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["blocks", "keys"])
@pytest.mark.parametrize("spec", POISONED, ids=by_name)
def test_unattended_keys_stay_outside(spec: Case, where: str, value: float, device: str, dtype: torch.dtype):
    """`blocks`: all keys of blocks that no query attends to; `keys`: also those of active blocks that causality hides
    from every query."""
    problem = make_problem(spec, device, dtype, seed=5)
    attended = attended_keys(problem, blocks_alone=where == "blocks")
    keep = torch.cat(attended) if spec.packed else torch.stack(attended)
    for x in (problem.k, problem.v):
        x.masked_fill_(~keep[..., None].to(device), value)
    judge(problem, *problem.run())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("k_block", [16, 48, 128])
def test_neighbours_stay_outside(packed: bool, k_block: int, device: str, dtype: torch.dtype):
    """A sequence of NaN between two others, whose last blocks reach into it and whose first follow it."""
    lens = (75, 61, 70, 64) if packed else (75,) * 4
    spec = case("neighbours", lens_q=lens, q_block=64, k_block=k_block, density=1.0, packed=packed)
    problem = make_problem(spec, device, dtype)
    clean, clean_lse = problem.run()
    judge(problem, clean, clean_lse)
    rows = slice(lens[0], lens[0] + lens[1])
    for x in (problem.q, problem.k, problem.v):
        x[rows if packed else 1] = math.nan
    out, lse = problem.run()
    keep = torch.ones(sum(lens) if packed else 4, dtype=torch.bool)
    keep[rows if packed else 1] = False
    assert same(out[keep], clean[keep])
    assert same(lse[:, keep] if packed else lse[keep], clean_lse[:, keep] if packed else clean_lse[keep])


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
@pytest.mark.parametrize("head_dim", [24, 40, 72, 80, 112, 160, 224])
def test_other_heads_stay_outside(head_dim: int, layout: str, device: str, dtype: torch.dtype):
    """A head of NaN between two others, whose rows lie right before and behind theirs."""
    heads = dict(heads_q=3, heads_k=3, mask_heads=3)
    spec = case("heads", head_dim=head_dim, layout=layout, k_block=128, density=1.0, **heads)
    problem = make_problem(spec, device, dtype)
    clean, clean_lse = problem.run()
    judge(problem, clean, clean_lse)
    for x in (problem.q, problem.k, problem.v):
        x[:, 1] = math.nan
    out, lse = problem.run()
    assert same(out[:, ::2], clean[:, ::2])
    assert same(lse[::2], clean_lse[::2])


# Repeatability, streams, graphs, devices


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_bitwise_repeatable(device: str, dtype: torch.dtype):
    spec = case("repeat", lens_q=(500, 333), lens_k=(700, 129), q_block=64, k_block=48, causal=True)
    problem = make_problem(spec, device, dtype)
    mask = problem.mask()
    first = problem.run(mask)
    for _ in range(50 if device == "cuda" else 2):
        again = problem.run(mask)
        assert same(first[0], again[0]) and same(first[1], again[1])


@pytest.mark.gpu
def test_stream_order():
    """The call runs on the current stream, after what was queued there and without waiting for other streams."""
    problem = make_problem(case("stream", lens_q=(500, 333)), "cuda", torch.bfloat16)
    expected = problem.run()
    late_q, late_mask = torch.zeros_like(problem.q), problem.mask()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late_q.copy_(problem.q)
        out, lse = hbsattn.block_sparse_attention(late_q, problem.k, problem.v, late_mask, return_lse=True)
    stream.synchronize()
    assert same(out, expected[0]) and same(lse, expected[1])


@pytest.mark.gpu
def test_two_streams_share_a_plan():
    spec = case("streams", lens_q=(3000, 2000, 100), q_block=128, k_block=64, causal=True)
    problems = [make_problem(spec, "cuda", torch.bfloat16, seed=s) for s in (0, 1)]
    problems[1].block_masks = problems[0].block_masks
    mask = problems[0].mask()
    expected = [p.run(problems[0].mask()) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(problems[i].run(mask))
    torch.cuda.synchronize()
    for i, runs in enumerate(results):
        for out, lse in runs:
            assert same(out, expected[i][0]) and same(lse, expected[i][1])


@pytest.mark.gpu
def test_no_synchronization():
    """Nothing between the user's mask and the result waits for the device."""
    spec = case("no_sync", lens_q=(500, 333))
    problem = make_problem(spec, "cuda", torch.bfloat16)
    lens = {"cu_seqlens_q": cu_seqlens(spec.lens_q, "cuda"), "cu_seqlens_k": cu_seqlens(spec.keys, "cuda")}
    blocks = [sum(spec.blocks(b)[i] for b in range(2)) for i in (0, 1)]
    dense_mask = torch.ones((4, *blocks), dtype=torch.bool, device="cuda")
    counts = torch.ones((4, blocks[0]), dtype=torch.int32, device="cuda")
    indices = torch.zeros((4, blocks[0], 1), dtype=torch.int32, device="cuda")
    indptr = torch.arange(blocks[0] + 1, dtype=torch.int32, device="cuda").expand(4, -1).contiguous()
    columns = torch.zeros(blocks[0], dtype=torch.int32, device="cuda")
    longest = {"max_seqlen_q": 500, "max_seqlen_k": 500}
    problem.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mask in (
            hbsattn.BlockMask.from_dense(dense_mask, 64, 64, **lens),
            hbsattn.BlockMask.from_indices(counts, indices, 64, 64, **lens, **longest),
            hbsattn.BlockMask.from_csr(indptr, columns, 64, 64, **lens, **longest),
        ):
            problem.run(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_graph_replay(source: str, debug: bool):
    """One captured graph, packing included, replayed with other tensors, masks and lengths."""
    hbsattn.set_debug(debug)
    spec = case("graph", lens_q=(300, 130, 150), q_block=32, k_block=16, heads_q=8, mask_heads=2, causal=True)
    # Other cuts of the same totals; lengths that are multiples of the blocks keep the number of rows.
    cuts = [(300, 130, 150), (300, 130, 150), (44, 514, 22), (332, 98, 150)]
    specs = [dataclasses.replace(spec, lens_q=cut) for cut in cuts]
    assert len({sum(s.blocks(b)[0] for b in range(3)) for s in specs}) == 1
    problems = [make_problem(s, "cuda", torch.bfloat16, seed=i) for i, s in enumerate(specs)]
    rows = sum(spec.blocks(b)[0] for b in range(3))
    width = -(-600 // 16)

    def mask_inputs(problem: Problem) -> list[torch.Tensor]:
        local = torch.zeros((2, rows, width), dtype=torch.bool)
        parts = torch.cat([torch.nn.functional.pad(m, (0, width - m.shape[2])) for m in problem.block_masks], dim=1)
        local[:, : parts.shape[1]] = parts
        if source == "dense":
            padded = torch.zeros((3, 2, 20, width), dtype=torch.bool)
            for b, m in enumerate(problem.block_masks):
                padded[b, :, : m.shape[1], : m.shape[2]] = m
            return [padded.cuda()]
        counts = local.sum(dim=2, dtype=torch.int32)
        order = torch.argsort(~local, dim=2, stable=True).to(torch.int32)
        if source == "indices":
            return [counts.cuda(), order.cuda()]
        ends = counts.flatten().cumsum(0, dtype=torch.int32).reshape(2, rows)
        begins = torch.nn.functional.pad(ends[:-1, -1:], (0, 0, 1, 0))
        listed = order[torch.arange(width) < counts[..., None]]
        room = torch.zeros(2 * rows * width, dtype=torch.int32)
        room[: listed.numel()] = listed
        return [torch.cat([begins, ends], dim=1).cuda(), room.cuda()]

    inputs = [
        [p.q, p.k, p.v, cu_seqlens(p.case.lens_q, "cuda"), cu_seqlens(p.case.keys, "cuda"), *mask_inputs(p)]
        for p in problems
    ]
    static = [x.clone() for x in inputs[0]]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v, cu_q, cu_k, *rest = static
        build = getattr(hbsattn.BlockMask, f"from_{source}")
        longest = {"max_seqlen_q": 20 * 32, "max_seqlen_k": width * 16}
        mask = build(*rest, 32, 16, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, **longest)
        return hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for round_ in range(8):
        i = round_ % len(problems)
        for target, source_tensor in zip(static, inputs[i], strict=True):
            target.copy_(source_tensor)
        graph.replay()
        torch.cuda.synchronize()
        judge(problems[i], out, lse)


@pytest.mark.gpu
def test_graph_of_attention_alone():
    """A mask built before capture; its plan is built by the warm-up or inside the graph."""
    problem = make_problem(case("graph", lens_q=(300, 130), heads_q=8, mask_heads=2), "cuda", torch.bfloat16)
    other = make_problem(problem.case, "cuda", torch.bfloat16, seed=9)
    other.block_masks = problem.block_masks
    for warm in (True, False):
        mask = problem.mask()
        static = [x.clone() for x in (problem.q, problem.k, problem.v)]
        if warm:
            hbsattn.block_sparse_attention(*static, mask)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = hbsattn.block_sparse_attention(*static, mask, return_lse=True)
        for p in (problem, other) * 12:
            for target, value in zip(static, (p.q, p.k, p.v), strict=True):
                target.copy_(value)
            graph.replay()
        torch.cuda.synchronize()
        judge(other, out, lse)
        # Outside the graph the mask still works, whatever was cached on it during capture.
        judge(problem, *problem.run(mask))


@pytest.mark.gpu
def test_other_device_than_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = make_problem(case("device", causal=True), "cuda:1", torch.bfloat16)
    with torch.cuda.device(0):
        out, lse = problem.run()
        assert torch.cuda.current_device() == 0
    judge(problem, out, lse)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_mask_reuse(device: str, dtype: torch.dtype):
    """One mask serves calls of other head counts, head dims and dtypes."""
    spec = case("reuse", mask_heads=2, heads_q=2, heads_k=2, causal=True)
    mask = make_problem(spec, device, dtype).mask()
    for heads_q, heads_k, head_dim in itertools.product((2, 8), (2,), (64, 128)):
        problem = make_problem(
            dataclasses.replace(spec, heads_q=heads_q, heads_k=heads_k, head_dim=head_dim), device, dtype
        )
        judge(problem, *problem.run(mask))


# Hostile lengths


LIES = {
    "short": (0, 50, 60, 200),
    "not_monotone": (0, 200, 60, 337),
    "not_from_zero": (40, 100, 237, 337),
    "all_in_one": (0, 0, 0, 337),
    "overlap": (0, 337, 0, 337),
    "all_end": (337, 337, 337, 337),
    "backwards": (337, 200, 100, 0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("keys", LIES)
@pytest.mark.parametrize("queries", LIES)
@pytest.mark.parametrize("q_block", [32, 8])
def test_lying_lengths(q_block: int, queries: str, keys: str):
    """cu_seqlens that are wrong but within the tensors, on CUDA, where nobody reads them before a launch: no crash, and
    nothing outside the outputs is written. Two heads share 8-row blocks, which may be united."""
    device, dtype = "cuda", CUDA_DTYPES[q_block == 8]
    spec = case("lies", lens_q=(100, 37, 200), q_block=q_block, k_block=48, mask_heads=2)
    problem = make_problem(spec, device, dtype)
    inputs = [x.clone() for x in (problem.q, problem.k, problem.v)]
    rows, cols = (sum(spec.blocks(b)[i] for b in range(3)) for i in (0, 1))
    # Bands right before and after the memory that the output is likely to get.
    size = problem.q.numel()
    bands = [torch.full((size,), 7.0, device=device, dtype=dtype) for _ in range(3)]
    del bands[1]
    cu_q, cu_k = (torch.tensor(LIES[name], dtype=torch.int32, device=device) for name in (queries, keys))
    for causal in (False, True):
        mask = hbsattn.BlockMask.from_dense(
            torch.ones((2, rows, cols), dtype=torch.bool, device=device),
            q_block,
            48,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            causal=causal,
        )
        out, lse = hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, mask, return_lse=True)
        assert out.shape == problem.q.shape and lse.shape == (4, 337)
    torch.cuda.synchronize()
    for band in bands:
        assert bool((band == 7.0).all()), "memory outside the output was written"
    for before, after in zip(inputs, (problem.q, problem.k, problem.v), strict=True):
        assert same(before, after), "an input was modified"


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[1:])  # a CPU refuses it
def test_max_seqlen_k_too_small(device: str, dtype: torch.dtype):
    """Blocks past the bound that the caller gave do not exist, whatever the lists and the lengths say."""
    spec = case("short_bound", lens_q=(100, 37, 200), mask_heads=1, causal=True)
    problem = make_problem(spec, device, dtype)
    rows = sum(spec.blocks(b)[0] for b in range(3))
    mask = hbsattn.BlockMask.from_indices(
        torch.full((1, rows), 4, dtype=torch.int32, device=device),
        torch.arange(4, dtype=torch.int32, device=device).expand(1, rows, 4),
        64,
        64,
        cu_seqlens_q=cu_seqlens(spec.lens_q, device),
        cu_seqlens_k=cu_seqlens(spec.keys, device),
        max_seqlen_q=200,
        max_seqlen_k=128,
        causal=True,
    )
    problem.block_masks = [(torch.arange(spec.blocks(b)[1]) < 2).expand(1, *spec.blocks(b)) for b in range(3)]
    judge(problem, *problem.run(mask))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[1:])  # a CPU refuses it
def test_rows_to_spare(device: str, dtype: torch.dtype):
    """A flat mask with more rows and columns than the sequences have blocks."""
    spec = case("spare", lens_q=(100, 37, 200), heads_q=8, mask_heads=2)
    problem = make_problem(spec, device, dtype)
    block_mask = torch.nn.functional.pad(dense_mask(spec, problem.block_masks, "flat"), (0, 3, 0, 1), value=True)
    lens = cu_seqlens(spec.lens_q, device)
    mask = hbsattn.BlockMask.from_dense(block_mask.to(device), 64, 64, cu_seqlens_q=lens, cu_seqlens_k=lens)
    judge(problem, *problem.run(mask))


# Sizes


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_31_elements():
    """Every tensor holds more than 2^31 elements; rows are sampled, the last ones included."""
    block, heads, head_dim, per_row = 256, 16, 128, 4
    lens = (1000, 2**31 // (heads * head_dim) + 300)
    total = sum(lens)
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn((total, heads, head_dim), device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    assert q.numel() > 2**31
    blocks = [-(-n // block) for n in lens]
    rows = sum(blocks)
    chosen = torch.randint(0, blocks[1], (1, rows, per_row), dtype=torch.int32, device="cuda", generator=generator)
    chosen[:, : blocks[0]] %= blocks[0]
    chosen[..., 0] = torch.cat([torch.arange(n, dtype=torch.int32) for n in blocks]).cuda()
    mask = hbsattn.BlockMask.from_indices(
        torch.full((1, rows), per_row, dtype=torch.int32, device="cuda"),
        chosen,
        block,
        block,
        cu_seqlens_q=cu_seqlens(lens, "cuda"),
        cu_seqlens_k=cu_seqlens(lens, "cuda"),
        max_seqlen_q=lens[1],
        max_seqlen_k=lens[1],
        causal=True,
    )
    out, lse = hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)
    sampled = [0, 999, 1000, 1001, total // 2, total - 600, total - 2, total - 1]
    for row in sampled:
        b = int(row >= lens[0])
        begin = b * lens[0]
        i = row - begin
        active = chosen[0, b * blocks[0] + i // block].unique()
        keys = (active[:, None] * block + torch.arange(block, device="cuda")).flatten()
        keys = begin + keys[keys <= i]
        allowed = torch.ones((1, 1, keys.numel()), dtype=torch.bool, device="cuda")
        results = [
            dense.one_sequence(q[row : row + 1].to(t), k[keys].to(t), v[keys].to(t), allowed, head_dim**-0.5)
            for t in (torch.float64, torch.bfloat16)
        ]
        compare(out[row : row + 1], results[0][0], results[1][0])
        compare_rows(out[row : row + 1], results[0][0], results[1][0], results[0][2])
        compare_lse(lse[:, row : row + 1], results[0][1], results[1][1], torch.bfloat16)
    assert bool(torch.isfinite(lse).all())


LONG = [
    case("long_causal", lens_q=(12000, 20000, 333), q_block=128, k_block=64, density=0.1, causal=True, head_dim=128),
    case("long_small_k", lens_q=(16384,), lens_k=(30011,), q_block=128, k_block=16, density=0.05, head_dim=64),
    case("long_small_q", lens_q=(9001, 4000), q_block=16, k_block=128, density=0.1, causal=True, head_dim=96),
    case("long_group", lens_q=(20000,), q_block=48, k_block=80, density=0.1, heads_q=8, mask_heads=2, head_dim=128),
]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("spec", LONG, ids=by_name)
def test_long_against_triton(spec: Case):
    """Where a dense matrix does not fit, the Triton oracle in float32 is the reference, and the same algorithm at the
    input dtype tells the error that is unavoidable."""
    pytest.importorskip("triton", reason="the Triton oracle needs triton")
    from oracle import triton_attention

    problem = make_problem(spec, "cuda", torch.bfloat16)
    out, lse = problem.run()
    sizes = {"lens_q": spec.lens_q, "lens_k": spec.keys, "causal": spec.causal}
    results = [
        triton_attention.attention(
            problem.q.to(t), problem.k.to(t), problem.v.to(t), problem.block_masks, spec.q_block, spec.k_block, **sizes
        )
        for t in (torch.float32, torch.bfloat16)
    ]
    compare(out, results[0][0], results[1][0])
    compare_lse(lse, results[0][1], results[1][1], torch.bfloat16)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_infinite_logits(device: str, dtype: torch.dtype):
    """Rows whose scores are all -inf, over many key blocks, give NaN, as the formula does; nothing hangs."""
    problem = make_problem(case("minus_inf", lens_q=(200,), density=1.0, k_block=16, head_dim=64), device, dtype)
    problem.q.fill_(1.0)
    problem.k.fill_(-math.inf)
    out, _ = problem.run()
    assert bool((torch.isnan(out) | (out == 0)).all())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_attended_nan_shows(device: str, dtype: torch.dtype):
    problem = make_problem(case("nan", lens_q=(100,), density=1.0), device, dtype)
    problem.q[7] = math.nan
    out, lse = problem.run()
    assert bool(torch.isnan(out[7]).all()) and bool(torch.isnan(lse[:, 7]).all())
    assert bool(torch.isfinite(out[:7]).all()) and bool(torch.isfinite(out[8:]).all())


# Random sweeps


def run_random(seed: int, device: str, dtype: torch.dtype, any_block_size: bool, max_len: int) -> None:
    spec = cases.random_case(seed, any_block_size=any_block_size, max_len=max_len)
    try:
        problem = make_problem(spec, device, dtype, seed=seed)
        judge(problem, *problem.run())
    except Exception as error:
        raise AssertionError(f"seed {seed}, {dtype}, {spec}: {error}") from error


@pytest.mark.parametrize("seed", range(60))
def test_random_on_cpu(seed: int):
    run_random(seed, "cpu", torch.float32, True, 150)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_random_on_gpu(seed: int):
    run_random(seed, "cuda", CUDA_DTYPES[seed % 2], seed % 4 == 0, 700)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_any_small_problem(device: str, dtype: torch.dtype):
    hypothesis = pytest.importorskip("hypothesis", reason="the property test needs hypothesis")
    draw = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        lens=draw.lists(draw.tuples(draw.integers(0, 90), draw.integers(0, 90)), min_size=1, max_size=3),
        heads=draw.tuples(draw.sampled_from([1, 2, 3]), draw.sampled_from([1, 2, 5])),
        mask_heads=draw.sampled_from(["one", "key", "query"]),
        blocks=draw.tuples(draw.integers(1, 5), draw.integers(1, 5)),
        causal=draw.booleans(),
        density=draw.floats(0, 1),
        seed=draw.integers(0, 2**20),
    )
    def check(lens, heads, mask_heads, blocks, causal, density, seed):
        heads_k, group = heads
        spec = case(
            "hypothesis",
            lens_q=tuple(n for n, _ in lens),
            lens_k=tuple(n for _, n in lens),
            heads_q=heads_k * group,
            heads_k=heads_k,
            mask_heads={"one": 1, "key": heads_k, "query": heads_k * group}[mask_heads],
            q_block=blocks[0] * 4,
            k_block=blocks[1] * 3,
            causal=causal,
            density=density,
            head_dim=16,
        )
        problem = make_problem(spec, device, dtype, seed=seed)
        judge(problem, *problem.run())

    check()


def test_head_mapping_by_hand():
    """Two query heads per key head, one key on per mask head: the value that comes back tells which head read what."""
    for mask_heads, expected in ((1, [0, 0, 2, 2]), (2, [0, 0, 3, 3]), (4, [0, 1, 2, 3])):
        v = torch.tensor([[[0.0], [2.0]], [[1.0], [3.0]]]).reshape(1, 2, 2, 1)  # v[key, head] = 2 * head + key
        q, k = torch.ones(1, 1, 4, 1), torch.ones(1, 2, 2, 1)
        block_mask = torch.zeros(1, mask_heads, 1, 2, dtype=torch.bool)
        for h in range(mask_heads):
            block_mask[0, h, 0, h % 2] = True
        mask = hbsattn.BlockMask.from_dense(block_mask, 1, 1, seqlen_q=1, seqlen_k=2)
        out = hbsattn.block_sparse_attention(q, k, v, mask)
        assert out.flatten().tolist() == expected


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_masks_on_another_device(device: str, dtype: torch.dtype):
    spec = case("to", causal=True, lens_q=(130, 70))
    problem = make_problem(spec, device, dtype)
    mask = build_mask(spec, block_masks(spec, 0), "cpu").to(device)
    assert mask.device.type == device
    judge(problem, *problem.run(mask))
