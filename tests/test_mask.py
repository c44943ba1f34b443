"""BlockMask: what is packed, trimmed, counted and planned, against plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import hbsattn
from cases import Case, case
from oracle import dense, plan
from plans import layout_of, plan_backward, plan_items, take_apart, uses_sm80
from problems import block_lists, block_masks, build_mask, cu_seqlens, dense_mask, local_rows, make_problem, same


def packed_heads(spec: Case, pack_heads: bool) -> int:
    """Heads that share tiles."""
    return plan.count_packed_heads(spec.mask_heads, spec.q_block, spec.heads_q, spec.heads_k, pack_heads)


SPECS = [
    case("packed"),
    case("packed_causal", causal=True, q_block=32, k_block=16),
    case("packed_batched_mask", form="batched", causal=True, lens_k=(30, 200, 111)),
    case("packed_shared_mask", form="shared", lens_k=(30, 200, 111)),
    case("packed_zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True),
    case("packed_zero_length_batched_mask", lens_q=(0, 70, 50), lens_k=(40, 0, 90), form="batched"),
    case("q_longer", causal=True, lens_q=(300, 20), lens_k=(50, 10), q_block=16, k_block=16),
    case("k_longer", causal=True, lens_q=(30, 20), lens_k=(500, 110), q_block=16, k_block=16),
    case("batched", packed=False, lens_q=(150, 150), lens_k=(130, 130)),
    case("batched_causal", packed=False, lens_q=(150, 150), lens_k=(230, 230), causal=True, q_block=16, k_block=48),
    case("batched_shared_mask", packed=False, lens_q=(96,) * 3, form="shared", causal=True),
    case("full", density=1.0, causal=True, lens_q=(500, 1), q_block=48, k_block=80),
    case("empty", pattern="none"),
    case("31_columns", lens_q=(20,), lens_k=(16 * 31,), k_block=16),
    case("32_columns", lens_q=(20,), lens_k=(16 * 32,), k_block=16),
    case("33_columns", lens_q=(20,), lens_k=(16 * 33,), k_block=16),
    case("100_columns", q_block=48, lens_q=(20, 300), lens_k=(16 * 100, 16 * 64), k_block=16, causal=True),
    case("one_row_blocks", lens_q=(5, 9), lens_k=(7, 3), q_block=1, k_block=1, causal=True),
    case("odd_blocks", lens_q=(50, 99), lens_k=(70, 31), q_block=7, k_block=13, causal=True),
    case("one_head", mask_heads=1),
    case("gqa_group_mask", mask_heads=2, heads_q=16, heads_k=2, q_block=16, causal=True),
    case("gqa_group_mask_wide", mask_heads=2, heads_q=8, heads_k=2, q_block=80, causal=True, lens_q=(85, 200, 1)),
    case("tiles_begin_inside_heads", mask_heads=1, heads_q=7, heads_k=1, q_block=80, causal=True, lens_q=(95, 190)),
    case("gqa_query_mask", mask_heads=8, heads_q=8, heads_k=2, q_block=192, lens_q=(200, 100)),
    case("no_sequences", lens_q=()),
]
SPECS_AND_SOURCES = [
    pytest.param(s, source, id=f"{s.name}-{source}")
    for s in SPECS
    for source in ("dense", "indices", "csr")
    if source != "csr" or s.form == "flat"
]


def visible_blocks(spec: Case, b: int, i: int) -> int:
    """Key blocks that query block i of sequence b can see: c * k_block <= last row + k_len - q_len, if causal."""
    blocks = spec.blocks(b)[1]
    if spec.causal:
        last = min((i + 1) * spec.q_block, spec.lens_q[b]) - 1
        blocks = sum(c * spec.k_block <= last + spec.keys[b] - spec.lens_q[b] for c in range(blocks))
    return blocks


def trimmed(spec: Case, masks: list[Tensor]) -> list[Tensor]:
    result = [m.clone() for m in masks]
    for b, mask in enumerate(result):
        for i in range(mask.shape[1]):
            mask[:, i, visible_blocks(spec, b, i) :] = False
    return result


def expected_rows(spec: Case, masks: list[Tensor], form: str) -> Tensor:
    """bool (heads, rows, columns) as the bits should hold it, padding rows included."""
    if form == "flat":
        return local_rows(spec, masks)
    rows, cols = spec.max_blocks
    result = torch.zeros((spec.mask_heads, len(masks), rows, cols), dtype=torch.bool)
    for b, mask in enumerate(masks):
        result[:, b, : mask.shape[1], : mask.shape[2]] = mask
    return result.flatten(1, 2)


def unpack(bits: Tensor, cols: int) -> Tensor:
    words = bits.cpu().numpy().view(np.uint32)
    columns = np.arange(cols)
    return torch.from_numpy(((words[..., columns // 32] >> (columns % 32).astype(np.uint32)) & 1).astype(bool))


def pairs(spec: Case, masks: list[Tensor]) -> int:
    """(query, key) pairs that count, over all mask heads."""
    return sum(
        int(dense.element_mask(m, spec.lens_q[b], spec.keys[b], spec.q_block, spec.k_block, spec.causal).sum())
        for b, m in enumerate(masks)
    )


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec,source", SPECS_AND_SOURCES)
def test_pack(spec: Case, source: str, device: str):
    masks = block_masks(spec, seed=3)
    mask = build_mask(spec, masks, device, source=source, seed=3)
    want = expected_rows(spec, trimmed(spec, masks), spec.mask_form)
    assert mask.bits.dtype == torch.int32 and mask.bits.shape == (spec.mask_heads, mask.rows, -(-mask.cols // 32))
    assert (mask.heads, mask.rows, mask.batch) == (want.shape[0], want.shape[1], len(spec.lens_q))
    assert (mask.q_block_size, mask.k_block_size, mask.causal) == (spec.q_block, spec.k_block, spec.causal)
    assert mask.packed == spec.packed and mask.device.type == device and mask.cols >= want.shape[2]
    got = unpack(mask.bits, mask.cols)
    assert torch.equal(got[..., : want.shape[2]], want)
    assert not got[..., want.shape[2] :].any()
    # Bits past the last column are 0, too: kernels read whole words.
    assert torch.equal(unpack(mask.bits, 32 * mask.bits.shape[2]).sum(), got.sum())


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_sequences(spec: Case, device: str):
    mask = build_mask(spec, block_masks(spec, seed=3), device)
    table, q_begin, k_begin, row, col = [], 0, 0, 0, 0
    for b, (len_q, len_k) in enumerate(zip(spec.lens_q, spec.keys, strict=True)):
        rows, cols = spec.blocks(b)
        row = row if spec.mask_form == "flat" else b * spec.max_blocks[0]
        table.append([q_begin, len_q, k_begin, len_k, row, len_k - len_q, col])
        row += rows
        if spec.packed:
            q_begin, k_begin, col = q_begin + len_q, k_begin + len_k, col + cols
    assert mask.sequences.shape == (len(table), 7) and mask.sequences.dtype == torch.int32
    got = mask.sequences.cpu()[:, [0, 1, 2, 3, 4, 6, 5]]
    if table:
        columns = 7 if spec.mask_form == "flat" else 6  # the first column matters to flat masks alone
        assert got[:, :columns].tolist() == [line[:columns] for line in table]


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_to_dense_density_flops(spec: Case, device: str):
    masks = block_masks(spec, seed=4)
    mask = build_mask(spec, masks, device, seed=4)
    cut = trimmed(spec, masks)
    got = mask.to_dense().cpu()
    if spec.packed:
        rows, cols = (sum(spec.blocks(b)[i] for b in range(len(masks))) for i in (0, 1))
        want = torch.zeros((spec.mask_heads, rows, cols), dtype=torch.bool)
        row = col = 0
        for m in cut:
            want[:, row : row + m.shape[1], col : col + m.shape[2]] = m
            row, col = row + m.shape[1], col + m.shape[2]
    else:
        want = expected_rows(spec, cut, "batched").unflatten(1, (len(masks), -1)).transpose(0, 1)
    assert torch.equal(got, want)

    active = sum(int(m.sum()) for m in cut)
    visible = spec.mask_heads * sum(
        visible_blocks(spec, b, i) for b in range(len(cut)) for i in range(spec.blocks(b)[0])
    )
    assert mask.density == pytest.approx(active / visible if visible else 0.0)
    for num_heads, head_dim in ((spec.heads_q, 64), (spec.mask_heads, 128)):
        want_flops = 4 * head_dim * pairs(spec, masks) * num_heads // spec.mask_heads
        assert mask.flops(head_dim, num_heads) == mask.flops(2 * head_dim - 8, num_heads, 8) == want_flops


@pytest.mark.parametrize("device", cases.DEVICES)
def test_repr(device: str):
    """Lengths and blocks by the names of the attributes or for each sequence; the density where it is at hand."""

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool, device=device)

    def check(mask: hbsattn.BlockMask, text: str, density: str) -> None:
        where = f", density={density}, device='cpu')" if device == "cpu" else f", device='{mask.device}')"
        assert repr(mask) == f"BlockMask({text}{where}"

    from_dense = hbsattn.BlockMask.from_dense
    lens = {"cu_seqlens_q": cu_seqlens((100, 37), device), "cu_seqlens_k": cu_seqlens((90, 70), device)}
    flat = ones(2, 6, 6)
    flat[:, 1:] = False
    text = "packed, batch=2, heads=2, blocks of 32 x 32, rows=6, cols=6, causal=False"
    check(from_dense(flat, 32, 32, **lens), text, "0.167")
    text = "packed, batch=2, max_seqlen_k=90, heads=2, blocks of 32 x 32, rows=6, cols=3, causal=True"
    check(from_dense(flat, 32, 32, **lens, max_seqlen_k=90, causal=True), text, "0.0667")  # 1 of 15
    text = (
        "packed, batch=2, max_seqlen_q=100, max_seqlen_k=90, heads=1, blocks of 32 x 32, rows=8, cols=3, causal=False"
    )
    check(from_dense(ones(1, 1, 4, 4), 32, 32, **lens, max_seqlen_q=100, max_seqlen_k=90), text, "1")

    batched = ones(2, 1, 3, 5)
    batched[1] = False
    text = (
        "batched, batch=2, seqlen_q=96, seqlen_k=80, heads=1, blocks of 32 x 16, 3 x 5 in each sequence, causal=False"
    )
    check(from_dense(batched, 32, 16), text, "0.5")
    text = "batched, batch=3, seqlen_q=70, seqlen_k=66, heads=1, blocks of 32 x 16, 3 x 5 in each sequence, causal=True"
    check(from_dense(batched[1:], 32, 16, seqlen_q=70, seqlen_k=66, batch_size=3, causal=True), text, "0")
    text = "batched, batch=1, seqlen_q=0, seqlen_k=16, heads=1, blocks of 32 x 16, 0 x 1 in each sequence, causal=False"
    check(from_dense(ones(1, 1, 0, 1), 32, 16), text, "0")


def test_frozen():
    spec = case("frozen", causal=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        build_mask(spec, block_masks(spec, 0), "cpu").causal = False


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("target", cases.DEVICES)
def test_to(target: str, device: str):
    spec = case("to", causal=True)
    mask = build_mask(spec, block_masks(spec, 0), device)
    moved = mask.to(target)
    assert moved.device.type == target
    assert torch.equal(moved.bits.cpu(), mask.bits.cpu()) and torch.equal(moved.sequences.cpu(), mask.sequences.cpu())
    assert torch.equal(moved.to_dense().cpu(), mask.to_dense().cpu())
    assert moved.density == mask.density


@pytest.mark.parametrize("device", cases.DEVICES)
def test_dense_strides(device: str):
    """Any strides: transposed, sliced and expanded masks pack as their copies do."""
    lens = {"cu_seqlens_q": cu_seqlens((100, 60), device), "cu_seqlens_k": cu_seqlens((120, 33), device)}
    flat = torch.rand((4, 11, 11), generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    views = [
        flat.transpose(1, 2),
        torch.cat([flat, flat], dim=2)[:, :, ::2],
        flat[:1].expand(4, -1, -1),
        flat[:, :, :1].expand(-1, -1, 11),
        torch.cat([flat, flat], dim=1)[:, 1:12],
    ]
    for view in views:
        masks = [hbsattn.BlockMask.from_dense(m, 16, 16, **lens) for m in (view, view.contiguous())]
        assert same(masks[0].bits, masks[1].bits)
    batched = torch.rand((3, 2, 7, 5), generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    for view in (batched.transpose(0, 1), batched[:1].expand(3, -1, -1, -1), batched[:, :, ::2], batched.mT):
        masks = [hbsattn.BlockMask.from_dense(m, 16, 16) for m in (view, view.contiguous())]
        assert same(masks[0].bits, masks[1].bits)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_batched_defaults(device: str):
    """Lengths default to whole blocks, the batch to the mask's."""
    block_mask = torch.ones((2, 1, 3, 5), dtype=torch.bool, device=device)
    mask = hbsattn.BlockMask.from_dense(block_mask, 32, 16)
    assert (mask.seqlen_q, mask.seqlen_k, mask.batch, mask.rows, mask.cols) == (96, 80, 2, 6, 5)
    mask = hbsattn.BlockMask.from_dense(block_mask[:1], 32, 16, batch_size=4, seqlen_q=70)
    assert (mask.seqlen_q, mask.batch, mask.rows) == (70, 4, 12)
    assert mask.to_dense().shape == (4, 1, 3, 5)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch):
    """Contents are not checked on a CPU either, as where a program is traced: the ops are safe with any."""
    monkeypatch.setattr("hbsattn.mask.can_read", lambda *_: False)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_indices_are_cleaned(device: str, unread: None):
    """Duplicates merge, what is out of range drops out, what lies past the count is not read."""
    indices = torch.tensor([[[0, 2, 2, 2, 1], [3, -1, 2**31 - 1, -(2**31), 0], [4, 100, 1, 0, 0], [0, 1, 2, 3, 4]]])
    counts = torch.tensor([[4, 4, 3, 0]])
    lens = {"cu_seqlens_q": cu_seqlens((64,), device), "cu_seqlens_k": cu_seqlens((64,), device)}
    want = torch.zeros((1, 4, 4), dtype=torch.bool)
    want[0, 0, [0, 2]], want[0, 1, 3], want[0, 2, 1] = True, True, True
    for dtype in (torch.int32, torch.int64):
        mask = hbsattn.BlockMask.from_indices(
            counts.to(device, dtype), indices.to(device, dtype), 16, 16, **lens, max_seqlen_q=64, max_seqlen_k=64
        )
        assert torch.equal(mask.to_dense().cpu(), want)
    wide = torch.tensor([[[2**32, 2**32 + 1, -(2**32), 2, 0]]], device=device)
    mask = hbsattn.BlockMask.from_indices(
        torch.tensor([[4]], device=device),
        wide,
        64,
        16,
        **lens,
        max_seqlen_q=64,
        max_seqlen_k=64,
    )
    assert mask.to_dense().cpu()[0, 0].tolist() == [False, False, True, False]


