"""`Site`: one attention of a plan, with its call, the decisions on the kernels and the choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..kernels.calls import AttentionCall
from ..kernels.decisions import Accepted, Code, Decision, Refused, Step, decision_from_dict
from ..kernels.records import Backend
from .measurements import Inexact, Measurement


@dataclass(frozen=True)
class NearMiss:
    """A softmax that looks like part of an attention, but was not recognised as one."""

    site: str  # the path of the module that calls the softmax
    reason: str  # why it was not recognised

    def __str__(self) -> str:
        return f"softmax at {self.site}: {self.reason}"


@dataclass(frozen=True)
class Site:
    """One attention of a plan.

    decisions: (kernel, decision) pairs in the order in which the kernels were asked, up to the first that accepted. Of a tuned
        site: the decisions on all candidates, with the chosen kernel last.
    """

    call: AttentionCall
    decisions: tuple[tuple[str, Decision], ...]
    chosen: str | None  # the name of a kernel; None: the call stays as it is
    rule: str | None = None  # the pattern of the rule that named the choices
    source: str | None = None  # the library that was loaded for the kernel, with its version or commit
    backend: Backend | None = field(default=None, compare=False, repr=False)  # the chosen record; not kept in reports
    note: str | None = None  # the evidence by which "auto", "tune" or a plan chose
    stale: str | None = None  # why a plan could not choose
    measured: tuple[Measurement, ...] = ()  # of a tuned site: the measurements of the kernels that accepted
    inexact: Inexact | None = None  # the error of a chosen kernel that is quantised or sparse; None for any other

    @property
    def name(self) -> str:
        return self.call.site

    @property
    def swapped(self) -> bool:
        """Whether the graph gets another call. `native` changes only attention that is not SDPA."""
        return self.chosen is not None and (self.chosen != "native" or not self.call.is_sdpa)

    @property
    def preferred(self) -> bool:
        """Whether the call stays because the model's own code is known to be faster than a kernel that could take it."""
        return any(refused.code is Code.PREFERENCE for _, refused in self.refusals)

    @property
    def refusals(self) -> tuple[tuple[str, Refused], ...]:
        return tuple((name, decision) for name, decision in self.decisions if isinstance(decision, Refused))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps around the chosen kernel, such as padding or a cast."""
        last = self.decisions[-1][1] if self.decisions else None
        return last.steps if isinstance(last, Accepted) else ()

    @property
    def mask_as(self) -> str:
        """How the chosen kernel receives the mask, one of `reasons.masks_for`."""
        last = self.decisions[-1][1] if self.decisions else None
        return last.mask_as if isinstance(last, Accepted) else "given"

    def described(self) -> Site:
        taken = tuple((name, decision.described()) for name, decision in self.decisions)
        return replace(self, call=self.call.described(), decisions=taken, backend=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "call": self.call.to_dict(),
            "decisions": [[name, decision.to_dict()] for name, decision in self.decisions],
            "chosen": self.chosen,
            "rule": self.rule,
            "source": self.source,
            "note": self.note,
            "stale": self.stale,
            "measured": [each.to_dict() for each in self.measured],
            "inexact": self.inexact and asdict(self.inexact),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Site:
        taken = tuple((name, decision_from_dict(decision)) for name, decision in data["decisions"])
        measured = tuple(Measurement.from_dict(each) for each in data.get("measured", ()))
        return Site(
            AttentionCall.from_dict(data["call"]), taken, data["chosen"], data["rule"], data.get("source"),
            note=data.get("note"), stale=data.get("stale"), measured=measured,
            inexact=Inexact(**data["inexact"]) if data.get("inexact") else None,
        )  # fmt: skip
