"""Block masks of common patterns, made on the device from a few numbers: no dense mask in between, and no waiting.

blocks = patterns.Blocks(128, 128, seqlen_q=32768, seqlen_k=32768, causal=True, device="cuda")
mask = patterns.streaming(blocks, sink=1, local=4) | patterns.top_k(blocks, patterns.pooled_scores(blocks, q, k), 8)

A query block lies at the key blocks of its own positions, counted from the end where lengths differ: query i is at key
i + k_len - q_len. Numbers of blocks, or of tokens, are ints, or one for each mask head: a sequence of ints, or an int
tensor (heads) on the device. Masks of one place are joined and cut with `|` and `&`, unless they have windows of tokens
(`BlockMask.windowed`, `sliding_window`, `token_streaming`); those with partial blocks with `&` alone. `select_heads`
puts heads of several into one, of every kind. They are not rewritten with `update_`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbsattn._checks import (
    FLOATS,
    check_block_sizes,
    check_bool,
    check_device,
    check_index,
    check_number,
    check_same_device,
    check_tensor,
    type_name,
)
from hbsattn._contents import can_read, check_lengths
from hbsattn._join import check_place
from hbsattn._layout import (
    DIAGONAL,
    Q_LEN,
    RULE_INTS,
    UNBOUNDED,
    MaskLayout,
    bits_below,
    ceil_div,
    locate_rows,
    reach_of_located,
    words_of,
)
from hbsattn._numbers import Numbers, broadcast_heads, common_heads, numbers_of_heads
from hbsattn._partial import gather_heads
from hbsattn._placement import Lengths, Place, make_sequences, place_blocks
from hbsattn._plans import normal_tensors
from hbsattn._sources import Lists
from hbsattn.mask import BlockMask, check_is_mask

_FAR = 1 << 40  # blocks that no mask has
_PRIVATE = ("_place", "_first", "_last", "_visible", "_row", "_words", "_ones")


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks that patterns choose from, with the lengths as the constructors of `BlockMask` take them.

    Args:
        q_block_size, k_block_size: queries and keys of a block.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: all four for packed tensors.
        seqlen_q, seqlen_k: for batched tensors, `batch_size` sequences of them, by default 1.
        causal: what lies past the diagonal is off.
        device: of the masks; by default that of `cu_seqlens_q`, or PyTorch's.
    """

    q_block_size: int
    k_block_size: int
    _: KW_ONLY
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    batch_size: int | None = None
    causal: bool = False
    device: torch.device | str | int | None = None
    sequences: Tensor = field(init=False, repr=False)
    _place: Place = field(init=False, repr=False)
    _first: Tensor = field(init=False, repr=False)  # int64 (rows), the key blocks of the first and the last query
    _last: Tensor = field(init=False, repr=False)
    _visible: Tensor = field(init=False, repr=False)  # int64 (rows), key blocks, which are the first ones
    _row: Tensor = field(init=False, repr=False)  # int64 (rows), query block in its sequence
    _words: Tensor = field(init=False, repr=False)  # int64 (words), the first column of each
    _ones: Tensor = field(init=False, repr=False)  # int32 (33), as many of the lowest bits
    _visible_bits: Tensor = field(init=False, repr=False)  # int32 (rows, words)

    def __post_init__(self) -> None:
        sizes = check_block_sizes(self.q_block_size, self.k_block_size)
        check_bool("causal", self.causal)
        names = ("max_seqlen_q", "max_seqlen_k", "seqlen_q", "seqlen_k", "batch_size")
        lengths = Lengths(self.cu_seqlens_q, self.cu_seqlens_k, *(getattr(self, name) for name in names)).check()
        for name in names[:2] if lengths.packed else names[2:4]:
            if getattr(lengths, name) is None:
                raise ValueError(f"{name} is None; expected an int, for blocks of a pattern")
        if not lengths.packed and lengths.batch_size is None:
            lengths = lengths._replace(batch_size=1)
        longest = lengths.max_seqlen_q if lengths.packed else lengths.seqlen_q
        lead = (1, 1, ceil_div(longest, sizes[0]))
        with normal_tensors():
            device = self._find_device()
            place = place_blocks("blocks", device, lead, None, lengths, *sizes)
            if lengths.packed and can_read(self.cu_seqlens_q, self.cu_seqlens_k):
                check_lengths("blocks", lead, None, lengths, *sizes)
            sequences = make_sequences(lengths, place, device)
            located = sequence, row, _ = locate_rows(sequences, place.rows, place.q_block)
            table = sequences.to(torch.int64)
            table = table[sequence] if place.batch else table.new_zeros((place.rows, table.shape[1]))
            first = row * place.q_block
            last = torch.minimum(first + place.q_block, table[:, Q_LEN]) - 1
            at = [torch.div(x + table[:, DIAGONAL], place.k_block, rounding_mode="floor") for x in (first, last)]
            visible = reach_of_located(sequences, *located, MaskLayout(*place.layout(self.causal))).end
            words = words_of(ceil_div(place.cols, 32), device)
        values = (device, sequences, place, *at, visible, row, *words)
        for name, value in zip(("device", "sequences", *_PRIVATE), values, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_visible_bits", self._below(visible))

    def _find_device(self) -> torch.device:
        """With its number, as tensors have it."""
        if self.device is None and isinstance(self.cu_seqlens_q, Tensor):
            return self.cu_seqlens_q.device
        # Not torch.get_default_device(), which cannot be traced.
        device = torch.empty(0).device if self.device is None else check_device(self.device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, query blocks, key blocks), padded to the longest sequence: that of scores, but for their heads."""
        place = self._place
        return place.batch, place.row_stride, place.cols

    def _mask(self, bits: Tensor) -> BlockMask:
        """A mask of what is visible of int32 (heads, rows, words)."""
        bits = bits & self._visible_bits
        sizes = (self.q_block_size, self.k_block_size)
        return BlockMask._at(self._place, bits, self.sequences, *sizes, self.causal, bits.shape[0])

    def _below(self, end: Tensor) -> Tensor:
        """int32 (..., words): the bits of columns before `end`, int64 (...)."""
        return bits_below(end, self._words, self._ones)

    def _listed(self, counts: Tensor, columns: Tensor) -> Tensor:
        """The bits of lists (heads, rows) and (heads, rows, width); columns that do not exist are left out."""
        place = self._place
        shape = (counts.shape[0], place.batch, place.row_stride)
        lists = (counts.to(torch.int32), columns.clamp(-1, place.cols).to(torch.int32))
        # Ops take the batch first.
        lists = (x.reshape(*shape, *x.shape[2:]).transpose(0, 1).contiguous() for x in lists)
        return Lists(*lists).pack(self.sequences, place.rows, place.layout(self.causal))

    def _both(self, low: int, **numbers: Numbers) -> tuple[Tensor, ...]:
        """`_numbers` of several, with as many heads each."""
        return broadcast_heads({name: self._numbers(name, value, low) for name, value in numbers.items()})

    def _numbers(self, name: str, value: Numbers, low: int = 0) -> Tensor:
        return numbers_of_heads(name, value, self.device, "blocks", low)


def _of_blocks(pattern: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a first argument that is no Blocks: a mask is easily taken for one."""

    @functools.wraps(pattern)
    def checked(blocks: Blocks, *arguments: object, **named: object) -> Any:
        if not isinstance(blocks, Blocks):
            raise TypeError(f"blocks is a {type_name(blocks)}; expected a Blocks of hbsattn.patterns")
        return pattern(blocks, *arguments, **named)

    return checked


@_of_blocks
def dense(blocks: Blocks) -> BlockMask:
    """Every block, or with causality every block up to the diagonal."""
    return blocks._mask(blocks._visible_bits.unsqueeze(0))


@_of_blocks
def window(blocks: Blocks, left: Numbers, right: Numbers = 0) -> BlockMask:
    """The key blocks where a query block lies, `left` before them and `right` behind; -1: all.

    `sliding_window` counts tokens.
    """
    left, right = blocks._both(UNBOUNDED, left=left, right=right)
    begin = blocks._first - torch.where(left < 0, _FAR, left)
    end = blocks._last + 1 + torch.where(right < 0, _FAR, right)
    return blocks._mask(blocks._below(begin) ^ blocks._below(end))


@_of_blocks
def streaming(blocks: Blocks, sink: Numbers, local: Numbers) -> BlockMask:
    """The first `sink` key blocks of the sequence, and the `local` blocks that end with the last one that is visible.

    Known as block streaming, attention sinks with a local window, or A-shape. `token_streaming` counts tokens.
    """
    sink, local = blocks._both(0, sink=sink, local=local)
    return blocks._mask(blocks._below(blocks._visible - local) ^ blocks._visible_bits | blocks._below(sink))


@_of_blocks
def sliding_window(blocks: Blocks, left: Numbers, right: Numbers = 0) -> BlockMask:
    """The tokens from `left` before a query's own position to `right` behind it; -1: all.

    Unlike `window`, which counts whole blocks from those where a query block lies: see `BlockMask.windowed`.
    """
    return dense(blocks).windowed(left, right)


@_of_blocks
def token_streaming(blocks: Blocks, sink: Numbers, local: Numbers) -> BlockMask:
    """The first `sink` tokens of the sequence, and the `local` ones, at least 1, up to the query's own position.

    Causal alone, and unlike `streaming` not of whole blocks: see `BlockMask.windowed`. Known from StreamingLLM.
    """
    if not blocks.causal:
        raise ValueError("causal is False; expected True, for the blocks of token_streaming")
    numbers = {
        name: numbers_of_heads(name, value, blocks.device, "blocks", least)
        for name, value, least in (("sink", sink, 0), ("local", local, 1))
    }
    sink, local = (value.flatten() for value in broadcast_heads(numbers))
    return dense(blocks).windowed(left=local.clamp(min=1) - 1, sink=sink)


@_of_blocks
def global_blocks(blocks: Blocks, queries: Numbers, keys: Numbers) -> BlockMask:
    """The first `queries` query blocks of a sequence and the first `keys` key blocks, each with all of the other."""
    queries, keys = blocks._both(0, queries=queries, keys=keys)
    return blocks._mask(blocks._below(torch.where(blocks._row < queries, _FAR, keys)))


@_of_blocks
def dilated(blocks: Blocks, count: int, step: Numbers) -> BlockMask:
    """`count` key blocks, every `step`-th, from the last one on where a query block lies."""
    count, step = check_index("count", count), blocks._numbers("step", step, 1)
    behind = step.unsqueeze(-1) * torch.arange(count, device=blocks.device)
    return vertical_slash(blocks, behind.new_empty((1, 0)), behind.squeeze(1))


@_of_blocks
def vertical_slash(blocks: Blocks, vertical: Tensor, slash: Tensor) -> BlockMask:
    """Columns, and diagonals.

    Args:
        vertical: int (heads or 1, any), key blocks that all queries attend to.
        slash: int (heads or 1, any), how many key blocks before the last one where a query block lies.

    Those that do not exist are left out.
    """
    for name, value in (("vertical", vertical), ("slash", slash)):
        check_tensor(name, value, (2,), (torch.int32, torch.int64))
        check_same_device(name, value, blocks.device, "blocks")
    heads = common_heads({"vertical": vertical.shape[0], "slash": slash.shape[0]})
    rows = blocks._place.rows
    columns = vertical.to(torch.int64).unsqueeze(1).expand(heads, rows, -1)
    diagonals = (blocks._last.unsqueeze(-1) - slash.to(torch.int64).unsqueeze(1)).expand(heads, rows, -1)
    listed = torch.cat((columns, diagonals), dim=-1)
    counts = torch.full((heads, rows), listed.shape[-1], dtype=torch.int32, device=blocks.device)
    return blocks._mask(blocks._listed(counts, listed))


@_of_blocks
def random_blocks(blocks: Blocks, count: int, heads: int = 1, generator: torch.Generator | None = None) -> BlockMask:
    """`count` draws for each query block among the key blocks that are visible; what is drawn twice counts once."""
    count, heads = check_index("count", count), check_index("heads", heads, 1)
    shape = (heads, blocks._place.rows, count)
    drawn = torch.rand(shape, dtype=torch.float64, generator=generator, device=blocks.device)
    listed = (drawn * blocks._visible.unsqueeze(-1)).to(torch.int64)
    counts = torch.full(shape[:2], count, dtype=torch.int32, device=blocks.device)
    return blocks._mask(blocks._listed(counts, listed))


@_of_blocks
def big_bird(
    blocks: Blocks, everywhere: int, near: int, drawn: int, heads: int = 1, generator: torch.Generator | None = None
) -> BlockMask:
    """BigBird (arXiv 2007.14062): `everywhere` global blocks of queries and of keys, a window of `near` blocks on each
    side, and `drawn` random blocks.
    """
    parts = (window(blocks, near, near), global_blocks(blocks, everywhere, everywhere))
    return random_blocks(blocks, drawn, heads, generator) | parts[0] | parts[1]


@_of_blocks
def top_k(blocks: Blocks, scores: Tensor, k: Numbers) -> BlockMask:
    """The `k` visible key blocks of each query block with the highest scores.

    Args:
        scores: float (batch or 1, heads, query blocks, key blocks), `blocks.shape` with heads, as `pooled_scores`
            makes them. -inf and NaN never count.
    """
    scores = _check_scores(blocks, scores)
    wanted = blocks._numbers("k", k)
    heads = common_heads({"scores": scores.shape[0], "k": wanted.shape[0]})
    width = scores.shape[-1]
    if isinstance(k, int):
        width = min(width, k)
    found = scores.topk(width, dim=-1)
    counts = torch.minimum((found.values > -torch.inf).sum(-1), wanted)
    return blocks._mask(blocks._listed(counts, found.indices.expand(heads, -1, -1)))


@_of_blocks
def top_p(blocks: Blocks, scores: Tensor, p: float) -> BlockMask:
    """The fewest visible key blocks of each query block whose softmax of `scores` adds up to `p` or more.

    Args:
        scores: as in `top_k`.
        p: from 0 to 1.
    """
    p = check_number("p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; expected 0 to 1")
    scores = _check_scores(blocks, scores)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).nan_to_num(0)
    weights, columns = weights.sort(dim=-1, descending=True, stable=True)
    before = weights.cumsum(-1) - weights
    counts = ((before < p) & (weights > 0)).sum(-1)
    return blocks._mask(blocks._listed(counts, columns))


