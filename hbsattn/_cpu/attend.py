"""Attention and its gradients in plain torch, for every dtype, head dim and block size.

A tile is up to `TILE_ROWS` rows: neighbouring queries of one query block, of all heads that share mask and key head.
It brings the keys of its active blocks alone. Tiles with about as many keys make one batched product, of bounded size.

Rows of tensors are numbered through, (batch, heads, rows) in this order, and one more row ends each list: what does not
exist reads its zeros, and writes what nobody reads. A product with 0 would not do: it lets NaN and infinity pass.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from operator import neg
from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._dropout import keeps, round_dropout_p
from hbsattn._layout import (
    DIAGONAL,
    K_BEGIN,
    K_LEN,
    Q_BEGIN,
    Q_LEN,
    Call,
    MaskLayout,
    Reach,
    ceil_div,
    count_bits,
    locate_rows,
    mask_of_head,
    reach_of_queries,
    reach_of_run,
    unpack_bits,
)
from hbsattn._partial import Partial

TILE_ROWS = 256

# Numbers that one batched product may gather: enough to hide the cost of a torch call, and few enough
# to stay near the caches.
PRODUCT_NUMBERS = 1 << 22

KEY_BEYOND = 2**31 - 1  # a key that no sequence has
LEAST_SINK = -1e38  # csrc/kernels/common/sinks.cuh

# MKL chooses the code of a function at its first call. Where several threads make that call at once, one of them may
# run code of low accuracy (PyTorch issue 188792): it put log-sum-exps off by 5e-5. Here one thread makes it.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype, device="cpu").exp_().log_().tanh_()


class _Tiles(NamedTuple):
    """Tiles with something to attend to; int64 each, in one tensor (fields, tiles)."""

    bit_row: Tensor  # in the bits of tiles, (mask heads, rows, words), flattened
    mask_row: Tensor  # likewise, in those of the mask
    mask_head: Tensor
    stream: Tensor  # of the first head: which random numbers dropout takes
    first_query: Tensor  # number of the row, of the first head
    start: Tensor  # the first query, among those of the sequence
    queries: Tensor  # of each head
    position: Tensor  # of the first query, among the keys of the sequence
    length: Tensor  # keys of the sequence
    first_key: Tensor  # number of the row that is the sequence's first key
    keys: Tensor  # no tile attends to more


class _Batch(NamedTuple):
    """What one batched product takes: tiles, padded to as many queries and keys each."""

    queries: Tensor  # (tiles, heads * queries): numbers of rows
    keys: Tensor  # (tiles, keys): numbers of rows, in the order of the sequence
    rows: int  # queries of each head
    hidden: list[tuple[slice, Tensor]]  # bool (tiles, 1, queries, some keys): which of these a query does not attend to
    places: tuple[Tensor, Tensor, Tensor]  # streams and places of `queries`, places of `keys`, as `keeps` takes them

    def hide(self, scores: Tensor) -> None:
        """Makes -inf of the scores (tiles, heads * queries, keys) of what a query does not attend to."""
        of_heads = scores.unflatten(1, (-1, self.rows))
        for some, hidden in self.hidden:
            of_heads[..., some].masked_fill_(hidden, -torch.inf)

    def dropout(self, call: Call) -> Callable[[Tensor], Tensor]:
        """Dropout of (tiles, heads * queries, keys), in place."""
        if call.dropout_p == 0:
            return lambda x: x
        dropped = ~keeps(call.dropout_p, call.dropout_seed, *self.places)
        share = 1 - round_dropout_p(call.dropout_p)
        return lambda x: x.masked_fill_(dropped, 0).div_(share)


def _find_edges(clear: Tensor) -> tuple[slice, slice]:
    """What lies before and behind the longest run of bool (keys)."""
    other = torch.nn.functional.pad((~clear).nonzero().flatten(), (1, 1), value=-1)
    other[-1] = clear.shape[0]
    longest = int(other.diff().argmax())
    return slice(0, int(other[longest]) + 1), slice(int(other[longest + 1]), clear.shape[0])


class _Tiling:
    """The tiles of a call whose tensors are (batch, rows, heads, columns); batch is 1 for packed ones."""

    def __init__(self, call: Call) -> None:
        self.bits, self.sequences, self.rules = call.bits, call.sequences, call.rules
        partial = (call.partial, call.matrices, call.elements)
        self.partial = None if call.partial is None else Partial(*partial)
        self.layout = MaskLayout(*call.layout)
        self.batch, self.rows_q, self.heads_q, columns = call.q.shape
        self.columns = columns + call.v.shape[-1]  # of a key and its value
        _, self.rows_k, self.heads_k, _ = call.k.shape
        # Numbers of the rows that do not exist.
        self.no_query, self.no_key = call.q.shape[:3].numel(), call.k.shape[:3].numel()
        group = self.heads_q // self.heads_k
        self.tile_heads = 1 if self.bits.shape[0] == self.heads_q else group
        parts = ceil_div(self.layout.q_block_size * self.tile_heads, TILE_ROWS)
        self.tile_queries = ceil_div(self.layout.q_block_size, parts)

    def _find_tiles(self) -> tuple[Tensor, Tensor]:
        """Finds the fields of all tiles, those with the most keys first, and the bits of tiles.

        Lengths past the end of a tensor end there; the diagonal stays.
        """
        layout = self.layout
        mask_heads, rows, _ = self.bits.shape
        sequence, block, used = locate_rows(self.sequences, rows, layout.q_block_size)
        table = self.sequences.to(torch.int64)[sequence]
        q_begin, q_len, k_begin, k_len = (table[:, column] for column in (Q_BEGIN, Q_LEN, K_BEGIN, K_LEN))
        start = block * layout.q_block_size
        used = used & (start >= 0) & (q_begin >= 0) & (k_begin >= 0)
        queries = (torch.minimum(q_len, self.rows_q - q_begin) - start).clamp(0, layout.q_block_size) * used

        # From rows of bits to tiles of one group of heads, and from those to tiles of all groups.
        tiles = ceil_div(queries, self.tile_queries)
        row = torch.repeat_interleave(torch.arange(rows), tiles)
        skipped = (torch.arange(row.shape[0]) - (tiles.cumsum(0) - tiles)[row]) * self.tile_queries
        start = start[row] + skipped
        queries = (queries[row] - skipped).clamp(max=self.tile_queries)
        position = start + table[row, DIAGONAL]
        length = torch.minimum(k_len, self.rows_k - k_begin)[row]
        reach = reach_of_run(position, position + queries - 1, length, bool(layout.causal), self.rules)
        bits, bit_row = self.bits, row
        if self.rules is not None:  # of a long block, a tile may see little
            bits, bit_row = reach.to_blocks(layout.k_block_size).trim(bits[:, row]), torch.arange(row.shape[0])

        head = torch.arange(0, self.heads_q, self.tile_heads).unsqueeze(-1)
        mask_head = mask_of_head(head, mask_heads, self.heads_q)
        key_head = head // (self.heads_q // self.heads_k)
        member = sequence[row] if self.batch > 1 else torch.zeros_like(row)
        blocks = torch.stack([count_bits(of_head).sum(-1) for of_head in bits])
        end = reach.end if reach.sink is None else torch.maximum(reach.end, reach.sink)
        end = end.expand(mask_heads, -1)[mask_head.squeeze(-1)]
        tiles = _Tiles(
            bit_row=mask_head * bits.shape[1] + bit_row,
            mask_row=mask_head * rows + row,
            mask_head=mask_head.expand(-1, row.shape[0]),
            stream=sequence[row] * self.heads_q + head,
            first_query=(member * self.heads_q + head) * self.rows_q + q_begin[row] + start,
            start=start.expand(head.shape[0], -1),
            queries=queries.expand(head.shape[0], -1),
            position=position.expand(head.shape[0], -1),
            length=length.expand(head.shape[0], -1),
            first_key=(member * self.heads_k + key_head) * self.rows_k + k_begin[row],
            keys=torch.minimum(blocks[mask_head, bit_row] * layout.k_block_size, end),
        )
        weight = (tiles.keys * (self.tile_queries + 1) + tiles.queries).flatten()
        order = weight.argsort(descending=True, stable=True)[: int((tiles.keys > 0).sum())]
        return torch.stack(tiles).flatten(1)[:, order], bits.flatten(0, 1)

    def _expand(self, fields: Tensor, bits: Tensor) -> _Batch:
        """Lists the queries and keys of some tiles."""
        layout = self.layout
        tile = _Tiles(*fields.unsqueeze(-1))
        count = tile.keys.shape[0]
        rule = None if self.rules is None else self.rules[tile.mask_head.squeeze(-1)]
        row = torch.arange(int(tile.queries.max()))
        head = torch.arange(self.tile_heads).view(-1, 1)
        number = tile.first_query.unsqueeze(-1) + head * self.rows_q + row
        numbers = torch.where((row < tile.queries).unsqueeze(1), number, self.no_query)

        # The keys of one block after another, in their order. Shorter lists end in keys that no sequence has.
        width = int(tile.keys.max())
        attends = unpack_bits(bits[tile.bit_row.squeeze(-1)], layout.cols)
        owner, block = attends.nonzero(as_tuple=True)
        active = torch.bincount(owner, minlength=count)
        place = torch.arange(owner.shape[0]) - (active.cumsum(0) - active)[owner]
        blocks = ceil_div(width, layout.k_block_size)
        fits = place < blocks
        begin = torch.full((count, blocks), KEY_BEYOND, dtype=torch.int64)
        begin[owner[fits], place[fits]] = block[fits] * layout.k_block_size
        key = (begin.unsqueeze(-1) + torch.arange(min(layout.k_block_size, width))).flatten(1)[:, :width]
        causal, last = bool(layout.causal), tile.queries - 1
        of_first, of_last = (reach_of_queries(tile.position + query, tile.length, causal, rule) for query in (0, last))
        some = Reach(of_last.end, of_first.begin, of_last.sink)
        each = Reach(of_first.end, of_last.begin, of_first.sink)
        key = key.clamp_(max=KEY_BEYOND).unsqueeze(1)
        any_counts, edges = some.has(key), _find_edges(each.has(key).all(0).flatten())
        counts = self._read_partial(tile, row, owner[fits], place[fits], block[fits], blocks, width)
        if counts is not None:  # which may hide any key
            any_counts, edges = any_counts & counts.any(1, keepdim=True), (slice(0, width),)
        key_numbers = torch.where(any_counts, tile.first_key.unsqueeze(-1) + key, self.no_key).squeeze(1)

        # Rows past the tile's last query are like that one.
        reach = reach_of_queries(tile.position + torch.minimum(row, last), tile.length, causal, rule)
        reach, key = reach.map(lambda x: x.to(torch.int32)), key.to(torch.int32)
        hidden = []
        for at in edges:
            if at.start < at.stop:
                seen = reach.has(key[..., at])
                hidden.append((at, ~(seen if counts is None else seen & counts).unsqueeze(1)))
        of_queries = torch.broadcast_tensors(tile.stream.unsqueeze(-1) + head, tile.start.unsqueeze(-1) + row)
        places = (*(x.flatten(1).unsqueeze(-1) for x in of_queries), key.to(torch.int64))
        return _Batch(numbers.flatten(1), key_numbers, row.shape[0], hidden, places)

    def _read_partial(
        self, tile: _Tiles, row: Tensor, owner: Tensor, place: Tensor, block: Tensor, blocks: int, width: int
    ) -> Tensor | None:
        """Whether partial blocks let the keys of a batch count, bool (tiles, queries, width).

        `block`, at `place` among the `blocks` of the tile `owner`: int64 each.
        """
        if self.partial is None:
            return None
        layout = self.layout
        matrix = torch.full((tile.keys.shape[0], 1, blocks), -1, dtype=torch.int64)
        matrix[owner, 0, place] = self.partial.find(tile.mask_row.squeeze(-1)[owner], block)
        query = (tile.start % layout.q_block_size + row).clamp(max=layout.q_block_size - 1)
        counts = self.partial.read(matrix, query.unsqueeze(-1), min(layout.k_block_size, width))
        return counts.flatten(2)[..., :width]

    def of_rows(self, of_heads: Tensor) -> Tensor:
        """A number of each head, (heads_q), for all rows, flat; -inf for those of no sequence, and for one more."""
        table = self.sequences.to(torch.int64)
        entry = torch.arange(self.batch) if self.batch == table.shape[0] else torch.zeros(len(table), dtype=torch.int64)
        begin = table[:, Q_BEGIN].clamp(0, self.rows_q)
        end = (table[:, Q_BEGIN] + table[:, Q_LEN]).clamp(0, self.rows_q).maximum(begin)
        # How many sequences begin at a row, less those that end there.
        steps = torch.zeros((self.batch, self.rows_q + 1), dtype=torch.int64)
        for at, step in ((begin, 1), (end, -1)):
            steps.index_put_((entry, at), torch.full_like(at, step), accumulate=True)
        covered = steps.cumsum(1)[:, :-1] > 0
        of_heads = of_heads.masked_fill(of_heads < LEAST_SINK, -torch.inf)
        rows = torch.where(covered.unsqueeze(1), of_heads.view(1, -1, 1), -torch.inf)
        return torch.cat([rows.flatten(), rows.new_full((1,), -torch.inf)])

    def batches(self, numbers_of_key: int) -> Iterator[_Batch]:
        """Everything there is to compute, where a key of a tile takes so many numbers."""
        if self.no_key == 0 or self.no_query == 0 or self.sequences.shape[0] == 0:
            return
        tiles, bits = self._find_tiles()
        keys = _Tiles(*tiles).keys.tolist()
        done = 0
        while done < len(keys):
            end = done + max(PRODUCT_NUMBERS // (keys[done] * numbers_of_key), 1)
            # Those that are padded to more than twice their keys wait for a batch of their own.
            end = min(end, bisect_right(keys, -keys[done] / 2, key=neg))
            yield self._expand(tiles[:, done:end], bits)
            done = end


def _flatten(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies (batch, rows, heads, columns) to (numbers of rows, columns), with a row of zeros at the end."""
    batch, rows, heads, columns = x.shape
    result = torch.empty((batch * rows * heads + 1, columns), dtype=dtype)
    result[:-1].view(batch, heads, rows, columns).copy_(x.transpose(1, 2))
    result[-1] = 0
    return result


