"""Chooses one of the kernels that were timed at a site."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..planning.measurements import Measurement
from .timing import deviation


def choose(
    measured: Sequence[Measurement], samples: Mapping[str, Sequence[float]], min_gain: float, simplest: str = "native"
) -> str | None:
    """Returns the name of the fastest kernel, or of a simpler one that is as fast; None if every kernel was dropped.

    measured: the kernels, the simpler ones first.
    samples: seconds of each kernel by name, from the same rounds for all.
    min_gain: the least gain that counts, as a fraction: 0.02 is 2 %.
    simplest: the name of the kernel that comes before all others.

    A kernel replaces the best so far if it is faster by more than `min_gain` and by more than the noise, in the median of the
    rounds' ratios, and if it is no slower (`least`) in a model that waits for its host: a small kernel that is quick on the
    GPU and slow to launch makes such a model slower.
    """
    able = {each.name: each for each in measured if each.dropped is None and each.name in samples}
    best: Measurement | None = None
    for found in sorted(able.values(), key=lambda each: each.name != simplest):
        if best is None:
            best = found
            continue
        gain, noise = _gain(samples[best.name], samples[found.name])
        if gain > max(min_gain, noise) and found.least <= best.least * (1 + min_gain):
            best = found
    return None if best is None else best.name


def undecided(samples: Sequence[Sequence[float]], min_gain: float) -> bool:
    """Whether noise hides if the fastest kernel beats another by `min_gain`. The chosen kernel may then be slower than the
    fastest by that noise, and more rounds would tell. Noise below half of `min_gain` hides nothing.

    samples: seconds of each kernel, from the same rounds for all.
    """
    fastest = min(samples, key=statistics.median, default=[])
    found = [_gain(each, fastest) for each in samples if each is not fastest]
    return any(noise > min_gain / 2 and abs(gain - min_gain) < noise for gain, noise in found)


def _gain(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """The gain of `new` over `old` as a fraction (median over the rounds), and the noise of that median."""
    ratios = [before / after for before, after in zip(old, new, strict=True) if after > 0]
    return (statistics.median(ratios) - 1, deviation(ratios)) if ratios else (0.0, 0.0)
