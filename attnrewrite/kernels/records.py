"""`Backend`: one attention kernel as data, with every limit it truly has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any

import torch

from .calls import AttentionCall, MaskKind
from .decisions import Refused, Step
from .machines import PACKAGES, Machine
from .sources import Source


class Numerics(IntEnum):
    """How far a kernel's result may lie from SDPA's. A policy's limit accepts its own class and those before it."""

    EXACT = 0  # the very same kernel call
    REORDERED = 1  # the same arithmetic in another order: differences of rounding
    QUANTISED = 2  # some products in int8 or fp8


@dataclass(frozen=True)
class HeadDim:
    """Head dims that a kernel takes: minimum..max, in multiples. `pad`: others below max are padded with zeros,
    which changes no product, and the padding is cut off the output."""

    max: int | None = None
    multiple: int = 1
    pad: bool = False
    minimum: int = 1


@dataclass(frozen=True)
class Tolerance:
    """How far a result in half precision may lie from float64: the relative error |out - ref| / |ref| (2-norms), and why."""

    error: float = 1.2e-2
    reason: str = "rounding to bfloat16"


Check = Callable[[AttentionCall, Machine], Refused | None]
LibraryCheck = Callable[[ModuleType, Machine], Refused | None]


@dataclass(frozen=True)
class Backend:
    """One kernel. A field that a call may need is off unless the record turns it on.

    `op(query, key, value, prepared, *, call)` is a plain function of tensors that returns the output: it is run once on
    fake tensors, and what it calls is what lands in the graph. Tensors come and go in `layout`: "bhsd" for
    (batch, heads, length, dim), "bshd" for (batch, length, heads, dim); their last dimension has stride 1.
    Where a record has a `source`, the library behind it is loaded when a plan chooses it, and `op` gets an `ops.Origin` as
    `origin=`, to hand on to the ops that `ops.register` made.
    `prepare(mask, key, call)` makes of the mask (None, or a tensor of rank 4) what the op wants; it is built once a mask
    and shared by all sites that read it, and comes to the op as `prepared`. Without it the mask itself comes.

    Names repeat where a kernel has other limits on another device or in another version: one record for each.
    """

    name: str
    family: str
    op: Callable[..., torch.Tensor] | None  # None: the call stays as it is
    devices: frozenset[str]
    dtypes: frozenset[str]
    summary: str = ""
    capability: tuple[tuple[int, int], tuple[int, int]] | None = None  # first and last, both included
    not_on: frozenset[tuple[int, int]] = frozenset()  # capabilities between these that it has no kernel for
    head_dim: HeadDim = HeadDim()
    masks: frozenset[MaskKind] = frozenset({MaskKind.NONE})
    mask_dtypes: frozenset[str] = frozenset()  # of additive masks, besides the call's own dtype
    mask_grad: bool = False
    gqa: bool = False
    value_dim: bool = False  # value_dim may differ from head_dim
    dropout: bool = False
    backward: bool = False
    always_differentiable: bool = False  # also where the call was planned without a gradient: nothing is kept for it
    deterministic: bool = True
    capturable: bool = True  # right under capture and replay of a CUDA graph
    empty: bool = False  # takes sequences of length 0
    any_context: bool = False  # takes calls that carry an obstacle
    all_scores: bool = False  # holds the scores of all queries and keys in memory
    not_exported: str = ""  # why no exported program can hold it
    layout: str = "bhsd"
    numerics: Numerics = Numerics.REORDERED
    tolerance: Tolerance = Tolerance()
    tested: str = ""  # the hardware that its parity tests passed on, "interpreter" or "stand-in" (docs/backends.md)
    compiled: bool = False  # a kernel only once Inductor has made it; uncompiled it is other code
    source: Source | None = None
    requires: Mapping[str, str] = field(default_factory=dict, hash=False)  # distribution -> version specifier
    install: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # distribution -> how, where `pip install` does not
    checks: tuple[Check, ...] = ()
    library_check: LibraryCheck | None = None  # asked once the source is loaded: a build may lack this kernel
    prepare: Callable[[torch.Tensor | None, torch.Tensor, AttentionCall], Any] | None = None
    steps: Callable[[AttentionCall], tuple[Step, ...]] | None = None  # what `prepare` and `op` do that costs something

    def __post_init__(self) -> None:
        PACKAGES.update(self.requires)

    def __str__(self) -> str:
        return self.name
