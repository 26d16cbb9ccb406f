"""`Backend`: one attention kernel as data, with all of its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any

import torch

from .calls import AttentionCall, MaskKind
from .decisions import Refused, Step
from .flags import has_flags
from .machines import PACKAGES, Machine
from .sources import Package, Source


class Numerics(IntEnum):
    """How far a kernel's result may differ from SDPA's. A policy's limit accepts its own class and the classes before it."""

    EXACT = 0  # the very same kernel call
    REORDERED = 1  # the same arithmetic in another order: differences of rounding
    QUANTISED = 2  # some products in int8 or fp8
    SPARSE = 3  # some products are left out: right only where the data has structure

    @property
    def word(self) -> str:
        """The class as users write it: "sparse"."""
        return self.name.lower()

    @property
    def is_inexact(self) -> bool:
        """Whether more than rounding lies between a result and SDPA's: the class must be asked for, and reports name it."""
        return self >= Numerics.QUANTISED


@dataclass(frozen=True)
class HeadDim:
    """The head dims that a kernel takes: multiples of `multiple` from `minimum` to `max`."""

    max: int | None = None  # None: no limit
    multiple: int = 1
    pad: bool = False  # pad other head dims with zeros, which changes no product, and cut the padding off the output
    minimum: int = 1

    def __post_init__(self) -> None:
        has_flags(self)


@dataclass(frozen=True)
class Tolerance:
    """How far a result in half precision may differ from float64."""

    error: float = 1.2e-2  # the relative error |out - ref| / |ref|, in 2-norms
    reason: str = "rounding to bfloat16"  # for this error


@dataclass(frozen=True)
class Option:
    """A number that is part of a kernel's name: `tau` of "sol[tau=2.0]"."""

    default: int | float | None  # of a name without the option; None: the kernel derives it from the call
    minimum: int | float  # it says which of the two types the values have
    maximum: int | float
    summary: str  # what it means, for people

    @property
    def otherwise(self) -> str:
        """The default, for people."""
        return "derived" if self.default is None else repr(self.default)

    def __str__(self) -> str:
        return f"{self.otherwise}, from {self.minimum!r} to {self.maximum!r}: {self.summary}"


Check = Callable[[AttentionCall, Machine], Refused | None]
LibraryCheck = Callable[[ModuleType, AttentionCall, Machine], Refused | None]


@dataclass(frozen=True)
class Backend:
    """One kernel. A field that a call may need is off unless the record turns it on. A kernel with other limits on another
    device, or in another version, has one record for each under the same name.

    op(query, key, value, prepared, *, call): a plain function of tensors that returns the output. It runs once on fake tensors,
        and the graph gets the torch calls that it makes. Tensors come and go in `layout`; the last dimension of query, key and
        value has stride 1. With a `source`, `op` also gets `origin=`, an `ops.Origin` for the ops that `ops.register` made.
    logsumexp(...): as `op`, and returns (output, log-sum-exp of each row's scaled scores). The second is (batch, heads, q_len),
        in float32, or float64 for float64. None: the kernel does not tell it, and a ring (parallel/rings.py) cannot use it.
    prepare(mask, key, call): makes `prepared` from the mask (None, or a tensor of rank 4), once for all sites that read the
        mask. Without `prepare`, `op` gets the mask itself.
    """

    name: str
    family: str  # the library or project, for people
    op: Callable[..., torch.Tensor] | None  # None: the call stays unchanged
    devices: frozenset[str]  # as in `Machine.device`
    dtypes: frozenset[str]  # of query, key and value: "bfloat16"
    summary: str = ""  # one line, for people
    logsumexp: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None  # first and last, both included
    not_on: frozenset[tuple[int, int]] = frozenset()  # capabilities in this range without a kernel
    head_dim: HeadDim = HeadDim()
    masks: frozenset[MaskKind] = frozenset({MaskKind.NONE})
    mask_dtypes: frozenset[str] = frozenset()  # of additive masks, besides the call's own dtype
    mask_grad: bool = False  # has a gradient for an additive mask
    gqa: bool = False  # takes fewer key heads than query heads
    value_dim: bool = False  # value_dim may differ from head_dim
    any_scale: bool = False  # right for a scale of zero or less: most kernels give NaN
    max_batch: int | None = None  # of batch and of heads: both are dimensions of the kernel's grid
    max_length: int | None = None  # of q_len and kv_len
    dropout: bool = False
    backward: bool = False
    always_differentiable: bool = False  # also in calls planned without a gradient: the backward needs nothing extra
    deterministic: bool = True
    capturable: bool = True  # right under capture and replay of a CUDA graph
    empty: bool = False  # takes a batch or sequences of size 0
    any_context: bool = False  # takes calls with an obstacle
    all_scores: bool = False  # keeps the scores of all queries and keys in memory
    not_exported: str = ""  # why no exported program can hold the kernel; "" where it can
    layout: str = "bhsd"  # (batch, heads, length, dim); "bshd": (batch, length, heads, dim)
    numerics: Numerics = Numerics.REORDERED
    tolerance: Tolerance = Tolerance()
    tested: str = ""  # the hardware on which the parity tests passed, "interpreter" or "stand-in" (docs/backends.md)
    compiled: bool = False  # a fused kernel only when Inductor compiles it; uncompiled it is other code
    source: Source | None = None  # the library, which is loaded when a plan chooses the kernel
    requires: Mapping[str, str] = field(default_factory=dict, hash=False)  # distribution -> version specifier
    install: Mapping[str, str] = field(default_factory=dict, hash=False)  # distribution -> its own install instruction
    checks: tuple[Check, ...] = ()  # limits that no field expresses
    mask_check: Check | None = None  # a limit of the masks that no field expresses: asked before the sizes
    library_check: LibraryCheck | None = None  # called with the loaded library: a build may lack the kernel of a call
    prepare: Callable[[torch.Tensor | None, torch.Tensor, AttentionCall], Any] | None = None
    steps: Callable[[AttentionCall], tuple[Step, ...]] | None = None  # the costly operations of `prepare` and `op`
    options: Mapping[str, Option] = field(
        default_factory=dict, hash=False
    )  # `op` gets those that the name gives by keyword
    # (record, the options that a name gives) -> the record with checks and steps that know these options
    configured: Callable[[Backend, Mapping[str, int | float]], Backend] | None = None
    variants: tuple[str, ...] = ()  # other options than the defaults for `tune` to try: ("tau=2.0",)

    def __post_init__(self) -> None:
        has_flags(self)
        PACKAGES.update(self.requires)
        if isinstance(self.source, Package) and self.source.distribution not in self.requires:
            raise ValueError(
                f"the record {self.name!r} has its source in {self.source} and does not require it: "
                f"add requires={{{self.source.distribution!r}: '>=1.0'}}, with the versions that it was tried with"
            )

    def __str__(self) -> str:
        return self.name
