"""Patterns, and masks made of masks, beside loops over blocks that say what each is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hbsattn import BlockMask, block_sparse_attention, patterns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Place(NamedTuple):
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    q_block: int
    k_block: int
    causal: bool
    packed: bool

    def blocks(self, device: str) -> patterns.Blocks:
        sizes = (self.q_block, self.k_block)
        if not self.packed:
            lengths: dict[str, Any] = {"seqlen_q": self.lens_q[0], "seqlen_k": self.lens_k[0]}
            return patterns.Blocks(*sizes, **lengths, batch_size=len(self.lens_q), causal=self.causal, device=device)
        cu = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in (self.lens_q, self.lens_k)]
        return patterns.Blocks(
            *sizes,
            cu_seqlens_q=cu[0].to(device),
            cu_seqlens_k=cu[1].to(device),
            max_seqlen_q=max(self.lens_q) + 3,
            max_seqlen_k=max(self.lens_k) + 70,
            causal=self.causal,
        )


PLACES = {
    "batched": Place((300, 300), (260, 260), 64, 48, False, False),
    "batched_causal": Place((500,), (500,), 64, 64, True, False),
    "packed_causal": Place((130, 0, 257, 40), (200, 30, 1300, 20), 32, 16, True, True),
    "packed": Place((130, 1, 90), (200, 0, 90), 16, 80, False, True),
    "keys_shorter": Place((300, 100), (120, 90), 48, 32, True, True),
}


class Row(NamedTuple):
    """A query block of a sequence: its number, key blocks where its first and its last query lie, and the first key
    block that no query of it sees."""

    number: int
    first: int
    last: int
    end: int


def rows_of(place: Place) -> list[list[Row]]:
    """Of each sequence."""
    made = []
    for len_q, len_k in zip(place.lens_q, place.lens_k, strict=True):
        rows = []
        for number in range(math.ceil(len_q / place.q_block)):
            first = number * place.q_block + len_k - len_q
            last = min((number + 1) * place.q_block, len_q) - 1 + len_k - len_q
            end = math.ceil(len_k / place.k_block)
            if place.causal:
                end = max(min(last, len_k - 1) // place.k_block + 1, 0)
            rows.append(Row(number, first // place.k_block, last // place.k_block, end))
        made.append(rows)
    return made


def check(mask: BlockMask, place: Place, heads: int, on: Callable[[int, Row, int], bool]) -> None:
    """`on(head, row, column)`: whether the pattern has the block, where it is visible."""
    assert (mask.heads, mask.packed, mask.causal) == (heads, place.packed, place.causal)
    dense = mask.to_dense().cpu()
    row_begin = col_begin = 0
    for index, rows in enumerate(rows_of(place)):
        cols = math.ceil(place.lens_k[index] / place.k_block)
        got = dense[index] if not place.packed else dense[:, row_begin : row_begin + len(rows)]
        got = got[..., :cols] if not place.packed else got[..., col_begin : col_begin + cols]
        want = [[[c < row.end and on(h, row, c) for c in range(cols)] for row in rows] for h in range(heads)]
        assert torch.equal(got, torch.tensor(want, dtype=torch.bool).view(heads, len(rows), cols))
        row_begin, col_begin = row_begin + len(rows), col_begin + cols
    again = BlockMask.from_dense(
        mask.to_dense(),
        place.q_block,
        place.k_block,
        causal=place.causal,
        **({"cu_seqlens_q": cu(mask, 0), "cu_seqlens_k": cu(mask, 2)} if place.packed else lengths(mask)),
    )
    assert torch.equal(again.to_dense(), mask.to_dense())


def cu(mask: BlockMask, column: int) -> Tensor:
    table = mask.sequences
    return torch.cat((table[:, column], (table[-1, column] + table[-1, column + 1]).view(1))).contiguous()


def lengths(mask: BlockMask) -> dict[str, int]:
    return {"seqlen_q": mask.seqlen_q, "seqlen_k": mask.seqlen_k}


VERTICAL, SLASH = torch.tensor([[0, 3, 99], [1, 1, -5]]), torch.tensor([[0, 2]])
PATTERNS: dict[str, tuple[int, Callable[[patterns.Blocks], BlockMask], Callable[[int, Row, int], bool]]] = {
    "dense": (1, patterns.dense, lambda h, r, c: True),
    "window": (1, lambda b: patterns.window(b, 2, 1), lambda h, r, c: r.first - 2 <= c <= r.last + 1),
    "window_of_heads": (
        3,
        lambda b: patterns.window(b, [0, -1, 3], torch.tensor([0, 1, -1], device=b.device)),
        lambda h, r, c: (h == 1 or c >= r.first - (0, 0, 3)[h]) and (h == 2 or c <= r.last + (0, 1)[h]),
    ),
    "streaming": (1, lambda b: patterns.streaming(b, 1, 2), lambda h, r, c: c < 1 or c >= r.end - 2),
    "streaming_of_heads": (
        2,
        lambda b: patterns.streaming(b, (0, 70), [1, 0]),
        lambda h, r, c: (c < (0, 70)[h]) or (h == 0 and c == r.end - 1),
    ),
    "global_blocks": (1, lambda b: patterns.global_blocks(b, 1, 2), lambda h, r, c: r.number < 1 or c < 2),
    "dilated": (
        2,
        lambda b: patterns.dilated(b, 3, [1, 4]),
        lambda h, r, c: r.last - c in [(1, 4)[h] * i for i in range(3)],
    ),
    "vertical_slash": (
        2,
        lambda b: patterns.vertical_slash(b, VERTICAL.to(b.device), SLASH.to(b.device)),
        lambda h, r, c: c in VERTICAL[h].tolist() or r.last - c in SLASH[0].tolist(),
    ),
    "joined": (
        2,
        lambda b: patterns.streaming(b, 1, [1, 2]) | patterns.window(b, 0) & patterns.global_blocks(b, 0, 4),
        lambda h, r, c: c < 1 or c >= r.end - 1 - h or (r.first <= c <= r.last and c < 4),
    ),
    "selected": (
        3,
        lambda b: patterns.select_heads([patterns.dense(b), patterns.streaming(b, 0, [1, 2, 3])], [0, 1, 1]),
        lambda h, r, c: h == 0 or c >= r.end - 1 - h,
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, place: str, device: str):
    heads, make, on = PATTERNS[name]
    check(make(PLACES[place].blocks(device)), PLACES[place], heads, on)


def scores_of(blocks: patterns.Blocks, heads: int) -> Tensor:
    batch, rows, cols = blocks.shape
    return torch.randn((batch, heads, rows, cols), generator=torch.Generator().manual_seed(0)).to(blocks.device)


def best(scores: Tensor, row: Row, index: int, head: int) -> list[int]:
    of_row = scores[index, head, row.number, : row.end].tolist()
    return sorted(range(row.end), key=lambda c: -of_row[c])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("k", [0, 1, 3, 1000, [1, 4]])
def test_top_k(k: int | list[int], place: str, device: str):
    blocks = PLACES[place].blocks(device)
    scores = scores_of(blocks, 2)
    mask = patterns.top_k(blocks, scores, k)
    chosen = chosen_blocks(mask, PLACES[place])
    for index, rows in enumerate(rows_of(PLACES[place])):
        for row in rows:
            for head in range(2):
                count = k if isinstance(k, int) else k[head]
                assert chosen[index, head, row.number] == set(best(scores, row, index, head)[:count])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("p", [0, 0.4, 0.95, 1])
def test_top_p(p: float, place: str, device: str):
    blocks = PLACES[place].blocks(device)
    scores = scores_of(blocks, 2).double()
    chosen = chosen_blocks(patterns.top_p(blocks, scores, p), PLACES[place])
    for index, rows in enumerate(rows_of(PLACES[place])):
        for row in rows:
            for head in range(2):
                order, want, total = best(scores, row, index, head), set(), 0.0
                weights = scores[index, head, row.number, : row.end].softmax(-1).tolist()
                for column in order:
                    if total >= p - 1e-12:
                        break
                    want.add(column)
                    total += weights[column]
                assert chosen[index, head, row.number] == want


def test_one_head_of_scores():
    place = PLACES["packed_causal"]
    blocks = place.blocks("cpu")
    scores = scores_of(blocks, 1)
    mask = patterns.top_k(blocks, scores, [1, 0, 3])
    parts = [patterns.top_k(blocks, scores, k).bits for k in (1, 0, 3)]
    assert torch.equal(mask.bits, torch.cat(parts))


def chosen_blocks(mask: BlockMask, place: Place) -> dict[tuple[int, int, int], set[int]]:
    """By sequence, head and query block."""
    dense, chosen = mask.to_dense().cpu(), {}
    row_begin = col_begin = 0
    for index, rows in enumerate(rows_of(place)):
        cols = math.ceil(place.lens_k[index] / place.k_block)
        for row in rows:
            of_row = dense[:, row_begin + row.number] if place.packed else dense[index, :, row.number]
            for head in range(mask.heads):
                columns = of_row[head].nonzero().flatten().tolist()
                chosen[index, head, row.number] = {c - (col_begin if place.packed else 0) for c in columns}
        row_begin, col_begin = row_begin + len(rows), col_begin + cols
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
def test_pooled_scores(place: str, device: str):
    """Rows behind the last sequence belong to no block."""
    of = PLACES[place]
    blocks = of.blocks(device)
    generator = torch.Generator().manual_seed(1)
    leads = [(sum(x) + 5,) if of.packed else (len(x), x[0]) for x in (of.lens_q, of.lens_k)]
    q = torch.randn((*leads[0], 4, 8), generator=generator).to(device)
    k = torch.randn((*leads[1], 2, 8), generator=generator).to(device)
    scores = patterns.pooled_scores(blocks, q, k)
    assert scores.shape == (blocks.shape[0], 4, *blocks.shape[1:]) and scores.dtype == torch.float32
    begin_q = begin_k = 0
    for index, (len_q, len_k) in enumerate(zip(of.lens_q, of.lens_k, strict=True)):
        mine_q = q[begin_q : begin_q + len_q] if of.packed else q[index]
        mine_k = k[begin_k : begin_k + len_k] if of.packed else k[index]
        for row, part_q in enumerate(mine_q.split(of.q_block) if len_q else []):
            for col, part_k in enumerate(mine_k.split(of.k_block) if len_k else []):
                want = (part_q.mean(0) * part_k.mean(0).repeat_interleave(2, dim=0)).sum(-1) / 8**0.5
                torch.testing.assert_close(scores[index, :, row, col], want, rtol=1e-5, atol=1e-5)
        begin_q, begin_k = begin_q + len_q, begin_k + len_k


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
def test_random_blocks(place: str, device: str):
    blocks = PLACES[place].blocks(device)
    generator = torch.Generator(device).manual_seed(3)
    first = patterns.random_blocks(blocks, 4, 3, generator)
    again = patterns.random_blocks(blocks, 4, 3, torch.Generator(device).manual_seed(3))
    assert torch.equal(first.bits, again.bits)
    assert not torch.equal(first.bits, patterns.random_blocks(blocks, 4, 3, generator).bits)
    chosen = chosen_blocks(first, PLACES[place])
    for index, rows in enumerate(rows_of(PLACES[place])):
        for row in rows:
            for head in range(3):
                assert min(1, row.end) <= len(chosen[index, head, row.number]) <= min(4, row.end)
    bird = chosen_blocks(patterns.big_bird(blocks, 1, 1, 2, 3, generator), PLACES[place])
    for index, rows in enumerate(rows_of(PLACES[place])):
        for row in rows:
            always = {c for c in range(row.end) if c < 1 or row.number < 1 or row.first - 1 <= c <= row.last + 1}
            assert all(always <= bird[index, head, row.number] for head in range(3))
            assert all(len(bird[index, head, row.number] - always) <= 2 for head in range(3))


@pytest.mark.parametrize("device", DEVICES)
def test_attention(device: str):
    """A pattern's mask computes what the same blocks given as booleans do."""
    place = PLACES["packed_causal"]
    blocks = place.blocks(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn((sum(place.lens_q), 4, 64), device=device, dtype=dtype)
    k, v = torch.randn((2, sum(place.lens_k), 2, 64), device=device, dtype=dtype)
    mask = patterns.streaming(blocks, 1, [1, 2, 3, 60])
    given = BlockMask.from_dense(
        mask.to_dense(), 32, 16, cu_seqlens_q=cu(mask, 0), cu_seqlens_k=cu(mask, 2), causal=True
    )
    assert torch.equal(block_sparse_attention(q, k, v, mask), block_sparse_attention(q, k, v, given))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str):
    """Patterns are made inside a graph, as masks of tensors are."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = torch.randn((3, 2, 200, 4, 32), device=device, dtype=dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = patterns.Blocks(64, 32, seqlen_q=200, seqlen_k=200, batch_size=2, causal=True, device=q.device)
        best = patterns.top_k(blocks, patterns.pooled_scores(blocks, q, k), 2)
        return block_sparse_attention(q, k, v, best | patterns.streaming(blocks, 1, [1, 2, 1, 2]))

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), call(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
def test_nothing_waits(place: str):
    blocks_before = PLACES[place].blocks("cuda")
    scores = scores_of(blocks_before, 2)
    lens = {name: getattr(blocks_before, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    lens |= {name: getattr(blocks_before, name) for name in ("max_seqlen_q", "max_seqlen_k", "seqlen_q", "seqlen_k")}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sizes = (blocks_before.q_block_size, blocks_before.k_block_size)
        blocks = patterns.Blocks(*sizes, **lens, batch_size=blocks_before.shape[0], causal=True, device="cuda")
        near = patterns.streaming(blocks, [1, 2], 2) | patterns.window(blocks, 1)
        made = near & patterns.dense(blocks) | patterns.top_k(blocks, scores, 3) | patterns.top_p(blocks, scores, 0.3)
        made = made | patterns.random_blocks(blocks, 2) | patterns.global_blocks(blocks, 1, 1)
        patterns.select_heads([made, patterns.dilated(blocks, 3, 2)], [0, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


BLOCKS = PLACES["batched"].blocks("cpu")
OTHER = PLACES["batched_causal"].blocks("cpu")
SCORES = torch.zeros(2, 2, *BLOCKS.shape[1:])
QUERIES = torch.zeros(2, 300, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: patterns.Blocks(64, 64), ValueError, ["seqlen_q is None"]),
        (lambda: patterns.Blocks(64, 0, seqlen_q=8, seqlen_k=8), ValueError, ["k_block_size is 0"]),
        (lambda: patterns.Blocks(64, 64, seqlen_q=8, seqlen_k=8, max_seqlen_q=8), ValueError, ["max_seqlen_q is 8"]),
        (lambda: patterns.streaming(BLOCKS, -1, 2), ValueError, ["sink is -1"]),
        (lambda: patterns.streaming(BLOCKS, 1, [2, True]), TypeError, ["local[1] is True"]),
        (lambda: patterns.streaming(BLOCKS, [1, 2], [2, 1, 3]), ValueError, ["2", "3", "heads"]),
        (lambda: patterns.streaming(BLOCKS, 1.5, 2), TypeError, ["sink is 1.5"]),
        (lambda: patterns.window(BLOCKS, -2), ValueError, ["left is -2"]),
        (lambda: patterns.window(BLOCKS, torch.zeros(2)), TypeError, ["left has dtype torch.float32"]),
        (lambda: patterns.dilated(BLOCKS, 3, 0), ValueError, ["step is 0"]),
        (lambda: patterns.vertical_slash(BLOCKS, VERTICAL, torch.zeros(3, 1).long()), ValueError, ["2 heads", "3"]),
        (lambda: patterns.random_blocks(BLOCKS, 1, 0), ValueError, ["heads is 0"]),
        (lambda: patterns.top_k(BLOCKS, SCORES[..., :-1], 2), ValueError, ["scores has shape"]),
        (lambda: patterns.top_k(BLOCKS, SCORES, [1, 2, 3]), ValueError, ["scores has 2 heads", "3"]),
        (lambda: patterns.top_k(BLOCKS, SCORES.long(), 2), TypeError, ["scores has dtype"]),
        (lambda: patterns.top_p(BLOCKS, SCORES, 1.5), ValueError, ["p is 1.5", "0 to 1"]),
        (lambda: patterns.pooled_scores(BLOCKS, torch.zeros(2, 9, 1, 8), SCORES), ValueError, ["q has shape", "300"]),
        (
            lambda: patterns.pooled_scores(BLOCKS, QUERIES, QUERIES[:, :260, :, :4]),
            ValueError,
            ["k has a head_dim of 4", "8"],
        ),
        (lambda: patterns.pooled_scores(BLOCKS, QUERIES, QUERIES[:, :260, :0]), ValueError, ["the 0 heads of k"]),
        (lambda: patterns.Blocks(64, 64, seqlen_q=8, seqlen_k=8, device="gpu"), ValueError, ["device is 'gpu'"]),
        (lambda: patterns.select_heads(patterns.dense(BLOCKS), [0]), TypeError, ["masks is a BlockMask"]),
        (lambda: patterns.select_heads([], [0]), ValueError, ["masks is empty"]),
        (lambda: patterns.select_heads([patterns.dense(BLOCKS)], [1]), ValueError, ["choice[0] is 1"]),
        (lambda: patterns.select_heads([patterns.dense(BLOCKS)], []), ValueError, ["choice is empty"]),
        (
            lambda: patterns.select_heads([patterns.window(BLOCKS, [1, 2])], [0] * 3),
            ValueError,
            ["masks[0] has 2 heads"],
        ),
        (lambda: patterns.dense(BLOCKS) | patterns.dense(OTHER), ValueError, ["k_block_size", "64", "48"]),
        (lambda: patterns.dense(BLOCKS) | True, TypeError, ["unsupported operand"]),
        (lambda: patterns.window(BLOCKS, [1, 2]) | patterns.window(BLOCKS, [1, 2, 3]), ValueError, ["2 and 3 heads"]),
        (lambda: patterns.dense(BLOCKS).update_(SCORES > 0), ValueError, ["update_", "constructor"]),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], words: list[str]):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("lens", [(0, 30, 20), (1, 30, 60), (0, 30, 99)])
def test_lengths_are_checked(lens: tuple[int, ...]):
    """On a CPU, as the constructors of masks check them."""
    cu_seqlens = torch.tensor(lens, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[|max_seqlen_q"):
        patterns.Blocks(16, 16, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=40, max_seqlen_k=40)


def test_masks_of_other_lengths():
    """Contents are compared where they can be read."""
    a, b = (Place((30, 70), (50, 50), 16, 16, False, True), Place((70, 30), (50, 50), 16, 16, False, True))
    with pytest.raises(ValueError, match="cu_seqlens"):
        patterns.dense(a.blocks("cpu")) & patterns.dense(b.blocks("cpu"))


def test_masks_of_masks():
    """Of whatever form, lists too; with heads for each key head and for each query head."""
    counts = torch.tensor([[[1, 2]], [[0, 1]]]).transpose(0, 1).contiguous()
    indices = torch.tensor([[[[0, 9], [1, 0]]], [[[0, 0], [1, 7]]]]).transpose(0, 1).contiguous()
    lists = BlockMask.from_indices(counts, indices, 16, 16, seqlen_q=32, seqlen_k=32)
    dense = BlockMask.from_dense(torch.tensor([[[[1, 0], [0, 0]]] * 4], dtype=torch.bool).view(1, 4, 2, 2), 16, 16)
    joined, both = lists | dense, dense & lists
    assert joined.heads == both.heads == 4
    of_lists = lists.to_dense().repeat_interleave(2, dim=1)
    assert torch.equal(joined.to_dense(), of_lists | dense.to_dense())
    assert torch.equal(both.to_dense(), of_lists & dense.to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_few_digits(dtype: torch.dtype):
    """Shares are added up in more digits than the scores have, and NaN is no score."""
    blocks = patterns.Blocks(1, 1, seqlen_q=1, seqlen_k=1024, device="cpu")
    scores = torch.zeros((1, 1, 1, 1024), dtype=dtype)
    assert int(patterns.top_p(blocks, scores, 1.0).to_dense().sum()) == 1024
    assert int(patterns.top_p(blocks, scores, 0.5).to_dense().sum()) == 512
    scores[..., :3] = torch.nan
    assert not patterns.top_k(blocks, scores, 5).to_dense()[..., :3].any()
    assert int(patterns.top_k(blocks, scores, 5).to_dense().sum()) == 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda blocks, mask: patterns.dense(mask), "blocks is a hbsattn.mask.BlockMask; expected a Blocks"),
        (lambda blocks, mask: patterns.window(None, 1), "blocks is a NoneType"),
        (lambda blocks, mask: patterns.streaming(blocks=3, sink=1, local=1), "blocks is a int"),
        (lambda blocks, mask: patterns.window(blocks, b"12"), "left is b'12'; expected an int, a sequence"),
        (lambda blocks, mask: mask.windowed(1.5), "left is 1.5; expected an int, a sequence"),
    ],
)
def test_wrong_kinds(call: Callable[..., object], words: str):
    blocks = patterns.Blocks(16, 16, seqlen_q=40, seqlen_k=40, causal=True, device="cpu")
    with pytest.raises(TypeError, match=words):
        call(blocks, patterns.dense(blocks))


def test_numbers_of_a_tensor_are_read_on_a_cpu():
    blocks = patterns.Blocks(16, 16, seqlen_q=40, seqlen_k=40, causal=True, device="cpu")
    with pytest.raises(ValueError, match="left holds -7; expected -1"):
        patterns.window(blocks, torch.tensor([1, -7]))
