"""hbsattn as the benchmark runs it: the mask, the call, and the parts of the way there on their own."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import hbsattn
import masks
from workloads import Workload, make_dropout_seed, make_head_sinks

QUERY_ROW_BYTES = 8  # of scratch memory that a backward may use for each query row and head, beside grad_q in float32
SCRATCH_ALLOWANCE = 16 << 20  # bytes, beside that
# Which gradients are summed in float32, as block_sparse_attention documents it: with key blocks of so many rows grad_q,
# with smaller ones in most shapes grad_k and grad_v, and where as many query heads read a key head, all three.
KEY_BLOCKS_BY_KEYS = 64
GROUPS_WITH_ALL_SUMS = 4


class Ours:
    """One workload, ready to launch. Raises ValueError or TypeError if hbsattn does not support it."""

    def __init__(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> None:
        self._workload = workload
        self._qkv = (q, k, v)
        self._block_mask = block_mask
        self._lists = masks.block_lists(block_mask) if workload.listed else None
        self._lengths = length_keywords(workload, q.device)
        self._rules = make_rules(workload, q.device) if workload.windows else None
        self._sinks = make_head_sinks(workload, q.device)
        self._dropout_seed = make_dropout_seed(workload, q.device)
        if self._sinks is not None and workload.task != "forward":
            self._sinks.requires_grad_()  # whose gradient comes with the others
        self.mask = self.pack()
        self.items = self.plan()
        self.attend()

    def pack(self) -> hbsattn.BlockMask:
        """From booleans, or lists of blocks, to bits, and those within windows."""
        work = self._workload
        build, mask = hbsattn.BlockMask.from_dense, (self._block_mask[0] if work.lengths else self._block_mask,)
        if self._lists:
            build, mask = hbsattn.BlockMask.from_indices, self._lists
        mask = build(*mask, work.q_block, work.k_block, causal=work.causal, **self._lengths)
        return mask.windowed(*self._rules.T[:3]) if work.windows else mask

    def plan(self) -> Tensor:
        """From bits to the work list, which the mask keeps after its first call."""
        work, mask = self._workload, self.mask
        shape = (self._layout(), self._call(), work.altered)
        return torch.ops.hbsattn.plan_items(mask.bits, mask.sequences, self._rules, *shape)

    def plan_columns(self) -> Tensor:
        """From bits to what a backward needs, which the mask keeps after its first call with gradients."""
        work, mask = self._workload, self.mask
        needs = tuple(name not in work.frozen for name in "qkv")
        shape = (self._layout(), self._call(), work.seqlen, mask.packed, work.deterministic, needs, work.altered)
        return torch.ops.hbsattn.plan_backward(mask.bits, mask.sequences, self._rules, *shape)

    def _layout(self) -> tuple[int, int, int, int, int]:
        mask = self.mask
        return mask.cols, mask.q_block_size, mask.k_block_size, int(mask.causal), 0

    def _call(self) -> tuple[int, int, int, int, bool]:
        work = self._workload
        return work.heads, work.heads_k, max(work.head_dim, work.columns_of_v), work.dtype.itemsize, True

    def attend(self) -> Tensor:
        return self._batched(hbsattn.block_sparse_attention(*self._inputs(), self.mask, **self._choices()))

    def _choices(self) -> dict[str, object]:
        work = self._workload
        choices: dict[str, object] = {"deterministic": True} if work.deterministic else {}
        choices |= {"sinks": self._sinks} if work.head_sinks else {}
        choices |= {"softcap": work.softcap} if work.softcap else {}
        return choices | ({"dropout_p": work.dropout, "dropout_seed": self._dropout_seed} if work.dropout else {})

    def attend_with_lse(self) -> tuple[Tensor, Tensor]:
        out, lse = hbsattn.block_sparse_attention(*self._inputs(), self.mask, return_lse=True, **self._choices())
        return self._batched(out), self._batched(lse)

    def end_to_end(self) -> Tensor:
        """From booleans or lists to the result, with nothing kept from earlier calls."""
        return self._batched(hbsattn.block_sparse_attention(*self._inputs(), self.pack(), **self._choices()))

    def _inputs(self) -> tuple[Tensor, ...]:
        """q, k and v as hbsattn takes them. Packed ones are views, so that the way there costs the GPU nothing."""
        return tuple(x.squeeze(0) for x in self._qkv) if self._workload.lengths else self._qkv

    def _batched(self, result: Tensor) -> Tensor:
        """With a dimension for the batch, as q has one."""
        return result.unsqueeze(0) if self._workload.lengths else result

    def flops(self) -> int:
        """What the mask's own count makes of the task."""
        work = self._workload
        return self.mask.flops(1, work.heads) // 4 * masks.flops_of_pair(work)

    def scratch_allowed(self) -> int:
        """Bytes that a backward may allocate beside its gradients: sums in float32, and two numbers a query row."""
        work, (q, k, _) = self._workload, self._qkv
        of_queries, of_keys = 4 * q.numel(), 8 * k.numel()
        if work.heads // work.heads_k >= GROUPS_WITH_ALL_SUMS:
            sums = of_queries + of_keys
        else:
            sums = max(of_queries, of_keys) if work.k_block < KEY_BLOCKS_BY_KEYS else of_queries
        return sums + QUERY_ROW_BYTES * (q.numel() // q.shape[-1]) + SCRATCH_ALLOWANCE

    def clocks(self) -> Tensor:
        """The attention kernel alone: int64 (thread blocks, 2), the SM's clock at the begin and the end of each."""
        mask = self.mask
        tables = (mask.bits, mask.sequences, self._rules, None, None, None)  # no partial blocks
        work = self._workload
        numbers = (self._layout(), True, work.head_dim**-0.5, work.dropout, work.softcap, False)
        call = (*self._inputs(), *tables, self._sinks, self._dropout_seed, *numbers)
        return torch.ops.hbsattn.profile_forward(*call, self.items)[2]


def make_rules(workload: Workload, device: torch.device) -> Tensor:
    """The windows of mask heads as ops take them: int32 (mask heads, 4) of left, right, sink and 0."""
    return torch.tensor([(*window, 0) for window in workload.head_windows], dtype=torch.int32, device=device)


def length_keywords(workload: Workload, device: torch.device) -> dict[str, object]:
    """The keywords that tell a mask where its sequences lie."""
    if not workload.lengths:
        return {"seqlen_q": workload.seqlen, "seqlen_k": workload.seqlen}
    cu_seqlens = torch.tensor([0, *itertools.accumulate(workload.lengths)], dtype=torch.int32, device=device)
    longest = {"max_seqlen_k": max(workload.lengths)} if workload.bounded else {}
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, **longest}
