"""What a call would do: kernels, tiles, the method of gradients, lengths of work lists."""

import torch
from torch import Tensor

import hbsattn._C as _C
from hbsattn._checks import check_bool, check_is_tensor, check_softcap
from hbsattn._dropout import check_dropout_p
from hbsattn._ops import ops
from hbsattn.mask import BlockMask, check_is_mask


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> dict[str, dict[str, object]]:
    """Tells how `block_sparse_attention(q, k, v, mask)` would be computed, without computing it or reading the device.

    Args:
        q, k, v, mask, softcap, dropout_p, deterministic: as for `block_sparse_attention`; sinks change nothing of it.
            Gradients are those of the tensors that require one; of all three if none does.

    Returns:
        {"forward": ..., "backward": ...}. On a CPU each is {"kernel": "cpu"}. On CUDA each has

        * kernel: as in `build_info()["kernels"]`; queries_kernel: a second one, for the gradient of q, or "".
        * pairs_kernel: a second one of the forward, for neighbouring query blocks that turn out to attend alike, or "".
        * method: "forward"; of gradients "by_keys", "by_queries", "by_keys_and_queries", "keys_only",
          "queries_only".
        * general: whether the kernel takes its path for ragged, united or small blocks, which is slower.
        * tile_rows: queries that a thread block keeps, or keys, where gradients go by keys; stage_rows: what it streams
          past them at a time.
        * tile_heads: query heads that share a tile; by keys, that a tile streams.
        * num_items, num_key_items: lengths of the work lists that the call reads, tiles without work included.

    Raises:
        ValueError, TypeError: as `block_sparse_attention`, for what does not fit.
    """
    check_is_mask(mask)
    check_is_tensor("q", q)
    check_is_tensor("k", k)
    check_is_tensor("v", v)
    mask._check_use(q, k, q.shape, k.shape)
    check_bool("deterministic", deterministic)
    softcap, dropout_p = check_softcap(softcap), check_dropout_p("dropout_p", dropout_p)
    if mask._lists is None:  # whose bits may take too much memory
        numbers = (mask._layout, True, 1.0, 0.0, softcap, False)  # whatever the scores are
        tables = (mask._kept_bits(), mask.sequences, mask._rules, mask._partial, mask._matrices, mask._elements)
        ops.check_forward.default(q, k, v, *tables, None, None, *numbers)
    elif v.shape[:-1] != k.shape[:-1] or not 0 < v.shape[-1] <= 256:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; expected {tuple(k.shape)}, that of k, but for a head_dim of 1 to 256"
        )
    if q.device.type == "cpu":
        return {"forward": {"kernel": "cpu"}, "backward": {"kernel": "cpu"}}
    cols, q_block, k_block, causal, partial = mask._layout
    needs = tuple(x.requires_grad for x in (q, k, v))
    with torch.cuda.device(q.device):
        forward, backward = _C.explain(
            str(q.dtype).removeprefix("torch."),
            mask.packed,
            (q.shape[-3], q.shape[-2]),
            (k.shape[-3], k.shape[-2]),
            (q.shape[-1], v.shape[-1]),
            (mask.batch, mask.heads, mask.rows, cols),
            (q_block, k_block),
            bool(causal),
            mask._rules is not None,
            bool(partial),
            deterministic or torch.are_deterministic_algorithms_enabled(),
            needs if any(needs) else (True, True, True),
            softcap,
            dropout_p,
        )
    return {"forward": forward, "backward": backward}
