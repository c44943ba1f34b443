"""Bad input raises before anything runs, in words that name the argument, its value and what is accepted."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cases
import hbsattn
from cases import case
from hbsattn import BlockMask, _contents
from hbsattn.utils import calculate_blocks
from problems import build_mask, cu_seqlens, make_problem

INVALID = (ValueError, TypeError)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def expect(kinds: type[Exception] | tuple[type[Exception], ...], patterns: tuple[str, ...], call: Callable[[], Any]):
    """The call raises, and its message has all the patterns and says what is accepted."""
    with pytest.raises(kinds) as raised:
        call()
    message = str(raised.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is missing in: {message}"
    assert "expected" in message, f"the message does not say what is accepted: {message}"


def attend(device: str, *, packed: bool = True, mask: BlockMask | None = None, scale: float | None = None, **changes):
    """A valid call but for the tensors in `changes`, each a function of the valid one."""
    lens = (100, 37, 200) if packed else (90, 90)
    problem = make_problem(case("valid", lens_q=lens, packed=packed), device, DTYPES[device])
    valid = {"q": problem.q, "k": problem.k, "v": problem.v}
    inputs = {name: changes[name](x) if name in changes else x for name, x in valid.items()}
    mask = problem.mask() if mask is None else mask
    return hbsattn.block_sparse_attention(*inputs.values(), mask, softmax_scale=scale)


def widen(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return torch.zeros(
        [size if i == dim % x.dim() else n for i, n in enumerate(x.shape)], dtype=x.dtype, device=x.device
    )


def keys(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Callable]:
    return {"k": change, "v": change}


def everywhere(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Callable]:
    return {"q": change, "k": change, "v": change}


def mask_for(device: str, **changes) -> BlockMask:
    spec = case("other", **changes)
    return build_mask(
        spec,
        [torch.ones((spec.mask_heads, *spec.blocks(b)), dtype=torch.bool) for b in range(len(spec.lens_q))],
        device,
    )


TENSOR_ERRORS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "q_rank_2": ({"q": lambda x: x[0]}, ValueError, ("q", r"\b2\b")),
    "q_rank_1": ({"q": lambda x: x[0, 0]}, ValueError, ("q", r"\b1\b")),
    "q_rank_5": ({"q": lambda x: x[None, None]}, ValueError, ("q", r"\b5\b")),
    "q_batched_with_packed_mask": (everywhere(lambda x: x[None]), ValueError, (r"q|mask", r"packed|batch|4|dim")),
    "q_dtype_int": ({"q": lambda x: x.int()}, INVALID, ("q", "int")),
    "all_dtype_int": (everywhere(lambda x: x.int()), INVALID, ("q", "int")),
    "all_dtype_complex": (everywhere(lambda x: x.to(torch.complex64)), INVALID, ("q", "(?i)complex")),
    "all_dtype_fp8": (everywhere(lambda x: x.to(torch.float8_e4m3fn)), INVALID, ("q", "(?i)float8")),
    "k_dtype": ({"k": lambda x: x.half()}, INVALID, ("k", "(?i)half|float16", "that of q")),
    "v_dtype": ({"v": lambda x: x.half()}, INVALID, ("v", "(?i)half|float16", "that of q")),
    "k_rank": ({"k": lambda x: x[0]}, ValueError, ("k", r"\b2\b")),
    "v_rank": ({"v": lambda x: x[None]}, ValueError, ("v", r"\b4\b|1, 337, 2, 64")),
    "k_total": ({"k": lambda x: x[:-1]}, ValueError, ("[kv]", "336")),
    "v_total": ({"v": lambda x: x[:-1]}, ValueError, ("v", "336")),
    "v_heads": ({"v": lambda x: x[:, :1]}, ValueError, ("v", r"\b1\b")),
    "k_head_dim": ({"k": lambda x: x[..., :32]}, ValueError, (r"\b[kv]\b", r"\b32\b")),
    "v_scalar": ({"v": lambda x: x.new_ones(())}, ValueError, ("v", "dimensions", r"\b0\b")),
    "v_head_dim_0": ({"v": lambda x: x[..., :0]}, ValueError, ("v", "head_dim", r"\b0\b")),
    "v_head_dim_257": ({"v": lambda x: widen(x, -1, 257)}, ValueError, (r"head_dim of v|head dim of v", r"\b257\b")),
    "q_head_dim": ({"q": lambda x: x[..., :32]}, ValueError, ("head_dim|q|k", r"\b32\b")),
    "head_ratio": ({"q": lambda x: widen(x, 1, 5)}, ValueError, ("heads_q", r"\b5\b", r"\b2\b")),
    "more_key_heads": (keys(lambda x: widen(x, 1, 8)), ValueError, ("heads_q", r"\b4\b", r"\b8\b")),
    "no_heads": (everywhere(lambda x: x[:, :0]), ValueError, ("head", r"\b0\b")),
    "no_key_heads": (keys(lambda x: x[:, :0]), ValueError, ("head|k", r"\b0\b")),
    "head_dim_0": (everywhere(lambda x: x[..., :0]), ValueError, ("head_dim", r"\b0\b")),
    "head_dim_257": (everywhere(lambda x: widen(x, -1, 257)), ValueError, ("head_dim", r"\b257\b")),
    "head_dim_512": (everywhere(lambda x: widen(x, -1, 512)), ValueError, ("head_dim", r"\b512\b")),
    "q_strided_last": ({"q": lambda x: widen(x, -1, 128)[..., ::2]}, ValueError, ("q", r"\b2\b", "contiguous|stride")),
    "k_strided_last": ({"k": lambda x: widen(x, -1, 128)[..., ::2]}, ValueError, ("k", r"\b2\b", "contiguous|stride")),
    "v_expanded_last": ({"v": lambda x: x[..., :1].expand(x.shape)}, ValueError, ("v", r"\b0\b", "contiguous|stride")),
    "more_queries_than_rows": ({"q": lambda x: widen(x, 0, 10000)}, ValueError, ("rows|row|q", r"\b10000\b|\b157\b")),
    "fewer_queries_than_rows": ({"q": lambda x: x[:5]}, ValueError, ("rows|row|q", r"\b5\b")),
    "more_keys_than_columns": (keys(lambda x: widen(x, 0, 100000)), ValueError, ("col|k", r"\b100000\b")),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_tensors(name: str, device: str):
    changes, kinds, patterns = TENSOR_ERRORS[name]
    expect(kinds, patterns, lambda: attend(device, **changes))


BATCHED_ERRORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "q_packed_with_batched_mask": (everywhere(lambda x: x[0]), (r"q|mask", r"batch|3|dim")),
    "q_batch": ({"q": lambda x: widen(x, 0, 3)}, ("q|k|batch", r"\b3\b")),
    "k_batch": (keys(lambda x: widen(x, 0, 3)), ("k|batch", r"\b3\b")),
    "all_batch": (everywhere(lambda x: widen(x, 0, 3)), ("batch|rows|q", r"\b3\b")),
    "q_length": ({"q": lambda x: widen(x, 1, 91)}, ("q", r"\b91\b", r"\b90\b")),
    "q_length_other_blocks": ({"q": lambda x: widen(x, 1, 300)}, ("q", r"\b300\b")),
    "k_length": (keys(lambda x: widen(x, 1, 89)), ("k", r"\b89\b", r"\b90\b")),
    "v_length": ({"v": lambda x: widen(x, 1, 89)}, ("v", r"\b89\b")),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", BATCHED_ERRORS)
def test_batched_tensors(name: str, device: str):
    changes, patterns = BATCHED_ERRORS[name]
    expect(ValueError, patterns, lambda: attend(device, packed=False, **changes))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_softmax_scale(scale: float, device: str):
    number = r"-?(?:\d|nan|inf)"
    expect(ValueError, ("softmax_scale", number), lambda: attend(device, scale=scale))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_mask_of_another_problem(device: str):
    for patterns, changes in (
        ((r"head", r"\b3\b", r"\b1\b.*\b2\b.*\b4\b"), {"mask_heads": 3}),
        (("mask|row", r"337"), {"lens_q": (10, 20, 30)}),
        (("mask|row|batch", r"337"), {"lens_q": (1000, 2000, 3000)}),
        (("mask|col", r"337"), {"lens_k": (10, 20, 30), "form": "batched"}),
        (("mask|row|batch", r"337"), {"lens_q": (100,), "lens_k": (337,)}),
        (("q|mask", r"packed|batch|dim"), {"packed": False, "lens_q": (100,) * 3}),
    ):
        mask = mask_for(device, **changes)
        expect(ValueError, patterns, lambda mask=mask: attend(device, mask=mask))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("mask", [None, "dense", 3])
def test_mask_type(mask: object, device: str):
    problem = make_problem(case("valid"), device, DTYPES[device])
    wrong = torch.ones((4, 7, 7), dtype=torch.bool, device=device) if mask == "dense" else mask
    patterns = (f"mask is a {type(wrong).__name__}", "BlockMask")
    expect(TypeError, patterns, lambda: hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, wrong))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("batch", [1, 2])
def test_batch_of_the_mask(batch: int, device: str):
    """A batch dimension of 1 stands for as many sequences as the constructor is told."""
    mask = BlockMask.from_dense(torch.ones((1, 2, 2, 2), dtype=torch.bool, device=device), 32, 32, batch_size=batch)
    q = torch.zeros(3, 64, 2, 16, dtype=DTYPES[device], device=device)
    with pytest.raises(ValueError) as raised:
        hbsattn.block_sparse_attention(q, q, q, mask)
    hint = ": build it with batch_size=3" if batch == 1 else ""
    assert str(raised.value) == f"q has a batch of 3; expected {batch}, that of the mask{hint}"


# Constructors


def dense(device: str, shape: tuple[int, ...] = (2, 6, 7), dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def lens(device: str, queries: tuple[int, ...] = (100, 37), keys: tuple[int, ...] = (100, 50)) -> dict[str, Any]:
    return {"cu_seqlens_q": cu_seqlens(queries, device), "cu_seqlens_k": cu_seqlens(keys, device)}


LONGEST = {"max_seqlen_q": 100, "max_seqlen_k": 100}


def integers(device: str, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# Name: (call, accepted exceptions, patterns). Valid: 137 queries in 4 + 2 blocks of 32, 150 keys in 4 + 2 of 32.
CONSTRUCTOR_ERRORS: dict[str, tuple[Callable[[str], Any], Any, tuple[str, ...]]] = {
    "q_block_0": (lambda d: BlockMask.from_dense(dense(d), 0, 32, **lens(d)), ValueError, ("q_block_size", r"\b0\b")),
    "k_block_0": (lambda d: BlockMask.from_dense(dense(d), 32, 0, **lens(d)), ValueError, ("k_block_size", r"\b0\b")),
    "q_block_negative": (
        lambda d: BlockMask.from_dense(dense(d), -16, 32, **lens(d)),
        ValueError,
        ("q_block_size", "-16"),
    ),
    "q_block_float": (
        lambda d: BlockMask.from_dense(dense(d), 32.0, 32, **lens(d)),
        TypeError,
        ("q_block_size", r"32\.0"),
    ),
    "max_seqlen_float": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), max_seqlen_k=137.0),
        TypeError,
        ("max_seqlen_k", r"137\.0", "int"),
    ),
    "max_seqlen_tensor": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), max_seqlen_q=torch.tensor([137])),
        TypeError,
        ("max_seqlen_q", r"\(1,\)", "int"),
    ),
    "seqlen_str": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 2, 2)), 32, 32, seqlen_q="64", seqlen_k=64),
        TypeError,
        ("seqlen_q", "'64'", "int"),
    ),
    "batched_q_block_0": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 2, 2)), 0, 32),
        ValueError,
        ("q_block_size", r"\b0\b"),
    ),
    "indices_k_block_0": (
        lambda d: BlockMask.from_indices(integers(d, 1, 6), integers(d, 1, 6, 2), 32, 0, **lens(d), **LONGEST),
        ValueError,
        ("k_block_size", r"\b0\b"),
    ),
    "csr_q_block_0": (
        lambda d: BlockMask.from_csr(integers(d, 1, 7), integers(d, 0), 0, 32, **lens(d), **LONGEST),
        ValueError,
        ("q_block_size", r"\b0\b"),
    ),
    "mask_dtype_float": (
        lambda d: BlockMask.from_dense(dense(d, dtype=torch.float32), 32, 32, **lens(d)),
        TypeError,
        ("block_mask", "float32", "bool"),
    ),
    "mask_dtype_uint8": (
        lambda d: BlockMask.from_dense(dense(d, dtype=torch.uint8), 32, 32, **lens(d)),
        TypeError,
        ("block_mask", "uint8", "bool"),
    ),
    "mask_not_a_tensor": (
        lambda d: BlockMask.from_dense([[True]], 32, 32, **lens(d)),
        TypeError,
        ("block_mask", "list"),
    ),
    "mask_rank_2": (
        lambda d: BlockMask.from_dense(dense(d, (6, 7)), 32, 32, **lens(d)),
        ValueError,
        ("block_mask", r"\b2\b"),
    ),
    "mask_rank_5": (
        lambda d: BlockMask.from_dense(dense(d, (1,) * 5), 32, 32, **lens(d)),
        ValueError,
        ("block_mask", r"\b5\b"),
    ),
    "mask_no_heads": (
        lambda d: BlockMask.from_dense(dense(d, (0, 6, 7)), 32, 32, **lens(d)),
        ValueError,
        ("head", r"\b0\b"),
    ),
    "flat_mask_batched_lengths": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, seqlen_q=192, seqlen_k=224),
        ValueError,
        ("block_mask", r"\b3\b", r"\b4\b"),
    ),
    "flat_mask_no_lengths": (lambda d: BlockMask.from_dense(dense(d), 32, 32), ValueError, ("block_mask", r"\b4\b")),
    "cu_q_alone": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, cu_seqlens_q=cu_seqlens((100, 37), d)),
        ValueError,
        ("cu_seqlens_k", "None"),
    ),
    "cu_k_alone": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, cu_seqlens_k=cu_seqlens((100, 37), d)),
        ValueError,
        ("cu_seqlens_q", "None"),
    ),
    "cu_int64": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **{n: t.long() for n, t in lens(d).items()}),
        INVALID,
        ("cu_seqlens_q", "(?i)int64|long", "int32"),
    ),
    "cu_float": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **{n: t.float() for n, t in lens(d).items()}),
        INVALID,
        ("cu_seqlens_q", "(?i)float", "int32"),
    ),
    "cu_k_int64": (
        lambda d: BlockMask.from_dense(
            dense(d), 32, 32, cu_seqlens_q=lens(d)["cu_seqlens_q"], cu_seqlens_k=lens(d)["cu_seqlens_k"].long()
        ),
        INVALID,
        ("cu_seqlens_k", "(?i)int64|long", "int32"),
    ),
    "cu_rank_2": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **{n: t[None] for n, t in lens(d).items()}),
        ValueError,
        ("cu_seqlens_q", r"\b(1, 3|2)\b"),
    ),
    "cu_empty": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **{n: t[:0] for n, t in lens(d).items()}),
        ValueError,
        ("cu_seqlens_q", r"\b0\b"),
    ),
    "cu_batches_differ": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d, keys=(100, 25, 25))),
        ValueError,
        ("cu_seqlens_k", r"\b[34]\b"),
    ),
    "cu_and_seqlen": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), seqlen_q=100),
        ValueError,
        ("seqlen_q", r"\b100\b"),
    ),
    "cu_and_seqlen_k": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), seqlen_k=100),
        ValueError,
        ("seqlen_k", r"\b100\b"),
    ),
    "cu_batch_size": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), batch_size=5),
        ValueError,
        ("batch_size", r"\b5\b", r"\b2\b"),
    ),
    "padded_mask_batch": (
        lambda d: BlockMask.from_dense(dense(d, (3, 1, 4, 4)), 32, 32, **lens(d)),
        ValueError,
        ("block_mask", r"\b3\b", r"\b2\b"),
    ),
    "max_seqlen_without_cu": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 4, 4)), 32, 32, max_seqlen_q=100),
        ValueError,
        ("max_seqlen_q", r"\b100\b"),
    ),
    "max_seqlen_q_too_long": (
        lambda d: BlockMask.from_dense(dense(d, (2, 1, 4, 4)), 32, 32, **lens(d), max_seqlen_q=1000),
        ValueError,
        ("max_seqlen_q", r"\b1000\b"),
    ),
    "max_seqlen_k_too_long": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), max_seqlen_k=1000),
        ValueError,
        ("max_seqlen_k", r"\b1000\b"),
    ),
    "max_seqlen_q_too_short": (
        lambda d: BlockMask.from_dense(dense(d), 32, 32, **lens(d), max_seqlen_q=10),
        ValueError,
        ("block_mask|max_seqlen_q", r"\b10\b"),
    ),
    "seqlen_q": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 4, 4)), 32, 32, seqlen_q=129),
        ValueError,
        ("seqlen_q", r"\b129\b", r"\b128\b"),
    ),
    "seqlen_q_short": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 4, 4)), 32, 32, seqlen_q=96),
        ValueError,
        ("seqlen_q", r"\b96\b", r"\b97\b"),
    ),
    "seqlen_k": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 4, 4)), 32, 32, seqlen_k=200),
        ValueError,
        ("seqlen_k", r"\b200\b"),
    ),
    "seqlen_negative": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 0, 4)), 32, 32, seqlen_q=-5),
        ValueError,
        ("seqlen_q", "-5"),
    ),
    "batch_size": (
        lambda d: BlockMask.from_dense(dense(d, (3, 1, 4, 4)), 32, 32, batch_size=2),
        ValueError,
        ("block_mask|batch", r"\b3\b", r"\b2\b"),
    ),
    "batch_size_negative": (
        lambda d: BlockMask.from_dense(dense(d, (1, 1, 4, 4)), 32, 32, batch_size=-2),
        ValueError,
        ("batch", "-2"),
    ),
    "indices_no_max_seqlen": (
        lambda d: BlockMask.from_indices(integers(d, 1, 6), integers(d, 1, 6, 2), 32, 32, **lens(d)),
        ValueError,
        ("max_seqlen_q", "None"),
    ),
    "csr_no_max_seqlen_k": (
        lambda d: BlockMask.from_csr(integers(d, 1, 7), integers(d, 0), 32, 32, **lens(d), max_seqlen_q=100),
        ValueError,
        ("max_seqlen_k", "None"),
    ),
    "indices_batched_no_seqlen_k": (
        lambda d: BlockMask.from_indices(integers(d, 1, 1, 6), integers(d, 1, 1, 6, 2), 32, 32),
        ValueError,
        ("seqlen_k", "None"),
    ),
    "csr_batched_no_seqlen_q": (
        lambda d: BlockMask.from_csr(integers(d, 1, 7), integers(d, 0), 32, 32, seqlen_k=100),
        ValueError,
        ("seqlen_q", "None"),
    ),
    "csr_batched_rows": (
        lambda d: BlockMask.from_csr(integers(d, 1, 7), integers(d, 0), 32, 32, seqlen_q=128, seqlen_k=100),
        ValueError,
        ("indptr", r"\b7\b", r"\b4\b"),
    ),
    "counts_dtype": (
        lambda d: BlockMask.from_indices(dense(d, (1, 6)), integers(d, 1, 6, 2), 32, 32, **lens(d), **LONGEST),
        TypeError,
        ("counts", "bool", "int32"),
    ),
    "indices_dtype": (
        lambda d: BlockMask.from_indices(
            integers(d, 1, 6), integers(d, 1, 6, 2, dtype=torch.float32), 32, 32, **lens(d), **LONGEST
        ),
        TypeError,
        ("indices", "float32", "int32"),
    ),
    "counts_rank": (
        lambda d: BlockMask.from_indices(integers(d, 6), integers(d, 6, 2), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("counts", r"\b1\b"),
    ),
    "indices_rank": (
        lambda d: BlockMask.from_indices(integers(d, 1, 6), integers(d, 1, 6), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indices", r"\b2\b", r"\b3\b"),
    ),
    "indices_shape": (
        lambda d: BlockMask.from_indices(integers(d, 1, 6), integers(d, 1, 5, 2), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indices", r"\b5\b", r"\b6\b"),
    ),
    "indptr_rank": (
        lambda d: BlockMask.from_csr(integers(d, 7), integers(d, 0), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indptr", r"\b1\b", r"\b2\b"),
    ),
    "indptr_empty": (
        lambda d: BlockMask.from_csr(integers(d, 1, 0), integers(d, 0), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indptr|row", r"\b0\b|-1"),
    ),
    "csr_indices_rank": (
        lambda d: BlockMask.from_csr(integers(d, 1, 7), integers(d, 1, 0), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indices", r"\b2\b", r"\b1\b"),
    ),
    "csr_dtype": (
        lambda d: BlockMask.from_csr(dense(d, (1, 7)), integers(d, 0), 32, 32, **lens(d), **LONGEST),
        TypeError,
        ("indptr", "bool", "int32"),
    ),
    "csr_too_many_rows": (
        lambda d: BlockMask.from_csr(integers(d, 1, 100), integers(d, 0), 32, 32, **lens(d), **LONGEST),
        ValueError,
        ("indptr", r"\b99\b"),
    ),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_constructors(name: str, device: str):
    call, kinds, patterns = CONSTRUCTOR_ERRORS[name]
    expect(kinds, patterns, lambda: call(device))


def valid_calls(device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A call of each public function that takes tensors, with all those that it reads."""
    cu, blocks = lens(device), {"q_block_size": 32, "k_block_size": 32}
    block_mask = dense(device, (2, 6, 6))
    q, k, v = (torch.zeros(shape, dtype=DTYPES[device], device=device) for shape in ((137, 4, 64), *[(150, 2, 64)] * 2))
    tensors = {"q": q, "k": k, "v": v}
    lists = {"counts": integers(device, 1, 6), "indices": integers(device, 1, 6, 2)}
    rows = {"indptr": integers(device, 1, 7), "indices": integers(device, 3)}
    door = {"cu_q_seqlens": cu["cu_seqlens_q"], "cu_k_seqlens": cu["cu_seqlens_k"], "block_mask": block_mask}
    mask = BlockMask.from_dense(block_mask, **blocks, **cu)
    return {
        "from_dense": (BlockMask.from_dense, {"block_mask": block_mask, **blocks, **cu}),
        "from_indices": (BlockMask.from_indices, {**lists, **blocks, **cu, **LONGEST}),
        "from_csr": (BlockMask.from_csr, {**rows, **blocks, **cu, **LONGEST}),
        "block_sparse_attention": (hbsattn.block_sparse_attention, {**tensors, "mask": mask}),
        "HBSAttention": (hbsattn.HBSAttention, {**tensors, **door, **blocks, "causal": False, "softmax_scale": None}),
        "calculate_blocks": (calculate_blocks, {"cu_seqlens": cu["cu_seqlens_q"], "block_size": 32}),
    }


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize(
    "function,argument",
    [(name, key) for name, (_, call) in valid_calls("cpu").items() for key, x in call.items() if torch.is_tensor(x)],
)
def test_not_a_tensor(function: str, argument: str, device: str):
    call, arguments = valid_calls(device)[function]
    call(**arguments)
    tensor = arguments[argument]
    for wrong in (tensor.tolist(), np.zeros(tensor.shape, dtype=np.int32), 3):
        patterns = (rf"^{argument} is a {type(wrong).__name__}\b", "Tensor")
        expect(TypeError, patterns, lambda wrong=wrong: call(**{**arguments, argument: wrong}))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_flops_heads(device: str):
    expect(ValueError, ("num_heads", r"\b5\b", r"\b4\b"), lambda: mask_for(device, mask_heads=4).flops(64, 5))


