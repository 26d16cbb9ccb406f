"""`Measurement`: the time and error of one kernel at one site. `Tuning`: how the measurements of a plan were made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..kernels.machines import Machine
from ..kernels.records import Backend


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest error; NaN, with which nothing was compared, counts as larger than any. None if there is none."""
    known = [error for error in errors if error is not None]
    return max(known, key=lambda error: math.inf if math.isnan(error) else error, default=None)


@dataclass(frozen=True)
class Measurement:
    """The time and error of one kernel at one site."""

    name: str
    milliseconds: float | None = None  # median of `rounds` samples; None: not timed
    spread: float | None = None  # relative spread: two standard errors of the median, divided by the median
    # |out - ref| / |ref| against float64 on the site's own tensors; None under dropout, NaN if nothing could be compared. Two
    # measurements are equal without it, since NaN equals nothing.
    error: float | None = field(default=None, compare=False)
    rounds: int = 0  # number of samples
    dropped: str | None = None  # why the kernel cannot be chosen; a timed kernel may still be too inexact
    host: float | None = None  # milliseconds that the host takes to launch the kernel from compiled code, on a GPU
    # Of a quantised or sparse kernel: the error at each input of the model; None where the site did not run, NaN where nothing
    # could be compared or the kernel failed. `error` is the worst.
    errors: tuple[float | None, ...] = field(default=(), compare=False)
    limit: float | None = None  # the largest error that was allowed to such a kernel

    @property
    def least(self) -> float:
        """Milliseconds of one call in a model that waits for its host."""
        return max(self.milliseconds or 0.0, self.host or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """An error of NaN becomes text, since JSON has none."""
        errors = [_text(error) for error in self.errors]
        return {**asdict(self), "error": _text(self.error), "errors": errors}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Measurement:
        errors = tuple(_number(error) for error in data.get("errors", ()))
        return Measurement(**{**data, "error": _number(data.get("error")), "errors": errors})

    def __str__(self) -> str:
        parts = [] if self.milliseconds is None else [f"{self.milliseconds:.4g} ms"]
        parts += [f"+- {self.spread:.1%}"] if self.milliseconds is not None and self.rounds > 1 else []
        parts += [] if self.error is None else [f"error {self.error:.1e}"]
        parts += [] if self.dropped is None else [self.dropped]
        return f"{self.name}: {', '.join(parts)}"


def _text(error: float | None) -> float | str | None:
    return str(error) if error is not None and not math.isfinite(error) else error


def _number(error: float | str | None) -> float | None:
    return None if error is None else float(error)


@dataclass(frozen=True)
class GivenBack:
    """A site that `max_output_error` gave back to a kernel that is closer to SDPA."""

    site: str
    kernel: str  # its choice without the bound
    instead: str
    error: float | None  # of `kernel` at the site
    milliseconds: float  # that one call at the site takes longer


@dataclass(frozen=True)
class OutputError:
    """What `max_output_error` cost. Errors are |out - ref| / |ref| over the whole output of the model, against the unchanged
    model, the largest of all inputs; NaN if nothing could be compared."""

    limit: float  # `max_output_error`
    error: float  # of the plan
    before: float  # with the choice that each site has by itself
    given_back: tuple[GivenBack, ...] = ()  # in the order in which they were

    @property
    def held(self) -> bool:
        return self.error <= self.limit

    @property
    def seconds(self) -> float:
        """Seconds that one call of the model takes longer, if each site runs once in it."""
        return sum(each.milliseconds for each in self.given_back) / 1e3

    def to_dict(self) -> dict[str, Any]:
        given_back = [{**vars(each), "error": _text(each.error)} for each in self.given_back]
        return {**vars(self), "error": _text(self.error), "before": _text(self.before), "given_back": given_back}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> OutputError:
        given_back = (GivenBack(**{**each, "error": _number(each["error"])}) for each in data["given_back"])
        return OutputError(data["limit"], float(data["error"]), float(data["before"]), tuple(given_back))

    def __str__(self) -> str:
        sites = len({each.site for each in self.given_back})
        cost = f"{sites} site{'' if sites == 1 else 's'} given back for {1e3 * self.seconds:.3g} ms a call"
        said = f"output error {self.error:.1e}" + ("" if self.held else ", above the limit,")
        return f"{said} of at most {self.limit:g}" + (f", {cost} (before: {self.before:.1e})" if sites else "")


@dataclass(frozen=True)
class Inexact:
    """The class and the error of a kernel that is quantised or sparse, as reports name them."""

    numerics: str  # "quantised" or "sparse"
    error: float  # |out - ref| / |ref|
    measured: bool  # True: measured at the site against float64; False: the tolerance that the record states

    @staticmethod
    def of(record: Backend, error: float | None) -> Inexact | None:
        """None for a kernel that only rounds. error: the measured error; None or NaN if nothing was compared."""
        if not record.numerics.is_inexact:
            return None
        measured = error is not None and not math.isnan(error)
        return Inexact(
            record.numerics.word, error if error is not None and measured else record.tolerance.error, measured
        )

    def __str__(self) -> str:
        return f"{self.numerics}, error {self.error:.1e} {'measured' if self.measured else 'stated, not measured'}"


@dataclass(frozen=True)
class Tuning:
    """The model, the machines and the settings with which `attnrewrite.tune` measured a plan."""

    model: str  # name of the model's class or function
    machines: tuple[Machine, ...]  # one for each kind of device that the model has sites on
    attnrewrite: str  # version of this package
    numerics: str = "reordered"
    max_error: float | None = None  # largest |out - ref| / |ref| allowed; None: the limits of `attnrewrite.tune`
    min_gain: float = 0.02  # relative gain from which a kernel replaces a simpler one
    complete: bool = True  # False: Ctrl-C ended the measurement
    seconds: float = 0.0  # duration of the measurement
    inputs: int = 1  # calls of the model at which errors were measured
    steps: tuple[int, ...] = ()  # of `tune_pipeline`: the denoising step of each input, from 0 on
    of_steps: int | None = None  # the number of all steps
    output: OutputError | None = None  # what `max_output_error` cost; None: it was not given

    def to_dict(self) -> dict[str, Any]:
        machines = [machine.to_dict() for machine in self.machines]
        return {**vars(self), "machines": machines, "output": self.output and self.output.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Tuning:
        machines = tuple(Machine.from_dict(machine) for machine in data["machines"])
        output = OutputError.from_dict(data["output"]) if data.get("output") else None
        steps = tuple(data.get("steps", ()))
        return Tuning(**{**data, "machines": machines, "output": output, "steps": steps})
