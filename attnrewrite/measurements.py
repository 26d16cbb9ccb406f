"""`Measurement`: what was found out about one kernel at one site; and which of them is chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .timing import deviation


@dataclass(frozen=True)
class Measurement:
    """milliseconds: the median of `rounds` samples; None where nothing was timed. spread: two standard errors of that
    median, in parts of it. error: |out - ref| / |ref| against float64 on the site's own tensors; None under dropout.
    dropped: why it cannot be chosen; a kernel may be timed and still be too inexact."""

    name: str
    milliseconds: float | None = None
    spread: float | None = None
    error: float | None = None
    rounds: int = 0
    dropped: str | None = None

    def __str__(self) -> str:
        parts = [] if self.milliseconds is None else [f"{self.milliseconds:.4g} ms"]
        parts += [f"+- {self.spread:.1%}"] if self.milliseconds is not None and self.rounds > 1 else []
        parts += [] if self.error is None else [f"error {self.error:.1e}"]
        parts += [] if self.dropped is None else [self.dropped]
        return f"{self.name}: {', '.join(parts)}"


def choose(
    measured: Sequence[Measurement], samples: Mapping[str, Sequence[float]], min_gain: float, simplest: str = "native"
) -> str | None:
    """The fastest that was not dropped, or a simpler one that is as fast.

    samples: seconds by name, of the same rounds for all. As fast is what takes, in the median over the rounds, at most
    `min_gain` longer than the fastest, or no more longer than the noise of that ratio. `simplest` comes before all others,
    which are in order.
    """
    able = [each for each in measured if each.dropped is None and each.name in samples]
    if not able:
        return None
    fastest = min(able, key=lambda each: statistics.median(samples[each.name]))
    for each in sorted(able, key=lambda each: each.name != simplest):
        ratios = [one / best for one, best in zip(samples[each.name], samples[fastest.name], strict=True) if best > 0]
        if not ratios or statistics.median(ratios) - 1 <= max(min_gain, deviation(ratios)):
            return each.name
    return fastest.name
