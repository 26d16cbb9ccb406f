"""Follows the dims of scores, weights and operands through views, copies, permutations and slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Atom, Axes, Axis, Dims
from ..graphs.mutations import written_by
from ..graphs.nodes import value_of
from ..graphs.sizes import Size, always, has_no_hint, holds_if_guarded
from ..graphs.spellings import TURNS, argument, first, keeps_order, name_of, permutation, same_shape, spelled
from ..masks.moving_rules import items


def before(node: Node, dims: Dims, axes: Axes) -> Dims | None:
    """The dims of the first argument of a view, a copy or a permutation that has `dims`; None for any other node."""
    source = value_of(first(node))
    if not isinstance(source, torch.Tensor) or source.dtype != value_of(node).dtype or written_by(node):
        return None
    if keeps_order(node):
        return axes.reshaped(dims, source.shape)
    name = spelled(node)
    if name == "expand" and same_shape(source, value_of(node)):
        return dims
    if name in TURNS and (order := permutation(node)) is not None:
        return tuple(dims[order.index(dim)] for dim in range(len(order)))
    return None


def after(node: Node, dims: Dims, axes: Axes) -> Dims | None:
    """The inverse of `before`: the dims of a view, a copy or a permutation whose first argument has `dims`."""
    source, value = value_of(first(node)), value_of(node)
    if not isinstance(value, torch.Tensor) or source.dtype != value.dtype or written_by(node):
        return None
    if keeps_order(node):
        return axes.reshaped(dims, value.shape)
    name = spelled(node)
    if name == "expand" and same_shape(source, value):
        return dims
    if name in TURNS and (order := permutation(node)) is not None:
        return tuple(dims[dim] for dim in order)
    return None


@dataclass(frozen=True)
class Cut:
    """A dimension of which a part is meant."""

    whole: Axis
    part: Atom
    start: Size  # of the part in the whole


@dataclass(frozen=True)
class Region:
    """The dims of a part of a tensor, and the cuts that make the part."""

    dims: Dims
    cuts: tuple[Cut, ...] = ()


class Part:
    """The views of one tensor, `whole`, which has `dims`: equal parts of a dimension are one atom, `scores[:, :, 1:]` is
    another than `scores[:, :, :-1]`."""

    def __init__(self, whole: Node, dims: Dims, axes: Axes) -> None:
        self.whole, self.dims, self.axes = whole, dims, axes
        self.views: list[Node] = []  # the views of the scores' own way, and those between them and the whole
        self._cuts: list[Cut] = []

    def region(self, view: Node) -> Region | None:
        """The region that a view of the whole shows; None for any other node."""
        if view is self.whole:
            return Region(self.dims)
        source = first(view)
        if not isinstance(source, Node) or not isinstance(value_of(source), torch.Tensor):
            return None
        found = self.region(source)
        if found is None:
            return None
        if written_by(view) == (source,) and name_of(view) != "setitem":
            return found if same_shape(value_of(view), value_of(source)) else None  # x.add_() returns x
        name = spelled(view)
        if name == "getitem":
            return self.indexed(source, found, view.args[1])
        if name in ("slice", "narrow", "select"):
            return self.along(view, found)
        if name in ("clone", "to"):  # a copy is no view
            return None
        dims = after(view, found.dims, self.axes)
        return None if dims is None else Region(dims, found.cuts)

    def take(self, view: Node) -> None:
        """Notes that `view`, which has a region, and the views before it belong to the scores."""
        while view is not self.whole:
            self.views.append(view)
            view = first(view)

    def indexed(self, source: Node, region: Region, index: Any) -> Region | None:
        """source[index], where source shows `region`."""
        shape = value_of(source).shape
        entries = items(index, len(shape))
        if entries is None:
            return None
        dims: list[Axis] = []
        sizes = iter(zip(region.dims, shape, strict=True))
        for entry in entries:
            if entry is None:
                dims.append(())
                continue
            axis, size = next(sizes)
            if isinstance(entry, slice):
                start, stop, step = (value_of(each) for each in (entry.start, entry.stop, entry.step))
                ends = _ends(start, stop, size) if step in (None, 1) else None
            else:
                ends = _ends(entry, None, size) if isinstance(entry, int | torch.SymInt) else None
                ends = None if ends is None else (ends[0], 1)
            if ends is None:
                return None
            region, part = self._cut(region, axis, size, *ends)
            if isinstance(entry, slice):
                dims.append(part)
        return Region(tuple(dims), region.cuts)

    def along(self, node: Node, region: Region) -> Region | None:
        """slice(x, dim, start, end), select(x, dim, index), narrow(x, dim, start, length) and their scatters, which have the
        other tensor as second argument; x shows `region`."""
        name, shift = str(spelled(node)), int(str(spelled(node)).endswith("_scatter"))
        shape = value_of(first(node)).shape
        dim, start = (
            value_of(argument(node, 1 + shift, "dim", default=0)),
            value_of(argument(node, 2 + shift, "start", "index")),
        )
        end, step = (
            value_of(argument(node, 3 + shift, "end", "length")),
            value_of(argument(node, 4 + shift, "step", default=1)),
        )
        if not isinstance(dim, int) or step != 1:
            return None
        dim %= len(shape)
        ends = _ends(start, None if name in ("select", "select_scatter", "narrow") else end, shape[dim])
        if ends is None:
            return None
        one = name.startswith("select")
        size = 1 if one else end if name == "narrow" else ends[1]
        region, part = self._cut(region, region.dims[dim], shape[dim], ends[0], size)
        middle = () if one else (part,)
        return Region((*region.dims[:dim], *middle, *region.dims[dim + 1 :]), region.cuts)

    def _cut(self, region: Region, axis: Axis, size: Size, start: Size, length: Size) -> tuple[Region, Axis]:
        """The region with one more cut, and the axis of the part."""
        if always(length == size):
            return region, axis
        atoms = self.axes.atoms(axis)
        outer = next((cut for cut in region.cuts if atoms == self.axes.atoms((cut.part,))), None)
        whole, begin = (axis, start) if outer is None else (outer.whole, outer.start + start)
        cut = self._known(whole, begin, length)
        cuts = (*(each for each in region.cuts if each is not outer), cut)
        return Region(region.dims, cuts), (cut.part,)

    def _known(self, whole: Axis, start: Size, length: Size) -> Cut:
        for cut in self._cuts:
            same = self.axes.atoms(cut.whole) == self.axes.atoms(whole)
            if same and always(cut.start == start) and always(cut.part.size == length):
                return cut
        self._cuts.append(Cut(whole, Atom(length), start))
        return self._cuts[-1]


def _ends(start: Any, stop: Any, size: Size) -> tuple[Size, Size] | None:
    """Start and length of the part start:stop of a dimension; None where the numbers do not show them."""
    start = 0 if start is None else start
    stop = size if stop is None or (isinstance(stop, int) and stop > 1 << 60) else stop
    if not all(isinstance(each, int | torch.SymInt) for each in (start, stop)):
        return None
    ends = []
    for each in (start, stop):
        if _holds(each >= 0) and _holds(each <= size):
            ends.append(each)
        elif _holds(each < 0) and _holds(-each <= size):
            ends.append(each + size)
        elif _holds(each > size):
            ends.append(size)
        else:
            return None
    return (ends[0], ends[1] - ends[0]) if _holds(ends[1] - ends[0] > 0) else None


def _holds(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on the part holds, with a guard where that is not known of all sizes: `scores[..., n:]` with
    a symbolic n. False where the answer depends on data, and in an exported program, which the answer would restrict."""
    return always(condition) or (not has_no_hint(condition) and holds_if_guarded(condition))
