"""How times are taken.

A GPU under these loads runs at its power limit, so its clock depends on what ran in the seconds before, and times that
were taken one program after another cannot be compared. Hence *spaced* timing: contestants take turns within one
process, and before each launch the GPU idles, the L2 cache is overwritten, and a spin kernel keeps the stream busy
until the host has enqueued the launch. Back-to-back times, the rates under sustained load, are taken beside it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IDLE_SECONDS = 0.020
FLUSH_BYTES = 256 << 20
SPIN_CYCLES = 2_000_000  # 1 ms or a little more: no GPU's clock is much above 2 GHz
MAX_SPIN_CYCLES = 32 * SPIN_CYCLES
SECONDS_EACH = 3.0  # for one contestant; long ones get fewer samples
FEWEST_SAMPLES = 5

# Dense multiply-adds in 16-bit types, in floating-point operations for one SM in one cycle, by compute capability.
TENSOR_FLOPS_PER_CYCLE = {(8, 0): 2048, (9, 0): 4096}

Launch = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Samples of one contestant in milliseconds. `exposed`: the launch waits for the GPU, so host time is included."""

    samples: tuple[float, ...]
    exposed: bool

    @property
    def ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """How far the median is above the best sample, as a share of it."""
        return self.ms / self.best - 1


class Timer:
    """Takes times on one device. The functions it is given launch work on the current stream."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._random = random.Random(seed)

    def spaced(self, contestants: Mapping[str, Launch], samples: int) -> dict[str, Times]:
        """Times contestants in turns, each round in another order."""
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        spin = dict.fromkeys(contestants, SPIN_CYCLES)
        wanted = {}
        for name, launch in contestants.items():
            self._sample(launch, SPIN_CYCLES)  # warm-up: the first call loads modules and fills the allocator's cache
            ms, hidden = self._sample(launch, SPIN_CYCLES)
            while not hidden and spin[name] < MAX_SPIN_CYCLES:
                spin[name] *= 2
                ms, hidden = self._sample(launch, spin[name])
            affordable = int(SECONDS_EACH / (1e-3 * ms + IDLE_SECONDS))
            wanted[name] = min(samples, max(affordable, FEWEST_SAMPLES))
        exposed = dict.fromkeys(contestants, False)
        enabled = gc.isenabled()
        gc.disable()
        try:
            for round_number in range(samples):
                order = [name for name in contestants if round_number < wanted[name]]
                self._random.shuffle(order)
                for name in order:
                    ms, hidden = self._sample(contestants[name], spin[name])
                    if not hidden and spin[name] < MAX_SPIN_CYCLES:  # the host was held up; once more
                        ms, hidden = self._sample(contestants[name], 4 * spin[name])
                    exposed[name] |= not hidden
                    taken[name].append(ms)
        finally:
            if enabled:
                gc.enable()
        return {name: Times(tuple(values), exposed[name]) for name, values in taken.items()}

    def back_to_back(self, launch: Launch, warmup_ms: float = 25.0, measure_ms: float = 100.0) -> float:
        """The median time of launches that follow one another, with an L2 flush between two."""
        time.sleep(0.15)
        _, ms = self._series(launch, 3)
        self._series(launch, _clamp(warmup_ms / ms, 1, 200))
        values, _ = self._series(launch, _clamp(measure_ms / ms, 3, 500))
        return statistics.median(values)

    def span(self, launch: Launch, iterations: int, repeats: int) -> tuple[float, float] | None:
        """Milliseconds of one launch among many that are enqueued before the first begins, so that the GPU never waits
        for the host: its time from the begin of the first to the end of the last, and the host's to enqueue them.
        None if that is impossible, because something in a launch waits for the GPU.
        """
        gpu, host = [], []
        cycles = SPIN_CYCLES * 4
        launch()
        while len(gpu) < repeats:
            torch.cuda.synchronize()
            time.sleep(IDLE_SECONDS)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            start.record()
            begin = time.perf_counter()
            for _ in range(iterations):
                launch()
            enqueued = time.perf_counter() - begin
            behind = not start.query()
            end.record()
            torch.cuda.synchronize()
            if behind:
                gpu.append(start.elapsed_time(end) / iterations)
                host.append(1e3 * enqueued / iterations)
            elif iterations > 1:
                # Either the spin was too short, or the queue of launches was full and the host had to wait.
                cycles = min(2 * cycles, 100 * SPIN_CYCLES)
                if cycles == 100 * SPIN_CYCLES:
                    iterations //= 2
            else:
                return None
        return statistics.median(gpu), statistics.median(host)

    def cycles(self, launch: Callable[[], Tensor], samples: int) -> float:
        """The cycles of the SM that takes longest, by its own clock.

        launch: returns int64 (rows, 2), the clock of an SM where it begins and where it ends; rows of none are 0.
        """
        values = []
        for _ in range(samples):
            self._prepare(SPIN_CYCLES)
            clocks = launch()
            values.append(int((clocks[:, 1] - clocks[:, 0]).max()))
        return float(statistics.median(values))

    def _prepare(self, spin: int) -> None:
        torch.cuda.synchronize()
        time.sleep(IDLE_SECONDS)
        self._flush.zero_()
        torch.cuda._sleep(spin)

    def _sample(self, launch: Launch, spin: int) -> tuple[float, bool]:
        """The milliseconds of one launch, and whether all of it was enqueued before the GPU got there."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._prepare(spin)
        start.record()
        launch()
        hidden = not start.query()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), hidden

    def _series(self, launch: Launch, count: int) -> tuple[list[float], float]:
        """Milliseconds of each of `count` launches, and of a launch and its flush on average."""
        pairs = []
        begin = time.perf_counter()
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            launch()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs], 1e3 * (time.perf_counter() - begin) / count


def measure_memory(launch: Callable[[], Tensor | tuple[Tensor, ...]]) -> int:
    """Bytes that a call allocates at its peak, beyond the tensors that it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = launch()
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in ((results,) if isinstance(results, Tensor) else results))
    return torch.cuda.max_memory_allocated() - before - returned


def _clamp(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))
