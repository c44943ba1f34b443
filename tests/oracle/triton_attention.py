"""Block-sparse flash attention in Triton: the second oracle, for lengths at which a dense score matrix does not fit.

Runs on CUDA, and on the CPU when TRITON_INTERPRET=1 is set before this module is imported. It walks lists of active
blocks, where the product walks bits, and imports nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 6  # of the table of tiles, see `_tile_table`


# One compilation serves many shapes: sizes and strides are not specialized, and tiles are few.
_SIZES = [
    "total_q",
    "rows",
    "width",
    "mask_group",
    "key_group",
    "head_dim",
    "k_block_size",
    "q_row_stride",
    "q_head_stride",
    "k_row_stride",
    "k_head_stride",
    "v_row_stride",
    "v_head_stride",
    "out_row_stride",
    "out_head_stride",
]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    tiles,  # int64 (tiles, 6)
    counts,  # int32 (mask heads, rows)
    indices,  # int32 (mask heads, rows, width)
    scale,
    total_q,
    rows,
    width,
    mask_group,
    key_group,
    head_dim,
    k_block_size,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    out_head_stride,
    CAUSAL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * 6
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(tile)
    first = tl.load(tile + 1)  # first and last + 1 query of the tile, counted in the packed tensor
    last = tl.load(tile + 2)
    k_begin = tl.load(tile + 3)
    k_len = tl.load(tile + 4)
    diagonal = tl.load(tile + 5)  # the last key that the first query may see, if causal

    m_index = tl.arange(0, TILE_M)
    d_index = tl.arange(0, TILE_D)
    query = first + m_index
    in_rows = query < last
    in_dims = d_index < head_dim
    q_tile = tl.load(
        q + query[:, None] * q_row_stride + head * q_head_stride + d_index[None, :],
        mask=in_rows[:, None] & in_dims[None, :],
        other=0.0,
    )

    k_base = k + k_begin * k_row_stride + (head // key_group) * k_head_stride
    v_base = v + k_begin * v_row_stride + (head // key_group) * v_head_stride
    list_index = (head // mask_group) * rows + row
    row_max = tl.full((TILE_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((TILE_M,), tl.float32)
    acc = tl.zeros((TILE_M, TILE_D), tl.float32)
    # While loops: the interpreter cannot make a range of a number that is not a constant.
    i = 0
    count = tl.load(counts + list_index)
    while i < count:
        block = tl.load(indices + list_index * width + i).to(tl.int64)
        offset = 0
        while offset < k_block_size:
            in_block = offset + tl.arange(0, TILE_N)
            key = block * k_block_size + in_block
            valid = (in_block < k_block_size) & (key < k_len)
            load_mask = valid[:, None] & in_dims[None, :]
            k_tile = tl.load(k_base + key[:, None] * k_row_stride + d_index[None, :], mask=load_mask, other=0.0)
            v_tile = tl.load(v_base + key[:, None] * v_row_stride + d_index[None, :], mask=load_mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            allowed = valid[None, :] & in_rows[:, None]
            if CAUSAL:
                allowed = allowed & (key[None, :] <= diagonal + m_index[:, None])
            scores = tl.where(allowed, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # A row without any key so far has no maximum to subtract.
            subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale = tl.exp(row_max - subtract)
            weights = tl.exp(scores - subtract[:, None])
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
            row_max = new_max
            offset += TILE_N
        i += 1

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    row_lse = tl.where(empty, float("-inf"), row_max + tl.log(tl.where(empty, 1.0, row_sum)))
    tl.store(
        out + query[:, None] * out_row_stride + head * out_head_stride + d_index[None, :],
        acc.to(out.dtype.element_ty),
        mask=in_rows[:, None] & in_dims[None, :],
    )
    tl.store(lse + head * total_q + query, row_lse, mask=in_rows)


def _tile_table(lens_q: Sequence[int], lens_k: Sequence[int], q_block_size: int, tile_m: int) -> list[list[int]]:
    """One record per tile: row of the lists, first query, last query + 1, first key, keys, diagonal."""
    table: list[list[int]] = []
    q_begin = k_begin = row = 0
    for len_q, len_k in zip(lens_q, lens_k, strict=True):
        for block_begin in range(0, len_q, q_block_size):
            block_end = min(block_begin + q_block_size, len_q)
            for first in range(block_begin, block_end, tile_m):
                last = min(first + tile_m, block_end)
                table.append([row, q_begin + first, q_begin + last, k_begin, len_k, first + len_k - len_q])
            row += 1
        q_begin += len_q
        k_begin += len_k
    return table


def block_lists(
    block_masks: Sequence[Tensor],
    lens_q: Sequence[int],
    lens_k: Sequence[int],
    q_block_size: int,
    k_block_size: int,
) -> tuple[Tensor, Tensor]:
    """Active blocks of each query block: counts (heads, rows) and indices (heads, rows, width), both int32."""
    counts, lists = [], []
    for mask, len_q, len_k in zip(block_masks, lens_q, lens_k, strict=True):
        active = mask[:, : -(-len_q // q_block_size), : -(-len_k // k_block_size)]
        counts.append(active.sum(dim=2, dtype=torch.int32))
        lists.append(torch.argsort(~active, dim=2, stable=True).to(torch.int32))
    width = max([1, *(part.shape[2] for part in lists)])
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in lists]
    return torch.cat(counts, dim=1).contiguous(), torch.cat(padded, dim=1).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_masks: Sequence[Tensor],
    q_block_size: int,
    k_block_size: int,
    *,
    lens_q: Sequence[int],
    lens_k: Sequence[int],
    causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences; the arguments of `dense.attention`.

    q: (total_q, Hq, D), k, v: (total_k, Hk, D), last dimension contiguous. Returns out, as q, and a float32 lse
    (Hq, total_q). float32 inputs are multiplied in float32.
    """
    total_q, heads_q, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    # Products of float32 without TF32 are unrolled; larger tiles would compile for long.
    largest = 32 if q.dtype == torch.float32 else 64
    tile_m = 16 if q_block_size <= 16 else largest
    tile_n = 16 if k_block_size <= 16 else largest
    table = _tile_table(lens_q, lens_k, q_block_size, tile_m)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((heads_q, total_q), float("-inf"), dtype=torch.float32, device=q.device)
    if not table:
        return out, lse
    counts, indices = block_lists([m.to(q.device) for m in block_masks], lens_q, lens_k, q_block_size, k_block_size)
    tiles = torch.tensor(table, dtype=torch.int64, device=q.device)
    assert tiles.shape[1] == TILE_COLUMNS
    _forward_kernel[(len(table), heads_q)](
        q,
        k,
        v,
        out,
        lse,
        tiles,
        counts,
        indices,
        scale,
        total_q,
        counts.shape[1],
        indices.shape[2],
        heads_q // counts.shape[0],
        heads_q // k.shape[1],
        head_dim,
        k_block_size,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        CAUSAL=causal,
        TILE_M=tile_m,
        TILE_N=tile_n,
        TILE_D=max(64, triton.next_power_of_2(head_dim)),
    )
    return out, lse
