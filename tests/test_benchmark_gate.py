"""The benchmarks' gate: it lets right results pass, and no wrong ones.

A process of its own does the work, as this file run as a script: benchmarks/ has modules with names that tests/ has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hbsattn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_gate():
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def main() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    for value_dim in (None, 48):
        judge_right_and_wrong(value_dim)


def judge_right_and_wrong(value_dim: int | None) -> None:
    import gate
    import masks
    import workloads

    shape = {"causal": True, "heads": 4, "heads_k": 2, "head_dim": 32, "value_dim": value_dim}
    work = workloads.Workload("gate", 300, 64, 32, 0.3, **shape)
    qkv = workloads.make_tensors(work, "cpu", 1)
    block_mask = masks.make_mask(work, "cpu", 2)
    lengths = {"seqlen_q": work.seqlen, "seqlen_k": work.seqlen}
    mask = hbsattn.BlockMask.from_dense(block_mask, work.q_block, work.k_block, causal=True, **lengths)

    out, lse = hbsattn.block_sparse_attention(*qkv, mask, return_lse=True)
    assert gate.check(work, *qkv, block_mask, out, lse).passed
    wrong = out.clone()
    wrong[0, 0] += 1
    assert not gate.check(work, *qkv, block_mask, wrong, lse).passed, "of out"
    assert not gate.check(work, *qkv, block_mask, out, lse + 0.1).passed, "of lse"

    grad_out = workloads.make_grad_out(work, "cpu", 3)
    inputs = [x.requires_grad_() for x in qkv]
    grads = torch.autograd.grad(hbsattn.block_sparse_attention(*inputs, mask), inputs, grad_out)
    judge = gate.Gradients(work, *qkv, grad_out, block_mask)
    assert judge.check(grads).passed
    for name in "qkv":
        others = tuple(grad * 1.5 if name == which else grad for which, grad in zip("qkv", grads, strict=True))
        assert not judge.check(others).passed, f"of the gradient of {name}"


if __name__ == "__main__":
    main()
