"""Masks of single tokens that stay lists: the same as masks of bits, whatever the size of a chunk."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import cases
import hbsattn
from cases import Case, case
from gradients import attend, judge_gradients, leaves, upstream
from hbsattn import _chunks
from problems import cu_seqlens, judge, make_problem, same

TOKENS = {"q_block": 1, "source": "indices"}
SPECS = [
    case("packed", lens_q=(40, 3, 25), k_block=16, heads_q=8, heads_k=2, mask_heads=2, causal=True, **TOKENS),
    case("zero_length", lens_q=(0, 30, 0, 9, 0), lens_k=(20, 50, 0, 0, 30), k_block=32, **TOKENS),
    case("q_longer", lens_q=(50, 20), lens_k=(13, 40), k_block=16, causal=True, density=0.8, **TOKENS),
    case("batched", lens_q=(33, 33), lens_k=(70, 70), k_block=16, packed=False, causal=True, **TOKENS),
    case("shared", lens_q=(33, 33), lens_k=(70, 70), k_block=48, packed=False, form="shared", **TOKENS),
    case("one_head", lens_q=(64,), k_block=7, heads_q=4, heads_k=4, mask_heads=1, causal=True, **TOKENS),
]


def by_name(spec: Case) -> str:
    return spec.name


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.fixture
def keep_lists(monkeypatch: pytest.MonkeyPatch):
    """Every mask of lists stays one, where it can."""
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_chunks(spec: Case, rows: int, device: str, monkeypatch: pytest.MonkeyPatch):
    problem = make_problem(spec, device, dtype_of(device))
    plain = problem.mask()
    assert plain._lists is None
    row_bytes = plain.bits.numel() * 4 // plain.rows * (1 if spec.packed else plain.batch)
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", rows * row_bytes)
    mask = problem.mask()
    assert mask._lists is not None and mask._bits is None
    assert same(mask.bits, plain.bits) and mask.density == plain.density
    assert same(mask.to_dense(), plain.to_dense())
    assert repr(mask) == repr(plain).replace(f", density={plain.density:.3g}", "")

    assert not mask._makes_bits()
    judge(problem, *problem.run(mask))
    inputs = leaves(problem)
    out, lse = attend(*inputs, mask, return_lse=True)
    assert mask._makes_bits()
    kept = mask._kept_bits()
    attend(*inputs, mask)
    assert mask._kept_bits() is kept
    assert all(same(x, y) for x, y in zip(problem.run(mask), problem.run(plain), strict=True))
    judge_gradients(problem, torch.autograd.grad((out, lse), inputs, upstream(problem, lse.detach(), 7)))


def test_which_masks_stay_lists():
    million = 1 << 20
    assert _chunks.stays_lists(1, 4, million, 8192, 4 * million * 16)
    assert not _chunks.stays_lists(2, 4, million, 8192, 4 * million * 16)  # rows are not tokens
    assert not _chunks.stays_lists(1, 4, 8192, 64, 4 * 8192 * 16)  # bits are few
    assert not _chunks.stays_lists(1, 4, million, 1024, 4 * million * 16)  # lists are no smaller


@pytest.mark.parametrize("device", cases.DEVICES)
def test_wrong_tensors(device: str, keep_lists: None):
    problem = make_problem(SPECS[0], device, dtype_of(device))
    mask = problem.mask()
    for q in (torch.cat([problem.q, problem.q[:1]]), problem.q[:64]):
        expected = "at least 68" if device == "cpu" and len(q) < 68 else "65 to 68, as mask has 68 lists"
        with pytest.raises(ValueError, match=f"q has {len(q)} rows; expected {expected}"):
            hbsattn.block_sparse_attention(q, problem.k, problem.v, mask)
    with pytest.raises(TypeError, match="k has dtype"):
        hbsattn.block_sparse_attention(problem.q, problem.k.double(), problem.v, mask)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_padded_lists_of_packed_tensors(device: str, keep_lists: None):
    """Their rows are not those of q, so they become bits, however many."""
    spec = case("padded", lens_q=(20, 7), k_block=16, form="batched", **TOKENS)
    problem = make_problem(spec, device, dtype_of(device))
    assert problem.mask()._lists is None
    judge(problem, *problem.run(problem.mask()))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_other_calls(head_dim: int, device: str, keep_lists: None, monkeypatch: pytest.MonkeyPatch):
    """Strides, a head dim that is padded, a mask that was moved or copied."""
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 512)
    spec = dataclasses.replace(SPECS[0], head_dim=head_dim, layout="padded")
    problem = make_problem(spec, device, dtype_of(device))
    mask = problem.mask()
    for other in (mask.to(device), mask.to("cpu").to(device), copy.deepcopy(mask)):
        assert other._lists is not None and not other._makes_bits()
        judge(problem, *problem.run(other))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_compiled(device: str, keep_lists: None):
    """All bits, so that lengths do not matter to the graph."""
    torch._dynamo.reset()
    compiled = torch.compile(hbsattn.block_sparse_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (40, 23, 57, 90):
            problem = make_problem(dataclasses.replace(SPECS[0], lens_q=(n, 3, 25)), device, dtype_of(device))
            mask = problem.mask()
            assert mask._lists is not None
            out, lse = compiled(problem.q, problem.k, problem.v, mask, return_lse=True)
            judge(problem, out, lse)


@pytest.mark.gpu
def test_graph_replay(keep_lists: None, monkeypatch: pytest.MonkeyPatch):
    """Chunks are captured like any other call."""
    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 512)
    problem, other = (make_problem(SPECS[0], "cuda", torch.bfloat16, seed=seed) for seed in (0, 9))
    other.block_masks = problem.block_masks
    mask = problem.mask()
    static = [x.clone() for x in (problem.q, problem.k, problem.v)]
    hbsattn.block_sparse_attention(*static, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hbsattn.block_sparse_attention(*static, mask, return_lse=True)
    for p in (problem, other):
        for target, value in zip(static, (p.q, p.k, p.v), strict=True):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        judge(p, out, lse)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_tokens():
    """Each attends to 16 blocks of 128, in 4 key heads; sampled rows against the formula."""
    tokens, heads_k, group, width = 1 << 20, 4, 4, 16
    generator = torch.Generator(device="cuda").manual_seed(3)
    counts = torch.full((heads_k, tokens), width, dtype=torch.int32, device="cuda")
    indices = torch.randint(0, tokens // 128, (heads_k, tokens, width), device="cuda", generator=generator)
    lens = cu_seqlens((tokens,), "cuda")
    longest = {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
    mask = hbsattn.BlockMask.from_indices(
        counts, indices, 1, 128, cu_seqlens_q=lens, cu_seqlens_k=lens, **longest, causal=True
    )
    assert mask._lists is not None
    q = torch.randn(tokens, heads_k * group, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    k, v = (torch.randn(tokens, heads_k, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in "kv")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = hbsattn.block_sparse_attention(q, k, v, mask)
    taken = torch.cuda.max_memory_allocated() - before
    # The result, its log-sum-exp, and of one chunk bits, lists and the result.
    assert taken < out.numel() * out.element_size() + (800 << 20), f"{taken} bytes"
    for row in (0, 1, 127, 128, 65535, 65536, 500_003, tokens - 1):
        for head in (0, heads_k * group - 1):
            blocks = indices[head // group, row].unique()
            keys = (blocks.unsqueeze(-1) * 128 + torch.arange(128, device="cuda")).flatten()
            keys = keys[keys <= row]
            want = torch.zeros(128, device="cuda", dtype=torch.float64)
            if len(keys):
                scores = k[keys, head // group].double() @ q[row, head].double() * 128**-0.5
                want = scores.softmax(0) @ v[keys, head // group].double()
            assert (out[row, head].double() - want).abs().max() < 2e-2
