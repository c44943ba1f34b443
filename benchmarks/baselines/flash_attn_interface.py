"""FlashAttention-3 (flash_attn_interface, its C++ build for Hopper): dense."""

from __future__ import annotations

from collections.abc import Callable

from flash_attn_interface import flash_attn_func
from torch import Tensor

from workloads import HALF, Workload


class FlashAttention3:
    name = "fa3"
    label = "FlashAttention-3, dense"
    dense = True
    differentiable = True
    dtypes = HALF
    windowed = False

    def refusal(self, workload: Workload) -> str | None:
        return None

    def prepare(self, workload: Workload, q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            out = flash_attn_func(q, k, v, causal=workload.causal)
            return out[0] if isinstance(out, tuple) else out  # releases differ in whether the LSE comes along

        return attend


RIVALS = (FlashAttention3(),)
