"""Masks that tests of plans and of the life of a mask share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases import Case, case
from hbsattn import BlockMask
from problems import Problem, block_lists, csr_lists, dense_mask, local_rows, make_problem

SPEC = case("life", lens_q=(100, 37), lens_k=(90, 150), q_block=32, k_block=16, causal=True)
BATCHED = case("batched_life", lens_q=(70, 70), lens_k=(90, 90), q_block=32, k_block=16, packed=False)
TOKENS = case("tokens", lens_q=(40, 25), q_block=1, k_block=16, source="indices", causal=True)
SPECS = {
    "dense": SPEC,
    "indices": dataclasses.replace(SPEC, source="indices"),
    "csr": dataclasses.replace(SPEC, source="csr"),
    "padded": dataclasses.replace(SPEC, form="batched"),
    "batched": BATCHED,
}


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def problem_of(spec: Case, device: str, seed: int = 0) -> Problem:
    return make_problem(spec, device, dtype_of(device), seed)


def counted(mask: BlockMask, calls: list[int]) -> Tensor:
    """A plan of the mask: active blocks of each row. `calls` grows when it is made."""

    def make(mask: BlockMask) -> tuple[Tensor]:
        calls.append(1)
        return (mask.to_dense().sum(-1) if mask._bits is None else (mask.bits != 0).sum(-1),)

    return mask._plan(("counted",), make)[0]


def contents(spec: Case, masks: list[Tensor], device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """What the constructor of a case takes."""
    if spec.source == "dense":
        return (dense_mask(spec, masks, spec.mask_form, seed).to(device),)
    if spec.source == "csr":
        return tuple(x.to(device) for x in csr_lists(local_rows(spec, masks), seed))
    return tuple(x.to(device) for x in block_lists(local_rows(spec, masks), seed))


def mapped(mask: BlockMask, change: Callable[[Any], Any]) -> BlockMask:
    """As FullyShardedDataParallel maps the tensors of its inputs."""
    mask = dataclasses.replace(mask)
    fields = {field.name: change(getattr(mask, field.name)) for field in dataclasses.fields(mask)}
    return dataclasses.replace(mask, **fields)
