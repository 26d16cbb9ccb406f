"""Walks from an operand of a product back to the tensor that a kernel should get: past scalings, upcasts, repetitions and
views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Atom, Axes, Dims, Views
from ..graphs.mutations import Writes, written_by
from ..graphs.nodes import value_of
from ..graphs.sizes import is_one
from ..graphs.spellings import argument, first, integers, is_number, same_shape, spelled
from .moves import before
from .scores import DEPTH


@dataclass(frozen=True)
class Readable:
    """A node that a kernel could read, and the operations that were passed between the node and the product."""

    node: Node
    dims: Dims  # of the node
    reader: Node  # the node that reads it
    passed: tuple[Node, ...] = ()  # the nodes between it and the product
    scales: tuple[tuple[Any, int], ...] = ()  # (number, power) of the scalings
    repeats: int = 0  # number of repetitions
    casts: int = 0  # number of casts from float16 or bfloat16 to float32
    flips: int = 0  # number of negations of a boolean mask
    work: int = 0  # number of all of these and of copies in memory: operations that a kernel makes unnecessary

    def atoms(self, axes: Axes) -> set[Atom]:
        return {atom for axis in self.dims for atom in axes.atoms(axis)}


def readables(
    node: Node,
    dims: Dims,
    reader: Node,
    axes: Axes,
    writes: Writes,
    later: Node,
    scales: bool = False,
    narrow: torch.dtype | None = None,
    repeats: bool = False,
    flips: bool = False,
) -> list[Readable]:
    """The nodes from which `reader` gets its operand `node`, the nearest first, that still hold the same values when `later`
    reads them. scales, repeats, flips: whether to pass such operations. narrow: the dtype from which upcasts are passed."""
    found: list[Readable] = []
    at: Readable | None = Readable(node, dims, reader)
    while at is not None and len(found) < DEPTH and writes.unchanged(at.node, at.reader, later):
        found.append(at)
        if writes.current(at.node, at.reader) is not at.node or written_by(at.node):
            break  # its source held other values before
        at = _back(at, axes, scales, narrow, repeats, flips)
    return found


def best(axes: Axes, found: list[Readable], target: Dims) -> tuple[Readable, Views] | None:
    """The candidate that saves the most work, then the one with the fewest views to `target`, then the nearest; with its views.
    None if no candidate has views to `target`."""
    fitting = [(each, views) for each in found if (views := axes.views(each.dims, target)) is not None]
    return min(fitting, key=lambda pair: (-pair[0].work, len(pair[1])), default=None)


def _back(at: Readable, axes: Axes, scales: bool, narrow: Any, repeats: bool, flips: bool) -> Readable | None:
    """One operation further back; None if the operation cannot be passed."""
    node, name = at.node, spelled(at.node)
    source: Any = first(node)
    value = value_of(node)
    if name is None or (name == "getattr" and not isinstance(source, Node)):
        return None
    if name in ("mul", "div") and scales:
        return _unscaled(at, name)
    if not isinstance(source, Node) or not isinstance(value_of(source), torch.Tensor):
        return None
    if name == "to":
        if value_of(source).device != value.device:
            return None
        if value_of(source).dtype == value.dtype:
            return _step(at, source, at.dims)
        if value_of(source).dtype == narrow and value.dtype == torch.float32:
            return _step(at, source, at.dims, casts=at.casts + 1, work=at.work + 1)
        return None
    if name == "logical_not" and flips and value_of(source).dtype == torch.bool:
        return _step(at, source, at.dims, flips=at.flips + 1, work=at.work + 1)
    dims = before(node, at.dims, axes)
    if dims is not None:
        copies = name == "clone" and value_of(source).stride() != value.stride()
        return _step(at, source, dims, work=at.work + copies)
    if repeats and (dims := _unrepeated(node, name, at.dims, axes)) is not None:
        return _step(at, source, dims, repeats=at.repeats + 1, work=at.work + 1)
    return None


def _unscaled(at: Readable, name: str) -> Readable | None:
    source, factor = first(at.node), argument(at.node, 1, "other")
    if name == "mul" and is_number(source):
        source, factor = factor, source
    tensor, value = value_of(source), value_of(at.node)
    if not isinstance(source, Node) or not isinstance(tensor, torch.Tensor) or not is_number(factor):
        return None
    if not same_shape(tensor, value) or tensor.dtype != value.dtype or at.node.kwargs.get("rounding_mode") is not None:
        return None
    scales = (*at.scales, (factor, -1 if name == "div" else 1))
    return _step(at, source, at.dims, scales=scales, work=at.work + 1)


def _step(at: Readable, source: Node, dims: Dims, **changes: Any) -> Readable:
    return replace(at, node=source, dims=dims, reader=at.node, passed=(*at.passed, at.node), **changes)


def _unrepeated(node: Node, name: str, dims: Dims, axes: Axes) -> Dims | None:
    """The dims before a repetition, without the repeated atoms; None if the node is no such repetition."""
    source = value_of(first(node))
    if name == "expand":
        return axes.broadcast(dims, source.shape, value_of(node).shape)
    if name == "repeat_interleave":
        times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if not isinstance(times, int) or not isinstance(dim, int):
            return None
        dim %= source.dim()
        split = axes.reshaped((dims[dim],), (source.shape[dim], times))
        return None if split is None else (*dims[:dim], split[0], *dims[dim + 1 :])
    if name == "repeat":
        times = integers(node, "repeats", "dims")
        if len(times) != source.dim() or not all(isinstance(each, int) for each in times):
            return None
        result = list(dims)
        for dim, each in enumerate(times):
            if not is_one(each):
                split = axes.reshaped((dims[dim],), (each, source.shape[dim]))
                if split is None:
                    return None
                result[dim] = split[1]
        return tuple(result)
    return None
