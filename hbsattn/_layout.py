"""The layout of a packed mask, in torch ops for any device.

``bits`` is int32 (heads, rows, words): bit ``c % 32`` of word ``c // 32`` tells whether the query block of this row
attends to key block ``c`` of its own sequence. ``sequences`` is int32 (batch, 6) with the columns below.
"""

import torch
from torch import Tensor

# Columns of the table of sequences.
Q_BEGIN, Q_LEN, K_BEGIN, K_LEN, ROW_BEGIN, COL_BEGIN = range(6)
SECTION_BYTES = 32 << 20  # of the L2 cache
RUNNING_KEYS, RUNNING_BYTES, TOGETHER_BYTES = 132 * 128, 36 << 20, 5 << 20  # count_tile_heads
PART_BYTES = 10 << 20  # of the workspace of the backward pass, for parts of tiles
ITEM_INTS = 16  # of a work item: the WorkItem, or KeyItem, of csrc/include/hbsattn/params.h


def ceil_div(a: int, b: int) -> int:
    """The number of blocks of ``b`` in ``a``."""
    return -(-a // b)


def count_packed_heads(mask_heads: int, q_block_size: int, heads_q: int, heads_k: int, pack_heads: bool) -> int:
    """Query heads that share tiles: those of a key head, if they have one mask, or as many as fit a small tile.

    The rule, and its reason, are those of csrc/kernels/config.h.
    """
    group = heads_q // heads_k if 0 < heads_k <= heads_q else 1
    if not pack_heads or (mask_heads == heads_q and group > 1):
        return 1
    if q_block_size % 16 == 0:
        return group
    return max(
        heads for heads in range(1, group + 1) if group % heads == 0 and (heads == 1 or heads * q_block_size <= 64)
    )


def choose_tile_rows(rows: int, head_dim: int) -> int:
    """Rows of a tile of the backward pass, for blocks of ``rows`` rows: of keys, or of queries over their packed heads.

    The rule, and its reason, are those of csrc/kernels/config.h.
    """
    return 64 if head_dim <= 128 and 5 * 64 * ceil_div(rows, 64) < 4 * 128 * ceil_div(rows, 128) else 128


def choose_query_tile_rows(rows: int, head_dim: int, k_block_size: int, for_backward: bool) -> int:
    """Query rows of a work item of the forward, or of a list ``for_backward``; ``rows`` as in ``choose_tile_rows``.

    The rule, and its reason, are those of csrc/kernels/config.h.
    """
    of_192, of_128 = 192 * ceil_div(rows, 192), 128 * ceil_div(rows, 128)
    better = of_192 < of_128 or (of_192 == of_128 and head_dim <= 64)
    if not for_backward and head_dim <= 128 and k_block_size % 16 == 0 and better:
        return 192
    return choose_tile_rows(rows, head_dim)


def backward_has_own_tiles(
    mask_heads: int, q_block_size: int, k_block_size: int, heads_q: int, heads_k: int, head_dim: int, pack_heads: bool
) -> bool:
    """Whether tiles of queries in the backward pass have other rows than the forward's, and so a list of their own."""
    rows = q_block_size * count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    forward, backward = (choose_query_tile_rows(rows, head_dim, k_block_size, x) for x in (False, True))
    return forward != backward


def count_tile_heads(
    batch: int,
    rows: int,
    q_block_size: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    element_size: int,
    causal: bool,
    deterministic: bool,
) -> int:
    """Query heads that one tile of the backward pass streams.

    The rule, and its reason, are those of csrc/kernels/config.h.
    """
    group = heads_q // heads_k
    if deterministic or group < 4 or batch == 0:
        return group
    of_row = ceil_div(head_dim, 8) * 8 * (2 * element_size + 4)
    of_head = min(max(rows // batch, 1) * q_block_size, 2**31 - 1) * of_row
    if of_head <= TOGETHER_BYTES // group:
        return group
    fit = RUNNING_BYTES // max(of_head, RUNNING_KEYS * of_row) // (2 if causal else 1)
    return max(heads for heads in range(1, group + 1) if group % heads == 0 and (heads == 1 or heads <= fit))


def backward_by_queries(
    mask_heads: int,
    q_block_size: int,
    k_block_size: int,
    heads_q: int,
    heads_k: int,
    head_dim: int,
    pack_heads: bool,
    deterministic: bool,
) -> bool:
    """Whether tiles of queries, not of keys, compute the gradients.

    The rule, and its reason, are those of csrc/kernels/config.h.
    """
    rows = q_block_size * count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    return not deterministic and head_dim <= 128 and k_block_size < 64 and choose_tile_rows(rows, head_dim) == 128


def count_key_items(batch: int, cols: int, k_block_size: int, head_sets: int, head_dim: int) -> int:
    """Items of the backward pass's work list, for query heads in as many sets as tiles stream one by one.

    The rules, and their reasons, are those of csrc/kernels/config.h.
    """
    tile_keys = choose_tile_rows(k_block_size, head_dim) if head_dim <= 128 else 64
    united = tile_keys // k_block_size if k_block_size % 16 == 0 and k_block_size < tile_keys else 1
    tiles = batch * head_sets * ceil_div(cols, united) * ceil_div(k_block_size, tile_keys)
    return tiles + min(tiles, PART_BYTES // (2 * 4 * tile_keys * ceil_div(head_dim, 64) * 64))


def count_blocks(sequences: Tensor, column: int, block_size: int) -> Tensor:
    """Blocks of each sequence, int64 (batch)."""
    return -(-sequences[:, column].to(torch.int64) // block_size)


def pack_bits(mask: Tensor) -> Tensor:
    """Packs bool (..., cols) into int32 (..., ceil(cols / 32)), lowest bit first."""
    cols = mask.shape[-1]
    words = ceil_div(cols, 32)
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, words * 32 - cols))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (padded.unflatten(-1, (words * 4, 8)) * weights).sum(-1, dtype=torch.uint8)
    bits = torch.empty((*mask.shape[:-1], words), dtype=torch.int32, device=mask.device)
    bits.view(torch.uint8).copy_(octets)
    return bits


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """Unpacks int32 (..., words) into bool (..., cols)."""
    octets = bits.contiguous().view(torch.uint8).unsqueeze(-1)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((octets >> shifts) & 1).flatten(-2)[..., :cols].to(torch.bool)


def locate_rows(sequences: Tensor, rows: int, q_block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tells where each row of the bit matrix lies.

    Returns int64 (rows) the sequence, int64 (rows) the query block in that sequence, and bool (rows) whether the
    sequence has that block; a row without a block is padding.
    """
    row = torch.arange(rows, device=sequences.device)
    if sequences.shape[0] == 0:
        return torch.zeros_like(row), row, torch.zeros_like(row, dtype=torch.bool)
    # Sequences without queries begin where the next one begins, so the last candidate is the one with blocks.
    begin = sequences[:, ROW_BEGIN].to(torch.int64).contiguous()
    sequence = (torch.searchsorted(begin, row, right=True) - 1).clamp_(0, sequences.shape[0] - 1)
    block = row - begin[sequence]
    lengths = sequences[:, Q_LEN].to(torch.int64)[sequence]
    used = (block >= 0) & (block * q_block_size < lengths)
    return sequence, block, used


def visible_columns(
    sequences: Tensor, rows: int, cols: int, q_block_size: int, k_block_size: int, causal: bool
) -> Tensor:
    """Counts the key blocks that each row of the bit matrix can see: int64 (rows); they are the first ones."""
    sequence, block, used = locate_rows(sequences, rows, q_block_size)
    if sequences.shape[0] == 0:
        return torch.zeros_like(block)
    table = sequences.to(torch.int64)[sequence]
    limit = table[:, K_LEN] - 1
    if causal:
        last_row = torch.minimum((block + 1) * q_block_size, table[:, Q_LEN]) - 1
        limit = torch.minimum(limit, last_row + table[:, K_LEN] - table[:, Q_LEN])
    columns = (torch.div(limit, k_block_size, rounding_mode="floor") + 1).clamp_(0, cols)
    return torch.where(used, columns, 0)
