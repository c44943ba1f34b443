"""The layout of a packed mask, in torch ops for any device, and the numbers that ops are given.

``bits`` is int32 (heads, rows, words): bit ``c % 32`` of word ``c // 32`` tells whether the query block of this row
attends to key block ``c`` of its own sequence. ``sequences`` is int32 (batch, 7) with the columns below. ``rules`` is
int32 (heads, 4), the windows of the heads, or None: no head has one.

Of partial blocks, which are on in ``bits``, a matrix says which pairs of a query and a key count. ``partial`` is int32
(heads, rows, words, 2): bit ``c % 32`` of the first number tells whether block ``c`` is partial, if it is on, and the
second is the place in ``matrices`` of the first partial block of this word; those of a word follow in the order of
columns. ``matrices`` is int32 (partial blocks), numbers in ``elements``, int16 (matrices, q_block, ceil(k_block / 16)):
bit ``k % 16`` of ``[n, q, k // 16]`` tells of query ``q`` and key ``k`` of the block. All three are None for a mask
without partial blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of the table of sequences.
Q_BEGIN, Q_LEN, K_BEGIN, K_LEN, ROW_BEGIN, COL_BEGIN, DIAGONAL = range(7)
SEQUENCE_INTS = 7
RULE_INTS = 4  # of a head: left, right and sink of its window, and 0
UNBOUNDED = -1  # a left or right, as any negative number
ITEM_INTS = 16  # of a work item: the WorkItem, or KeyItem, of csrc/include/hbsattn/params.h
RECORD_ROWS = 64  # queries, or keys, that a record of a work list stands for at least, where a block has as many
PART_RECORDS = 512  # records of a work list of keys beside those of its tiles, at most


class MaskLayout(NamedTuple):
    """`layout` of the ops: what a mask is beside its bits and its table of sequences."""

    cols: int
    q_block_size: int
    k_block_size: int
    causal: int  # 0 or 1
    partial: int = 0  # 0 or 1: whether there are partial blocks; the ops that make bits are not told


class CallShape(NamedTuple):
    """`heads` of the ops that plan: what a call has beside its mask."""

    heads_q: int
    heads_k: int
    head_dim: int  # that of q, or of v, if it is greater
    element_size: int  # bytes
    pack_heads: bool  # query heads that share a mask and a key head may share tiles


class Call(NamedTuple):
    """What each op of an attention call takes first: CallArguments of csrc/torch/arguments.h."""

    q: Tensor
    k: Tensor
    v: Tensor
    bits: Tensor
    sequences: Tensor
    rules: Tensor | None
    partial: Tensor | None
    matrices: Tensor | None
    elements: Tensor | None
    sinks: Tensor | None
    dropout_seed: Tensor | None  # None: no weight is dropped
    layout: Sequence[int]  # a MaskLayout
    pack_heads: bool
    softmax_scale: float
    dropout_p: float
    softcap: float  # 0: none
    allow_tf32: bool  # single products of TF32 for float32, on CUDA


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


def pack_bits(mask: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Packs bool (..., cols) into words of a dtype (..., ceil(cols / bits of a word)), lowest bit first."""
    cols, size = mask.shape[-1], dtype.itemsize
    words = ceil_div(cols, 8 * size)
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, words * 8 * size - cols))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    octets = (padded.unflatten(-1, (words * size, 8)) * weights).sum(-1, dtype=torch.uint8)
    with torch.inference_mode(False):  # a mask that is built in inference mode may train later
        bits = torch.empty((*mask.shape[:-1], words), dtype=dtype, device=mask.device)
    bits.view(torch.uint8).copy_(octets)
    return bits


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """Unpacks words (..., words) of any integers into bool (..., cols)."""
    octets = bits.contiguous().view(torch.uint8).unsqueeze(-1)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((octets >> shifts) & 1).flatten(-2)[..., :cols].to(torch.bool)


