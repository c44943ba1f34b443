"""The functions of FastVideo's video sparse attention (package fastvideo_kernel), for blocks of any size.

from hbsattn.compat.vsa import block_sparse_attn_from_indices, video_sparse_attn

Tensors are (batch, heads, length, head dim), cut into blocks that have their valid tokens first and padding behind
them. Forward and backward, on a CPU, too. Calls wait for the device, to find the blocks that have padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hbsattn._checks import FLOATS, check_index, check_same_device, check_tensor
from hbsattn._sources import INTEGERS
from hbsattn.attention import block_sparse_attention
from hbsattn.mask import BlockMask

Result = tuple[Tensor, Tensor]


def block_sparse_attn_from_indices(
    q: Tensor, k: Tensor, v: Tensor, q2k_idx: Tensor, q2k_num: Tensor, variable_block_sizes: Tensor
) -> Result:
    """Attention of each query block to the valid keys of the key blocks that are listed for it.

    Args:
        q: (batch, heads, q_len, head_dim), of the dtypes of `block_sparse_attention`.
        k, v: (batch, heads_k, k_len, head_dim), where heads is a multiple of heads_k: FastVideo's has as many.
        q2k_idx: int32 or int64 (batch or 1, heads or 1, query blocks, entries), key blocks in any order.
        q2k_num: int32 or int64 (batch or 1, heads or 1, query blocks), how many entries count.
        variable_block_sizes: int32 or int64 (key blocks), the valid keys of each, from 0 to the block size, which is
            k_len through their number, and that of queries, too.

    Returns:
        out, shape and dtype of q, and the log-sum-exp to base 2, float32 (float64 for float64), (batch, heads, q_len).
        Queries of padding attend, too, as they do in FastVideo's. A query without valid keys gets 0 and -inf. Gradients
        flow from both.
    """
    blocks, size = _check_call(q, k, v, variable_block_sizes)
    check_tensor("q2k_num", q2k_num, (3,), INTEGERS)
    check_tensor("q2k_idx", q2k_idx, (4,), INTEGERS)
    for name, x in (("q2k_num", q2k_num), ("q2k_idx", q2k_idx)):
        _check_lead(name, x, (*q.shape[:2], blocks), q)
    if q2k_idx.shape[:3] != q2k_num.shape:
        raise ValueError(f"q2k_idx has shape {tuple(q2k_idx.shape)}; expected {(*q2k_num.shape, 'entries')}")
    lengths = {"seqlen_q": q.shape[2], "seqlen_k": k.shape[2], "batch_size": q.shape[0]}
    return _attend(q, k, v, BlockMask.from_indices(q2k_num, q2k_idx, size, size, **lengths), variable_block_sizes)


def block_sparse_attn(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, variable_block_sizes: Tensor) -> Result:
    """`block_sparse_attn_from_indices` with block_map, bool or int of which all but 0 is True, (batch or 1, heads or 1,
    query blocks, key blocks), or without a batch dimension.
    """
    blocks, size = _check_call(q, k, v, variable_block_sizes)
    check_tensor("block_map", block_map, (3, 4), (torch.bool, torch.uint8, torch.int8, *INTEGERS))
    block_map = block_map if block_map.dim() == 4 else block_map.unsqueeze(0)
    _check_lead("block_map", block_map, (*q.shape[:2], blocks, variable_block_sizes.shape[0]), q)
    mask = BlockMask.from_dense(block_map != 0, size, size, batch_size=q.shape[0])
    return _attend(q, k, v, mask, variable_block_sizes)


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | Sequence[int] = 4,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """Video sparse attention: dense attention of the blocks' means, and sparse attention to the key blocks that score
    highest in it.

    Args:
        q: (batch, heads, q_len, head_dim).
        k, v: (batch, heads, k_len, head_dim).
        variable_block_sizes, q_variable_block_sizes: int (key blocks) and int (query blocks), the valid tokens of each.
            Padding holds zeros.
        topk: key blocks for each query block, at most all.
        block_size: three numbers, whose product is the tokens of a block, or one that stands for three. FastVideo's
            default of 64 stands for blocks of 64^3; here it is that of 4 x 4 x 4.
        compress_attn_weight: what the dense part is multiplied by, of a shape that broadcasts to out's; None: 1.

    Returns:
        out, shape and dtype of q.
    """
    sides = block_size if isinstance(block_size, Sequence) else (block_size,) * 3
    if isinstance(block_size, str) or len(sides) != 3:
        raise ValueError(f"block_size is {block_size!r}; expected an int, or three")
    size = math.prod(check_index("block_size", x, 1) for x in sides)
    blocks, own = _check_call(q, k, v, variable_block_sizes)
    if k.shape[1] != q.shape[1] or v.shape != k.shape:
        raise ValueError(f"k and v have shapes {tuple(k.shape)} and {tuple(v.shape)}; expected as many heads as q")
    if own != size:
        raise ValueError(
            f"variable_block_sizes has {variable_block_sizes.shape[0]} blocks; expected {k.shape[2] / size:g}, of "
            f"{size} keys each"
        )
    _check_sizes("q_variable_block_sizes", q_variable_block_sizes, blocks, q)
    topk = check_index("topk", topk, 0, variable_block_sizes.shape[0] + 1)
    means = [
        _mean(x, sizes, size)
        for x, sizes in ((q, q_variable_block_sizes), (k, variable_block_sizes), (v, variable_block_sizes))
    ]
    scores = means[0] @ means[1].mT / q.shape[-1] ** 0.5
    dense = (scores.softmax(dim=-1) @ means[2]).repeat_interleave(size, dim=2)
    best = scores.detach().topk(topk, dim=-1).indices
    counts = torch.full(best.shape[:-1], topk, dtype=torch.int32, device=q.device)
    sparse, _ = block_sparse_attn_from_indices(q, k, v, best, counts, variable_block_sizes)
    return (dense if compress_attn_weight is None else dense * compress_attn_weight) + sparse


def _mean(x: Tensor, sizes: Tensor, size: int) -> Tensor:
    """Of the tokens of each block, (batch, heads, blocks, head_dim)."""
    sums = x.unflatten(2, (-1, size)).sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
    return (sums / sizes.clamp(min=1).view(-1, 1)).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, sizes: Tensor) -> Result:
    q, k, v = (x.transpose(1, 2) if x.stride(-1) == 1 else x.contiguous().transpose(1, 2) for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, mask.padded(k_valid=sizes), return_lse=True)
    return out.transpose(1, 2), lse / math.log(2)


def _check_call(q: object, k: object, v: object, sizes: object) -> tuple[int, int]:
    """The query blocks, and the size of a block."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, (4,), FLOATS)
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0] or x.shape[2] != k.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {q.shape[0]} sequences as q, and {k.shape[2]} keys as k"
            )
    _check_sizes("variable_block_sizes", sizes, None, q)
    size, rest = divmod(k.shape[2], max(sizes.shape[0], 1))
    if size == 0 or rest:
        raise ValueError(
            f"variable_block_sizes has {sizes.shape[0]} blocks; expected a number that divides k's length, {k.shape[2]}"
        )
    if q.shape[2] % size:
        raise ValueError(f"q has length {q.shape[2]}; expected a multiple of {size}, the block size that k has")
    return q.shape[2] // size, size


def _check_sizes(name: str, sizes: object, blocks: int | None, q: Tensor) -> None:
    check_tensor(name, sizes, (1,), INTEGERS)
    check_same_device(name, sizes, q.device, "q")
    if blocks is not None and sizes.shape[0] != blocks:
        raise ValueError(f"{name} has {sizes.shape[0]} blocks; expected {blocks}, those of q")


def _check_lead(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """`shape`: the first dimensions that x has, of which the first two may be 1."""
    check_same_device(name, x, q.device, "q")
    accepted = all(n == m or (i < 2 and n == 1) for i, (n, m) in enumerate(zip(x.shape, shape, strict=False)))
    if not accepted:
        expected = ", ".join(f"{n} or 1" if i < 2 and n != 1 else str(n) for i, n in enumerate(shape))
        more = ", ..." if x.dim() > len(shape) else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({expected}{more})")
