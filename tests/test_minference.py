"""MInference's calls beside lists that are spelled key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hbsattn.compat.minference import _convert, _mask_of, sparse_attn_func, vertical_slash_sparse_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, HEADS_K, DIM = 4, 2, 32


def draw(len_q: int, len_k: int, device: str) -> list[Tensor]:
    """q, k and v (batch, length, heads, head_dim)."""
    generator = torch.Generator().manual_seed(len_q + len_k)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    shapes = ((2, len_q, HEADS, DIM), *[(2, len_k, HEADS_K, DIM)] * 2)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for x in shapes]


def draw_lists(rows: int, len_k: int) -> tuple[Tensor, ...]:
    """Counts and entries of blocks and of single keys; what is behind the count is no key."""
    generator = torch.Generator().manual_seed(rows + len_k)
    lists = []
    for width in (3, 9):
        counts = torch.randint(0, width + 1, (2, HEADS, rows), generator=generator, dtype=torch.int32)
        entries = torch.randint(0, len_k, (2, HEADS, rows, width), generator=generator, dtype=torch.int32)
        lists += [counts, torch.where(torch.arange(width) < counts.unsqueeze(-1), entries, 1 << 30)]
    lists[0][0, 0, 0] = lists[2][0, 0, 0] = 0
    return tuple(lists)


def all_pairs(lists: tuple[Tensor, ...], len_q: int, len_k: int, causal: bool) -> Tensor:
    """Bool (batch, heads, queries, keys)."""
    block_count, block_offset, column_count, column_index = (x.tolist() for x in lists)
    rows = -(-len_q // 64)
    on = torch.zeros((2, HEADS, rows, len_k), dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(x) for x in (2, HEADS, rows))).tolist():
        for first in block_offset[b][h][row][: block_count[b][h][row]]:
            on[b, h, row, first : first + 64] = True
        for key in column_index[b][h][row][: column_count[b][h][row]]:
            on[b, h, row, key] = True
    on = on.repeat_interleave(64, 2)[:, :, :len_q]
    return on.tril(len_k - len_q) if causal else on


def judge(on: Tensor, leaves: list[Tensor], out: Tensor, lse: Tensor | None, softcap: float = 0.0) -> None:
    """Results and gradients, of tensors whose heads come after the length."""
    precise = [x.detach().cpu().double().requires_grad_() for x in leaves]
    q, k, v = (x.transpose(1, 2) for x in precise)
    k, v = (x.repeat_interleave(HEADS // HEADS_K, 1) for x in (k, v))
    scores = q @ k.mT / DIM**0.5
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~on, -torch.inf)
    want_lse = scores.logsumexp(-1)
    weights = (scores - want_lse.masked_fill(want_lse == -torch.inf, 0).unsqueeze(-1)).exp()
    want = (weights @ v).transpose(1, 2)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, grad.to(out.device, out.dtype))
    want_grads = torch.autograd.grad(want, precise, grad)
    # A pair too many or too few is off by more; how exact kernels are is tested elsewhere.
    close = {"rtol": 1e-9, "atol": 1e-10} if out.dtype == torch.float64 else {"rtol": 4e-2, "atol": 4e-2}
    pairs = [(out, want), *zip(grads, want_grads, strict=True)] + ([] if lse is None else [(lse, want_lse)])
    for x, y in pairs:
        torch.testing.assert_close(x.cpu().double(), y, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(192, 192), (150, 200), (40, 333), (200, 9)], ids=str)
def test_lists(lengths: tuple[int, int], causal: bool, device: str):
    leaves = draw(*lengths, device)
    lists = draw_lists(-(-lengths[0] // 64), lengths[1])
    on = all_pairs(lists, *lengths, causal)
    given = [x.to(device) for x in lists]
    out, lse = sparse_attn_func(*leaves, *given, causal=causal, softcap=5.0, return_softmax_lse=True)
    judge(on, leaves, out, lse, 5.0)
    with torch.no_grad():
        buffer = torch.empty_like(out)
        assert sparse_attn_func(*leaves, *given, causal=causal, out=buffer, softcap=5.0) is buffer
        assert torch.equal(buffer, out)


def convert(vertical: list[int], slash: list[int], end: int) -> tuple[list[int], set[int]]:
    """MInference's rule for one block of queries: the first keys of blocks, and single keys up to the last of them."""
    blocks: list[int] = []
    last = -1000
    for distance in sorted(slash, reverse=True):
        at = max(end - distance, 64)
        if distance >= end or at <= last:
            continue
        blocks.append(at - 64 if at > last + 64 else last)
        last = blocks[-1] + 64
    return blocks, {x for x in vertical if x < last}


