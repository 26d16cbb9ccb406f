"""Times a call: by CUDA events on a GPU, by a clock on the CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..graphs.devices import pause_gpu

Call = Callable[[], object]

# Seconds that a sample lasts, about: it repeats the call as often as that takes.
SAMPLE = {"cuda": 3e-3, "cpu": 5e-3}
MOST_CALLS = 100  # in one sample


class Stopwatch:
    """Times calls on one device. On a GPU the calls of a sample are queued behind a pause that lasts until all are queued: a
    sample measures the GPU's time, as in a model that keeps the GPU busy, and not the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def settle(self) -> None:
        """Waits for the kernels that were launched, and raises their errors."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host(self, call: Call) -> float:
        """Seconds that the host needs to launch a call on an idle GPU, the least of five. On a CPU: 0."""
        if self.device.type != "cuda":
            return 0.0
        least = math.inf
        for _ in range(5):
            self.settle()
            started = time.perf_counter()
            call()
            least = min(least, time.perf_counter() - started)
        self.settle()
        return least

    def calls(self, seconds: float) -> int:
        """The number of calls in a sample, for calls that take `seconds` each."""
        wanted = SAMPLE.get(self.device.type, SAMPLE["cpu"])
        return max(1, min(MOST_CALLS, math.ceil(wanted / max(seconds, 1e-9))))

    def sample(self, call: Call, calls: int) -> float:
        """The mean seconds of one call, over `calls` calls in a row."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - started) / calls
        self.settle()
        started = time.perf_counter()
        call()
        host = time.perf_counter() - started
        self.settle()
        pause_gpu(2e-4 + 1.5 * host * calls)
        return self._between_events(call, calls)

    def span(self, call: Call) -> float:
        """Seconds from the start of one call on the device to its end, with the time in which the device waits for the host."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        return self._between_events(call, 1)

    def _between_events(self, call: Call, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        self.settle()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / calls


def deviation(values: Sequence[float]) -> float:
    """Two standard errors of the median, estimated from the interquartile range, which outliers do not affect. Of fewer than
    four values: the largest minus the smallest."""
    if len(values) < 4:
        return max(values) - min(values) if values else 0.0
    first, _, third = statistics.quantiles(values, n=4)
    sigma = (third - first) / 1.349
    return 2 * 1.2533 * sigma / math.sqrt(len(values))
