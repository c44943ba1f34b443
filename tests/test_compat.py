"""Calls of other libraries beside dense attention, with the masks spelled element by element."""

from __future__ import annotations

import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbsattn import block_sparse_attention, compat, patterns
from hbsattn.compat import block_sparse_attn
from hbsattn.compat.block_sparse_attn import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    token_streaming_attn_func,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = {
    "k_longer": ((113, 300), (203, 812)),
    "q_longer": ((512, 256), (256, 130)),
    "odd": ((1023, 0, 40), (1024, 70, 40)),
    "even": ((512,), (512,)),
    "k_twice": ((108, 256), (256, 512)),
    "q_twice": ((512, 113), (256, 203)),
    "nearly": ((1023,), (1024,)),
}
SHORT, LONG = ("k_longer", "even"), ("q_longer", "odd")
EXACT_SHORT, EXACT_LONG = ("q_twice",), ("k_twice", "k_longer", "odd", "nearly")
KINDS = {
    "dense": [0, 0, 0, 0],
    "sparse": [1, 1, 1, 1],
    "streaming": [-1, -1, -1, -1],
    "mixed": [0, 1, -1, 1],
    "named": [2, 2, 0, 1],
}
SINKS_AND_LOCALS = [1, 2, 0, 1, 1, 3, 2, 0]
TOKENS = {"few": [1, 3] * 4, "many": [64, 256] * 4, "of_heads": [0, 1, 130, 128, 1, 77, 9000, 5]}


def allowed(
    kind: int, mask: Tensor | None, info: tuple[int, int], len_q: int, len_k: int, causal: bool, exact: bool = False
) -> Tensor:
    """Bool (len_q, len_k) of one head of a sequence. `exact`: streaming heads count tokens."""
    query, key = torch.arange(len_q).view(-1, 1), torch.arange(len_k)
    row, col = query // 128, key // 128
    on = torch.ones(len_q, len_k, dtype=torch.bool)
    if kind > 0:
        on = mask[row, col]
    elif kind < 0 and exact:
        sink, local = info
        on = (key < sink) | (key > query + len_k - len_q - local)
    elif kind < 0:
        sink, local = info
        end = math.ceil(len_k / 128) + 0 * row
        if causal:
            end = math.ceil(max(len_k - len_q, 0) / 128) + 1 + row - max(len_q - len_k, 0) // 128
            end = end.clamp(max=math.ceil(len_k / 128))
        on = (col < sink) | ((col >= end - local) & (col < end))
    return on & (key <= query + len_k - len_q) if causal else on


def masks_of_heads(kinds: list[int]) -> list[int]:
    ones = 0
    found = []
    for kind in kinds:
        ones += kind == 1
        found.append(ones - 1 if kind == 1 else kind - 1)
    return found


