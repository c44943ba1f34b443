"""The tasks of a workload as calls: attention alone, its gradients alone, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workloads import Workload


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same tensors, as what gradients are taken of."""
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def make_launch(
    workload: Workload, attend: Callable[[], Tensor], qkv: tuple[Tensor, ...], grad_out: Tensor | None
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """The call to time. For "backward" the forward runs here, once; what the call returns is allocated by it.

    qkv: what `attend` computes with; made by `leaves` if there is a gradient to take.
    """
    if workload.task == "forward":
        return attend

    def train() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(attend(), qkv, grad_out)

    if workload.task == "training":
        return train
    with torch.enable_grad():
        out = attend()
    return lambda: torch.autograd.grad(out, qkv, grad_out, retain_graph=True)
