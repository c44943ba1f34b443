"""Helpers beside the attention call."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hbsattn._checks import BLOCK_LIMIT, check_index, check_is_tensor, check_tensor
from hbsattn._ops import kernel_family, limit_shared_memory, set_kernel_family, shared_memory_limit
from hbsattn._placement import CU_SEQLENS


def calculate_blocks(cu_seqlens: Tensor, block_size: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Tells where the blocks of packed sequences lie. Waits for the device; `HBSAttention` does not need it.

    Args:
        cu_seqlens: int32 (batch + 1).
        block_size: at least 1.

    Returns:
        num_block: blocks of all sequences.
        cu_block: int32 (num_block + 1), the first row of each block in the packed tensor, then the end.
        block_to_batch: int32 (num_block), the sequence of each block.
        cu_num_block: int32 (batch + 1), blocks of all sequences before each one.
    """
    check_is_tensor("cu_seqlens", cu_seqlens, CU_SEQLENS)
    check_tensor("cu_seqlens", cu_seqlens, (1,), (torch.int32,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens has shape (0,); expected {CU_SEQLENS}")
    block_size = check_index("block_size", block_size, 1, BLOCK_LIMIT)
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - begins + block_size - 1) // block_size
    cu_num_block = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    num_block = int(cu_num_block[-1])
    batch = torch.arange(counts.shape[0], dtype=torch.int32, device=cu_seqlens.device)
    block_to_batch = torch.repeat_interleave(batch, counts, output_size=num_block)
    block = torch.arange(num_block, dtype=torch.int32, device=cu_seqlens.device) - cu_num_block[block_to_batch]
    cu_block = torch.cat([begins[block_to_batch] + block * block_size, cu_seqlens[-1:]]).to(torch.int32)
    return num_block, cu_block, block_to_batch, cu_num_block


@contextlib.contextmanager
def use_kernels(name: str, *, shared_kilobytes: int | None = None) -> Iterator[None]:
    """Chooses the kernels of all calls inside, of the whole process; to compare them, and to look for faults.

    No other thread may call hbsattn meanwhile. Gradients have to be computed under the choice of their forward, and
    what torch.compile made inside has to run inside. The CPU backend has no kernels to choose from.

    Args:
        name: "auto", on each device the kernels that suit it; or as the names of kernels in `build_info()` begin.
        shared_kilobytes: as if the device had no more shared memory for a CTA, and 1 KB beside for all of a
            multiprocessor: calls whose kernels need more are refused by a ValueError. 99, as GPUs of compute capability
            8.6, 8.9 and 12.0 have, to what the device has; 0: all of it. None: as outside.

    Raises:
        ValueError, TypeError: if there are no such kernels, or if the current device or this build cannot run them;
            if devices have less shared memory, or not as much.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; expected a str")
    if shared_kilobytes is not None:
        shared_kilobytes = check_index("shared_kilobytes", shared_kilobytes, 0, BLOCK_LIMIT)
    before, limit_before = kernel_family(), shared_memory_limit()
    try:
        set_kernel_family(name)
        if shared_kilobytes is not None:
            limit_shared_memory(shared_kilobytes)
        yield
    finally:
        try:
            limit_shared_memory(limit_before)
        finally:
            set_kernel_family(before)
