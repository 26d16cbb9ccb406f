"""`Measurement`: the time and error of one kernel at one site. `Tuning`: how the measurements of a plan were made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..kernels.machines import Machine
from ..kernels.records import Backend


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

    @property
    def least(self) -> float:
        """Milliseconds of one call in a model that waits for its host."""
        return max(self.milliseconds or 0.0, self.host or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """An error of NaN becomes text, since JSON has none."""
        return {**asdict(self), "error": "nan" if self.error is not None and math.isnan(self.error) else self.error}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Measurement:
        return Measurement(**{**data, "error": math.nan if data.get("error") == "nan" else data.get("error")})

    def __str__(self) -> str:
        parts = [] if self.milliseconds is None else [f"{self.milliseconds:.4g} ms"]
        parts += [f"+- {self.spread:.1%}"] if self.milliseconds is not None and self.rounds > 1 else []
        parts += [] if self.error is None else [f"error {self.error:.1e}"]
        parts += [] if self.dropped is None else [self.dropped]
        return f"{self.name}: {', '.join(parts)}"


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

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "machines": [machine.to_dict() for machine in self.machines]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Tuning:
        return Tuning(**{**data, "machines": tuple(Machine.from_dict(machine) for machine in data["machines"])})
