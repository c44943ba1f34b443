"""What only the CPU backend offers: every dtype, head dim and block size, within the memory of one block."""

from __future__ import annotations

import pytest
import torch

import cases
import hbsattn
from cases import Case, case
from oracle import plan
from problems import judge, make_problem, same

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

SPECS = [
    case("packed_causal", causal=True, q_block=48, k_block=16, heads_q=8, mask_heads=2),
    case("batched", lens_q=(70, 70), lens_k=(95, 95), packed=False),
    case("zero_length_causal", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True),
    case("empty_rows", pattern="empty_rows", q_block=16),
    case("negative_logits", values="negative", scale=1.0),
    case("hidden_logits", values="hidden", scale=1.0, causal=True),
    case("heads_first", layout="heads_first"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_dtypes(spec: Case, dtype: torch.dtype):
    problem = make_problem(spec, "cpu", dtype)
    out, lse = problem.run()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    judge(problem, out, lse)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 7, 18, 31, 32, 80, 100, 129, 192, 255, 256])
def test_head_dims(head_dim: int):
    problem = make_problem(case("head_dim", head_dim=head_dim, causal=True, lens_q=(70, 33)), "cpu", torch.float32)
    judge(problem, *problem.run())


@pytest.mark.parametrize("k_block", [1, 7, 13, 100, 384])
@pytest.mark.parametrize("q_block", [1, 3, 5, 100, 300])
def test_odd_block_sizes(q_block: int, k_block: int):
    spec = case(
        "odd_blocks",
        q_block=q_block,
        k_block=k_block,
        lens_q=(61, 7, 130),
        lens_k=(40, 91, 130),
        causal=k_block != 7,
        heads_q=6,
        heads_k=2,
        mask_heads=(1, 2, 6)[(q_block + k_block) % 3],
        head_dim=18,
    )
    problem = make_problem(spec, "cpu", torch.float32)
    judge(problem, *problem.run())


def test_one_token_queries_share_a_group():
    """One-token query blocks with the heads of a group packed: the shape of token-selecting models."""
    spec = case("tokens", q_block=1, k_block=64, heads_q=32, heads_k=2, mask_heads=2, lens_q=(90, 40), causal=True)
    problem = make_problem(spec, "cpu", torch.float32)
    judge(problem, *problem.run())


def test_memory_of_one_block():
    """2^17 queries and keys on the diagonal: a dense score matrix would need 68 GB."""
    length, block = 2**17, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((length, 1, 8), generator=generator) for _ in range(3))
    lens = torch.tensor([0, length], dtype=torch.int32)
    blocks = length // block
    counts = torch.ones((1, blocks), dtype=torch.int32)
    indices = torch.arange(blocks, dtype=torch.int32).reshape(1, blocks, 1)
    longest = {"max_seqlen_q": length, "max_seqlen_k": length}
    mask = hbsattn.BlockMask.from_indices(
        counts, indices, block, block, cu_seqlens_q=lens, cu_seqlens_k=lens, **longest, causal=True
    )
    out = hbsattn.block_sparse_attention(q, k, v, mask)
    cut = [x.reshape(blocks, block, 8) for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*cut, is_causal=True)
    torch.testing.assert_close(out.reshape(want.shape), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int):
    before = torch.get_num_threads()
    problem = make_problem(case("threads", causal=True), "cpu", torch.float32)
    try:
        torch.set_num_threads(threads)
        judge(problem, *problem.run())
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["packed_causal", "gqa_8_group", "zero_length_causal", "tails"])
def test_agrees_with_cuda(name: str):
    """Both backends agree on bits exactly and on results within the rule; the list is the oracle's."""
    spec = next(c for c in cases.CASES if c.name == name)
    here, there = (make_problem(spec, device, torch.bfloat16) for device in ("cpu", "cuda"))
    masks = [p.mask() for p in (here, there)]
    assert same(masks[0].bits, masks[1].bits.cpu()) and same(masks[0].sequences, masks[1].sequences.cpu())
    sizes = (masks[0].cols, spec.q_block, spec.k_block, spec.causal, spec.heads_q, spec.heads_k, spec.head_dim, 2, True)
    want = plan.plan_items(masks[0].bits, masks[0].sequences, *sizes)
    got = torch.ops.hbsattn.plan_items(masks[1].bits, masks[1].sequences, *sizes).cpu()
    assert same(*(items[items[:, plan.BLOCKS] > 0] for items in (want, got)))
    judge(here, *here.run(masks[0]))
    judge(there, *there.run(masks[1]))
