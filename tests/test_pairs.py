"""Query blocks of 64 rows: of two neighbours that attend alike, one tile reads once what both attend to, and computes
of the rest what each does. Others have tiles of their own, in a kernel that runs beside that of the pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

import hbsattn
from cases import Case, case
from plans import call_of, plan_items
from problems import Problem, attended_keys, build_mask, judge, make_problem, same

pytestmark = pytest.mark.sm90

UNITED = 13  # of a WorkItem
# How a block's list and its neighbour's are alike. `mixed`: each two another way, by turns, in MIXED's order: causality
# leaves the first ones little to attend to.
PAIRS = ("alike", "near", "first_more", "second_more")  # alike enough for a tile of both
SINGLE = ("disjoint", "first_empty", "second_empty", "empty", "first_longer", "second_longer")
KINDS = (*PAIRS, *SINGLE, "random")
MIXED = ("random", "disjoint", "first_empty", "alike", "near", "second_longer", "first_more", "second_more")
MIXED += tuple(kind for kind in KINDS if kind not in MIXED)
HEADS = {"heads_q": 64, "heads_k": 16, "mask_heads": 64}
FEW_HEADS = {"heads_q": 4, "heads_k": 2, "mask_heads": 4}  # for the CPU, which has no pairs


def pair_case(name: str, **changes) -> Case:
    """Enough keys that pairs are looked for, and an odd number of blocks, the last of which is cut."""
    return case(name, **{"lens_q": (64 * 16 + 23,), "density": 0.6, "head_dim": 128, **HEADS, **changes})


def relate(mask: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """`mask`, bool (heads, q blocks, k blocks), with every second block's list made of the one before it."""
    mask = mask.clone()
    first, second = mask[:, 0::2], mask[:, 1::2]
    left = first[:, : second.shape[1]]
    few = torch.rand(mask.shape, generator=generator) < 0.1
    if kind == "alike":
        second.copy_(left)
    elif kind == "near":
        second.copy_(left & ~few[:, 1::2] | few[:, 0::2][:, : second.shape[1]])
    elif kind in ("first_more", "second_more"):
        second.copy_(left)
        more = left if kind == "first_more" else second
        more.logical_or_(torch.rand(more.shape, generator=generator) < 0.3)
    elif kind == "disjoint":
        second.logical_and_(~left)
    elif kind in ("first_empty", "second_empty"):
        (first if kind == "first_empty" else second).fill_(False)
    elif kind == "empty":
        mask.fill_(False)
    elif kind in ("first_longer", "second_longer"):
        short, long = (second, first) if kind == "first_longer" else (first, second)
        short.logical_and_(few[:, 0::2][:, : short.shape[1]])
        long.logical_or_(few[:, 0::2][:, : long.shape[1]])
    return mask


def make_masks(spec: Case, kind: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for b in range(len(spec.lens_q)):
        rows, cols = spec.blocks(b)
        mask = torch.rand((spec.mask_heads, rows, cols), generator=generator) < spec.density
        if kind == "mixed":
            kinds = itertools.cycle(MIXED[3 * b % len(MIXED) :] + MIXED[: 3 * b % len(MIXED)])
            pairs = [relate(mask[:, i : i + 2], next(kinds), generator) for i in range(0, rows, 2)]
            masks.append(torch.cat(pairs, 1) if pairs else mask)
        else:
            masks.append(relate(mask, kind, generator))
    return masks


def pair_problem(spec: Case, kind: str, device: str, dtype: torch.dtype) -> Problem:
    problem = make_problem(spec, device, dtype)
    problem.block_masks = make_masks(spec, kind)
    if device == "cuda":
        forward = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())["forward"]
        assert "pairs" in forward["pairs_kernel"] and "pairs" not in forward["kernel"], forward
        assert forward["tile_rows"] == 64
        names = {kernel["name"] for kernel in hbsattn.build_info()["kernels"]}
        assert {forward["kernel"], forward["pairs_kernel"]} <= names
    return problem


def list_items(problem: Problem, mask: hbsattn.BlockMask) -> Tensor:
    spec = problem.case
    return plan_items(mask, spec.heads_q, spec.heads_k, spec.head_dim, 2, True)


