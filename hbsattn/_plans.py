"""What is made from a mask once and then used by many calls, and when a call may use what an earlier one has made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

Plan = tuple[Tensor, ...]
Maker = Callable[["BlockMask"], Plan]

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # absent where PyTorch has no CUDA
_tracing_state = torch._C._get_tracing_state
_count_modes = torch._C._len_torch_dispatch_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_NOTHING = contextlib.nullcontext()
_lock = threading.Lock()  # of whoever adds or rewrites plans; readers need none


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph takes what is launched now on the current stream of a device."""
    if device.type != "cuda" or is_compiling() or not torch.cuda.is_initialized():
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def is_traced(*tensors: Tensor) -> bool:
    """Whether these tensors have no values that a program could read or keep: they are a tracer's, or a transform's."""
    if is_compiling() or _tracing_state() is not None:
        return True
    if _count_modes() > 0:
        modes = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)):
            return True
    return any([type(tensor) is not Tensor or _is_wrapped(tensor) for tensor in tensors])  # faster than a generator


def is_transforming() -> bool:
    """Whether a function transform, such as `torch.func.grad` or `vmap`, runs the program."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def normal_tensors() -> contextlib.AbstractContextManager:
    """What is made inside can be saved for backward later, and counts its versions, in inference mode too."""
    if is_compiling():
        return contextlib.nullcontext()
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


class _Made:
    """A plan, how to make it again, and the version of the contents that it belongs to."""

    __slots__ = ("event", "is_pending", "is_recorded", "make", "tensors", "version")

    def __init__(self, tensors: Plan, version: int, make: Maker, on_device: bool) -> None:
        self.tensors = tensors
        self.version = version
        self.make = make
        self.event: torch.cuda.Event | None = None  # of the making; one for good, as graphs may wait for it
        self.is_pending = on_device  # whether the making may still be under way
        self.is_recorded = False  # whether the event happens behind it

    def record(self, device: torch.device) -> None:
        """Notes that the plan is made by what was launched up to now."""
        if device.type == "cuda":
            if self.event is None:
                # A graph that waits for an external event does so at each replay.
                self.event = torch.cuda.Event(external=True)
            self.event.record(torch.cuda.current_stream(device))
            self.is_pending = self.is_recorded = True

    def settle(self, device: torch.device) -> None:
        """Asks whether the plan is there, on the stream that made it. A capture may not ask.

        The event is recorded at the first use after the making: one-shot masks, which have none, save it.
        """
        if is_capturing(device):
            return
        if not self.is_recorded:
            self.record(device)
        elif self.event.query():
            self.is_pending = False


class Plans:
    """Plans made from the contents of a mask: `contents`, two to four tensors one of which changes if anything does.

    A plan is good for the contents of its version, which counts writes to the tensors. Each stream makes its own:
    nothing orders one stream's use after another's making. A plan that is made anew takes the memory of the one before:
    CUDA graphs read it there.
    """

    def __init__(self, contents: tuple[Tensor, ...]) -> None:
        self._first, self._second, *more = contents
        self._third = more[0] if more else self._second
        self._fourth = more[1] if len(more) > 1 else self._second
        self._device = self._first.device
        on_cuda = self._device.type == "cuda" and type(self._first) is Tensor
        self._stream_device = self._device.index if on_cuda else None
        self._made: dict[int, dict[Hashable, _Made]] = {}  # of each stream

    def _version(self) -> int:
        # Versions only grow, and so does their sum.
        return self._first._version + self._second._version + self._third._version + self._fourth._version

    def _contents(self) -> tuple[Tensor, ...]:
        return self._first, self._second, self._third, self._fourth

    def _stream(self) -> int:
        return 0 if self._stream_device is None else _raw_stream(self._stream_device)

    def find(self, key: Hashable) -> Plan | None:
        """What an earlier call has made from these contents, if the current stream may use it as it is."""
        # A compiled program could not tell whether the contents have changed since it was compiled.
        if is_compiling() or not self._made:
            return None
        # All calls come this way: `_stream` and `_version`, written out.
        index = self._stream_device
        plans = self._made.get(0 if index is None else _raw_stream(index))
        made = None if plans is None else plans.get(key)
        if made is not None and made.version == (
            self._first._version + self._second._version + self._third._version + self._fourth._version
        ):
            if made.is_pending:
                made.settle(self._device)
            return made.tensors
        return self._find_of_other_stream(key) if is_capturing(self._device) else None

    def _find_of_other_stream(self, key: Hashable) -> Plan | None:
        """For a capture: what another stream has made and used. If it may not be done yet, the graph waits for it."""
        version = self._version()
        for plans in list(self._made.values()):
            made = plans.get(key)
            if made is not None and made.version == version and (made.is_recorded or not made.is_pending):
                if made.is_pending:
                    with torch.cuda.device(self._device):
                        torch.cuda.current_stream().wait_event(made.event)
                return made.tensors
        return None

    def find_or_make(self, mask: BlockMask, key: Hashable, make: Maker) -> Plan:
        """`make` takes the mask and may use its other plans; it is kept, so it may not hold the mask."""
        plan = self.find(key)
        if plan is not None:
            return plan
        version = self.version()
        with normal_tensors():
            plan = make(mask)
        return self.keep(mask, key, plan, version, make)

    def version(self) -> int | None:
        """What to tell `keep`, asked before a plan is made. None: what is made now belongs to no version."""
        if is_compiling() or any(x.is_inference() for x in self._contents()):
            return None
        return self._version()

    def keep(self, mask: BlockMask, key: Hashable, plan: Plan, version: int | None, make: Maker) -> Plan:
        """Keeps for later calls what was made, of normal tensors, if they may use it. `make`: as in `find_or_make`.

        Returns the plan, or that of another thread which was faster.
        """
        # Captured, a plan has no values yet; one of contents that a graph rewrites has others after each replay.
        if version is None or is_transforming() or mask._replayed or is_capturing(self._device):
            return plan
        if is_traced(*plan, *self._contents()):
            return plan
        return self._keep(key, plan, version, make)

    def _keep(self, key: Hashable, plan: Plan, version: int, make: Maker) -> Plan:
        with _lock:
            plans = self._made.setdefault(self._stream(), {})
            made = plans.get(key)
            if made is not None and made.version == version:
                return made.tensors  # another thread was faster
            if made is None:
                made = _Made(plan, version, make, self._device.type == "cuda")
            else:
                _rewrite(made, plan, version)
                made.is_pending, made.is_recorded = self._device.type == "cuda", False
            plans[key] = made
            return made.tensors

    def remake(self, mask: BlockMask) -> None:
        """Makes all plans again, on the current stream, in the memory where they are."""
        fresh: dict[Hashable, Plan] = {}
        for plans in list(self._made.values()):
            # A plan that another one needs was made, and so is found, before it.
            for key, made in list(plans.items()):
                if key not in fresh:
                    with normal_tensors():
                        fresh[key] = made.make(mask)
                with _lock:
                    _rewrite(made, fresh[key], self._version())
                    if not is_capturing(self._device):
                        made.record(self._device)


def _rewrite(made: _Made, plan: Plan, version: int) -> None:
    with torch.no_grad():
        for old, new in zip(made.tensors, plan, strict=True):
            old.copy_(new)
    made.version = version
