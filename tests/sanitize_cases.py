"""A dozen small problems for compute-sanitizer (`make sanitize`), each checked against the formula, with gradients.

The formula is evaluated on the CPU, so that the product's kernels are nearly all that the sanitizer sees.
"""

from __future__ import annotations

import sys

import torch

import hbsattn
from cases import case
from gradients import attend, differentiate, judge_gradients, leaves
from problems import dense_mask, judge, make_problem

CASES = [
    case("packed_causal", causal=True, q_block=64, k_block=16),
    case("batched", lens_q=(150, 150), lens_k=(130, 130), packed=False, k_block=48, head_dim=128),
    case("batched_causal_shared", lens_q=(96, 96), packed=False, form="shared", causal=True),
    case("group_fills_a_tile", heads_q=8, heads_k=2, mask_heads=2, q_block=16, k_block=80, causal=True),
    case("group_of_tails", heads_q=8, heads_k=1, mask_heads=1, q_block=112, k_block=96, lens_q=(111, 113), head_dim=72),
    case("wide_blocks", q_block=256, k_block=192, lens_q=(300, 20), head_dim=128, causal=True),
    case("zero_length", lens_q=(0, 70, 0, 50), lens_k=(40, 70, 0, 0), causal=True),
    case("empty", pattern="none"),
    case("many_columns", lens_q=(40, 20), lens_k=(1100, 530), k_block=16, q_block=32, density=0.3),
    case("padded", layout="padded", lens_q=(90, 90), lens_k=(70, 70), packed=False, head_dim=40),
    case("indices", source="indices", causal=True, k_block=32),
    case("united", pattern="alike", q_block=16, k_block=16, lens_q=(100, 30), causal=True),
    case("united_tokens", pattern="alike", q_block=1, heads_q=16, heads_k=1, mask_heads=1, lens_q=(40,), head_dim=128),
    case("sets_of_heads", heads_q=8, heads_k=1, mask_heads=1, q_block=8192, lens_q=(100,), lens_k=(300,), head_dim=128),
    case("wide_sets_of_heads", heads_q=8, heads_k=1, mask_heads=1, q_block=8192, lens_q=(70,), head_dim=256),
    case(
        "sets_in_parts",
        pattern="one_column",
        heads_q=8,
        heads_k=1,
        mask_heads=1,
        q_block=128,
        lens_q=(4200,),
        lens_k=(400,),
        head_dim=128,
    ),
    case("192_rows", q_block=192, k_block=48, lens_q=(400, 30), lens_k=(300, 90), head_dim=128, causal=True),
    case("192_rows_of_heads", heads_q=6, mask_heads=2, k_block=32, causal=True),
    case("head_dim_96", head_dim=96, q_block=128, k_block=128, causal=True),
    case("head_dim_256", head_dim=256, k_block=32, causal=True),
    case("by_queries", q_block=128, k_block=16, lens_q=(300, 20), lens_k=(500, 90), head_dim=128, causal=True),
    case("by_queries_of_heads", q_block=16, k_block=7, heads_q=8, heads_k=1, mask_heads=1, head_dim=96, lens_q=(60,)),
    case("csr", source="csr", k_block=128, q_block=128, lens_q=(400,)),
]


def main() -> None:
    names = sys.argv[1:]
    for number, spec in enumerate(CASES):
        if names and spec.name not in names:
            continue
        problem = make_problem(spec, "cuda", (torch.bfloat16, torch.float16)[number % 2])
        out, lse = problem.run()
        grads = differentiate(problem)
        torch.cuda.synchronize()
        for field in ("q", "k", "v"):
            setattr(problem, field, getattr(problem, field).cpu())
        judge(problem, out.cpu(), lse.cpu())
        judge_gradients(problem, tuple(grad.cpu() for grad in grads))
        print(f"{spec.name}: ok", flush=True)
    # Lengths that lie, within the tensors; the smaller blocks may be united.
    for q_block, k_block in ((64, 64), (16, 64), (128, 16)):
        spec = case("lies", mask_heads=1, q_block=q_block, k_block=k_block)
        problem = make_problem(spec, "cuda", torch.bfloat16)
        block_mask = dense_mask(problem.case, problem.block_masks, "flat").cuda()
        for lie in ((0, 337, 0, 337), (337, 200, 100, 0), (0, 0, 0, 337)):
            lens = torch.tensor(lie, dtype=torch.int32).cuda()
            mask = hbsattn.BlockMask.from_dense(
                block_mask, q_block, k_block, cu_seqlens_q=lens, cu_seqlens_k=lens, causal=True
            )
            # Rows that no sequence covers get no values, so that nothing else may read results.
            inputs = leaves(problem)
            out = attend(*inputs, mask)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            torch.cuda.synchronize()
    print("lies: ok", flush=True)


if __name__ == "__main__":
    # Saved tensors go to the host and back: initcheck does not know that the copy engine has written them.
    with torch.autograd.graph.save_on_cpu():
        main()
