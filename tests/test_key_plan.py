"""What the backward pass is planned with, against plain PyTorch: the transposed bits and the tiles of keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import hbsattn
from cases import Case, case
from oracle import plan as oracle
from plans import plan_backward, take_apart, uses_sm80
from problems import block_masks, build_mask
from test_mask import unpack

pytestmark = pytest.mark.gpu
KEYS_ONLY = (False, True, True)  # gradients by tiles of keys, whatever the blocks are

SIZES = (16, 32, 48, 64, 80, 128, 192, 7)
LAYOUTS = (
    {"packed": False, "lens_q": (150, 150), "lens_k": (290, 290)},
    {"lens_q": (0, 300, 50, 33, 0), "lens_k": (40, 130, 0, 290, 0)},
    {"lens_q": (0, 300, 50, 33, 0), "lens_k": (40, 130, 0, 290, 0), "form": "batched"},
)
SPECS = [
    case(
        f"{size}_{('batched', 'packed', 'packed_batched_mask')[j]}",
        k_block=size,
        q_block=SIZES[(i + 3 + j) % len(SIZES)],
        heads_q=8,
        mask_heads=(1, 2, 8)[(i + j) % 3],
        causal=(i + j) % 2 == 0,
        **layout,
    )
    for i, size in enumerate(SIZES)
    for j, layout in enumerate(LAYOUTS)
]
SPECS += [
    case("many_blocks", q_block=7, k_block=7, lens_q=(3000, 1500), heads_q=2, mask_heads=2, density=0.1),
    case("one_head_each", heads_q=3, heads_k=3, mask_heads=3, k_block=16),
    case("dense", density=1.0, k_block=32, q_block=16),
    case("empty", pattern="none", k_block=16),
    case("no_queries", lens_q=(0, 0), lens_k=(70, 90), k_block=16),
    case("no_keys", lens_q=(40, 40), lens_k=(0, 0)),
    case("no_sequences", lens_q=()),
]


@dataclasses.dataclass(frozen=True)
class KeyItem:
    column: int
    sequence: int
    query_set: int
    first_key: int
    keys: int
    united: int
    active: int
    blocks: int
    row_begin: int
    q_begin: int
    q_len: int
    k_begin: int
    diagonal: int


def key_tiles(k_block: int, head_dim: int) -> tuple[int, int, int]:
    """Keys of a tile, tiles of a block, blocks of a tile."""
    tile = oracle.choose_tile_rows(k_block, head_dim) if head_dim <= 128 else 64
    united = tile // k_block if k_block % 16 == 0 and k_block < tile else 1
    return tile, -(-k_block // tile), united


def cut_queries(spec: Case, mask: hbsattn.BlockMask, head_dim: int, deterministic: bool = False) -> oracle.QuerySets:
    blocks = (mask.batch, mask.rows, mask.cols, spec.mask_heads, spec.q_block, spec.k_block)
    heads = (spec.heads_q, spec.heads_k, head_dim)
    return oracle.cut_queries(oracle.KeyProblem(*blocks, *heads, 2, spec.causal, deterministic or uses_sm80()))


def tile_heads(spec: Case, mask: hbsattn.BlockMask, head_dim: int, deterministic: bool = False) -> int:
    """Query heads that a tile streams."""
    return cut_queries(spec, mask, head_dim, deterministic).tile_heads


def plan_lines(
    spec: Case,
    mask: hbsattn.BlockMask,
    head_dim: int,
    sequences: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    call = (spec.heads_q, spec.heads_k, head_dim, 2, True)
    rows_k = sum(spec.keys) if spec.packed else max(spec.keys, default=0)
    lines = plan_backward(mask, *call, rows_k=rows_k, deterministic=deterministic, sequences=sequences, needs=KEYS_ONLY)
    return take_apart(mask, lines, *call).key_items


def plan(
    spec: Case,
    mask: hbsattn.BlockMask,
    head_dim: int,
    sequences: Tensor | None = None,
    deterministic: bool = False,
) -> list[KeyItem]:
    """The tiles of the list in its order; those that do not exist end it."""
    items = plan_lines(spec, mask, head_dim, sequences, deterministic)
    tile_keys, tiles, united = key_tiles(spec.k_block, head_dim)
    query_sets = cut_queries(spec, mask, head_dim, deterministic).count(spec.heads_q)
    count = query_sets * mask.batch * -(-mask.cols // united) * tiles
    slots = 0 if uses_sm80() else min(count, (10 << 20) // (8 * tile_keys * -(-head_dim // 64) * 64))
    assert items.dtype == torch.int32 and items.device == mask.bits.device
    lines = items.tolist()
    live = [line for line in lines if line[0] >= 0]
    assert all(line[0] == -1 for line in lines[len(live) :])
    used: set[int] = set()
    whole = []
    for line in live:
        part, parts, slot = line[13:]
        assert 0 <= part < parts
        if part == 0:
            whole.append(KeyItem(*line[:13]))
            assert [other[13:] for other in live if other[:13] == line[:13]] == [[i, parts, slot] for i in range(parts)]
            if parts > 1:
                mine = set(range(slot, slot + parts))
                assert not used & mine and max(mine) < slots
                used |= mine
    return whole


def is_heavy(item: KeyItem, items: list[KeyItem], windows: int = 1) -> bool:
    total, working = sum(other.blocks for other in items), sum(other.blocks > 0 for other in items)
    tiles = sum(other.query_set % windows == 0 for other in items)
    compared = tiles * windows if windows > 1 and 2 * working < tiles else max(tiles, working)
    return item.blocks * compared > 3 * total and item.blocks * 4096 > total


def check_order(got: list[KeyItem], sections: list[list[KeyItem]], windows: int = 1) -> None:
    """Heavy items come first, in any order; then those of each section by weight, and as they were if that is equal."""
    items = [item for section in sections for item in section]
    heavy = [item for item in items if is_heavy(item, items, windows)]
    assert sorted(got[: len(heavy)], key=items.index) == heavy
    rest = [[item for item in section if item not in heavy] for section in sections]
    assert got[len(heavy) :] == [item for section in rest for item in sorted(section, key=lambda item: -item.blocks)]


def in_sections(
    spec: Case, mask: hbsattn.BlockMask, head_dim: int, items: list[KeyItem], deterministic: bool = False
) -> list[list[KeyItem]]:
    """Items of all sequences and sets of queries as the list has them in sections, before they are put in order."""
    sets = cut_queries(spec, mask, head_dim, deterministic)
    of_head = oracle.count_query_bytes(max(mask.batch, 1), mask.rows, mask._q_block, head_dim, 2)
    set_bytes = of_head * sets.tile_heads // sets.windows
    rows_k = sum(spec.keys) if spec.packed else max(spec.keys, default=0)
    shape = (mask.batch, mask.cols, mask._k_block, sets.count(spec.heads_q), head_dim, set_bytes, rows_k, spec.packed)
    places = oracle.place_keys(*shape)
    col_begin = mask.sequences[:, 5].tolist()
    tile_keys = key_tiles(mask._k_block, head_dim)[0]
    sections: dict[int, list[KeyItem]] = {}
    for item in items:
        tile = (item.first_key - item.column * mask._k_block) // tile_keys
        place = places.find(item.query_set, item.sequence, col_begin[item.sequence], item.column, tile)
        sections.setdefault(place // places.section, []).append(item)
    return [sections[key] for key in sorted(sections)]


def expected_items(spec: Case, mask: hbsattn.BlockMask, head_dim: int, deterministic: bool = False) -> list[KeyItem]:
    """All tiles that hold keys, in the order of sets of queries, sequences and keys."""
    tile_keys, tiles, united = key_tiles(spec.k_block, head_dim)
    rows = unpack(mask.bits, mask.cols)
    sets = cut_queries(spec, mask, head_dim, deterministic)
    items = []
    for query_set in range(sets.count(spec.heads_q)):
        masks = rows[[h * spec.mask_heads // spec.heads_q for h in sets.heads(query_set)]]
        for b, (q_begin, q_len, k_begin, k_len, row_begin, *_) in enumerate(mask.sequences.tolist()):
            of_sequence = masks[:, row_begin : row_begin - (-q_len // spec.q_block)][:, sets.blocks(query_set)]
            for first_key in (
                column * spec.k_block + tile * tile_keys
                for column in range(0, mask.cols, united)
                for tile in range(tiles)
            ):
                column = first_key // spec.k_block
                end = min(first_key + tile_keys, (column + united) * spec.k_block, k_len)
                if first_key >= end:
                    continue
                blocks = -(-end // spec.k_block) - column
                bits = of_sequence[:, :, column : column + blocks]
                active = sum(1 << i for i in range(blocks) if bits[:, :, i].any())
                counts = (end - first_key, blocks, active, int(bits.any(-1).sum()))
                where = (row_begin, q_begin, q_len, k_begin, k_len - q_len)
                items.append(KeyItem(column, b, query_set, first_key, *counts, *where))
    return items


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_transpose(spec: Case):
    mask = build_mask(spec, block_masks(spec, seed=6), "cuda", seed=6)
    call = (spec.heads_q, spec.heads_k, 64, 2, True)
    rows_k = sum(spec.keys) if spec.packed else max(spec.keys)
    columns = take_apart(mask, plan_backward(mask, *call, rows_k=rows_k, needs=KEYS_ONLY), *call).columns
    assert columns.dtype == torch.int32 and columns.shape == (spec.mask_heads, mask.cols, -(-mask.rows // 32))
    got = unpack(columns, 32 * columns.shape[2])
    assert torch.equal(got[..., : mask.rows], unpack(mask.bits, mask.cols).transpose(1, 2))
    assert not got[..., mask.rows :].any(), "bits past the last row"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_plan_keys(spec: Case, head_dim: int):
    mask = build_mask(spec, block_masks(spec, seed=7), "cuda", seed=7)
    want = expected_items(spec, mask, head_dim)
    check_order(plan(spec, mask, head_dim), in_sections(spec, mask, head_dim, want))


@pytest.mark.parametrize("k_block", [32, 128, 192])
def test_plan_of_several_sections(k_block: int):
    """Queries and gradients that outgrow the L2 cache: heavy tiles come first for two or three sequences at a time.

    80 blocks of 128 queries, of the average sequence, with 8 bytes for each of 128 columns are 10 MB; a section has 32
    MB on an H200, 27 on an H100.
    """
    spec = case(
        "sections", lens_q=(20000, 300), heads_q=4, heads_k=4, mask_heads=4, q_block=128, k_block=k_block, density=0.1
    )
    mask = build_mask(spec, block_masks(spec, seed=8), "cuda", seed=8)
    sections = in_sections(spec, mask, 128, expected_items(spec, mask, 128))
    assert len(sections) >= 3
    check_order(plan(spec, mask, 128), sections)


@pytest.mark.sm90
def test_plan_of_windows():
    """Tiles of several heads whose queries outgrow the L2 cache: one for each window of each sequence."""
    spec = case(
        "windows", lens_q=(3000, 2600), heads_q=32, heads_k=2, mask_heads=2, q_block=1, k_block=128, density=0.1
    )
    mask = build_mask(spec, block_masks(spec, seed=8), "cuda", seed=8)
    windows = cut_queries(spec, mask, 128).windows
    assert windows > 1
    check_order(plan(spec, mask, 128), in_sections(spec, mask, 128, expected_items(spec, mask, 128)), windows)


@pytest.mark.sm90
def test_parts_of_heavy_tiles():
    """Keys that every query attends to, beside others that few do: their tiles are cut."""
    spec = case("sinks", lens_q=(16384,), heads_q=8, heads_k=2, mask_heads=2, density=0.02)
    masks = block_masks(spec, seed=9)
    masks[0][:, :, 0] = True
    mask = build_mask(spec, masks, "cuda", seed=9)
    want = expected_items(spec, mask, 128)
    got = plan(spec, mask, 128)
    assert {item.column for item in got[:2]} == {0} and all(is_heavy(item, want) for item in got[:2])
    assert int(plan_lines(spec, mask, 128)[:, 14].max()) > 1


@pytest.mark.sm90
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("mask_heads", "k_block"), [(1, 128), (2, 32), (16, 256)])
def test_sets_of_heads(mask_heads: int, k_block: int, deterministic: bool):
    """Heads of a group whose queries outgrow the L2 cache: a tile streams one or two of the eight."""
    spec = case(
        "sets", lens_q=(9000,), heads_q=16, heads_k=2, mask_heads=mask_heads, q_block=128, k_block=k_block, density=0.2
    )
    mask = build_mask(spec, block_masks(spec, seed=12), "cuda", seed=12)
    assert tile_heads(spec, mask, 128, deterministic) in ((8,) if deterministic else (1, 2))
    items = expected_items(spec, mask, 128, deterministic)
    sections = in_sections(spec, mask, 128, items, deterministic)
    check_order(plan(spec, mask, 128, deterministic=deterministic), sections)


@pytest.mark.sm90
def test_too_many_parts():
    """More heavy tiles than there are slots for: all are cut into fewer parts, the same ones in every plan."""
    spec = case("globals", lens_q=(5000,), heads_q=16, heads_k=16, mask_heads=16, density=0.0)
    masks = block_masks(spec, seed=10)
    masks[0][:, :, :8] = True
    cuts = []
    for _ in range(4):
        mask = build_mask(spec, masks, "cuda", seed=10)
        plan(spec, mask, 64)
        lines = plan_lines(spec, mask, 64).tolist()
        cuts.append(sorted((line[2], line[0], line[14]) for line in lines if line[0] >= 0 and line[13] == 0))
    assert cuts[1:] == cuts[:-1]
    assert {parts for _, column, parts in cuts[0] if column < 8} == {2}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k_block", [16, 192])
def test_any_sequences_are_safe(k_block: int, seed: int):
    """Random integers for a table of sequences: no crash, and no tile twice or outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    spec = case("noise", lens_q=(100, 37, 200, 64), q_block=16, k_block=k_block, heads_q=8, mask_heads=8)
    mask = build_mask(spec, block_masks(spec, seed), "cuda")
    wild = torch.randint(-(2**31), 2**31 - 1, mask.sequences.shape, generator=generator)
    mild = torch.randint(-30, 300, mask.sequences.shape, generator=generator)
    table = torch.where(torch.rand(wild.shape, generator=generator) < 0.5, wild, mild).to("cuda", torch.int32)
    tile_keys = key_tiles(k_block, 64)[0]
    live = plan(spec, mask, 64, table)
    assert len({(item.query_set, item.sequence, item.first_key) for item in live}) == len(live)
    for item in live:
        assert item.column >= 0 and item.united >= 1 and item.column + item.united <= mask.cols
        assert 1 <= item.keys <= tile_keys and item.first_key + item.keys <= int(table[item.sequence, 3])
        assert 0 <= item.blocks <= 4 * mask.rows