def reference(q: Tensor, k: Tensor, v: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 (length, heads, head_dim) of one sequence; `on` is (heads, len_q, len_k)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~on, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return torch.einsum("hqk,khd->qhd", weights, v), lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [*SHORT, *(pytest.param(x, marks=pytest.mark.slow) for x in LONG)])
@pytest.mark.parametrize("kinds", KINDS)
def test_block_sparse_attn(kinds: str, lengths: str, causal: bool, device: str):
    """4 query heads of 2 key heads: results, log-sum-exp and gradients."""
    check(kinds, lengths, SINKS_AND_LOCALS, causal, False, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("lengths", [*EXACT_SHORT, *(pytest.param(x, marks=pytest.mark.slow) for x in EXACT_LONG)])
@pytest.mark.parametrize("kinds", ["streaming", "mixed"])
def test_exact_streaming(kinds: str, lengths: str, tokens: str, device: str):
    """The same with heads that stream by tokens, forward and, which MIT's has not, backward."""
    check(kinds, lengths, TOKENS[tokens], True, True, device)


def check(kinds: str, lengths: str, infos: list[int], causal: bool, exact: bool, device: str) -> None:
    types, (lens_q, lens_k) = KINDS[kinds], LENGTHS[lengths]
    generator = torch.Generator().manual_seed(len(kinds) + len(lengths))
    dtype = torch.float64 if device == "cpu" else torch.float16
    q = torch.randn((sum(lens_q), 4, 32), generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn((2, sum(lens_k), 2, 32), generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(q.shape, generator=generator, dtype=torch.float64).to(dtype)
    blocks = (math.ceil(max(lens_q) / 128), math.ceil(max(lens_k) / 128))
    base = torch.rand((len(lens_q), 4, *blocks), generator=generator) < 0.5
    cu = [torch.tensor([0, *x]).cumsum(0).to(device=device, dtype=torch.int32) for x in (lens_q, lens_k)]
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    out, lse, no_dropout = block_sparse_attn_func(
        *leaves,
        *cu,
        torch.tensor(types, dtype=torch.int32, device=device),
        torch.tensor(infos, dtype=torch.int32, device=device),
        base.to(device),
        max(lens_q),
        max(lens_k),
        0.0,
        is_causal=causal,
        exact_streaming=exact,
        return_attn_probs=True,
    )
    assert no_dropout is None
    grads = torch.autograd.grad(out, leaves, grad.to(device))

    precise = [x.double().requires_grad_() for x in (q, k, v)]
    parts, begin_q, begin_k = [], 0, 0
    for index, (len_q, len_k) in enumerate(zip(lens_q, lens_k, strict=True)):
        on = torch.stack(
            [
                allowed(kind, base[index, which], tuple(infos[2 * h : 2 * h + 2]), len_q, len_k, causal, exact)
                for h, (kind, which) in enumerate(zip(types, masks_of_heads(types), strict=True))
            ]
        )
        rows, keys = slice(begin_q, begin_q + len_q), slice(begin_k, begin_k + len_k)
        parts.append(reference(precise[0][rows], precise[1][keys], precise[2][keys], on))
        begin_q, begin_k = begin_q + len_q, begin_k + len_k
    want, want_lse = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], dim=-1)
    want_grads = torch.autograd.grad(want, precise, grad.double())
    # A block too many or too few is off by more; how exact kernels are is tested elsewhere.
    close = {"rtol": 1e-9, "atol": 1e-10} if device == "cpu" else {"rtol": 3e-2, "atol": 3e-2}
    for got, expected in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(got.cpu().double(), expected, **close)


def dense_and_streaming(device: str, sink: int, local: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, cu_seqlens, head_mask_type and streaming_info of a dense head and a streaming one."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ints = ([0, 300, 700], [0, -1], [0, 0, sink, local])
    return *torch.randn((3, 700, 2, 16), device=device, dtype=dtype), *(
        torch.tensor(x, dtype=torch.int32, device=device) for x in ints
    )


@pytest.mark.parametrize("device", DEVICES)
def test_block_streaming_attn(device: str):
    """The other function is the same without masks, and causal by default."""
    q, k, v, cu_seqlens, kinds, info = dense_and_streaming(device, 1, 1)
    out = block_streaming_attn_func(q, k, v, cu_seqlens, cu_seqlens, kinds, info, 400, 400, 0.0)
    same = block_sparse_attn_func(q, k, v, cu_seqlens, cu_seqlens, kinds, info, None, 400, 400, 0.0, is_causal=True)
    assert torch.equal(out, same)


@pytest.mark.parametrize("device", DEVICES)
def test_token_streaming_attn(device: str):
    """Without masks, causal, and without dropout among its arguments."""
    q, k, v, cu_seqlens, kinds, info = dense_and_streaming(device, 5, 33)
    out, lse, _ = token_streaming_attn_func(
        q, k, v, cu_seqlens, cu_seqlens, kinds, info, 400, 400, return_attn_probs=True
    )
    options = {"is_causal": True, "exact_streaming": True, "return_attn_probs": True}
    lengths = (cu_seqlens, cu_seqlens)
    same = block_sparse_attn_func(q, k, v, *lengths, kinds, info, None, 400, 400, 0.0, **options)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
    no_streams = torch.zeros_like(kinds)
    options["return_attn_probs"] = False
    dense = block_sparse_attn_func(q, k, v, *lengths, no_streams, None, None, 400, 400, 0.0, **options)
    assert torch.equal(out[:, 0], dense[:, 0]) and not torch.equal(out[:, 1], dense[:, 1])


@pytest.mark.parametrize("device", DEVICES)
def test_dropout(device: str):
    """That of block_sparse_attention, whose next random numbers it takes."""
    q, k, v, cu_seqlens, _, _ = dense_and_streaming(device, 1, 1)
    dense = torch.zeros(2, dtype=torch.int32, device=device)
    call = (cu_seqlens, cu_seqlens, dense, None)
    torch.manual_seed(5)
    out, lse, mask = block_sparse_attn_func(q, k, v, *call, None, 400, 400, 0.2, return_attn_probs=True)
    torch.manual_seed(5)
    same = block_streaming_attn_func(q, k, v, *call, 400, 400, 0.2, is_causal=False)
    assert torch.equal(out, same) and mask is None
    blocks = patterns.Blocks(
        128, 128, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=400, max_seqlen_k=400
    )
    torch.manual_seed(5)
    want = block_sparse_attention(q, k, v, patterns.dense(blocks), dropout_p=0.2, return_lse=True)
    torch.testing.assert_close((out, lse), want)


@pytest.mark.gpu
def test_nothing_waits():
    cu_seqlens = torch.tensor([0, 300, 700], dtype=torch.int32, device="cuda")
    q, k, v = torch.randn((3, 700, 2, 64), device="cuda", dtype=torch.bfloat16)
    kinds, info = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([1, -1], [0, 0, 1, 1]))
    base = torch.ones((2, 1, 4, 4), dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attn_func(q, k, v, cu_seqlens, cu_seqlens, kinds, info, base, 400, 400, 0.0, is_causal=True)
        token_streaming_attn_func(q, k, v, cu_seqlens, cu_seqlens, kinds, info, 400, 400)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"p_dropout": 1.0}, ValueError, ["p_dropout is 1.0", "expected at least 0 and less than 1"]),
        ({"p_dropout": True}, TypeError, ["p_dropout is True", "a real number"]),
        ({"exact_streaming": True}, ValueError, ["exact_streaming is True", "expected False", "is_causal"]),
        (
            {"exact_streaming": True, "is_causal": True, "streaming_info": torch.tensor([0, 0, 1, 0])},
            ValueError,
            ["streaming_info has 0 local tokens", "1 or more"],
        ),
        ({"is_causal": 1}, TypeError, ["is_causal is 1"]),
        ({"head_mask_type": torch.tensor([0, 1, 0])}, ValueError, ["head_mask_type has shape (3,)", "(2,)"]),
        ({"head_mask_type": torch.tensor([0.0, 1.0])}, TypeError, ["head_mask_type has dtype torch.float32"]),
        ({"head_mask_type": torch.tensor([0, -2])}, ValueError, ["head_mask_type holds -2"]),
        ({"head_mask_type": torch.tensor([1, 1])}, ValueError, ["base_blockmask has 1 masks", "expected 2"]),
        ({"head_mask_type": torch.tensor([3, 0])}, ValueError, ["base_blockmask has 1 masks", "expected 3"]),
        ({"streaming_info": torch.tensor([0, 1])}, ValueError, ["streaming_info has shape (2,)", "(4,)"]),
        ({"streaming_info": torch.tensor([0, 1, -1, 0])}, ValueError, ["streaming_info holds -1"]),
        ({"streaming_info": None}, ValueError, ["streaming_info is None"]),
        ({"base_blockmask": None}, ValueError, ["head_mask_type holds 1", "no base_blockmask; expected 0 or -1"]),
        ({"base_blockmask": torch.ones(1, 1, 1, 2, dtype=torch.bool)}, ValueError, ["base_blockmask has shape"]),
        ({"base_blockmask": torch.ones(1, 1, 2, 2)}, TypeError, ["base_blockmask has dtype torch.float32"]),
        ({"max_seqlen_q_": None}, ValueError, ["max_seqlen_q is None"]),
        ({"max_seqlen_q_": 100}, ValueError, ["max_seqlen_q is 100", "200"]),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], words: list[str]):
    q, k, v = torch.randn(3, 200, 2, 16)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32)
    arguments = {
        "head_mask_type": torch.tensor([1, -1]),
        "streaming_info": torch.tensor([0, 0, 1, 1]),
        "base_blockmask": torch.ones(1, 1, 2, 2, dtype=torch.bool),
        "max_seqlen_q_": 200,
        "max_seqlen_k_": 200,
        "p_dropout": 0.0,
        **change,
    }
    with pytest.raises(error) as raised:
        block_sparse_attn.block_sparse_attn_func(q, k, v, cu_seqlens, cu_seqlens, **arguments)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("device", DEVICES)
