"""What the passes over one graph hand on to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch.fx import Node

from ..graphs.axes import Views, applied
from ..graphs.emitting import Emitter
from ..graphs.nodes import Surroundings, value_of, values_only
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


@dataclass
class Found:
    """One attention in a graph: the node that gives its output, and what it asks for; after planning also its site of the
    plan.

    `chain`: the nodes that a swap may leave without a reader, so that they go with it. `operands` None: the call can only
    stay as it is. `proof`: what `understand_masks` has read of its mask.
    """

    node: Node
    call: AttentionCall
    operands: Operands | None = None
    chain: tuple[Node, ...] = ()
    site: Site | None = None
    proof: Proof | None = None

    @property
    def kernel(self) -> Backend | None:
        """The chosen kernel, None where the call stays as it is: nothing was chosen, or `native` for what is one call of
        PyTorch already. Attention in tensor operations becomes one call then."""
        backend = self.site.backend if self.site is not None else None
        if backend is None or (backend.op is None and self.call.form != "operations"):
            return None
        return backend


@dataclass
class Context:
    """`surroundings`: what this graph is called in.

    `names` counts site names over all graphs of one compilation, so that no two sites share one.
    """

    surroundings: Surroundings = field(default_factory=Surroundings)
    names: dict[str, int] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
