"""What is decided of a kernel and a call: `Accepted`, with the steps it takes, or `Refused`, with the reason."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ..graphs.sizes import Size, described


class Code(str, Enum):
    """The closed list of reasons for a refusal."""

    MISSING = "MISSING"
    VERSION = "VERSION"
    DEVICE = "DEVICE"
    CAPABILITY = "CAPABILITY"
    NUMERICS = "NUMERICS"
    CONTEXT = "CONTEXT"
    DETERMINISTIC = "DETERMINISTIC"
    CAPTURE = "CAPTURE"  # a CUDA graph will be recorded
    DTYPE = "DTYPE"
    DROPOUT = "DROPOUT"
    GRAD = "GRAD"
    MASK = "MASK"
    VALUE_DIM = "VALUE_DIM"
    GQA = "GQA"
    HEAD_DIM = "HEAD_DIM"
    CAUSAL = "CAUSAL"
    LENGTH = "LENGTH"
    SCALE = "SCALE"
    HEADS = "HEADS"
    UNBACKED = "UNBACKED"
    BROKEN = "BROKEN"  # installed, but it does not import
    UNTRUSTED = "UNTRUSTED"  # a publisher that the kernels hub does not vouch for


@dataclass(frozen=True)
class Step:
    """What the swap does around a kernel to make it applicable, as "pad_head_dim" from 72 to 80, and what that costs."""

    name: str
    before: Size | str
    after: Size | str
    cost: str = ""  # of a size that grows: how many times the products

    def described(self) -> Step:
        return Step(self.name, described(self.before), described(self.after), self.cost)

    def __str__(self) -> str:
        cost = self.cost
        if isinstance(self.before, int) and isinstance(self.after, int):
            cost = f"{self.after / self.before:.2f} times the products"
        return f"{self.name}: {described(self.before)} to {described(self.after)}" + (f", {cost}" if cost else "")


@dataclass(frozen=True)
class Accepted:
    """The kernel may take the call, after these steps. mask_as: how the kernel receives the mask, one of
    `reasons.masks_for`."""

    steps: tuple[Step, ...] = ()
    mask_as: str = "proven"

    def described(self) -> Accepted:
        return Accepted(tuple(step.described() for step in self.steps), self.mask_as)

    def to_dict(self) -> dict[str, Any]:
        return {"accepted": True, "mask_as": self.mask_as, "steps": [asdict(step) for step in self.described().steps]}

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)


@dataclass(frozen=True)
class Refused:
    """`detail` is a sentence made of the two values that were compared; `fix` is what the reader can do."""

    code: Code
    detail: str
    fix: str

    def described(self) -> Refused:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"accepted": False, **asdict(self)}

    def __str__(self) -> str:
        return f"{self.code.value}: {self.detail}. {self.fix}"


Decision = Accepted | Refused


def decision_from_dict(data: dict[str, Any]) -> Decision:
    if data["accepted"]:
        # "form" in files from before December 2026
        mask_as = data.get("mask_as", data.get("form", "proven"))
        return Accepted(tuple(Step(**step) for step in data.get("steps", ())), mask_as)
    return Refused(Code(data["code"]), data["detail"], data["fix"])