@pytest.mark.parametrize("length", [64, 200, 333])
@pytest.mark.parametrize("slashes", [1, 5, 40])
def test_conversion(slashes: int, length: int):
    generator = torch.Generator().manual_seed(slashes + length)
    vertical = torch.randint(0, length, (1, 2, 7), generator=generator).sort(-1).values
    slash = torch.randint(0, length + 30, (1, 2, slashes), generator=generator).sort(-1, descending=True).values
    block_count, block_offset, column_count, column_index = _convert(vertical, slash, length)
    for head in range(2):
        for row in range(-(-length // 64)):
            blocks, columns = convert(vertical[0, head].tolist(), slash[0, head].tolist(), 64 * row + 64)
            assert block_offset[0, head, row, : block_count[0, head, row]].tolist() == blocks
            assert set(column_index[0, head, row, : column_count[0, head, row]].tolist()) == columns


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [128, 300])
def test_vertical_slash(length: int, device: str):
    leaves = draw(length, length, device)
    generator = torch.Generator().manual_seed(length)
    v_idx, s_idx = (torch.randint(0, length, (2, HEADS, n), generator=generator, dtype=torch.int32) for n in (8, 5))
    s_idx[..., 0] = 0
    on = torch.zeros((2, HEADS, length, length), dtype=torch.bool)
    for b in range(2):
        for h in range(HEADS):
            for row in range(-(-length // 64)):
                blocks, columns = convert(v_idx[b, h].tolist(), s_idx[b, h].tolist(), 64 * row + 64)
                rows = on[b, h, 64 * row : 64 * row + 64]
                for first in blocks:
                    rows[:, first : first + 64] = True
                rows[:, list(columns)] = True
    out = vertical_slash_sparse_attention(
        *(x.transpose(1, 2) for x in leaves), v_idx.to(device), s_idx.reshape(2, HEADS, 1, -1).to(device)
    )
    judge(on.tril(), leaves, out.transpose(1, 2), None)


def test_whole_blocks_stay_whole():
    """Blocks whose keys are all listed, also the last one, which is short."""
    q, k, _ = (torch.randn(1, 70, 1, 16), *torch.randn(2, 1, 84, 1, 16))
    counts, none = torch.ones((1, 1, 2), dtype=torch.int32), torch.zeros((1, 1, 2), dtype=torch.int32)
    first = torch.tensor([[[[0], [20]]]])
    mask = _mask_of((counts, first), (none, first), q, k, False)
    assert mask._matrices.shape[0] == 1  # of 16 to 32 in the second row
    assert mask.to_elements().sum().item() == 64 * 64 + 6 * 64


BASE = {
    "q": torch.randn(1, 100, 2, 16),
    "k": torch.randn(1, 100, 2, 16),
    "v": torch.randn(1, 100, 2, 16),
    "block_count": torch.ones((1, 2, 2), dtype=torch.int32),
    "block_offset": torch.zeros((1, 2, 2, 1), dtype=torch.int32),
    "column_count": torch.ones((1, 2, 2), dtype=torch.int32),
    "column_index": torch.full((1, 2, 2, 3), 99, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"alibi_slopes": torch.ones(2)}, ValueError, ["alibi_slopes is given"]),
        ({"return_attn_probs": True}, ValueError, ["return_attn_probs is True"]),
        ({"causal": 1}, TypeError, ["causal is 1"]),
        ({"k": torch.randn(2, 100, 2, 16)}, ValueError, ["k has a batch of 2"]),
        ({"block_count": torch.ones((1, 2, 2))}, TypeError, ["block_count has dtype torch.float32"]),
        ({"block_count": torch.ones((1, 2, 3)).int()}, ValueError, ["block_count has shape (1, 2, 3)", "(1, 2, 2)"]),
        (
            {"column_index": torch.ones((1, 1, 2, 3)).int()},
            ValueError,
            ["column_index has shape", "(1, 2, 2, entries)"],
        ),
        ({"block_count": torch.full((1, 2, 2), 2)}, ValueError, ["block_count holds 2", "0 to 1"]),
        ({"column_index": torch.full((1, 2, 2, 3), 128)}, ValueError, ["column_index holds 128", "0 to 127"]),
        ({"block_offset": torch.full((1, 2, 2, 1), -1)}, ValueError, ["block_offset holds -1"]),
        ({"dropout_p": 1.0}, ValueError, ["dropout_p is 1.0"]),
        ({"out": torch.empty(1, 100, 2, 8)}, ValueError, ["out has shape (1, 100, 2, 8)"]),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: list[str]):
    with pytest.raises(error) as raised:
        sparse_attn_func(**{**BASE, **change})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size_M": 32}, ["block_size_M is 32", "expected 64"]),
        ({"key": torch.randn(1, 2, 99, 16)}, ["key has length 99"]),
        ({"v_idx": torch.zeros((1, 2, 5))}, ["v_idx has dtype torch.float32"]),
        ({"s_idx": torch.zeros(5).int()}, ["s_idx has shape (5,)", "(1, 2, entries)"]),
    ],
)
def test_vertical_slash_errors(change: dict[str, Any], words: list[str]):
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    lists = {"v_idx": torch.zeros((1, 2, 5)).int(), "s_idx": torch.zeros((1, 2, 5)).int()}
    with pytest.raises((ValueError, TypeError)) as raised:
        vertical_slash_sparse_attention(**{"query": q, "key": k, "value": v, **lists, **change})
    for word in words:
        assert word in str(raised.value)
