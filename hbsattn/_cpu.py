"""The CPU backend: the ops in plain torch, for every dtype, head dim and block size.

Forward and backward follow the work list of the mask, as a GPU does: an item is a tile of up to 128 query rows of one
block and brings only the keys of its active blocks. Many items make one batched product.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._layout import (
    COL_BEGIN,
    ITEM_INTS,
    K_LEN,
    Q_LEN,
    ceil_div,
    choose_query_tile_rows,
    count_packed_heads,
    locate_rows,
    pack_bits,
    unpack_bits,
    visible_columns,
)

# Columns of a work item.
BIT_ROW, SEQUENCE, HEAD, BLOCK_ROW, FIRST_ROW, BLOCKS, MASKED, COL_END, ITEM_Q_BEGIN = range(9)

# Of a section of the work list, as csrc/kernels/mask/plan.cu has it.
SECTION_BYTES = 32 << 20
SECTION_ITEMS = 8192

# Numbers that one batched product may gather: enough to hide the cost of a torch call, and few enough
# to stay near the caches.
PRODUCT_NUMBERS = 1 << 22

KEY_BEYOND = 1 << 40  # a key that no sequence has


def _pack(mask: Tensor, sequences: Tensor, q_block_size: int, k_block_size: int, causal: bool) -> Tensor:
    """Trims a bool (heads, rows, cols) mask to what each row can see, and packs it."""
    rows, cols = mask.shape[1:]
    visible = visible_columns(sequences, rows, cols, q_block_size, k_block_size, causal)
    return pack_bits(mask & (torch.arange(cols) < visible.unsqueeze(-1)))


@torch.library.impl("hbsattn::pack_dense", "CPU")
def pack_dense(
    block_mask: Tensor,
    sequences: Tensor,
    flat: bool,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    batch, heads = sequences.shape[0], block_mask.shape[0 if flat else 1]
    torch.ops.hbsattn.check_mask(batch, heads, rows, cols, q_block_size, k_block_size)
    if flat:
        sequence, _, used = locate_rows(sequences, rows, q_block_size)
        begin = sequences[:, COL_BEGIN].to(torch.int64)[sequence[used]]
        column = begin.unsqueeze(-1) + torch.arange(cols)
        inside = (column >= 0) & (column < block_mask.shape[2])
        mask = torch.zeros(heads, rows, cols, dtype=torch.bool)
        if block_mask.shape[2]:
            column = torch.where(inside, column, 0).expand(heads, -1, -1)
            mask[:, used] = block_mask[:, used].gather(2, column) & inside
    else:
        mask = block_mask[..., :cols].expand(batch, -1, -1, -1).transpose(0, 1).reshape(heads, rows, cols)
    return _pack(mask, sequences, q_block_size, k_block_size, causal)


@torch.library.impl("hbsattn::pack_indices", "CPU")
def pack_indices(
    counts: Tensor,
    indices: Tensor,
    sequences: Tensor,
    flat: bool,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    batch, heads = sequences.shape[0], counts.shape[0 if flat else 1]
    torch.ops.hbsattn.check_mask(batch, heads, rows, cols, q_block_size, k_block_size)
    width = indices.shape[-1]
    if not flat:
        counts = counts.expand(batch, -1, -1).transpose(0, 1).reshape(heads, rows)
        indices = indices.expand(batch, -1, -1, -1).transpose(0, 1).reshape(heads, rows, width)
    listed = (torch.arange(width) < counts.unsqueeze(-1)) & (indices >= 0) & (indices < cols)
    mask = torch.zeros(heads, rows, cols + 1, dtype=torch.bool)  # the last column takes what is not listed
    mask.scatter_(2, torch.where(listed, indices, cols).to(torch.int64), True)
    return _pack(mask[..., :cols], sequences, q_block_size, k_block_size, causal)


@torch.library.impl("hbsattn::pack_csr", "CPU")
def pack_csr(
    indptr: Tensor,
    indices: Tensor,
    sequences: Tensor,
    rows: int,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
) -> Tensor:
    heads = indptr.shape[0]
    torch.ops.hbsattn.check_mask(sequences.shape[0], heads, rows, cols, q_block_size, k_block_size)
    bounds = indptr.to(torch.int64).clamp(0, indices.shape[0])
    begin = bounds[:, :-1].flatten()
    lengths = (bounds[:, 1:].flatten() - begin).clamp_(min=0)
    row = torch.repeat_interleave(torch.arange(heads * rows), lengths)
    position = torch.arange(row.shape[0]) + (begin - (lengths.cumsum(0) - lengths))[row]
    column = indices.to(torch.int64)[position]
    listed = (column >= 0) & (column < cols)
    mask = torch.zeros(heads * rows, cols, dtype=torch.bool)
    mask[row[listed], column[listed]] = True
    return _pack(mask.view(heads, rows, cols), sequences, q_block_size, k_block_size, causal)


def _check_heads(mask_heads: int, heads_q: int, heads_k: int, head_dim: int) -> None:
    """Refuses what validate_plan in csrc/core/validate.cpp refuses, in the same words; no op offers it alone."""
    for name, value, limit in (
        ("heads_q", heads_q, 1 << 31),
        ("heads_k", heads_k, 1 << 31),
        ("head_dim", head_dim, 257),
    ):
        if not 1 <= value < limit:
            raise ValueError(f"{name} is {value}; expected at least 1 and less than {limit}")
    if heads_q % heads_k != 0:
        raise ValueError(f"heads_q is {heads_q}; expected a multiple of heads_k, {heads_k}")
    if mask_heads not in (1, heads_k, heads_q):
        raise ValueError(
            f"the mask's number of heads is {mask_heads}; expected 1, heads_k = {heads_k} or heads_q = {heads_q}"
        )


@torch.library.impl("hbsattn::plan_items", "CPU")
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
    mask_heads, rows, _ = bits.shape
    _check_heads(mask_heads, heads_q, heads_k, head_dim)
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
            *table[:, :4].view(1, rows, 1, 4).expand(*shape, 4).unbind(-1),
            torch.ones(shape, dtype=torch.int64),  # blocks of a tile: here, none are united
        ],
        -1,
    ).to(torch.int32)

    # Heaviest first within each section.
    items = torch.nn.functional.pad(items.view(-1, items.shape[-1]), (0, ITEM_INTS - items.shape[-1]))
    row_groups = groups // heads_k
    pair_bytes = 2 * max(cols * k_block_size, 1) * head_dim * element_size
    size = _section_items(items.shape[0], sequences.shape[0], rows, tiles, row_groups, pair_bytes)
    order = items[:, BLOCKS].argsort(descending=True, stable=True)
    return items[order[(order // size).argsort(stable=True)]]


def _section_items(items: int, batch: int, rows: int, tiles: int, row_groups: int, pair_bytes: int) -> int:
    """Items that are put in order together, as csrc/kernels/mask/plan.cu has it: those of as many pairs of a sequence
    and a key head as have keys and values that fit a cache.
    """
    pairs = max(SECTION_BYTES // pair_bytes, 1)
    bit_rows = pairs // batch * row_groups * rows if pairs >= batch else pairs * ceil_div(rows, batch)
    wanted = min(bit_rows * tiles, items)
    return ceil_div(wanted, ceil_div(wanted, SECTION_ITEMS))


class _Tiles(NamedTuple):
    """Where the queries and keys of some items lie, (items, rows) and (items, keys)."""

    batch: Tensor  # (items, 1)
    q_row: Tensor
    head: Tensor
    live: Tensor  # whether there is such a query; where not, q_row and head are 0
    limit: Tensor  # the last key, in the sequence, that a query may attend to
    k_row: Tensor
    k_head: Tensor  # (items, 1)
    key: Tensor  # in the sequence; beyond every limit: none
    attended: Tensor  # by some query; where not, k_row is 0
    clear: int  # every query sees all keys before this position


def _locate(
    items: Tensor,
    q: Tensor,
    k: Tensor,
    bits: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    packed_heads: int,
) -> _Tiles:
    """Finds the queries of some items, all of which have active blocks, and the keys of those blocks.

    q and k are (batch or 1, rows, heads, head_dim); batch is 1 for packed tensors.
    """
    item = items.to(torch.int64).unsqueeze(-1)
    batch = item[:, SEQUENCE] if q.shape[0] > 1 else torch.zeros_like(item[:, SEQUENCE])
    q_begin, q_len, k_begin, k_len = (item[:, ITEM_Q_BEGIN + n] for n in range(4))

    block_rows = packed_heads * q_block_size
    tile_rows = choose_query_tile_rows(block_rows, q.shape[-1], k_block_size, False)
    virtual_row = item[:, FIRST_ROW] + torch.arange(min(tile_rows, block_rows))
    row = item[:, BLOCK_ROW] + virtual_row % q_block_size
    head = item[:, HEAD] + virtual_row // q_block_size
    live = (virtual_row < block_rows) & (row < q_len) & (q_begin + row < q.shape[1])
    limit = row + k_len - q_len if causal else k_len - 1
    limit = torch.where(live, torch.minimum(limit, torch.minimum(k_len, k.shape[1] - k_begin) - 1), -1)

    # One block after another. Shorter lists end in keys beyond every limit.
    active = unpack_bits(bits.flatten(0, 1)[item[:, BIT_ROW, 0]], cols) & (torch.arange(cols) < item[:, COL_END])
    owner, block = active.nonzero(as_tuple=True)
    counts = active.sum(-1)
    position = torch.arange(owner.shape[0]) - (counts.cumsum(0) - counts)[owner]
    first_key = torch.full((items.shape[0], int(counts.max())), KEY_BEYOND, dtype=torch.int64)
    first_key[owner, position] = block * k_block_size
    key = (first_key.unsqueeze(-1) + torch.arange(k_block_size)).flatten(1)
    attended = key <= limit.amax(-1, keepdim=True)
    return _Tiles(
        batch,
        torch.where(live, q_begin + row, 0),
        torch.where(live, head, 0),
        live,
        limit,
        torch.where(attended, k_begin + key, 0),
        item[:, HEAD] // (q.shape[2] // k.shape[2]),
        key,
        attended,
        int((item[:, BLOCKS] - item[:, MASKED]).min()) * k_block_size,
    )


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attend(tiles: _Tiles, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float) -> None:
    """Computes some tiles. The tensors are (batch or 1, rows, heads, head_dim), lse is (batch or 1, heads, rows)."""
    batch, live, clear = tiles.batch, tiles.live, tiles.clear
    compute = _compute_dtype(q.dtype)
    scores = q[batch, tiles.q_row, tiles.head].to(compute) @ k[batch, tiles.k_row, tiles.k_head].to(compute).mT
    scores.mul_(softmax_scale)
    # A select, so that a NaN in a key outside a row's reach stays outside.
    scores[..., clear:].masked_fill_(tiles.key[:, clear:].unsqueeze(1) > tiles.limit.unsqueeze(-1), -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0.0)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    # A weight of 0 does not silence a NaN: values that no row of the tile attends to become 0.
    values = v[batch, tiles.k_row, tiles.k_head].to(compute)
    values[:, clear:].masked_fill_(~tiles.attended[:, clear:].unsqueeze(-1), 0.0)
    result = (weights @ values).div_(torch.where(total == 0, 1, total))

    at = (batch.expand_as(live)[live], tiles.q_row[live], tiles.head[live])
    out[at] = result[live].to(out.dtype)
    lse[at[0], at[2], at[1]] = (largest + total.log()).squeeze(-1)[live]


def _differentiate(
    tiles: _Tiles,
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    softmax_scale: float,
) -> None:
    """Adds what some tiles contribute to the gradients, which are in the precision of the computation.

    With P the weights and S the scaled scores: grad_v = P^T grad_out, and grad_S = P * (grad_out v^T - delta) with
    delta = rowsum(grad_out * out) - grad_lse, because the log-sum-exp's derivative is P (FlashAttention-2, 3.1).
    """
    batch, live = tiles.batch, tiles.live
    compute = grad_q.dtype

    def of_queries(x: Tensor) -> Tensor:
        # What rows that do not exist point at may be NaN.
        return x[batch, tiles.q_row, tiles.head].to(compute).masked_fill_(~live.unsqueeze(-1), 0.0)

    unattended = ~tiles.attended.unsqueeze(-1)

    def of_keys(x: Tensor) -> Tensor:
        return x[batch, tiles.k_row, tiles.k_head].to(compute).masked_fill_(unattended, 0.0)

    queries, keys, values, grads = of_queries(q), of_keys(k), of_keys(v), of_queries(grad_out)
    row_lse = lse[batch, tiles.head, tiles.q_row].to(compute)
    row_lse = row_lse.masked_fill(row_lse == -torch.inf, torch.inf).unsqueeze(-1)
    weights = (queries @ keys.mT).mul_(softmax_scale).sub_(row_lse).exp_()
    weights.masked_fill_(tiles.key.unsqueeze(1) > tiles.limit.unsqueeze(-1), 0.0)
    delta = (grads * of_queries(out)).sum(-1) - grad_lse[batch, tiles.head, tiles.q_row].to(compute)
    grad_scores = (grads @ values.mT).sub_(delta.unsqueeze(-1)).mul_(weights).mul_(softmax_scale)

    # A query is in one tile, a key in many. What no query attends to points at another key: a NaN among the queries
    # must not go there.
    grad_q[batch.expand_as(live)[live], tiles.q_row[live], tiles.head[live]] = (grad_scores @ keys)[live]
    place = ((batch * k.shape[1] + tiles.k_row) * k.shape[2] + tiles.k_head).flatten()
    for grad, share in ((grad_k, grad_scores.mT @ queries), (grad_v, weights.mT @ grads)):
        grad.view(-1, k.shape[-1]).index_add_(0, place, share.masked_fill_(unattended, 0.0).flatten(0, 1))


def _chunks(items: Tensor, numbers: Callable[[int], int], k_block_size: int) -> Iterator[Tensor]:
    """The items that have active blocks, as many at a time as one batched product should take. `numbers` tells how
    many numbers an item with so many keys takes.
    """
    items = items[items[:, BLOCKS] > 0]
    items = items[items[:, BLOCKS].argsort(descending=True, stable=True)]
    blocks = items[:, BLOCKS].tolist()
    done = 0
    while done < len(blocks):
        count = max(PRODUCT_NUMBERS // numbers(blocks[done] * k_block_size), 1)
        yield items[done : done + count]
        done += count


@torch.library.impl("hbsattn::forward", "CPU")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    pack_heads: bool,
    softmax_scale: float,
    deterministic: bool = False,
    profile: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.ops.hbsattn.check_forward(
        q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal, pack_heads, softmax_scale
    )
    packed = q.dim() == 3
    rows_q, heads_q, head_dim = q.shape[-3:]
    packed_heads = count_packed_heads(bits.shape[0], q_block_size, heads_q, k.shape[-2], pack_heads)

    lse_shape = (heads_q, rows_q) if packed else (q.shape[0], heads_q, rows_q)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(lse_shape, -torch.inf, dtype=lse_dtype)
    cycles = torch.empty(0, dtype=torch.int64)

    views = [t.unsqueeze(0) if packed else t for t in (q, k, v, out, lse)]
    tile_rows = choose_query_tile_rows(packed_heads * q_block_size, head_dim, k_block_size, False)
    if k.numel() > 0:
        for chunk in _chunks(items, lambda keys: keys * (2 * head_dim + tile_rows), k_block_size):
            tiles = _locate(chunk, *views[:2], bits, cols, q_block_size, k_block_size, causal, packed_heads)
            _attend(tiles, *views, softmax_scale)
    return out, lse, cycles


@torch.library.impl("hbsattn::backward", "CPU")
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor,
    columns: Tensor,
    key_items: Tensor,
    cols: int,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    pack_heads: bool,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.ops.hbsattn.check_forward(
        q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal, pack_heads, softmax_scale
    )
    packed = q.dim() == 3
    head_dim = q.shape[-1]
    packed_heads = count_packed_heads(bits.shape[0], q_block_size, q.shape[-2], k.shape[-2], pack_heads)
    compute = _compute_dtype(q.dtype)
    results = [torch.zeros(x.shape, dtype=compute) for x in (q, k, v)]
    if grad_lse is None:
        grad_lse = torch.zeros_like(lse)
    views = [t.unsqueeze(0) if packed else t for t in (grad_out, grad_lse, q, k, v, out, lse, *results)]
    tile_rows = choose_query_tile_rows(packed_heads * q_block_size, head_dim, k_block_size, False)
    if k.numel() > 0:
        for chunk in _chunks(items, lambda keys: keys * (4 * head_dim + 3 * tile_rows), k_block_size):
            tiles = _locate(chunk, *views[2:4], bits, cols, q_block_size, k_block_size, causal, packed_heads)
            _differentiate(tiles, *views, softmax_scale)
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in results)
    return grad_q, grad_k, grad_v
