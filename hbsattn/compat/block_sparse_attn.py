"""The functions of MIT's Block-Sparse-Attention (package block_sparse_attn), with blocks of 128.

from hbsattn.compat.block_sparse_attn import block_sparse_attn_func

Heads are dense, streaming (by blocks or by tokens) or block-sparse in one call, forward and backward; nothing waits for
the device, so head types and masks may live there.
"""

import torch
from torch import Tensor

from hbsattn import patterns
from hbsattn._checks import FLOATS, check_bool, check_same_device, check_tensor
from hbsattn._contents import can_read
from hbsattn._dropout import check_dropout_p
from hbsattn._layout import K_LEN, Q_LEN, UNBOUNDED
from hbsattn._sources import INTEGERS, Dense
from hbsattn.attention import block_sparse_attention
from hbsattn.mask import BlockMask

BLOCK = 128

Result = Tensor | tuple[Tensor, Tensor, None]


def block_sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention over packed sequences whose heads are of several kinds.

    Args:
        q, k, v: (total_q, heads_q, head_dim) and (total_k, heads_k, head_dim), as `block_sparse_attention` takes them.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1).
        head_mask_type: int (heads_q). 0: dense. -1: streaming. 1: block-sparse, by the masks of `base_blockmask` in
            the order of such heads; n above 1: by mask n - 1.
        streaming_info: int (2 * heads_q), for head h the numbers of sink and of local blocks at 2 h and 2 h + 1; None
            if no head streams. Query block r of a sequence sees the first `sink` key blocks and the `local` ones that
            end before ceil(max(len_k - len_q, 0) / 128) + 1 + r - max(len_q - len_k, 0) // 128, or, if not causal, the
            last ones of the sequence. With `exact_streaming`: of tokens.
        base_blockmask: bool, or int of which all but 0 is True, (batch or 1, masks, query blocks, key blocks), of which
            there may be more than are asked for, blocks of each sequence counted from its start; None if no head is
            block-sparse.
        max_seqlen_q_, max_seqlen_k_: the longest sequences, or more.
        p_dropout: `dropout_p` of `block_sparse_attention`, whose random numbers these are; in evaluation 0.
        is_causal: bottom-right aligned.
        exact_streaming: let heads stream by tokens. Query i sees the first `sink` keys, and the `local` ones, at least
            1, that end with key i + len_k - len_q. Causal only.

    Returns:
        out, or with `return_attn_probs` (out, lse, None). lse is (heads_q, total_q), where MIT's is (batch, heads_q,
        max_seqlen_q_) and more; -inf for what attends to nothing. None stands where MIT's has S_dmask:
        `block_sparse_attention` takes a seed, of which `dropout_mask` tells what was dropped.
    """
    p_dropout = check_dropout_p("p_dropout", p_dropout)
    check_bool("is_causal", is_causal)
    if check_bool("exact_streaming", exact_streaming) and not is_causal:
        raise ValueError("exact_streaming is True; expected False, or is_causal: streaming by tokens is causal")
    check_bool("return_attn_probs", return_attn_probs)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, (3,), FLOATS)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks = patterns.Blocks(
        BLOCK,
        BLOCK,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q_,
        max_seqlen_k=max_seqlen_k_,
        causal=is_causal,
    )
    mask = _mask_of_kinds(blocks, q.shape[1], head_mask_type, streaming_info, base_blockmask, exact_streaming)
    options = {"softmax_scale": softmax_scale, "dropout_p": p_dropout, "deterministic": deterministic}
    if not return_attn_probs:
        return block_sparse_attention(q, k, v, mask, **options)
    return *block_sparse_attention(q, k, v, mask, return_lse=True, **options), None


def block_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    return_attn_probs: bool = False,
) -> Result:
    """`block_sparse_attn_func` without block-sparse heads."""
    lengths = (cu_seqlens_q, cu_seqlens_k)
    kinds = (head_mask_type, streaming_info, None, max_seqlen_q_, max_seqlen_k_)
    options = (p_dropout, deterministic, softmax_scale, is_causal, False, return_attn_probs)
    return block_sparse_attn_func(q, k, v, *lengths, *kinds, *options)


def token_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    return_attn_probs: bool = False,
) -> Result:
    """`block_sparse_attn_func` without block-sparse heads and with `exact_streaming`, causal."""
    lengths = (cu_seqlens_q, cu_seqlens_k)
    kinds = (head_mask_type, streaming_info, None, max_seqlen_q_, max_seqlen_k_)
    options = (0.0, deterministic, softmax_scale, True, True, return_attn_probs)
    return block_sparse_attn_func(q, k, v, *lengths, *kinds, *options)


def _mask_of_kinds(
    blocks: patterns.Blocks,
    heads: int,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    exact_streaming: bool,
) -> BlockMask:
    _check_ints("head_mask_type", head_mask_type, heads, blocks, "heads of q")
    if streaming_info is not None:
        units = "tokens" if exact_streaming else "blocks"
        _check_ints("streaming_info", streaming_info, 2 * heads, blocks, f"sink and local {units} of each head of q")
    if base_blockmask is not None:
        check_tensor("base_blockmask", base_blockmask, (4,), (torch.bool, torch.uint8, torch.int8, *INTEGERS))
        check_same_device("base_blockmask", base_blockmask, blocks.device, "cu_seqlens_q")
        batch, rows, cols = blocks.shape
        given = base_blockmask.shape
        if given[0] not in (1, batch) or given[2] < rows or given[3] < cols:
            raise ValueError(
                f"base_blockmask has shape {tuple(given)}; expected ({'1' if batch == 1 else f'{batch} or 1'}, masks, "
                f"{rows} or more, {cols} or more)"
            )
        base_blockmask = base_blockmask[:, :, :rows, :cols] != 0 if given[1] > 0 else None
    if can_read(head_mask_type):
        _check_kinds(head_mask_type, streaming_info, base_blockmask, exact_streaming)
    kinds = head_mask_type.to(torch.int64).view(-1, 1, 1)
    bits = torch.where(kinds == 0, blocks._visible_bits, 0)
    if streaming_info is not None:
        streaming = blocks._visible_bits if exact_streaming else _streaming_bits(blocks, streaming_info)
        bits = torch.where(kinds < 0, streaming, bits)
    if base_blockmask is not None:
        place = blocks._place
        of_masks = Dense(base_blockmask).pack(blocks.sequences, place.rows, place.layout(blocks.causal))
        which = _masks_of_heads(head_mask_type).clamp(0, of_masks.shape[0] - 1)
        bits = torch.where(kinds > 0, of_masks[which], bits)
    mask = blocks._mask(bits)
    if streaming_info is None or not exact_streaming:
        return mask
    sink, local = streaming_info.to(torch.int64).view(-1, 2).unbind(1)
    streams = head_mask_type < 0
    return mask.windowed(
        left=torch.where(streams, local.clamp(min=1) - 1, UNBOUNDED), sink=torch.where(streams, sink, 0)
    )


def _masks_of_heads(head_mask_type: Tensor) -> Tensor:
    """The mask of each block-sparse head, int64 (heads)."""
    kinds = head_mask_type.to(torch.int64)
    ones = kinds == 1
    return torch.where(ones, ones.cumsum(0), kinds) - 1


def _streaming_bits(blocks: patterns.Blocks, streaming_info: Tensor) -> Tensor:
    """int32 (heads, rows, words)."""
    sink, local = streaming_info.to(torch.int64).view(-1, 2, 1).unbind(1)
    lens = blocks.sequences.to(torch.int64).repeat_interleave(blocks.shape[1], dim=0)
    ahead, blocks_k = lens[:, K_LEN] - lens[:, Q_LEN], -(-lens[:, K_LEN] // BLOCK)
    end = blocks_k
    if blocks.causal:
        end = -(-ahead.clamp(min=0) // BLOCK) + 1 + blocks._row - (-ahead).clamp(min=0) // BLOCK
        end = torch.minimum(end, blocks_k)
    begin = end - local.clamp(min=0)
    return blocks._below(begin) ^ blocks._below(end.expand_as(begin)) | blocks._below(sink)


def _check_ints(name: str, value: object, count: int, blocks: patterns.Blocks, what: str) -> None:
    check_tensor(name, value, (1,), INTEGERS)
    check_same_device(name, value, blocks.device, "cu_seqlens_q")
    if value.shape[0] != count:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({count},), the {what}")


def _check_kinds(
    head_mask_type: Tensor, streaming_info: Tensor | None, base_blockmask: Tensor | None, exact_streaming: bool
) -> None:
    """What the tensors hold."""
    kinds = head_mask_type.tolist()
    if min(kinds, default=0) < -1:
        raise ValueError(f"head_mask_type holds {min(kinds)}; expected -1, 0 or the number of a mask")
    if -1 in kinds and streaming_info is None:
        raise ValueError("streaming_info is None; expected sink and local blocks, as a head of head_mask_type streams")
    if streaming_info is not None and streaming_info.numel() and int(streaming_info.min()) < 0:
        raise ValueError(f"streaming_info holds {int(streaming_info.min())}; expected 0 or more")
    if exact_streaming and -1 in kinds and 0 in streaming_info[1::2][head_mask_type < 0]:
        raise ValueError("streaming_info has 0 local tokens; expected 1 or more with exact_streaming")
    if base_blockmask is None and max(kinds, default=0) > 0:
        raise ValueError(
            f"head_mask_type holds {max(kinds)} and there is no base_blockmask; expected 0 or -1 without one"
        )
    masks = 0 if base_blockmask is None else base_blockmask.shape[1]
    wanted = [int(x) + 1 for x, kind in zip(_masks_of_heads(head_mask_type), kinds, strict=True) if kind > 0]
    if max(wanted, default=0) > masks:
        raise ValueError(f"base_blockmask has {masks} masks; expected {max(wanted)}, as head_mask_type is {kinds}")
