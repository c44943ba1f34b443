"""MInference's vertical-slash attention: blocks of 64 keys that begin anywhere, and single keys, in one call.

from hbsattn.compat.minference import sparse_attn_func  # as vllm_flash_attn and sgl_kernel have it

Forward and backward, on a CPU, too. Calls wait for the device, to find which keys are listed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbsattn._checks import FLOATS, check_bool, check_index, check_same_device, check_tensor
from hbsattn._contents import can_read
from hbsattn._key_sets import from_key_sets
from hbsattn._partial import GRANULE
from hbsattn._placement import Lengths
from hbsattn._sources import INTEGERS
from hbsattn.attention import block_sparse_attention
from hbsattn.mask import BlockMask

BLOCK = 64


def sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_count: Tensor,
    block_offset: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each block of 64 queries to the keys that are listed for it. A key that is listed twice counts once.

    Args:
        q: (batch, q_len, heads, head_dim), of the dtypes of `block_sparse_attention`.
        k, v: (batch, k_len, heads_k, head_dim), where heads is a multiple of heads_k.
        block_count: int32 or int64 (batch, heads, query blocks), how many entries of `block_offset` count.
        block_offset: int32 or int64 (batch, heads, query blocks, entries), the first of 64 keys each.
        column_count, column_index: the same of single keys.
        dropout_p, softmax_scale, softcap, deterministic: as in `block_sparse_attention`.
        causal: bottom-right aligned, for blocks and single keys.
        alibi_slopes, return_attn_probs: None and False.
        out: what the result is written to, of its shape and dtype.

    Entries past the last key are dropped. Those that are negative, or past the last block, raise ValueError on a CPU
    and in debug mode.

    Returns:
        out, shape and dtype of q, or with `return_softmax_lse` (out, lse): natural logarithms, float32 (float64 for
        float64), (batch, heads, q_len). A query with nothing to attend gets 0 and -inf. Gradients flow from both.
    """
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes is given; expected None: biases are not supported")
    if check_bool("return_attn_probs", return_attn_probs):
        raise ValueError("return_attn_probs is True; expected False")
    check_bool("causal", causal)
    check_bool("return_softmax_lse", return_softmax_lse)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, (4,), FLOATS)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has a batch of {k.shape[0]}; expected {q.shape[0]}, that of q")
    blocks = _check_lists("block_count", block_count, "block_offset", block_offset, q, k)
    columns = _check_lists("column_count", column_count, "column_index", column_index, q, k)
    mask = _mask_of(blocks, columns, q, k, causal)
    options = {"softmax_scale": softmax_scale, "dropout_p": dropout_p, "softcap": softcap}
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    result, lse = block_sparse_attention(q, k, v, mask, return_lse=True, deterministic=deterministic, **options)
    if out is not None:
        check_tensor("out", out, (4,), (result.dtype,))
        if out.shape != result.shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; expected {tuple(result.shape)}")
        result = out.copy_(result)
    return (result, lse) if return_softmax_lse else result


