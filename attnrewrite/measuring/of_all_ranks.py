"""What ranks measured that share a model: each measures on what it has of it, and all choose the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..parallel.agreement import of_all, those_that_choose
from ..parallel.settings import ContextParallel
from ..planning.measurements import Measurement, worst
from ..planning.sites import Site
from .choosing import choose


def chosen_together(site: Site, min_gain: float) -> Site:
    """A site that was measured on a rank's own part, as all ranks measured it. Every rank must ask for the same sites, in the
    same order. The steps of a ring stay: of those a rank may have fewer than another, and chooses for itself.

    min_gain: as in `attnrewrite.tune`.
    """
    ranks = those_that_choose()
    if ranks is None or site.call.logsumexp:
        return site
    (measured,) = measured_by_all(ranks, [site.measured])
    return replace(site, measured=measured, chosen=choice(measured, min_gain), backend=None, source=None)


def measured_by_all(ranks: ContextParallel, sites: Sequence[Sequence[Measurement]]) -> list[tuple[Measurement, ...]]:
    """`combined` for each of several sites, by one exchange. Every rank gives the same sites, in the same order."""
    of_ranks = of_all(ranks, [described(measured) for measured in sites])
    return [combined([measurements(each) for each in of_site]) for of_site in zip(*of_ranks, strict=True)]


def described(measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [each.to_dict() for each in measured]


def measurements(data: Sequence[dict[str, Any]]) -> tuple[Measurement, ...]:
    return tuple(Measurement.from_dict(each) for each in data)


def combined(of_ranks: Sequence[Sequence[Measurement]]) -> tuple[Measurement, ...]:
    """The kernels that the first rank measured, in its order: each with the time of the slowest rank, for which the others
    wait, and with the worst error. A kernel that any rank dropped, or has no measurement of, is dropped."""
    by_name = [{each.name: each for each in of_one} for of_one in of_ranks]
    return tuple(_worst_of([of_one.get(name) for of_one in by_name]) for name in by_name[0])


def _worst_of(found: Sequence[Measurement | None]) -> Measurement:
    known = [each for each in found if each is not None]
    dropped = next((each.dropped for each in known if each.dropped is not None), None)
    if len(known) < len(found):
        dropped = dropped or "another rank has not measured it"
    return replace(
        known[0],
        milliseconds=_largest([each.milliseconds for each in known]),
        spread=_largest([each.spread for each in known]),
        host=_largest([each.host for each in known]),
        error=worst(each.error for each in known),
        errors=tuple(map(worst, zip(*(each.errors for each in known), strict=False))),
        rounds=min(each.rounds for each in known),
        dropped=dropped,
    )


def _largest(numbers: Sequence[float | None]) -> float | None:
    return max((each for each in numbers if each is not None), default=None)


def choice(measured: Sequence[Measurement], min_gain: float) -> str | None:
    """The fastest kernel, or a simpler one that is as fast; "native" where all are dropped, if it was measured: its call is the
    model's own."""
    times = {each.name: [each.milliseconds] for each in measured if each.milliseconds is not None}
    found = choose(measured, times, min_gain)
    return "native" if found is None and any(each.name == "native" for each in measured) else found
