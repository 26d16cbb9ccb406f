"""Which of the kernels that were timed at one site is chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..planning.measurements import Measurement
from .timing import deviation


def choose(
    measured: Sequence[Measurement], samples: Mapping[str, Sequence[float]], min_gain: float, simplest: str = "native"
) -> str | None:
    """The fastest that was not dropped, or a simpler one that is as fast.

    samples: seconds by name, of the same rounds for all. `simplest` comes first, then all in order; each takes the place of
    the best so far if it is faster by more than `min_gain` and by more than the noise, in the median of the ratios of the
    rounds, and if it is no slower (`least`) in a model that waits for its host: a small kernel that is quick on the GPU and
    slow to launch makes such a model slower. So every change from a simpler kernel is worth it.
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
    """Whether noise hides if one of them is faster than another by `min_gain`: then what is chosen may be slower than the
    fastest by that noise too, and more rounds would tell. Noise of less than half of `min_gain` hides nothing.

    samples: seconds of each kernel, of the same rounds for all.
    """
    fastest = min(samples, key=statistics.median, default=[])
    found = [_gain(each, fastest) for each in samples if each is not fastest]
    return any(noise > min_gain / 2 and abs(gain - min_gain) < noise for gain, noise in found)


def _gain(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """By what part the new one is faster, the median over rounds, and its noise."""
    ratios = [before / after for before, after in zip(old, new, strict=True) if after > 0]
    return (statistics.median(ratios) - 1, deviation(ratios)) if ratios else (0.0, 0.0)
