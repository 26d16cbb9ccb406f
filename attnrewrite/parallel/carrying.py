"""`Flow.carried`: what ranks hold of each tensor when a model's own code runs on parts of tensors that somebody cuts.

A plan of diffusers cuts and gathers tensors at the borders of modules, and changes nothing between: each operation must do the
right thing with a part. `Fault` says where one does not. Only attention is exchanged: of the shared keys each rank gets all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.boundaries import Boundary, boundary_of
from ..graphs.mutations import storage_of, written_storages
from ..graphs.nodes import SDPA_TARGETS, value_of
from ..graphs.operators import is_operator
from ..graphs.sizes import Size, is_one
from ..graphs.trees import leaves
from . import steps
from .following import Calls, followed, is_member, is_size, member_of
from .layouts import Placement, Shard, same
from .rows import ANY, ATTENTION, Call

# Kinds of faults.
UNSHARED = "unshared"  # a self attention whose queries every rank has whole
MISSING = "missing"  # a tensor that is whole, where a part is needed
WHOLE = "whole"  # a tensor of which a rank has a part, where all of it is needed
TWICE = "twice"  # a part that is cut once more
NOT_SHARED = "not shared"  # a tensor that is gathered, and that every rank has whole
SEGMENTS = "segments"  # a joint sequence that is gathered: its tokens would be in another order
KEYS = "keys"  # shared keys of cross attention: right only where the model exchanges them

FILLS = ("ones", "zeros", "full", "new_ones", "new_zeros", "new_full")  # each part of such a tensor is the same


@dataclass(frozen=True, eq=False)
class Fault:
    """A tensor of which a rank holds the wrong thing, for a call."""

    kind: str
    tensor: Node
    at: Node  # the call; the boundary at which a plan cuts or gathers
    shard: Placement = None  # MISSING: what is needed; else what a rank has


@dataclass(frozen=True)
class Carried:
    """What a rank has of each tensor, and where that is wrong."""

    held: Mapping[Node, Any]
    faults: tuple[Fault, ...]


class Flow:
    """The graph of a model, with the boundaries of its modules."""

    def __init__(self, module: GraphModule, ranks: int, paths: Mapping[Node, str]) -> None:
        """module: of operators, after `read_marks`. paths: the module of each node."""
        self.module = module
        self.ranks = ranks
        self.paths = paths
        self.calls = Calls()
        self.written = written_storages(module)
        self.nodes = list(module.graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.boundaries: dict[Boundary, list[Node]] = {}
        for node in self.nodes:
            if (boundary := boundary_of(node)) is not None:
                self.boundaries.setdefault(boundary, []).append(node)
        found = [node for node in self.nodes if node.op == "call_function" and node.target in SDPA_TARGETS]
        self.self_attentions = [node for node in found if self._is_self(node)]
        longest = max((self._length(node) for node in self.self_attentions), default=0)
        # A plan need not share the short ones, as the attention of a text refiner.
        self.main = {node for node in self.self_attentions if self._length(node) == longest}

    def _length(self, node: Node) -> int:
        return int(self.calls[node].shape()[-2])

    def _is_self(self, node: Node) -> bool:
        call = self.calls[node]
        query, key = (followed((call.tensors[at], call.rank(at) - 2), self.calls, None) for at in (0, 1))
        return call.rank() >= 3 and bool(query & key)

    def shape(self, boundary: Boundary) -> tuple[Size, ...]:
        return tuple(value_of(self.boundaries[boundary][0]).shape)

    def name(self, node: Node) -> str:
        """A node for readers: "blocks.0.attn1: slice"."""
        if (boundary := boundary_of(node)) is not None:
            return str(boundary)
        if node.op != "call_function":
            return str(node.target)
        path, call = self.paths.get(node, ""), self.calls[node].name or str(node.target)
        return f"{path}: {call}" if path else call

    def carried(self, splits: Mapping[Boundary, int], gathers: Mapping[Boundary, int]) -> Carried:
        """splits, gathers: the boundaries at which a plan cuts and gathers, with the dimension. Behind a fault a rank has what
        it should have, so that one fault is not reported again at what follows."""
        return _Carrier(self, splits, gathers).run()

    def is_filled(self, node: Node) -> bool:
        """Whether a tensor is made of one number, with a length that the model's code reads from other tensors."""
        if node.op != "call_function" or storage_of(value_of(node)) in self.written:
            return False
        call = self.calls[node]
        if call.name in FILLS:
            return True
        shaped = call.name in (
            "expand",
            "alias",
            "to",
            "_to_copy",
            "unsqueeze",
            "view",
            "clone",
            "slice",
            "bitwise_not",
        )
        return shaped and bool(call.tensors) and self.is_filled(call.tensors[0])


