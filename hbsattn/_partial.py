"""Partial blocks: bit matrices that say which pairs of a query and a key of a block count, found, kept once, and read.

`_layout` says how they lie. What finds them waits for the device: how many there are is data. Whatever the size of a
mask, it looks at some blocks at a time, and keeps nothing of the size of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbsattn._checks import LENGTH_LIMIT
from hbsattn._layout import (
    DIAGONAL,
    K_LEN,
    Q_LEN,
    MaskLayout,
    Reach,
    ceil_div,
    count_bits,
    count_pairs,
    locate_rows,
    pack_bits,
    reach_of_located,
    reach_of_queries,
    unpack_bits,
)

PAIRS_AT_ONCE = 1 << 24  # of a query and a key, which are looked at
HASH_SEEDS = (1, 2, 3)  # one after another, should different matrices have the same hash
GRANULE = 16  # keys in an entry of a matrix

# Whether the pairs of these mask heads, sequences, queries and keys count, int64 each, the last two numbers in their
# sequence: bool. They broadcast over each other, and so does the result with them. All of them exist.
Values = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Partial(NamedTuple):
    """The three tensors of `_layout`."""

    partial: Tensor
    matrices: Tensor
    elements: Tensor

    def find(self, row: Tensor, block: Tensor) -> Tensor:
        """The number of each block's matrix, int64, or -1 of one that is not partial. `row`: over all heads."""
        words = self.partial.flatten(0, 1)[row, torch.div(block, 32, rounding_mode="floor")].to(torch.int64)
        bits, first = words.unbind(-1)
        below = (bits & ((1 << block % 32) - 1)).to(torch.int32)
        place = (first + count_bits(below)).clamp(0, self.matrices.shape[0] - 1)
        number = self.matrices[place].clamp(0, self.elements.shape[0] - 1).to(torch.int64)
        return torch.where((bits >> block % 32) & 1 == 1, number, -1)

    def read(self, numbers: Tensor, query: Tensor, keys: int) -> Tensor:
        """Which of the first `keys` keys of some blocks count for some of their queries: bool (..., keys). A number
        of -1 is a whole block.
        """
        counts = unpack_bits(self.elements[numbers.clamp(min=0), query], keys)
        return counts | (numbers < 0).unsqueeze(-1)

    def of_heads(self, heads: int) -> Partial:
        """The same for a mask whose heads are repeated to be so many."""
        own = self.partial.shape[0]
        return self if own == heads else self._replace(partial=self.partial.repeat_interleave(heads // own, dim=0))

    def of_batch(self, batch: int) -> Partial:
        """The same for so many sequences alike, where it is that of one."""
        return self._replace(partial=self.partial.repeat(1, batch, 1, 1))


class Grid:
    """Where the blocks of a mask lie, and which of their pairs lengths and causality, or a window, let count."""

    def __init__(self, sequences: Tensor, rows: int, layout: MaskLayout, ragged: bool = True) -> None:
        """ragged: whether sequences may have different numbers of keys."""
        self.rows, self.layout = rows, layout
        self.ragged = ragged and sequences.shape[0] > 1
        located = locate_rows(sequences, rows, layout.q_block_size)
        self.sequence, self.block, _ = located
        self.table = sequences.to(torch.int64)
        self.ends = reach_of_located(sequences, *located, layout).end  # of key blocks with something visible

    @property
    def device(self) -> torch.device:
        return self.table.device

    def column(self, row: Tensor, column: int) -> Tensor:
        """A column of the table of sequences, of the sequence of each row: int64 (rows, 1)."""
        return self.table[self.sequence[row], column].unsqueeze(-1)

    def queries(self, row: Tensor) -> Tensor:
        """Numbers in their sequence, int64 (rows, q_block); some may be past its end."""
        own = torch.arange(self.layout.q_block_size, device=self.device)
        return (self.block[row] * self.layout.q_block_size).unsqueeze(-1) + own

    def keys(self, col: Tensor) -> Tensor:
        """Likewise, int64 (cols, k_block)."""
        own = torch.arange(self.layout.k_block_size, device=self.device)
        return (col * self.layout.k_block_size).unsqueeze(-1) + own

    def reach(self, row: Tensor, rule: Tensor | None = None) -> Reach:
        """What keys the queries of rows, (rows, q_block), may attend to. rule: int32 (rows, 4)."""
        query = self.queries(row)
        position, length = query + self.column(row, DIAGONAL), self.column(row, K_LEN)
        reach = reach_of_queries(position, length, bool(self.layout.causal), rule)
        return reach.map(lambda x: torch.where(query < self.column(row, Q_LEN), x, 0))

    def visible(self, row: Tensor, key: Tensor, rule: Tensor | None = None) -> Tensor:
        """Bool (rows, q_block, keys). key: int64 (rows or 1, keys)."""
        return self.reach(row, rule).has(key.unsqueeze(1))

    def existing(self, row: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The queries of rows that have some, and keys (rows or 1, keys): instead of those past the end, the last ones.
        Unless sequences are ragged, there are as many rows of keys as given.
        """
        query = torch.minimum(self.queries(row), self.column(row, Q_LEN) - 1)
        return query, torch.minimum(key, self.column(row if self.ragged else row[:1], K_LEN) - 1)

    def at_once(self) -> int:
        """Blocks that are looked at at a time."""
        return max(PAIRS_AT_ONCE // (self.layout.q_block_size * self.layout.k_block_size), 1)


class Found(NamedTuple):
    """Blocks of a mask: int64 each, in the order of heads, rows and columns."""

    head: Tensor
    row: Tensor
    col: Tensor

    def split(self, size: int) -> Iterator[Found]:
        return (Found(*some) for some in zip(*(x.split(size) for x in self), strict=True))


def _some_heads(heads: int, blocks: int) -> int:
    """Heads of which every block is looked at at a time."""
    return max(min(PAIRS_AT_ONCE // max(blocks, 1), heads), 1)


def find_blocks(bits: Tensor, cols: int) -> Found:
    """The blocks that are on. Waits for the device."""
    heads, rows, _ = bits.shape
    step = _some_heads(heads, rows * cols)
    found = [torch.stack(unpack_bits(some, cols).nonzero(as_tuple=True)) for some in bits.split(step)]
    for number, some in enumerate(found):
        some[0] += number * step
    return Found(*torch.cat(found, dim=1))


def pack_blocks(found: Found, on: Tensor, shape: tuple[int, int, int], cols: int) -> Tensor:
    """The bits (heads, rows, words) of those of the blocks that are `on`."""
    heads, rows, words = shape
    step = _some_heads(heads, rows * cols)
    bits = [torch.empty((0, rows, words), dtype=torch.int32, device=on.device)]
    for begin in range(0, heads, step):
        some = min(step, heads - begin)
        blocks = torch.zeros(some * rows * cols + 1, dtype=torch.bool, device=on.device)
        place = ((found.head - begin) * rows + found.row) * cols + found.col
        inside = (found.head >= begin) & (found.head < begin + some)
        blocks[torch.where(inside, place, some * rows * cols)] = on  # the last one takes those of other heads
        bits.append(pack_bits(blocks[:-1].view(some, rows, cols)))
    return torch.cat(bits)


# Finding them


def classify(values: Values, grid: Grid, heads: int) -> tuple[Tensor, Tensor]:
    """Looks at every pair that exists: the bits of blocks where some pair counts, and of those that are partial."""
    layout, device = grid.layout, grid.device
    shape = (heads, grid.rows, ceil_div(layout.cols, 32))
    bits = torch.zeros((2, *shape), dtype=torch.int32, device=device)
    live = grid.ends.nonzero().squeeze(-1)
    seen_by_all = grid.reach(live).end.amin(1).tolist()  # keys
    for of_heads, of_rows, width, step in _cut(grid.ends[live].tolist(), heads, grid.at_once()):
        row, head = live[of_rows], torch.arange(heads, device=device)[of_heads]
        reach = grid.reach(row)
        found = []
        for begin in range(0, width, step):
            col = torch.arange(begin, min(begin + step, width), device=device)
            key = grid.keys(col).view(1, -1)
            query, existing = grid.existing(row, key)
            sequence = grid.sequence[row].view(1, -1, 1, 1)
            counts = values(head.view(-1, 1, 1, 1), sequence, query.view(1, *query.shape, 1), existing[:, None])
            if key.shape[1] + begin * layout.k_block_size > min(seen_by_all[of_rows]):
                counts = counts & reach.has(key.unsqueeze(1))
            counts = counts.expand(head.shape[0], *query.shape, key.shape[1])
            number = counts.unflatten(-1, (col.shape[0], -1)).sum((2, 4), dtype=torch.int32)
            visible = (reach.end.unsqueeze(-1) - col * layout.k_block_size).clamp_(0, layout.k_block_size).sum(1)
            found.append(torch.stack((number > 0, (number > 0) & (number < visible))))
        blocks = torch.nn.functional.pad(torch.cat(found, dim=-1), (0, layout.cols - width))
        bits[:, of_heads, row] = pack_bits(blocks)
    return bits[0], bits[1]


def _cut(ends: list[int], heads: int, blocks: int) -> Iterator[tuple[slice, slice, int, int]]:
    """Cuts heads and rows into parts of up to so many blocks: heads, rows, the columns of the rows up to the longest,
    and how many of those fit. `ends`: of each row.
    """
    begin = 0
    while begin < len(ends):
        end, width = begin + 1, ends[begin]
        while end < len(ends) and (end + 1 - begin) * max(width, ends[end]) <= blocks:
            width = max(width, ends[end])
            end += 1
        step = min(width, blocks)
        count = max(blocks // ((end - begin) * step), 1)
        for head in range(0, heads, count):
            yield slice(head, min(head + count, heads)), slice(begin, end), width, step
        begin = end


class Matrices:
    """Matrices by number, equal ones once."""

    def __init__(self, shape: Sequence[int], device: torch.device, seed: int | None) -> None:
        self.kept = torch.empty((0, *shape), dtype=torch.int16, device=device)
        self.count = 0  # of `kept`; the rest is room
        self.hashes = torch.empty(0, dtype=torch.int64, device=device)
        self.factors = None if seed is None else _factors(shape[0] * shape[1], seed).to(device)

    def add(self, matrices: Tensor) -> Tensor | None:
        """The number of each, int64. None: different ones have the same hash."""
        before, total = self.count, self.count + matrices.shape[0]
        own = torch.arange(before, total, device=matrices.device)
        if self.factors is None or before == total:  # each is its own
            self._keep(matrices)
            return own
        hashes = (matrices.flatten(1) * self.factors).sum(-1)
        first = _find_first(torch.cat((self.hashes, hashes)))[before:]
        is_new = first == own
        numbers = before + is_new.cumsum(0) - 1
        numbers = torch.where(first < before, first, numbers[(first - before).clamp(min=0)])
        self.hashes = torch.cat((self.hashes, hashes[is_new]))
        self._keep(matrices[is_new])
        return numbers if torch.equal(self.kept[numbers], matrices) else None

    def all(self) -> Tensor:
        """int16 (matrices, q_block, granules), without room."""
        return self.kept if self.count == self.kept.shape[0] else self.kept[: self.count].clone()

    def _keep(self, matrices: Tensor) -> None:
        end = self.count + matrices.shape[0]
        if end > self.kept.shape[0]:
            kept = self.kept.new_empty((max(end, 2 * self.kept.shape[0]), *self.kept.shape[1:]))
            kept[: self.count] = self.kept[: self.count]
            self.kept = kept
        self.kept[self.count : end] = matrices
        self.count = end


def _find_first(values: Tensor) -> Tensor:
    """The place of the first number that is the same as each, int64."""
    ordered, order = values.sort(stable=True)
    place = torch.arange(values.shape[0], device=values.device)
    begins = torch.where(ordered.roll(1) != ordered, place, 0).cummax(0).values
    first = torch.empty_like(order)
    first[order] = order[begins]
    return first


def _factors(count: int, seed: int) -> Tensor:
    """Odd int64 (count), the same each time: what two lists of 16 bits differ by seldom adds up to 0 with them."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.iinfo(torch.int64).max
    return torch.randint(-limit, limit, (count,), generator=generator) | 1


def fill(values: Values, grid: Grid, bits: Tensor, candidates: Tensor) -> tuple[Tensor, Partial | None]:
    """Looks at the pairs of some blocks of `bits`, whose bits are `candidates`.

    Returns the bits without the blocks of which no pair counts, and the partial ones among those that are left.
    """
    found = find_blocks(candidates, grid.layout.cols)
    if found.head.shape[0] >= LENGTH_LIMIT:
        raise ValueError(
            f"the mask has {found.head.shape[0]} partial blocks; expected less than 2^31: take larger blocks"
        )
    some, partial, numbers, elements = with_any_hash(lambda seed: _look(values, grid, found, seed))
    bits = bits & ~pack_blocks(found, ~some, bits.shape, grid.layout.cols)
    if numbers.shape[0] == 0:
        return bits, None
    return bits, Partial(point_at(pack_blocks(found, partial, bits.shape, grid.layout.cols)), numbers, elements)


def _look(values: Values, grid: Grid, found: Found, seed: int | None) -> tuple[Tensor, ...] | None:
    """Of blocks, whether a pair counts, and whether another one does not, too: bool each. Of those that are both, the
    numbers of matrices, int32, and the matrices. None: different ones have the same hash.
    """
    layout = grid.layout
    kept = Matrices((layout.q_block_size, ceil_div(layout.k_block_size, GRANULE)), grid.device, seed)
    states, numbers = [torch.empty((2, 0), dtype=torch.bool, device=grid.device)], [found.row.new_empty(0)]
    for part in found.split(grid.at_once()):
        if part.row.shape[0] == 0:
            continue
        key = grid.keys(part.col)
        seen = grid.visible(part.row, key)
        query, key = grid.existing(part.row, key)
        head, sequence = (x.view(-1, 1, 1) for x in (part.head, grid.sequence[part.row]))
        counts = values(head, sequence, query.unsqueeze(-1), key.unsqueeze(1))
        hidden, counts = seen & ~counts, seen & counts
        some = counts.flatten(1).any(-1)
        partial = some & hidden.flatten(1).any(-1)
        number = kept.add(pack_bits(counts[partial], torch.int16))
        if number is None:
            return None
        states.append(torch.stack((some, partial)))
        numbers.append(number)
    return *torch.cat(states, dim=1), torch.cat(numbers).to(torch.int32), kept.all()


def with_any_hash(make: Callable[[int | None], Any]) -> Any:
    """The first result. Without a hash there is one."""
    for seed in HASH_SEEDS:
        result = make(seed)
        if result is not None:
            return result
    return make(None)


def point_at(partial: Tensor) -> Tensor:
    """int32 (heads, rows, words, 2): the bits of partial blocks, and of each word the place of its first one."""
    counts = count_bits(partial).flatten()
    first = (counts.cumsum(0) - counts).view(partial.shape)
    return torch.stack((partial, first.to(torch.int32)), dim=-1)


# Using them


def gather_heads(chosen: Sequence[tuple[Partial | None, int]]) -> Partial | None:
    """The partial blocks of a mask of these heads of others, which have one or more."""
    masks = {id(of.partial): of for of, _ in chosen if of is not None}
    if not masks:
        return None
    zero = next(iter(masks.values())).partial.new_zeros(())
    words: dict[int, Tensor] = {}
    places = numbers = 0
    for name, of in masks.items():
        words[name] = of.partial + torch.stack((zero, zero + places))
        masks[name] = of._replace(matrices=of.matrices + numbers)
        places, numbers = places + of.matrices.shape[0], numbers + of.elements.shape[0]
    none = torch.zeros_like(next(iter(words.values()))[0])
    heads = [none if of is None else words[id(of.partial)][head] for of, head in chosen]
    tables = (torch.cat([getattr(of, name) for of in masks.values()]) for name in ("matrices", "elements"))
    return Partial(torch.stack(heads), *tables)


def intersect(bits: Tensor, cols: int, mine: Partial | None, other: Partial | None) -> tuple[Tensor, Partial | None]:
    """The partial blocks of two masks of the same place and heads that have `bits` in common, and the bits without what
    then is off. Waits for the device if both have some.
    """
    if mine is None or other is None:
        return bits, mine or other
    words = mine.partial[..., 0] | other.partial[..., 0]
    found = find_blocks(bits & words, cols)
    row = found.head * bits.shape[1] + found.row
    numbers = torch.stack([part.find(row, found.col) for part in (mine, other)])
    pairs, kind = numbers.unique(dim=1, return_inverse=True)
    matrices, elements = with_any_hash(lambda seed: _join(mine, other, pairs, seed))
    numbers = matrices[kind]
    on = elements.flatten(1).any(-1)[numbers]
    bits = bits & ~pack_blocks(found, ~on, bits.shape, cols)
    if not bool(on.any()):
        return bits, None
    return bits, Partial(point_at(pack_blocks(found, on, bits.shape, cols)), numbers[on].to(torch.int32), elements)


def _join(mine: Partial, other: Partial, pairs: Tensor, seed: int | None) -> tuple[Tensor, Tensor] | None:
    """What pairs of matrices have in common, by number: int64 (pairs), and the matrices."""
    kept = Matrices(mine.elements.shape[1:], pairs.device, seed)
    joined = [pairs.new_empty(0)]
    at_once = max(PAIRS_AT_ONCE // (GRANULE * mine.elements[0].numel()), 1)
    for some in pairs.split(at_once, dim=1):
        numbers = kept.add(_matrix(mine, some[0]) & _matrix(other, some[1]))
        if numbers is None:
            return None
        joined.append(numbers)
    return torch.cat(joined), kept.all()


def _matrix(partial: Partial, numbers: Tensor) -> Tensor:
    """Matrices by number; all ones of a whole block."""
    return partial.elements[numbers.clamp(min=0)] | -(numbers < 0).to(torch.int16).view(-1, 1, 1)


def count_attending(
    bits: Tensor, sequences: Tensor, layout: MaskLayout, rules: Tensor | None, partial: Partial | None
) -> int:
    """`count_pairs` without the pairs that partial blocks hide."""
    total = count_pairs(bits, sequences, layout, rules)
    if partial is None or bits.is_meta or type(bits) is not Tensor or sequences.shape[0] == 0:
        return total
    hidden = torch.zeros((), dtype=torch.int64, device=bits.device)
    for _, _, seen, counts in look_at(bits & partial.partial[..., 0], sequences, layout, rules, partial):
        hidden += (seen & ~counts).sum()
    return total - int(hidden)


def look_at(
    bits: Tensor,
    sequences: Tensor,
    layout: MaskLayout,
    rules: Tensor | None,
    partial: Partial | None,
    numbers_of_pair: int = 1,
) -> Iterator[tuple[Grid, Found, Tensor, Tensor]]:
    """Some blocks of `bits` after others: their place, and for each pair, bool (blocks, q_block, k_block), whether
    lengths, causality and windows let it count, and whether the block does.

    numbers_of_pair: how many, as large as a bool, the caller has of each pair.
    """
    grid = Grid(sequences, bits.shape[1], layout)
    own = torch.arange(layout.q_block_size, device=bits.device)
    for found in find_blocks(bits, layout.cols).split(max(grid.at_once() // numbers_of_pair, 1)):
        rule = None if rules is None else rules[found.head]
        seen = grid.visible(found.row, grid.keys(found.col), rule)
        counts = torch.ones_like(seen)
        if partial is not None:
            numbers = partial.find(found.head * bits.shape[1] + found.row, found.col)
            counts = partial.read(numbers.unsqueeze(-1), own, layout.k_block_size)
        yield grid, found, seen, counts
