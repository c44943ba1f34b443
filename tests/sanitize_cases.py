"""Small problems for compute-sanitizer (`make sanitize`), each with gradients and checked against the formula.

The formula is evaluated on the CPU, so that the product's kernels are nearly all that the sanitizer sees. Arguments
are names of problems to run. "lies" names lengths that lie within the tensors. "hostile" adds those that lead past
them, by every method of the backward pass, for memcheck alone: sequences that share keys may read sums that nobody
wrote.
"""

from __future__ import annotations

import argparse

import torch

import hbsattn
from cases import BACKWARD_METHODS, HOSTILE_LENGTHS, HOSTILE_ROWS, Case, case
from gradients import attend, differentiate, judge_gradients
from hbsattn.utils import use_kernels
from problems import judge, make_problem

# Left, right and sink of the heads: no window, one inside a block, one across blocks, and a sink that ends in a block.
SLIDING = ((-1, -1, 0), (20, 3, 5), (100, -1, 0), (30, 0, 70))
CASES = [
    case("packed_causal", causal=True, q_block=64, k_block=16),
    case("batched", lens_q=(150, 150), lens_k=(130, 130), packed=False, k_block=48, head_dim=128),
    case("batched_causal_shared", lens_q=(96, 96), packed=False, form="shared", causal=True),
    case("group_fills_a_tile", heads_q=8, heads_k=2, mask_heads=2, q_block=16, k_block=80, causal=True),
    case("group_of_tails", heads_q=8, heads_k=1, mask_heads=1, q_block=112, k_block=96, lens_q=(111, 113), head_dim=72),
    case("wide_blocks", q_block=256, k_block=192, lens_q=(300, 20), head_dim=128, causal=True),
    case("zero_length", lens_q=(0, 70, 0, 50), lens_k=(40, 70, 0, 0), causal=True),
    case("empty", pattern="none"),
    case("many_columns", lens_q=(40, 20), lens_k=(6400, 530), k_block=16, q_block=32, density=0.9),
    case("padded", layout="padded", lens_q=(90, 90), lens_k=(70, 70), packed=False, head_dim=40),
    case("indices", source="indices", causal=True, k_block=32),
    case("united", pattern="alike", q_block=16, k_block=16, lens_q=(100, 30), causal=True),
    case("united_tokens", pattern="alike", q_block=1, heads_q=16, heads_k=1, mask_heads=1, lens_q=(40,), head_dim=128),
    case(
        "sets_of_heads",
        heads_q=8,
        heads_k=1,
        mask_heads=1,
        q_block=8192,
        k_block=128,
        lens_q=(100,),
        lens_k=(300,),
        head_dim=128,
    ),
    case(
        "stack",
        q_block=1,
        heads_q=16,
        heads_k=1,
        mask_heads=1,
        lens_q=(70, 5),
        lens_k=(300, 90),
        head_dim=128,
        causal=True,
    ),
    case(
        "stack_with_padding", q_block=1, heads_q=12, heads_k=2, mask_heads=2, lens_q=(50, 9), head_dim=128, causal=True
    ),
    case("stack_clipped", q_block=6, k_block=48, heads_q=16, heads_k=2, mask_heads=2, lens_q=(50, 0, 31), head_dim=72),
    case("windows", q_block=296, k_block=128, heads_q=64, heads_k=1, mask_heads=1, lens_q=(310,), head_dim=128),
    case("wide_sets_of_heads", heads_q=8, heads_k=1, mask_heads=1, q_block=8208, lens_q=(70,), head_dim=256),
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
    case(
        "pairs",
        pattern="alike",
        heads_q=8,
        heads_k=2,
        mask_heads=8,
        lens_q=(300,),
        lens_k=(900,),
        k_block=16,
        density=0.7,
        causal=True,
    ),
    case("sinks", q_block=128, k_block=128, lens_q=(300, 90), head_dim=128, causal=True, sinks=True),
    case("sinks_by_queries", q_block=128, k_block=16, lens_q=(300, 20), head_dim=128, sinks=True),
    case("sinks_deterministic", q_block=64, k_block=64, lens_q=(200, 90), head_dim=128, sinks=True),
    case("sinks_wide", q_block=64, k_block=48, lens_q=(150,), head_dim=256, causal=True, sinks=True),
    case(
        "sinks_of_tokens",
        q_block=1,
        heads_q=32,
        heads_k=2,
        mask_heads=2,
        lens_q=(50, 9),
        head_dim=128,
        pattern="empty_rows",
        sinks=True,
    ),
    case("short_values", head_dim=192, value_dim=128, q_block=128, k_block=128, lens_q=(300, 20), causal=True),
    case("short_values_small", head_dim=184, value_dim=120, q_block=16, k_block=48, lens_q=(90,), layout="padded"),
    case("longer_values", head_dim=40, value_dim=72, q_block=128, k_block=16, lens_q=(150, 37), layout="padded"),
    case("softcap", q_block=128, k_block=128, lens_q=(300, 90), head_dim=128, causal=True, softcap=2.0),
    case("softcap_ragged", q_block=100, k_block=33, lens_q=(210, 90), head_dim=72, causal=True, softcap=2.0),
    case("softcap_deterministic", q_block=64, k_block=64, lens_q=(200, 90), head_dim=128, sinks=True, softcap=2.0),
    case("softcap_wide", q_block=64, k_block=48, lens_q=(150,), head_dim=192, softcap=2.0, dropout_p=0.2),
    case("dropout", q_block=128, k_block=128, lens_q=(300, 90), head_dim=128, causal=True, dropout_p=0.2),
    case("dropout_by_queries", q_block=128, k_block=16, lens_q=(300, 20), head_dim=128, dropout_p=0.6),
    case("dropout_ragged", q_block=100, k_block=33, lens_q=(210, 90), head_dim=72, causal=True, dropout_p=0.2),
    case("dropout_deterministic", q_block=64, k_block=64, lens_q=(200, 90), head_dim=128, sinks=True, dropout_p=0.2),
    case("dropout_wide", q_block=64, k_block=48, lens_q=(150,), head_dim=192, causal=True, dropout_p=0.2),
    case(
        "dropout_of_tokens",
        q_block=1,
        heads_q=32,
        heads_k=2,
        mask_heads=2,
        lens_q=(50, 9),
        head_dim=128,
        pattern="empty_rows",
        dropout_p=0.2,
    ),
    case("sliding", q_block=128, k_block=128, lens_q=(300, 90), lens_k=(400, 80), head_dim=128, windows=SLIDING),
    case("sliding_causal", q_block=128, k_block=128, lens_q=(300, 90), head_dim=128, windows=SLIDING, causal=True),
    case("sliding_tiles_of_64", q_block=64, k_block=64, lens_q=(200, 90), lens_k=(170, 80), windows=SLIDING),
    case("sliding_wide", q_block=64, k_block=48, lens_q=(150,), head_dim=256, windows=SLIDING, causal=True),
    case("sliding_by_queries", q_block=128, k_block=16, lens_q=(300, 20), head_dim=128, windows=SLIDING, causal=True),
    case("sliding_deterministic", q_block=128, k_block=128, lens_q=(300, 90), head_dim=128, windows=SLIDING),
    case(
        "sliding_stack",
        q_block=1,
        heads_q=32,
        heads_k=2,
        mask_heads=2,
        lens_q=(50, 9),
        lens_k=(200, 70),
        head_dim=128,
        windows=SLIDING[2:],
        causal=True,
    ),
    case(
        "sliding_alike",
        pattern="alike",
        heads_q=8,
        heads_k=2,
        mask_heads=8,
        lens_q=(300,),
        k_block=16,
        density=0.9,
        windows=SLIDING * 2,
        causal=True,
    ),
]


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--kernels", choices=("auto", "sm90", "sm80"), default="auto", help="see hbsattn.utils")
    parser.add_argument(
        "--float32", action="store_true", help="all cases in float32, instead of 16-bit dtypes in turns"
    )
    options = parser.parse_args()
    with use_kernels(options.kernels):
        run_cases(options.names, options.float32)


