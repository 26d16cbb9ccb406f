"""The decision whether a kernel takes a call: `Accepted`, with the steps around the kernel, or `Refused`, with the reason."""

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
    BATCH = "BATCH"
    SCALE = "SCALE"
    HEADS = "HEADS"
    UNBACKED = "UNBACKED"
    BROKEN = "BROKEN"  # installed, but it does not import
    UNTRUSTED = "UNTRUSTED"  # the kernels hub does not vouch for the publisher
    PREFERENCE = "PREFERENCE"  # the kernel could take the call, and the model's own code is known to be faster


@dataclass(frozen=True)
class Step:
    """An operation that the swap adds around a kernel to make the kernel applicable, and its cost."""

    name: str  # "pad_head_dim"
    before: Size | str  # 72
    after: Size | str  # 80
    cost: str = ""  # in words; of a size that grows, `str` gives the factor for the matrix products instead

    def described(self) -> Step:
        return Step(self.name, described(self.before), described(self.after), self.cost)

    def __str__(self) -> str:
        cost = self.cost
        if isinstance(self.before, int) and isinstance(self.after, int):
            cost = f"{self.after / self.before:.2f} times the products"
        return f"{self.name}: {described(self.before)} to {described(self.after)}" + (f", {cost}" if cost else "")


@dataclass(frozen=True)
class Accepted:
    """The kernel may take the call."""

    steps: tuple[Step, ...] = ()  # the operations that this needs around the kernel
    mask_as: str = "proven"  # how the kernel receives the mask, one of `reasons.masks_for`

    def described(self) -> Accepted:
        return Accepted(tuple(step.described() for step in self.steps), self.mask_as)

    def to_dict(self) -> dict[str, Any]:
        return {"accepted": True, "mask_as": self.mask_as, "steps": [asdict(step) for step in self.described().steps]}

    def step(self, name: str) -> Step | None:
        return next((step for step in self.steps if step.name == name), None)


@dataclass(frozen=True)
class Refused:
    """The kernel does not take the call."""

    code: Code
    detail: str  # a sentence with the two values that were compared
    fix: str  # what the user can do

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
