"""Work items that are another mask's, or nobody's, and bits that are not those they were counted from, given to the ops
themselves. What comes out means nothing; but calls end, and nothing outside of the results is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hbsattn
from cases import BACKWARD_METHODS, Case
from plans import RECORD_INTS, call_of, plan_backward, plan_items
from problems import Problem, make_problem, same

pytestmark = pytest.mark.gpu

ops = torch.ops.hbsattn
VALUES = (0, 1, 2, 7, 31, 100, 337, 100_000, 2**30, 2**31 - 1, -1, -5, -(2**31))
PATTERN = 7.0


class Call:
    """A problem as the ops take it."""

    def __init__(self, spec: Case, deterministic: bool, windowed: bool = False) -> None:
        self.problem: Problem = make_problem(spec, "cuda", torch.bfloat16)
        mask = self.problem.mask()
        self.mask: hbsattn.BlockMask = mask.windowed(60, 20, 9) if windowed else mask
        self.deterministic = deterministic
        self.bits = self.mask.bits.clone()
        heads = (spec.heads_q, spec.heads_k, spec.head_dim, 2, 1)
        rows_k = self.problem.k.shape[0]
        self.items = plan_items(self.mask, *heads)
        self.plan = plan_backward(self.mask, *heads, rows_k=rows_k, deterministic=deterministic)
        generator = torch.Generator(device="cuda").manual_seed(3)
        self.grad_out = torch.randn(self.problem.q.shape, device="cuda", generator=generator).to(torch.bfloat16)

    def inputs(self) -> list[Tensor]:
        return [self.problem.q, self.problem.k, self.problem.v, self.grad_out, self.mask.bits, self.mask.sequences]

    def forward(self, bits: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *_ = self.inputs()
        call = call_of(q, k, v, self.mask, bits=bits)
        return ops.forward(*call, items, None, self.deterministic)

    def backward(self, out: Tensor, lse: Tensor, bits: Tensor, plan: Tensor) -> list[Tensor]:
        q, k, v, grad_out, *_ = self.inputs()
        call = call_of(q, k, v, self.mask, bits=bits)
        needs = [True, True, True, False]
        return list(ops.backward(*call, grad_out, None, out, lse, plan, self.deterministic, needs))[:3]


def make_bands(like: list[Tensor]) -> list[Tensor]:
    """Memory between which the allocator is likely to put results of these sizes."""
    bands = [torch.full_like(x, PATTERN) for x in like for _ in range(5)]
    return [band for i, band in enumerate(bands) if i % 2 == 0]  # the others are free again


def falsify(lists: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The same with a share of its numbers replaced. Records that have a tile keep one: a dead one would end a list."""
    values = torch.tensor(VALUES, dtype=torch.int64, device="cuda").to(torch.int32)
    chosen = values[torch.randint(len(VALUES), lists.shape, device="cuda", generator=generator)]
    false = torch.where(torch.rand(lists.shape, device="cuda", generator=generator) < share, chosen, lists)
    first = torch.arange(lists.numel(), device="cuda").view(lists.shape) % RECORD_INTS == 0
    return torch.where(first & (lists >= 0), false.clamp(min=0), false)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_records_of_nobody(spec: Case, deterministic: bool, windowed: bool):
    call = Call(spec, deterministic, windowed)
    out, lse = call.forward(call.bits, call.items)
    grads = call.backward(out, lse, call.bits, call.plan)
    before = [x.clone() for x in call.inputs()]
    generator = torch.Generator(device="cuda").manual_seed(11)
    for share in (0.02, 0.1, 0.5, 1.0):
        for _ in range(4):
            bands = make_bands([out, lse, *grads])
            call.forward(call.bits, falsify(call.items, share, generator))
            call.backward(out, lse, call.bits, falsify(call.plan, share, generator))
            torch.cuda.synchronize()
            assert all(bool((band == PATTERN).all()) for band in bands), "memory outside the results was written"
            assert all(same(x, y) for x, y in zip(call.inputs(), before, strict=True)), "an input was written"
    again = call.forward(call.bits, call.items)
    assert same(again[0], out) and same(again[1], lse), "later calls are not what they were"


@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_items_of_another_mask(spec: Case):
    """As many records as the call's own, of a mask whose blocks are others."""
    call, other = Call(spec, False), Call(spec, False)
    other.mask.bits.fill_(-1)
    heads = (spec.heads_q, spec.heads_k, spec.head_dim, 2, 1)
    items = plan_items(other.mask, *heads)
    plan = plan_backward(other.mask, *heads, rows_k=other.problem.k.shape[0])
    out, lse = call.forward(call.bits, items)
    assert not out.isnan().any() and not lse.isnan().any()
    call.backward(out, lse, call.bits, plan)
    torch.cuda.synchronize()


@pytest.mark.parametrize("word", [0, -1])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_bits_that_were_changed(spec: Case, word: int):
    """Fewer blocks than were counted arrive as padding; of more, no more than were counted are read."""
    call = Call(spec, False)
    out, lse = call.forward(call.bits, call.items)
    bits = torch.full_like(call.bits, word)
    changed, _ = call.forward(bits, call.items)
    call.backward(out, lse, bits, call.plan)
    torch.cuda.synchronize()
    assert not changed.isnan().any()
    if word == 0:
        assert not changed.any(), "columns that the bits do not have were read"
