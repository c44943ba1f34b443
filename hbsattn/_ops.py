"""Loads the compiled extension, which declares the ops, and adds what PyTorch needs beside their kernels.

The schemas and the CUDA kernels are in csrc/torch/ops.cpp, the CPU kernels in _cpu.py. Here are the fake kernels, which
tell shapes while a program is traced, and the autograd rule.
"""

import torch
from torch import Tensor

try:
    import hbsattn._C as _C
except ImportError as error:
    raise ImportError(
        f"hbsattn._C, the compiled extension, does not load ({error}); build it with the PyTorch you run "
        f"(torch {torch.__version__}), in a checkout of hbsattn: "
        "`pip install --no-build-isolation --config-settings editable_mode=compat -e .`"
    ) from error

from hbsattn import _cpu  # noqa: F401  (registers the CPU kernels)
from hbsattn._layout import ITEM_INTS, ceil_div, choose_tile_rows, count_packed_heads

build_info = _C.build_info
ops = torch.ops.hbsattn


@torch.library.register_fake("hbsattn::make_sequences")
def _(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    q_block_size: int,
    k_block_size: int,
    row_stride: int,
) -> Tensor:
    return torch.empty((batch, 6), dtype=torch.int32, device=device)


def _fake_bits(like: Tensor, heads: int, rows: int, cols: int) -> Tensor:
    return like.new_empty((heads, rows, ceil_div(cols, 32)), dtype=torch.int32)


@torch.library.register_fake("hbsattn::pack_dense")
def _(
    block_mask: Tensor,
    sequences: Tensor,
    flat: bool,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    return _fake_bits(block_mask, block_mask.shape[0 if flat else 1], rows, cols)


@torch.library.register_fake("hbsattn::pack_indices")
def _(
    counts: Tensor,
    indices: Tensor,
    sequences: Tensor,
    flat: bool,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    return _fake_bits(counts, counts.shape[0 if flat else 1], rows, cols)


@torch.library.register_fake("hbsattn::pack_csr")
def _(
    indptr: Tensor,
    indices: Tensor,
    sequences: Tensor,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    return _fake_bits(indptr, indptr.shape[0], rows, cols)


@torch.library.register_fake("hbsattn::plan_items")
def _(
    bits: Tensor,
    sequences: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    element_size: int,
    pack_heads: bool,
) -> Tensor:
    mask_heads, rows, _ = bits.shape
    packed_heads = count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    block_rows = q_block_size * packed_heads
    tiles = ceil_div(block_rows, choose_tile_rows(block_rows, head_dim))
    return bits.new_empty((heads_q // packed_heads * rows * tiles, ITEM_INTS))


@torch.library.register_fake("hbsattn::check_forward")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("hbsattn::check_mask")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("hbsattn::forward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    pack_heads: bool,
    softmax_scale: float,
    profile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    profiled = profile and q.device.type == "cuda"
    cycles_shape = (torch.library.get_ctx().new_dynamic_size(), 2) if profiled else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty((*batch, heads, rows), dtype=lse_dtype),
        q.new_empty(cycles_shape, dtype=torch.int64),
    )


def _backward(ctx: object, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "block_sparse_attention has no backward pass in this version of hbsattn: gradients of q, k and v are not "
        "available; call it under torch.no_grad() or on detached tensors"
    )


torch.library.register_autograd("hbsattn::forward", _backward)
