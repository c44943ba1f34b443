"""What a mask tells of itself: which blocks and pairs are on, and how many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbsattn._checks import check_index
from hbsattn._layout import COL_BEGIN, K_BEGIN, K_LEN, Q_BEGIN, Q_LEN, MaskLayout, ceil_div, count_blocks, locate_rows
from hbsattn._partial import count_attending, look_at

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

NUMBERS_OF_PAIR = 64  # that its place may take, in pairs


def to_dense(mask: BlockMask) -> Tensor:
    """What `BlockMask.to_dense` documents."""
    blocks_on = torch.stack(list(mask._heads()))
    if not mask.packed:
        blocks = ceil_div(mask.seqlen_q, mask.q_block_size)
        return blocks_on.view(mask.heads, mask.batch, blocks, mask.cols).transpose(0, 1)
    sequence, _, used = locate_rows(mask.sequences, mask.rows, mask.q_block_size)
    key_blocks = count_blocks(mask.sequences, K_LEN, mask.k_block_size)
    dense = blocks_on.new_zeros(mask.heads, int(used.sum()), int(key_blocks.sum()))
    column = torch.arange(mask.cols, device=mask.device)
    row, col = (column < key_blocks[sequence[used]].unsqueeze(-1)).nonzero(as_tuple=True)
    begin = mask.sequences[:, COL_BEGIN].to(torch.int64)[sequence[used]]
    dense[:, row, begin[row] + col] = blocks_on[:, used][:, row, col]
    return dense


def to_elements(mask: BlockMask) -> Tensor:
    """What `BlockMask.to_elements` documents."""
    table = mask.sequences.to(torch.int64)
    if mask.packed:
        shape = (mask.heads, *(int(table[:, column].sum()) for column in (Q_LEN, K_LEN)))
    else:
        shape = (mask.batch, mask.heads, mask.seqlen_q, mask.seqlen_k)
    elements = torch.zeros(shape, dtype=torch.bool, device=mask.device)
    tables = (mask.bits, mask.sequences, MaskLayout(*mask._layout), mask._rules, mask._partial_blocks)
    for grid, found, seen, counts in look_at(*tables, numbers_of_pair=NUMBERS_OF_PAIR):
        block, query, key = (seen & counts).nonzero(as_tuple=True)
        head, row, col = (x[block] for x in found)
        sequence = grid.sequence[row]
        query, key = query + grid.block[row] * mask._q_block, key + col * mask._k_block
        if mask.packed:
            elements[head, table[sequence, Q_BEGIN] + query, table[sequence, K_BEGIN] + key] = True
        else:
            elements[sequence, head, query, key] = True
    return elements


def count_flops(mask: BlockMask, head_dim: int, num_heads: int, value_dim: int | None) -> int:
    """What `BlockMask.flops` documents."""
    head_dim, num_heads = check_index("head_dim", head_dim), check_index("num_heads", num_heads)
    value_dim = head_dim if value_dim is None else check_index("value_dim", value_dim)
    if num_heads % max(mask.heads, 1) != 0:
        raise ValueError(f"num_heads is {num_heads}; expected a multiple of the {mask.heads} heads of the mask")
    layout = MaskLayout(*mask._layout)
    pairs = count_attending(mask.bits, mask.sequences, layout, mask._rules, mask._partial_blocks)
    return 2 * (head_dim + value_dim) * pairs * (num_heads // max(mask.heads, 1))


def describe(mask: BlockMask) -> str:
    """Its repr."""
    if mask.packed:
        form, name, blocks = "packed", "max_seqlen", f"rows={mask.rows}, cols={mask.cols}"
    else:
        form, name = "batched", "seqlen"
        blocks = f"{ceil_div(mask.seqlen_q, mask.q_block_size)} x {mask.cols} in each sequence"
    sides = (("q", mask.seqlen_q), ("k", mask.seqlen_k))
    lengths = "".join(f"{name}_{side}={length}, " for side, length in sides if length is not None)
    # On another device the density would make whoever prints a mask wait; of lists it would take all bits.
    known = type(mask._bits) is Tensor and mask.device.type == "cpu"
    density = f", density={mask.density:.3g}" if known else ""
    windows = "" if mask._rules is None else ", windows=True"
    partial = "" if mask._partial is None else ", partial=True"
    return (
        f"BlockMask({form}, batch={mask.batch}, {lengths}heads={mask.heads}, blocks of {mask.q_block_size} x "
        f"{mask.k_block_size}, {blocks}, causal={mask.causal}{windows}{partial}{density}, device='{mask.device}')"
    )
