"""Results over disjoint sets of keys, put together."""

import torch
from torch import Tensor

from hbsattn._checks import FLOATS, check_same_device, check_tensor


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Puts two results of the same queries over disjoint keys together, as if one call had seen all keys.

    Args:
        out, other_out: packed (total, heads, head_dim) or batched (batch, length, heads, head_dim), of one dtype.
        lse, other_lse: their log-sum-exp, float32 or float64, (heads, total) or (batch, heads, length).

    Sinks count as a key: one of the two at most may have them.

    Weights are exp(lse) over the sum of both, computed in lse's dtype. A query that attends to nothing on one side has
    0 and -inf there, and the other's result here. Gradients flow to all four.

    Returns:
        (out, lse), shapes and dtypes as given.
    """
    check_tensor("out", out, (3, 4), FLOATS)
    check_tensor("lse", lse, (out.dim() - 1,), FLOATS[2:])
    *lead, length, heads, _ = out.shape
    if tuple(lse.shape) != (*lead, heads, length):
        raise ValueError(f"lse has shape {tuple(lse.shape)}; expected {(*lead, heads, length)}, by the shape of out")
    for name, tensor, given in (("other_out", other_out, out), ("other_lse", other_lse, lse)):
        check_tensor(name, tensor, (given.dim(),), (given.dtype,))
        check_same_device(name, tensor, given.device, name.removeprefix("other_"))
        if tensor.shape != given.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(given.shape)}")
    check_same_device("lse", lse, out.device, "out")
    # The result does not depend on what the exponents are less, so no gradient flows through it.
    largest = torch.maximum(lse, other_lse).detach()
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (lse - largest).exp(), (other_lse - largest).exp()
    total = weights[0] + weights[1]
    empty = total == 0
    total = total.masked_fill(empty, 1)
    shares = ((weight / total).transpose(-1, -2).unsqueeze(-1) for weight in weights)
    merged = sum(share * x.to(lse.dtype) for share, x in zip(shares, (out, other_out), strict=True))
    return merged.to(out.dtype), (largest + total.log()).masked_fill(empty, -torch.inf)