def run_cases(names: list[str], float32: bool) -> None:
    compiled = {kernel["dtype"] for kernel in hbsattn.build_info()["kernels"]}
    dtypes = [dtype for name, dtype in DTYPES.items() if name in compiled and (name == "float32") == float32]
    for number, spec in enumerate(CASES):
        if names and spec.name not in names:
            continue
        problem = make_problem(spec, "cuda", dtypes[number % len(dtypes)])
        out, lse = problem.run()
        grads = differentiate(problem, deterministic="deterministic" in spec.name)
        torch.cuda.synchronize()
        for field in ("q", "k", "v", "sinks", "dropout_seed"):
            if getattr(problem, field) is not None:
                setattr(problem, field, getattr(problem, field).cpu())
        judge(problem, out.cpu(), lse.cpu())
        judge_gradients(problem, tuple(grad.cpu() for grad in grads))
        print(f"{spec.name}: ok", flush=True)
    if not names or "lies" in names:
        for spec in BACKWARD_METHODS:
            if spec.name in ("by_keys_of_64", "by_queries", "united"):
                run_lies(spec, False, LIES, dtypes[0])
        print("lies: ok", flush=True)
    if "hostile" in names:
        for spec in BACKWARD_METHODS:
            for deterministic in (False, True):
                run_lies(spec, deterministic, [*LIES, *HOSTILE_LENGTHS.values()], dtypes[0])
            print(f"hostile to {spec.name}: ok", flush=True)


LIES = [(0, 300, 0, 300), (300, 200, 100, 0), (0, 0, 0, 300)]  # within the tensors


def run_lies(spec: Case, deterministic: bool, lies: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Forward and backward of tensors of HOSTILE_ROWS rows, about which the lengths of queries, keys or both lie."""
    generator = torch.Generator().manual_seed(0)
    heads = (spec.heads_q, spec.heads_k, spec.heads_k)
    tensors = [torch.randn((HOSTILE_ROWS, n, spec.head_dim), generator=generator).to(dtype).cuda() for n in heads]
    rows, cols = (-(-HOSTILE_ROWS // size) for size in (spec.q_block, spec.k_block))
    for number, lie in enumerate(lies):
        batch = len(lie) - 1
        honest = (*[0] * batch, HOSTILE_ROWS)
        lens_q, lens_k = ((lie, lie), (lie, honest), (honest, lie))[number % 3]
        # As many rows as the sequences would have blocks, were they to share the tensors.
        block_mask = torch.ones((spec.mask_heads, rows + batch - 1, cols + batch - 1), dtype=torch.bool).cuda()
        lens = {"cu_seqlens_q": lens_q, "cu_seqlens_k": lens_k}
        mask = hbsattn.BlockMask.from_dense(
            block_mask,
            spec.q_block,
            spec.k_block,
            causal=number % 2 == 0,
            **{name: torch.tensor(x, dtype=torch.int32).cuda() for name, x in lens.items()},
        )
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves, mask, deterministic=deterministic)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()


if __name__ == "__main__":
    # Saved tensors go to the host and back: initcheck does not know that the copy engine has written them.
    with torch.autograd.graph.save_on_cpu():
        main()
