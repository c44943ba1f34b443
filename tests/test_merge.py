"""Results over disjoint keys, put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hbsattn
from hbsattn import BlockMask, block_sparse_attention, merge, patterns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def halves(device: str, packed: bool) -> tuple[BlockMask, BlockMask, BlockMask]:
    """Masks of which the first two have no block in common; some queries have nothing in one, or in either."""
    if packed:
        cu_seqlens = torch.tensor([0, 70, 70, 133], dtype=torch.int32, device=device)
        lens = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 70, "max_seqlen_k": 70}
    else:
        lens = {"seqlen_q": 90, "seqlen_k": 90, "batch_size": 2}
    blocks = patterns.Blocks(16, 16, **lens, causal=True, device=device)
    none = torch.empty((1, 0), dtype=torch.int32, device=device)
    far = patterns.vertical_slash(blocks, torch.ones((1, 1), dtype=torch.int32, device=device), none)
    near = patterns.streaming(blocks, 0, [1, 0])
    return far, near._with_bits(near.bits & ~far.bits, None), far | near


def tensors(mask: BlockMask, dtype: torch.dtype) -> list[Tensor]:
    shape = (133,) if mask.packed else (2, 90)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn((*shape, 2, 32), generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.to(device=mask.device, dtype=dtype).requires_grad_() for x in made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_merge(packed: bool, device: str):
    """As one call over all keys, with the gradients of out and of lse."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    far, near, both = halves(device, packed)
    qkv = tensors(both, dtype)
    parts = [x for mask in (far, near) for x in block_sparse_attention(*qkv, mask, return_lse=True)]
    merged, want = merge(*parts), block_sparse_attention(*qkv, both, return_lse=True)
    empty = want[1] == -torch.inf
    assert all(bool((x == -torch.inf).any()) for x in (parts[1], parts[3], want[1]))
    assert torch.equal(merged[1] == -torch.inf, empty)
    assert [x.dtype for x in merged] == [x.dtype for x in want]
    close = {"rtol": 1e-9, "atol": 1e-11} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    for got, expected in zip(merged, want, strict=True):
        torch.testing.assert_close(got, expected, **close)
    upstream = [torch.randn_like(x) for x in want]
    for got, expected in zip(
        torch.autograd.grad(merged, qkv, upstream), torch.autograd.grad(want, qkv, upstream), strict=True
    ):
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got, expected, **close)


def test_rows_of_nobody():
    """Nothing on one side, on the other, on both: values, and gradients by their formula."""
    out = torch.tensor([[[1.0]], [[0.0]], [[0.0]]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[[0.0]], [[2.0]], [[0.0]]], dtype=torch.float64, requires_grad=True)
    inf = torch.inf
    lse = torch.tensor([[3.0, -inf, -inf]], dtype=torch.float64, requires_grad=True)
    other_lse = torch.tensor([[-inf, -5.0, -inf]], dtype=torch.float64, requires_grad=True)
    merged, merged_lse = merge(out, lse, other, other_lse)
    assert merged.flatten().tolist() == [1.0, 2.0, 0.0]
    assert merged_lse.flatten().tolist() == [3.0, -5.0, -inf]
    grads = torch.autograd.grad(
        (merged, merged_lse), (out, lse, other, other_lse), (torch.ones_like(out), torch.ones_like(lse))
    )
    assert [x.flatten().tolist() for x in grads] == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_large_sums():
    """exp(lse) would overflow, or vanish."""
    out = torch.ones(2, 1, 4)
    merged, lse = merge(out, torch.tensor([[500.0, -500.0]]), 3 * out, torch.tensor([[500.0, -500.0]]))
    torch.testing.assert_close(merged, 2 * out)
    torch.testing.assert_close(lse, torch.tensor([[500.0, -500.0]]) + torch.tensor(2.0).log())


def test_gradients():
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 3, 2, 4), (2, 2, 3), (2, 3, 2, 4), (2, 2, 3))
    values = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(merge, values)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.zeros(3, 2)}, ValueError, ["out has 2 dimensions"]),
        ({1: torch.zeros(3, 2)}, ValueError, ["lse has shape (3, 2)", "(2, 3)"]),
        ({1: torch.zeros(2, 3).half()}, TypeError, ["lse has dtype torch.float16"]),
        ({2: torch.zeros(3, 2, 5)}, ValueError, ["other_out has shape (3, 2, 5)"]),
        ({2: torch.zeros(3, 2, 4).double()}, TypeError, ["other_out has dtype torch.float64", "torch.float32"]),
        ({3: None}, TypeError, ["other_lse is a NoneType"]),
    ],
)
def test_errors(change: dict[int, object], error: type[Exception], words: list[str]):
    arguments: list[object] = [torch.zeros(3, 2, 4), torch.zeros(2, 3), torch.zeros(3, 2, 4), torch.zeros(2, 3)]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error) as raised:
        hbsattn.merge(*arguments)
    for word in words:
        assert word in str(raised.value)
