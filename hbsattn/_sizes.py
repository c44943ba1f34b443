"""Blocks of their own sizes: masks whose blocks begin anywhere, and blocks with padding behind their valid tokens.

Both become partial blocks of a mask of fixed blocks, exactly. Like `_elements`, this waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hbsattn._checks import check_block_sizes, check_bool, check_same_device, check_tensor
from hbsattn._elements import Made, check_waits, finish, make_grid, read_lengths
from hbsattn._layout import (
    K_LEN,
    Q_LEN,
    ROW_BEGIN,
    MaskLayout,
    Reach,
    ceil_div,
    count_blocks,
    locate_rows,
    pack_bits,
)
from hbsattn._ops import ops
from hbsattn._partial import (
    GRANULE,
    PAIRS_AT_ONCE,
    Grid,
    Matrices,
    Partial,
    Values,
    fill,
    find_blocks,
    intersect,
    point_at,
    with_any_hash,
)
from hbsattn._placement import Lengths, make_sequences, place_blocks
from hbsattn._plans import normal_tensors
from hbsattn._sources import INTEGERS

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask


class OfSizes:
    """What a BlockMask has of it."""

    @classmethod
    def from_sizes(
        cls,
        block_mask: Tensor,
        q_sizes: Tensor,
        k_sizes: Tensor,
        *,
        q_block_size: int | None = None,
        k_block_size: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
    ) -> BlockMask:
        """Builds a mask of blocks that have sizes of their own, exactly. Waits for the device.

        The blocks of a sequence lie one behind the other, those of each mask head by its own sizes.

        Args:
            block_mask: bool with any strides, True where attention is computed: (heads, query blocks, key blocks), or
                with a batch dimension of batch or 1 before it.
            q_sizes, k_sizes: int32 or int64 (blocks), (heads or 1, blocks) or (batch or 1, heads or 1, blocks), the
                queries, or keys, of each block, 0 or more. Those of a sequence add up to its length.
            q_block_size, k_block_size: of the mask that is made, in whose blocks work is counted: what a block of it
                has of blocks that are off is computed in vain. By default, where the blocks of the longest sequence
                have n tokens on average: 128 queries, or 64 for n below 256; 64 keys, 32 for n below 512, and 16 for n
                below 256.
            seqlen_q, seqlen_k: by default what the sizes add up to.
            max_seqlen_q, max_seqlen_k: by default the longest lengths.

        See `from_mask_mod` for what partial blocks cost.

        Raises:
            ValueError, TypeError: also for sizes that are negative or do not add up, and inside a trace or a capture.
        """
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        check_bool("causal", causal)
        with normal_tensors():
            made, sizes = from_sizes(block_mask, (q_sizes, k_sizes), (q_block_size, k_block_size), lengths, causal)
            return cls._made(made, sizes, causal)

    def padded(self, q_valid: Tensor | None = None, k_valid: Tensor | None = None) -> BlockMask:
        """Returns the mask with padding in its blocks: no query behind the first `q_valid` ones of its block attends to
        anything, and none attends to a key behind the first `k_valid` of its block. Waits for the device.

        Args:
            q_valid, k_valid: int32 or int64 (blocks), (heads or 1, blocks) or (batch or 1, heads or 1, blocks), the
                valid queries, or keys, of each block, from 0 to its size; blocks are counted in each sequence from its
                start. For packed tensors they may have more blocks than the longest sequence. None: all are valid. A
                mask of 1 head gets theirs.

        Returns:
            A mask for any number of calls, exact; its windows and partial blocks stay. It is not rewritten with
            `update_`. See `from_mask_mod` for what partial blocks cost; keys and values of padding must be finite.

        Raises:
            ValueError, TypeError: also for counts that are negative or above the block size, and inside a trace or a
                capture.
        """
        with normal_tensors():
            return pad(self, q_valid, k_valid)


def within(mask: BlockMask, values: Values, candidates: Tensor | None = None) -> BlockMask:
    """The mask without the pairs that `values` does not let count. In blocks that are not among `candidates`, which are
    bits, it lets all count.
    """
    bits = mask.bits
    bits, partial = fill(values, _grid_of(mask), bits, bits if candidates is None else bits & candidates)
    return mask._with_bits(*intersect(bits, mask.cols, partial, mask._partial_blocks), mask._rules)


def touched(mask: BlockMask, block_mask: Tensor, sides: tuple[Side, Side]) -> Tensor:
    """The bits of the blocks of a mask that touch a block of their own sizes that is on: bool (batch or 1, heads or 1,
    query blocks, key blocks). For batched tensors.
    """
    lens = [mask.seqlen_q] * mask.batch, [mask.seqlen_k] * mask.batch
    return _classify(block_mask, sides, lens, _grid_of(mask), mask.heads)[0]


def _grid_of(mask: BlockMask) -> Grid:
    return Grid(mask.sequences, mask.rows, MaskLayout(*mask._layout))


# Sizes


class Side(NamedTuple):
    """The blocks of queries, or of keys: sizes int64 (batch or 1, heads or 1, blocks), and the block of each token of
    the longest sequence, int64 (batch or 1, heads or 1, length).
    """

    sizes: Tensor
    owner: Tensor

    def find(self, sequence: Tensor, head: Tensor, token: Tensor) -> Tensor:
        """The block of each token. The numbers broadcast."""
        return pick(self.owner, sequence, head, token)


def from_sizes(
    block_mask: Tensor,
    sizes: tuple[Tensor, Tensor],
    given: tuple[int | None, int | None],
    lengths: Lengths,
    causal: bool,
) -> tuple[Made, tuple[int, int]]:
    check_tensor("block_mask", block_mask, (3, 4), (torch.bool,))
    check_waits("from_sizes", block_mask)
    block_mask = block_mask if block_mask.dim() == 4 else block_mask.unsqueeze(0)
    q_sizes, k_sizes = (
        _check_numbers(name, x, block_mask.device) for name, x in zip(("q_sizes", "k_sizes"), sizes, strict=True)
    )
    tables = {"block_mask": block_mask, "q_sizes": q_sizes, "k_sizes": k_sizes}
    for name, x, blocks, word in (("q_sizes", q_sizes, 2, "query"), ("k_sizes", k_sizes, 3, "key")):
        if x.shape[-1] != block_mask.shape[blocks]:
            raise ValueError(
                f"{name} has {x.shape[-1]} blocks; expected {block_mask.shape[blocks]}, the {word} blocks of block_mask"
            )
    heads = _common("heads", {name: x.shape[1] for name, x in tables.items()})
    lengths = lengths.check()
    packed = lengths.packed
    if packed:
        lengths, lens = read_lengths("block_mask", block_mask.device, lengths, 1, 1)
        batch = len(lens[0])
    else:
        batch = _common("a batch", {name: x.shape[0] for name, x in tables.items()}, lengths.batch_size)
        first = (int(x[0, 0].sum()) if x.numel() else 0 for x in (q_sizes, k_sizes))
        seqlens = (
            of_sizes if length is None else length
            for length, of_sizes in zip((lengths.seqlen_q, lengths.seqlen_k), first, strict=True)
        )
        lengths = lengths._replace(batch_size=batch, **dict(zip(("seqlen_q", "seqlen_k"), seqlens, strict=True)))
        lens = ([lengths.seqlen_q] * batch, [lengths.seqlen_k] * batch)
    for name, x in tables.items():
        if x.shape[0] not in (1, batch):
            raise ValueError(f"{name} has a batch of {x.shape[0]}; expected 1 or {batch}")
    longest = (lengths.max_seqlen_q, lengths.max_seqlen_k) if packed else (lengths.seqlen_q, lengths.seqlen_k)
    for name, own in (("q_sizes", lens[0]), ("k_sizes", lens[1])):
        _check_sums(name, tables[name], own)
    blocks = choose_blocks(given, longest, block_mask.shape[2:])
    lead = (1, heads, ceil_div(longest[0], blocks[0]))
    place = place_blocks("block_mask", block_mask.device, lead, None, lengths, *blocks)
    sequences = make_sequences(lengths, place, block_mask.device)
    ops.check_mask.default(place.batch, heads, place.rows, *place.layout(causal))
    shared = not packed and all(x.shape[0] == 1 for x in tables.values())
    grid = make_grid(place, sequences, causal, shared)
    sides = tuple(side_of(x, length) for x, length in zip((q_sizes, k_sizes), longest, strict=True))
    bits, candidates = _classify(block_mask, sides, lens, grid, heads)
    partial = None
    if bool(candidates.any()):
        partial = with_any_hash(lambda seed: _make_matrices(block_mask, sides, grid, candidates, seed))
    return finish(place, sequences, bits, partial, shared), blocks


def choose_blocks(
    given: tuple[int | None, int | None], longest: tuple[int, int], blocks: tuple[int, int]
) -> tuple[int, int]:
    """As `OfSizes.from_sizes` says."""
    means = [length / max(count, 1) for length, count in zip(longest, blocks, strict=True)]
    chosen = (64 if means[0] < 256 else 128, 16 if means[1] < 256 else 32 if means[1] < 512 else 64)
    return check_block_sizes(*(own if x is None else x for x, own in zip(given, chosen, strict=True)))


def _check_numbers(name: str, value: object, device: torch.device) -> Tensor:
    """int64 (batch or 1, heads or 1, blocks)."""
    check_tensor(name, value, (1, 2, 3), INTEGERS)
    check_same_device(name, value, device, "the mask")
    check_waits(name, value)
    return value.to(torch.int64)[(None,) * (3 - value.dim())]


def _common(what: str, counts: dict[str, int], known: int | None = None) -> int:
    """As many as the most of them, of which each has 1 or as many; or `known`."""
    most = max(counts.values()) if known is None else known
    if min(counts.values()) == 0:
        most = 0 if known is None else known
    for name, count in counts.items():
        if count not in (1, most):
            has = f"{what} of {count}" if what == "a batch" else f"{count} {what}"
            raise ValueError(f"{name} has {has}; expected 1 or {most}")
    return most


def _check_sums(name: str, sizes: Tensor, lengths: list[int]) -> None:
    if sizes.numel() and int(sizes.min()) < 0:
        raise ValueError(f"{name} holds {int(sizes.min())}; expected 0 or more")
    if not lengths:
        return
    sums = sizes.sum(-1).tolist()
    for sequence, length in enumerate(lengths):
        for head, total in enumerate(sums[sequence if len(sums) > 1 else 0]):
            if total != length:
                raise ValueError(
                    f"{name} adds up to {total} in head {head} of sequence {sequence}; expected {length}, its length"
                )


def side_of(sizes: Tensor, longest: int) -> Side:
    token = torch.arange(longest, device=sizes.device).expand(*sizes.shape[:2], -1).contiguous()
    owner = torch.searchsorted(sizes.cumsum(-1), token, right=True)
    return Side(sizes, owner.clamp_(0, max(sizes.shape[-1] - 1, 0)))


def pick(table: Tensor, sequence: Tensor, head: Tensor, *numbers: Tensor) -> Tensor:
    """Entries of a table (batch or 1, heads or 1, ...)."""
    batch, heads = table.shape[:2]
    return table[(sequence.clamp(max=batch - 1), head.clamp(max=heads - 1), *numbers)]


def _classify(
    block_mask: Tensor, sides: tuple[Side, Side], lens: tuple[list[int], list[int]], grid: Grid, heads: int
) -> tuple[Tensor, Tensor]:
    """The bits of blocks of the grid that have a pair that counts, and of those that may have one that does not, too.

    Found by counting the blocks that are on among those that a block of the grid touches: no pair is looked at.
    """
    words = ceil_div(grid.layout.cols, 32)
    bits = torch.zeros((2, heads, grid.rows, words), dtype=torch.int32, device=grid.device)
    if bits.numel() == 0:
        return bits[0], bits[1]
    begins = grid.table[:, ROW_BEGIN].tolist()
    for sequence, (begin, *lengths) in enumerate(zip(begins, *lens, strict=False)):  # the first, if all are alike
        if min(lengths) == 0:
            continue
        spans = [
            _spans(side, sequence, length, size)
            for side, length, size in zip(sides, lengths, grid.layout[1:3], strict=True)
        ]
        counts = [ceil_div(length, size) for length, size in zip(lengths, grid.layout[1:3], strict=True)]
        on = block_mask[min(sequence, block_mask.shape[0] - 1)]
        step = max(PAIRS_AT_ONCE // (counts[0] * counts[1]), 1)
        for of_heads in torch.arange(heads, device=grid.device).split(step):
            some, whole = _count_touched(on, of_heads, *spans)
            rows = slice(begin, begin + counts[0])
            packed = pack_bits(torch.nn.functional.pad(torch.stack((some, some & ~whole)), (0, 32 * words - counts[1])))
            bits[:, of_heads[0] : of_heads[-1] + 1, rows] = packed
    return tuple(Reach(grid.ends).trim(x) for x in bits)


class _Spans(NamedTuple):
    """The blocks of their own sizes that each block of a grid touches: from `begin` to before `end`, int64 (heads or 1,
    blocks of the grid), and how many of them have a token; and bool (heads or 1, own blocks), which have.
    """

    begin: Tensor
    end: Tensor
    number: Tensor
    exist: Tensor

    def of(self, heads: Tensor) -> _Spans:
        return _Spans(*(x[heads.clamp(max=x.shape[0] - 1)] for x in self))


def _spans(side: Side, sequence: int, length: int, size: int) -> _Spans:
    sizes, owner = (x[min(sequence, x.shape[0] - 1)] for x in side)
    first = torch.arange(0, length, size, device=owner.device)
    begin, end = owner[:, first], owner[:, (first + (size - 1)).clamp(max=length - 1)] + 1
    exist = sizes > 0
    before = torch.nn.functional.pad(exist.cumsum(-1), (1, 0))
    return _Spans(begin, end, before.gather(-1, end) - before.gather(-1, begin), exist)


def _count_touched(on: Tensor, heads: Tensor, q: _Spans, k: _Spans) -> tuple[Tensor, Tensor]:
    """Of each block of a grid, whether one of the blocks that it touches is on, and whether all are: bool (heads, query
    blocks, key blocks).
    """
    q, k = q.of(heads), k.of(heads)
    on = on[heads.clamp(max=on.shape[0] - 1)] & q.exist.unsqueeze(-1) & k.exist.unsqueeze(1)
    before = torch.nn.functional.pad(on.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32), (1, 0, 1, 0))
    own = torch.arange(heads.shape[0], device=on.device).unsqueeze(-1)
    strips = (before[own, q.end] - before[own, q.begin]).transpose(1, 2)
    count = (strips[own, k.end] - strips[own, k.begin]).transpose(1, 2)
    return count > 0, count == q.number.unsqueeze(-1) * k.number.unsqueeze(1)


def _make_matrices(
    block_mask: Tensor, sides: tuple[Side, Side], grid: Grid, candidates: Tensor, seed: int | None
) -> Partial | None:
    """What `candidates` have of blocks of their own sizes. None: different matrices have the same hash.

    A query sees of a block of the grid what all queries of its own block see: its words are those of that block.
    """
    q, k = sides
    layout, granules = grid.layout, ceil_div(grid.layout.k_block_size, GRANULE)
    kept = Matrices((layout.q_block_size, granules), grid.device, seed)
    numbers = [torch.empty(0, dtype=torch.int64, device=grid.device)]
    for head in range(candidates.shape[0]):
        own = find_blocks(candidates[head : head + 1], layout.cols)
        if own.row.shape[0] == 0:
            continue
        words = _words_of(block_mask, k, layout, head)
        for part in own.split(max(PAIRS_AT_ONCE // (layout.q_block_size * granules), 1)):
            sequence = grid.sequence[part.row].unsqueeze(-1)
            query = torch.minimum(grid.queries(part.row), grid.column(part.row, Q_LEN) - 1)
            block = q.find(sequence, torch.full_like(query, head), query)
            number = kept.add(words[sequence.clamp(max=words.shape[0] - 1), block, part.col.unsqueeze(-1)])
            if number is None:
                return None
            numbers.append(number)
    return Partial(point_at(candidates), torch.cat(numbers).to(torch.int32), kept.all())


def _words_of(block_mask: Tensor, k: Side, layout: MaskLayout, head: int) -> Tensor:
    """Which keys the queries of each block of their own sizes attend to: int16 (batch or 1, own blocks, key blocks of
    the grid, granules).
    """
    on, owner = (x[:, min(head, x.shape[1] - 1)] for x in (block_mask, k.owner))
    keys = layout.cols * layout.k_block_size
    batch = max(on.shape[0], owner.shape[0])
    owner = torch.nn.functional.pad(owner, (0, keys - owner.shape[1]), value=on.shape[2])  # of no block
    on = torch.nn.functional.pad(on, (0, 1)).expand(batch, -1, -1)
    index = owner.expand(batch, -1).unsqueeze(1)
    words = []
    for some in on.split(max(PAIRS_AT_ONCE // max(batch * keys, 1), 1), dim=1):
        pairs = some.gather(2, index.expand(-1, some.shape[1], -1))
        words.append(pack_bits(pairs.unflatten(2, (layout.cols, layout.k_block_size)), torch.int16))
    return torch.cat(words, dim=1)


# Padding


def pad(mask: BlockMask, q_valid: Tensor | None, k_valid: Tensor | None) -> BlockMask:
    check_waits("padded", mask.sequences)
    layout, bits = MaskLayout(*mask._layout), mask.bits
    sequence, block, _ = locate_rows(mask.sequences, mask.rows, layout.q_block_size)
    table = mask.sequences.to(torch.int64)
    given = {"q_valid": q_valid, "k_valid": k_valid}
    counts = {name: _check_numbers(name, x, mask.device) for name, x in given.items() if x is not None}
    of_heads = {name: x.shape[1] for name, x in counts.items()}
    heads = _common("heads", {"mask": mask.heads, **of_heads}, mask.heads if mask.heads > 1 else None)
    if mask.batch == 0 or heads == 0:
        return mask._with_bits(bits.clone(), mask._partial_blocks, mask._rules)
    sides = (
        ("q_valid", "query", Q_LEN, mask.q_block_size, layout.q_block_size, mask.rows // mask.batch),
        ("k_valid", "key", K_LEN, mask.k_block_size, layout.k_block_size, layout.cols),
    )
    tokens = []
    for name, word, column, size, own_size, blocks in sides:
        if name in counts:
            _check_counts(name, word, counts[name], mask, column, size, own_size, blocks)
            number, at = (block, sequence) if column == Q_LEN else (torch.arange(blocks, device=mask.device), None)
            tokens.append(_valid(counts[name], table[:, column], number, at, own_size))
        else:
            tokens.append(None)
    bits, partial = _cut_padding(bits.expand(heads, -1, -1), layout, sequence, *tokens)
    mine = mask._partial_blocks and mask._partial_blocks.of_heads(heads)
    rules = None if mask._rules is None else mask._rules.expand(heads, -1).contiguous()
    return mask._with_bits(*intersect(bits, layout.cols, partial, mine), rules)


def _check_counts(
    name: str, word: str, counts: Tensor, mask: BlockMask, column: int, size: int, own_size: int, blocks: int
) -> None:
    if counts.shape[0] not in (1, mask.batch):
        raise ValueError(f"{name} has a batch of {counts.shape[0]}; expected 1 or {mask.batch}")
    given = counts.shape[-1]
    if mask.packed:
        needed = int(count_blocks(mask.sequences, column, own_size).max())
        if given < needed:
            raise ValueError(f"{name} has {given} blocks; expected {needed} or more, those of the longest sequence")
    elif given != blocks:
        raise ValueError(f"{name} has {given} blocks; expected {blocks}, the {word} blocks of mask")
    least, most = (int(x) for x in counts.aminmax()) if counts.numel() else (0, 0)
    if least < 0 or most > size:
        raise ValueError(f"{name} holds {least if least < 0 else most}; expected 0 to {size}, the block size")


def _valid(counts: Tensor, lengths: Tensor, block: Tensor, sequence: Tensor | None, size: int) -> Tensor:
    """The first tokens of each block that are not padding, int64 (heads or 1, rows), or without `sequence` (batch,
    heads or 1, blocks). All of a block where only its end is missing: that of the sequence.
    """
    blocks = max(counts.shape[-1] - 1, 0)
    if counts.shape[-1] == 0:
        counts = torch.nn.functional.pad(counts, (0, 1))  # of no block that exists
    if sequence is None:
        valid, lengths = counts[..., block.clamp(max=blocks)], lengths.view(-1, 1, 1)
    else:
        valid = counts[sequence.clamp(max=counts.shape[0] - 1), :, block.clamp(0, blocks)].transpose(0, 1)
        lengths = lengths[sequence]
    return torch.where(valid < (lengths - block * size).clamp(max=size), valid, size)


def _cut_padding(
    bits: Tensor, layout: MaskLayout, sequence: Tensor, q_valid: Tensor | None, k_valid: Tensor | None
) -> tuple[Tensor, Partial | None]:
    """The bits without blocks of nothing but padding, and the partial blocks among them."""
    short = torch.zeros_like(bits)
    if k_valid is not None:
        batch = sequence.clamp(max=k_valid.shape[0] - 1)
        all_padding, some = (
            pack_bits(x).transpose(0, 1)[:, batch] for x in (k_valid == 0, (k_valid < layout.k_block_size))
        )
        bits, short = bits & ~all_padding, short | some
    if q_valid is not None:
        bits = torch.where((q_valid == 0).unsqueeze(-1), 0, bits)
        short = torch.where((q_valid < layout.q_block_size).unsqueeze(-1), -1, short)
    short = short & bits
    found = find_blocks(short, layout.cols)
    if found.row.shape[0] == 0:
        return bits, None
    sizes = [torch.full_like(found.row, size) for size in layout[1:3]]
    if q_valid is not None:
        sizes[0] = q_valid[found.head.clamp(max=q_valid.shape[0] - 1), found.row]
    if k_valid is not None:
        sizes[1] = pick(k_valid, sequence[found.row], found.head, found.col)
    pairs, numbers = (sizes[0] * (layout.k_block_size + 1) + sizes[1]).unique(return_inverse=True)
    queries = torch.div(pairs, layout.k_block_size + 1, rounding_mode="floor").unsqueeze(-1)
    own = torch.arange(layout.q_block_size, device=bits.device)
    words = pack_bits(
        torch.arange(layout.k_block_size, device=bits.device) < (pairs % (layout.k_block_size + 1)).unsqueeze(-1),
        torch.int16,
    )
    elements = torch.where((own < queries).unsqueeze(-1), words.unsqueeze(1), 0)
    return bits, Partial(point_at(short), numbers.to(torch.int32), elements)
