"""FlexAttention's call, computed by this library: its tensors, its masks, its results."""

from __future__ import annotations

import collections
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbsattn import patterns
from hbsattn._checks import FLOATS, check_bool, check_number, check_tensor, type_name
from hbsattn.attention import block_sparse_attention
from hbsattn.mask import BlockMask

BLOCK = 128  # of masks that let everything attend
KEPT_DENSE = 16  # of those masks
UNLIMITED = 1 << 30  # FlexAttention's BLOCK_SIZE of a mask that is for any lengths

_lock = threading.Lock()  # of whoever adds masks; readers need none
_dense: collections.OrderedDict[Hashable, BlockMask] = collections.OrderedDict()
_converted: dict[int, _Converted] = {}  # by the number of the object


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Computes what torch.nn.attention.flex_attention.flex_attention does, without compiling anything.

    from hbsattn import flex_attention  # in place of torch's

    Args:
        query: (batch, heads_q, q_len, head_dim), of dtypes that `block_sparse_attention` takes. Nothing is copied, but
            for tensors whose last dimension is not contiguous.
        key, value: (batch, heads_k, k_len, head_dim), of which value may have another head dim. A batch of 1 stands for
            that of query, if block_mask has a batch of its own.
        score_mod: None, or a function that returns its score. Others are not supported.
        block_mask: a BlockMask of torch.nn.attention.flex_attention for q_len and k_len, with a batch of 1 or that of
            query and 1 head or heads_q; None: everything attends. The first call with it, on which the device is waited
            for, makes a BlockMask of the same pairs by `BlockMask.from_flex`, which later calls use with all that was
            planned for it, as long as block_mask lives. What block_mask's lists hold may change, what its mask_mod
            reads may not: make another one then. Or a BlockMask of this library, for batched tensors, with which a
            compiled program does not break here.
        scale: above 0, 1 / sqrt(head_dim) by default.
        enable_gqa: lets heads_q be a multiple of heads_k.
        return_lse: return (out, lse).
        kernel_options: of FlexAttention's own kernels. None of them changes results, and none is read.
        return_aux: a torch.nn.attention.flex_attention.AuxRequest, without max_scores: return (out, AuxOutput).

    Returns:
        out: (batch, heads_q, q_len, head_dim of value), a view: in memory heads come after the length. lse, also that
        of an AuxOutput: natural logarithms, float32 (float64 for float64), (batch, heads_q, q_len). A query with
        nothing to attend gets 0 and -inf.

    Gradients flow from both, also on a CPU.

    Raises:
        ValueError, TypeError: for an argument that does not fit; the message says which.
        NotImplementedError: for a score_mod, and max_scores of return_aux.
    """
    _check_tensors(query, key, value, check_bool("enable_gqa", enable_gqa))
    if score_mod is not None and not _is_identity(score_mod):
        raise NotImplementedError(
            f"score_mod is {_name(score_mod)}; expected None: scores are not altered, but by the arguments softcap and "
            "sinks of hbsattn.block_sparse_attention"
        )
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise TypeError(f"kernel_options is a {type_name(kernel_options)}; expected a dict or None")
    if scale is not None and not 0 < (scale := check_number("scale", scale)) < math.inf:
        raise ValueError(f"scale is {scale}; expected a number above 0")
    wants_lse = check_bool("return_lse", return_lse)
    if return_aux is not None:
        wants_lse = _check_aux(return_aux, return_lse)
    batch = query.shape[0]
    if key.shape[0] != batch:
        _check_batch(block_mask, batch, key.shape[0])
        key, value = (x.expand(batch, -1, -1, -1) for x in (key, value))
    mask = block_mask
    if not isinstance(block_mask, BlockMask):
        mask = (_mask_outside if torch.compiler.is_compiling() else _mask_of)(block_mask, query, key)
    q, k, v = (x.transpose(1, 2) if x.stride(-1) == 1 else x.contiguous().transpose(1, 2) for x in (query, key, value))
    result = block_sparse_attention(q, k, v, mask, softmax_scale=scale, return_lse=wants_lse)
    out, lse = result if wants_lse else (result, None)
    out = out.transpose(1, 2)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse)
    return (out, lse) if return_lse else out


def _check_tensors(query: object, key: object, value: object, enable_gqa: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, (4,), FLOATS)
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; expected {query.dtype}, that of query")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}; expected {query.device}, where query is")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head dim {key.shape[-1]}; expected {query.shape[-1]}, that of query")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected {(*key.shape[:-1], value.shape[-1])}, as key")
    heads_q, heads_k = query.shape[1], key.shape[1]
    if not enable_gqa and heads_q != heads_k:
        raise ValueError(f"query has {heads_q} heads and key {heads_k}; expected as many, or enable_gqa=True")
    if heads_k == 0 or heads_q % heads_k != 0:
        raise ValueError(f"query has {heads_q} heads; expected a multiple of the {heads_k} heads of key")


def _check_aux(return_aux: Any, return_lse: bool) -> bool:
    """Whether it asks for lse."""
    if return_lse:
        raise ValueError("return_lse is True and return_aux is given; expected one of them")
    if not (hasattr(return_aux, "lse") and hasattr(return_aux, "max_scores")):
        raise TypeError(f"return_aux is a {type_name(return_aux)}; expected an AuxRequest or None")
    if check_bool("return_aux.max_scores", return_aux.max_scores):
        raise NotImplementedError("return_aux asks for max_scores; expected lse alone")
    return check_bool("return_aux.lse", return_aux.lse)


def _check_batch(block_mask: Any, batch: int, batch_k: int) -> None:
    own = getattr(getattr(block_mask, "kv_num_blocks", None), "shape", (getattr(block_mask, "batch", None),))[0]
    if batch_k != 1 or own != batch:
        raise ValueError(
            f"key has a batch of {batch_k}; expected {batch}, that of query, or 1 beside a block_mask of a batch of "
            f"{batch}"
        )


def _is_identity(score_mod: object) -> bool:
    """Whether a score_mod returns the score as it is, whatever its numbers are: there it cannot have looked at them."""
    if not callable(score_mod):
        raise TypeError(f"score_mod is a {type_name(score_mod)}; expected a function or None")
    score, number = torch.empty((), device="meta"), torch.empty((), dtype=torch.int32, device="meta")
    try:
        return score_mod(score, number, number, number, number) is score
    except Exception:  # of tables on a device, or of no scores: it does something
        return False


def _name(function: object) -> str:
    return getattr(function, "__name__", None) or type_name(function)


def _mask_of(block_mask: Any, query: Tensor, key: Tensor) -> BlockMask:
    batch, heads, q_len, k_len = *query.shape[:3], key.shape[2]
    if block_mask is None:
        return _dense_mask(batch, q_len, k_len, query.device)
    if type_name(block_mask) != "torch.nn.attention.flex_attention.BlockMask":
        raise TypeError(
            f"block_mask is a {type_name(block_mask)}; expected a torch.nn.attention.flex_attention.BlockMask or None"
        )
    if set(_sizes(block_mask)) == {UNLIMITED}:
        from torch.nn.attention.flex_attention import noop_mask

        if block_mask.mask_mod is not noop_mask:
            raise ValueError(
                f"block_mask has a BLOCK_SIZE of {UNLIMITED} and a mask_mod; expected one made for {q_len} and {k_len}"
            )
        return _dense_mask(batch, q_len, k_len, query.device)
    if tuple(block_mask.seq_lengths) != (q_len, k_len):
        raise ValueError(
            f"block_mask was created for lengths {tuple(block_mask.seq_lengths)}; expected {(q_len, k_len)}, those of "
            "query and key"
        )
    counts = block_mask.kv_num_blocks
    if counts.device != query.device:
        raise ValueError(f"block_mask is on {counts.device}; expected {query.device}, where query is")
    if counts.shape[0] not in (1, batch) or counts.shape[1] not in (1, heads):
        raise ValueError(
            f"block_mask has a batch of {counts.shape[0]} and {counts.shape[1]} heads; expected 1 or {batch}, and 1 or "
            f"{heads}, as query has"
        )
    return _convert(block_mask, batch)


_mask_outside = torch.compiler.disable(_mask_of)  # conversions read the device, which no compiled program can


def _sizes(block_mask: Any) -> tuple[int, ...]:
    size = block_mask.BLOCK_SIZE
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _convert(block_mask: Any, batch: int) -> BlockMask:
    name = id(block_mask)
    kept = _converted.get(name)
    if kept is None or not kept.is_of(block_mask):
        kept = _Converted(block_mask)
        with _lock:
            _converted[name] = kept
    mask = kept.masks.get(batch)
    if mask is None:
        mask = kept.masks[batch] = BlockMask.from_flex(block_mask, batch_size=batch)
    return mask


class _Converted:
    """The masks of an object, for each batch. It holds neither the object nor its mask_mod, which may hold it."""

    def __init__(self, block_mask: Any) -> None:
        name = id(block_mask)

        def forget(dead: object) -> None:
            if _converted.get(name) is self:  # and no later object is at its place
                del _converted[name]

        self.owner = weakref.ref(block_mask, forget)
        self.mask_mod = _refer(block_mask.mask_mod)
        self.lists, self.versions = _lists_of(block_mask)
        self.masks: dict[int, BlockMask] = {}

    def is_of(self, block_mask: Any) -> bool:
        """Whether the object is the one, and as it was."""
        if self.owner() is not block_mask or self.mask_mod() is not block_mask.mask_mod:
            return False
        lists, versions = _lists_of(block_mask)
        return versions == self.versions and all(x is y for x, y in zip(lists, self.lists, strict=True))


def _refer(function: Callable[..., Tensor]) -> Callable[[], Any]:
    try:
        return weakref.ref(function)
    except TypeError:  # such as a builtin's
        return lambda: function


def _lists_of(block_mask: Any) -> tuple[tuple[Tensor | None, ...], tuple[Hashable, ...]]:
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    versions = (0 if x is None or x.is_inference() else x._version for x in lists)
    return lists, (*versions, *block_mask.seq_lengths)


def _dense_mask(batch: int, q_len: int, k_len: int, device: torch.device) -> BlockMask:
    key = (batch, q_len, k_len, device)
    mask = _dense.get(key)
    if mask is None:
        blocks = patterns.Blocks(BLOCK, BLOCK, seqlen_q=q_len, seqlen_k=k_len, batch_size=batch, device=device)
        mask = patterns.dense(blocks)
        with _lock:
            _dense[key] = mask
            while len(_dense) > KEPT_DENSE:
                _dense.popitem(last=False)
    return mask