def _restore(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flatten`, in the dtype of `like` and with its rows."""
    batch, rows, heads, _ = like.shape
    rows_of_heads = flat[:-1].view(batch, heads, rows, flat.shape[-1]).transpose(1, 2)
    return torch.empty(rows_of_heads.shape, dtype=like.dtype).copy_(rows_of_heads)


def _gather(flat: Tensor, numbers: Tensor) -> Tensor:
    return flat.index_select(0, numbers.flatten()).unflatten(0, numbers.shape)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    """tanh of scores, in place, in parts of the cap."""
    return scores.div_(softcap).tanh_()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.autocast("cpu", enabled=False)
def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Computes the output and the log-sum-exp of packed or batched tensors. Rows without keys get 0 and -inf, or their
    sink.
    """
    packed = call.q.dim() == 3
    if packed:
        call = call._replace(q=call.q.unsqueeze(0), k=call.k.unsqueeze(0), v=call.v.unsqueeze(0))
    tiling = _Tiling(call)
    compute = _compute_dtype(call.q.dtype)
    queries, keys, values = (_flatten(x, compute) for x in (call.q, call.k, call.v))
    queries.mul_(call.softmax_scale)
    out = queries.new_zeros((tiling.no_query + 1, values.shape[-1]))
    lse = torch.full((tiling.no_query + 1,), -torch.inf, dtype=compute)
    for batch in tiling.batches(tiling.columns + tiling.tile_heads * tiling.tile_queries):
        scores = _gather(queries, batch.queries) @ _gather(keys, batch.keys).mT
        if call.softcap > 0:
            _cap(scores, call.softcap).mul_(call.softcap)
        batch.hide(scores)
        # Finite, so that rows without keys get weights of 0. In others the largest weight is 1.
        largest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(compute).min)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        weights = batch.dropout(call)(weights)
        result = (weights @ _gather(values, batch.keys)).div_(total.clamp(min=1))
        out[batch.queries] = result
        lse[batch.queries] = (largest + total.log()).squeeze(-1)
    if call.sinks is not None:
        sinks = tiling.of_rows(call.sinks)
        with_sinks = torch.logaddexp(lse, sinks)
        # Rows without keys have a share of 0, with a sink or without.
        out.mul_(torch.where(lse == -torch.inf, 0, (lse - with_sinks).exp()).unsqueeze(-1))
        lse = with_sinks
    out, lse = _restore(out, call.q), lse[:-1].view(tiling.batch, tiling.heads_q, tiling.rows_q).clone()
    return (out.squeeze(0), lse.squeeze(0)) if packed else (out, lse)


@torch.autocast("cpu", enabled=False)
def differentiate(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of q, k, v and sinks, packed or batched; rows without keys take no part.

    With P the weights and S the scaled scores: grad_v = P^T grad_out, and grad_S = P * (grad_out v^T - delta) with
    delta = rowsum(grad_out * out) - grad_lse, because the log-sum-exp's derivative is P (FlashAttention-2, 3.1).
    Dropout D makes them D(P)^T grad_out and P * (D(grad_out v^T) - delta); of capped scores, grad_S takes the cap's
    slope, too.
    Of large scores, the log-sum-exp is rounded more coarsely than P may be. It cancels: P is E / rowsum(E) with
    E = exp(S - lse), and the sums divide grad_out and delta, which are smaller than E. A sink is one more S, whose
    value is 0.
    """
    packed = call.q.dim() == 3
    if packed:
        call = call._replace(q=call.q.unsqueeze(0), k=call.k.unsqueeze(0), v=call.v.unsqueeze(0))
        grad_out, out = grad_out.unsqueeze(0), out.unsqueeze(0)
    tiling = _Tiling(call)
    compute = _compute_dtype(call.q.dtype)
    queries, keys, values, grads = (_flatten(x, compute) for x in (call.q, call.k, call.v, grad_out))
    queries.mul_(call.softmax_scale)
    deltas = (grads * _flatten(out, compute)).sum(-1)
    row_lse = torch.full((tiling.no_query + 1,), torch.inf, dtype=compute)
    row_lse[:-1] = lse.flatten()
    if grad_lse is not None:
        deltas[:-1] -= grad_lse.flatten()
    sinks, grad_sinks = None, lse.new_empty(0)
    if call.sinks is not None:
        sinks = tiling.of_rows(call.sinks)
        weights = torch.where(row_lse == -torch.inf, 0, (sinks - row_lse).exp())
        grads_of_rows = torch.where(weights == 0, 0, -weights * deltas)
        grad_sinks = grads_of_rows[:-1].view(tiling.batch, tiling.heads_q, tiling.rows_q).sum((0, 2))
    # Whatever the gradients of a row without keys are: it is a row that does not exist.
    numbers = torch.arange(tiling.no_query + 1).masked_fill_(row_lse == -torch.inf, tiling.no_query)

    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))
    products = 3 if call.softcap == 0 else 4  # of a query and a key
    for batch in tiling.batches(2 * tiling.columns + products * tiling.tile_heads * tiling.tile_queries):
        rows, cols = numbers[batch.queries], batch.keys
        tile_queries, tile_keys = _gather(queries, rows), _gather(keys, cols)
        scores = tile_queries @ tile_keys.mT
        if call.softcap > 0:
            slope = 1 - _cap(scores, call.softcap).square()
            scores.mul_(call.softcap)
        batch.hide(scores)
        weights = scores.sub_(row_lse[rows].unsqueeze(-1)).exp_()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks[rows] - row_lse[rows]).exp_().unsqueeze(-1)
        total = torch.where(total == 0, 1, total)
        tile_grads = _gather(grads, rows).div_(total)
        drop = batch.dropout(call)
        grad_scores = drop(tile_grads @ _gather(values, cols).mT)
        grad_scores.sub_(deltas[rows].unsqueeze(-1).div_(total)).mul_(weights)
        if call.softcap > 0:
            grad_scores.mul_(slope)

        # A query is in one tile, a key in many.
        grad_q[rows] = grad_scores @ tile_keys
        grad_k.index_add_(0, cols.flatten(), (grad_scores.mT @ tile_queries).flatten(0, 1))
        grad_v.index_add_(0, cols.flatten(), (drop(weights).mT @ tile_grads).flatten(0, 1))
    grad_q.mul_(call.softmax_scale)
    results = (_restore(grad_q, call.q), _restore(grad_k, call.k), _restore(grad_v, call.v))
    results = tuple(x.squeeze(0) for x in results) if packed else results
    return *results, grad_sinks
