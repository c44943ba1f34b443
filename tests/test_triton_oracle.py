"""The two oracles against each other: the dense formula and the Triton port of the algorithm.

On the CPU the port runs in Triton's interpreter, which must be chosen before Triton is imported: one subprocess (this
file as a script) computes all cases, and each case is a test. The interpreter multiplies bfloat16 as integers, so
bfloat16 is left to CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import hbsattn
import problems

pytest.importorskip("triton", reason="the Triton oracle needs triton")

PACKED = [c for c in cases.CASES if c.packed and c.head_dim >= 8]
HALVES = {
    "packed_causal",
    "zero_length_causal",
    "gqa_8_group",
    "hidden_logits_causal",
    "negative_logits",
    "head_dim_96",
}
INTERPRETED = [(c, d) for c in PACKED for d in ("float32", "float16") if d == "float32" or c.name in HALVES]


def run_case(spec: cases.Case, device: str, dtype: torch.dtype) -> None:
    from oracle import triton_attention

    problem = problems.make_problem(spec, device, dtype, seed=1)
    out, lse = triton_attention.attention(
        problem.q,
        problem.k,
        problem.v,
        problem.block_masks,
        spec.q_block,
        spec.k_block,
        lens_q=spec.lens_q,
        lens_k=spec.keys,
        causal=spec.causal,
        scale=spec.scale,
    )
    problems.judge(problem, out, lse)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What the subprocess says of each case: an empty string, or what went wrong."""
    paths = os.pathsep.join(str(Path(file).resolve().parent) for file in (__file__, Path(hbsattn.__file__).parent))
    changes = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("spec,dtype", INTERPRETED, ids=lambda x: x if isinstance(x, str) else x.name)
def test_interpreter(interpreted: dict[str, str], spec: cases.Case, dtype: str):
    problem = interpreted[f"{spec.name} {dtype}"]
    assert not problem, problem


@pytest.mark.gpu
@pytest.mark.parametrize("spec", PACKED[::3], ids=lambda c: c.name)
def test_cuda(spec: cases.Case):
    run_case(spec, "cuda", torch.bfloat16)


def main() -> None:
    outcome = {}
    for spec, dtype in INTERPRETED:
        try:
            run_case(spec, "cpu", getattr(torch, dtype))
            outcome[f"{spec.name} {dtype}"] = ""
        except Exception as error:
            outcome[f"{spec.name} {dtype}"] = repr(error)
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
