"""The CPU backend: the ops in plain torch. It computes from the mask alone and knows no work list."""

import torch
from torch import Tensor

from hbsattn._cpu.attend import MaskTensors, attend, differentiate
from hbsattn._cpu.pack import pack_csr, pack_dense, pack_indices
from hbsattn._layout import ITEM_INTS, ceil_div, choose_query_tile_rows, count_packed_heads

torch.library.impl("hbsattn::pack_dense", "CPU", pack_dense)
torch.library.impl("hbsattn::pack_indices", "CPU", pack_indices)
torch.library.impl("hbsattn::pack_csr", "CPU", pack_csr)


def _check_heads(mask_heads: int, heads_q: int, heads_k: int, head_dim: int) -> None:
    """Refuses what validate_plan in csrc/core/validate.cpp refuses, in the same words; no op offers it alone."""
    for name, value, limit in (
        ("heads_q", heads_q, 1 << 31),
        ("heads_k", heads_k, 1 << 31),
        ("head_dim", head_dim, 257),
    ):
        if not 1 <= value < limit:
            raise ValueError(f"{name} is {value}; expected at least 1 and less than {limit}")
    if heads_q % heads_k != 0:
        raise ValueError(f"heads_q is {heads_q}; expected a multiple of heads_k, {heads_k}")
    if mask_heads not in (1, heads_k, heads_q):
        raise ValueError(
            f"the mask's number of heads is {mask_heads}; expected 1, heads_k = {heads_k} or heads_q = {heads_q}"
        )


@torch.library.impl("hbsattn::plan_items", "CPU")
def plan_items(
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
    """A list of the length that the op promises; nobody reads it."""
    mask_heads, rows, _ = bits.shape
    _check_heads(mask_heads, heads_q, heads_k, head_dim)
    packed_heads = count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    block_rows = q_block_size * packed_heads
    tiles = ceil_div(block_rows, choose_query_tile_rows(block_rows, head_dim, k_block_size, for_backward))
    return torch.zeros(heads_q // packed_heads * rows * tiles, ITEM_INTS, dtype=torch.int32)


@torch.library.impl("hbsattn::forward", "CPU")
def forward(
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
    torch.ops.hbsattn.check_forward(
        q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal, pack_heads, softmax_scale
    )
    mask = MaskTensors(bits, sequences, cols, q_block_size, k_block_size, causal)
    return *attend(q, k, v, mask, softmax_scale), torch.empty(0, dtype=torch.int64)


@torch.library.impl("hbsattn::backward", "CPU")
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor,
    columns: Tensor,
    key_items: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    pack_heads: bool,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.ops.hbsattn.check_forward(
        q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal, pack_heads, softmax_scale
    )
    mask = MaskTensors(bits, sequences, cols, q_block_size, k_block_size, causal)
    return differentiate(grad_out, grad_lse, q, k, v, out, lse, mask, softmax_scale)
