"""Masks of single pairs: partial blocks, and the constructors that find them, beside the dense formula."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import cases
from cases import DEVICE_DTYPES, DEVICES, Case, case
from gradients import differentiate, judge_gradients
from hbsattn import BlockMask, _partial, block_sparse_attention, patterns
from masks import counted, mapped
from oracle import dense
from plans import call_of
from problems import Problem, block_masks, cu_seqlens, judge, make_problem, same

ops = torch.ops.hbsattn

WINDOWS = ((0, 0, 5), (-1, -1, 0), (40, 9, 0), (7, -1, 70))
SPECS = [
    case("packed", lens_q=(100, 37, 200)),
    case("packed_causal", causal=True, q_block=128, k_block=128, head_dim=128, lens_q=(300, 129)),
    case("batched", packed=False, lens_q=(150, 150), lens_k=(130, 130), k_block=16),
    case("batched_causal", packed=False, lens_q=(150, 150), lens_k=(210, 210), causal=True, q_block=128),
    case("shared", packed=False, lens_q=(96, 96, 96), form="shared", q_block=32, k_block=48),
    case("one_head", mask_heads=1, heads_q=4, heads_k=1, q_block=16, causal=True),
    case("groups", mask_heads=2, heads_q=8, heads_k=2, q_block=32, k_block=32),
    case("groups_of_odd_blocks", mask_heads=2, heads_q=6, heads_k=2, q_block=7, k_block=13, causal=True),
    case("tokens", **cases.TOKENS, k_block=64, lens_q=(70, 33), causal=True),
    case("single_keys", q_block=100, k_block=1, lens_q=(130,), heads_q=2, mask_heads=1),
    case("long_blocks", q_block=4096, k_block=999, lens_q=(300, 20), lens_k=(170, 90), mask_heads=2),
    case("wide", head_dim=256, q_block=64, k_block=128, lens_q=(200, 65), causal=True),
    case("values", head_dim=96, value_dim=48, q_block=64, k_block=80),
    case("sinks", sinks=True, causal=True, q_block=48),
    case("softcap", softcap=3.0, k_block=32),
    case("dropout", dropout_p=0.3, q_block=48, k_block=16, causal=True),
    case("windows", windows=WINDOWS, causal=True),
    case("windows_of_one_mask", windows=WINDOWS[2:], mask_heads=1, heads_q=4, q_block=16, k_block=48),
    case("everything", windows=WINDOWS, sinks=True, softcap=9.0, dropout_p=0.2, causal=True, k_block=24),
    case("united", pattern="alike", q_block=16, k_block=16, lens_q=(300, 70), density=0.3),
    case("zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0)),
    case("no_sequences", lens_q=()),
    case("no_keys", packed=False, lens_q=(40, 40), lens_k=(0, 0)),
    case("no_queries", packed=False, lens_q=(0, 0), lens_k=(40, 40)),
    case("nothing", pattern="none"),
    case("padded", layout="padded", head_dim=20, causal=True),
    case("many_columns", lens_q=(40, 20), lens_k=(1100, 530), k_block=16, q_block=32, density=0.3),
]


def by_name(spec: Case) -> str:
    return spec.name


def draw_elements(spec: Case, seed: int = 0) -> list[Tensor]:
    """Of each sequence, bool (mask heads, queries, keys): blocks that are off, whole, and of random pairs, of which
    some are alike; rows without any key, too."""
    generator = torch.Generator().manual_seed(seed + 11)
    drawn = []
    for blocks, len_q, len_k in zip(block_masks(spec, seed), spec.lens_q, spec.keys, strict=True):
        own = (spec.q_block, spec.k_block, False)
        on = dense.element_mask(blocks, len_q, len_k, *own)
        kind = torch.randint(0, 3, blocks.shape, generator=generator)
        partial, alike = (dense.element_mask(kind == n, len_q, len_k, *own) for n in (1, 2))
        some = torch.rand((blocks.shape[0], len_q, len_k), generator=generator) < 0.3
        query, key = torch.arange(len_q) % spec.q_block, torch.arange(len_k) % spec.k_block
        on &= (some | ~partial) & ((query[:, None] * 3 >= key) | ~alike)
        on[:, 5:7] = False
        drawn.append(on)
    return (
        [drawn[0][:, :n, :m] for n, m in zip(spec.lens_q, spec.keys, strict=True)] if spec.form == "shared" else drawn
    )


def make_partial(spec: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem of blocks of one pair each, which the oracle knows already."""
    problem = make_problem(spec, device, dtype, seed)
    problem.block_masks = draw_elements(spec, seed)
    problem.case = dataclasses.replace(spec, q_block=1, k_block=1)
    return problem


def flat_elements(masks: list[Tensor]) -> Tensor:
    """What lies beside the diagonal is on: it is to be ignored."""
    if not masks:
        return torch.zeros(4, 0, 0, dtype=torch.bool)
    return torch.stack([~torch.block_diag(*(~x for x in heads)).bool() for heads in zip(*masks, strict=True)])


