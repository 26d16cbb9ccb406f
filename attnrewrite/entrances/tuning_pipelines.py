"""`tune_pipeline`: runs a pipeline once, and tunes its denoisers at the first, the middle and the last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from ..graphs.inner_compilers import Inner
from ..kernels.flags import are_flags
from ..parallel.settings import ContextParallel
from ..planning.measurements import OutputError, Tuning, worst
from ..planning.plans import Plan
from ..planning.sites import Site
from .choices import Choices
from .model_parts import _join, parts
from .pipeline_calls import Calls, record
from .tuning import read_parallel, read_search, search_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def tune_pipeline(
    pipe: Any,
    *args: Any,
    candidates: Choices | None = None,
    numerics: str = "reordered",
    max_error: float | None = None,
    max_output_error: float | None = None,
    min_gain: float = 0.02,
    inner: Inner = "inductor",
    time_limit: float = 60.0,
    at: Sequence[float] = (0.0, 0.5, 1.0),
    context_parallel: ContextParallel | DeviceMesh | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Plan:
    """Runs `pipe(*args, **kwargs)` once, and tunes its denoisers on what they get at the first, the middle and the last step.

        plan = attnrewrite.tune_pipeline(pipe, "a cat on a chair", num_inference_steps=30, numerics="quantised", max_error=2e-2)
        attnrewrite.set_attention_backend(pipe, plan, numerics="quantised")

    pipe: a diffusers pipeline, or an object like one: callable, with a mapping `components` that holds its denoiser under
        `transformer`, `transformer_2` or `unet`.
    args, kwargs: the pipeline's own, but for the names below. No pipeline of diffusers 0.42 has an argument with such a name;
        of one that has, give what `functools.partial` makes no use of: record its calls, and `tune(denoiser, inputs=calls)`.
    candidates, numerics, max_error, max_output_error, min_gain, inner, time_limit, progress: as in `tune`. `max_output_error`
        bounds the output of each call of a denoiser, not the picture.
    at: the steps at which errors are measured, from 0 (a denoiser's first step) to 1 (its last). With guidance a step has
        several calls; each counts. Of more than 16 steps the nearest of those that are kept are taken.

    context_parallel: as in `tune`. Each rank runs the whole pipeline by itself first.

    The pipeline runs as it is, with what is set or compiled, and without gradients. Copies of its denoisers' inputs wait on the
    CPU.

    Returns one `Plan` for all denoisers that ran. Its sites are named as `set_attention_backend(pipe, ...)` names them;
    `plan.tuning.steps` has the step of each input, and `schedule_of(plan)` makes use of it.

    Raises `TypeError` for a module, or what is no pipeline, `ValueError` if the pipeline has no denoiser or did not call it,
    the pipeline's own errors, and the errors of `tune`.
    """
    if isinstance(pipe, Module) and not hasattr(pipe, "components"):
        raise TypeError(
            f"pipe is a module ({type(pipe).__name__}): give its pipeline, or call attnrewrite.tune on the module"
        )
    denoisers = parts(pipe)
    if not callable(pipe):
        raise TypeError(f"pipe is {type(pipe).__name__}, which cannot be called: give a pipeline")
    parallel = read_parallel(context_parallel, max_output_error)
    first = next(iter(denoisers.values()))
    search = read_search(first, candidates, numerics, max_error, min_gain, inner, time_limit, max_output_error)
    are_flags(progress=progress)
    places = _places(at)
    with torch.no_grad():
        recorded, steps = record(pipe, denoisers, args, kwargs)
        if not recorded:
            raise ValueError(
                f"{type(pipe).__name__} did not call its {' or '.join(denoisers)}: nothing was recorded. Give the arguments of "
                "a run with denoising steps"
            )
        plans, inputs = {}, []
        for path, calls in recorded.items():
            chosen = Calls(calls, calls.at(places))
            plans[path] = search_model(denoisers[path], chosen, search, progress=progress, parallel=parallel)
            inputs.append(chosen.steps)
    return _together(type(pipe).__name__, plans, inputs, steps)


def _places(at: Any) -> list[float]:
    try:
        places = [float(place) for place in at if not isinstance(place, bool)]
        right = bool(places) and len(places) == len(list(at)) and all(0 <= place <= 1 for place in places)
    except (TypeError, ValueError):
        right = False
    if not right or isinstance(at, str):
        raise ValueError(f"at is {at!r}: give numbers from 0, the first step, to 1, the last, as (0, 0.5, 1)")
    return places


def _together(name: str, plans: dict[str, Plan], inputs: list[list[int]], steps: int) -> Plan:
    """One plan of those of the denoisers, whose inputs stand one denoiser behind the other."""
    sites: list[Site] = []
    tunings: list[Tuning] = []
    count = sum(map(len, inputs))
    for number, (path, plan) in enumerate(plans.items()):
        assert plan.tuning is not None
        before = sum(map(len, inputs[:number]))
        after = count - before - len(inputs[number])
        for site in plan.sites:
            measured = tuple(
                replace(each, errors=(None,) * before + each.errors + (None,) * after) if each.errors else each
                for each in site.measured
            )
            sites.append(replace(site, call=replace(site.call, site=_join(path, site.name)), measured=measured))
        tunings.append(plan.tuning)
    machines = {repr(machine): machine for tuning in tunings for machine in tuning.machines}
    outputs = {path: plan.tuning.output for path, plan in plans.items() if plan.tuning and plan.tuning.output}
    together = replace(
        tunings[0],
        model=name,
        machines=tuple(machines.values()),
        complete=all(tuning.complete for tuning in tunings),
        seconds=sum(tuning.seconds for tuning in tunings),
        inputs=count,
        steps=tuple(step for of_one in inputs for step in of_one),
        of_steps=steps,
        output=_outputs(outputs) if outputs else None,
    )
    return Plan(tuple(sites), together)


def _outputs(outputs: dict[str, OutputError]) -> OutputError:
    error, before = (worst(getattr(each, name) for each in outputs.values()) for name in ("error", "before"))
    given_back = tuple(
        replace(back, site=_join(path, back.site)) for path, each in outputs.items() for back in each.given_back
    )
    limit = next(iter(outputs.values())).limit
    return OutputError(limit, math.nan if error is None else error, math.nan if before is None else before, given_back)
