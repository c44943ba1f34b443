"""Blocks of their own sizes, and blocks with padding, beside masks spelled pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hbsattn import BlockMask, block_sparse_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRIDS = [(None, None), (16, 16), (64, 32), (7, 13)]


def draw_sizes(shape: tuple[int, ...], total: int, generator: torch.Generator) -> Tensor:
    """Sizes (..., blocks) that add up to `total`, some of them 0."""
    cuts = torch.randint(0, total + 1, (*shape[:-1], shape[-1] - 1), generator=generator)
    cuts = torch.where(torch.rand(cuts.shape, generator=generator) < 0.2, 0, cuts).sort(-1).values
    ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (0, 1), value=total), (1, 0))
    return ends.diff(dim=-1).to(torch.int32)


def expand(block_mask: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Bool (queries, keys) of one head of one sequence."""
    return block_mask.repeat_interleave(q_sizes, 0).repeat_interleave(k_sizes, 1)


def of_head(table: Tensor, dims: int, sequence: int, head: int) -> Tensor:
    """What a table (batch or 1, heads or 1, ...), some of whose first dimensions are missing, has of a head."""
    table = table[(None,) * (dims - table.dim())]
    return table[min(sequence, table.shape[0] - 1), min(head, table.shape[1] - 1)]


def all_pairs(block_mask: Tensor, q_sizes: Tensor, k_sizes: Tensor, batch: int, heads: int) -> list[Tensor]:
    """Of each sequence, bool (heads, queries, keys)."""
    return [
        torch.stack(
            [
                expand(of_head(block_mask, 4, b, h), of_head(q_sizes, 3, b, h), of_head(k_sizes, 3, b, h))
                for h in range(heads)
            ]
        )
        for b in range(batch)
    ]


def to_causal(on: Tensor) -> Tensor:
    return on.tril(on.shape[-1] - on.shape[-2])


# Sizes


FORMS = {
    "shared": ((1, 1), (1, 1), (1, 1)),
    "of_heads": ((1, 3), (1, 3), (1, 3)),
    "of_all": ((2, 3), (2, 3), (2, 3)),
    "mask_of_one_head": ((1, 1), (1, 3), (2, 1)),
    "sizes_of_one_head": ((2, 3), (1, 1), (1, 3)),
}