@pytest.mark.parametrize("device", cases.DEVICES)
def test_csr_rows_in_any_order(device: str):
    """Rows may lie anywhere in `indices`, overlap and leave gaps."""
    indptr = torch.tensor([[0, 2, 2, 3], [1, 3, 4, 4]], dtype=torch.int32, device=device)
    indices = torch.tensor([2, 0, 1, 3, 3], dtype=torch.int32, device=device)
    lens = {"cu_seqlens_q": cu_seqlens((48,), device), "cu_seqlens_k": cu_seqlens((64,), device)}
    mask = hbsattn.BlockMask.from_csr(indptr, indices, 16, 16, **lens, max_seqlen_q=48, max_seqlen_k=64)
    listed = [[{0, 2}, set(), {1}], [{0, 1}, {3}, set()]]
    want = torch.tensor([[[c in row for c in range(4)] for row in head] for head in listed])
    assert torch.equal(mask.to_dense().cpu(), want)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_any_content_is_safe(seed: int, device: str, unread: None):
    """Random integers in counts, indices and indptr: no crash, and trimming holds."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        wild = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int64)
        mild = torch.randint(-3, 20, shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, wild, mild).to(torch.int32).to(device)

    spec = case("noise", lens_q=(100, 37, 200), lens_k=(60, 300, 10), q_block=32, k_block=16, causal=True)
    keywords = {
        "cu_seqlens_q": cu_seqlens(spec.lens_q, device),
        "cu_seqlens_k": cu_seqlens(spec.keys, device),
        "max_seqlen_q": 200,
        "max_seqlen_k": 300,
        "causal": True,
    }
    rows = sum(spec.blocks(b)[0] for b in range(3))
    everything = build_mask(spec, [torch.ones((4, *spec.blocks(b)), dtype=torch.bool) for b in range(3)], "cpu")
    for mask in (
        hbsattn.BlockMask.from_indices(noise(4, rows), noise(4, rows, 9), 32, 16, **keywords),
        hbsattn.BlockMask.from_csr(noise(4, rows + 1), noise(50), 32, 16, **keywords),
        hbsattn.BlockMask.from_csr(noise(4, rows + 1), noise(0), 32, 16, **keywords),
    ):
        assert not (mask.to_dense().cpu() & ~everything.to_dense()).any()
        problem = make_problem(spec, device, torch.float32 if device == "cpu" else torch.bfloat16)
        assert bool(torch.isfinite(problem.run(mask)[0]).all())


@pytest.mark.parametrize("device", cases.DEVICES)
def test_max_seqlen_narrows_a_flat_mask(device: str):
    spec = case("narrow", lens_q=(100, 37, 200))
    block_mask = dense_mask(spec, block_masks(spec, 0), "flat").to(device)
    lens = {"cu_seqlens_q": cu_seqlens(spec.lens_q, device), "cu_seqlens_k": cu_seqlens(spec.keys, device)}
    wide = hbsattn.BlockMask.from_dense(block_mask, 64, 64, **lens)
    narrow = hbsattn.BlockMask.from_dense(block_mask, 64, 64, **lens, max_seqlen_q=200, max_seqlen_k=200)
    assert narrow.cols == 4 and wide.cols >= 4
    assert torch.equal(wide.to_dense(), narrow.to_dense())


# The work list. Where a test runs on a CPU, which needs no list, it judges the oracle of the device's.


def work_list(
    mask: hbsattn.BlockMask, heads_q: int, heads_k: int, head_dim: int, pack_heads: bool, for_backward: bool = False
) -> Tensor:
    """The records of a list that are not dead; dead ones end it."""
    call = (heads_q, heads_k, head_dim, 2, pack_heads)
    if not mask.bits.is_cuda:
        return plan.plan_items(mask.bits, mask.sequences, *layout_of(mask)[:4], *call, for_backward)
    items = plan_items(mask, *call)
    if for_backward:
        rows_k = mask.cols * mask.k_block_size * mask.batch
        items = take_apart(mask, plan_backward(mask, *call, rows_k=rows_k, deterministic=True), *call).items
    live = int((items[:, 0] >= 0).sum())
    assert bool((items[live:, 0] == -1).all()), "dead records end the list"
    return items[:live]


@dataclasses.dataclass(frozen=True)
class Item:
    bit_row: int
    sequence: int
    head: int
    block_row: int
    first_row: int
    blocks: int
    masked: int
    col_end: int
    q_begin: int
    q_len: int
    k_begin: int
    k_len: int
    diagonal: int
    united: int


def read_items(items: Tensor) -> list[Item]:
    assert items.shape[1] == 16 and not items[:, 14:].any()
    return [Item(*line[:14]) for line in items.tolist()]


def unite(items: list[Item], rows: Tensor, k_block: int) -> list[Item]:
    """The tiles of neighbours: as they are, or one with the rows of all and others that are skipped."""
    bits = rows.flatten(0, 1)
    some = [item for item in items if item.blocks]
    together = int(bits[[item.bit_row for item in items]].any(0).sum())
    apart = sum(item.blocks for item in items)
    if len(some) < 2 or 6 * together * k_block + 960 >= 5 * (apart * k_block + 192 * len(some)):
        return items
    first = dataclasses.replace(
        items[0], blocks=together, masked=together, col_end=items[-1].col_end, united=len(items)
    )
    return [first]


def tile_rows(spec: Case, mask: hbsattn.BlockMask, packed: int, head_dim: int, for_backward: bool) -> int:
    for_backward = for_backward or (mask.bits.is_cuda and uses_sm80())
    return plan.choose_query_tile_rows(packed * spec.q_block, head_dim, spec.k_block, for_backward)


def expected_items(
    spec: Case,
    mask: hbsattn.BlockMask,
    rows: Tensor,
    pack_heads: bool,
    head_dim: int = 64,
    for_backward: bool = False,
) -> set[Item]:
    """The records of all tiles that hold queries, from the definition of WorkItem. rows: the trimmed bits as bool."""
    packed = packed_heads(spec, pack_heads)
    tile = tile_rows(spec, mask, packed, head_dim, for_backward)
    block_rows = packed * spec.q_block
    # Only CUDA unites neighbours.
    united = tile // block_rows if mask.bits.is_cuda and block_rows % 16 == 0 and tile % block_rows == 0 else 1
    items = set()
    for head in range(0, spec.heads_q, packed):
        mask_head = head * spec.mask_heads // spec.heads_q
        for b, line in enumerate(mask.sequences.tolist()):
            q_begin, q_len, k_begin, k_len, row_begin, *_ = line
            of_sequence = []
            for i in range(-(-q_len // spec.q_block)):
                for first in range(0, packed * spec.q_block, tile):
                    virtual = range(first, min(first + tile, packed * spec.q_block))
                    queries = {i * spec.q_block + v % spec.q_block for v in virtual}
                    queries = {q for q in queries if q < q_len}
                    if not queries:
                        continue
                    offset = k_len - q_len if spec.causal else k_len
                    low, high = (min(q + offset, k_len - 1) for q in (min(queries), max(queries)))
                    col_end = min(max(high // spec.k_block + 1, 0), mask.cols)
                    active = [c for c in range(col_end) if rows[mask_head, row_begin + i, c]]
                    masked = [c for c in active if (c + 1) * spec.k_block - 1 > low]
                    bit_row = mask_head * mask.rows + row_begin + i
                    where = (q_begin, q_len, k_begin, k_len, k_len - q_len)
                    counts = (len(active), len(masked), col_end)
                    of_sequence.append(Item(bit_row, b, head, i * spec.q_block, first, *counts, *where, 1))
            for first in range(0, len(of_sequence), united):
                items.update(unite(of_sequence[first : first + united], rows, spec.k_block))
    return items


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("for_backward", [False, True])
@pytest.mark.parametrize("pack_heads", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_plan(spec: Case, pack_heads: bool, for_backward: bool, device: str):
    masks = block_masks(spec, seed=5)
    mask = build_mask(spec, masks, device, seed=5)
    rows = expected_rows(spec, trimmed(spec, masks), spec.mask_form)
    items = work_list(mask, spec.heads_q, spec.heads_k, 64, pack_heads, for_backward)
    assert items.dtype == torch.int32 and items.device.type == device
    packed = packed_heads(spec, pack_heads)
    tile = tile_rows(spec, mask, packed, 64, for_backward)
    tiles = -(-spec.q_block * packed // tile)
    assert items.shape[0] <= spec.heads_q // packed * mask.rows * tiles

    got = read_items(items)
    want = expected_items(spec, mask, rows, pack_heads, for_backward=for_backward)
    assert want <= set(got)
    for item in set(got) - want:
        assert (item.blocks, item.masked) == (0, 0), f"{item} holds no query, yet has blocks"
    check_order(got, mask.rows, tiles, packed, tile)
    # So small a problem is one section.
    assert [i.blocks for i in got] == sorted((i.blocks for i in got), reverse=True)


def check_order(items: list[Item], rows: int, tiles: int, packed: int, tile: int) -> None:
    """Items are sorted by weight, stably, within sections of the natural order (group, row, tile)."""
    places = [((item.head // packed) * rows + item.bit_row % rows) * tiles + item.first_row // tile for item in items]
    assert len(set(places)) == len(items)
    if any(item.united > 1 for item in items):
        # Neighbours are united: few items, in one section.
        section = [(-item.blocks, place) for item, place in zip(items, places, strict=True)]
        assert section == sorted(section)
        return
    rank = {place: rank for rank, place in enumerate(sorted(places))}
    natural = [rank[place] for place in places]
    begin = 0
    for end, highest in enumerate(itertools.accumulate(natural, max), start=1):
        if highest == end - 1:
            section = [(-items[p].blocks, natural[p]) for p in range(begin, end)]
            assert section == sorted(section)
            begin = end


@pytest.mark.parametrize("device", cases.DEVICES)
def test_plan_of_several_sections(device: str):
    """Keys and values that outgrow the L2 cache: heavy tiles come first section by section, and none is lost."""
    spec = case("sections", lens_q=(20000,), heads_q=32, heads_k=32, mask_heads=32, q_block=128, k_block=128)
    mask = build_mask(spec, block_masks(spec, 0), device)
    items = read_items(work_list(mask, 32, 32, 128, True))
    check_order(items, mask.rows, 1, 1, 128)
    assert sum(item.blocks for item in items) == int(mask.to_dense().sum())
    heads_in_front = {item.head for item in items[: len(items) // 4]}
    assert len(heads_in_front) < 32, "tiles of all heads come first, so their keys cannot stay in the cache"


ORDERED = (
    # Few items of few words, in several sections.
    case("small", lens_q=(1024,) * 8, packed=False, heads_q=32, heads_k=32, mask_heads=32, causal=True, density=0.1),
    # One section, of blocks that have several tiles.
    case("tiles", lens_q=(1024,) * 8, packed=False, heads_q=32, heads_k=8, mask_heads=8, causal=True, density=0.1),
    # More columns, and longer sections, than a CTA counts for itself.
    case("wide", lens_q=(640,), lens_k=(40000,), heads_q=8, heads_k=8, mask_heads=8, density=0.1),
    case("long", lens_q=(20000,), heads_q=16, heads_k=4, mask_heads=16, density=0.1),
    # Too many items for halves.
    case("longer", lens_q=(20000,), heads_q=32, heads_k=32, mask_heads=32, density=0.1),
    case("packed", lens_q=(300, 0, 1000, 17) * 5, heads_q=8, heads_k=4, mask_heads=1, causal=True, density=0.3),
)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ORDERED, ids=lambda s: s.name)
def test_list_is_the_oracle_s(spec: Case):
    """Every record in its place, whichever kernels count and order: here no tile unites blocks, and none is dead."""
    spec = dataclasses.replace(spec, q_block=128, k_block=128)
    mask = build_mask(spec, block_masks(spec, 0), "cuda")
    call = (spec.heads_q, spec.heads_k, 128, 2, True)
    want = plan.plan_items(mask.bits.cpu(), mask.sequences.cpu(), *layout_of(mask)[:4], *call, uses_sm80())
    got = plan_items(mask, *call).cpu()
    assert torch.equal(got[: len(want)], want) and bool((got[len(want) :, 0] == -1).all())


def covered_blocks(items: list[Item]) -> list[tuple[int, int]]:
    """Heads and bit rows of the tiles of a list, whose tiles are whole query blocks or several."""
    return sorted((item.head, item.bit_row + i) for item in items for i in range(item.united))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_united_plan_of_several_sections(device: str):
    spec = case(
        "sections", lens_q=(20000,), heads_q=16, heads_k=16, mask_heads=16, q_block=16, pattern="alike", density=0.02
    )
    mask = build_mask(spec, block_masks(spec, 0), device)
    items = read_items(work_list(mask, 16, 16, 64, True))
    assert covered_blocks(items) == [(head, head * mask.rows + row) for head in range(16) for row in range(mask.rows)]
    if device == "cuda":
        assert {item.united for item in items} >= {1, 4}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("claimed", [160, 33, 16])
def test_united_plan_of_lying_lengths(claimed: int, device: str, unread: None):
    """Sequences that claim more rows than the mask has for them: still one tile for each row of bits."""
    batch, heads = 205, 16
    lens = torch.arange(batch + 1, dtype=torch.int32, device=device) * claimed
    block_mask = torch.rand((batch, 1, 5, 5), device=device) < 0.5
    mask = hbsattn.BlockMask.from_dense(
        block_mask, 16, 16, cu_seqlens_q=lens, cu_seqlens_k=lens, max_seqlen_q=80, max_seqlen_k=80
    )
    covered = covered_blocks(read_items(work_list(mask, heads, heads, 64, True)))
    assert covered == [(head, row) for head in range(heads) for row in range(batch * 5)]


@pytest.mark.gpu
@pytest.mark.parametrize("for_backward", [False, True])
@pytest.mark.parametrize("lens", [(17, 300), (0, 5000)])
def test_blocks_longer_than_sequences(lens: tuple[int, ...], for_backward: bool):
    """Tiles without queries end the list: nobody computes them."""
    spec = case("long", lens_q=lens, q_block=4096, k_block=64, heads_q=4, heads_k=2, mask_heads=2)
    masks = block_masks(spec, seed=13)
    mask = build_mask(spec, masks, "cuda", seed=13)
    live = read_items(work_list(mask, spec.heads_q, spec.heads_k, 64, True, for_backward))
    rows = expected_rows(spec, trimmed(spec, masks), spec.mask_form)
    want = expected_items(spec, mask, rows, True, for_backward=for_backward)
    assert set(live) == want and len(live) == len(want)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("seed", range(40))
def test_random_masks(seed: int, device: str):
    """The three constructors, bits and work lists of problems drawn at random."""
    spec = cases.random_case(seed + 500, any_block_size=True, max_len=120)
    masks = block_masks(spec, seed)
    mask = build_mask(spec, masks, device, seed=seed)
    want = expected_rows(spec, trimmed(spec, masks), spec.mask_form)
    assert torch.equal(unpack(mask.bits, mask.cols)[..., : want.shape[2]], want), f"seed {seed}: {spec}"
    pack_heads = random.Random(seed).random() < 0.7
    items = set(read_items(work_list(mask, spec.heads_q, spec.heads_k, 64, pack_heads)))
    # The ops are told of smaller blocks where no sequence fills one.
    spec = dataclasses.replace(spec, q_block=mask._q_block, k_block=mask._k_block)
    assert expected_items(spec, mask, want, pack_heads) <= items, f"seed {seed}: {spec}"


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_31_entries():
    heads, blocks = 32, 8300
    block_mask = torch.zeros((heads, blocks, blocks), dtype=torch.bool, device="cuda")
    assert block_mask.numel() > 2**31
    row = torch.arange(blocks, device="cuda")
    for head in (0, 17, 31):
        block_mask[head, row, (row * 7 + head) % blocks] = True
    lens = {"cu_seqlens_q": cu_seqlens((blocks * 128,), "cuda"), "cu_seqlens_k": cu_seqlens((blocks * 128,), "cuda")}
    mask = hbsattn.BlockMask.from_dense(block_mask, 128, 128, **lens)
    items = work_list(mask, heads, heads, 128, True)
    assert items.shape[0] == heads * blocks and int(items[:, 5].sum()) == 3 * blocks
    for head in range(heads):
        got = unpack(mask.bits[head, -3:], blocks)
        for i, r in enumerate(range(blocks - 3, blocks)):
            want = [(r * 7 + head) % blocks] if head in (0, 17, 31) else []
            assert got[i].nonzero().flatten().tolist() == want


def test_lists_helper():
    """The lists that these tests feed to the product are what they claim to be."""
    mask = torch.rand((2, 3, 9), generator=torch.Generator().manual_seed(1)) < 0.5
    counts, indices = block_lists(mask, 0)
    for head, row in itertools.product(range(2), range(3)):
        listed = set(indices[head, row, : counts[head, row]].tolist())
        assert listed == set(mask[head, row].nonzero().flatten().tolist())
