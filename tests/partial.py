"""Masks of single pairs to test with: some blocks off, some whole, some partial. Problems of them have blocks of one
pair each, which the oracle knows already."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import cases
from cases import Case, case
from hbsattn import BlockMask
from oracle import dense
from problems import Problem, block_masks, cu_seqlens, make_problem

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
