"""MIT's Block-Sparse-Attention: blocks of 128, built on FlashAttention-2. It sorts the mask in every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from block_sparse_attn import block_sparse_attn_func
from torch import Tensor

from baselines import expect
from workloads import HALF, Workload


class BlockSparseAttention:
    name = "mit"
    label = "MIT Block-Sparse-Attention"
    dense = False
    differentiable = True
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return expect(workload.q_block == workload.k_block == 128, "blocks of 128") or expect(
            workload.head_dim in (32, 64, 128), "head dims of 32, 64 and 128"
        )

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        seqlen, batch = workload.seqlen, workload.batch
        cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=q.device)
        head_types = torch.ones(workload.heads, dtype=torch.int32, device=q.device)
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))

        def attend() -> Tensor:
            out = block_sparse_attn_func(
                q,
                k,
                v,
                cu_seqlens,
                cu_seqlens,
                head_types,
                None,
                block_mask,
                seqlen,
                seqlen,
                0.0,
                is_causal=workload.causal,
            )
            return out.view(shape)

        return attend


RIVALS = (BlockSparseAttention(),)
