"""What is made from a mask once and then used by many calls, and when a call may use what an earlier one has made."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Plan = tuple[Tensor, ...]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes what is launched now."""
    return not torch.compiler.is_compiling() and device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """Identifies the current stream of a device."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return 0
    return torch.cuda.current_stream(device).cuda_stream


class Plans:
    """Plans made from something on `device`. Each stream makes its own: nothing orders one stream's use after another's
    making.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured = is_capturing(device)  # whether what plans are made from gets its values when a graph runs
        self._made: dict[tuple[Hashable, int], Plan] = {}

    def find(self, key: Hashable) -> Plan | None:
        """What an earlier call has made, if the current stream may use it as it is."""
        plan = self._made.get((key, _stream(self._device)))
        if plan is None and self._made and is_capturing(self._device):
            # A capture begins with a synchronization, so what any stream has made is there.
            plan = next((plan for (other, _), plan in self._made.items() if other == key), None)
        return plan

    def find_or_make(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        plan = self.find(key)
        if plan is None:
            plan = make()
            # Traced or captured, it has no values yet; those of captured bits change when the graph is replayed.
            traced = torch.compiler.is_compiling() or any(type(tensor) is not Tensor for tensor in plan)
            if not (traced or self._captured or is_capturing(self._device)):
                self._made[(key, _stream(self._device))] = plan
        return plan


def plans_beside(items: Tensor) -> Plans:
    """The plans of the backward pass that belong to a work list of the forward pass; called once where that is made.

    They are kept with its memory, which goes through autograd as it is, though perhaps as another tensor, and so live
    as long as the list does.
    """
    if torch.compiler.is_compiling() or type(items) is not Tensor:
        return Plans(items.device)
    storage = items.untyped_storage()
    if not hasattr(storage, "hbsattn_plans"):
        storage.hbsattn_plans = Plans(items.device)
    return storage.hbsattn_plans
