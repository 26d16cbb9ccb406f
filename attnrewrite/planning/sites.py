"""`Site`: one attention of a plan: the call, each decision that was taken, and the choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..kernels.calls import AttentionCall
from ..kernels.decisions import Accepted, Decision, Refused, Step, decision_from_dict
from ..kernels.records import Backend
from .measurements import Measurement


@dataclass(frozen=True)
class NearMiss:
    """A softmax that looks like that of an attention, and why it was not taken for one."""

    site: str  # the path of its module
    reason: str

    def __str__(self) -> str:
        return f"softmax at {self.site}: {self.reason}"


@dataclass(frozen=True)
class Site:
    """One attention. `chosen` is a kernel's name, or None where the call stays as it was; `decisions` are those taken,
    in order, up to the first that was accepted. `source` is the library that was loaded for it, with its version or commit.
    `note` is by what "auto", "tune" or a plan chose; `stale` why a plan could not. Of a tuned site `decisions` are those of all
    candidates, that of the chosen one last, and `measured` what was found out about those that were accepted."""

    call: AttentionCall
    decisions: tuple[tuple[str, Decision], ...]
    chosen: str | None
    rule: str | None = None  # the pattern of the rule that named the choices
    source: str | None = None
    backend: Backend | None = field(default=None, compare=False, repr=False)  # not kept in reports
    note: str | None = None
    stale: str | None = None
    measured: tuple[Measurement, ...] = ()

    @property
    def name(self) -> str:
        return self.call.site

    @property
    def swapped(self) -> bool:
        """Whether another call stands in the graph. `native` changes what was spelled out, or lowered, and nothing else."""
        return self.chosen is not None and (self.chosen != "native" or self.call.written_as == "operations")

    @property
    def refusals(self) -> tuple[tuple[str, Refused], ...]:
        return tuple((name, decision) for name, decision in self.decisions if isinstance(decision, Refused))

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done around the chosen kernel."""
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
            "measured": [asdict(each) for each in self.measured],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Site:
        taken = tuple((name, decision_from_dict(decision)) for name, decision in data["decisions"])
        measured = tuple(Measurement(**each) for each in data.get("measured", ()))
        return Site(
            AttentionCall.from_dict(data["call"]), taken, data["chosen"], data["rule"], data.get("source"),
            note=data.get("note"), stale=data.get("stale"), measured=measured,
        )  # fmt: skip
