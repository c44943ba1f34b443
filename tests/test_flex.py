"""Masks that functions make, and FlexAttention's, beside what that makes of the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from cases import DEVICE_DTYPES, DEVICES, case
from gradients import differentiate, judge_gradients
from hbsattn import BlockMask, _partial, block_sparse_attention, patterns
from partial import WINDOWS, assert_elements, build, draw_elements, expected_elements, lengths_of
from problems import judge, make_problem, same

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


@pytest.mark.gpu
def test_mask_mod_out_of_range():
    """It reads what is there."""
    table = torch.arange(10, device="cuda")
    mask = BlockMask.from_mask_mod(lambda b, h, q, k: table[q] >= k, 16, 16, **LENGTHS, device="cuda")
    want = torch.arange(40, device="cuda").clamp(max=9)[:, None] >= torch.arange(30, device="cuda")
    assert torch.equal(mask.to_elements()[0, 0], want)


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
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
    "mod_out_of_range": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: CU[q] > k, 16, 16, **LENGTHS),
        r"mask_mod reads the entry \d+ of a dimension of 2; expected one that it has",
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
        r"mask was made .* of single pairs .*; expected one from another constructor",
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
