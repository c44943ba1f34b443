"""Loads the compiled extension, which declares the ops, and adds what PyTorch needs beside their kernels.

The schemas and the CUDA kernels are in csrc/torch/ops.cpp, the CPU kernels in _cpu.py. Here are the fake kernels, which
tell shapes while a program is traced, and the autograd rules.
"""

from typing import Any

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
from hbsattn._layout import (
    ITEM_INTS,
    backward_by_queries,
    backward_has_own_tiles,
    ceil_div,
    choose_query_tile_rows,
    count_key_items,
    count_packed_heads,
    count_tile_heads,
)
from hbsattn._plans import plans_beside

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
    for_backward: bool = False,
) -> Tensor:
    mask_heads, rows, _ = bits.shape
    packed_heads = count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    block_rows = q_block_size * packed_heads
    tiles = ceil_div(block_rows, choose_query_tile_rows(block_rows, head_dim, k_block_size, for_backward))
    return bits.new_empty((heads_q // packed_heads * rows * tiles, ITEM_INTS))


@torch.library.register_fake("hbsattn::transpose_bits")
def _(bits: Tensor, cols: int) -> Tensor:
    heads, rows, _ = bits.shape
    return bits.new_empty((heads, cols, ceil_div(rows, 32)))


@torch.library.register_fake("hbsattn::plan_keys")
def _(
    columns: Tensor,
    sequences: Tensor,
    rows: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    element_size: int,
    deterministic: bool,
) -> Tensor:
    batch, cols = sequences.shape[0], columns.shape[1]
    heads = (heads_q, heads_k, head_dim)
    tile_heads = count_tile_heads(batch, rows, q_block_size, *heads, element_size, causal, deterministic)
    count = count_key_items(batch, cols, k_block_size, heads_q // tile_heads, head_dim)
    return columns.new_empty((count, ITEM_INTS))


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
    deterministic: bool = False,
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


@torch.library.register_fake("hbsattn::backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


FORWARD_TENSORS, FORWARD_NUMBERS = 6, 8  # inputs of the op `forward`: q, k, v, bits, sequences, items; and the others


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:FORWARD_TENSORS], *output[:2])
    ctx.numbers = inputs[FORWARD_TENSORS:-1]  # all but `profile`
    ctx.set_materialize_grads(False)  # log-sum-exps are seldom used: no zeros for their gradients


def _plan_backward(
    q: Tensor,
    k: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    pack_heads: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the work lists of the backward pass, of queries and of keys, and the columns of the mask between them.

    Calls that share `items` share them. What a call does not need is empty, or the forward's.
    """
    columns, key_items = bits.new_empty((0, 0, 0)), bits.new_empty((0, ITEM_INTS))
    if q.device.type == "cpu":
        return items, columns, key_items  # the CPU kernel needs none
    blocks = (q_block_size, k_block_size)
    heads = (q.shape[-2], k.shape[-2], q.shape[-1])
    plans = plans_beside(items)
    shape = (bits.shape[0], *blocks, *heads, pack_heads)
    by_queries = backward_by_queries(*shape, deterministic)
    if by_queries or (deterministic and backward_has_own_tiles(*shape)):
        sizes = (cols, *blocks, causal, *heads, q.element_size(), pack_heads, True)
        (items,) = plans.find_or_make("queries", lambda: (ops.plan_items.default(bits, sequences, *sizes),))
    if by_queries:
        return items, columns, key_items
    sizes = (*blocks, causal, *heads, q.element_size(), deterministic)
    (columns,) = plans.find_or_make("columns", lambda: (ops.transpose_bits.default(bits, cols),))
    (key_items,) = plans.find_or_make(
        ("keys", deterministic), lambda: (ops.plan_keys.default(columns, sequences, bits.shape[1], *sizes),)
    )
    return items, columns, key_items


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, bits, sequences, items, out, lse = ctx.saved_tensors
    *sizes, _scale, deterministic = ctx.numbers
    items, columns, key_items = _plan_backward(q, k, bits, sequences, items, *sizes, deterministic)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = ops.backward.default(
        grad_out, grad_lse, q, k, v, out, lse, bits, sequences, items, columns, key_items, *ctx.numbers
    )
    return *grads, *[None] * (FORWARD_TENSORS - 3 + FORWARD_NUMBERS)


def _double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "block_sparse_attention has no second derivative: call backward without create_graph=True"
    )


torch.library.register_autograd("hbsattn::forward", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("hbsattn::backward", _double_backward)
