"""Reads one element of a tensor out of a graph, Dynamo's or exported, as an expression: through views, slices, concatenations,
comparisons and arithmetic that have a rule (rules.py). The element of any other node is a read of that node's tensor.

In-place writes: a tensor that the graph itself fills (`zeros(...).masked_fill_(...)`, `mask[:, :n] = True`) is followed write
by write. Any other tensor that is written into can be read after its last write; an earlier read raises `Unstable`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.mutations import RESHAPES, changed_in_place, storage_of, written_by
from ..graphs.nodes import value_of
from ..graphs.sizes import always, is_one
from ..graphs.spellings import base_name, name_of
from .elementwise_rules import ELEMENTWISE
from .expressions import Expressions, Value, is_axis
from .indices import Index, constant, index_of, within
from .moving_rules import MOVES, assigned

DEEPEST, MOST_READS = 120, 4000  # limits for one mask; no mask that a kernel supports needs more


def is_plain(node: Node, indices: tuple[Index, ...]) -> bool:
    """Whether each index is a whole axis, used once, or a fixed position: then a view of the node's tensor holds the value."""
    axes = [is_axis(index) for index in indices]
    named = [axis.dim for axis in axes if axis is not None]
    return len(set(named)) == len(named) and all(
        axis.extent == index_of(size)
        if axis is not None
        else index.number is not None and within(index, index_of(size))
        for axis, index, size in zip(axes, indices, value_of(node).shape, strict=True)
    )


class Unstable(Exception):
    """The tensor is written into after it was read, so the attention site cannot read the same values."""


class Reader:
    """Reads elements of the tensors of one graph. Equal values of all its masks are one object (`expressions`).

    zeros_and_ones: assumes that the graph's inputs hold only 0 and 1, as a mask does that should be boolean. Only for advice.
    """

    def __init__(self, graph_module: GraphModule, zeros_and_ones: bool = False) -> None:
        self._zeros_and_ones = zeros_and_ones
        self.expressions = Expressions()
        self.homes: dict[Value, tuple[Node, tuple[Index, ...]]] = {}  # a tensor that holds the value, and its indices
        self._positions = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        # By storage: (position of the write in the graph, writing node, node whose tensor is written into).
        self._writes: dict[int, list[tuple[float, Node, Node]]] = {}
        for node, place in self._positions.items():
            for target in written_by(node):
                if (storage := storage_of(value_of(target))) is not None:
                    when = float("inf") if name_of(node) in RESHAPES else place
                    self._writes.setdefault(storage, []).append((when, node, target))
        self._known: dict[Any, Value | None] = {}
        self._depth = self._reads = 0

    def element(self, node: Node, indices: tuple[Index, ...], site: Node) -> Value:
        """The element of a node's tensor at `indices`, as `site` reads it. Raises `Unstable`."""
        self._depth = self._reads = 0
        return self.read(node, indices, self._positions[site])

    def read(self, node: Node, indices: tuple[Index, ...], at: float) -> Value:
        """The element of a node's tensor at `indices`, as it is at position `at` of the graph. Raises `Unstable`."""
        storage = storage_of(value_of(node))
        if storage is None:
            raise Unstable
        writes = self._writes.get(storage, [])
        before = sum(when < at for when, *_ in writes)
        key = (node, indices, before)
        if key not in self._known:
            self._reads += 1
            self._depth += 1
            try:
                self._known[key] = self._read(node, indices, at, writes, before)
            finally:
                self._depth -= 1
        found = self._known[key]
        if found is None:
            raise Unstable
        return found

    def _read(self, node: Node, indices: tuple[Index, ...], at: float, writes: list[Any], before: int) -> Value | None:
        found = None
        if self._depth < DEEPEST and self._reads < MOST_READS:
            with suppress(Unstable):
                found = self._derived(node, indices, at, writes[:before])
        value = value_of(node)
        if found is None and before == len(writes):
            places = zip(indices, value.shape, value.stride(), strict=True)
            indices = tuple(
                constant(0) if is_one(size) or always(stride == 0) else index for index, size, stride in places
            )
            assumed = self._zeros_and_ones and node.op == "placeholder"
            found = self.expressions.read(node, indices, assumed or value.dtype == torch.bool)
            if value.dtype != torch.bool:
                found = self.expressions.as_number(found)
        if found is not None and not writes and (found not in self.homes or not is_plain(*self.homes[found])):
            self.homes[found] = (node, indices)
        return found

    def _derived(self, node: Node, indices: tuple[Index, ...], at: float, writes: list[Any]) -> Value | None:
        """The element by the rule for the node's function, then by the writes into its tensor since."""
        name, storage = name_of(node), storage_of(value_of(node))
        if writes and (changed := changed_in_place(node)) is not None:
            return self.read(changed, indices, at)  # x.fill_() returns x
        view = any(storage_of(value_of(each)) == storage for each in node.all_input_nodes)
        if (rule := MOVES.get(name)) is not None:
            found = rule(self, node, indices, at if view else self._positions[node])
        else:  # a function that returns an argument, as with out=, is not followed
            found = None if view else self._elementwise(node, base_name(node), indices, self._positions[node])
        if found is None or view:
            return found
        for when, write, target in writes:
            found = self._written(node, indices, found, when, write, target)
            if found is None:
                return None
        return found

    def _written(
        self, node: Node, indices: tuple[Index, ...], old: Value, when: float, write: Node, target: Node
    ) -> Value | None:
        while target is not node:  # x.fill_().tril_(): each write returns x
            changed = changed_in_place(target)
            if changed is None:
                return None
            target = changed
        if name_of(write) == "setitem":
            return assigned(self, write, indices, old, when)
        if changed_in_place(write) is None:  # out=, or an unknown function
            return None
        return self._elementwise(write, base_name(write), indices, when, old)

    def _elementwise(
        self, node: Node, name: str, indices: tuple[Index, ...], at: float, first: Value | None = None
    ) -> Value | None:
        """first: the value of the first operand, if it is known already."""
        if name not in ELEMENTWISE or not isinstance(value_of(node), torch.Tensor):
            return None
        count, names, rule = ELEMENTWISE[name]
        given = list(node.args[:count])
        given += [node.kwargs[each] for each in names[len(given) : count] if each in node.kwargs]
        if len(given) != count:
            return None
        values = [first] if first is not None else []
        for each in given[len(values) :]:
            operand = self.operand(each, indices, at)
            if operand is None:
                return None
            values.append(operand)
        return rule(self, node, values, indices)

    def operand(self, given: Any, indices: tuple[Index, ...], at: float) -> Value | None:
        """The element of an operand that an elementwise function reads for the element `indices` of its result: operands
        broadcast."""
        value = value_of(given)
        if isinstance(value, torch.SymInt):
            return self.expressions.index(index_of(value))
        if isinstance(value, bool | int | float):
            return self.expressions.constant(value)
        if not isinstance(given, Node) or not isinstance(value, torch.Tensor) or value.dim() > len(indices):
            return None
        aligned = zip(value.shape, indices[len(indices) - value.dim() :], strict=True)
        return self.read(given, tuple(constant(0) if is_one(size) else index for size, index in aligned), at)
