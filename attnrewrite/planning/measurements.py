"""`Measurement`: what was found out about one kernel at one site; and which of them is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kernels.machines import Machine


@dataclass(frozen=True)
class Measurement:
    """milliseconds: the median of `rounds` samples; None where nothing was timed. spread: two standard errors of that
    median, in parts of it. error: |out - ref| / |ref| against float64 on the site's own tensors; None under dropout.
    dropped: why it cannot be chosen; a kernel may be timed and still be too inexact. host: milliseconds that the host takes to
    launch it from compiled code, where that is a GPU."""

    name: str
    milliseconds: float | None = None
    spread: float | None = None
    error: float | None = None
    rounds: int = 0
    dropped: str | None = None
    host: float | None = None

    @property
    def least(self) -> float:
        """Milliseconds that a call takes in a model that waits for its host."""
        return max(self.milliseconds or 0.0, self.host or 0.0)

    def __str__(self) -> str:
        parts = [] if self.milliseconds is None else [f"{self.milliseconds:.4g} ms"]
        parts += [f"+- {self.spread:.1%}"] if self.milliseconds is not None and self.rounds > 1 else []
        parts += [] if self.error is None else [f"error {self.error:.1e}"]
        parts += [] if self.dropped is None else [self.dropped]
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class Tuning:
    """Where, with what and how a plan was measured. machines: one for each kind of device that the model has sites on.
    complete: False where Ctrl-C ended it. seconds: what it took."""

    model: str
    machines: tuple[Machine, ...]
    attnrewrite: str
    numerics: str = "reordered"
    max_error: float | None = None
    min_gain: float = 0.02
    complete: bool = True
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "machines": [machine.to_dict() for machine in self.machines]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Tuning:
        return Tuning(**{**data, "machines": tuple(Machine.from_dict(machine) for machine in data["machines"])})
