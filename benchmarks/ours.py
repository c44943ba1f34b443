"""hbsattn as the benchmark runs it: the mask, the call, and the parts of the way there on their own."""

from __future__ import annotations

import torch
from torch import Tensor

import hbsattn
import masks
from workloads import Workload

QUERY_ROW_BYTES = 8  # of scratch memory that a backward may use for each query row and head, beside grad_q in float32
SCRATCH_ALLOWANCE = 16 << 20  # bytes, beside that


class Ours:
    """One workload, ready to launch. Raises ValueError or TypeError if hbsattn does not support it."""

    def __init__(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> None:
        self._workload = workload
        self._qkv = (q, k, v)
        self._block_mask = block_mask
        self._lists = masks.block_lists(block_mask) if workload.listed else None
        self.mask = self.pack()
        self.items = self.plan()
        self.attend()

    def pack(self) -> hbsattn.BlockMask:
        """From booleans, or lists of blocks, to bits."""
        work = self._workload
        lengths = {"seqlen_q": work.seqlen, "seqlen_k": work.seqlen}
        build, mask = hbsattn.BlockMask.from_dense, (self._block_mask,)
        if self._lists:
            build, mask = hbsattn.BlockMask.from_indices, self._lists
        return build(*mask, work.q_block, work.k_block, causal=work.causal, **lengths)

    def plan(self) -> Tensor:
        """From bits to the work list, which the mask keeps after its first call."""
        mask = self.mask
        return torch.ops.hbsattn.plan_items(mask.bits, mask.sequences, self._layout(), self._call())

    def plan_columns(self) -> Tensor:
        """From bits to what a backward needs, which the mask keeps after its first call with gradients."""
        work, mask = self._workload, self.mask
        shape = (self._layout(), self._call(), work.seqlen, False, work.deterministic, (True, True, True))
        return torch.ops.hbsattn.plan_backward(mask.bits, mask.sequences, *shape)

    def _layout(self) -> tuple[int, int, int, int]:
        mask = self.mask
        return mask.cols, mask.q_block_size, mask.k_block_size, int(mask.causal)

    def _call(self) -> tuple[int, int, int, int, bool]:
        work = self._workload
        return work.heads, work.heads_k, work.head_dim, work.dtype.itemsize, True

    def attend(self) -> Tensor:
        choices = {"deterministic": True} if self._workload.deterministic else {}
        return hbsattn.block_sparse_attention(*self._qkv, self.mask, **choices)

    def attend_with_lse(self) -> tuple[Tensor, Tensor]:
        return hbsattn.block_sparse_attention(*self._qkv, self.mask, return_lse=True)

    def end_to_end(self) -> Tensor:
        """From booleans or lists to the result, with nothing kept from earlier calls."""
        return hbsattn.block_sparse_attention(*self._qkv, self.pack())

    def flops(self) -> int:
        """What the mask's own count makes of the task."""
        work = self._workload
        return self.mask.flops(work.head_dim, work.heads) // masks.FLOPS["forward"] * masks.FLOPS[work.task]

    def scratch_allowed(self) -> int:
        """Bytes that a backward may allocate beside its gradients."""
        q = self._qkv[0]
        return 4 * q.numel() + QUERY_ROW_BYTES * (q.numel() // q.shape[-1]) + SCRATCH_ALLOWANCE

    def clocks(self) -> Tensor:
        """The attention kernel alone: int64 (thread blocks, 2), the SM's clock at the begin and the end of each."""
        mask = self.mask
        call = (*self._qkv, mask.bits, mask.sequences, self._layout(), True, self._workload.head_dim**-0.5)
        return torch.ops.hbsattn.profile_forward(*call, self.items)[2]
