"""`schedule_of`: a schedule from a plan that was measured at several denoising steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..kernels.records import Backend
from ..planning.measurements import Inexact, Measurement, Tuning, worst
from ..planning.plans import Plan
from ..planning.registry import records_of
from ..planning.sites import Site
from .choices import Choices, candidates_of, several
from .contexts import attention_backend
from .schedules import Schedule


def schedule_of(
    plan: Plan,
    *,
    at: Sequence[int] | None = None,
    steps: int | None = None,
    calls: int | None = None,
    candidates: Choices | None = None,
) -> Schedule:
    """Makes a schedule from a plan that was measured at several denoising steps: in the middle also the quantised and sparse
    kernels whose error is too large only at the first or the last steps.

        plan = attnrewrite.tune_pipeline(pipe, ..., numerics="quantised", max_error=2e-2, at=(0, 0.1, 0.2, 0.5, 0.8, 0.9, 1))
        attnrewrite.set_attention_backend(pipe, attnrewrite.schedule_of(plan), numerics="quantised")

    plan: of `tune_pipeline`, or of `tune(..., inputs=...)`. It takes the edges: its kernels hold at every measured step.
    at: the step of each of the plan's inputs, from 0 on. None: those of `tune_pipeline`.
    steps: the number of all steps. None: that of the pipeline that was tuned; the pipeline's own number counts later on.
    calls: as in `schedule`.
    candidates: names or `Backend` records, as in `tune`: needed for records among the plan's kernels that are no plug-ins.

    The middle goes from one measured step to another, and takes those two between which the times of the plan promise the
    shortest run. Between two measured steps nothing is known: more steps (`at` of `tune_pipeline`) make a longer middle. Where
    nothing is gained every step is of the middle, which is then the plan itself. In a run with another number of steps the
    middle is the same part of it.

    Raises `TypeError` for what is no plan, `ValueError` for a plan that was not measured at several steps, for steps that do
    not fit the plan, for a plan with `max_output_error`, which was tried without the kernels that would be added here;
    also for a kernel whose record is not known here.
    """
    tuning, places, total = _read(plan, at, steps)
    given = candidates_of(candidates, "candidates") if candidates else ()
    records = {each.name: each.on(tuning.machines[0]) for each in given}
    sites = tuple(replace(site, backend=site.backend or records.get(site.chosen or "")) for site in plan.sites)
    plan = replace(plan, sites=sites)  # a plan from a file has no records
    order = sorted(set(places))
    everywhere = _milliseconds(plan.sites)
    best = (total * everywhere, 0, total - 1, plan)
    for number, first in enumerate(order):
        for last in order[number:]:
            inputs = [place for place, step in enumerate(places) if first <= step <= last]
            sites = tuple(_within(site, inputs, tuning.min_gain, records) for site in plan.sites)
            if all(site.chosen == before.chosen for site, before in zip(sites, plan.sites, strict=True)):
                continue
            inside = last - first + 1
            took = inside * _milliseconds(sites) + (total - inside) * everywhere
            if took < best[0]:
                best = (took, first, last, replace(plan, sites=sites))
    _, first, last, middle = best
    return Schedule(attention_backend(plan), several(middle), first, total - 1 - last, steps, calls, total)


def _read(plan: Any, at: Any, steps: Any) -> tuple[Tuning, list[int], int]:
    """How the plan was tuned, the step of each of its inputs, the number of all steps."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is {plan!r} ({type(plan).__name__}): give a plan of attnrewrite.tune_pipeline")
    tuning = plan.tuning
    if tuning is None or tuning.inputs < 2:
        raise ValueError(
            "this plan was not measured at several steps: make one with attnrewrite.tune_pipeline(pipe, ...)"
        )
    if tuning.output is not None:
        raise ValueError(
            "this plan was tuned with max_output_error, which says nothing of the kernels that a schedule adds: tune without it"
        )
    given = tuning.steps if at is None else at
    places = list(given) if isinstance(given, Iterable) else []
    total = tuning.of_steps if steps is None else steps
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise ValueError(f"steps is {steps!r}: give the number of all denoising steps, of which the plan knows nothing")
    right = all(isinstance(step, int) and not isinstance(step, bool) and 0 <= step < total for step in places)
    if len(places) != tuning.inputs or not right:
        raise ValueError(
            f"at is {at!r}: give the step of each of the plan's {tuning.inputs} inputs, from 0 to {total - 1}"
        )
    return tuning, places, total


def _within(site: Site, inputs: Sequence[int], min_gain: float, records: Mapping[str, Backend]) -> Site:
    """The site with the kernels that hold at some of the inputs."""
    measured = tuple(_of_inputs(each, inputs) for each in site.measured)
    now = next((each for each in measured if each.name == site.chosen), None)
    added = [
        each for each, before in zip(measured, site.measured, strict=True) if each.dropped is None and before.dropped
    ]
    fastest = min(added, key=lambda each: each.least, default=None)
    if now is None or fastest is None or not _faster(fastest, now, min_gain):
        return site
    last = sorted(site.decisions, key=lambda each: each[0] == fastest.name)
    record = records.get(fastest.name) or next(iter(records_of(fastest.name)))
    return replace(
        site,
        decisions=tuple(last),
        chosen=fastest.name,
        source=None,
        backend=records.get(fastest.name),
        measured=measured,
        inexact=Inexact.of(record, fastest.error),
    )


def _faster(one: Measurement, other: Measurement, min_gain: float) -> bool:
    """As `choose` decides, from what a plan keeps of the times."""
    if not one.milliseconds or not other.milliseconds:
        return False
    noise = (one.spread or 0.0) + (other.spread or 0.0)
    gains = other.milliseconds / one.milliseconds - 1 > max(min_gain, noise)
    return gains and one.least <= other.least * (1 + min_gain)


def _of_inputs(each: Measurement, inputs: Sequence[int]) -> Measurement:
    """A kernel that was dropped for its error, and holds at these inputs."""
    if each.dropped is None or each.limit is None or not each.rounds:
        return each
    everywhere, here = worst(each.errors), worst(each.errors[number] for number in inputs)
    too_large = everywhere is not None and not everywhere <= each.limit
    if here is None or math.isnan(here) or here > each.limit or not too_large:
        return each
    return replace(each, error=here, dropped=None)


def _milliseconds(sites: Sequence[Site]) -> float:
    """Milliseconds of one call of each site."""
    times = ({each.name: each.least for each in site.measured}.get(site.chosen or "", 0.0) for site in sites)
    return sum(times)