def count_tiles(items: Tensor) -> tuple[int, int]:
    """Tiles of pairs, and those of one block, of a list."""
    live, united = items[:, 0] >= 0, items[:, UNITED]
    return int((live & (united == 2)).sum()), int((live & (united == 1)).sum())


def check(spec: Case, kind: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Judges a problem; its tiles, on CUDA."""
    problem = pair_problem(spec, kind, device, dtype)
    mask = problem.mask()
    first = problem.run(mask)
    judge(problem, *first)
    if device == "cpu":
        return 0, 0
    again = problem.run(mask)  # by a list that is there
    assert same(first[0], again[0]) and same(first[1], again[1])
    return count_tiles(list_items(problem, mask))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "kind,device",
    [
        *(pytest.param(kind, "cuda", marks=pytest.mark.gpu) for kind in (*KINDS, "mixed")),
        ("mixed", "cpu"),  # which has no pairs
    ],
)
def test_kinds(kind: str, causal: bool, device: str):
    heads, dtype = (FEW_HEADS, torch.float32) if device == "cpu" else (HEADS, torch.float16)
    pairs, single = check(pair_case(kind, causal=causal, **heads), kind, device, dtype)
    if device == "cuda":
        assert (pairs > 0) == (kind in PAIRS or kind == "mixed") or kind == "random"
        assert single > 0  # the last block at least


@pytest.mark.gpu
def test_one_kind_alone():
    """Either kernel has nothing to do, or neither."""
    spec = pair_case("alone", lens_q=(64 * 16,), density=0.9)
    assert check(spec, "alike") == (8 * 64, 0)
    assert check(spec, "disjoint") == (0, 16 * 64)
    assert check(spec, "empty") == (0, 16 * 64)


@pytest.mark.gpu
def test_few_pairs_among_many_blocks():
    """More thread blocks come to the end of the list of single blocks than dead records lie before the pairs."""
    spec = pair_case("few")
    problem = pair_problem(spec, "disjoint", "cuda", torch.bfloat16)
    problem.block_masks[0][::16, 4:6] = True
    mask = problem.mask()
    judge(problem, *problem.run(mask))
    assert count_tiles(list_items(problem, mask)) == (4, 17 * 64 - 8)


@pytest.mark.gpu
def test_bits_of_another_mask():
    """Pairs that were planned may attend to nothing alike any more; calls end, and padding is nothing to attend to."""
    problem = pair_problem(pair_case("changed", causal=True), "mixed", "cuda", torch.bfloat16)
    mask = problem.mask()
    items = list_items(problem, mask)

    def run(bits: Tensor) -> tuple[Tensor, Tensor]:
        call = call_of(problem.q, problem.k, problem.v, mask, bits=bits)
        return torch.ops.hbsattn.forward(*call, items, None, False)

    before = run(mask.bits)
    for kind in KINDS:
        out, _ = run(build_mask(problem.case, make_masks(problem.case, kind, 1), "cuda").bits)
        assert not out.isnan().any()
    assert not run(torch.zeros_like(mask.bits))[0].any()
    assert not run(torch.full_like(mask.bits, -1))[0].isnan().any()
    after = run(mask.bits)
    assert same(before[0], after[0]) and same(before[1], after[1])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("k_block", [16, 48, 64, 128, 256])
def test_head_dims_and_key_blocks(k_block: int, head_dim: int):
    for causal in (False, True):
        check(pair_case("shapes", k_block=k_block, head_dim=head_dim, causal=causal), "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [-500, -200, -64, -23, -1, 0, 1, 41, 63, 64, 65, 300])
def test_causal_offsets(offset: int):
    """The second block of a pair sees keys that the first does not, and either may see none."""
    for k_block in (16, 64, 256):
        spec = pair_case("offset", causal=True, k_block=k_block, density=0.7)
        spec = dataclasses.replace(spec, lens_k=(spec.lens_q[0] + offset,))
        check(spec, "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k_block", [16, 64, 128])
def test_sequences(k_block: int, causal: bool):
    """Odd and even numbers of blocks, one block, none, and ends anywhere in the first block of a pair or the second."""
    lens_q = (1, 64, 65, 0, 128, 129, 191, 192, 300, 0, 250)
    lens_k = (100, 64, 900, 70, 0, 700, 63, 1000, 17, 0, 751)
    spec = pair_case("sequences", lens_q=lens_q, lens_k=lens_k, k_block=k_block, causal=causal)
    assert min(check(spec, "mixed")) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
def test_batches(layout: str):
    spec = pair_case("batch", lens_q=(300,) * 5, lens_k=(810,) * 5, packed=False, layout=layout, causal=True)
    assert min(check(spec, "mixed")) > 0


@pytest.mark.gpu
def test_heads_that_share_tiles():
    """Blocks that have 64 rows over the heads that share them."""
    for q_block, group in ((32, 2), (16, 4)):
        heads = {"heads_q": 64 * group, "heads_k": 64, "mask_heads": 64}
        lens = {"lens_q": (q_block * 17 - 5,), "lens_k": (800,)}
        spec = pair_case("shared", q_block=q_block, k_block=32, causal=True, **heads, **lens)
        assert min(check(spec, "mixed")) > 0
        assert min(check(spec, "near")) > 0


@pytest.mark.gpu
def test_long_lists():
    """Columns of several chunks, more of which one row has alone than the other."""
    heads = {"heads_q": 64, "heads_k": 4, "mask_heads": 64}
    spec = pair_case("long", lens_q=(65,), lens_k=(16 * 1030,), k_block=16, density=0.4, head_dim=64, **heads)
    for kind in ("first_more", "second_more"):
        pairs, _ = check(spec, kind)
        assert pairs == 64


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k_block", [16, 64, 256])
def test_unattended_keys_stay_outside(k_block: int, value: float):
    """Also those of active blocks that causality hides from every query of the blocks that are active with them."""
    for kind in ("mixed", "first_more"):
        problem = pair_problem(pair_case("poison", causal=True, k_block=k_block), kind, "cuda", torch.float16)
        keep = torch.cat(attended_keys(problem, blocks_alone=False))[..., None].cuda()
        for x in (problem.k, problem.v):
            x.masked_fill_(~keep, value)
        judge(problem, *problem.run())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["alike", "near"])
def test_small_key_blocks(kind: str):
    """A stage holds more of them than the first block sees in part: by padding, those come in two stages."""
    pairs, _ = check(pair_case("small", k_block=16, causal=True), kind, dtype=torch.float16)
    assert pairs > 0


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keys_that_the_other_block_might_see(value: float):
    """The first block alone attends to a key block, whose end causality shows to the second alone: nobody has it."""
    spec = pair_case("hidden", lens_q=(128,), lens_k=(1152,), k_block=256, causal=True)
    problem = pair_problem(spec, "alike", "cuda", torch.float16)
    problem.block_masks[0].fill_(True)
    problem.block_masks[0][:, 1, 4] = False
    mask = problem.mask()
    assert count_tiles(list_items(problem, mask)) == (spec.heads_q, 0)
    want = problem.run(mask)
    for x in (problem.k, problem.v):
        x[1152 - 64 :] = value
    assert all(same(x, y) for x, y in zip(problem.run(mask), want, strict=True))


@pytest.mark.gpu
def test_bitwise_repeatable():
    problem = pair_problem(pair_case("repeat", causal=True), "mixed", "cuda", torch.bfloat16)
    mask = problem.mask()
    first = problem.run(mask)
    for _ in range(50):
        again = problem.run(mask)
        assert same(first[0], again[0]) and same(first[1], again[1])


def pays(both: int, alone: list[int], k_block: int) -> bool:
    """pays_to_pair of csrc/plan/pairs.h."""
    gain = 5 * both - sum(alone) - 5 * abs(alone[0] - alone[1])
    return both >= sum(alone) and gain * k_block > 5 * 288


@pytest.mark.gpu
def test_what_lies_beside_a_sequence():
    """Short and long sequences have the same results alone, where short ones have no second kernel, and together."""
    lens = (64 * 7, 64 * 9, 130, 64 * 16 + 23)
    spec = pair_case("together", lens_q=lens, causal=True)
    problem = pair_problem(spec, "alike", "cuda", torch.bfloat16)
    together = problem.run()
    begin = 0
    for length, block_mask in zip(lens, problem.block_masks, strict=True):
        alone = make_problem(dataclasses.replace(spec, lens_q=(length,)), "cuda", torch.bfloat16)
        rows = slice(begin, begin + length)
        alone.q, alone.k, alone.v = (x[rows].clone() for x in (problem.q, problem.k, problem.v))
        alone.block_masks = [block_mask]
        out, lse = alone.run()
        assert same(out, together[0][rows]) and same(lse, together[1][:, rows])
        begin += length


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(64 * 16 + 23,), (64 * 40, 64 * 41 + 1, 0, 100), (64 * 100,)])
def test_plan(lens: tuple[int, ...]):
    """Every block is in one tile. Pairs are first, and count what both attend to and what each does alone; the others
    last; between them lie no fewer dead records than pairs."""
    heads = 64 if len(lens) == 1 else 16
    spec = pair_case("plan", lens_q=lens, causal=True, heads_q=heads, heads_k=4, mask_heads=heads)
    masks = make_masks(spec, "mixed")
    mask = build_mask(spec, masks, "cuda")
    items = plan_items(mask, spec.heads_q, 4, 128, 2, True).cpu()
    pairs, single = count_tiles(items)
    assert bool((items[:pairs, UNITED] == 2).all()) and bool((items[len(items) - single :, UNITED] == 1).all())
    assert bool((items[pairs : len(items) - single, 0] == -1).all()) and 2 * pairs + single <= len(items)
    for part in (items[:pairs], items[len(items) - single :].flip(0)):
        check_sections(part)
    live = items[items[:, 0] >= 0]
    got = {tuple(item) for item in live[:, [0, 1, 2, 3, 5, 6, 13, 14, 15]].tolist()}
    want, row_begin = set(), 0
    for b, block_mask in enumerate(masks):
        rows, cols = spec.blocks(b)
        # What some query of each block sees; all queries of a block see the columns before its own.
        last = torch.minimum(torch.arange(1, rows + 1) * 64, torch.tensor(spec.lens_q[b])) - 1
        visible = block_mask & (torch.arange(cols) * 64 <= last[:, None])
        own = visible.diagonal(dim1=1, dim2=2).long()
        counts = visible.sum(-1)
        both = (visible[:, 0 : rows - 1] & visible[:, 1:]).sum(-1)  # of each block and the next
        counts, both, own = counts.tolist(), both.tolist(), own.tolist()
        for head in range(spec.heads_q):
            for row in range(0, rows, 2):
                bit_row = head * mask.rows + row_begin + row
                first, second = counts[head][row], counts[head][row + 1] if row + 1 < rows else 0
                common = both[head][row] if row + 1 < rows else 0
                alone = [first - common, second - common]
                if row + 1 < rows and cols >= 8 and pays(common, alone, 64):
                    want.add((bit_row, b, head, 64 * row, first + second, 0, 2, *alone))
                    continue
                for i, count in enumerate([first, second][: rows - row]):
                    want.add((bit_row + i, b, head, 64 * (row + i), count, own[head][row + i], 1, 0, 0))
        row_begin += rows
    assert pairs > 0 and single > 0
    assert want <= got and pairs + single == len(got)
    assert not any(item[4] for item in got - want), "a tile of no block has something to attend"


def check_sections(items: Tensor) -> None:
    """A part of a list, in the order in which it is taken: sections of blocks that follow each other, in which weights
    never grow."""
    blocks, weights = items[:, 0], items[:, 5]
    begins = [0, *((weights[1:] > weights[:-1]).nonzero().flatten() + 1).tolist(), len(items)]
    for begin, end in itertools.pairwise(begins):
        assert begin == 0 or int(blocks[begin:end].min()) > int(blocks[:begin].max())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"lens_k": (448,)},  # too few keys for a second kernel
        {"k_block": 75},
        {"q_block": 60},
        {"head_dim": 192},
    ],
    ids=str,
)
def test_what_has_no_pairs(changes: dict):
    spec = pair_case("other", **changes)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    forward = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())["forward"]
    assert forward["pairs_kernel"] == ""
    judge(problem, *problem.run())