@_of_blocks
def pooled_scores(blocks: Blocks, q: Tensor, k: Tensor) -> Tensor:
    """Scores of blocks: the products of their mean query and mean key, over the square root of the head dim.

    Args:
        q, k: as `block_sparse_attention` takes them.

    Returns:
        float32 (batch, heads_q, query blocks, key blocks). Of packed tensors on CUDA, last bits may vary from run to
        run, and so may what is chosen where scores are alike.
    """
    place = blocks._place
    sides = (
        ("q", q, place.seqlen_q, place.q_block, place.row_stride),
        ("k", k, place.seqlen_k, place.k_block, place.cols),
    )
    means = []
    for name, x, seqlen, size, count in sides:
        check_tensor(name, x, (3 if place.packed else 4,), FLOATS)
        check_same_device(name, x, blocks.device, "blocks")
        if not place.packed and x.shape[:2] != (place.batch, seqlen):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({place.batch}, {seqlen}, heads, head_dim)")
        means.append(_mean_of_blocks(blocks, name, x, size, count))
    mean_q, mean_k = means
    if mean_k.shape[3] != mean_q.shape[3]:
        raise ValueError(f"k has a head_dim of {mean_k.shape[3]}; expected {mean_q.shape[3]}, that of q")
    if mean_k.shape[2] == 0 or mean_q.shape[2] % mean_k.shape[2] != 0:
        raise ValueError(f"q has {mean_q.shape[2]} heads; expected a multiple of the {mean_k.shape[2]} heads of k")
    mean_k = mean_k.repeat_interleave(mean_q.shape[2] // mean_k.shape[2], dim=2)
    return torch.einsum("bnhd,bmhd->bhnm", mean_q, mean_k) * q.shape[-1] ** -0.5


def select_heads(masks: Sequence[BlockMask], choice: Sequence[int]) -> BlockMask:
    """A mask with `len(choice)` heads: head h is that of `masks[choice[h]]`, or its only one.

    All masks have the place of the first: lengths, block sizes, causality. Some may have windows or partial blocks and
    others not, so one call has heads of every kind: dense, block-sparse, streaming by blocks or by tokens, and any.
    """
    if isinstance(masks, BlockMask):
        raise TypeError("masks is a BlockMask; expected a sequence of them")
    if not masks:
        raise ValueError("masks is empty; expected a BlockMask or more")
    for mask in masks:
        check_is_mask(mask)
        check_place(masks[0], mask)
    bits_of = [mask.bits for mask in masks]  # which a mask that stays lists makes anew each time
    bits, rules, partials = [], [], []
    for head, which in enumerate(choice):
        which = check_index(f"choice[{head}]", which, 0, len(masks))
        mask = masks[which]
        if mask.heads not in (1, len(choice)):
            raise ValueError(f"masks[{which}] has {mask.heads} heads; expected 1 or {len(choice)}, those of choice")
        row = head if mask.heads > 1 else 0
        bits.append(bits_of[which][row])
        rules.append(None if mask._rules is None else mask._rules[row])
        partials.append((mask._partial_blocks, row))
    if not bits:
        raise ValueError("choice is empty; expected an int for each head")
    with normal_tensors():
        partial = gather_heads(partials)
        if all(rule is None for rule in rules):
            return masks[0]._with_bits(torch.stack(bits), partial)
        no_window = bits[0].new_zeros(RULE_INTS)
        no_window[:2] = UNBOUNDED
        rules = torch.stack([no_window if x is None else x for x in rules])
        return masks[0]._with_bits(torch.stack(bits), partial, rules)


def _check_scores(blocks: Blocks, scores: Tensor) -> Tensor:
    """(heads, rows, key blocks) with -inf where nothing is visible, or a score is NaN."""
    check_tensor("scores", scores, (4,), FLOATS)
    check_same_device("scores", scores, blocks.device, "blocks")
    batch, rows, cols = blocks.shape
    if scores.shape[0] not in (1, batch) or tuple(scores.shape[2:]) != (rows, cols):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; expected ({batch} or 1, heads, {rows}, {cols})")
    scores = scores.detach().expand(batch, -1, -1, -1).transpose(0, 1).reshape(scores.shape[1], batch * rows, cols)
    seen = torch.arange(cols, device=scores.device) < blocks._visible.unsqueeze(-1)
    return scores.masked_fill(~seen | scores.isnan(), -torch.inf)


def _mean_of_blocks(blocks: Blocks, name: str, x: Tensor, size: int, count: int) -> Tensor:
    """float32 (batch, blocks, heads, head_dim)."""
    place = blocks._place
    accumulated = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not place.packed:
        padded = torch.nn.functional.pad(x.detach().to(accumulated), (0, 0, 0, 0, 0, count * size - x.shape[1]))
        sums = padded.unflatten(1, (count, size)).sum(2)
        number = (x.shape[1] - size * torch.arange(count, device=x.device)).clamp(1, size)
        return (sums / number.view(1, -1, 1, 1)).float()
    cu_seqlens = blocks.cu_seqlens_q if name == "q" else blocks.cu_seqlens_k
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), token, right=True) - 1
    inside = token < cu_seqlens[-1]
    sequence = sequence.clamp(0, max(place.batch - 1, 0))
    block = torch.div(token - cu_seqlens[sequence], size, rounding_mode="floor").clamp(0, max(count - 1, 0))
    place_of = torch.where(inside, sequence * count + block, place.batch * count)
    sums = x.new_zeros((place.batch * count + 1, *x.shape[1:]), dtype=accumulated)
    sums.index_add_(0, place_of, x.detach().to(accumulated))
    number = torch.zeros(place.batch * count + 1, dtype=accumulated, device=x.device)
    number.index_add_(0, place_of, torch.ones_like(token, dtype=accumulated))
    means = sums / number.clamp(min=1).view(-1, 1, 1)
    return means[:-1].view(place.batch, count, *x.shape[1:]).float()