def vertical_slash_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v_idx: Tensor,
    s_idx: Tensor,
    block_size_M: int = BLOCK,
    block_size_N: int = BLOCK,
) -> Tensor:
    """Causal attention to vertical lines, which are keys, and to slashes, which are distances of a key from its query.

    Args:
        query: (batch, heads, length, head_dim).
        key, value: (batch, heads_k, length, head_dim), where heads is a multiple of heads_k.
        v_idx: int, with as many entries for each sequence and head, in any order: keys.
        s_idx: the same of distances, from 0 on, of which a block of 64 queries sees the 64 keys that end with that of
            its last query, and more where slashes are near to each other, by MInference's rule.
        block_size_M, block_size_N: 64.

    Returns:
        out, shape and dtype of query.
    """
    for name, size in (("block_size_M", block_size_M), ("block_size_N", block_size_N)):
        if check_index(name, size) != BLOCK:
            raise ValueError(f"{name} is {size}; expected {BLOCK}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, (4,), FLOATS)
    batch, heads, length = query.shape[:3]
    if key.shape[2] != length:
        raise ValueError(f"key has length {key.shape[2]}; expected {length}, that of query")
    lists = []
    for name, x in (("v_idx", v_idx), ("s_idx", s_idx)):
        check_tensor(name, x, (1, 2, 3, 4), INTEGERS)
        check_same_device(name, x, query.device, "query")
        if batch * heads == 0 or x.numel() % (batch * heads):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({batch}, {heads}, entries)")
        lists.append(x.to(torch.int64).reshape(batch, heads, -1).sort(-1).values)
    converted = _convert(lists[0], lists[1].flip(-1), length)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return sparse_attn_func(q, k, v, *converted, causal=True).transpose(1, 2)


def _convert(vertical: Tensor, slash: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks and single keys for each block of queries. vertical: ascending; slash: descending.

    MInference's rule: a slash begins a run of 64 keys, or one that follows the run before without a gap of more than 64
    makes it 64 longer. Vertical lines count alone where no run has them, up to the end of the last run.
    """
    end = torch.arange(BLOCK, length + BLOCK, BLOCK, device=slash.device)
    shape = (*slash.shape[:2], end.shape[0])
    run_end = torch.full(shape, -BLOCK - 1, dtype=torch.int64, device=slash.device)
    count = torch.zeros_like(run_end)
    # One entry more than there are slashes takes what does not count.
    offsets = torch.zeros((*shape, slash.shape[2] + 1), dtype=torch.int64, device=slash.device)
    for distance in slash.unbind(-1):
        distance = distance.unsqueeze(-1)
        last = (end - distance).clamp(min=BLOCK)
        seen, begins = (distance < end) & (last > run_end), last > run_end + BLOCK
        first = torch.where(begins, last - BLOCK, run_end)
        offsets.scatter_(3, torch.where(seen, count, slash.shape[2]).unsqueeze(-1), first.unsqueeze(-1))
        run_end = torch.where(seen, first + BLOCK, run_end)
        count += seen
    columns = vertical.unsqueeze(2).expand(*shape, -1)
    alone = columns < run_end.unsqueeze(-1)
    return count, offsets[..., :-1], alone.sum(-1), columns


def _check_lists(
    count_name: str, count: object, name: str, entries: object, q: Tensor, k: Tensor
) -> tuple[Tensor, ...]:
    check_tensor(count_name, count, (3,), INTEGERS)
    check_tensor(name, entries, (4,), INTEGERS)
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // BLOCK))
    for own, x in ((count_name, count), (name, entries)):
        check_same_device(own, x, q.device, "q")
        if tuple(x.shape[:3]) != shape:
            more = "" if x is count else ", entries"
            raise ValueError(f"{own} has shape {tuple(x.shape)}; expected ({', '.join(map(str, shape))}{more})")
    if can_read(count) and count.numel():
        least, most = (int(x) for x in count.aminmax())
        if least < 0 or most > entries.shape[3]:
            raise ValueError(f"{count_name} holds {least if least < 0 else most}; expected 0 to {entries.shape[3]}")
        listed = entries[torch.arange(entries.shape[3], device=count.device) < count.unsqueeze(-1)]
        least, most = (int(x) for x in listed.aminmax()) if listed.numel() else (0, 0)
        # Conversions list blocks that begin in the last block of queries, but past the last key.
        limit = BLOCK * max(shape[2], -(-k.shape[1] // BLOCK))
        if least < 0 or most >= max(limit, 1):
            raise ValueError(f"{name} holds {least if least < 0 else most}; expected 0 to {limit - 1}")
    return count, entries


def _mask_of(blocks: tuple[Tensor, ...], columns: tuple[Tensor, ...], q: Tensor, k: Tensor, causal: bool) -> BlockMask:
    keys = k.shape[1]

    def sets(head: int, sequence: int, begin: int, end: int) -> Tensor:
        # Beyond the last key: what does not count.
        edges = torch.zeros((end - begin, keys + 1), dtype=torch.int32, device=q.device)
        listed, first = (x[sequence, head, begin:end].to(torch.int64) for x in blocks)
        counts = (torch.arange(first.shape[1], device=q.device) < listed.unsqueeze(-1)) & (first >= 0) & (first < keys)
        first = torch.where(counts, first, keys)
        ones = torch.ones_like(first, dtype=torch.int32)
        edges.scatter_add_(1, first, ones)
        edges.scatter_add_(1, (first + BLOCK).clamp(max=keys), -ones)
        on = edges.cumsum(1) > 0
        listed, key = (x[sequence, head, begin:end].to(torch.int64) for x in columns)
        counts = (torch.arange(key.shape[1], device=q.device) < listed.unsqueeze(-1)) & (key >= 0) & (key < keys)
        on.scatter_(1, torch.where(counts, key, keys), True)
        return on[:, :keys]

    lengths = Lengths(None, None, None, None, q.shape[1], keys, q.shape[0])
    made = from_key_sets(sets, q.shape[2], BLOCK, lengths, causal, q.device)
    return BlockMask._made(made, (BLOCK, GRANULE), causal)