def lengths_of(spec: Case, device: str) -> dict[str, Any]:
    if not spec.packed:
        return {"batch_size": len(spec.lens_q)} if spec.form == "shared" else {}
    return {"cu_seqlens_q": cu_seqlens(spec.lens_q, device), "cu_seqlens_k": cu_seqlens(spec.keys, device)}


def build(spec: Case, masks: list[Tensor], device: str) -> BlockMask:
    """By from_elements."""
    if spec.packed:
        elements = flat_elements(masks)
    else:
        elements = masks[0].unsqueeze(0) if spec.form == "shared" else torch.stack(masks)
    blocks = (spec.q_block, spec.k_block)
    mask = BlockMask.from_elements(elements.to(device), *blocks, causal=spec.causal, **lengths_of(spec, device))
    return mask.windowed(*map(list, zip(*spec.windows, strict=True))) if spec.windows else mask


def expected_elements(spec: Case, masks: list[Tensor]) -> list[Tensor]:
    """With causality and windows."""
    rule = (1, 1, spec.causal, spec.windows)
    lens = zip(masks, spec.lens_q, spec.keys, strict=True)
    return [dense.element_mask(mask, len_q, len_k, *rule) for mask, len_q, len_k in lens]


def split_elements(spec: Case, elements: Tensor) -> list[Tensor]:
    """What `to_elements` returned, of each sequence."""
    elements = elements.cpu()
    if not spec.packed:
        return list(elements)
    q = k = 0
    parts = []
    for len_q, len_k in zip(spec.lens_q, spec.keys, strict=True):
        parts.append(elements[:, q : q + len_q, k : k + len_k])
        q, k = q + len_q, k + len_k
    return parts


