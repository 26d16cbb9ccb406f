"""Rules for `reading.Reader`, one for each torch function, in all its spellings: how an element of its result is computed.

The rules of `MOVES` read an element of another tensor at other indices; the rules of `ELEMENTWISE` compute an element from the
operands' elements at the same indices. A rule returns None where it does not apply.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.sizes import is_one
from ..graphs.spellings import base_name, name_of
from .expressions import Expressions, Value, is_exact, rounded
from .indices import Index, at_least_zero, constant, divided, index_of, within

Indices = tuple[Index, ...]


class Reader(Protocol):
    """The part of `reading.Reader` that rules use."""

    expressions: Expressions

    def read(self, node: Node, indices: Indices, at: float) -> Value:
        """The element of a node's tensor at `indices`, as it is at position `at` of the graph."""
        ...

    def operand(self, given: Any, indices: Indices, at: float) -> Value | None:
        """The element of an operand that an elementwise function reads for the element `indices` of its result."""
        ...


def argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    given = node.args[place] if place < len(node.args) else node.kwargs.get(name, default)
    return value_of(given) if isinstance(value_of(given), torch.SymInt) else given


def tensor(node: Node) -> tuple[Node, torch.Tensor] | None:
    """The first argument and its fake tensor; None if it is no tensor."""
    first = argument(node, 0, "input", node.kwargs.get("self"))
    value = value_of(first)
    return (first, value) if isinstance(first, Node) and isinstance(value, torch.Tensor) else None


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
    outside = _constant(reader, 0 if fill is None else fill, value_of(node).dtype)
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


def _constant(reader: Reader, number: Any, dtype: torch.dtype) -> Value | None:
    if not isinstance(number, bool | int | float):
        return None
    try:
        return reader.expressions.constant(bool(number) if dtype == torch.bool else rounded(number, dtype))
    except OverflowError:
        return None


def filled(place: int, name: str) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
        return _constant(reader, argument(node, place, name), value_of(node).dtype)

    return rule


def number(number: int) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, indices: Indices, at: float) -> Value | None:
        return _constant(reader, number, value_of(node).dtype)

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


# -- element by element


def _computed_in(node: Node) -> torch.dtype | None:
    """The dtype to which a function of one or two operands converts them; None where they are no tensors and numbers."""
    operands = [value_of(argument(node, 0, "input", node.kwargs.get("self")))]
    other = value_of(argument(node, 1, "other"))
    operands += [] if other is None else [other]
    if not all(isinstance(each, torch.Tensor | int | float | torch.SymInt | torch.SymFloat) for each in operands):
        return None
    if len(operands) == 2:
        return torch.result_type(*operands)
    return operands[0].dtype if isinstance(operands[0], torch.Tensor) else None


def compared(name: str) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        dtype, make = _computed_in(node), reader.expressions
        a, b = values if dtype is None else (make.operand(value, dtype) for value in values)
        return None if dtype is None or a is None or b is None else make.compare(name, a, b)

    return rule


def conjunction(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.and_(*values) if all(value.boolean for value in values) else None


def disjunction(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.or_(*values) if all(value.boolean for value in values) else None


def negation(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.not_(values[0]) if values[0].boolean else None


def logical(rule: Callable[..., Value | None]) -> Callable[..., Value | None]:
    return lambda reader, node, values, indices: rule(
        reader, node, [reader.expressions.as_boolean(value) for value in values], indices
    )


def arithmetic(function: Callable[..., Any], of_booleans: Callable[..., Value | None] | None = None) -> Any:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        dtype = value_of(node).dtype
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > len(values) or "rounding_mode" in node.kwargs:
            return None
        if dtype == torch.bool:
            return of_booleans(reader, node, values, indices) if of_booleans is not None else None
        computed_in = _computed_in(node)
        if function is operator.truediv and computed_in is not None and not computed_in.is_floating_point:
            computed_in = dtype
        if computed_in is None or computed_in == torch.bool:
            return None
        found = reader.expressions.arithmetic(function, tuple(values), computed_in)
        return found if found is None or computed_in == dtype else reader.expressions.cast(found, dtype)

    return rule


def chosen(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    """where(condition, a, b)"""
    condition, *sides = values
    dtype = value_of(node).dtype
    a, b = (reader.expressions.cast(side, dtype) for side in sides)
    return None if a is None or b is None or not condition.boolean else reader.expressions.select(condition, a, b)


def masked(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    """x.masked_fill(mask, fill)"""
    return chosen(reader, node, [values[1], values[2], values[0]], indices)


def overwritten(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return reader.expressions.cast(values[1], value_of(node).dtype)


def zeroed(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
    return _constant(reader, 0, value_of(node).dtype) if base_name(node) != name_of(node) else None


def triangle(lower: bool) -> Callable[..., Value | None]:
    def rule(reader: Reader, node: Node, values: list[Value], indices: Indices) -> Value | None:
        diagonal = argument(node, 1, "diagonal", 0)
        outside = _constant(reader, 0, value_of(node).dtype)
        if isinstance(diagonal, Node) or outside is None or len(indices) < 2:
            return None
        above = indices[-1] - indices[-2] - index_of(diagonal)
        return reader.expressions.select(
            reader.expressions.at_least_zero(-above if lower else above), values[0], outside
        )

    return rule


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

_unary, _binary = ("input",), ("input", "other")
ELEMENTWISE: dict[str, tuple[int, tuple[str, ...], Callable[..., Value | None]]] = {
    **{name: (2, _binary, compared(name)) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **dict.fromkeys(("bitwise_and", "__and__"), (2, _binary, conjunction)),
    **dict.fromkeys(("bitwise_or", "__or__"), (2, _binary, disjunction)),
    "bitwise_not": (1, _unary, negation),
    "logical_and": (2, _binary, logical(conjunction)),
    "logical_or": (2, _binary, logical(disjunction)),
    "logical_not": (1, _unary, logical(negation)),
    "add": (2, _binary, arithmetic(operator.add, disjunction)),
    "sub": (2, _binary, arithmetic(operator.sub)),
    "rsub": (2, _binary, lambda reader, node, values, at: arithmetic(operator.sub)(reader, node, values[::-1], at)),
    "mul": (2, _binary, arithmetic(operator.mul, conjunction)),
    "div": (2, _binary, arithmetic(operator.truediv)),
    "floor_divide": (2, _binary, arithmetic(operator.floordiv)),
    "neg": (1, _unary, arithmetic(operator.neg)),
    "abs": (1, _unary, arithmetic(abs)),
    "where": (3, ("condition", "input", "other"), chosen),
    "masked_fill": (3, ("input", "mask", "value"), masked),
    "fill": (2, ("input", "value"), overwritten),
    "zero": (1, _unary, zeroed),
    "tril": (1, _unary, triangle(True)),
    "triu": (1, _unary, triangle(False)),
}
