"""Cumulative lengths that point past the tensors, on CUDA, where nobody reads them before a launch.

What they give means nothing. But nothing outside of the results may be written, and what lies beside the tensors may
not get into them.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import hbsattn
from cases import BACKWARD_METHODS, HOSTILE_LENGTHS, HOSTILE_ROWS, Case
from gradients import attend
from hbsattn._cpu.attend import attend as attend_on_cpu
from hbsattn._cpu.attend import differentiate as differentiate_on_cpu
from hbsattn._layout import Call
from problems import same

pytestmark = pytest.mark.gpu

GUARD_ROWS = 256
PATTERN = 7.0


def guarded(spec: Case, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """A buffer, and a tensor in the middle of it; rows before and behind that are NaN."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    rows = HOSTILE_ROWS + 2 * GUARD_ROWS
    buffer = torch.full((rows, heads, spec.head_dim), torch.nan, dtype=torch.float16, device="cuda")
    tensor = buffer[GUARD_ROWS : GUARD_ROWS + HOSTILE_ROWS]
    tensor.copy_(torch.randn(tensor.shape, device="cuda", generator=generator))
    return buffer, tensor


def make_bands(sizes: list[int]) -> list[Tensor]:
    """Memory between which the allocator is likely to put results of these sizes, in floats."""
    bands = [torch.full((size,), PATTERN, dtype=torch.float32, device="cuda") for size in sizes for _ in range(5)]
    return [band for i, band in enumerate(bands) if i % 2 == 0]  # the others are free again