class _Carrier:
    def __init__(self, flow: Flow, splits: Mapping[Boundary, int], gathers: Mapping[Boundary, int]) -> None:
        self.flow = flow
        self.splits = splits
        self.gathers = gathers
        self.held: dict[Node, Any] = {}
        self.faults: list[Fault] = []

    def run(self) -> Carried:
        for node in self.flow.nodes:
            self.held[node] = self._placement(node)
            boundary = boundary_of(node)
            if boundary is None:
                continue
            if boundary in self.splits:
                self._cut(node, self.splits[boundary])
            if boundary in self.gathers:
                self._gather(node, self.gathers[boundary])
        return Carried(self.held, tuple(self.faults))

    def _cut(self, node: Node, dim: int) -> None:
        if self.held[node] is not None:
            self.faults.append(Fault(TWICE, node, node, self.held[node]))
        else:
            self.held[node] = Shard(dim, (value_of(node).shape[dim],))

    def _gather(self, node: Node, dim: int) -> None:
        held = self.held[node]
        if held is None:
            self.faults.append(Fault(NOT_SHARED, node, node))
        elif len(held.lengths) > 1 or held.dim != dim:
            self.faults.append(Fault(SEGMENTS, node, node, held))
        self.held[node] = None

    def _placement(self, node: Node) -> Any:
        if node.op in ("placeholder", "get_attr") or is_size(node):
            return None
        if node.op == "output":
            for each in leaves(node.args):
                if isinstance(each, Node):
                    self._need(each, None, node)
            return None
        if is_member(node):
            source, index = member_of(node)
            of_all = self.held[source]
            return of_all[index] if isinstance(of_all, tuple) else None
        call = self.flow.calls[node]
        if not is_operator(node.target) or not call.tensors:
            for each in node.all_input_nodes:
                self._need(each, None, node)
            return None
        if call.name in FILLS:  # new_ones(...) reads the dtype of its tensor
            return None
        if call.name == ATTENTION:
            return self._attention(call)
        placements = [self.held[each] for each in call.tensors]
        step = self._step(call, placements)
        for each, placement in zip(call.tensors, step.inputs, strict=True):
            if not (isinstance(placement, int) and placement == ANY):
                self._need(each, placement, node)
        return step.output

    def _step(self, call: Call, placements: list[Any]) -> steps.Step:
        for position, shard in enumerate(placements):
            if isinstance(shard, Shard):
                step = (
                    steps.joined(call, placements, shard)
                    or steps.by_row(call, position, shard)
                    or steps.cut(call, shard, self.flow.ranks)
                )
                if step is not None:
                    return step
        return steps.whole(call)

    def _need(self, node: Node, placement: Placement, at: Node) -> None:
        held = self.held[node]
        if isinstance(held, tuple) or same(held, placement) or not isinstance(value_of(node), torch.Tensor):
            return
        if held is not None:
            self.faults.append(Fault(WHOLE, node, at, held))
        elif not self.flow.is_filled(node):
            self.faults.append(Fault(MISSING, node, at, placement))

    def _attention(self, call: Call) -> Placement:
        """An exchange gives each query all keys. A mask of the keys is gathered as they are (attention_dispatch.py of
        diffusers), so that a mask which is whole has another order of tokens than joint keys."""
        query: Placement
        query, key, value = (self.held[each] for each in call.tensors[:3])
        tokens = call.rank() - 2
        node = call.node
        if query is None and key is None and value is None:
            if node in self.flow.main:
                self.faults.append(Fault(UNSHARED, call.tensors[0], node))
            return None
        if query is not None and query.dim != tokens:
            step = steps.by_row(call, 0, query)
            for each, placement in zip(call.tensors, step.inputs if step else [None] * len(call.tensors), strict=True):
                self._need(each, placement, node)
            return query if step else None
        if query is None and node in self.flow.self_attentions:
            self._need(call.tensors[0], key or value, node)
            query = key or value
        of_keys = key or value
        if of_keys is not None:
            self._need(call.tensors[1], of_keys, node)
            self._need(call.tensors[2], of_keys, node)
            if node not in self.flow.self_attentions:
                self.faults.append(Fault(KEYS, call.tensors[1], node, of_keys))
        elif node in self.flow.self_attentions:
            self._need(call.tensors[1], query, node)
            self._need(call.tensors[2], query, node)
        for mask in call.tensors[3:]:
            self._mask(mask, query, of_keys, node)
        return query

    def _mask(self, mask: Node, query: Placement, key: Placement, at: Node) -> None:
        shape = value_of(mask).shape
        held = self.held[mask]
        if len(shape) >= 2 and not is_one(shape[-2]) and query is not None and key is None:
            self._need(mask, query.along(len(shape) - 2), at)
        elif is_one(shape[-1]) or key is None or (held is None and len(key.lengths) == 1):
            self._need(mask, None, at)
        else:
            self._need(mask, key.along(len(shape) - 1), at)
