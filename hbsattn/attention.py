"""The attention call: defaults, the mask's work list, one op."""

from typing import Any

import torch
from torch import Tensor

from hbsattn._checks import FLOATS, check_bool, check_is_tensor, check_number, check_softcap, check_tensor
from hbsattn._chunks import attend_in_chunks
from hbsattn._dropout import check_dropout_p, seed_of_call
from hbsattn._ops import kernel_choice, ops
from hbsattn.mask import BlockMask, check_is_mask
from hbsattn.utils import use_kernels

NO_GRADIENTS = (False, False, False)  # of q, k and v
DEVICES = ("cpu", "cuda")
HAS_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from PyTorch 2.9 on

Heads = tuple[int, int, int, int, bool]  # the fields of a CallShape, which takes longer to make
Kernels = tuple[str, int]  # a choice of `use_kernels`: what plans are made for


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    softmax_scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes softmax(softmax_scale * q k^T) v over the pairs of a query and a key that `mask` lets attend.

    Args:
        q: packed (total_q, heads_q, head_dim) or batched (batch, seqlen_q, heads_q, head_dim), as the mask is.
            float16, bfloat16 or float32, on a CPU also float64; any strides with a contiguous last dimension. On CUDA,
            head dims that are no multiple of 8 cost padded copies of q, k, v and out; products of float32 are sums of
            three of TF32, about as exact as float32's own, and an infinity counts as NaN in them. Where PyTorch may
            compute products of float32 in TF32 (`torch.backends.cuda.matmul.fp32_precision = "tf32"`, or what sets the
            same: `allow_tf32`, `torch.set_float32_matmul_precision`), they are single ones of TF32, which take less
            time and have 11 digits. A call reads that setting, and its backward goes by what the call found; a CUDA
            graph keeps what was found at its capture, torch.compile compiles again. A CPU does not read it.
        k, v: (total_k, heads_k, head_dim) or (batch, seqlen_k, heads_k, head_dim), dtype and device of q. heads_q is a
            multiple of heads_k, and query head h reads key head h // (heads_q // heads_k). The head dim of v, which is
            that of out, may be another than that of q and k. On CUDA, calls then take about the time of the greater
            one, but for one of 136 to 192 beside up to 128 of v, as in multi-head latent attention: these cost what
            they compute, unless weights are dropped, scores are capped, blocks are partial or, as `explain` tells, the
            forward is general: for key blocks of no multiple of 16, and for most query blocks below 128 rows, over the
            heads that share a mask.
        mask: on the same device; it may serve any number of calls.
        softmax_scale: above 0, 1 / sqrt(head_dim) by default.
        sinks: (heads_q), float16, bfloat16, float32 or float64. A score of each query head that takes part in the
            softmax of all its queries and has no value, so that their weights sum to less than 1; not a token, as
            `windowed` has them. Finite, or -inf for none, as which any below -1e38 counts; NaN or +inf makes its head
            NaN. lse counts it, so `merge` joins results of which one at most has sinks.
        softcap: a bound of scores, 0 for none: a scaled score s becomes softcap * tanh(s / softcap) before the softmax,
            as in Gemma 2. 0.01 to 1e6, and 1e-7 to 3e7 times softmax_scale. Sinks are not capped.
        dropout_p: the probability with which the weight of a query and a key is dropped after the softmax, at least 0
            and less than 1, rounded to a multiple of 2^-15; the other weights are divided by what it leaves of 1. lse
            is that of all weights. Which are dropped is a function of `dropout_seed`, the number of the sequence, the
            query head and the places of query and key in their sequence, on every device and for every mask:
            `dropout_mask` tells it.
        dropout_seed: int64 (2) on q's device, a seed and an offset. By default the next numbers of PyTorch's generator
            of that device, so that `torch.manual_seed` repeats a call, each replay of a CUDA graph drops other weights,
            and checkpointing drops the same again.
        return_lse: return the log-sum-exp too.
        deterministic: make the gradients of a call bitwise the same in every run, as its results always are, and as
            they always are on a CPU. `torch.use_deterministic_algorithms(True)` asks for it too. On CUDA, backward may
            then take longer, but takes hardly any workspace.

    Gradients flow from out and lse to q, k, v and sinks, in their dtype; what attends to nothing gets 0, whatever its
    own gradients are. Those of tensors that require none are not computed: with k and v frozen, or with q frozen,
    backward takes less time. A NaN in a gradient of out reaches that of its head's sink. On CUDA, backward allocates
    float32 sums, of about the size of q, or of out, if that is greater, besides up to 10 MB, or of several times that
    where blocks of few queries, over the heads that share a mask, are padded to 16 rows; for key blocks below 64, in
    most shapes, of the size of k and v instead; for those of 64 on Hopper, in most shapes, and of float32 for those
    below 64 none; and of k and v, too, where several query heads read a key head of long sequences. The first call with
    gradients plans the work of backward, and later ones with that mask share the plan. Weights come from the
    log-sum-exp in float32: at scores beyond 2^16 gradients lose digits, as they do on CUDA at softcaps near 0.01. A NaN
    or infinity in q or in a gradient of out may reach gradients of all keys in active blocks.

    Rows of packed tensors that no sequence covers get 0, here as in the result, and -inf in lse. Results of a sequence
    do not depend on what lies beside it, but in their last bits where blocks are longer than the mask's longest
    sequence, as which they are taken then. Under autocast, q, k and v are cast as PyTorch's own attention casts them.

    A NaN or infinity in v may reach queries that do not attend to its key, if they share a tile with one that does:
    queries of the same block, or of neighbouring blocks. In k it reaches results only of queries that attend to it, but
    may reach the gradients of all queries in active blocks of its tile, and its own.

    Returns:
        out, shape and dtype of q, but the head dim of v; with `return_lse` (out, lse). lse holds natural logarithms in
        float32 (float64 for float64), (heads_q, total_q) or (batch, heads_q, seqlen_q). A query with nothing to attend
        gets 0 in out, and in lse its head's sink, or -inf without one.

    Raises:
        ValueError, TypeError: for an argument that does not fit; the message says which, its value, and what does.
        NotImplementedError: from a second derivative, from forward-mode derivatives, and from derivatives inside the
            transforms of torch.func.
    """
    options = (softmax_scale, sinks, softcap, dropout_p, dropout_seed, return_lse, deterministic)
    return _attend(q, k, v, mask, *options, True)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    softmax_scale: float | None,
    sinks: Tensor | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    return_lse: bool,
    deterministic: bool,
    pack_heads: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_is_mask(mask)
    check_is_tensor("q", q)
    check_is_tensor("k", k)
    check_is_tensor("v", v)
    q_shape, k_shape = q.shape, k.shape  # of which each makes a tuple
    mask._check_use(q, k, q_shape, k_shape)
    device = "cuda" if q.is_cuda else q.device.type
    if device not in DEVICES:
        raise ValueError(f"q is on {q.device}; expected {' or '.join(DEVICES)}")
    if torch.is_autocast_enabled(device):
        q, k, v = _autocast(q, k, v)
    heads_q, head_dim = q_shape[-2:]
    if softmax_scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0  # the op refuses a head_dim of 0
    else:
        scale = check_number("softmax_scale", softmax_scale)
    if sinks is not None:
        sinks = _to_scores(sinks, heads_q, q.dtype)
    check_bool("return_lse", return_lse)
    check_bool("deterministic", deterministic)
    if type(dropout_p) is not float or dropout_p != 0.0 or dropout_seed is not None:
        dropout_p = check_dropout_p("dropout_p", dropout_p)
        dropout_seed = seed_of_call(dropout_p, dropout_seed, q.device)
    if type(softcap) is not float or softcap != 0.0:
        softcap = check_softcap(softcap)
    altered = dropout_seed is not None or softcap != 0.0  # by kernels of their own
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    needs, trains = NO_GRADIENTS, False  # whether anything does
    if torch.is_grad_enabled():
        needs = (q.requires_grad, k.requires_grad, v.requires_grad)
        trains = needs != NO_GRADIENTS or (sinks is not None and sinks.requires_grad)
    widest = max(head_dim, v.shape[-1]) if v.dim() else head_dim  # the op refuses a v without dimensions
    shape: Heads = (heads_q, k_shape[-2], widest, q.element_size(), pack_heads)
    allow_tf32 = device != "cpu" and q.dtype == torch.float32 and allows_tf32()
    if mask._lists is not None and not trains and dropout_seed is None and not mask._makes_bits():
        numbers = (mask._layout, pack_heads, scale, 0.0, softcap, allow_tf32)
        results = _attend_in_chunks(q, k, v, mask, (mask._rules, None, None, None, sinks, None, *numbers))
        return results if return_lse else results[0]
    tables = (mask._kept_bits(), mask.sequences, mask._rules, mask._partial, mask._matrices, mask._elements)
    numbers = (mask._layout, pack_heads, scale, dropout_p, softcap, allow_tf32)
    call = (q, k, v, *tables, sinks, dropout_seed, *numbers)  # a Call
    items = backward_plan = None
    if device != "cpu":  # which needs no plans
        # A compiled program keeps no plans, and cannot ask.
        kernels = None if torch.compiler.is_compiling() else kernel_choice()
        key = ("items", kernels, shape, altered)
        plan = mask._plans.find(key)
        if plan is not None:
            items = plan[0]
        elif not trains and not torch.compiler.is_compiling():  # which makes one plan of equal ones
            results = _plan_and_attend(mask, key, call)
            return results if return_lse else results[0]
        else:
            # What does not fit is refused before anything is launched, also before the work list is made.
            ops.check_forward.default(*call)
            items = mask._plan(key, lambda mask: _plan_items(mask, *key[1:]))[0]
        if needs != NO_GRADIENTS:
            backward = (kernels, shape, k_shape[-3], deterministic, needs, altered)
            backward_plan = mask._plan(("backward", *backward), lambda mask: _plan_backward(mask, *backward))[0]
    results = ops.forward.default(*call, items, backward_plan, deterministic)
    return results if return_lse else results[0]


@torch.compiler.assume_constant_result  # of which a compiled program is guarded, with PyTorch's other global settings
def allows_tf32() -> bool:
    """Whether PyTorch may compute products of float32 on CUDA in TF32."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if HAS_PRECISION else matmul.allow_tf32


