"""What the passes over one graph hand on to each other. Each step gives new objects, and changes none.

Found  ->  Understood  ->  Planned  ->  Swapped
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.fx import Node

from ..graphs.axes import Views, applied
from ..graphs.emitting import Emitter
from ..graphs.nodes import value_of, values_only
from ..kernels.calls import AttentionCall
from ..kernels.records import Backend
from ..masks.building import Proof
from ..planning.sites import Site


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, and the views that bring it into SDPA's form (..., heads, length, dim)."""

    node: Node
    views: Views = ()

    @cached_property
    def value(self) -> torch.Tensor:
        """The fake tensor in that form."""
        given: torch.Tensor = value_of(self.node)
        if not self.views:
            return given
        with values_only(given):
            return applied(given, self.views)

    def emitted(self, emitter: Emitter) -> torch.Tensor:
        """The same as nodes of a graph."""
        return applied(emitter.tensor(self.node), self.views)


@dataclass(frozen=True)
class MaskTerm:
    """What one tensor does to the scores, in form (..., heads, q_len, kv_len) or what broadcasts to it.

    how: "add": plus `amount` times the tensor, after scaling. "keep": `amount` where the tensor is False. "drop": `amount`
    where it is True. An `amount` of -inf makes it a boolean mask.
    """

    tensor: Operand
    how: str
    amount: float


@dataclass(frozen=True)
class Operands:
    """The tensors of an attention. `mask`: the terms in the order in which the scores meet them. `result`: the views from
    the kernel's output (..., heads, q_len, value_dim) to the value of the node that it replaces."""

    query: Operand
    key: Operand
    value: Operand
    mask: tuple[MaskTerm, ...] = ()
    result: Views = ()
    grouped: bool = False  # several query heads share a key head

    def moved(self, nodes: Mapping[Node, Node]) -> Operands:
        """The same with some nodes replaced by others."""

        def at(operand: Operand) -> Operand:
            return replace(operand, node=nodes.get(operand.node, operand.node))

        mask = tuple(replace(term, tensor=at(term.tensor)) for term in self.mask)
        return replace(self, query=at(self.query), key=at(self.key), value=at(self.value), mask=mask)


@dataclass(frozen=True, eq=False)
class Found:
    """One attention in a graph, as `find_calls` gives it. Two are the same only if they are one object."""

    node: Node  # it gives the output
    call: AttentionCall
    operands: Operands | None = None  # None: the call can only stay as it is
    chain: tuple[Node, ...] = ()  # what a swap may leave without a reader, so that it goes too

    def then(self, step: type[Next], **more: Any) -> Next:
        """The same after another step, of which `more` is what the step has found out or changed."""
        return step(**{**vars(self), **more})


Next = TypeVar("Next", bound=Found)


@dataclass(frozen=True, eq=False, kw_only=True)
class Understood(Found):
    """What `understand_masks` gives: the call's mask is what the graph proves it to be."""

    proof: Proof | None = None  # None: nothing is proven


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned(Understood):
    """What the plan gives: the call knows its machine, its site has a choice."""

    site: Site

    @property
    def kernel(self) -> Backend | None:
        """The chosen kernel, None where the call stays as it is: nothing was chosen, or `native` for what is one call of
        PyTorch already. Attention in tensor operations becomes one call then."""
        backend = self.site.backend
        if backend is None or (backend.op is None and self.call.written_as != "operations"):
            return None
        return backend


@dataclass(frozen=True, eq=False, kw_only=True)
class Swapped(Planned):
    """What `swap_kernels` gives where it has put a kernel in place: `node` gives the kernel's output."""


@dataclass(frozen=True)
class Missed:
    """Why something is no attention that could be swapped, and the node where that shows."""

    reason: str
    node: Node
