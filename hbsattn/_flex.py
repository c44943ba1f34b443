"""Masks of FlexAttention: what a mask_mod lets count, and masks that come from its BlockMask or become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hbsattn._checks import check_block_sizes, check_device, check_index, type_name
from hbsattn._contents import can_read, check_contents
from hbsattn._elements import Made, Sizes, check_waits, finish, make, make_grid, read_lengths
from hbsattn._layout import DIAGONAL, MaskLayout, ceil_div, count_in_blocks, unpack_bits, windows_of_heads
from hbsattn._partial import GRANULE, Partial, Values, fill
from hbsattn._placement import Lengths, make_sequences, place_blocks
from hbsattn._sources import Lists

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

NOTHING = -2  # in place of the number of a matrix

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


_is_mapped, _inside = torch._C._functorch.is_batchedtensor, torch._C._functorch.get_unwrapped


class _IndexByTensors(TorchFunctionMode):
    """Lets a mask_mod index tables by single numbers, as FlexAttention does: in `vmap`, Python cannot ask for them.

    What is out of range is refused where contents are checked, and else read at the end: a fault of the device would
    end all that runs there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args
            index = index if isinstance(index, tuple) else (index,)
            if all(type(x) is int or (isinstance(x, Tensor) and x.dtype != torch.bool) for x in index):
                sizes = table.shape[: len(index)]
                if len(sizes) == len(index):
                    index = [_keep_inside(x, size, table.device) for x, size in zip(index, sizes, strict=True)]
                    return torch.ops.aten.index.Tensor(table, index)
        return func(*args, **(kwargs or {}))


def _keep_inside(index: Tensor | int, size: int, device: torch.device) -> Tensor:
    if not isinstance(index, Tensor):
        index = torch.tensor(index, device=device)
    numbers = index
    while _is_mapped(numbers):
        numbers = _inside(numbers)
    if can_read(numbers):
        wrong = (numbers < -size) | (numbers >= size)
        if wrong.any():
            raise ValueError(
                f"mask_mod reads the entry {int(numbers[wrong][0])} of a dimension of {size}; expected one that it has"
            )
    return index.clamp(-size, size - 1)


