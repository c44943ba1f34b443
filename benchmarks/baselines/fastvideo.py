"""FastVideo's VSA kernel (fastvideo_kernel, ThunderKittens): blocks of 64, one sequence, not causal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastvideo_kernel import block_sparse_attn_from_indices
from torch import Tensor

from baselines import expect, index_lists
from workloads import HALF, Workload


class FastVideo:
    name = "vsa"
    label = "FastVideo VSA"
    dense = False
    differentiable = False
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return (
            expect(workload.q_block == workload.k_block == 64, "blocks of 64")
            or expect(workload.batch == 1, "one sequence")
            or expect(not workload.causal, "masks that are not causal")
            or expect(workload.head_dim in (64, 128), "head dims of 64 and 128")
            or expect(workload.heads == workload.heads_k, "as many key heads as query heads")
            or expect(workload.seqlen % 64 == 0, "lengths that are multiples of 64")
            or expect(workload.dtype == torch.bfloat16, "bfloat16")
        )

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        counts, indices = index_lists(block_mask)
        sizes = torch.full((workload.blocks[1],), 64, dtype=torch.int32, device=q.device)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

        def attend() -> Tensor:
            return block_sparse_attn_from_indices(q, k, v, indices, counts, sizes)[0].transpose(1, 2)

        attend()
        return attend


RIVALS = (FastVideo(),)
