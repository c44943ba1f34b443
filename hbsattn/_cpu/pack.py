"""Block masks in any form, packed into bits."""

import torch
from torch import Tensor

from hbsattn._layout import COL_BEGIN, MaskLayout, locate_rows, pack_bits, reach_of_rows


def _pack(mask: Tensor, sequences: Tensor, layout: tuple[int, ...]) -> Tensor:
    """Trims a bool (heads, rows, cols) mask to what each row can see, and packs it."""
    rows, cols = mask.shape[1:]
    return pack_bits(mask & reach_of_rows(sequences, rows, MaskLayout(*layout)).has(torch.arange(cols)))


def pack_dense(block_mask: Tensor, sequences: Tensor, flat: bool, rows: int, *layout: int) -> Tensor:
    batch, heads, cols = sequences.shape[0], block_mask.shape[0 if flat else 1], MaskLayout(*layout).cols
    torch.ops.hbsattn.check_mask(batch, heads, rows, *layout)
    if flat:
        sequence, _, used = locate_rows(sequences, rows, MaskLayout(*layout).q_block_size)
        begin = sequences[:, COL_BEGIN].to(torch.int64)[sequence[used]]
        column = begin.unsqueeze(-1) + torch.arange(cols)
        inside = (column >= 0) & (column < block_mask.shape[2])
        mask = torch.zeros(heads, rows, cols, dtype=torch.bool)
        if block_mask.shape[2]:
            column = torch.where(inside, column, 0).expand(heads, -1, -1)
            mask[:, used] = block_mask[:, used].gather(2, column) & inside
    else:
        mask = block_mask[..., :cols].expand(batch, -1, -1, -1).transpose(0, 1).reshape(heads, rows, cols)
    return _pack(mask, sequences, layout)


def pack_indices(counts: Tensor, indices: Tensor, sequences: Tensor, flat: bool, rows: int, *layout: int) -> Tensor:
    batch, heads, cols = sequences.shape[0], counts.shape[0 if flat else 1], MaskLayout(*layout).cols
    torch.ops.hbsattn.check_mask(batch, heads, rows, *layout)
    width = indices.shape[-1]
    if not flat:
        counts = counts.expand(batch, -1, -1).transpose(0, 1).reshape(heads, rows)
        indices = indices.expand(batch, -1, -1, -1).transpose(0, 1).reshape(heads, rows, width)
    listed = (torch.arange(width) < counts.unsqueeze(-1)) & (indices >= 0) & (indices < cols)
    mask = torch.zeros(heads, rows, cols + 1, dtype=torch.bool)  # the last column takes what is not listed
    mask.scatter_(2, torch.where(listed, indices, cols).to(torch.int64), True)
    return _pack(mask[..., :cols], sequences, layout)


def pack_csr(indptr: Tensor, indices: Tensor, sequences: Tensor, rows: int, *layout: int) -> Tensor:
    heads, cols = indptr.shape[0], MaskLayout(*layout).cols
    torch.ops.hbsattn.check_mask(sequences.shape[0], heads, rows, *layout)
    bounds = indptr.to(torch.int64).clamp(0, indices.shape[0])
    begin = bounds[:, :-1].flatten()
    lengths = (bounds[:, 1:].flatten() - begin).clamp_(min=0)
    row = torch.repeat_interleave(torch.arange(heads * rows), lengths)
    position = torch.arange(row.shape[0]) + (begin - (lengths.cumsum(0) - lengths))[row]
    column = indices.to(torch.int64)[position]
    listed = (column >= 0) & (column < cols)
    mask = torch.zeros(heads * rows, cols, dtype=torch.bool)
    mask[row[listed], column[listed]] = True
    return _pack(mask.view(heads, rows, cols), sequences, layout)
