"""The benchmarks' gate: it lets right results pass, and no wrong ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hbsattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gate
import masks
import workloads

WORKLOAD = workloads.Workload("gate", 300, 64, 32, 0.3, causal=True, heads=4, heads_k=2, head_dim=32)


def make_problem() -> tuple[tuple[torch.Tensor, ...], torch.Tensor, hbsattn.BlockMask]:
    qkv = workloads.make_tensors(WORKLOAD, "cpu", 1)
    block_mask = masks.make_mask(WORKLOAD, "cpu", 2)
    lengths = {"seqlen_q": WORKLOAD.seqlen, "seqlen_k": WORKLOAD.seqlen}
    mask = hbsattn.BlockMask.from_dense(block_mask, WORKLOAD.q_block, WORKLOAD.k_block, causal=True, **lengths)
    return qkv, block_mask, mask


def test_results():
    qkv, block_mask, mask = make_problem()
    out, lse = hbsattn.block_sparse_attention(*qkv, mask, return_lse=True)
    assert gate.check(WORKLOAD, *qkv, block_mask, out, lse).passed
    wrong = out.clone()
    wrong[0, 0] += 1
    assert not gate.check(WORKLOAD, *qkv, block_mask, wrong, lse).passed
    assert not gate.check(WORKLOAD, *qkv, block_mask, out, lse + 0.1).passed


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients(name: str):
    qkv, block_mask, mask = make_problem()
    grad_out = workloads.make_grad_out(WORKLOAD, "cpu", 3)
    inputs = [x.requires_grad_() for x in qkv]
    grads = torch.autograd.grad(hbsattn.block_sparse_attention(*inputs, mask), inputs, grad_out)
    judge = gate.Gradients(WORKLOAD, *qkv, grad_out, block_mask)
    assert judge.check(grads).passed
    wrong = [grad * 1.5 if name == which else grad for which, grad in zip("qkv", grads, strict=True)]
    assert not judge.check(tuple(wrong)).passed
