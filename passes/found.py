"""The data that the passes over one graph hand on to each other. Each step makes new objects and changes none.

Found  ->  Understood  ->  Planned  ->  Swapped
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch.fx import Node

from ..graphs.axes import Views, applied
from ..graphs.emitting import Emitter
from ..graphs.nodes import value_of, values_only
from ..graphs.sizes import Size
from ..kernels.calls import AttentionCall
from ..kernels.records import Backend
from ..masks.building import Proof
from ..planning.sites import Site


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, and what turns it into SDPA's (..., heads, length, dim): the views, the pads, then the factors."""

    node: Node
    views: Views = ()
    pads: tuple[tuple[Size, Size], ...] = ()  # elements before and after each dimension, for a part of a mask
    pad_value: float = 0
    factors: tuple[tuple[Operand, int], ...] = ()  # each is multiplied by (power 1) or divided by (power -1)

    @property
    def is_everywhere(self) -> bool:
        """Whether all elements are True before the pads (`everywhere`)."""
        return any(name == "new_ones" for name, _ in self.views)

    @cached_property
    def value(self) -> torch.Tensor:
        """The fake tensor after the views and factors."""
        given: torch.Tensor = value_of(self.node)
        if not self.views and not self.pads and not self.factors:
            return given
        with values_only(given):
            return self._made(lambda operand: value_of(operand.node))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype after the views."""
        casts = [arguments[0] for name, arguments in self.views if name == "to"]
        dtype: torch.dtype = casts[-1] if casts else value_of(self.node).dtype
        return dtype

    def emitted(self, emitter: Emitter) -> torch.Tensor:
        """The tensor after the views and factors, which are emitted as nodes of the graph."""
        return self._made(lambda operand: emitter.tensor(operand.node))

    def _made(self, tensor: Callable[[Operand], torch.Tensor]) -> torch.Tensor:
        result = applied(tensor(self), self.views)
        if self.pads:
            flat: list[Any] = [size for pair in reversed(self.pads) for size in pair]
            result = torch.nn.functional.pad(result, flat, value=self.pad_value)
        for factor, power in self.factors:
            amount = factor._made(tensor)
            result = result * amount if power == 1 else result / amount
        return result

    def moved(self, nodes: Mapping[Node, Node]) -> Operand:
        """The operand with each node of `nodes` replaced by its value there."""
        factors = tuple((factor.moved(nodes), power) for factor, power in self.factors)
        return replace(self, node=nodes.get(self.node, self.node), factors=factors)


def everywhere(rank: int) -> Views:
    """The views that make True, of `rank` dimensions of size 1, of any tensor: its values are not read."""
    return (("new_ones", ((1,) * rank,)), ("to", (torch.bool,)))


@dataclass(frozen=True)
class MaskTerm:
    """How one tensor changes the scaled scores.

    how: "add": adds `amount` times the tensor. "keep": fills the scores with `amount` where the tensor is False. "drop": fills
        them where the tensor is True.
    """

    tensor: Operand  # broadcasts to the scores (..., heads, q_len, kv_len)
    how: str
    amount: float  # a fill with -inf is a boolean mask


# A score that is added to a number at or below this one is lost: in float64 below 64, in float32 below 16.
VANISHING = -1e18
VANISHING_IN_FLOAT32 = -5e8


@dataclass(frozen=True)
class Operands:
    """The tensors of an attention."""

    query: Operand
    key: Operand
    value: Operand
    mask: tuple[MaskTerm, ...] = ()  # in the order in which the terms change the scores
    result: Views = ()  # from the kernel's output (..., heads, q_len, value_dim) to the value of the replaced node
    grouped: bool = False  # several query heads share a key head
    vanishing: float = VANISHING  # scores are lost beside such a number, whatever dtype the model is in

    def moved(self, nodes: Mapping[Node, Node]) -> Operands:
        """The operands with each node of `nodes` replaced by its value there."""
        mask = tuple(replace(term, tensor=term.tensor.moved(nodes)) for term in self.mask)
        query, key, value = (each.moved(nodes) for each in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask)


@dataclass(frozen=True, eq=False)
class Found:
    """One attention in a graph, as `find_calls` returns it. Compared by identity."""

    node: Node  # gives the attention's output
    call: AttentionCall
    operands: Operands | None = None  # None: the call must stay as it is
    chain: tuple[Node, ...] = ()  # nodes that the swap erases if they have no reader left

    def then(self, step: type[Next], **more: Any) -> Next:
        """This attention after the next step. more: the fields that the step adds or changes."""
        return step(**{**vars(self), **more})


Next = TypeVar("Next", bound=Found)


@dataclass(frozen=True, eq=False, kw_only=True)
class Understood(Found):
    """An attention as `understand_masks` returns it: the mask of its call is the kind that the graph proves."""

    proof: Proof | None = None  # None: nothing is proven


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned(Understood):
    """An attention after planning: its call has the device of its machine."""

    site: Site  # the decisions and the choice

    @property
    def kernel(self) -> Backend | None:
        """The chosen kernel; None if the call stays as it is, because nothing was chosen, or `native` for a single call of
        PyTorch. Under `native`, attention that is written otherwise becomes a single call."""
        backend = self.site.backend
        if backend is None or (backend.op is None and self.call.is_sdpa):
            return None
        return backend


@dataclass(frozen=True, eq=False, kw_only=True)
class Swapped(Planned):
    """An attention whose kernel `swap_kernels` has put in place: `node` gives the kernel's output."""


@dataclass(frozen=True)
class Missed:
    """Why an attention was not recognised."""

    reason: str
    node: Node  # the node at which recognition failed