def _plan_and_attend(
    mask: BlockMask, key: tuple[str, Kernels | None, Heads, bool], call: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The first call of its shape, in one op. The mask keeps the work list that comes with the results."""
    version = mask._plans.version()
    out, lse, items = ops.plan_and_forward.default(*call)
    mask._plans.keep(mask, key, (items,), version, lambda mask: _plan_items(mask, *key[1:]))
    return out, lse


def _to_scores(sinks: Tensor, heads_q: int, dtype: torch.dtype) -> Tensor:
    """In the dtype of log-sum-exps."""
    check_tensor("sinks", sinks, (1,), FLOATS)
    if sinks.shape[0] != heads_q:
        raise ValueError(f"sinks has shape ({sinks.shape[0]},); expected ({heads_q},), a score for each head of q")
    return sinks.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as PyTorch's own attention does where autocast is on: float64 stays as it is."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


# `kernels`: whose plan it is, which may be made again under another choice; None: that of the call.


def _plan_items(mask: BlockMask, kernels: Kernels | None, shape: Heads, altered: bool) -> tuple[Tensor]:
    if kernels is not None and kernels != kernel_choice():
        with use_kernels(kernels[0], shared_kilobytes=kernels[1]):
            return _plan_items(mask, None, shape, altered)
    # A forward that alters weights has the tiles of gradients.
    return (ops.plan_items.default(mask._kept_bits(), mask.sequences, mask._rules, mask._layout, shape, altered),)


def _plan_backward(
    mask: BlockMask,
    kernels: Kernels | None,
    shape: Heads,
    rows_k: int,
    deterministic: bool,
    needs: tuple[bool, bool, bool],
    altered: bool,
) -> tuple[Tensor]:
    if kernels is not None and kernels != kernel_choice():
        with use_kernels(kernels[0], shared_kilobytes=kernels[1]):
            return _plan_backward(mask, None, shape, rows_k, deterministic, needs, altered)
    arguments = (mask._rules, mask._layout, shape, rows_k, mask.packed, deterministic, needs, altered)
    return (ops.plan_backward.default(mask._kept_bits(), mask.sequences, *arguments),)


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, numbers: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The call for a mask that stays lists, without gradients."""

    def check(*tensors: Tensor) -> None:
        ops.check_forward.default(*tensors, *numbers)

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if tensors[0].device.type == "cpu":
            return ops.forward.default(*tensors, *numbers, None, None)
        return ops.plan_and_forward.default(*tensors, *numbers)[:2]

    return attend_in_chunks(q, k, v, mask, check, attend)
