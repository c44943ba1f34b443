"""HBSAttention: one call with the mask as booleans, in the positional form of the Triton package of the same name."""

from torch import Tensor

from hbsattn._checks import check_is_tensor
from hbsattn._placement import CU_SEQLENS
from hbsattn.attention import _attend
from hbsattn.mask import BlockMask


def HBSAttention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q_seqlens: Tensor,
    cu_k_seqlens: Tensor,
    block_mask: Tensor,
    q_block_size: int,
    k_block_size: int,
    causal: bool,
    softmax_scale: float | None,
    tile_mode: str = "auto",
    num_q_block: int | None = None,
    cu_q_block: Tensor | None = None,
    q_block_to_batch: Tensor | None = None,
    cu_num_q_block: Tensor | None = None,
    num_k_block: int | None = None,
    cu_k_block: Tensor | None = None,
    k_block_to_batch: Tensor | None = None,
    cu_num_k_block: Tensor | None = None,
) -> Tensor:
    """Block-sparse attention over packed tensors. For several calls with one mask, `BlockMask` and
    `block_sparse_attention` pack and plan it once.

    Args:
        q, k, v: (total_q, heads_q, head_dim) and (total_k, heads_k, head_dim); that of v may be another.
        cu_q_seqlens, cu_k_seqlens: int32 (batch + 1).
        block_mask: bool (heads, query blocks of all sequences, key blocks of all sequences) with 1, heads_k or heads_q
            heads; what lies outside the block diagonal of the sequences is ignored.
        softmax_scale: None for 1 / sqrt(head_dim).
        tile_mode: "auto" lets the query heads that share a mask and a key head share tiles, "fix" gives each its own.
        num_q_block, ..., cu_num_k_block: accepted and ignored; the plan is made on the device.

    Returns:
        (total_q, heads_q, head dim of v), dtype of q.
    """
    if tile_mode not in ("auto", "fix"):
        raise ValueError(f"tile_mode is {tile_mode!r}; expected 'auto' or 'fix'")
    check_is_tensor("cu_q_seqlens", cu_q_seqlens, CU_SEQLENS)
    check_is_tensor("cu_k_seqlens", cu_k_seqlens, CU_SEQLENS)
    mask = BlockMask.from_dense(
        block_mask,
        q_block_size,
        k_block_size,
        cu_seqlens_q=cu_q_seqlens,
        cu_seqlens_k=cu_k_seqlens,
        causal=causal,
    )
    return _attend(q, k, v, mask, softmax_scale, None, 0.0, 0.0, None, False, False, tile_mode == "auto")
