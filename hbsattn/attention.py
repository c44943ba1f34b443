"""The attention call: defaults, the mask's work list, one op."""

import torch
from torch import Tensor

from hbsattn._checks import check_bool, check_is_tensor, check_number
from hbsattn._chunks import attend_in_chunks
from hbsattn._ops import ops
from hbsattn.mask import BlockMask, check_is_mask


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
    check_is_mask(mask)
    mask._check_use(q, k)
    check_is_tensor("v", v)
    heads_q, head_dim = q.shape[-2:]
    if softmax_scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0  # the op refuses a head_dim of 0
    else:
        scale = check_number("softmax_scale", softmax_scale)
    check_bool("return_lse", return_lse)
    check_bool("deterministic", deterministic)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    sizes = (heads_q, k.shape[-2], head_dim, q.element_size(), pack_heads)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))

    def check(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, sequences: Tensor) -> None:
        ops.check_forward.default(q, k, v, bits, sequences, None, *mask._numbers, pack_heads, scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, sequences: Tensor, items: Tensor) -> tuple[Tensor, ...]:
        numbers = (*mask._numbers, pack_heads, scale, deterministic)
        return ops.forward.default(q, k, v, bits, sequences, items, *numbers)[:2]

    def attend_chunk(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, sequences: Tensor) -> tuple[Tensor, ...]:
        return attend(q, k, v, bits, sequences, ops.plan_items.default(bits, sequences, *mask._numbers, *sizes))

    if mask._lists is not None and not trains and not mask._makes_bits():
        out, lse = attend_in_chunks(q, k, v, mask, check, attend_chunk)
    else:
        bits = mask._kept_bits()
        items = mask._cached_items(*sizes)
        if items is None:
            # What does not fit is refused before anything is launched, also before the work list is made.
            check(q, k, v, bits, mask.sequences)
            items = mask._items(*sizes)
        out, lse = attend(q, k, v, bits, mask.sequences, items)
    return (out, lse) if return_lse else out