# Debug mode: what only the device knows


def debug_cases(device: str) -> dict[str, tuple[Callable[[], Any], tuple[str, ...]]]:
    def packed(queries: list[int], keys: list[int], rows: int = 6, cols: int = 6, **keywords: Any) -> BlockMask:
        cu = {
            "cu_seqlens_q": torch.tensor(queries, dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor(keys, dtype=torch.int32, device=device),
        }
        return BlockMask.from_dense(dense(device, (1, rows, cols)), 32, 32, **cu, **keywords)

    def lists(counts: list[int], entry: int) -> BlockMask:
        counts_tensor = torch.tensor([counts], dtype=torch.int32, device=device)
        indices = torch.full((1, 6, 2), entry, dtype=torch.int32, device=device)
        return BlockMask.from_indices(counts_tensor, indices, 32, 32, **lens(device), **LONGEST)

    def csr(indptr: list[int], entry: int) -> BlockMask:
        rows = torch.tensor([indptr], dtype=torch.int32, device=device)
        indices = torch.full((6,), entry, dtype=torch.int32, device=device)
        return BlockMask.from_csr(rows, indices, 32, 32, **lens(device), **LONGEST)

    good = [0, 100, 137]
    return {
        "start": (lambda: packed([1, 100, 137], good), ("cu_seqlens_q", r"\b1\b", r"\b0\b")),
        "start_k": (lambda: packed(good, [5, 100, 137]), ("cu_seqlens_k", r"\b5\b", r"\b0\b")),
        "monotone": (lambda: packed([0, 150, 137], good, 7), ("cu_seqlens_q", r"\b137\b", r"\b150\b")),
        "monotone_k": (lambda: packed(good, [0, 150, 137], 6, 7), ("cu_seqlens_k", r"\b137\b", r"\b150\b")),
        "rows": (lambda: packed(good, good, rows=7), (r"\b7\b", r"\b6\b")),
        "columns": (lambda: packed(good, good, cols=9), (r"\b9\b", r"\b6\b")),
        "max_seqlen_k": (lambda: packed(good, good, max_seqlen_k=64), ("max_seqlen_k", r"\b64\b", r"\b100\b")),
        "count_negative": (lambda: lists([1, 1, -1, 1, 1, 1], 0), ("counts", "-1")),
        "count_large": (lambda: lists([1, 3, 1, 1, 1, 1], 0), ("counts", r"\b3\b", r"\b2\b")),
        "index_negative": (lambda: lists([1] * 6, -1), ("indices", "-1")),
        "index_large": (lambda: lists([1] * 6, 4), ("indices", r"\b4\b")),
        "index_of_shorter_sequence": (lambda: lists([0, 0, 0, 0, 1, 1], 3), ("indices", r"\b3\b", r"\b1\b")),
        "indptr_decreases": (lambda: csr([0, 2, 1, 1, 1, 1, 1], 0), ("indptr",)),
        "indptr_large": (lambda: csr([0, 1, 1, 1, 1, 1, 7], 0), ("indptr", r"\b7\b", r"\b6\b")),
        "csr_index_large": (lambda: csr([0, 1, 1, 1, 1, 1, 1], 9), ("indices", r"\b9\b")),
    }


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", debug_cases("cpu"))
def test_debug(name: str, device: str):
    """Contents are always checked on a CPU; on CUDA, what debug mode refuses is accepted, and safe, without it."""
    call, patterns = debug_cases(device)[name]
    if device == "cuda":
        assert isinstance(call(), BlockMask)
        hbsattn.set_debug(True)
    expect(ValueError, patterns, call)


@pytest.mark.parametrize("device", cases.DEVICES)
def test_debug_totals(device: str):
    hbsattn.set_debug(True)
    expect(ValueError, ("q", r"\b330\b", r"\b337\b"), lambda: attend(device, q=lambda x: x[:330]))
    expect(ValueError, ("k", r"\b330\b", r"\b337\b"), lambda: attend(device, **keys(lambda x: x[:330])))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_debug_accepts_what_is_valid(device: str):
    hbsattn.set_debug(True)
    for spec in cases.CASES:
        if spec.source == "dense":
            make_problem(spec, device, DTYPES[device]).run()


@pytest.mark.parametrize(
    "value,enabled",
    [*((x, True) for x in ("1", "true", "On", "YES")), *((x, False) for x in ("0", "False", "off", "no", ""))],
)
def test_debug_from_the_environment(value: str, enabled: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HBSATTN_DEBUG", value)
    assert _contents._read_environment() is enabled


def test_debug_from_the_environment_refuses_other_words():
    program = "import hbsattn"
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1]), "HBSATTN_DEBUG": "perhaps"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "ValueError: HBSATTN_DEBUG is 'perhaps'; expected 1, true" in done.stderr


