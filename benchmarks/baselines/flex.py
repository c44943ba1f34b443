"""FlexAttention (torch.nn.attention.flex_attention), compiled, with a mask made of our blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from baselines import index_lists, split_blocks, windows_of_queries
from workloads import HALF, Workload

# Every workload is a specialization; past its limit the compiler would fall back to dense eager attention unasked.
torch._dynamo.config.recompile_limit = 1024
torch._dynamo.config.accumulated_recompile_limit = 1024
torch._dynamo.config.fail_on_recompile_limit_hit = True
torch._functorch.config.donated_buffer = False  # a backward that runs many times keeps what the forward saved
_compiled = torch.compile(flex_attention, dynamic=False)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _windowed(workload: Workload, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What the windows of heads let queries attend to, and causality, if there is any."""
    windows = torch.tensor(windows_of_queries(workload), device=device)
    far = torch.where(windows < 0, workload.seqlen, windows)  # no window leaves more
    left, right, sink = far.T.contiguous()
    causal = workload.causal

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key >= query - left[head]) & (key <= query + right[head])
        inside = near | (key < sink[head])
        return inside & (query >= key) if causal else inside

    return attends


def _tile(block: int) -> int:
    """The largest tile that FlexAttention can run on blocks of this size."""
    return min(block & -block, 128)


class Flex:
    name = "flex"
    label = "FlexAttention"
    dense = False
    differentiable = True
    dtypes = HALF
    windowed = True

    def refusal(self, workload: Workload) -> str | None:
        if _tile(workload.q_block) < 16 or _tile(workload.k_block) < 16:
            return "supports blocks that are multiples of 16 only"
        if workload.task != "forward" and min(_tile(workload.q_block), _tile(workload.k_block)) < 128:
            return "its backward runs here on blocks that are multiples of 128 only"
        return None

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        partial, full = split_blocks(workload, block_mask)
        rule = _causal if workload.causal else None
        if workload.windows:
            rule = _windowed(workload, q.device)
        mask = BlockMask.from_kv_blocks(
            *index_lists(partial),
            *index_lists(full),
            BLOCK_SIZE=(workload.q_block, workload.k_block),
            mask_mod=rule,
            seq_lengths=(workload.seqlen, workload.seqlen),
        )
        tiles = {"BLOCK_M": _tile(workload.q_block), "BLOCK_N": _tile(workload.k_block)}
        options = None if min(tiles.values()) == 128 else tiles  # None: tiles that PyTorch chose for the GPU
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = workload.heads != workload.heads_k

        def attend() -> Tensor:
            return _compiled(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=options).transpose(1, 2)

        attend()
        return attend


RIVALS = (Flex(),)