def values_of(mask_mod: MaskMod) -> Values:
    """As `torch.nn.attention.flex_attention.create_mask` evaluates one: mapped over single numbers."""

    def checked(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = mask_mod(sequence, head, query, key)
        if not isinstance(result, Tensor):
            raise TypeError(f"mask_mod returns a {type_name(result)}; expected a Tensor of torch.bool")
        if result.dtype != torch.bool:
            raise TypeError(f"mask_mod returns a Tensor of {result.dtype}; expected torch.bool")
        if result.dim() > 0:
            raise ValueError(
                f"mask_mod returns a Tensor of shape {tuple(result.shape)}; expected (), for a single pair"
            )
        return result

    @torch.no_grad()
    def values(*numbers: Tensor) -> Tensor:
        dims = max(x.dim() for x in numbers)
        numbers = [x[(None,) * (dims - x.dim())] for x in numbers]
        mapped, shape = checked, []
        for dim in reversed(range(dims)):
            own = tuple(None if x.shape[dim] == 1 else 0 for x in numbers)
            shape.insert(0, 1 if own == (None,) * 4 else -1)
            if shape[0] != 1:
                mapped = torch.vmap(mapped, in_dims=own)
        with _IndexByTensors():
            result = mapped(*(x.squeeze() for x in numbers))
        sizes = iter(result.shape)
        return result.view([size if size == 1 else next(sizes) for size in shape])

    return values


def check_mask_mod(mask_mod: object) -> None:
    if isinstance(mask_mod, Tensor) or not callable(mask_mod):
        raise TypeError(f"mask_mod is a {type_name(mask_mod)}; expected a function mask_mod(b, h, q_idx, kv_idx)")


def from_mask_mod(
    mask_mod: MaskMod, sizes: Sizes, lengths: Lengths, heads: int, causal: bool, device: torch.device | str | int | None
) -> Made:
    check_mask_mod(mask_mod)
    heads = check_index("heads", heads, 1)
    device = _find_device(device, lengths.cu_seqlens_q)
    check_waits("from_mask_mod", torch.empty(0, device=device))
    if lengths.packed:
        lengths, _ = read_lengths("mask_mod", device, lengths, *sizes)
        longest = lengths.max_seqlen_q
    else:
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(lengths, name) is None:
                raise ValueError(f"{name} is None; expected an int, or cu_seqlens_q and cu_seqlens_k, for a mask_mod")
        lengths = lengths._replace(batch_size=1 if lengths.batch_size is None else lengths.batch_size)
        longest = lengths.seqlen_q
    lead = (1, heads, ceil_div(longest or 0, sizes[0]))
    place = place_blocks("mask_mod", device, lead, None, lengths, *sizes)
    return make(values_of(mask_mod), place, make_sequences(lengths, place, device), heads, causal)


def _find_device(device: torch.device | str | int | None, cu_seqlens: Tensor | None) -> torch.device:
    """With its number, as tensors have it."""
    if device is None:
        return cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.empty(0).device
    return torch.empty(0, device=check_device(device)).device


def from_flex(block_mask: Any, batch_size: int | None) -> tuple[Made, Sizes]:
    if type_name(block_mask) != "torch.nn.attention.flex_attention.BlockMask":
        raise TypeError(
            f"block_mask is a {type_name(block_mask)}; expected a torch.nn.attention.flex_attention.BlockMask"
        )
    check_mask_mod(block_mask.mask_mod)
    size = block_mask.BLOCK_SIZE
    sizes = check_block_sizes(*(size if isinstance(size, tuple | list) else (size, size)))
    lists = _check_lists("kv_num_blocks", "kv_indices", block_mask)
    check_waits("from_flex", *lists.tensors)
    seqlen_q, seqlen_k = block_mask.seq_lengths
    lead = tuple(lists.counts.shape)
    lengths = Lengths(None, None, None, None, seqlen_q, seqlen_k, batch_size).check()
    place = place_blocks("kv_num_blocks", lists.counts.device, lead, None, lengths, *sizes)
    sequences = make_sequences(lengths, place, lists.counts.device)
    shared = lead[0] == 1
    grid = make_grid(place, sequences, False, shared)
    if can_read(*lists.tensors, sequences):
        check_contents(lists, lead, lengths, place, sequences, *sizes)
    pack = (sequences[:1] if shared else sequences, grid.rows, place.layout(False))
    candidates, whole = lists.pack(*pack), None
    if block_mask.full_kv_num_blocks is not None:
        whole = _check_lists("full_kv_num_blocks", "full_kv_indices", block_mask, lists).pack(*pack)
        candidates &= ~whole
    bits = candidates if whole is None else candidates | whole
    made = fill(values_of(block_mask.mask_mod), grid, bits, candidates)
    return finish(place, sequences, *made, shared), sizes


def _check_lists(counts: str, indices: str, block_mask: Any, like: Lists | None = None) -> Lists:
    given = getattr(block_mask, counts), getattr(block_mask, indices)
    if given[0].dim() != 3:
        raise ValueError(f"{counts} has shape {tuple(given[0].shape)}; expected (batch or 1, heads or 1, query blocks)")
    lists = Lists.check(*given)
    if like is not None and lists.counts.shape != like.counts.shape:
        raise ValueError(
            f"{counts} has shape {tuple(lists.counts.shape)}; expected {tuple(like.counts.shape)}, as kv_num_blocks has"
        )
    return lists


def to_flex(mask: BlockMask, num_heads: int | None) -> Any:
    """What `BlockMask.to_flex` documents."""
    num_heads = mask.heads if num_heads is None else check_index("num_heads", num_heads, 1)
    if num_heads % max(mask.heads, 1) != 0:
        raise ValueError(f"num_heads is {num_heads}; expected a multiple of the {mask.heads} heads of the mask")
    if mask.packed:
        raise ValueError(
            "mask was built for packed tensors; expected one for batched tensors: FlexAttention has no other"
        )
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    layout, group = MaskLayout(*mask._layout), num_heads // max(mask.heads, 1)
    shape = (mask.heads, mask.batch, mask.rows // max(mask.batch, 1), mask.cols)
    partial = mask._partial_blocks
    whole = []
    for window in windows_of_heads(mask.heads, mask._rules):
        pairs, of_block = count_in_blocks(mask.sequences, mask.rows, layout, window)
        whole.append(pairs == of_block)
    on = torch.stack(list(mask._heads()))
    whole = on & torch.stack(whole)
    number = torch.where(on, -1, NOTHING).to(torch.int32)
    if partial is not None:
        of_partial = unpack_bits(partial.partial[..., 0], mask.cols) & on
        whole &= ~of_partial
        head, row, col = of_partial.nonzero(as_tuple=True)
        number[head, row, col] = partial.find(head * mask.rows + row, col).to(torch.int32)
    number = number.view(shape)
    lists = (_to_lists(x.view(shape).transpose(0, 1).repeat_interleave(group, dim=1)) for x in (on & ~whole, whole))
    return FlexMask.from_kv_blocks(
        *(x for pair in lists for x in pair),
        BLOCK_SIZE=(mask.q_block_size, mask.k_block_size),
        mask_mod=_mod_of(mask, partial, number, group),
        seq_lengths=(mask.seqlen_q, mask.seqlen_k),
    )


def _to_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and columns of bool (..., cols), those that are on first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mod_of(mask: BlockMask, partial: Partial | None, number: Tensor, group: int) -> MaskMod:
    """Which pairs count. number: int32 (heads, batch, query blocks, key blocks), of each block's matrix; -1: it is
    whole; NOTHING: off.
    """
    layout, diagonal = MaskLayout(*mask._layout), mask.sequences[:, DIAGONAL].clone()
    rules = None if mask._rules is None else mask._rules.clone().unbind(1)
    heads = mask.heads

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head = h // group if heads > 1 else h * 0
        position = q_idx + diagonal[b]
        matrix = number[head, b, q_idx // layout.q_block_size, kv_idx // layout.k_block_size]
        counts = matrix == -1
        if partial is not None:
            query, key = q_idx % layout.q_block_size, kv_idx % layout.k_block_size
            word = partial.elements[matrix.clamp(min=0), query, key // GRANULE]
            counts = counts | ((matrix >= 0) & ((word >> (key % GRANULE)) & 1 == 1))
        if layout.causal:
            counts = counts & (kv_idx <= position)
        if rules is not None:
            left, right, sink = (column[head] for column in rules[:3])
            inside = ((left < 0) | (kv_idx >= position - left)) & ((right < 0) | (kv_idx <= position + right))
            counts = counts & (inside | (kv_idx < sink))
        return counts

    return mask_mod
