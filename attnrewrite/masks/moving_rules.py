"""Rules of functions that read an element of another tensor at other indices, or make a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.sizes import is_one
from ..graphs.spellings import name_of
from .expressions import Value, is_exact
from .indices import Index, at_least_zero, constant, divided, index_of, within
from .rules import Indices, Reader, argument, number_as, tensor

# -- views and other moves


def reshaped(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """All functions that keep the order of the elements: view, flatten, unsqueeze, ..."""
    found = tensor(node)
    if found is None or found[1].dtype != value_of(node).dtype:
        return None
    old = [index_of(size) for size in found[1].shape]
    new = [index_of(size) for size in value_of(node).shape]
    result = [constant(0)] * len(old)
    left = [place for place, size in enumerate(old) if size.number != 1]
    right = [place for place, size in enumerate(new) if size.number != 1]
    for end in (0, -1):  # match equal sizes from either end
        while left and right and old[left[end]] == new[right[end]]:
            result[left.pop(end)] = indices[right.pop(end)]
    flat = constant(0)
    for place in right:
        flat = flat * new[place] + indices[place]
    for place in reversed(left[1:]):
        flat, result[place] = divided(flat, old[place])
    if left:
        result[left[0]] = flat
    return reader.read(found[0], tuple(result), at)


def expanded(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    found = tensor(node)
    return reader.operand(found[0], indices, at) if found is not None else None


def permuted(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    found = tensor(node)
    if found is None:
        return None
    rank, name = found[1].dim(), name_of(node)
    order = list(range(rank))
    if name in ("permute",):
        given = argument(node, 1, "dims")
        dims: list[Any] = list(given) if isinstance(given, list | tuple) else list(node.args[1:])
        if len(dims) != rank:
            return None
        order = [dim % rank for dim in dims]
    else:
        one, other = (0, 1) if name == "t" else (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        if name == "t" and rank < 2:
            return reader.read(found[0], indices, at)
        if not isinstance(one, int) or not isinstance(other, int):
            return None
        order[one], order[other] = order[other], order[one]
    result = [constant(0)] * rank
    for place, dim in enumerate(order):
        result[dim] = indices[place]
    return reader.read(found[0], tuple(result), at)


def sliced(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """aten.slice(x, dim, start, end, step); narrow(x, dim, start, length)"""
    found = tensor(node)
    if found is None:
        return None
    dim, start = argument(node, 1, "dim", 0), argument(node, 2, "start")
    step = 1 if name_of(node) == "narrow" else argument(node, 4, "step", 1)
    begin = _start(start, found[1].shape[dim])
    if begin is None or not isinstance(step, int) or step < 1:
        return None
    result = list(indices)
    result[dim] = begin + indices[dim] * step
    return reader.read(found[0], tuple(result), at)


def _start(start: Any, size: Any) -> Index | None:
    if start is None:
        return constant(0)
    if not isinstance(start, int | torch.SymInt):  # a tensor, or a list of positions
        return None
    begin = index_of(start)
    if at_least_zero(begin):
        return begin
    begin = begin + index_of(size)
    return begin if at_least_zero(begin) else None


def selected(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """aten.select(x, dim, index)"""
    found, place = tensor(node), argument(node, 2, "index")
    if found is None or isinstance(place, Node):
        return None
    dim = argument(node, 1, "dim") % found[1].dim()
    begin = _start(place, found[1].shape[dim])
    return None if begin is None else reader.read(found[0], (*indices[:dim], begin, *indices[dim:]), at)


def items(given: Any, rank: int) -> list[Any] | None:
    """The entries of x[...], with the ellipsis expanded to slices; None if an entry is True or False."""
    entries = list(given) if isinstance(given, tuple | list) else [given]
    entries = [value_of(each) if isinstance(value_of(each), torch.SymInt) else each for each in entries]
    if any(isinstance(each, bool) for each in entries):
        return None
    used = sum(each is not None and each is not Ellipsis for each in entries)
    if not any(each is Ellipsis for each in entries):
        entries.append(Ellipsis)
    place = next(place for place, each in enumerate(entries) if each is Ellipsis)
    return [*entries[:place], *[slice(None)] * (rank - used), *entries[place + 1 :]]


def _bounds(entry: slice) -> list[Any] | None:
    parts = [value_of(part) if isinstance(part, Node) else part for part in (entry.start, entry.stop, entry.step)]
    return None if any(isinstance(part, torch.Tensor) for part in parts) else parts


def item(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """x[None, 0, 1:, ...], or x[rows, columns] with integers that the graph computes from positions."""
    found = tensor(node)
    if found is None:
        return None
    entries = items(argument(node, 1, "index"), found[1].dim())
    if entries is None:
        return None
    if any(isinstance(each, Node) for each in entries):
        return gathered(reader, found[0], entries, indices, at)
    result, places = [], iter(indices)
    shape = iter(found[1].shape)
    for entry in entries:
        if entry is None:
            next(places)
            continue
        size = next(shape)
        if isinstance(entry, slice):
            bounds = _bounds(entry)
            begin = None if bounds is None else _start(bounds[0], size)
            step = 1 if bounds is None or bounds[2] is None else bounds[2]
            if begin is None or not isinstance(step, int) or step < 1:
                return None
            result.append(begin + next(places) * step)
        else:
            begin = _start(entry, size)
            if begin is None:
                return None
            result.append(begin)
    return reader.read(found[0], tuple(result), at)


def gathered(reader: Reader, source: Node, entries: list[Any], indices: Indices, at: float) -> Value | None:
    shape = value_of(source).shape
    if len(entries) != len(shape):
        return None
    result = []
    for entry, size in zip(entries, shape, strict=True):
        if (
            isinstance(entry, slice)
            or entry is None
            or (isinstance(entry, Node) and value_of(entry).dtype == torch.bool)
        ):
            return None
        place = reader.operand(entry, indices, at)
        if place is None or place.kind not in ("index", "constant"):
            return None
        index = place.parts[0] if place.kind == "index" else constant(place.number)
        if not within(index, index_of(size)):
            return None
        result.append(index)
    return reader.read(source, tuple(result), at)


def indexed(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """aten.index(x, [rows, columns])"""
    found = tensor(node)
    return None if found is None else gathered(reader, found[0], list(argument(node, 1, "indices")), indices, at)


def repeated(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    found = tensor(node)
    if found is None:
        return None
    lead = len(indices) - found[1].dim()
    sizes = zip(found[1].shape, indices[lead:], strict=True)
    places = tuple(constant(0) if is_one(size) else divided(index, index_of(size))[1] for size, index in sizes)
    return reader.read(found[0], places, at)


def interleaved(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    found, times, dim = tensor(node), argument(node, 1, "repeats"), argument(node, 2, "dim")
    if found is None or isinstance(times, Node) or not isinstance(dim, int):
        return None
    result = list(indices)
    result[dim] = divided(indices[dim], index_of(times))[0]
    return reader.read(found[0], tuple(result), at)


def concatenated(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    parts = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(parts, list | tuple) or not all(isinstance(value_of(part), torch.Tensor) for part in parts):
        return None
    if any(value_of(part).dtype != value_of(node).dtype or value_of(part).dim() != len(indices) for part in parts):
        return None
    make, found, begin = reader.expressions, None, constant(0)
    pieces = []
    for part in parts:
        end = begin + index_of(value_of(part).shape[dim])
        pieces.append((part, begin, end))
        begin = end
    for part, begin, end in reversed(pieces):
        here = make.at_least_zero(end - 1 - indices[dim])
        if here is make.false:
            continue
        places = list(indices)
        places[dim] = indices[dim] - begin
        value = reader.read(part, tuple(places), at)
        found = value if found is None else make.select(here, value, found)
    return found


def padded(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    found, pads = tensor(node), argument(node, 1, "pad")
    fill = argument(node, 2, "value", 0) if name_of(node) == "constant_pad_nd" else argument(node, 3, "value", 0)
    mode = "constant" if name_of(node) == "constant_pad_nd" else argument(node, 2, "mode", "constant")
    if found is None or mode != "constant" or any(isinstance(value_of(each), torch.Tensor) for each in (*pads, fill)):
        return None
    make = reader.expressions
    outside = number_as(reader, 0 if fill is None else fill, value_of(node).dtype)
    places, inside = list(indices), make.true
    for place in range(len(pads) // 2):
        dim = -1 - place
        before = pads[2 * place]
        places[dim] = indices[dim] - index_of(value_of(before))
        end = index_of(found[1].shape[dim]) - 1 - places[dim]
        inside = make.and_(inside, make.at_least_zero(places[dim]), make.at_least_zero(end))
    return None if outside is None else make.select(inside, reader.read(found[0], tuple(places), at), outside)


def same(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    """All functions that keep each element, perhaps in another dtype."""
    found = tensor(node)
    if found is None or found[1].shape != value_of(node).shape:
        return None
    value = reader.read(found[0], indices, at)
    dtype: torch.dtype = value_of(node).dtype
    return value if dtype == found[1].dtype else reader.expressions.cast(value, dtype)


# -- tensors that the graph makes


def filled(place: int, name: str) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
        return number_as(reader, argument(node, place, name), value_of(node).dtype)

    return rule


def number(number: int) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
        return number_as(reader, number, value_of(node).dtype)

    return rule


def arange(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
    given = [value_of(each) for each in node.args[:3]]
    start: Any = value_of(given[0] if len(given) > 1 else node.kwargs.get("start", 0))
    step: Any = given[2] if len(given) > 2 else node.kwargs.get("step", 1)
    whole = isinstance(start, int | torch.SymInt) and isinstance(step, int) and not isinstance(start, bool)
    if not whole:
        return None
    index = index_of(start) + indices[0] * step
    return reader.expressions.index(index) if is_exact(index, value_of(node).dtype) else None


# -- writes


def assigned(reader: Reader, write: Node, indices: Indices, old: Value, at: float) -> Value | None:
    """x[1:, 0, ...] = value"""
    target, given, value = write.args
    shape = value_of(target).shape
    entries = items(given, len(shape))
    if entries is None or len(entries) != len(shape):
        return None
    make, inside, places = reader.expressions, reader.expressions.true, []
    for entry, size, index in zip(entries, shape, indices, strict=True):
        if isinstance(entry, slice):
            bounds = _bounds(entry)
            if bounds is None or bounds[2] not in (None, 1):
                return None
            begin, end = _start(bounds[0], size), index_of(size) if bounds[1] is None else _start(bounds[1], size)
            if begin is None or end is None:
                return None
            inside = make.and_(inside, make.at_least_zero(index - begin), make.at_least_zero(end - 1 - index))
            places.append(index - begin)
        else:
            begin = None if isinstance(entry, Node) or entry is None else _start(entry, size)
            if begin is None:
                return None
            inside = make.and_(inside, make.zero(index - begin))
    new = reader.operand(value, tuple(places), at)
    new = None if new is None else make.cast(new, value_of(target).dtype)
    return None if new is None else make.select(inside, new, old)


_same_order = (
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze",
)  # fmt: skip
_copies = (
    "contiguous", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy", "to", "_to_copy", "type", "type_as", "bool",
    "float", "half", "bfloat16", "double", "int", "long", "cpu", "cuda", "positive",
)  # fmt: skip

MOVES: dict[str, Callable[..., Value | None]] = {
    **dict.fromkeys(_same_order, reshaped),
    **dict.fromkeys(_copies, same),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expanded),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "t"), permuted),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenated),
    **dict.fromkeys(("pad", "constant_pad_nd"), padded),
    **dict.fromkeys(("slice", "narrow"), sliced),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), number(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), number(0)),
    "full": filled(1, "fill_value"),
    "full_like": filled(1, "fill_value"),
    "new_full": filled(2, "fill_value"),
    "scalar_tensor": filled(0, "s"),
    "tensor": filled(0, "data"),
    "arange": arange,
    "select": selected,
    "getitem": item,
    "index": indexed,
    "repeat": repeated,
    "repeat_interleave": interleaved,
}