def hostile_mask(spec: Case, q: tuple[int, ...], k: tuple[int, ...], form: str, causal: bool) -> hbsattn.BlockMask:
    rows, cols = (-(-HOSTILE_ROWS // size) for size in (spec.q_block, spec.k_block))
    shape = (spec.mask_heads, rows, cols)
    block_mask = torch.ones(shape if form == "flat" else (len(q) - 1, *shape), dtype=torch.bool, device="cuda")
    lens_q, lens_k = (torch.tensor(lens, dtype=torch.int32, device="cuda") for lens in (q, k))
    return hbsattn.BlockMask.from_dense(
        block_mask, spec.q_block, spec.k_block, cu_seqlens_q=lens_q, cu_seqlens_k=lens_k, causal=causal
    )


@pytest.mark.parametrize("lie", HOSTILE_LENGTHS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_lengths_past_the_tensors(spec: Case, deterministic: bool, lie: str):
    buffers, tensors = zip(
        *(guarded(spec, n, i) for i, n in enumerate((spec.heads_q, *[spec.heads_k] * 2))), strict=True
    )
    grad_buffer, grad_out = guarded(spec, spec.heads_q, 3)
    before = [x.clone() for x in (*buffers, grad_buffer)]
    claimed = HOSTILE_LENGTHS[lie]
    honest = (*[0] * (len(claimed) - 1), HOSTILE_ROWS)
    for q, k in ((claimed, claimed), (claimed, honest), (honest, claimed)):
        for form, causal, windowed in (
            ("flat", False, False),
            ("flat", True, False),
            ("batched", True, False),
            ("flat", False, True),
            ("batched", True, True),
        ):
            bands = make_bands([*(x.numel() // 2 for x in tensors), spec.heads_q * HOSTILE_ROWS])
            leaves = [x.detach().requires_grad_() for x in tensors]
            mask = hostile_mask(spec, q, k, form, causal)
            if windowed:
                mask = mask.windowed(70, 20, 30)
            out, lse = attend(*leaves, mask, return_lse=True, deterministic=deterministic)
            assert not out.isnan().any() and not lse.isnan().any(), "results hold what lies beside the tensors"
            grads = torch.autograd.grad(out, leaves, grad_out)
            torch.cuda.synchronize()
            assert [x.shape for x in grads] == [x.shape for x in leaves]
            assert all(bool((band == PATTERN).all()) for band in bands), "memory outside the results was written"
            for now, then in zip((*buffers, grad_buffer), before, strict=True):
                assert same(now, then), "an input, or what lies beside it, was written"


@pytest.mark.parametrize("end", [301, 10**6, 2**31 - 1])
@pytest.mark.parametrize("side", ["queries", "keys", "both"])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_lengths_are_cut_to_the_tensors(spec: Case, side: str, end: int):
    """What is claimed past the end does not count: without causality, results are those of the true lengths."""
    tensors = [guarded(spec, n, seed)[1] for seed, n in enumerate((spec.heads_q, spec.heads_k, spec.heads_k))]
    _, grad_out = guarded(spec, spec.heads_q, 3)
    true, claimed = (0, HOSTILE_ROWS), (0, end)
    lens = {"queries": (claimed, true), "keys": (true, claimed), "both": (claimed, claimed)}[side]
    results = []
    for q, k in ((true, true), lens):
        leaves = [x.detach().requires_grad_() for x in tensors]
        mask = hostile_mask(spec, q, k, "flat", False)
        outputs = attend(*leaves, mask, return_lse=True, deterministic=True)
        results.append((*outputs, *torch.autograd.grad(outputs[0], leaves, grad_out)))
    for name, want, got in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("end", [250, 301, 10**6, 2**31 - 1])
@pytest.mark.parametrize("side", ["queries", "keys", "both"])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("spec", BACKWARD_METHODS, ids=lambda s: s.name)
def test_the_diagonal_is_that_of_the_claimed_lengths(spec: Case, windowed: bool, side: str, end: int):
    """What is cut off does not move the diagonal: causal results are the CPU backend's, for the same table."""
    tensors = [guarded(spec, n, seed)[1] for seed, n in enumerate((spec.heads_q, spec.heads_k, spec.heads_k))]
    _, grad_out = guarded(spec, spec.heads_q, 3)
    true, claimed = (0, HOSTILE_ROWS), (0, end)
    q, k = {"queries": (claimed, true), "keys": (true, claimed), "both": (claimed, claimed)}[side]
    mask = hostile_mask(spec, q, k, "flat", True)
    if windowed:
        mask = mask.windowed(200, sink=40)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*leaves, mask, return_lse=True, deterministic=True)
    got = (out, lse, *torch.autograd.grad(out, leaves, grad_out))
    plain = [x.cpu().float() for x in tensors]
    rules = None if mask._rules is None else mask._rules.cpu()
    tables = (mask.bits.cpu(), mask.sequences.cpu(), rules, None, None, None)
    call = Call(*plain, *tables, None, None, mask._layout, True, spec.head_dim**-0.5, 0.0, 0.0, False)
    out, lse = attend_on_cpu(call)
    want = (out, lse, *differentiate_on_cpu(call, grad_out.cpu().float(), None, out, lse)[:3])
    for name, x, y in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), got, want, strict=True):
        torch.testing.assert_close(
            x.cpu().float(), y, atol=1e-2, rtol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("lie", HOSTILE_LENGTHS)
@pytest.mark.parametrize("source", ["indices", "csr"])
def test_lists_and_lengths_past_the_tensors(source: str, lie: str):
    """Lists name blocks that the tensors do not have, of sequences that they do not have."""
    spec = dataclasses.replace(BACKWARD_METHODS[1], mask_heads=1)
    (_, q), (_, k), (_, v) = (guarded(spec, n, i) for i, n in enumerate((spec.heads_q, *[spec.heads_k] * 2)))
    lens = torch.tensor(HOSTILE_LENGTHS[lie], dtype=torch.int32, device="cuda")
    keywords = {"cu_seqlens_q": lens, "cu_seqlens_k": lens, "max_seqlen_q": 2**20, "max_seqlen_k": 2**20}
    rows, width = 5, 4
    indices = torch.tensor([0, 4, 5, 2**14 - 1], dtype=torch.int32, device="cuda").repeat(rows)
    if source == "indices":
        counts = torch.full((1, rows), width, dtype=torch.int32, device="cuda")
        mask = hbsattn.BlockMask.from_indices(counts, indices.view(1, rows, width), 64, 64, **keywords)
    else:
        indptr = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device="cuda")[None]
        mask = hbsattn.BlockMask.from_csr(indptr, indices, 64, 64, **keywords)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, mask)
    assert not out.isnan().any()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.cuda.synchronize()
