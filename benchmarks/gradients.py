"""The tasks of a workload as calls: attention alone, its gradients alone, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workloads import Workload


def leaves(workload: Workload, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same q, k and v for the workload's task: those that gradients are taken of require them."""
    if workload.task == "forward":
        return tensors
    trained = (name not in workload.frozen for name in "qkv")
    return tuple(tensor.detach().requires_grad_(needs) for tensor, needs in zip(tensors, trained, strict=True))


def make_launch(
    workload: Workload, attend: Callable[[], Tensor], qkv: tuple[Tensor, ...], grad_out: Tensor | None
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """The call to time. For "backward" the forward runs here, once; what the call returns is allocated by it.

    qkv: what `attend` computes with, made by `leaves`.
    """
    if workload.task == "forward":
        return attend

    trained = [x for x in qkv if x.requires_grad]

    def train() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(attend(), trained, grad_out)

    if workload.task == "training":
        return train
    with torch.enable_grad():
        out = attend()
    return lambda: torch.autograd.grad(out, trained, grad_out, retain_graph=True)
