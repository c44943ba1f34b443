"""Query blocks of 64 rows in pairs: one tile has two neighbours, reads once what both attend to, and computes of the
rest what each does."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import hbsattn
from cases import DEVICES, Case, case
from plans import plan_items
from problems import Problem, attended_keys, build_mask, judge, make_problem, same

# How a block's list and its neighbour's are alike. `mixed`: each pair another way, by turns.
KINDS = ("alike", "near", "disjoint", "first_empty", "second_empty", "empty", "first_longer", "second_longer", "random")
HEADS = {"heads_q": 16, "heads_k": 4, "mask_heads": 16}


def pair_case(name: str, **changes) -> Case:
    """Enough blocks that they come in pairs, and an odd number of them, the last of which is cut."""
    return case(name, **{"lens_q": (64 * 16 + 23,), "density": 0.3, "head_dim": 128, **HEADS, **changes})


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
            pairs = [relate(mask[:, i : i + 2], KINDS[i // 2 % len(KINDS)], generator) for i in range(0, rows, 2)]
            masks.append(torch.cat(pairs, 1) if pairs else mask)
        else:
            masks.append(relate(mask, kind, generator))
    return masks


def pair_problem(spec: Case, kind: str, device: str, dtype: torch.dtype) -> Problem:
    problem = make_problem(spec, device, dtype)
    problem.block_masks = make_masks(spec, kind)
    if device == "cuda":
        forward = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())["forward"]
        assert "pairs" in forward["kernel"] and forward["tile_rows"] == 128, forward
        assert forward["kernel"] in {kernel["name"] for kernel in hbsattn.build_info()["kernels"]}
    return problem


def check(spec: Case, kind: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    problem = pair_problem(spec, kind, device, dtype)
    judge(problem, *problem.run())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_kinds(kind: str, causal: bool, device: str):
    check(pair_case(kind, causal=causal), kind, device, torch.float32 if device == "cpu" else torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("k_block", [16, 48, 64, 128, 256])
def test_head_dims_and_key_blocks(k_block: int, head_dim: int):
    for causal in (False, True):
        check(pair_case("shapes", k_block=k_block, head_dim=head_dim, causal=causal), "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [-1100, -200, -64, -23, -1, 0, 1, 41, 63, 64, 65, 300])
def test_causal_offsets(offset: int):
    """The second block of a pair sees keys that the first does not, and either may see none."""
    for k_block in (16, 64, 256):
        spec = pair_case("offset", causal=True, k_block=k_block, density=0.7)
        spec = dataclasses.replace(spec, lens_k=(max(spec.lens_q[0] + offset, 1),))
        check(spec, "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("k_block", [16, 64, 128])
def test_sequences(k_block: int, causal: bool):
    """Odd and even numbers of blocks, one block, none, and ends anywhere in the first block of a pair or the second."""
    lens_q = (1, 64, 65, 0, 128, 129, 191, 192, 300, 0, 250)
    lens_k = (100, 64, 500, 70, 0, 129, 63, 1000, 17, 0, 251)
    spec = pair_case(
        "sequences", lens_q=lens_q, lens_k=lens_k, k_block=k_block, causal=causal, heads_q=32, mask_heads=32
    )
    check(spec, "mixed")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
def test_batches(layout: str):
    check(pair_case("batch", lens_q=(300,) * 5, lens_k=(410,) * 5, packed=False, layout=layout, causal=True), "mixed")


@pytest.mark.gpu
def test_heads_that_share_tiles():
    """Blocks that have 64 rows over the heads that share them."""
    for q_block, group in ((32, 2), (16, 4)):
        heads = {"heads_q": 16 * group, "heads_k": 16, "mask_heads": 16}
        spec = pair_case("shared", q_block=q_block, lens_q=(q_block * 17 - 5,), k_block=32, causal=True, **heads)
        check(spec, "mixed")
        check(spec, "near")


@pytest.mark.gpu
def test_long_lists():
    """Columns of several chunks, of which one row has few and the other many."""
    spec = pair_case("long", lens_q=(64 * 5,), lens_k=(16 * 1100,), k_block=16, density=0.1, heads_q=64, mask_heads=64)
    for kind in ("mixed", "first_longer", "second_longer"):
        check(spec, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k_block", [16, 64, 256])
def test_unattended_keys_stay_outside(k_block: int, value: float):
    """Also those of active blocks that causality hides from every query of the blocks that are active with them."""
    for kind in ("mixed", "disjoint"):
        problem = pair_problem(pair_case("poison", causal=True, k_block=k_block), kind, "cuda", torch.float16)
        keep = torch.cat(attended_keys(problem, blocks_alone=False))[..., None].cuda()
        for x in (problem.k, problem.v):
            x.masked_fill_(~keep, value)
        judge(problem, *problem.run())


@pytest.mark.gpu
def test_bitwise_repeatable():
    problem = pair_problem(pair_case("repeat", causal=True), "mixed", "cuda", torch.bfloat16)
    mask = problem.mask()
    first = problem.run(mask)
    for _ in range(50):
        again = problem.run(mask)
        assert same(first[0], again[0]) and same(first[1], again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(64 * 16 + 23,), (64 * 40, 64 * 41 + 1, 0, 100), (64 * 400,)])
def test_plan(lens: tuple[int, ...]):
    """Every block is in one tile, which counts what both attend to and what each does alone."""
    spec = pair_case("plan", lens_q=lens, causal=True)
    masks = make_masks(spec, "mixed")
    mask = build_mask(spec, masks, "cuda")
    items = plan_items(mask, 16, 4, 128, 2, True).cpu()
    live = int((items[:, 0] >= 0).sum())
    assert bool((items[live:, 0] == -1).all())
    got = {tuple(item) for item in items[:live][:, [0, 1, 2, 3, 5, 6, 13, 14, 15]].tolist()}
    want, row_begin = set(), 0
    for b, block_mask in enumerate(masks):
        rows, cols = spec.blocks(b)
        # What some query of each block sees.
        last = torch.minimum(torch.arange(1, rows + 1) * 64, torch.tensor(spec.lens_q[b])) - 1
        visible = block_mask & (torch.arange(cols) * 64 <= last[:, None])
        for head in range(16):
            for row in range(0, rows, 2):
                united = min(2, rows - row)
                first, second = visible[head, row], visible[head, row + 1] if united > 1 else torch.zeros(cols).bool()
                both, alone = int((first & second).sum()), [int((first & ~second).sum()), int((second & ~first).sum())]
                bit_row = head * mask.rows + row_begin + row
                want.add((bit_row, b, head, 64 * row, 2 * both + sum(alone), 0, united, *alone))
        row_begin += rows
    assert want <= got and live == len(got)
    assert not any(any(item[4:6]) or any(item[7:]) for item in got - want), "a tile of no block has something to attend"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"lens_q": (64 * 16,), "mask_heads": 16},  # fewer blocks than keep two on each multiprocessor
        {"k_block": 75},
        {"q_block": 60},
        {"head_dim": 192},
        {"lens_q": (64,) * 30},
    ],
    ids=str,
)
def test_what_has_no_pairs(changes: dict):
    spec = pair_case("other", **changes)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    forward = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())["forward"]
    assert "pairs" not in forward["kernel"]
    judge(problem, *problem.run())
