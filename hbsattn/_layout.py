"""The layout of a packed mask, in torch ops for any device, and the numbers that ops are given.

``bits`` is int32 (heads, rows, words): bit ``c % 32`` of word ``c // 32`` tells whether the query block of this row
attends to key block ``c`` of its own sequence. ``sequences`` is int32 (batch, 7) with the columns below.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of the table of sequences.
Q_BEGIN, Q_LEN, K_BEGIN, K_LEN, ROW_BEGIN, COL_BEGIN, DIAGONAL = range(7)
SEQUENCE_INTS = 7
ITEM_INTS = 16  # of a work item: the WorkItem, or KeyItem, of csrc/include/hbsattn/params.h
RECORD_ROWS = 64  # queries, or keys, that a record of a work list stands for at least, where a block has as many
PART_RECORDS = 512  # records of a work list of keys beside those of its tiles, at most


class MaskLayout(NamedTuple):
    """`layout` of the ops: what a mask is beside its bits and its table of sequences."""

    cols: int
    q_block_size: int
    k_block_size: int
    causal: int  # 0 or 1


class CallShape(NamedTuple):
    """`heads` of the ops that plan: what a call has beside its mask."""

    heads_q: int
    heads_k: int
    head_dim: int
    element_size: int  # bytes
    pack_heads: bool  # query heads that share a mask and a key head may share tiles


class Call(NamedTuple):
    """What each op of an attention call takes first: CallArguments of csrc/torch/arguments.h."""

    q: Tensor
    k: Tensor
    v: Tensor
    bits: Tensor
    sequences: Tensor
    layout: Sequence[int]  # a MaskLayout
    pack_heads: bool
    softmax_scale: float


def takes_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in the form of an op: it takes a Call, and then what is the op's own."""
    size = len(Call._fields)

    @functools.wraps(function)
    def op(*arguments: Any, **named: Any) -> Any:
        return function(Call(*arguments[:size]), *arguments[size:], **named)

    return op


