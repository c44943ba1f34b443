"""Block-sparse attention of the cuDNN frontend (CuTe DSL): blocks of 64 or 128, not causal."""

from __future__ import annotations

from collections.abc import Callable

from cudnn import BSA
from torch import Tensor

from baselines import expect, index_lists
from workloads import HALF, Workload

# Frontends before 1.32 lack it; the attribute loads its module, so that a missing one is noticed here.
_forward = BSA.block_sparse_attention_forward


class CudnnFrontend:
    name = "cudnn-bsa"
    label = "cuDNN frontend, block-sparse"
    dense = False
    differentiable = False
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return (
            expect(workload.q_block == workload.k_block and workload.k_block in (64, 128), "blocks of 64 and of 128")
            or expect(not workload.causal, "masks that are not causal")
            or expect(workload.head_dim in (64, 96, 128), "head dims of 64, 96 and 128")
            or expect(workload.seqlen % workload.k_block == 0, "lengths that are multiples of the block")
        )

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        counts, indices = index_lists(block_mask)

        def attend() -> Tensor:
            result = _forward(
                q,
                k,
                v,
                indices,
                q2k_block_nums=counts,
                sparse_block_size=workload.k_block,
                layout="bshd",
            )
            return result["o_tensor"]

        attend()
        return attend


RIVALS = (CudnnFrontend(),)
