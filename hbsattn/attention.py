"""The attention call: defaults, the mask's work list, one op."""

import torch
from torch import Tensor

from hbsattn._chunks import make_chunks
from hbsattn._ops import ops
from hbsattn._placement import check_is_tensor
from hbsattn.mask import BlockMask


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes softmax(softmax_scale * q k^T) v over the pairs of a query and a key that `mask` lets attend.

    Args:
        q: packed (total_q, heads_q, head_dim) or batched (batch, seqlen_q, heads_q, head_dim), as the mask is.
            float16 or bfloat16, on a CPU also float32 and float64; any strides with a contiguous last dimension. On
            CUDA, head dims that are no multiple of 8 cost padded copies of q, k, v and out.
        k, v: (total_k, heads_k, head_dim) or (batch, seqlen_k, heads_k, head_dim), dtype and device of q. heads_q is
            a multiple of heads_k, and query head h reads key head h // (heads_q // heads_k).
        mask: on the same device; it may serve any number of calls.
        softmax_scale: 1 / sqrt(head_dim) by default.
        return_lse: return the log-sum-exp too.
        deterministic: make the gradients of a call bitwise the same in every run, as its results always are, and as
            they always are on a CPU. `torch.use_deterministic_algorithms(True)` asks for it too. On CUDA, backward then
            takes longer, but hardly any workspace.

    Gradients flow from out and lse to q, k and v, in their dtype; what attends to nothing gets 0. On CUDA, backward
    allocates float32 sums, of about the size of q padded to whole blocks, besides up to 10 MB; for key blocks below
    64, in most shapes, of the size of k and v instead; and of both where four or more query heads read a key head of
    long sequences. The first backward with a mask plans the work, and later ones with that mask share the plan. A NaN
    or infinity in q or in a gradient of out may reach gradients of all keys in active blocks. Rows of packed tensors
    that no sequence covers get no values, here as in the result.

    A NaN or infinity in v may reach queries that do not attend to its key, if they share a tile with one that does:
    queries of the same block, or of neighbouring blocks. In k it reaches only those that attend to it.

    Returns:
        out, shape and dtype of q; with `return_lse` (out, lse). lse holds natural logarithms in float32 (float64 for
        float64), (heads_q, total_q) or (batch, heads_q, seqlen_q). A query with nothing to attend gets 0 and -inf.

    Raises:
        ValueError, TypeError: for an argument that does not fit; the message says which, its value, and what does.
        NotImplementedError: from a second derivative.
    """
    return _attend(q, k, v, mask, softmax_scale, return_lse, deterministic, True)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    softmax_scale: float | None,
    return_lse: bool,
    deterministic: bool,
    pack_heads: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask is a {type(mask).__name__}; expected a BlockMask")
    mask._check_use(q, k)
    check_is_tensor("v", v)
    heads_q, head_dim = q.shape[-2:]
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5 if head_dim else 1.0  # the op refuses a head_dim of 0
    elif isinstance(softmax_scale, str | bytes | Tensor):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}; expected a number")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if mask._lists is not None and not trains and not mask._makes_bits():
        out, lse = _attend_in_chunks(q, k, v, mask, softmax_scale, deterministic, pack_heads)
        return (out, lse) if return_lse else out
    bits = mask._kept_bits()
    key = (heads_q, k.shape[-2], head_dim, q.element_size(), pack_heads)
    items = mask._cached_items(key)
    if items is None:
        # What does not fit is refused before anything is launched, also before the work list is made.
        ops.check_forward.default(
            q,
            k,
            v,
            bits,
            mask.sequences,
            None,
            mask.cols,
            mask.q_block_size,
            mask.k_block_size,
            mask.causal,
            pack_heads,
            softmax_scale,
        )
        items = mask._items(*key, bits=bits)
    out, lse, _ = ops.forward.default(
        q,
        k,
        v,
        bits,
        mask.sequences,
        items,
        mask.cols,
        mask.q_block_size,
        mask.k_block_size,
        mask.causal,
        pack_heads,
        softmax_scale,
        deterministic,
    )
    return (out, lse) if return_lse else out


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, softmax_scale: float, deterministic: bool, pack_heads: bool
) -> tuple[Tensor, Tensor]:
    """The call for a mask that stays lists, without gradients: chunks of queries with their own bits and work lists.

    Gradients go another way: each chunk would give its own, rounded before they are summed, and leaves those of keys
    past its last query unset.
    """
    rows_dim = q.dim() - 3
    rows = q.shape[rows_dim]
    if mask.packed and not rows <= mask.rows <= rows + mask.batch:
        raise ValueError(
            f"q has {rows} rows; expected {max(mask.rows - mask.batch, 0)} to {mask.rows}, as mask has {mask.rows} "
            f"lists and {mask.batch} sequences"
        )
    numbers = (mask.cols, mask.q_block_size, mask.k_block_size, mask.causal)
    out = lse = None
    for chunk in make_chunks(mask._lists, mask.sequences, mask.cols, mask.k_block_size, mask.causal, rows, mask.packed):
        length = chunk.end - chunk.begin
        tensors = (q.narrow(rows_dim, chunk.begin, length), k, v)
        if out is None:
            # What does not fit is refused before anything is launched; bits that nobody reads say how large they are.
            bits = torch.empty(chunk.bits_shape, dtype=torch.int32, device=mask.device)
            ops.check_forward.default(*tensors, bits, mask.sequences, None, *numbers, pack_heads, softmax_scale)
            del bits
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        bits, sequences = chunk.pack()
        sizes = (q.shape[-2], k.shape[-2], q.shape[-1], q.element_size(), pack_heads)
        items = ops.plan_items.default(bits, sequences, *numbers, *sizes)
        part, part_lse, _ = ops.forward.default(
            *tensors, bits, sequences, items, *numbers, pack_heads, softmax_scale, deterministic
        )
        out.narrow(rows_dim, chunk.begin, length).copy_(part)
        if lse is None:
            lse = part_lse.new_empty((*part_lse.shape[:-1], rows))
        lse.narrow(-1, chunk.begin, length).copy_(part_lse)
        del bits, items, part, part_lse  # before the next ones come
    return out, lse