@pytest.mark.parametrize("value", ["0", "off", 1, None])
def test_set_debug_takes_a_bool(value: object):
    expect(TypeError, ("enabled", re.escape(repr(value))), lambda: hbsattn.set_debug(value))


# What only CUDA refuses


@pytest.mark.gpu
def test_not_on_cuda():
    problem = make_problem(case("float64"), "cuda", torch.float64)
    expect(ValueError, ("float64", "float16, bfloat16 or float32"), problem.run)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["q", "k", "v", "mask"])
def test_devices_differ(which: str):
    problem = make_problem(case("devices"), "cuda", torch.bfloat16)
    inputs = {"q": problem.q, "k": problem.k, "v": problem.v}
    mask = problem.mask()
    if which == "mask":
        mask = mask.to("cpu")
    else:
        inputs[which] = inputs[which].cpu()
    expect(INVALID, ("cpu", "cuda"), lambda: hbsattn.block_sparse_attention(*inputs.values(), mask))


@pytest.mark.gpu
def test_cu_seqlens_on_another_device():
    expect(
        INVALID,
        ("cu_seqlens_q", "cpu", "cuda"),
        lambda: BlockMask.from_dense(dense("cuda"), 32, 32, **lens("cpu")),
    )
    expect(
        INVALID,
        ("counts|indices", "cpu", "cuda"),
        lambda: BlockMask.from_indices(
            integers("cuda", 1, 6), integers("cpu", 1, 6, 2), 32, 32, **lens("cuda"), **LONGEST
        ),
    )


@pytest.mark.gpu
def test_an_error_leaves_the_context_usable():
    problem = make_problem(case("after"), "cuda", torch.bfloat16)
    with pytest.raises(ValueError):
        hbsattn.block_sparse_attention(problem.q, problem.k, problem.v, problem.mask(), softmax_scale=-1.0)
    torch.cuda.synchronize()
    assert bool(torch.isfinite(problem.run()[0]).all())


def test_build_without_cuda():
    """A build without kernels says so, and what to build, to whoever names a CUDA device."""
    if hbsattn.build_info()["cuda"]:
        pytest.skip("hbsattn was built with CUDA")

    def name_cuda() -> None:
        if torch.cuda.is_available():
            make_problem(case("host_only"), "cuda", torch.bfloat16).run()
        else:  # no tensor can be there, but the table of sequences can be asked for
            torch.ops.hbsattn.make_sequences(None, None, torch.device("cuda"), 2, 100, 100, 2, 64, 64)

    expect((ValueError, NotImplementedError), ("this build of hbsattn has no CUDA kernels", "nvcc"), name_cuda)
