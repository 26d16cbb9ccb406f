"""`schedule`: other kernels for the first and the last denoising steps.

Quantised attention shows at the steps that lay out the image and at those that finish it; in between it does not.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from .choices import Choice, Choices, several
from .contexts import AttentionContext, active, attention_backend


@dataclass(frozen=True)
class Schedule:
    """What `schedule` returns: the contexts of the steps. `set_attention_backend` takes it in place of choices."""

    edge: AttentionContext
    middle: tuple[Choice, ...]
    first: int
    last: int
    steps: int | None = None
    calls: int | None = None

    def at(self, step: int, steps: int) -> contextlib.AbstractContextManager[Any]:
        """The context of step 0..steps - 1, for a loop of one's own around a model that is compiled with the middle's
        choices: `with plan.at(i, 30): model(...)`."""
        edge = step < self.first or step >= steps - self.last
        return self.edge if edge else contextlib.nullcontext()


def schedule(
    *,
    first: int = 2,
    last: int = 2,
    edge: Choices = "native",
    middle: Choices,
    steps: int | None = None,
    calls: int | None = None,
) -> Schedule:
    """Kernels by denoising step: `edge` for the `first` and the `last` ones, `middle` for those between.

        attnrewrite.set_attention_backend(pipe, attnrewrite.schedule(first=2, last=2, edge="native", middle="sage"))

    edge, middle: a name, a record or several in order of preference.
    steps: how many there are, where the model is not in a diffusers pipeline, which knows. The count restarts behind them.
    calls: how often the denoiser is called in a step. None: in a pipeline its scheduler says which step it is; where it does
        not (it has no `step_index`), and outside of pipelines, each call is a step.

    Each of both compiles once. An `attention_backend` around the call holds for all steps. Raises `ValueError` for numbers
    that are no counts and for a name that is unknown.
    """
    for name, value, least in (("first", first, 0), ("last", last, 0), ("steps", steps, 1), ("calls", calls, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(
                f"{name} is {value!r}: give a number of {'calls' if name == 'calls' else 'steps'} from {least}"
            )
    if steps is not None and first + last > steps:
        raise ValueError(f"first={first} and last={last} are more than steps={steps}: nothing is left for the middle")
    context = attention_backend(*several(edge))
    attention_backend(*several(middle))  # its names are looked at now, not at the first call
    return Schedule(context, several(middle), first, last, steps, calls)


class Progress:
    """Which step a model is in. One for all denoisers of a pipeline, which take turns (Wan 2.2 has two)."""

    def __init__(self, schedule: Schedule, pipeline: Any = None) -> None:
        """Raises `ValueError` where nothing says how many steps there are."""
        if schedule.steps is None and schedule.last and not hasattr(pipeline, "scheduler"):
            raise ValueError(
                f"schedule(last={schedule.last}) on a model without a pipeline: nothing says which steps are the last. "
                "Give steps=, or set the pipeline"
            )
        self.schedule = schedule
        self.pipeline = pipeline
        self._count = 0
        self._timesteps: Any = None

    def next_call(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the call that begins now."""
        step, steps = self._step()
        if active() is not None:  # who opened a context wants it to hold for all steps
            return contextlib.nullcontext()
        return self.schedule.at(step, steps)

    def _step(self) -> tuple[int, int]:
        plan, scheduler = self.schedule, getattr(self.pipeline, "scheduler", None)
        calls = plan.calls or 1
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not self._timesteps:  # a scheduler makes them anew for each call of the pipeline
            self._timesteps, self._count = timesteps, 0
        steps = plan.steps
        if steps is None and scheduler is not None:
            # In image-to-image a pipeline starts in the midst of its scheduler's timesteps; it knows how many are left.
            known = getattr(self.pipeline, "num_timesteps", None)
            steps = known if isinstance(known, int) else len(scheduler.timesteps)
        step = self._count // calls
        if plan.calls is None and hasattr(scheduler, "step_index"):
            begin = getattr(scheduler, "begin_index", None) or 0
            step = (scheduler.step_index or begin) - begin  # type: ignore[union-attr]
        self._count += 1
        if plan.steps is not None and self._count >= plan.steps * calls:
            self._count = 0
        return step, steps if steps is not None else step + 1 + plan.last