def test_other_forms_of_arguments(device: str):
    """Masks of numbers, and tensors whose last dimension is not contiguous."""
    q, k, v = torch.randn(3, 200, 2, 16, device=device).to(torch.float32 if device == "cpu" else torch.float16)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32, device=device)
    blocks = torch.tensor([[[[True, False], [True, True]]]], device=device)
    kinds = torch.tensor([1, 0], device=device)
    call = (cu_seqlens, cu_seqlens, kinds, None)
    want = block_sparse_attn_func(q, k, v, *call, blocks, 200, 200, 0.0)
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        assert torch.equal(block_sparse_attn_func(q, k, v, *call, 3 * blocks.to(dtype), 200, 200, 0.0), want)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    assert torch.equal(block_sparse_attn_func(*strided, *call, blocks, 200, 200, 0.0), want)


# The package's own name


@pytest.fixture
def no_alias():
    sys.modules.pop("block_sparse_attn", None)
    yield
    sys.modules.pop("block_sparse_attn", None)


def test_alias(no_alias: None, monkeypatch: pytest.MonkeyPatch):
    """Programs of the other package find these functions by its name, unless it is there itself."""
    compat.install_block_sparse_attn()
    compat.install_block_sparse_attn()  # again: nothing
    found = importlib.import_module("block_sparse_attn")
    assert found.block_sparse_attn_func is block_sparse_attn_func
    monkeypatch.setitem(sys.modules, "block_sparse_attn", types.ModuleType("block_sparse_attn"))
    with pytest.raises(ImportError, match="a package block_sparse_attn is there already"):
        compat.install_block_sparse_attn()


def test_alias_beside_the_package(no_alias: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "block_sparse_attn.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"there already, .*block_sparse_attn.py; expected none"):
        compat.install_block_sparse_attn()
