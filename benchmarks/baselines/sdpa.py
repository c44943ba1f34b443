"""Dense attention by torch.nn.functional.scaled_dot_product_attention: cuDNN and FlashAttention-2 and, of float32, what
is called memory-efficient there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from workloads import HALF, Workload


class Sdpa:
    dense = True
    differentiable = True
    windowed = False

    def __init__(self, name: str, label: str, backend: SDPBackend, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
        self.dtypes = dtypes
        self.name = name
        self.label = label
        self._backend = backend

    def refusal(self, workload: Workload) -> str | None:
        return None

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = workload.heads != workload.heads_k

        def attend() -> Tensor:
            with sdpa_kernel(self._backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=workload.causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return attend


RIVALS = (
    Sdpa("cudnn", "cuDNN, dense", SDPBackend.CUDNN_ATTENTION),
    Sdpa("fa2", "FlashAttention-2, dense", SDPBackend.FLASH_ATTENTION),
    Sdpa("efficient", "memory-efficient, dense", SDPBackend.EFFICIENT_ATTENTION, (torch.float32,)),
)
