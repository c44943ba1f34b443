"""What only the CPU backend offers: every dtype, head dim and block size, within the memory of one block."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import hbsattn
from cases import Case, case
from gradients import upstream
from hbsattn._cpu.attend import attend, differentiate
from hbsattn._layout import Call, MaskLayout
from oracle import plan
from plans import layout_of, plan_items, uses_sm80
from problems import Problem, judge, make_problem, same

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


def call_of(problem: Problem) -> Call:
    """Blocks keep their size, which a mask would cut to about the length."""
    mask = problem.mask()
    layout = MaskLayout(mask.cols, mask.q_block_size, mask.k_block_size, mask.causal)
    tables = (mask.bits, mask.sequences, mask._rules, mask._partial, mask._matrices, mask._elements)
    return Call(problem.q, problem.k, problem.v, *tables, None, None, layout, True, 0.125, 0.0, 0.0, False)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_does_not_reach_inside(dtype: torch.dtype, autocast: torch.dtype):
    """The precision of the computation is that of the tensors, forward and backward, whatever autocast says."""
    problem = make_problem(case("autocast", causal=True), "cpu", dtype)
    call = call_of(problem)
    want = attend(call)
    grads = upstream(problem, want[1], 3)
    want_grads = differentiate(call, *grads, *want)
    with torch.autocast("cpu", dtype=autocast):
        got = attend(call)
        got_grads = differentiate(call, *grads, *want)
        assert torch.is_autocast_enabled("cpu")
    assert all(same(x, y) for x, y in zip((*got, *got_grads), (*want, *want_grads), strict=True))


@pytest.mark.parametrize("poison_out", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("poison_lse", [math.nan, -math.inf, 1.0])
@pytest.mark.parametrize("keys", [1, 63])
def test_empty_rows_take_no_part(keys: int, poison_lse: float, poison_out: float):
    """Whatever the gradients of a row without keys: those of the inputs are as if it were not there."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, n, 1, 8), generator=generator).requires_grad_() for n in (keys + 1, keys, keys))
    mask = hbsattn.BlockMask.from_dense(
        torch.ones((1, 1, 1, 1), dtype=torch.bool), 64, 64, seqlen_q=keys + 1, seqlen_k=keys, causal=True
    )
    out, lse = hbsattn.block_sparse_attention(q, k, v, mask, return_lse=True)
    assert bool((lse[..., 0] == -math.inf).all()) and bool(torch.isfinite(lse[..., 1:]).all())
    grad_out, grad_lse = torch.randn(out.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    grad_out[:, 0], grad_lse[..., 0] = 0.0, 0.0
    want = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse), retain_graph=True)
    grad_out[:, 0], grad_lse[..., 0] = poison_out, poison_lse
    got = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))
    assert bool((got[0][:, 0] == 0).all())
    assert all(bool(torch.isfinite(x).all()) and same(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("where", ["unattended", "tails", "past_the_sequences"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("packed", [True, False])
def test_what_nobody_attends_to(packed: bool, value: float, where: str):
    """Poisoned rows of no sequence, of no query's keys, past the end of a sequence: results are bitwise the same."""
    lens = (50, 50)
    spec = case("poison", lens_q=lens, q_block=16, k_block=16, heads_q=4, heads_k=2, mask_heads=2, packed=packed)
    problem = make_problem(spec, "cpu", torch.float32)
    for of_sequence in problem.block_masks:
        of_sequence[..., 1] = False
    call = call_of(problem)
    tensors = list(call[:3])
    dim = 0 if packed else 1
    if where != "unattended":  # rows that no sequence covers, at the end; or, of batched tensors, of every sequence
        grown = [(0, 0, 0, 0, 0, 20)] * 3
        tensors = [torch.nn.functional.pad(x, pad) for x, pad in zip(tensors, grown, strict=True)]
    if where == "tails":  # what a sequence leaves is in the middle of the tensors
        tensors = [torch.cat([x.narrow(dim, 0, 50), x.narrow(dim, 50, x.shape[dim] - 50)], dim) for x in tensors]
        call = call._replace(sequences=call.sequences.clone())
        call.sequences[0, 1] = call.sequences[0, 3] = 41

    def run(*x: torch.Tensor) -> list[torch.Tensor]:
        *qkv, grad = x
        of_tensors = Call(*qkv, *call[3:])
        out, lse = attend(of_tensors)
        return [out, lse, *differentiate(of_tensors, grad, torch.ones_like(lse), out, lse)]

    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    want = run(*tensors, grad)
    poisoned = [x.clone() for x in (*tensors, grad)]
    for i, x in enumerate(poisoned):
        if where == "unattended" and i in (1, 2):
            for begin in (0, 50) if packed else (0,):
                x.narrow(dim, begin + 16, 16).fill_(value)
        elif where == "tails":
            (x if packed else x[0]).narrow(0, 41, 9).fill_(value)
        elif where == "past_the_sequences":
            x.narrow(dim, x.shape[dim] - 20, 20).fill_(value)
    got = run(*poisoned)
    assert all(bool(torch.isfinite(x).all()) for i, x in enumerate(got) if i != 1)
    assert all(same(x, y) for x, y in zip(got, want, strict=True))
    if where == "past_the_sequences":
        assert all(bool((got[i].narrow(dim, got[i].shape[dim] - 20, 20) == 0).all()) for i in (0, 2, 3, 4))
        assert bool((got[1][..., -20:] == -math.inf).all())


INT_MAX = 2**31 - 1
LIES = [(0, 10**6), (-5, 300), (0, INT_MAX), (INT_MAX, INT_MAX), (200, 300), (60, -7), (-(2**31), INT_MAX), (337, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", LIES)
@pytest.mark.parametrize("queries", LIES)
def test_lengths_past_the_tensors(queries: tuple[int, int], keys: tuple[int, int], causal: bool):
    """Begins and lengths that lie: what is read and written is inside the tensors, or PyTorch would refuse it."""
    spec = case("lies", lens_q=(100, 37, 200), q_block=32, k_block=48, heads_q=4, heads_k=2, mask_heads=2)
    problem = make_problem(spec, "cpu", torch.float32)
    call = call_of(problem)
    table = call.sequences.clone()
    table[1, :2], table[1, 2:4] = torch.tensor(queries), torch.tensor(keys)
    bits = torch.full_like(call.bits, -1)  # also past the columns
    call = call._replace(sequences=table, bits=bits, layout=call.layout._replace(causal=causal))
    out, lse = attend(call)
    grads = differentiate(call, torch.ones_like(out), torch.ones_like(lse), out, lse)
    assert all(bool(torch.isfinite(x).all()) for x in (out, *grads))


@pytest.mark.parametrize("seed", range(8))
def test_any_mask_is_safe(seed: int):
    generator = torch.Generator().manual_seed(seed)
    packed = seed % 2 == 0
    spec = case(
        "noise", lens_q=(64, 64), q_block=16, k_block=(16, 7)[seed // 4], heads_q=4, mask_heads=4, packed=packed
    )
    problem = make_problem(spec, "cpu", torch.float32)
    call = call_of(problem)
    wild = torch.randint(-(2**31), INT_MAX, call.sequences.shape, generator=generator)
    mild = torch.randint(-30, 150, call.sequences.shape, generator=generator)
    table = torch.where(torch.rand(wild.shape, generator=generator) < 0.3, wild, mild).to(torch.int32)
    bits = torch.randint(-(2**31), INT_MAX, call.bits.shape, generator=generator).to(torch.int32)
    call = call._replace(sequences=table, bits=bits, layout=call.layout._replace(causal=seed % 3 == 0))
    out, lse = attend(call)
    grads = differentiate(call, torch.ones_like(out), None, out, lse)
    assert all(bool(torch.isfinite(x).all()) for x in (out, *grads))


def test_lengths_that_claim_too_much_end_with_the_tensors():
    spec = case("claims", lens_q=(90,), q_block=32, k_block=32, density=1.0)
    problem = make_problem(spec, "cpu", torch.float32)
    call = call_of(problem)
    table = call.sequences.clone()
    table[0, 1] = table[0, 3] = 10**6
    want, got = (attend(x) for x in (call, call._replace(sequences=table)))
    assert all(same(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("claimed_q", [90, 120, 10**6])
@pytest.mark.parametrize("claimed_k", [90, 100, 10**6])
def test_the_diagonal_is_that_of_the_claimed_lengths(claimed_q: int, claimed_k: int):
    spec = case("claims", lens_q=(90,), q_block=32, k_block=32, density=1.0, heads_k=4)
    problem = make_problem(spec, "cpu", torch.float32)
    lens_q, lens_k = (torch.tensor([0, n], dtype=torch.int32) for n in (claimed_q, claimed_k))
    table = torch.ops.hbsattn.make_sequences(lens_q, lens_k, torch.device("cpu"), 1, 0, 0, -1, 32, 32)
    assert table.tolist() == [[0, claimed_q, 0, claimed_k, 0, 0, claimed_k - claimed_q]]
    call = call_of(problem)
    out, lse = attend(call._replace(sequences=table, layout=call.layout._replace(causal=True)))
    scores = 0.125 * problem.q.double().transpose(0, 1) @ problem.k.double().permute(1, 2, 0)
    hidden = torch.arange(90) > torch.arange(90).unsqueeze(-1) + claimed_k - claimed_q
    scores.masked_fill_(hidden, -math.inf)
    want = (scores.softmax(-1).nan_to_num(0) @ problem.v.double().transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_queries_of_a_part():
    """A table of the last queries alone, whose diagonal is moved by as many as are missing."""
    spec = case("part", lens_q=(90,), lens_k=(120,), q_block=32, k_block=32, causal=True)
    problem = make_problem(spec, "cpu", torch.float32)
    call = call_of(problem)
    want = attend(call)
    table = call.sequences.clone()
    table[0, 1] -= 32
    table[0, 6] += 32
    out, lse = attend(call._replace(q=call.q[32:], sequences=table, bits=call.bits[:, 1:]))
    torch.testing.assert_close(out, want[0][32:])
    torch.testing.assert_close(lse, want[1][:, 32:])


def test_bits_past_the_columns_mean_nothing():
    """Also where a length claims that there are keys."""
    spec = case("columns", lens_q=(60, 60), q_block=16, k_block=16, density=1.0, form="batched")
    problem = make_problem(spec, "cpu", torch.float32)
    call = call_of(problem)
    table = call.sequences.clone()
    table[0, 3] = 10**6
    assert call.layout.cols * spec.k_block < sum(spec.lens_q)
    of_columns = torch.full_like(call.bits, 2**call.layout.cols - 1)
    want, got = (
        attend(call._replace(sequences=table, bits=bits)) for bits in (of_columns, torch.full_like(call.bits, -1))
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


class Work(TorchDispatchMode):
    """Counts the operations that run, and the numbers that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.operations += 1
            self.numbers += result.numel()
        return result


def count_work(spec: Case) -> tuple[Work, Work]:
    """Of a forward and of a backward."""
    problem = make_problem(spec, "cpu", torch.bfloat16)
    call = call_of(problem)
    forward, backward = Work(), Work()
    with forward:
        out, lse = attend(call)
    with backward:
        differentiate(call, torch.ones_like(out), None, out, lse)
    return forward, backward


@pytest.mark.parametrize("sizes", [(65536, 65536), (65536, 16), (16, 65536), (1 << 20, 1 << 20)])
def test_blocks_beyond_the_length_cost_nothing(sizes: tuple[int, int]):
    spec = case("huge", lens_q=(17,), density=1.0, mask_heads=2, q_block=sizes[0], k_block=sizes[1])
    problem = make_problem(spec, "cpu", torch.float32)
    judge(problem, *problem.run())
    like = dataclasses.replace(spec, q_block=min(sizes[0], 17), k_block=min(sizes[1], 17))
    for huge, fitting in zip(count_work(spec), count_work(like), strict=True):
        assert huge.numbers <= 1.1 * fitting.numbers and huge.operations <= fitting.operations


def test_short_sequences_beside_a_long_one_stay_cheap():
    spec = case("mixed", lens_q=(17,) * 64, density=1.0, mask_heads=2, q_block=65536, k_block=65536)
    alone, beside = (count_work(dataclasses.replace(spec, lens_q=x)) for x in ((600,), (600, *spec.lens_q)))
    for work, long, short in zip(beside, alone, count_work(spec), strict=True):
        assert work.numbers <= 1.1 * (long.numbers + short.numbers)


@pytest.mark.parametrize("k_block", [1, 64])
def test_token_rows_are_batched(k_block: int):
    """Query blocks of one token: numbers and operations are those of the keys that they attend to."""
    length, keys = 4096, 128
    density = keys / length if k_block == 1 else 2 * k_block / length
    spec = case("tokens", lens_q=(length,), q_block=1, k_block=k_block, heads_q=2, heads_k=2, mask_heads=2)
    spec = dataclasses.replace(spec, density=density, head_dim=64)
    forward, backward = count_work(spec)
    gathered = spec.heads_q * length * keys * spec.head_dim
    assert forward.numbers < 6 * gathered and backward.numbers < 12 * gathered
    assert forward.operations < 5000 and backward.operations < 10000


def test_gradients_of_large_scores():
    """Scores of 2^17, which float32 holds exactly while a log-sum-exp is rounded to 2^-6: weights add up to 1."""
    q = torch.full((1, 4, 1, 1), 2.0**9, dtype=torch.float32)
    k = torch.full((1, 5, 1, 1), 2.0**8, dtype=torch.float32)
    v = torch.arange(5, dtype=torch.float32).view(1, 5, 1, 1).clone()
    mask = hbsattn.BlockMask.from_dense(
        torch.ones((1, 1, 1, 1), dtype=torch.bool), 16, 16, seqlen_q=4, seqlen_k=5, causal=True
    )
    v.requires_grad_()
    out = hbsattn.block_sparse_attention(q, k, v, mask, softmax_scale=1.0)
    (got,) = torch.autograd.grad(out.sum(), v)
    want = [sum(1 / (i + 2) for i in range(4) if j <= i + 1) for j in range(5)]
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["packed_causal", "gqa_8_group", "zero_length_causal", "tails"])
def test_agrees_with_cuda(name: str):
    """Both backends agree on bits exactly and on results within the rule; the list is the oracle's."""
    spec = next(c for c in cases.CASES if c.name == name)
    here, there = (make_problem(spec, device, torch.bfloat16) for device in ("cpu", "cuda"))
    masks = [p.mask() for p in (here, there)]
    assert same(masks[0].bits, masks[1].bits.cpu()) and same(masks[0].sequences, masks[1].sequences.cpu())
    call = (spec.heads_q, spec.heads_k, spec.head_dim, 2, True)
    want = plan.plan_items(masks[0].bits, masks[0].sequences, *layout_of(masks[0])[:4], *call, uses_sm80())
    got = plan_items(masks[1], *call).cpu()
    assert same(*(items[items[:, plan.BLOCKS] > 0] for items in (want, got)))
    judge(here, *here.run(masks[0]))
    judge(there, *there.run(masks[1]))
