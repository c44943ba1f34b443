"""The life of a mask: copies, moves, writes and updates in place."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import hbsattn
from hbsattn import BlockMask
from masks import BATCHED, SPEC, SPECS, TOKENS, contents, counted, dtype_of, mapped, problem_of
from problems import Problem, block_masks, build_mask, cu_seqlens, judge, make_problem, same


@pytest.fixture
def keep_lists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)


# Copies


def reloaded(mask: BlockMask, weights_only: bool) -> BlockMask:
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES: dict[str, Callable[[BlockMask], BlockMask]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "save": lambda mask: reloaded(mask, False),
    "save_weights": lambda mask: reloaded(mask, True),
    "replace": lambda mask: dataclasses.replace(mask),
    "mapped": lambda mask: mapped(mask, lambda x: x),
    "cloned": lambda mask: mapped(mask, lambda x: x.clone() if isinstance(x, Tensor) else x),
    "moved": lambda mask: mask.to("cpu").to(mask.device),
}


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str, lists: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    """The same mask in all, also after use, and none shares plans."""
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: lists)
    problem = problem_of(TOKENS, device)
    mask = problem.mask()
    assert (mask._lists is not None) == lists
    problem.run(mask)
    calls: list[int] = []
    counted(mask, calls)
    other = COPIES[name](mask)
    assert repr(other) == repr(mask) and same(other.to_dense(), mask.to_dense()) and (other._bits is None) == lists
    judge(problem, *problem.run(other))
    if other is not mask:
        assert same(counted(other, calls), counted(mask, calls)) and len(calls) == 2


@pytest.mark.parametrize("device", cases.DEVICES)
def test_replaced_causal(device: str):
    """Plans are those of the mask that they are used with, not of the one that it was copied from."""
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 8).to(device, dtype_of(device))
    q = torch.zeros_like(v)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), 2, 2)
    assert hbsattn.block_sparse_attention(q, q, v, mask)[0, :, 0, 0].tolist() == [0.5, 0.5]
    causal = dataclasses.replace(mask, causal=True)
    assert hbsattn.block_sparse_attention(q, q, v, causal)[0, :, 0, 0].tolist() == [0.0, 0.5]


@pytest.mark.parametrize("device", cases.DEVICES)
def test_replaced_causal_is_trimmed(device: str):
    """Whatever the bits hold beyond the diagonal."""
    problem = problem_of(dataclasses.replace(SPEC, causal=False), device)
    causal = dataclasses.replace(problem.mask(), causal=True)
    want = build_mask(SPEC, problem.block_masks, device)
    assert same(causal.to_dense(), want.to_dense())
    assert causal.density == want.density and causal.flops(64, 4) == want.flops(64, 4)
    judge(Problem(SPEC, problem.q, problem.k, problem.v, problem.block_masks), *problem.run(causal))


@pytest.mark.gpu
def test_mapped_to_another_device():
    problem = problem_of(SPEC, "cuda")
    mask = build_mask(SPEC, problem.block_masks, "cpu")
    make_problem(SPEC, "cpu", torch.float32).run(mask)
    for other in (
        mapped(mask, lambda x: x.cuda() if isinstance(x, Tensor) else x),
        mask.cuda(),
        mask.cuda(0),
        mask.to(0),
    ):
        assert other.device.type == "cuda"
        judge(problem, *problem.run(other))
    assert mask.cuda().cpu().device.type == "cpu"


def test_moves():
    mask = problem_of(SPEC, "cpu").mask()
    assert mask.cpu() is mask and mask.to("cpu") is mask and mask.to(torch.device("cpu")) is mask
    for wrong in (torch.float16, None, True):
        with pytest.raises(TypeError, match=r"device is .*; expected a torch.device, a str or an int"):
            mask.to(wrong)
    with pytest.raises(ValueError, match=r"device is 'gpu'; expected one that torch.device knows"):
        mask.to("gpu")


def test_identity():
    mask, other = (problem_of(SPEC, "cpu").mask() for _ in range(2))
    assert mask == mask and mask != other and len({mask, other, mask}) == 2


@pytest.mark.parametrize("arguments", [(), (torch.ones(1, 1, 1, 1, dtype=torch.bool), 128, 128)])
def test_called_itself(arguments: tuple[Any, ...]):
    with pytest.raises(
        TypeError, match=r"expected BlockMask\.from_dense, BlockMask\.from_indices or BlockMask\.from_csr"
    ):
        BlockMask(*arguments)


def test_fields_that_there_are_not():
    mask = problem_of(SPEC, "cpu").mask()
    with pytest.raises(TypeError, match=r"^casual is no field of BlockMask; expected one of _bits, sequences, "):
        dataclasses.replace(mask, casual=True)
    fields = [getattr(mask, field.name) for field in dataclasses.fields(mask)]
    with pytest.raises(TypeError, match=rf"^BlockMask was called with {len(fields) + 1} values; expected at most "):
        BlockMask(*fields, True)
    with pytest.raises(TypeError, match=r"^causal is given twice; expected one of "):
        BlockMask(*fields[:-1], causal=True)


# Writes in place


@pytest.mark.parametrize("device", cases.DEVICES)
def test_bits_written_in_place(device: str):
    """A mask whose bits were written plans anew, and no other does."""
    problem = problem_of(SPEC, device)
    mask, calls = problem.mask(), []
    problem.run(mask)
    kept = counted(mask, calls)
    assert counted(mask, calls) is kept and len(calls) == 1
    bits = mask.bits.clone()

    mask.bits.zero_()
    out, lse = problem.run(mask)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert not counted(mask, calls).any() and len(calls) == 2

    mask.bits.copy_(bits)
    judge(problem, *problem.run(mask))

    other = problem_of(SPEC, device, seed=5)
    mask.bits[...] = other.mask().bits
    judge(Problem(SPEC, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))
    assert counted(mask, calls).data_ptr() == kept.data_ptr(), "a graph reads the plan where it was"


@pytest.mark.parametrize("device", cases.DEVICES)
def test_sequences_written_in_place(device: str):
    mask, calls = problem_of(SPEC, device).mask(), []
    counted(mask, calls)
    mask.sequences.copy_(mask.sequences.clone())
    counted(mask, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("name", SPECS)
def test_update(name: str, device: str):
    """New contents in the same memory, plans included."""
    spec = SPECS[name]
    problem, other = (problem_of(spec, device, seed) for seed in (0, 5))
    mask, calls = problem.mask(), []
    judge(problem, *problem.run(mask))
    plan = counted(mask, calls)
    places = [x.data_ptr() for x in (mask.bits, mask.sequences, plan)]

    assert mask.update_(*contents(spec, other.block_masks, device)) is mask
    want = other.mask()
    assert same(mask.bits, want.bits) and same(plan, counted(want, [])) and len(calls) == 2
    assert counted(mask, calls) is plan and len(calls) == 2
    assert [x.data_ptr() for x in (mask.bits, mask.sequences, plan)] == places
    judge(Problem(spec, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_update_of_lists(device: str, keep_lists: None):
    problem, other = (problem_of(TOKENS, device, seed) for seed in (0, 5))
    mask = problem.mask()
    bits = mask._kept_bits()
    assert mask._lists is not None and mask._makes_bits()
    mask.update_(*contents(TOKENS, other.block_masks, device))
    assert mask._lists is not None and mask._kept_bits() is bits and same(bits, other.mask().bits)
    judge(Problem(TOKENS, problem.q, problem.k, problem.v, other.block_masks), *problem.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("source", ["dense", "indices", "csr"])
def test_update_of_lengths(source: str, device: str):
    """Another cut of the same totals, in as many blocks."""
    first = dataclasses.replace(SPEC, lens_q=(64, 96), lens_k=(96, 64), source=source)
    second = dataclasses.replace(first, lens_q=(96, 64), lens_k=(64, 96))
    longest = {"max_seqlen_q": 96, "max_seqlen_k": 96}
    lens = [
        {"cu_seqlens_q": cu_seqlens(x.lens_q, device), "cu_seqlens_k": cu_seqlens(x.keys, device)}
        for x in (first, second)
    ]
    build = getattr(BlockMask, f"from_{source}")
    problem, other = problem_of(first, device), problem_of(second, device, 5)
    given = [contents(p.case, p.block_masks, device) for p in (problem, other)]
    mask = build(*given[0], 32, 16, **lens[0], **longest, causal=True)
    judge(problem, *problem.run(mask))
    mask.update_(*given[1], **lens[1])
    assert same(mask.sequences, build(*given[1], 32, 16, **lens[1], **longest, causal=True).sequences)
    judge(other, *other.run(mask))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_update_between_forward_and_backward(device: str):
    """Autograd tells that the mask of the forward pass is gone."""
    problem = problem_of(SPEC, device)
    mask = problem.mask()
    q = problem.q.requires_grad_()
    out = hbsattn.block_sparse_attention(q, problem.k, problem.v, mask)
    mask.update_(*contents(SPEC, problem.block_masks, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def ones(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=device)


UPDATE_ERRORS: dict[str, tuple[str, Callable[[BlockMask], Any], type[Exception], str]] = {
    "count": (
        "dense",
        lambda m: m.update_(),
        TypeError,
        "0 tensors; expected block_mask, as mask was built by from_dense",
    ),
    "form": ("indices", lambda m: m.update_(ones(4, 6, 5)), TypeError, "1 tensors; expected counts and indices"),
    "shape": (
        "dense",
        lambda m: m.update_(ones(1, 6, 16)),
        ValueError,
        r"block_mask has shape \(1, 6, 16\); expected \(2, 6, 16\)",
    ),
    "dtype": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16).int()),
        TypeError,
        "block_mask has dtype torch.int32; expected torch.bool",
    ),
    "device": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16, device="meta")),
        ValueError,
        "block_mask is on meta; expected cpu, where mask is",
    ),
    "csr": (
        "csr",
        lambda m: m.update_(m.sequences[:, :4], m.sequences[0]),
        ValueError,
        r"indptr has shape \(2, 4\); expected \(2, 7\)",
    ),
    "lengths_batched": (
        "batched",
        lambda m: m.update_(ones(2, 2, 3, 6), cu_seqlens_q=cu_seqlens((70, 70), "cpu")),
        ValueError,
        "cu_seqlens_q is a Tensor; expected None, as mask was built for batched tensors",
    ),
    "lengths_one": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16), cu_seqlens_q=cu_seqlens((100, 37), "cpu")),
        ValueError,
        "cu_seqlens_k is None; expected an int32 Tensor",
    ),
    "lengths_batch": (
        "dense",
        lambda m: m.update_(ones(2, 6, 16), cu_seqlens_q=m.sequences[:, 0], cu_seqlens_k=m.sequences[:, 0]),
        ValueError,
        "cu_seqlens_q has 1 sequences; expected 2, those of mask",
    ),
    "lengths_too_long": (
        "padded_bounded",
        lambda m: m.update_(
            ones(1, 2, 4, 10), cu_seqlens_q=cu_seqlens((110, 27), "cpu"), cu_seqlens_k=cu_seqlens((90, 150), "cpu")
        ),
        ValueError,
        "max_seqlen_q is 100; expected at least 110, the longest sequence",
    ),
}


@pytest.mark.parametrize("name", UPDATE_ERRORS)
def test_update_refuses(name: str):
    made, call, kind, pattern = UPDATE_ERRORS[name]
    spec = dataclasses.replace(SPEC if made != "batched" else BATCHED, mask_heads=2)
    if made in ("dense", "indices", "csr"):
        spec = dataclasses.replace(spec, source=made)
    mask = build_mask(spec, block_masks(spec, 0), "cpu")
    if made == "padded_bounded":
        lens = {"cu_seqlens_q": cu_seqlens(spec.lens_q, "cpu"), "cu_seqlens_k": cu_seqlens(spec.keys, "cpu")}
        mask = BlockMask.from_dense(ones(1, 2, 4, 10), 32, 16, **lens, max_seqlen_q=100, max_seqlen_k=150)
    before = mask.bits.clone(), mask.sequences.clone()
    with pytest.raises(kind, match=pattern):
        call(mask)
    assert same(mask.bits, before[0]) and same(mask.sequences, before[1])


def test_update_refuses_other_widths_of_lists(keep_lists: None):
    mask = problem_of(TOKENS, "cpu").mask()
    counts, indices = mask._lists.counts, mask._lists.indices
    with pytest.raises(ValueError, match=r"indices has shape .*; expected .*, as mask stays lists"):
        mask.update_(counts, indices[..., :1])
