"""`schedule`: other kernels for the first and the last denoising steps.

The error of quantised attention shows in the steps that lay out the image and in those that finish it, not in between.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from .choices import Choice, Choices, several
from .contexts import AttentionContext, active, attention_backend


@dataclass(frozen=True)
class Schedule:
    """Kernels by denoising step, made by `schedule`. `set_attention_backend` takes it in place of choices.

    edge: the context of the first and the last steps.
    middle: the choices for the steps between.
    first, last: the number of first and of last steps.
    steps: the number of all steps; None: the pipeline's.
    calls: calls of the denoiser in a step; None: see `schedule`.
    of: the number of all steps of which `first` and `last` were measured: in a run of another number they are as large a part
        of it. None: they are numbers, whatever the run.
    """

    edge: AttentionContext
    middle: tuple[Choice, ...]
    first: int
    last: int
    steps: int | None = None
    calls: int | None = None
    of: int | None = None

    def at(self, step: int, steps: int | None) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of one step, for a loop of your own around a model that is compiled with the middle's choices:
        `with plan.at(i, 30): model(...)`. step: 0 to steps - 1. steps: None where nobody knows: then no step is the last."""
        if steps is None:
            middle = step >= self.first
        else:
            of = steps if self.of is None else self.of
            longer = (steps - 1) / max(of - 1, 1)  # of 1 step nothing is known of others
            # A step that the rounding of a product moves would be another one.
            middle = self.first * longer - 1e-6 <= step <= (of - 1 - self.last) * longer + 1e-6
        return contextlib.nullcontext() if middle else self.edge


def schedule(
    *,
    first: int = 2,
    last: int = 2,
    edge: Choices = "native",
    middle: Choices,
    steps: int | None = None,
    calls: int | None = None,
) -> Schedule:
    """Makes a schedule of kernels by denoising step: `edge` for the first and the last steps, `middle` for those between.

        plan = attnrewrite.schedule(first=2, last=2, edge="native", middle="sage")
        attnrewrite.set_attention_backend(pipe, plan, numerics="quantised")

    first, last: the number of first and of last steps that use `edge`.
    edge, middle: a name, a record or several in order of preference. Each of both compiles once.
    steps: the number of all steps, after which the count restarts. None: a diffusers pipeline knows the number; any other
        model needs it, unless `last` is 0.
    calls: calls of the denoiser in a step. None: the pipeline's scheduler says which step it is; without a scheduler that
        says so (by `step_index`), each call is a step.

    Returns a `Schedule`. An `attention_backend` around the call applies to all steps instead.

    Raises `ValueError` for a number that is not a count, for `first` and `last` above `steps`, and for an unknown name.
    """
    for name, value, least in (("first", first, 0), ("last", last, 0), ("steps", steps, 1), ("calls", calls, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(
                f"{name} is {value!r}: give a number of {'calls' if name == 'calls' else 'steps'} from {least}"
            )
    if steps is not None and first + last > steps:
        raise ValueError(f"first={first} and last={last} are more than steps={steps}: nothing is left for the middle")
    context = attention_backend(*several(edge))
    attention_backend(*several(middle))  # raises for unknown names now, not at the first call
    return Schedule(context, several(middle), first, last, steps, calls)


class Steps:
    """Counts the denoising steps of a pipeline by the calls of its denoisers, which take turns (Wan 2.2 has two)."""

    def __init__(self, pipeline: Any = None, steps: int | None = None, calls: int | None = None) -> None:
        """steps: of a run, after which the count restarts. calls: of the denoisers in a step; None: see `schedule`."""
        self.pipeline, self.steps, self.calls = pipeline, steps, calls
        self._count = 0
        self._timesteps: Any = None

    def next(self) -> tuple[int, int | None]:
        """The step of the call that begins now, and the number of all steps, None if that is not known. Counts the call."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        calls = self.calls or 1
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:  # each call of the pipeline makes new ones
            self._timesteps, self._count = timesteps, 0
        steps = self.steps
        if steps is None and timesteps is not None:
            # Image-to-image starts in the middle of the scheduler's timesteps; the pipeline knows how many are left.
            known = getattr(self.pipeline, "num_timesteps", None)
            steps = known if isinstance(known, int) else len(timesteps)
        step = self._count // calls
        if self.calls is None and hasattr(scheduler, "step_index"):
            begin = getattr(scheduler, "begin_index", None) or 0
            step = (scheduler.step_index or begin) - begin  # type: ignore[union-attr]
        self._count += 1
        if self.steps is not None and self._count >= self.steps * calls:
            self._count = 0
        return step, steps


class Progress:
    """Tells the denoising step of a model. All denoisers of a pipeline share one."""

    def __init__(self, schedule: Schedule, pipeline: Any = None) -> None:
        """Raises `ValueError` if the schedule needs the number of steps and neither `steps` nor a scheduler gives it."""
        if schedule.steps is None and schedule.last and not hasattr(pipeline, "scheduler"):
            raise ValueError(
                f"schedule(last={schedule.last}) on a model without a pipeline: nothing says which steps are the last. "
                "Give steps=, or set the pipeline"
            )
        self.schedule = schedule
        self._steps = Steps(pipeline, schedule.steps, schedule.calls)

    def next_call(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context of the denoiser's call that begins now, and counts the call."""
        step, steps = self._steps.next()
        if active() is not None:  # a context of the user applies to all steps
            return contextlib.nullcontext()
        return self.schedule.at(step, steps)
