"""The CPU backend: the ops in plain torch. It computes from the mask alone and knows no work list."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hbsattn._cpu.attend import MaskTensors, attend, differentiate
from hbsattn._cpu.pack import pack_csr, pack_dense, pack_indices

torch.library.impl("hbsattn::pack_dense", "CPU", pack_dense)
torch.library.impl("hbsattn::pack_indices", "CPU", pack_indices)
torch.library.impl("hbsattn::pack_csr", "CPU", pack_csr)


@torch.library.impl("hbsattn::forward", "CPU")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    sequences: Tensor,
    items: Tensor | None,
    backward_plan: Tensor | None,
    layout: Sequence[int],
    pack_heads: bool,
    softmax_scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    torch.ops.hbsattn.check_forward(q, k, v, bits, sequences, layout, pack_heads, softmax_scale)
    return attend(q, k, v, MaskTensors(bits, sequences, *layout), softmax_scale)


@torch.library.impl("hbsattn::backward", "CPU")
def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    sequences: Tensor,
    plan: Tensor | None,
    layout: Sequence[int],
    pack_heads: bool,
    softmax_scale: float,
    deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    saved = (q, k, v, out, lse)
    torch.ops.hbsattn.check_backward(grad_out, grad_lse, *saved, bits, sequences, layout, pack_heads, softmax_scale)
    grads = differentiate(grad_out, grad_lse, *saved, MaskTensors(bits, sequences, *layout), softmax_scale)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, needs, strict=True))