def ceil_div(a: int, b: int) -> int:
    """The number of blocks of ``b`` in ``a``."""
    return -(-a // b)


def _heads_of_record(mask_heads: int, layout: MaskLayout, call: CallShape) -> int:
    """Query heads that one record of a work list stands for, at least."""
    group = call.heads_q // call.heads_k
    if not call.pack_heads or (mask_heads == call.heads_q and group > 1):
        return 1
    if layout.q_block_size % 16 == 0:
        return group
    fits = (n for n in range(1, group + 1) if group % n == 0 and n * layout.q_block_size <= RECORD_ROWS)
    return max(fits, default=1)


def count_items(bits_shape: torch.Size, layout: MaskLayout, call: CallShape) -> int:
    """Records that a work list of queries has room for: no plan has more, whatever its tiles are.

    max_items in csrc/plan/lists.h is the same bound.
    """
    mask_heads, rows, _ = bits_shape
    heads = _heads_of_record(mask_heads, layout, call)
    return call.heads_q // heads * rows * ceil_div(heads * layout.q_block_size, RECORD_ROWS)


def count_key_items(batch: int, layout: MaskLayout, call: CallShape, rows_k: int, packed: bool) -> int:
    """The same for a work list of keys: max_key_items in csrc/plan/lists.h."""
    size = layout.k_block_size
    united = RECORD_ROWS // size if size % 16 == 0 and size < RECORD_ROWS else 1
    tiles = ceil_div(size, RECORD_ROWS)
    if packed:
        tiles = ((ceil_div(rows_k, size) + batch) // united + batch) * tiles
    else:
        tiles = batch * ceil_div(layout.cols, united) * tiles
    return call.heads_q * tiles + PART_RECORDS


def count_backward_plan(
    bits_shape: torch.Size, batch: int, layout: MaskLayout, call: CallShape, rows_k: int, packed: bool
) -> int:
    """Ints of what plan_backward makes: the columns of the mask, then both work lists (csrc/torch/plan_parts.h)."""
    mask_heads, rows, _ = bits_shape
    columns = ceil_div(mask_heads * layout.cols * ceil_div(rows, 32), ITEM_INTS) * ITEM_INTS
    records = count_key_items(batch, layout, call, rows_k, packed) + count_items(bits_shape, layout, call)
    return columns + ITEM_INTS * records


def mask_of_head(head: Tensor, mask_heads: int, heads_q: int) -> Tensor:
    """The mask head of each query head, as csrc/plan/mask_heads.h has it."""
    return head // (heads_q // mask_heads)


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
    with torch.inference_mode(False):  # a mask that is built in inference mode may train later
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


def last_keys(query: Tensor, diagonal: Tensor, end: Tensor, causal: bool) -> Tensor:
    """The last of the first `end` keys that each query may attend to, int64; negative: none.

    The element rule of the CPU backend and of counts: csrc/plan/rule.h is the same.
    """
    return torch.minimum(query + diagonal, end - 1) if causal else (end - 1).expand(query.shape)


def visible_columns(sequences: Tensor, rows: int, layout: MaskLayout) -> Tensor:
    """Counts the key blocks that each row of the bit matrix can see: int64 (rows); they are the first ones."""
    return visible_from(sequences, *locate_rows(sequences, rows, layout.q_block_size), layout)


def visible_from(sequences: Tensor, sequence: Tensor, block: Tensor, used: Tensor, layout: MaskLayout) -> Tensor:
    """The same for rows that `locate_rows` has located."""
    if sequences.shape[0] == 0:
        return torch.zeros_like(block)
    table = sequences.to(torch.int64)[sequence]
    last_query = torch.minimum((block + 1) * layout.q_block_size, table[:, Q_LEN]) - 1
    limit = last_keys(last_query, table[:, DIAGONAL], table[:, K_LEN], layout.causal)
    columns = (torch.div(limit, layout.k_block_size, rounding_mode="floor") + 1).clamp_(0, layout.cols)
    return torch.where(used, columns, 0)


def _sum_clamped(last: Tensor, width: Tensor) -> Tensor:
    """Sums clamp(x, 0, width) over all integers x up to `last`."""
    last = last.clamp(min=0)
    rising = torch.minimum(last, width)
    return rising * (rising + 1) // 2 + (last - rising) * width


def count_pairs(bits: Tensor, sequences: Tensor, layout: MaskLayout) -> int:
    """Counts the pairs of a query and a key that attend, over all mask heads. Exact, with causality and short blocks.
    Waits for the device. Bits without values, as in a traced program, count as all on.
    """
    heads, rows, _ = bits.shape
    if sequences.shape[0] == 0:
        return 0
    if bits.is_meta or type(bits) is not Tensor:
        return heads * rows * layout.q_block_size * layout.cols * layout.k_block_size
    sequence, block, used = locate_rows(sequences, rows, layout.q_block_size)
    table = sequences.to(torch.int64)[sequence]
    q_len, k_len = table[:, Q_LEN].unsqueeze(-1), table[:, K_LEN].unsqueeze(-1)
    first = (block * layout.q_block_size).unsqueeze(-1)
    last = torch.minimum(first + layout.q_block_size, q_len)
    key = torch.arange(layout.cols, device=bits.device) * layout.k_block_size
    width = (k_len - key).clamp(0, layout.k_block_size)
    if layout.causal:
        # How many of the block's keys a query sees, before they are cut to [0, width], is one more for the next query.
        diagonal = table[:, DIAGONAL].unsqueeze(-1)
        seen_before, seen_by_last = (query + diagonal - key for query in (first, last))
        pairs = _sum_clamped(seen_by_last, width) - _sum_clamped(seen_before, width)
    else:
        pairs = (last - first) * width
    pairs = torch.where(used.unsqueeze(-1), pairs, 0)
    # One head after another: the booleans of all at once would be eight times the bits.
    return sum(int(pairs[unpack_bits(head, layout.cols)].sum()) for head in bits)
