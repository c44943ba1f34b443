"""FastVideo's calls beside the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hbsattn.compat.vsa import block_sparse_attn, block_sparse_attn_from_indices, video_sparse_attn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLOSE = {"cpu": {"rtol": 1e-9, "atol": 1e-10}, "cuda": {"rtol": 4e-2, "atol": 4e-2}}


class Inputs:
    """Of 2 sequences and 4 heads: tensors, a random map of blocks with an empty row, and random valid counts."""

    def __init__(self, device: str, size: int = 64, blocks: tuple[int, int] = (3, 5), heads_k: int = 4) -> None:
        generator = torch.Generator().manual_seed(size + sum(blocks))
        self.device, self.size, self.blocks = device, size, blocks
        self.dtype = torch.float64 if device == "cpu" else torch.bfloat16
        shapes = ((2, 4, blocks[0] * size, 32), *[(2, heads_k, blocks[1] * size, 32)] * 2)
        self.tensors = [
            torch.randn(x, generator=generator, dtype=torch.float64).to(device, self.dtype).requires_grad_()
            for x in shapes
        ]
        self.map = torch.rand((2, 4, *blocks), generator=generator) < 0.6
        self.map[0, 0, 1] = False
        self.sizes = torch.randint(size // 2, size + 1, blocks[1:], generator=generator)
        self.sizes[0], self.sizes[-1] = size, 0

    def lists(self) -> tuple[Tensor, Tensor]:
        """With entries behind the count that are no blocks."""
        order = self.map.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        counts = self.map.sum(-1)
        order = torch.where(torch.arange(order.shape[-1]) < counts.unsqueeze(-1), order, -1)
        return tuple(x.to(self.device, torch.int32) for x in (order, counts))

    def pairs(self) -> Tensor:
        valid = torch.arange(self.size) < self.sizes.unsqueeze(-1)
        on = self.map.repeat_interleave(self.size, 2).repeat_interleave(self.size, 3)
        return on & valid.flatten()

    def expected(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Leaves in float64, and the results from them."""
        leaves = [x.detach().cpu().double().requires_grad_() for x in self.tensors]
        q, k, v = leaves
        k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT / 32**0.5).masked_fill(~self.pairs(), -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
        return leaves, weights @ v, lse / math.log(2)


def judge(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Results and gradients."""
    leaves, want, want_lse = inputs.expected()
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs.tensors, grad.to(inputs.device, inputs.dtype))
    want_grads = torch.autograd.grad(want, leaves, grad)
    for x, y in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(x.cpu().double(), y, **CLOSE[inputs.device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("form", ["lists", "map"])
def test_results_and_gradients(form: str, size: int, device: str):
    inputs = Inputs(device, size)
    sizes = inputs.sizes.to(device, torch.int32)
    if form == "lists":
        judge(inputs, *block_sparse_attn_from_indices(*inputs.tensors, *inputs.lists(), sizes))
    else:
        judge(inputs, *block_sparse_attn(*inputs.tensors, inputs.map.to(device), sizes))


@pytest.mark.parametrize("device", DEVICES)
def test_other_forms(device: str):
    """Masks of one sequence or head, maps of numbers, tensors of other strides, grouped heads."""
    inputs = Inputs(device)
    sizes = inputs.sizes.to(device)
    for lead in ((slice(0, 1), slice(None)), (slice(None), slice(0, 1)), (slice(0, 1), slice(0, 1))):
        part = inputs.map[lead].to(device)
        out, _ = block_sparse_attn(*inputs.tensors, part, sizes)
        same, _ = block_sparse_attn(*inputs.tensors, 2 * part.expand(2, 4, -1, -1).int(), sizes)
        torch.testing.assert_close(out, same)
    three, _ = block_sparse_attn(*inputs.tensors, inputs.map[0].to(device), sizes)
    assert torch.equal(three, block_sparse_attn(*inputs.tensors, inputs.map[:1].to(device), sizes)[0])
    want, _ = block_sparse_attn(*inputs.tensors, inputs.map.to(device), sizes)
    odd = [x.mT.contiguous().mT for x in inputs.tensors]
    assert odd[0].stride(-1) != 1
    torch.testing.assert_close(block_sparse_attn(*odd, inputs.map.to(device), sizes)[0], want)
    grouped = Inputs(device, heads_k=2)
    judge(grouped, *block_sparse_attn(*grouped.tensors, grouped.map.to(device), grouped.sizes.to(device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_video_sparse_attn(weighted: bool, device: str):
    """The whole module, with zeros in the padding. The top blocks are read from its own scores: they are random."""
    inputs = Inputs(device, 64)
    q_sizes = torch.tensor([64, 40, 64])
    sizes = torch.tensor([64, 50, 64, 33, 64])
    with torch.no_grad():
        for x, own in zip(inputs.tensors, (q_sizes, sizes, sizes), strict=True):
            valid = (torch.arange(64) < own.unsqueeze(-1)).flatten()
            x.mul_(valid.to(device).unsqueeze(-1))
    weight = torch.rand((2, 4, 192, 1), dtype=torch.float64).to(device, inputs.dtype) if weighted else None
    numbers = (sizes.to(device), q_sizes.to(device))
    out = video_sparse_attn(*inputs.tensors, *numbers, 2, (4, 4, 4), weight)
    assert torch.equal(out, video_sparse_attn(*inputs.tensors, *numbers, 2, compress_attn_weight=weight))
    grads = torch.autograd.grad(out.sum(), inputs.tensors)

    leaves = [x.detach().cpu().double().requires_grad_() for x in inputs.tensors]
    means = [
        (x.unflatten(2, (-1, 64)).sum(3) / own.view(-1, 1))
        for x, own in zip(leaves, (q_sizes, sizes, sizes), strict=True)
    ]
    scores = means[0] @ means[1].mT / 32**0.5
    rounded = [x.to(inputs.dtype).double() for x in means]  # as they choose
    best = (rounded[0] @ rounded[1].mT).topk(2, dim=-1).indices
    inputs.map = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    inputs.sizes = sizes
    dense = (scores.softmax(-1) @ means[2]).repeat_interleave(64, 2)
    q, k, v = leaves
    sparse = (q @ k.mT / 32**0.5).masked_fill(~inputs.pairs(), -torch.inf).softmax(-1) @ v
    want = (dense if weight is None else dense * weight.cpu().double()) + sparse
    for x, y in zip((out, *grads), (want, *torch.autograd.grad(want.sum(), leaves)), strict=True):
        torch.testing.assert_close(x.cpu().double(), y, **CLOSE[device])


def test_full_blocks_have_no_partial_ones(monkeypatch: pytest.MonkeyPatch):
    """Those of Hopper's own kernels."""
    from hbsattn.compat import vsa

    masks = []
    attend = vsa.block_sparse_attention
    monkeypatch.setattr(vsa, "block_sparse_attention", lambda *a, **b: masks.append(a[3]) or attend(*a, **b))
    inputs = Inputs("cpu")
    block_sparse_attn(*inputs.tensors, inputs.map, torch.full((5,), 64))
    assert masks[0]._partial is None


BASE = {
    "q": torch.randn(1, 2, 32, 16),
    "k": torch.randn(1, 2, 48, 16),
    "v": torch.randn(1, 2, 48, 16),
    "variable_block_sizes": torch.tensor([16, 9, 16]),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.randn(2, 32, 16)}, ValueError, ["q has 3 dimensions"]),
        ({"q": torch.randn(1, 2, 33, 16)}, ValueError, ["q has length 33", "multiple of 16"]),
        ({"k": torch.randn(2, 2, 48, 16)}, ValueError, ["k has shape", "1 sequences"]),
        ({"v": torch.randn(1, 2, 32, 16)}, ValueError, ["v has shape", "48 keys"]),
        ({"variable_block_sizes": torch.tensor([16.0] * 3)}, TypeError, ["variable_block_sizes has dtype"]),
        ({"variable_block_sizes": torch.tensor([16] * 5)}, ValueError, ["variable_block_sizes has 5 blocks", "48"]),
        ({"variable_block_sizes": torch.tensor([16, 17, 16])}, ValueError, ["holds 17", "0 to 16"]),
        (
            {"block_map": torch.ones(1, 2, 3, 3) > 0},
            ValueError,
            ["block_map has shape (1, 2, 3, 3)", "(1, 2 or 1, 2, 3)"],
        ),
        ({"block_map": torch.ones(1, 2, 2, 3)}, TypeError, ["block_map has dtype torch.float32"]),
        ({"q2k_num": torch.ones(1, 2, 3, dtype=torch.int32)}, ValueError, ["q2k_num has shape (1, 2, 3)"]),
        ({"q2k_idx": torch.zeros(1, 1, 2, 3, dtype=torch.int32)}, ValueError, ["q2k_idx has shape (1, 1, 2, 3)"]),
        ({"q2k_idx": torch.full((1, 2, 2, 3), 3)}, ValueError, ["indices has the entry 3", "0 to 2"]),
        ({"topk": 4}, ValueError, ["topk is 4", "0 to 3"]),
        ({"block_size": (4, 4)}, ValueError, ["block_size is (4, 4)", "three"]),
        (
            {"block_size": 2, "topk": 1},
            ValueError,
            ["variable_block_sizes has 3 blocks", "expected 6, of 8 keys each"],
        ),
        (
            {"q_variable_block_sizes": torch.ones(3).int(), "topk": 1},
            ValueError,
            ["q_variable_block_sizes has 3 blocks"],
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: list[str]):
    with pytest.raises(error) as raised:
        if any(name.startswith("q2k") for name in change):
            lists = {"q2k_idx": torch.zeros((1, 2, 2, 3)).int(), "q2k_num": torch.ones((1, 2, 2)).int()}
            block_sparse_attn_from_indices(**{**BASE, **lists, **change})
        elif {"topk", "block_size"} & change.keys():
            module = {"q_variable_block_sizes": torch.tensor([16, 16]), "topk": 2, "block_size": (1, 4, 4)}
            video_sparse_attn(**{**BASE, **module, **change})
        else:
            block_sparse_attn(**{**BASE, "block_map": torch.ones((1, 2, 2, 3), dtype=torch.bool), **change})
    for word in words:
        assert word in str(raised.value)