def count_bits(bits: Tensor) -> Tensor:
    """The number of bits of each int32, int64."""
    x = bits - ((bits >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(torch.int64)


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


def words_of(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For `bits_below`: int64 (words), the first column of each word, and int32 (33), as many of the lowest bits."""
    ones = ((1 << torch.arange(33, device=device)) - 1).to(torch.int32)
    return 32 * torch.arange(words, device=device), ones


def bits_below(end: Tensor, words: Tensor, ones: Tensor) -> Tensor:
    """int32 (..., words): the bits of columns before `end`, int64 (...)."""
    return ones[(end.unsqueeze(-1) - words).clamp_(0, 32)]


class Reach(NamedTuple):
    """Keys, or key blocks, that can be attended to: those from `begin` to before `end`, and those before `sink`.

    int64 each, not below 0, `begin` not above `end`. Without windows only `end` is there: nothing else bounds the keys.
    """

    end: Tensor
    begin: Tensor | None = None
    sink: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Reach":
        return Reach(*(None if x is None else change(x) for x in self))

    def has(self, number: Tensor) -> Tensor:
        """Whether they hold a key, or a key block. Its last dimension is one more than theirs."""
        end, begin, sink = self.map(lambda x: x.unsqueeze(-1))
        inside = number < end
        return inside if begin is None else inside & (number >= begin) | (number < sink)

    def to_blocks(self, size: int) -> "Reach":
        """The blocks of `size` keys that hold one of these keys."""
        end, begin, sink = self.map(lambda x: torch.div(x + (size - 1), size, rounding_mode="floor"))
        if begin is None:
            return Reach(end)
        begin = torch.div(self.begin, size, rounding_mode="floor")
        return Reach(torch.where(self.begin < self.end, end, begin), begin, sink)

    def count(self) -> Tensor:
        if self.begin is None:
            return self.end
        behind = (self.sink - self.end).clamp(min=0)
        return self.end - self.begin + torch.minimum(self.sink, self.begin) + behind

    def trim(self, bits: Tensor) -> Tensor:
        """The bits (..., rows, words) of these key blocks, of each row."""
        places = words_of(bits.shape[-1], bits.device)
        end, begin, sink = self.map(lambda x: bits_below(x, *places))
        return bits & (end if begin is None else begin ^ end | sink)


def reach_of_queries(position: Tensor, length: Tensor, causal: bool, rule: Tensor | None) -> Reach:
    """The first `length` keys that each query may attend to: the element rule, as csrc/plan/rule.h has it.

    A query's `position` is its number plus the diagonal. A `rule` is that of the queries of the last dimension: int
    (..., 4), columns as `rules` has them.
    """
    end = torch.minimum(position + 1, length) if causal else length.expand(position.shape)
    end = end.clamp(min=0)
    if rule is None:
        return Reach(end)
    left, right, sink, _ = (x.unsqueeze(-1) for x in rule.to(torch.int64).unbind(-1))
    sink = torch.minimum(sink.clamp(min=0), end)
    end = torch.where(right < 0, end, torch.minimum(position + right + 1, end)).clamp(min=0)
    begin = torch.where(left < 0, 0, position - left).clamp(min=0)
    return Reach(end, torch.minimum(begin, end), sink)


def reach_of_run(first: Tensor, last: Tensor, length: Tensor, causal: bool, rule: Tensor | None) -> Reach:
    """The keys that some query may attend to, from the position `first` to `last`.

    Windows of neighbours overlap or touch, and those of later queries, like what they see of the sink, end no earlier.
    """
    reach = reach_of_queries(last, length, causal, rule)
    return reach if rule is None else reach._replace(begin=reach_of_queries(first, length, causal, rule).begin)


def reach_of_rows(sequences: Tensor, rows: int, layout: MaskLayout, rules: Tensor | None = None) -> Reach:
    """The key blocks with a key that some query of each row of the bit matrix may attend to: (rows), with rules
    (heads, rows).
    """
    return reach_of_located(sequences, *locate_rows(sequences, rows, layout.q_block_size), layout, rules)


def reach_of_located(
    sequences: Tensor, sequence: Tensor, block: Tensor, used: Tensor, layout: MaskLayout, rules: Tensor | None = None
) -> Reach:
    """The same for rows that `locate_rows` has located."""
    if sequences.shape[0] == 0:
        none = torch.zeros_like(block)
        return Reach(none) if rules is None else Reach(*(none.expand(*rules.shape[:-1], -1),) * 3)
    table = sequences.to(torch.int64)[sequence]
    first = block * layout.q_block_size
    last = torch.minimum(first + layout.q_block_size, table[:, Q_LEN]) - 1
    positions = (query + table[:, DIAGONAL] for query in (first, last))
    keys = reach_of_run(*positions, table[:, K_LEN], bool(layout.causal), rules)
    return keys.to_blocks(layout.k_block_size).map(lambda x: torch.where(used, x.clamp(max=layout.cols), 0))


def _sum_clamped(last: Tensor, width: Tensor) -> Tensor:
    """Sums clamp(x, 0, width) over all integers x up to `last`."""
    last = last.clamp(min=0)
    rising = torch.minimum(last, width)
    return rising * (rising + 1) // 2 + (last - rising) * width


def count_in_blocks(
    sequences: Tensor, rows: int, layout: MaskLayout, window: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Counts the pairs of a query and a key that each block has, int64 (rows, cols): those that causality and a window
    (left, right, sink) let attend, and all.
    """
    sequence, block, used = locate_rows(sequences, rows, layout.q_block_size)
    table = sequences.to(torch.int64)[sequence]
    q_len, k_len, diagonal = (table[:, column].unsqueeze(-1) for column in (Q_LEN, K_LEN, DIAGONAL))
    first = (block * layout.q_block_size).unsqueeze(-1)
    last = torch.minimum(first + layout.q_block_size, q_len)
    key = torch.arange(layout.cols, device=sequences.device) * layout.k_block_size
    width = (k_len - key).clamp(0, layout.k_block_size)
    left, right, sink = window

    def count_before(end: int | None, width: Tensor) -> Tensor:
        """Pairs of each block with those of its first `width` keys that lie before the query's position plus `end`."""
        if end is None:
            return (last - first) * width
        # How many of the block's keys these are, before they are cut to [0, width], is one more for the next query.
        until_first, until_last = (query - 1 + diagonal + end - key for query in (first, last))
        return _sum_clamped(until_last, width) - _sum_clamped(until_first, width)

    end = 1 if layout.causal else right + 1 if right >= 0 else None
    pairs = count_before(end, width)
    sunk = (sink - key).clamp(min=0).minimum(width)
    if left >= 0:  # all but what comes before the window, where that is no sink
        pairs = pairs - count_before(-left, width) + count_before(-left, sunk)
    if not layout.causal:  # and the sink behind the window
        pairs = pairs + count_before(None, sunk) - count_before(end, sunk)
    exists = used.unsqueeze(-1)
    return torch.where(exists, pairs, 0), torch.where(exists, count_before(None, width), 0)


def windows_of_heads(heads: int, rules: Tensor | None) -> list[tuple[int, int, int]]:
    """Left, right and sink of each mask head. Waits for the device."""
    return [(UNBOUNDED, UNBOUNDED, 0)] * heads if rules is None else [tuple(x[:3]) for x in rules.tolist()]


def count_pairs(bits: Tensor, sequences: Tensor, layout: MaskLayout, rules: Tensor | None = None) -> int:
    """Counts the pairs of a query and a key that attend, over all mask heads. Exact, with causality, windows and short
    blocks. Waits for the device. Bits without values, as in a traced program, count as all on.
    """
    heads, rows, _ = bits.shape
    if sequences.shape[0] == 0:
        return 0
    if bits.is_meta or type(bits) is not Tensor:
        return heads * rows * layout.q_block_size * layout.cols * layout.k_block_size
    windows = windows_of_heads(heads, rules)
    total = 0
    for window in set(windows):
        pairs, _ = count_in_blocks(sequences, rows, layout, window)
        # One head after another: the booleans of all at once would be eight times the bits.
        of_window = (head for head, own in zip(bits, windows, strict=True) if own == window)
        total += sum(int(pairs[unpack_bits(head, layout.cols)].sum()) for head in of_window)
    return total
