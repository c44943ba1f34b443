"""The CPU backend: the ops in plain torch. It computes from the mask alone and knows no work list."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hbsattn._cpu.attend import attend, differentiate
from hbsattn._cpu.pack import pack_csr, pack_dense, pack_indices
from hbsattn._layout import Call, takes_call

torch.library.impl("hbsattn::pack_dense", "CPU", pack_dense)
torch.library.impl("hbsattn::pack_indices", "CPU", pack_indices)
torch.library.impl("hbsattn::pack_csr", "CPU", pack_csr)


@torch.library.impl("hbsattn::forward", "CPU")
@takes_call
def forward(
    call: Call, items: Tensor | None, backward_plan: Tensor | None, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    torch.ops.hbsattn.check_forward(*call)
    return attend(call)


@torch.library.impl("hbsattn::backward", "CPU")
@takes_call
def backward(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: Tensor | None,
    deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if needs[3] and call.sinks is None:
        raise ValueError("sinks is None, and its gradient is needed; expected a tensor")
    results = (grad_out, grad_lse, out, lse)
    torch.ops.hbsattn.check_backward(*call, *results)
    grads = differentiate(call, *results)
    return tuple(grad if needed else grad.new_empty(0) for grad, needed in zip(grads, needs, strict=True))
