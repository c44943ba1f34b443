"""The two oracles against each other: the dense formula and the Triton port of the algorithm.

On the CPU the port runs in Triton's interpreter, which must be chosen before Triton is imported: one subprocess (this
file as a script) computes all cases and prints a line for each, and each case is a test that waits for its line. The
interpreter takes milliseconds for an operation, so its cases are small. It multiplies bfloat16 as integers, so bfloat16
is left to CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cases
import hbsattn
import problems
from cases import case

pytest.importorskip("triton", reason="the Triton oracle needs triton")

PACKED = [c for c in cases.CASES if c.packed and c.head_dim >= 8]

# Each value of a property once at least, in few tiles.
SMALL = {"lens_q": (40, 17), "heads_q": 2, "heads_k": 1, "mask_heads": 2, "head_dim": 16}
INTERPRETED = [
    (case("plain", **SMALL), "float32"),
    (case("causal_half", **{**SMALL, "head_dim": 64}, causal=True, q_block=16, k_block=16), "float16"),
    (case("tails", **{**SMALL, "lens_q": (65, 3), "lens_k": (31, 70)}, q_block=64, k_block=48), "float32"),
    (case("q_longer_causal", **{**SMALL, "lens_q": (50, 9), "lens_k": (20, 8)}, causal=True, q_block=16), "float32"),
    (case("k_longer_causal", **{**SMALL, "lens_q": (1, 9), "lens_k": (70, 33)}, causal=True, k_block=32), "float16"),
    (case("zero_length", **{**SMALL, "lens_q": (0, 20, 0, 5), "lens_k": (9, 20, 0, 0)}, causal=True), "float32"),
    (case("empty_rows", **SMALL, pattern="empty_rows", q_block=16, k_block=16), "float16"),
    (case("group_mask", **{**SMALL, "heads_q": 4, "heads_k": 2}, q_block=32, k_block=80, causal=True), "float32"),
    (case("shared_mask", **{**SMALL, "heads_q": 4, "mask_heads": 1}, q_block=48, k_block=16), "float32"),
    (case("tokens", **{**SMALL, "lens_q": (9,), "lens_k": (40,)}, q_block=1, k_block=7, causal=True), "float32"),
    (case("odd_blocks", **{**SMALL, "head_dim": 72}, q_block=13, k_block=20), "float16"),
    (case("long_blocks", **SMALL, q_block=192, k_block=256, density=1.0, causal=True), "float32"),
    (case("strides", **{**SMALL, "head_dim": 20}, layout="padded"), "float32"),
    (case("negative", **SMALL, values="negative", scale=1.0), "float16"),
    (case("hidden", **SMALL, values="hidden", scale=1.0, causal=True, density=1.0), "float32"),
    (case("large_scale", **SMALL, scale=2.0), "float32"),
    (case("wide_head", **{**SMALL, "lens_q": (17,), "head_dim": 136}, causal=True), "float32"),
]


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


class Interpreter:
    """The subprocess, whose results are read as they come."""

    def __init__(self) -> None:
        paths = os.pathsep.join(str(Path(file).resolve().parent) for file in (__file__, Path(hbsattn.__file__).parent))
        changes = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.results: dict[str, str] = {}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env={**os.environ, **changes}, stdout=subprocess.PIPE, text=True
        )

    def result(self, name: str) -> str:
        """What went wrong with a case; empty: nothing."""
        while name not in self.results:
            line = self.process.stdout.readline()
            assert line, f"the interpreter ended with code {self.process.wait()} before it came to {name}"
            self.results.update(json.loads(line))
        return self.results[name]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    started = Interpreter()
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("spec,dtype", INTERPRETED, ids=lambda x: x if isinstance(x, str) else x.name)
def test_interpreter(interpreter: Interpreter, spec: cases.Case, dtype: str):
    wrong = interpreter.result(spec.name)
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("spec", PACKED[::3], ids=lambda c: c.name)
def test_cuda(spec: cases.Case):
    run_case(spec, "cuda", torch.bfloat16)


def main() -> None:
    for spec, dtype in INTERPRETED:
        wrong = ""
        try:
            run_case(spec, "cpu", getattr(torch, dtype))
        except Exception as error:
            wrong = repr(error)
        print(json.dumps({spec.name: wrong}), flush=True)


if __name__ == "__main__":
    main()