def draw(
    form: str, lengths: tuple[int, int], blocks: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """block_mask, q_sizes and k_sizes, and how many sequences and heads that is."""
    generator = torch.Generator().manual_seed(sum(lengths) + sum(blocks) + len(form))
    leads = FORMS[form]
    block_mask = torch.rand((*leads[0], *blocks), generator=generator) < 0.5
    sizes = [draw_sizes((*lead, n), x, generator) for lead, n, x in zip(leads[1:], blocks, lengths, strict=True)]
    return (block_mask, *sizes), *(max(x) for x in zip(*leads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_batched(form: str, grid: tuple[int | None, int | None], causal: bool, device: str):
    (block_mask, *sizes), batch, heads = draw(form, (150, 210), (5, 9))
    options = {"q_block_size": grid[0], "k_block_size": grid[1], "causal": causal}
    mask = BlockMask.from_sizes(*(x.to(device) for x in (block_mask, *sizes)), **options)
    want = torch.stack(all_pairs(block_mask, *sizes, batch, heads))
    assert (mask.seqlen_q, mask.seqlen_k, mask.batch, mask.heads) == (150, 210, batch, heads)
    assert torch.equal(mask.to_elements().cpu(), to_causal(want) if causal else want)
    same = BlockMask.from_elements(want, mask.q_block_size, mask.k_block_size, causal=causal)
    if not causal:  # which hides pairs of some blocks that are partial here
        assert torch.equal(mask.bits.cpu(), same.bits)
        assert torch.equal(mask._partial[..., 0].cpu(), same._partial[..., 0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packed(grid: tuple[int | None, int | None], causal: bool, device: str):
    """Sequences of other lengths, one without queries, one without keys."""
    lens_q, lens_k = (70, 0, 130, 33), (90, 40, 0, 61)
    generator = torch.Generator().manual_seed(3)
    block_mask = torch.rand((4, 2, 4, 6), generator=generator) < 0.5
    q_sizes, k_sizes = (
        torch.cat([draw_sizes((1, 2, n), x, generator) for x in lens]) for lens, n in ((lens_q, 4), (lens_k, 6))
    )
    cu = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for x in (lens_q, lens_k)]
    mask = BlockMask.from_sizes(
        *(x.to(device) for x in (block_mask, q_sizes, k_sizes)),
        q_block_size=grid[0],
        k_block_size=grid[1],
        cu_seqlens_q=cu[0],
        cu_seqlens_k=cu[1],
        causal=causal,
    )
    want = torch.zeros((2, sum(lens_q), sum(lens_k)), dtype=torch.bool)
    ends = [x.tolist() for x in cu]
    for b, on in enumerate(all_pairs(block_mask, q_sizes, k_sizes, 4, 2)):
        rows, keys = (slice(x[b], x[b + 1]) for x in ends)
        want[:, rows, keys] = to_causal(on) if causal else on
    assert torch.equal(mask.to_elements().cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention(heads: int, device: str):
    """Results and gradients of masks of 1 head, of one for each key head, and for each query head."""
    generator = torch.Generator().manual_seed(heads)
    block_mask = torch.rand((1, heads, 4, 6), generator=generator) < 0.5
    block_mask[:, :, 1] = False
    sizes = [draw_sizes((1, heads, n), x, generator) for n, x in ((4, 140), (6, 190))]
    mask = BlockMask.from_sizes(*(x.to(device) for x in (block_mask, *sizes)))
    on = torch.stack(all_pairs(block_mask, *sizes, 1, heads)).repeat_interleave(4 // heads, 1)
    check(mask, on, (2, 2), device)


def check(mask: BlockMask, on: Tensor, group: tuple[int, int], device: str) -> None:
    """Beside the formula in float64. on: bool (batch, heads of q, queries, keys)."""
    heads_k, heads_per = group
    batch, _, len_q, len_k = on.shape
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, len_q, heads_k * heads_per, 32), *[(batch, len_k, heads_k, 32)] * 2)
    precise = [torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes]
    q, k, v = (x.transpose(1, 2) for x in precise)
    k, v = (x.repeat_interleave(heads_per, 1) for x in (k, v))
    scores = (q @ k.mT / 32**0.5).masked_fill(~on, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    want = (weights @ v).transpose(1, 2)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in precise]
    out, got_lse = block_sparse_attention(*leaves, mask, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad.to(device, dtype))
    # A pair too many or too few is off by more; how exact kernels are is tested elsewhere.
    close = {"rtol": 1e-9, "atol": 1e-10} if device == "cpu" else {"rtol": 6e-2, "atol": 6e-2}
    expected = (want, lse, *torch.autograd.grad(want, precise, grad))
    for x, y in zip((out, got_lse, *grads), expected, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, **close)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes(data: st.DataObject):
    """Any sizes, masks and grids."""
    heads = data.draw(st.integers(1, 3))
    sizes = []
    for _ in range(2):
        drawn = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
        sizes.append(torch.stack([torch.tensor(data.draw(st.permutations(drawn))) for _ in range(heads)]))
    bits = data.draw(st.integers(0, 2**30))
    generator = torch.Generator().manual_seed(bits)
    shape = (heads, sizes[0].shape[1], sizes[1].shape[1])
    block_mask = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    grid = {f"{x}_block_size": data.draw(st.sampled_from([None, 1, 5, 16, 48, 300])) for x in "qk"}
    causal = data.draw(st.booleans())
    mask = BlockMask.from_sizes(block_mask, *sizes, causal=causal, **grid)
    want = torch.stack(all_pairs(block_mask, *sizes, 1, heads))
    assert torch.equal(mask.to_elements(), to_causal(want) if causal else want)


@pytest.mark.parametrize(
    ("lengths", "blocks", "want"),
    [
        ((1024, 1024), (4, 8), (128, 16)),
        ((1020, 1024), (4, 4), (64, 32)),
        ((1024, 1024), (8, 2), (64, 64)),
        ((10, 0), (1, 1), (64, 16)),
    ],
)
def test_block_sizes(lengths: tuple[int, int], blocks: tuple[int, int], want: tuple[int, int]):
    """Those of the documented rule."""
    sizes = [torch.tensor([*[0] * (n - 1), length]) for length, n in zip(lengths, blocks, strict=True)]
    mask = BlockMask.from_sizes(torch.ones((1, *blocks), dtype=torch.bool), *sizes)
    assert (mask.q_block_size, mask.k_block_size) == want


def test_whole_blocks_stay_whole():
    """Sizes that lie on the grid make no partial block."""
    block_mask = torch.rand((2, 3, 4)) < 0.5
    mask = BlockMask.from_sizes(
        block_mask, torch.tensor([64, 128, 0]), torch.tensor([0, 32, 64, 96]), q_block_size=64, k_block_size=32
    )
    assert mask._partial is None
    block_mask = torch.tensor([[[True, False, True, False]]])
    mask = BlockMask.from_sizes(block_mask, torch.tensor([70]), torch.tensor([30, 0, 34, 6]), k_block_size=64)
    assert mask._partial is None and mask.to_dense().tolist() == [[[[True, False]] * 2]]


def test_causal_blocks_are_trimmed():
    sizes = torch.tensor([30, 34, 64])
    every = torch.ones((1, 3, 3), dtype=torch.bool)
    mask = BlockMask.from_sizes(every, sizes, sizes, q_block_size=32, k_block_size=32, causal=True)
    assert mask._partial is None
    assert torch.equal(mask.bits, BlockMask.from_dense(torch.ones((1, 1, 4, 4)) > 0, 32, 32, causal=True).bits)


def test_batch():
    """One mask for more sequences, as the other constructors have it."""
    sizes = torch.tensor([20, 30])
    mask = BlockMask.from_sizes(torch.eye(2, dtype=torch.bool).unsqueeze(0), sizes, sizes, batch_size=3)
    assert mask.batch == 3 and mask.to_elements().shape == (3, 1, 50, 50)
    assert (mask.to_elements() == mask.to_elements()[:1]).all()


ARGUMENTS = {
    "block_mask": torch.ones((2, 3, 4), dtype=torch.bool),
    "q_sizes": torch.tensor([10, 20, 30]),
    "k_sizes": torch.tensor([10, 0, 20, 30]),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_mask": torch.ones((2, 3, 4))}, TypeError, ["block_mask has dtype torch.float32", "torch.bool"]),
        ({"block_mask": torch.ones((3, 4)) > 0}, ValueError, ["block_mask has 2 dimensions", "3 or 4"]),
        ({"q_sizes": [1, 2]}, TypeError, ["q_sizes is a list"]),
        ({"q_sizes": torch.tensor([10.0, 20, 30])}, TypeError, ["q_sizes has dtype torch.float32"]),
        ({"q_sizes": torch.tensor([30, 30])}, ValueError, ["q_sizes has 2 blocks", "expected 3, the query blocks"]),
        ({"k_sizes": torch.tensor([30, 30])}, ValueError, ["k_sizes has 2 blocks", "expected 4, the key blocks"]),
        ({"q_sizes": torch.ones((3, 3), dtype=torch.int32)}, ValueError, ["block_mask has 2 heads", "1 or 3"]),
        ({"q_sizes": torch.tensor([-10, 40, 30])}, ValueError, ["q_sizes holds -10", "0 or more"]),
        ({"seqlen_q": 61}, ValueError, ["q_sizes adds up to 60", "sequence 0", "expected 61"]),
        (
            {"k_sizes": torch.tensor([[10, 0, 20, 30], [10, 0, 20, 31]])},
            ValueError,
            ["k_sizes adds up to 61 in head 1"],
        ),
        ({"batch_size": 2, "q_sizes": torch.ones((3, 1, 3), dtype=torch.int32)}, ValueError, ["q_sizes", "batch of 3"]),
        ({"q_block_size": 0}, ValueError, ["q_block_size is 0"]),
        ({"k_block_size": 1.5}, TypeError, ["k_block_size is 1.5"]),
        ({"causal": 1}, TypeError, ["causal is 1"]),
        ({"max_seqlen_q": 100}, ValueError, ["max_seqlen_q is 100"]),
        ({"seqlen_k": -1}, ValueError, ["seqlen_k is -1"]),
        ({"cu_seqlens_q": torch.tensor([0, 60], dtype=torch.int32)}, ValueError, ["cu_seqlens_k is None"]),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: list[str]):
    with pytest.raises(error) as raised:
        BlockMask.from_sizes(**{**ARGUMENTS, **change})
    for word in words:
        assert word in str(raised.value)


def test_not_traced():
    compiled = torch.compile(lambda: BlockMask.from_sizes(**ARGUMENTS), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="traced program|from_sizes"):
        compiled()


# Padding


def valid_pairs(counts: Tensor | None, size: int, length: int, batch: int, heads: int) -> Tensor:
    """Whether each token is none of padding: bool (batch, heads, length)."""
    if counts is None:
        return torch.ones((batch, heads, length), dtype=torch.bool)
    token = torch.arange(length)
    counts = counts[(None,) * (3 - counts.dim())].expand(batch, heads, -1)
    return token % size < counts[:, :, token // size]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", ["q", "k", "both", "none"])
@pytest.mark.parametrize("form", ["lists", "dense", "elements", "windows"])
def test_padded(form: str, which: str, causal: bool, device: str):
    """Masks of every kind, with padding in blocks of queries, of keys, or of both."""
    generator = torch.Generator().manual_seed(len(form) + len(which))
    lengths, sizes, blocks = (150, 230), (32, 48), (5, 5)
    base = torch.rand((2, 3, *blocks), generator=generator) < 0.6
    counts = [torch.randint(0, size + 1, (2, 3, n), generator=generator) for size, n in zip(sizes, blocks, strict=True)]
    q_valid = counts[0][0].to(torch.int32) if which in ("q", "both") else None
    k_valid = counts[1] if which in ("k", "both") else None
    named = {"seqlen_q": lengths[0], "seqlen_k": lengths[1], "causal": causal}
    if form == "lists":
        order = base.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        mask = BlockMask.from_indices(base.sum(-1).to(device), order.to(device), *sizes, **named)
    elif form == "elements":
        on = torch.rand((2, 3, *lengths), generator=generator) < 0.4
        mask = BlockMask.from_elements(on.to(device), *sizes, causal=causal)
    else:
        mask = BlockMask.from_dense(base.to(device), *sizes, **named)
        mask = mask.windowed(60, 20, [0, 5, 90]) if form == "windows" else mask
    before = mask.to_elements().cpu()
    padded = mask.padded(*(None if x is None else x.to(device) for x in (q_valid, k_valid)))
    queries, keys = (
        valid_pairs(x, size, length, 2, 3) for x, size, length in zip((q_valid, k_valid), sizes, lengths, strict=True)
    )
    want = before & queries.unsqueeze(-1) & keys.unsqueeze(-2)
    assert torch.equal(padded.to_elements().cpu(), want)
    assert torch.equal(mask.to_elements().cpu(), before)
    assert padded.causal == causal and (padded._rules is None) == (form != "windows")
    if form in ("lists", "dense") and which == "none":
        assert padded._partial is None and torch.equal(padded.bits, mask.bits)


@pytest.mark.parametrize("device", DEVICES)
def test_padded_attention(device: str):
    """Padding on both sides: results and gradients."""
    generator = torch.Generator().manual_seed(7)
    base = torch.rand((2, 2, 4, 4), generator=generator) < 0.6
    q_valid, k_valid = torch.randint(0, 33, (2, 4), generator=generator)
    mask = BlockMask.from_dense(base.to(device), 32, 32).padded(q_valid.to(device), k_valid.to(device))
    queries, keys = (valid_pairs(x, 32, 128, 2, 2) for x in (q_valid, k_valid))
    on = base.repeat_interleave(32, 2).repeat_interleave(32, 3) & queries.unsqueeze(-1) & keys.unsqueeze(-2)
    check(mask, on.repeat_interleave(2, 1), (2, 2), device)


@pytest.mark.parametrize("device", DEVICES)
def test_padded_packed(device: str):
    """Blocks are counted in each sequence; more counts than the longest sequence has blocks."""
    lens = (70, 0, 33)
    cu = torch.tensor([0, 70, 70, 103], dtype=torch.int32, device=device)
    base = torch.ones((1, 8, 8), dtype=torch.bool, device=device)
    mask = BlockMask.from_dense(base, 16, 16, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=70, max_seqlen_k=70)
    q_valid, k_valid = torch.randint(0, 17, (2, 3, 1, 6), generator=torch.Generator().manual_seed(0))
    padded = mask.padded(q_valid.to(device), k_valid.to(device))
    want = torch.zeros((1, 103, 103), dtype=torch.bool)
    for b, (begin, length) in enumerate(zip((0, 70, 70), lens, strict=True)):
        token = torch.arange(length)
        queries, keys = (token % 16 < x[b, 0, token // 16] for x in (q_valid, k_valid))
        want[0, begin : begin + length, begin : begin + length] = queries.unsqueeze(-1) & keys
    assert torch.equal(padded.to_elements().cpu(), want)


def test_equal_matrices_once():
    """As many as there are pairs of counts."""
    mask = BlockMask.from_dense(torch.ones((1, 2, 8, 8), dtype=torch.bool), 64, 64)
    padded = mask.padded(k_valid=torch.tensor([64, 40, 64, 40, 50, 0, 40, 64]))
    assert padded._elements.shape[0] == 2 and padded._matrices.shape[0] == 2 * 8 * 4
    assert padded.density == 7 / 8


def test_ends_are_no_padding():
    """Tokens that do not exist are not missing."""
    mask = BlockMask.from_dense(torch.ones((1, 1, 2, 2), dtype=torch.bool), 32, 32, seqlen_q=40, seqlen_k=50)
    counts = torch.tensor([32, 8]), torch.tensor([32, 18])
    assert mask.padded(*counts)._partial is None
    assert mask.padded(counts[0] - torch.tensor([0, 1]))._partial is not None


def test_heads_of_counts():
    mask = BlockMask.from_dense(torch.ones((1, 1, 2, 2), dtype=torch.bool), 16, 16)
    padded = mask.padded(k_valid=torch.tensor([[16, 3], [0, 16]]))
    assert padded.heads == 2
    assert padded.to_elements().sum((2, 3)).tolist() == [[32 * 19, 32 * 16]]


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        ({"k_valid": torch.tensor([16, 17])}, ValueError, ["k_valid holds 17", "0 to 16, the block size"]),
        ({"q_valid": torch.tensor([-1, 17])}, ValueError, ["q_valid holds -1", "0 to 16"]),
        ({"q_valid": torch.tensor([3])}, ValueError, ["q_valid has 1 blocks", "expected 2, the query blocks"]),
        ({"k_valid": torch.tensor([3, 4, 5])}, ValueError, ["k_valid has 3 blocks", "expected 2, the key blocks"]),
        ({"k_valid": torch.tensor([[3, 4]] * 3)}, ValueError, ["k_valid has 3 heads", "1 or 2"]),
        ({"k_valid": torch.tensor([[[3, 4]]] * 3)}, ValueError, ["k_valid has a batch of 3", "1 or 1"]),
        ({"k_valid": torch.tensor([3.0, 4])}, TypeError, ["k_valid has dtype torch.float32"]),
        ({"k_valid": [3, 4]}, TypeError, ["k_valid is a list"]),
    ],
)
def test_padded_errors(counts: dict[str, Any], error: type[Exception], words: list[str]):
    mask = BlockMask.from_dense(torch.ones((1, 2, 2, 2), dtype=torch.bool), 16, 16)
    with pytest.raises(error) as raised:
        mask.padded(**counts)
    for word in words:
        assert word in str(raised.value)
