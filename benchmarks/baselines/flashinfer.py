"""FlashInfer's variable-block-sparse attention: one sequence, not causal, blocks of any size."""

from __future__ import annotations

from collections.abc import Callable

import flashinfer
import torch
from torch import Tensor

from baselines import expect
from workloads import HALF, Workload


class FlashInfer:
    name = "flashinfer"
    label = "FlashInfer"
    dense = False
    differentiable = False
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return (
            expect(workload.batch == 1, "one sequence")
            or expect(not workload.causal, "masks that are not causal")
            or expect(workload.head_dim in (64, 128, 256), "head dims of 64, 128 and 256")
            or expect(workload.heads == workload.heads_k, "masks per key head")
        )

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace)
        wrapper.plan(
            block_mask[0],
            self._sizes(workload, workload.q_block, q.device),
            self._sizes(workload, workload.k_block, q.device),
            workload.heads,
            workload.heads_k,
            workload.head_dim,
            q_data_type=workload.dtype,
        )
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))

        def attend() -> Tensor:
            return wrapper.run(q, k, v).transpose(0, 1)[None]

        attend()
        return attend

    @staticmethod
    def _sizes(workload: Workload, block: int, device: torch.device) -> Tensor:
        begins = torch.arange(0, workload.seqlen, block, dtype=torch.int32, device=device)
        sizes = (begins + block).clamp(max=workload.seqlen) - begins
        return sizes.expand(workload.heads_k, -1).contiguous()


RIVALS = (FlashInfer(),)
