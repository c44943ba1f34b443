"""FlashAttention-4 (flash_attn.cute, CuTe DSL): block-sparse, a k block of at most 128 as its key tile."""

from __future__ import annotations

from collections.abc import Callable

from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd
from torch import Tensor

from baselines import expect, index_lists, split_blocks
from workloads import HALF, Workload


class FlashAttentionCute:
    name = "fa4"
    label = "FlashAttention-4"
    dense = False
    differentiable = False
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return expect(workload.q_block % 64 == 0, "query blocks that are multiples of 64") or expect(
            workload.k_block in (16, 32, 64, 128), "key blocks of 16, 32, 64 and 128"
        )

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        partial, full = split_blocks(workload, block_mask)
        lists = BlockSparseTensorsTorch(
            *index_lists(partial), *index_lists(full), block_size=(workload.q_block, workload.k_block)
        )
        tile = (128 if workload.q_block % 128 == 0 else 64, workload.k_block)

        def attend() -> Tensor:
            return _flash_attn_fwd(q, k, v, causal=workload.causal, tile_mn=tile, block_sparse_tensors=lists)[0]

        attend()
        return attend


RIVALS = (FlashAttentionCute(),)
