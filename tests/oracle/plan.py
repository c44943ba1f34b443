"""What the work lists of a device hold: the tiles of the forward and the backward pass, in plain torch.

Judges the plan of csrc/kernels/mask/, so it imports nothing from the product. `bits` is int32 (mask heads, rows,
words): bit `c % 32` of word `c // 32` tells whether the query block of this row attends to key block `c` of its own
sequence. `sequences` is int32 (batch, 7) with the columns below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Columns of the table of sequences.
Q_BEGIN, Q_LEN, K_BEGIN, K_LEN, ROW_BEGIN, COL_BEGIN, DIAGONAL = range(7)

ITEM_INTS = 16
BLOCKS = 5  # the column of a work item that counts its active blocks

SECTION_ITEMS = 8192  # of a section of the work list, at most
FEW_ITEMS = 32  # a multiprocessor
PART_BYTES = 10 << 20  # of the workspace of the backward pass, for parts of tiles


class Card(NamedTuple):
    """What the rules know of a device; by default an H200."""

    multiprocessors: int = 132
    l2_bytes: int = 60 << 20
    memory_rate: int = 4_916_736  # bytes a microsecond

    @property
    def section_bytes(self) -> int:
        return self.l2_bytes * 8 // 15

    @property
    def running_bytes(self) -> int:
        return self.l2_bytes * 3 // 5

    @property
    def together_bytes(self) -> int:
        return self.l2_bytes // 12

    @property
    def running_keys(self) -> int:
        return self.multiprocessors * 128

    @property
    def few_keys(self) -> int:
        return 386 * self.multiprocessors * 4_916_736 // (132 * self.memory_rate)


def this_card() -> Card:
    if not torch.cuda.is_available():
        return Card()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory_rate = properties.memory_clock_rate * properties.memory_bus_width // 4 // 1000
    return Card(properties.multi_processor_count, properties.L2_cache_size, memory_rate)


def ceil_div(a: int, b: int) -> int:
    """The number of blocks of ``b`` in ``a``."""
    return -(-a // b)


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


def count_packed_heads(mask_heads: int, q_block_size: int, heads_q: int, heads_k: int, pack_heads: bool) -> int:
    """Query heads that share tiles: those of a key head, if they have one mask, or as many as fit a small tile."""
    group = heads_q // heads_k if 0 < heads_k <= heads_q else 1
    if not pack_heads or (mask_heads == heads_q and group > 1):
        return 1
    if q_block_size % 16 == 0:
        return group
    return max(
        heads for heads in range(1, group + 1) if group % heads == 0 and (heads == 1 or heads * q_block_size <= 64)
    )


def choose_tile_rows(rows: int, head_dim: int) -> int:
    """Rows of a tile of the backward pass, for blocks of ``rows`` keys, or of ``rows`` queries over packed heads."""
    return 64 if head_dim <= 128 and 5 * 64 * ceil_div(rows, 64) < 4 * 128 * ceil_div(rows, 128) else 128


def choose_query_tile_rows(rows: int, head_dim: int, k_block_size: int, for_backward: bool) -> int:
    """Query rows of a work item of the forward, or of a list ``for_backward``; ``rows`` as in ``choose_tile_rows``."""
    of_192, of_128 = 192 * ceil_div(rows, 192), 128 * ceil_div(rows, 128)
    better = of_192 < of_128 or (of_192 == of_128 and head_dim <= 64)
    if not for_backward and head_dim <= 128 and k_block_size % 16 == 0 and better:
        return 192
    return choose_tile_rows(rows, head_dim)


def goes_by_queries(
    mask_heads: int, q_block_size: int, k_block_size: int, heads_q: int, heads_k: int, head_dim: int
) -> bool:
    """Whether tiles of queries, not of keys, compute gradients that may vary from run to run, of q, k and v."""
    rows = q_block_size * count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, True)
    return head_dim <= 128 and k_block_size < 64 and choose_tile_rows(rows, head_dim) == 128


def count_row_bytes(head_dim: int, element_size: int) -> int:
    """Of a query, its output gradient and the sum of its gradient."""
    return ceil_div(head_dim, 8) * 8 * (2 * element_size + 4)


def count_query_bytes(batch: int, rows: int, q_block_size: int, head_dim: int, element_size: int) -> int:
    """Of one query head, for a sequence of average length."""
    of_sequence = min(max(rows // batch, 1) * q_block_size, 2**31 - 1)
    return of_sequence * count_row_bytes(head_dim, element_size)


def stack_heads(mask_heads: int, q_block_size: int, heads_q: int, heads_k: int) -> tuple[int, int]:
    """Query heads whose rows tiles of keys stream as one, and the rows that each query has then, below 2**26 tokens."""
    group = heads_q // heads_k
    if group == 1 or q_block_size % 16 == 0 or (heads_q // mask_heads) % group != 0:
        return 1, 1
    power = group & -group
    heads = power if power % 8 == 0 and power * q_block_size % 16 == 0 else group
    rows = 8
    while rows < heads or rows * q_block_size % 16 != 0:
        rows *= 2
    pays = rows * q_block_size * (group // heads) < group * 16 * ceil_div(q_block_size, 16)
    return (heads, rows) if pays else (1, 1)


class KeyProblem(NamedTuple):
    """What decides how tiles of keys stream queries."""

    batch: int
    rows: int
    cols: int
    mask_heads: int
    q_block_size: int
    k_block_size: int
    heads_q: int
    heads_k: int
    head_dim: int
    element_size: int
    causal: bool
    deterministic: bool

    def stack(self) -> tuple[int, int]:
        return stack_heads(self.mask_heads, self.q_block_size, self.heads_q, self.heads_k)

    def query_bytes(self) -> int:
        return count_query_bytes(self.batch, self.rows, self.q_block_size, self.head_dim, self.element_size)


def has_few_keys(problem: KeyProblem) -> bool:
    """Whether all sequences are short, and many."""
    keys = problem.cols * problem.k_block_size
    many = problem.rows * min(problem.q_block_size, keys) >= 16384
    return many and keys <= this_card().few_keys * (2 if problem.causal else 1)


def prefers_two_kernels(problem: KeyProblem) -> bool:
    """Whether gradients come by two kernels where they may vary, too, and whichever heads share tiles."""
    q_block_size, k_block_size, head_dim = problem.q_block_size, problem.k_block_size, problem.head_dim
    stack, _ = problem.stack()
    if k_block_size % 16 != 0 or (stack > 1 and stack * q_block_size < 64):
        return False
    if head_dim > 128:
        return q_block_size % 128 == 0
    short = choose_tile_rows(k_block_size, head_dim) == 64 or (has_few_keys(problem) and q_block_size % 64 == 0)
    return head_dim > 64 and k_block_size >= 64 and short


def count_tile_heads(problem: KeyProblem) -> int:
    """Query heads that one tile of the backward pass streams."""
    group = problem.heads_q // problem.heads_k
    if problem.deterministic or group < 4 or problem.batch == 0 or prefers_two_kernels(problem):
        return group
    stack, _ = problem.stack()
    card = this_card()
    of_head = problem.query_bytes()
    if of_head <= card.together_bytes // group:
        return group
    running = card.running_keys * count_row_bytes(problem.head_dim, problem.element_size)
    fit = card.running_bytes // max(of_head, running) // (2 if problem.causal else 1)
    stacks = range(stack, group + 1, stack)
    return max(heads for heads in stacks if group % heads == 0 and (heads == stack or heads <= fit))


class QuerySets(NamedTuple):
    """How the queries that read a key head are cut into sets."""

    tile_heads: int
    windows: int
    window_blocks: int

    def count(self, heads_q: int) -> int:
        return heads_q // self.tile_heads * self.windows

    def heads(self, query_set: int) -> range:
        first = query_set // self.windows * self.tile_heads
        return range(first, first + self.tile_heads)

    def blocks(self, query_set: int) -> slice:
        """Of a sequence."""
        window = query_set % self.windows
        first = window * self.window_blocks
        return slice(first, None if window + 1 == self.windows else first + self.window_blocks)


def cut_queries(problem: KeyProblem) -> QuerySets:
    heads = count_tile_heads(problem)
    stack, stack_rows = problem.stack()
    full = problem.head_dim <= 128 and problem.k_block_size < 64 and stack * problem.q_block_size >= 64
    adds_nothing = problem.deterministic or full
    if adds_nothing or prefers_two_kernels(problem) or problem.batch == 0 or stack == 1:
        return QuerySets(heads, 1, 0)
    most = min(ceil_div(heads // stack * stack_rows * problem.query_bytes(), this_card().running_bytes), heads)
    blocks = max(problem.rows // problem.batch, 1)
    window_blocks = ceil_div(blocks, most)
    return QuerySets(heads, ceil_div(blocks, window_blocks), window_blocks)


class KeyPlaces(NamedTuple):
    """The places of tiles of keys before they are put in order: sets of heads, sequences, groups of blocks, tiles."""

    groups: int  # of united key blocks, of all sequences
    of_sequence: int  # groups of each one; 0 where tensors are packed
    united: int
    tiles: int  # of a group
    section: int  # places that are put in order together

    def find(self, query_set: int, sequence: int, col_begin: int, column: int, tile: int) -> int:
        first = sequence * self.of_sequence if self.of_sequence else col_begin // self.united + sequence
        return (query_set * self.groups + first + column // self.united) * self.tiles + tile


def place_keys(
    batch: int, cols: int, k_block_size: int, query_sets: int, head_dim: int, set_bytes: int, rows_k: int, packed: bool
) -> KeyPlaces:
    """`set_bytes`: what the queries of a sequence and a set of heads take of the cache."""
    tile_keys = choose_tile_rows(k_block_size, head_dim) if head_dim <= 128 else 64
    united = tile_keys // k_block_size if k_block_size % 16 == 0 and k_block_size < tile_keys else 1
    tiles = ceil_div(k_block_size, tile_keys)
    of_sequence = 0 if packed else ceil_div(cols, united)
    groups = (ceil_div(rows_k, k_block_size) + batch) // united + batch if packed else batch * of_sequence
    places = query_sets * groups * tiles
    pairs = max(this_card().section_bytes // set_bytes, 1)
    wanted = min(max(pairs * ceil_div(groups, max(batch, 1)) * tiles, ceil_div(places, SECTION_ITEMS)), places)
    section = ceil_div(wanted, ceil_div(wanted, SECTION_ITEMS)) if wanted else 1
    return KeyPlaces(groups, of_sequence, united, tiles, section)


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
    """The work list of tiles of queries, int32 (tiles, 16): the `WorkItem`s of csrc/include/hbsattn/params.h.

    Unlike on a device, no tile unites neighbouring query blocks or has a pair of them.
    """
    mask_heads, rows, _ = bits.shape
    packed_heads = count_packed_heads(mask_heads, q_block_size, heads_q, heads_k, pack_heads)
    groups = heads_q // packed_heads
    block_rows = q_block_size * packed_heads
    tile_rows = choose_query_tile_rows(block_rows, head_dim, k_block_size, for_backward)
    tiles = ceil_div(block_rows, tile_rows)
    if groups * rows * tiles == 0 or sequences.shape[0] == 0:
        return torch.zeros(groups * rows * tiles, ITEM_INTS, dtype=torch.int32)

    sequence, block, used = locate_rows(sequences, rows, q_block_size)
    table = sequences.to(torch.int64)[sequence]
    q_len, k_len = table[:, Q_LEN], table[:, K_LEN]
    block_row = torch.where(used, block * q_block_size, torch.maximum(block * q_block_size, q_len))

    # The first and last query row of each tile, (rows, tiles). A tile that reaches into the next head of its group
    # starts over at row 0 of the block and covers [0, end) and [start, q_block_size).
    queries = (q_len - block_row).clamp(0, q_block_size).unsqueeze(-1)
    first_row = torch.arange(tiles) * tile_rows
    start = first_row % q_block_size
    end = start + (block_rows - first_row).clamp(max=tile_rows)
    wraps = end > q_block_size
    end = torch.where(wraps, end - q_block_size, end)
    first = torch.where(wraps, 0, start)
    last = torch.where(wraps & (start < queries), queries, torch.minimum(end, queries)) - 1
    some = used.unsqueeze(-1) & (first <= last)

    k_last = (k_len - 1).unsqueeze(-1).expand_as(some)
    low = high = k_last
    if causal:
        offset = (block_row + k_len - q_len).unsqueeze(-1)
        low = torch.minimum(first + offset, k_last)
        high = torch.minimum(last + offset, k_last)
    col_end = torch.div(high, k_block_size, rounding_mode="floor").add_(1).clamp_(0, cols)
    col_end = torch.where(some, col_end, 0)
    unmasked = torch.minimum(torch.div(low + 1, k_block_size, rounding_mode="floor").clamp_(min=0), col_end)

    active = unpack_bits(bits, cols).cumsum(-1, dtype=torch.int32)
    active = torch.nn.functional.pad(active, (1, 0))
    blocks = active.gather(2, col_end.expand(mask_heads, -1, -1))
    masked = blocks - active.gather(2, unmasked.expand(mask_heads, -1, -1))

    head = torch.arange(groups) * packed_heads
    mask_head = head * mask_heads // heads_q
    shape = (groups, rows, tiles)
    per_row = torch.stack([torch.arange(rows), sequence, block_row], -1).view(1, rows, 1, 3).expand(*shape, 3)
    items = torch.stack(
        [
            mask_head.view(-1, 1, 1) * rows + per_row[..., 0],
            per_row[..., 1],
            head.view(-1, 1, 1).expand(shape),
            per_row[..., 2],
            first_row.expand(shape),
            blocks[mask_head],
            masked[mask_head],
            col_end.expand(shape),
            *table[:, : K_LEN + 1].view(1, rows, 1, 4).expand(*shape, 4).unbind(-1),
            table[:, DIAGONAL].view(1, rows, 1).expand(shape),
            torch.ones(shape, dtype=torch.int64),  # blocks of a tile: here, none are united
        ],
        -1,
    ).to(torch.int32)

    # Heaviest first within each section.
    items = torch.nn.functional.pad(items.view(-1, items.shape[-1]), (0, ITEM_INTS - items.shape[-1]))
    row_groups = groups // heads_k
    column_bytes = element_size + (4 if for_backward else 0)
    pair_bytes = 2 * max(cols * k_block_size, 1) * head_dim * column_bytes
    size = _section_items(items.shape[0], sequences.shape[0], rows, tiles, row_groups, pair_bytes)
    order = items[:, BLOCKS].argsort(descending=True, stable=True)
    ranked = items[order[(order // size).argsort(stable=True)]]
    if tiles > 1 or len(items) > FEW_ITEMS * this_card().multiprocessors:
        return ranked
    # Of a short list, the lighter half of each section lies behind the heavier halves of all.
    sections = [(section, len(section) // 2) for section in ranked.split(size)]
    heavier, lighter = [x[:half] for x, half in sections], [x[half:] for x, half in sections]
    return torch.cat([*heavier, *lighter])


def _section_items(items: int, batch: int, rows: int, tiles: int, row_groups: int, pair_bytes: int) -> int:
    """Items that are put in order together, as csrc/kernels/mask/plan.cu has it: those of as many pairs of a sequence
    and a key head as have keys and values that fit a cache.
    """
    pairs = max(this_card().section_bytes // pair_bytes, 1)
    bit_rows = pairs // batch * row_groups * rows if pairs >= batch else pairs * ceil_div(rows, batch)
    wanted = min(bit_rows * tiles, items)
    return ceil_div(wanted, ceil_div(wanted, SECTION_ITEMS))