def assert_elements(spec: Case, mask: BlockMask, masks: list[Tensor]) -> None:
    want = expected_elements(spec, masks)
    got = split_elements(spec, mask.to_elements())
    assert len(got) == len(want)
    for of_sequence, wanted in zip(got, want, strict=True):
        assert torch.equal(of_sequence, wanted)
    assert mask.to_elements().sum() == sum(x.sum() for x in want)
    assert mask.flops(1, max(mask.heads, 1)) == 4 * sum(int(x.sum()) for x in want)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    """Results and gradients."""
    problem = make_partial(spec, device, dtype)
    mask = build(spec, problem.block_masks, device)
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("spec", SPECS[::4], ids=by_name)
def test_float64(spec: Case):
    problem = make_partial(spec, "cpu", torch.float64)
    mask = build(spec, problem.block_masks, "cpu")
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_deterministic(spec: Case, dtype: torch.dtype):
    problem = make_partial(spec, "cuda", dtype)
    mask = build(spec, problem.block_masks, "cuda")
    first = differentiate(problem, mask=mask, deterministic=True)
    judge_gradients(problem, first)
    assert all(same(x, y) for x, y in zip(first, differentiate(problem, mask=mask, deterministic=True), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", cases.BACKWARD_METHODS, ids=by_name)
def test_backward_methods(method: Case, causal: bool, deterministic: bool):
    """Every way in which gradients are computed."""
    spec = dataclasses.replace(method, causal=causal, density=0.9)
    problem = make_partial(spec, "cuda", torch.bfloat16)
    mask = build(spec, problem.block_masks, "cuda")
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=deterministic))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_what_a_mask_tells(spec: Case, device: str):
    masks = draw_elements(spec)
    mask = build(spec, masks, device)
    assert_elements(spec, mask, masks)
    if spec.causal or spec.windows:
        return
    blocks = [torch.nn.functional.pad(x, (0, -x.shape[2] % spec.k_block, 0, -x.shape[1] % spec.q_block)) for x in masks]
    blocks = [
        x.unflatten(2, (-1, spec.k_block)).unflatten(1, (-1, spec.q_block)).any(-1).any(2) for x in blocks if x.numel()
    ]
    assert int(mask.to_dense().sum()) == sum(int(x.sum()) for x in blocks)
    assert ("partial=True" in repr(mask)) == (mask._partial is not None)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_any_small_mask(device: str, dtype: torch.dtype):
    hypothesis = pytest.importorskip("hypothesis", reason="the property test needs hypothesis")
    draw = hypothesis.strategies

    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        lens=draw.lists(draw.tuples(draw.integers(0, 200), draw.integers(0, 200)), min_size=1, max_size=3),
        packed=draw.booleans(),
        blocks=draw.tuples(draw.integers(1, 140), draw.integers(1, 140)),
        density=draw.sampled_from((0.02, 0.3, 0.98, 1.0)),
        windows=draw.sampled_from(((), ((20, 30, 3), (-1, 0, 0)))),
        causal=draw.booleans(),
        at_once=draw.sampled_from((1, 1000, 1 << 24)),
        seed=draw.integers(0, 2**20),
    )
    def check(lens, packed, blocks, density, windows, causal, at_once, seed):
        lens = lens if packed else [lens[0]] * len(lens)
        spec = case(
            "hypothesis",
            lens_q=tuple(n for n, _ in lens),
            lens_k=tuple(n for _, n in lens),
            packed=packed,
            mask_heads=2,
            q_block=blocks[0],
            k_block=blocks[1],
            causal=causal,
            head_dim=16,
            windows=windows,
        )
        problem = make_problem(spec, device, dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        problem.block_masks = [torch.rand((2, n, m), generator=generator) < density for n, m in lens]
        problem.case = dataclasses.replace(spec, q_block=1, k_block=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
            mask = build(spec, problem.block_masks, device)
            assert_elements(spec, mask, problem.block_masks)
        judge(problem, *problem.run(mask))
        judge_gradients(problem, differentiate(problem, mask=mask))

    check()


# Blocks that are whole, and matrices that are alike


@pytest.mark.parametrize("device", DEVICES)
def test_whole_blocks_are_not_partial(device: str):
    """What is on wherever lengths and causality let it, is whole, and what is on nowhere there is off."""
    elements = torch.ones(1, 1, 100, 120, dtype=torch.bool, device=device).tril(20)
    mask = BlockMask.from_elements(elements, 16, 48, causal=True)
    assert mask._partial is None and mask.density == 1.0
    assert same(
        mask.bits, BlockMask.from_dense(torch.ones(1, 1, 7, 3, device=device).bool(), 16, 48, **S(100, 120)).bits
    )
    elements = ~elements
    mask = BlockMask.from_elements(elements, 16, 48, causal=True)
    assert mask._partial is None and not mask.bits.any()


def S(seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    return {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "causal": True}


@pytest.mark.parametrize("device", DEVICES)
def test_equal_matrices_are_kept_once(device: str):
    elements = torch.ones(256, 256, dtype=torch.bool, device=device).tril().expand(3, 2, -1, -1)
    mask = BlockMask.from_elements(elements, 32, 32)
    assert mask._matrices.shape == (3 * 2 * 8,) and mask._elements.shape == (1, 32, 2)
    assert mask._partial[0, 0].tolist()[0] == [1, 0] and mask._partial[1, 2].tolist()[0] == [4, 3 * 8 + 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_hashes_that_are_the_same(at_once: int, device: str, monkeypatch: pytest.MonkeyPatch):
    """Different matrices are told apart by themselves: then each is kept."""
    spec = SPECS[0]
    masks = draw_elements(spec)
    want = build(spec, masks, device)
    monkeypatch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr(_partial, "_factors", lambda count, seed: torch.zeros(count, dtype=torch.int64))
    mask = build(spec, masks, device)
    assert mask._elements.shape[0] == mask._matrices.shape[0] > want._elements.shape[0]
    assert same(mask.bits, want.bits) and same(mask._partial, want._partial)
    assert same(mask.to_elements(), want.to_elements())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["padded", "one_for_all", "transposed", "expanded"])
def test_forms_of_elements(form: str, device: str):
    """Of packed sequences with a batch dimension, and of any strides."""
    spec = case("forms", lens_q=(90, 20, 64), lens_k=(70, 33, 100), mask_heads=2, k_block=32)
    generator = torch.Generator().manual_seed(3)
    elements = torch.rand((3, 2, 110, 101), generator=generator) < 0.7
    if form == "one_for_all":
        elements = elements[:1]
    if form == "expanded":
        elements = elements[:1, :1].expand(3, 2, -1, -1)
    given = elements.to(device)
    if form == "transposed":
        given = given.mT.contiguous().mT
    mask = BlockMask.from_elements(given, 64, 32, **lengths_of(spec, device))
    masks = [
        elements[b % len(elements), :, :n, :m] for b, (n, m) in enumerate(zip(spec.lens_q, spec.keys, strict=True))
    ]
    assert_elements(spec, mask, masks)


# Functions


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k <= 40 + 10 * h) | (k < 4)


def tables(device: str) -> dict[str, Callable[..., Tensor]]:
    documents = torch.tensor([[0] * 50 + [1] * 3 + [2] * 97, [0] * 30 + [4] * 120], device=device)
    prefix = torch.tensor([[20, 60], [0, 150]], device=device)
    anything = torch.rand((2, 2, 150, 150), generator=torch.Generator().manual_seed(1)) < 0.8
    anything = anything.to(device)

    def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, k]) & (q >= k)

    def prefix_lm(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | (k < prefix[b][h])

    def of_one(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return documents[0, q] == documents[-1][k]

    def table(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return anything[b, h, q, k]

    def always(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return b.new_ones((), dtype=torch.bool)

    mods = {"causal": causal_mod, "window": window_mod, "document": document, "prefix_lm": prefix_lm}
    return mods | {"of_one": of_one, "table": table, "always": always, "by_heads": lambda b, h, q, k: h == 1}


MODS = list(tables("cpu"))
SHAPES = [(2, 2, 150, 150), (1, 1, 128, 150), (2, 1, 1, 150), (1, 2, 149, 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODS)
def test_mask_mods(name: str, shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch):
    """What FlexAttention makes of the same function, however many pairs are looked at at a time."""
    mod, (batch, heads, seqlen_q, seqlen_k) = tables(device)[name], shape
    want = flex.create_mask(mod, *shape, device=device)
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "batch_size": batch, "heads": heads, "device": device}
    for at_once, blocks in ((1 << 24, (32, 48)), (10000, (16, 16)), (1, (37, 100))):
        monkeypatch.setattr(_partial, "PAIRS_AT_ONCE", at_once)
        mask = BlockMask.from_mask_mod(mod, *blocks, **lengths)
        assert torch.equal(mask.to_elements(), want)
        elements = BlockMask.from_elements(want, *blocks)
        assert same(mask.bits, elements.bits) and (mask._partial is None) == (elements._partial is None)
        for field in ("_partial", "_matrices", "_elements") if mask._partial is not None else ():
            assert same(getattr(mask, field), getattr(elements, field))
    mask = BlockMask.from_mask_mod(mod, 32, 48, causal=True, **lengths)
    assert torch.equal(mask.to_elements(), want.tril(seqlen_k - seqlen_q))


@pytest.mark.parametrize("device", DEVICES)
def test_mask_mod_of_packed_sequences(device: str):
    """Numbers are those in the sequence, and none is past its end."""
    spec = case("mods", lens_q=(90, 0, 64, 20), lens_k=(70, 33, 100, 0), mask_heads=3, q_block=32, k_block=24)
    seen = [
        torch.rand((3, n, m), generator=torch.Generator().manual_seed(n)) < 0.7
        for n, m in zip(spec.lens_q, spec.keys, strict=True)
    ]
    padded = torch.stack([torch.nn.functional.pad(x, (0, 100 - x.shape[2], 0, 90 - x.shape[1])) for x in seen]).to(
        device
    )
    lens = torch.tensor([spec.lens_q, spec.keys], device=device)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return padded[b, h, q, k] | (q >= lens[0, b]) | (k >= lens[1, b])

    mask = BlockMask.from_mask_mod(mod, 32, 24, heads=3, **lengths_of(spec, device))
    assert_elements(spec, mask, seen)
    blocks = patterns.Blocks(32, 24, **lengths_of(spec, device), max_seqlen_q=90, max_seqlen_k=100)
    both = mask & patterns.window(blocks, 1, 0)
    assert both.to_elements().sum() < mask.to_elements().sum() and both.heads == 3


# FlexAttention's masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODS)
def test_from_flex(name: str, shape: tuple[int, ...], device: str):
    """With blocks of one size and of two."""
    mod = tables(device)[name]
    want = flex.create_mask(mod, *shape, device=device)
    for size in (32, (16, 48), (100, 128)):
        mask = BlockMask.from_flex(flex.create_block_mask(mod, *shape, device=device, BLOCK_SIZE=size))
        assert torch.equal(mask.to_elements(), want) and mask.seqlen_q == shape[2] and mask.seqlen_k == shape[3]
        by_elements = BlockMask.from_elements(want, mask.q_block_size, mask.k_block_size)
        assert same(mask.bits, by_elements.bits)
        back = mask.to_flex()
        assert torch.equal(flex.create_mask(back.mask_mod, *shape, device=device), want)
        assert torch.equal(BlockMask.from_flex(back).to_elements(), want)
        made = flex.create_block_mask(mod, *shape, device=device, BLOCK_SIZE=size)
        full = 0 if back.full_kv_num_blocks is None else int(back.full_kv_num_blocks.sum())
        assert torch.equal(back.to_dense(), made.to_dense()) and full >= int(made.full_kv_num_blocks.sum())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_flex_attention(device: str, dtype: torch.dtype):
    """The same results and gradients, through masks that went there and back."""
    mod = tables(device)["document"]
    made = flex.create_block_mask(mod, 2, 1, 150, 150, device=device, BLOCK_SIZE=32)
    problem = make_problem(
        case("flex", packed=False, lens_q=(150, 150), q_block=1, k_block=1, mask_heads=1), device, dtype
    )
    problem.block_masks = [x.cpu() for x in flex.create_mask(mod, 2, 1, 150, 150, device=device)]
    mask = BlockMask.from_flex(made)
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))
    if device == "cpu":  # there it is the formula, with a mask_mod
        q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        theirs = flex.flex_attention(q, k, v, block_mask=mask.to_flex(), enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(problem.run(mask)[0], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_from_flex_of_lists(device: str):
    """Partial lists alone, full ones alone, blocks in both, in any order, and a batch of 1 for more."""

    def lists(*rows: list[int]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32, device=device)
        indices = torch.tensor([[[row + [0] * (3 - len(row)) for row in rows]]], dtype=torch.int32, device=device)
        return counts, indices

    listed = torch.zeros(90, 90, dtype=torch.bool)
    listed[:32, 64:] = listed[:32, :32] = listed[32:64, 32:64] = True
    causal = torch.ones(90, 90, dtype=torch.bool).tril(40)
    make, sizes = flex.BlockMask.from_kv_blocks, {"BLOCK_SIZE": 32, "seq_lengths": (90, 90)}
    some = lists([2, 0], [1], [])

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + 40

    got = BlockMask.from_flex(make(*some, **sizes, mask_mod=mod), batch_size=3)
    assert got.batch == 3 and all(torch.equal(x[0].cpu(), listed & causal) for x in got.to_elements())
    got = BlockMask.from_flex(make(*some, **sizes))  # without a function
    assert got._partial is None and torch.equal(got.to_elements()[0, 0].cpu(), listed)
    got = BlockMask.from_flex(make(*lists([], [], []), *some, **sizes, mask_mod=mod))
    assert got._partial is None and torch.equal(got.to_elements()[0, 0].cpu(), listed)
    got = BlockMask.from_flex(make(*some, *lists([2], [], [2]), **sizes, mask_mod=mod))
    want = listed & causal
    want[:32, 64:] = want[64:, 64:] = True
    assert torch.equal(got.to_elements()[0, 0].cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_to_flex(device: str):
    """Causality and windows of heads go along, and heads are repeated."""
    spec = case(
        "to_flex", packed=False, lens_q=(90, 90), lens_k=(120, 120), causal=True, windows=WINDOWS[:2], mask_heads=2
    )
    masks = draw_elements(spec)
    mask = build(spec, masks, device)
    want = torch.stack(expected_elements(spec, masks)).repeat_interleave(2, dim=1)
    made = mask.to_flex(num_heads=4)
    assert made.shape == (2, 4, 90, 120) and made.BLOCK_SIZE == (64, 64)
    assert torch.equal(flex.create_mask(made.mask_mod, 2, 4, 90, 120, device=device).cpu(), want)
    assert torch.equal(BlockMask.from_flex(made).to_elements().cpu(), want)
    plain = BlockMask.from_dense(torch.ones(1, 1, 2, 2, device=device).bool(), 64, 64, seqlen_q=90, seqlen_k=120)
    assert int(plain.to_flex().full_kv_num_blocks.sum()) == 4 and int(plain.to_flex().kv_num_blocks.sum()) == 0


# Masks made from masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS[:8], ids=by_name)
def test_and(spec: Case, device: str):
    """Of partial blocks with partial and with whole ones, of one head with many."""
    mine, other = draw_elements(spec), draw_elements(spec, 1)
    masks = [build(spec, x, device) for x in (mine, other)]
    both = [x & y for x, y in zip(mine, other, strict=True)]
    assert_elements(spec, masks[0] & masks[1], both)
    one = [x[:1] for x in other]
    assert_elements(spec, masks[0] & build(spec, one, device), [x & y for x, y in zip(mine, one, strict=True)])
    if not spec.packed:
        lengths = {"seqlen_q": spec.lens_q[0], "seqlen_k": spec.keys[0], "batch_size": len(spec.lens_q)}
        blocks = patterns.Blocks(spec.q_block, spec.k_block, causal=spec.causal, device=device, **lengths)
        window = patterns.window(blocks, 0, 0)
        want = [x & y for x, y in zip(mine, window.to_elements().cpu(), strict=True)]
        assert_elements(spec, masks[0] & window, want)
        assert_elements(spec, window & masks[0], want)
    nothing = masks[0] & build(spec, [~x for x in mine], device)
    assert nothing._partial is None and not nothing.bits.any()


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_heads_of_every_kind(device: str, dtype: torch.dtype):
    """Some of partial blocks, of two masks, some with windows, and some without either."""
    spec = case("kinds", packed=False, lens_q=(150, 150), lens_k=(210, 210), causal=True, heads_q=8, heads_k=2)
    spec = dataclasses.replace(spec, mask_heads=8, windows=((-1, -1, 0),) * 6 + ((9, -1, 3),) * 2)
    problem = make_partial(spec, device, dtype)
    drawn = [draw_elements(dataclasses.replace(spec, windows=()), seed) for seed in (0, 1)]
    first, second = (build(dataclasses.replace(spec, windows=()), x, device) for x in drawn)
    lengths = {"seqlen_q": 150, "seqlen_k": 210, "batch_size": 2, "device": device}
    plain = patterns.dense(patterns.Blocks(64, 64, causal=True, **lengths))
    mask = patterns.select_heads([first, second, plain, second.windowed(9, -1, 3)], [0, 1, 1, 2, 0, 2, 3, 3])
    whole = torch.ones_like(drawn[0][0][0])
    problem.block_masks = [
        torch.stack([x[0], y[1], y[2], whole, x[4], whole, y[6], y[7]]) for x, y in zip(*drawn, strict=True)
    ]
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))
    assert patterns.select_heads([first, plain], [1] * 8)._partial is None


COPIES: list[Callable[[BlockMask], BlockMask]] = [
    lambda mask: mapped(mask, lambda x: x.clone() if isinstance(x, Tensor) else x),
    dataclasses.replace,
    lambda mask: mask.cpu().to(mask.device),
    lambda mask: pickle.loads(pickle.dumps(mask)),
    copy.deepcopy,
]


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
@pytest.mark.parametrize("change", COPIES)
def test_copies(change: Callable[[BlockMask], BlockMask], device: str, dtype: torch.dtype):
    problem = make_partial(SPECS[0], device, dtype)
    mask = build(SPECS[0], problem.block_masks, device)
    other = change(mask)
    assert repr(other) == repr(mask)
    for field in ("_bits", "_partial", "_matrices", "_elements"):
        assert same(getattr(other, field), getattr(mask, field))
    judge(problem, *problem.run(other))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_inference_mode(device: str, dtype: torch.dtype):
    """A mask that was made there trains elsewhere."""
    problem = make_partial(SPECS[1], device, dtype)
    with torch.inference_mode():
        mask = build(SPECS[1], problem.block_masks, device)
        judge(problem, *problem.run(mask))
    assert not mask._elements.is_inference()
    judge_gradients(problem, differentiate(problem, mask=mask))


@pytest.mark.parametrize("device", DEVICES)
def test_a_write_is_noticed(device: str):
    """Plans are made anew."""
    problem = make_partial(SPECS[16], device, torch.float32 if device == "cpu" else torch.bfloat16)
    mask, calls = build(SPECS[16], problem.block_masks, device), []
    counted(mask, calls)
    counted(mask, calls)
    assert len(calls) == 1
    mask._partial.zero_()
    counted(mask, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES[:2])
def test_contents_that_lie(device: str, dtype: torch.dtype):
    """Places and numbers past the end are cut to those that there are."""
    problem = make_partial(SPECS[0], device, dtype)
    mask = build(SPECS[0], problem.block_masks, device)
    for value in (2**31 - 1, -(2**31), 10**6):
        for field in ("_partial", "_matrices"):
            changed = getattr(mask, field).clone()
            (changed[..., 1] if field == "_partial" else changed).fill_(value)
            out, _ = problem.run(dataclasses.replace(mask, **{field: changed}))
            assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(backend: str, device: str):
    """A mask that was made outside goes into a program, with its gradients."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problem = make_partial(SPECS[3], device, dtype)
    mask = build(SPECS[3], problem.block_masks, device)
    attend = torch.compile(block_sparse_attention, backend=backend, fullgraph=True)
    tensors = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    got = attend(*tensors, mask, deterministic=True)
    want = block_sparse_attention(*tensors, mask, deterministic=True)
    assert same(got, want)
    grads = [torch.autograd.grad(x.float().square().sum(), tensors) for x in (got, want)]
    assert all(same(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", [SPECS[1], SPECS[16]], ids=by_name)
def test_opcheck(spec: Case, device: str):
    problem = make_partial(spec, device, torch.float32 if device == "cpu" else torch.bfloat16)
    mask = build(spec, problem.block_masks, device)
    call = call_of(problem.q, problem.k, problem.v, mask)
    torch.library.opcheck(ops.check_forward.default, call)
    if device == "cuda":
        torch.library.opcheck(ops.plan_and_forward.default, call)
        return
    leaves = [x.detach().requires_grad_() for x in call[:3]]
    torch.library.opcheck(ops.forward.default, (*leaves, *call[3:], None, None))
    out, lse = ops.forward(*call, None, None)
    results = (torch.ones_like(out), torch.zeros_like(lse), out, lse)
    torch.library.opcheck(ops.backward.default, (*call, *results, None, False, [True, True, True, False]))


def test_flop_counter():
    """Pairs that a partial block hides are no work."""
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_partial(SPECS[1], "cpu", torch.float32)
    mask = build(SPECS[1], problem.block_masks, "cpu")
    with FlopCounterMode(display=False) as counter:
        problem.run(mask)
    assert counter.get_total_flops() == mask.flops(SPECS[1].head_dim, SPECS[1].heads_q)


def test_plot():
    from hbsattn._plot import OFF, PARTLY, WHOLLY, block_states

    elements = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    elements[..., :32, :32] = True
    states = block_states(BlockMask.from_elements(elements, 32, 32), 0, 0)
    assert states.tolist() == [[WHOLLY, OFF], [WHOLLY, PARTLY]]


# Bad input

ELEMENTS = torch.ones(1, 2, 40, 30, dtype=torch.bool).tril()
CU = torch.tensor([0, 40], dtype=torch.int32)
LENGTHS = {"seqlen_q": 40, "seqlen_k": 30}


def make_flex(**changes: Any) -> Any:
    made = flex.create_block_mask(causal_mod, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "elements_dtype": (lambda: BlockMask.from_elements(ELEMENTS.int(), 16, 16), r"elements has dtype torch.int32"),
    "elements_list": (lambda: BlockMask.from_elements([[True]], 16, 16), r"elements is a list; expected a Tensor"),
    "elements_of_flex": (lambda: BlockMask.from_elements(make_flex(), 16, 16), r"elements is a torch.*from_flex"),
    "elements_rank": (lambda: BlockMask.from_elements(ELEMENTS[0, 0], 16, 16), r"elements has 2 dimensions"),
    "elements_flat": (
        lambda: BlockMask.from_elements(ELEMENTS[0], 16, 16),
        r"elements has 3 dimensions, shape \(2, 40, 30\); expected \(batch or 1, heads, queries, keys\)",
    ),
    "elements_batch": (
        lambda: BlockMask.from_elements(ELEMENTS.expand(2, -1, -1, -1), 16, 16, batch_size=3),
        r"elements has a batch of 2; expected 1 or 3",
    ),
    "elements_total": (
        lambda: BlockMask.from_elements(ELEMENTS[0], 16, 16, cu_seqlens_q=CU, cu_seqlens_k=CU),
        r"elements has shape \(2, 40, 30\); expected \(heads, 40, 40\)",
    ),
    "elements_longest": (
        lambda: BlockMask.from_elements(ELEMENTS, 16, 16, cu_seqlens_q=CU, cu_seqlens_k=CU),
        r"elements has shape \(1, 2, 40, 30\); expected room for the longest sequence of cu_seqlens_k, 40",
    ),
    "elements_max": (
        lambda: BlockMask.from_elements(
            ELEMENTS[0].expand(2, 40, 30), 16, 16, cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=20
        ),
        r"max_seqlen_q is 20; expected at least 40",
    ),
    "elements_decreasing": (
        lambda: BlockMask.from_elements(ELEMENTS, 16, 16, cu_seqlens_q=CU, cu_seqlens_k=-CU),
        r"cu_seqlens_k\[1\] is -40; expected at least 0",
    ),
    "one_side": (lambda: BlockMask.from_elements(ELEMENTS, 16, 16, cu_seqlens_q=CU), r"cu_seqlens_k is None"),
    "block_size": (lambda: BlockMask.from_elements(ELEMENTS, 0, 16), r"q_block_size is 0"),
    "causal": (lambda: BlockMask.from_elements(ELEMENTS, 16, 16, causal=1), r"causal is 1"),
    "mod_of_ints": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q - k, 16, 16, **LENGTHS),
        r"mask_mod returns a Tensor of torch.int64; expected torch.bool",
    ),
    "mod_of_bools": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: True, 16, 16, **LENGTHS),
        r"mask_mod returns a bool; expected a Tensor of torch.bool",
    ),
    "mod_of_shape": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: ELEMENTS, 16, 16, **LENGTHS),
        r"mask_mod returns a Tensor of shape \(1, 2, 40, 30\); expected \(\)",
    ),
    "mod_tensor": (lambda: BlockMask.from_mask_mod(ELEMENTS, 16, 16, **LENGTHS), r"mask_mod is a Tensor; expected"),
    "mod_none": (lambda: BlockMask.from_mask_mod(None, 16, 16, **LENGTHS), r"mask_mod is a NoneType; expected"),
    "mod_heads": (lambda: BlockMask.from_mask_mod(causal_mod, 16, 16, heads=0, **LENGTHS), r"heads is 0"),
    "mod_lengths": (lambda: BlockMask.from_mask_mod(causal_mod, 16, 16, seqlen_q=40), r"seqlen_k is None"),
    "mod_both": (
        lambda: BlockMask.from_mask_mod(causal_mod, 16, 16, cu_seqlens_q=CU, cu_seqlens_k=CU, seqlen_q=3),
        r"seqlen_q is 3; expected None with cu_seqlens_q",
    ),
    "mod_device": (lambda: BlockMask.from_mask_mod(causal_mod, 16, 16, device="mars", **LENGTHS), r"device is 'mars'"),
    "flex_elements": (lambda: BlockMask.from_flex(ELEMENTS), r"block_mask is a Tensor; expected a torch.nn.attention"),
    "flex_own": (
        lambda: BlockMask.from_flex(BlockMask.from_elements(ELEMENTS, 16, 16)),
        r"block_mask is a hbsattn.mask.BlockMask; expected a torch",
    ),
    "flex_batch": (
        lambda: BlockMask.from_flex(flex.create_block_mask(causal_mod, 2, 1, 64, 64, device="cpu"), batch_size=3),
        r"kv_num_blocks has a batch of 2; expected 1 or 3",
    ),
    "flex_lengths": (
        lambda: BlockMask.from_flex(make_flex(seq_lengths=(80, 64))),
        r"seqlen_q is 80; expected 49 to 64",
    ),
    "flex_mod": (
        lambda: BlockMask.from_flex(make_flex(mask_mod=lambda b, h, q, k: q - k)),
        r"mask_mod returns a Tensor",
    ),
    "flex_no_mod": (lambda: BlockMask.from_flex(make_flex(mask_mod=None)), r"mask_mod is a NoneType; expected"),
    "flex_rank": (
        lambda: BlockMask.from_flex(make_flex(kv_num_blocks=torch.zeros(4, dtype=torch.int32))),
        r"kv_num_blocks has shape \(4,\); expected",
    ),
    "flex_indices": (
        lambda: BlockMask.from_flex(make_flex(kv_indices=torch.full((1, 1, 4, 4), 9, dtype=torch.int32))),
        r"indices has the entry 9 in row 0; expected 0 to 3",
    ),
    "to_flex_packed": (
        lambda: BlockMask.from_elements(
            ELEMENTS[:, :, :30], 16, 16, cu_seqlens_q=CU[:1], cu_seqlens_k=CU[:1]
        ).to_flex(),
        r"mask was built for packed tensors; expected one for batched",
    ),
    "to_flex_heads": (
        lambda: BlockMask.from_elements(ELEMENTS, 16, 16).to_flex(3),
        r"num_heads is 3; expected a multiple of the 2 heads",
    ),
    "or": (
        lambda: BlockMask.from_elements(ELEMENTS, 16, 16) | BlockMask.from_elements(~ELEMENTS, 16, 16),
        r"the first mask has partial blocks; expected masks without",
    ),
    "or_other": (
        lambda: BlockMask.from_elements(ELEMENTS | True, 16, 16) | BlockMask.from_elements(~ELEMENTS, 16, 16),
        r"the other mask has partial blocks; expected masks without",
    ),
    "update": (
        lambda: BlockMask.from_elements(ELEMENTS, 16, 16).update_(ELEMENTS),
        r"mask was made .* of single pairs .*; expected one from",
    ),
    "attention": (
        lambda: block_sparse_attention(*torch.zeros(3, 1, 64, 1, 8), make_flex()),
        r"mask is a torch.*; expected a BlockMask of hbsattn: .*from_flex",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("make", ["from_elements", "from_mask_mod", "from_flex"])
def test_traced(make: str):
    """Their answers are data."""
    build = {
        "from_elements": lambda: BlockMask.from_elements(ELEMENTS, 16, 16),
        "from_mask_mod": lambda: BlockMask.from_mask_mod(causal_mod, 16, 16, **LENGTHS),
        "from_flex": lambda: BlockMask.from_flex(FLEX),
    }[make]
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=f"{make} is called in a traced"),
    ):
        build()


FLEX = make_flex()

# Position among the arguments of an attention op, what becomes of it, and what the message says.
PARTIAL, MATRICES, OF_ELEMENTS, LAYOUT = 6, 7, 8, 11
OP_ERRORS: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "no_partial": (PARTIAL, lambda _: None, r"partial is None; expected a tensor, as layout has partial blocks"),
    "no_matrices": (MATRICES, lambda _: None, r"matrices is None; expected a tensor"),
    "no_elements": (OF_ELEMENTS, lambda _: None, r"elements is None; expected a tensor"),
    "no_flag": (LAYOUT, lambda x: (*x[:4], 0), r"partial is a tensor; expected None, as layout has no partial blocks"),
    "short_layout": (LAYOUT, lambda x: x[:4], r"layout has 4 numbers; expected 5"),
    "partial_dtype": (PARTIAL, lambda x: x.long(), r"partial has dtype int64; expected int32"),
    "partial_shape": (PARTIAL, lambda x: x[:, 1:].contiguous(), r"partial has shape \[.*\]; expected \["),
    "partial_rank": (PARTIAL, lambda x: x[..., 0].contiguous(), r"partial has 3 dimensions"),
    "partial_strides": (PARTIAL, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), r"partial has strides"),
    "matrices_dtype": (MATRICES, lambda x: x.long(), r"matrices has dtype int64; expected int32"),
    "matrices_rank": (MATRICES, lambda x: x[None], r"matrices has 2 dimensions"),
    "matrices_empty": (MATRICES, lambda x: x[:0], r"matrices has shape \[0\]; expected the number of a matrix"),
    "elements_dtype": (OF_ELEMENTS, lambda x: x.int(), r"elements has dtype int32; expected int16"),
    "elements_shape": (OF_ELEMENTS, lambda x: x[:, 1:].contiguous(), r"elements has shape \[.*\]; expected \["),
    "elements_granules": (OF_ELEMENTS, lambda x: x[..., :1].contiguous(), r"elements has shape \[.*\]; expected \["),
    "elements_empty": (OF_ELEMENTS, lambda x: x[:0], r"elements has shape \[0, .*\]; expected a matrix, or more"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OP_ERRORS)
def test_ops_refuse(name: str, device: str):
    problem = make_partial(SPECS[0], device, torch.float32 if device == "cpu" else torch.bfloat16)
    arguments = list(call_of(problem.q, problem.k, problem.v, build(SPECS[0], problem.block_masks, device)))
    position, change, message = OP_ERRORS[name]
    arguments[position] = change(arguments[position])
    for check in (ops.check_forward, lambda *call: ops.forward(*call, None, None)):
        with pytest.raises((ValueError, TypeError), match=message):
            check(*arguments)
