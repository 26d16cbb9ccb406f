"""One element of a mask as an expression in the axes (batch, head, query, key). Equal expressions are the same object.

Boolean expressions consist of `and`, `not`, comparisons of indices and elements of tensors; numeric expressions of constants,
indices and `select(condition, a, b)`. For a boolean m, `(1 - m.to(dtype)) * -10000` is `select(m, 0, -10000)`; `tril` of ones
is `query - key >= 0`. Any other element is a `read` of a tensor of the graph.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from .indices import Index, Place, at_least_zero, constant, divided, stays_between

MOST_NODES = 16  # limit on `Value.nodes` of nested selects; no mask that a kernel supports needs more


@dataclass(frozen=True, eq=False)
class Value:
    """An expression. Its `parts`, by `kind`:

    "constant"  (number,)            "index"  (Index,)                "absolute"  (Index,)
    "read"      (node, indices)      "select" (condition, a, b)       "compare"   ("lt" | "le" | "eq", a, b)
    "and"       conjuncts            "not"    (boolean,)              "at_least_zero" | "zero"  (Index,)
    "cast"      (read, dtype)
    """

    kind: str
    parts: tuple[Any, ...]
    boolean: bool
    axes: frozenset[int] = field(default=frozenset(), repr=False)  # the dimensions that the value depends on
    nodes: int = field(default=1, repr=False)  # size of the expression tree

    @property
    def number(self) -> Any:
        return self.parts[0] if self.kind == "constant" else None


class Expressions:
    """Makes simplified values, each of them only once."""

    def __init__(self) -> None:
        self._made: dict[Any, Value] = {}
        self._order: dict[Value, int] = {}
        self.true, self.false = self.constant(True), self.constant(False)

    def _make(self, kind: str, parts: tuple[Any, ...], boolean: bool) -> Value:
        key = (kind, tuple(repr(part) if isinstance(part, float) else (type(part), part) for part in parts))
        if key not in self._made:
            axes: set[int] = set()
            nodes = 1
            for part in parts:
                for each in part if isinstance(part, tuple) else (part,):
                    axes |= {place.dim for place in each.axes()} if isinstance(each, Index) else set()
                    if isinstance(each, Value):
                        axes |= each.axes
                        nodes += each.nodes
            self._made[key] = value = Value(kind, parts, boolean, frozenset(axes), nodes)
            self._order[value] = len(self._order)
        return self._made[key]

    def constant(self, number: float) -> Value:
        return self._make("constant", (number,), isinstance(number, bool))

    def index(self, index: Index) -> Value:
        return self.constant(index.number) if index.number is not None else self._make("index", (index,), False)

    def read(self, node: Node, indices: tuple[Index, ...], boolean: bool) -> Value:
        return self._make("read", (node, indices), boolean)

    # -- booleans

    def not_(self, value: Value) -> Value:
        if value.kind == "constant":
            return self.constant(not value.number)
        if value.kind == "not":
            inner: Value = value.parts[0]
            return inner
        if value.kind == "at_least_zero":
            return self.at_least_zero(-value.parts[0] - 1)
        return self._make("not", (value,), True)

    def and_(self, *values: Value) -> Value:
        found: dict[Value, None] = {}
        for value in values:
            for each in value.parts if value.kind == "and" else (value,):
                found[each] = None
        found.pop(self.true, None)
        if self.false in found or any(self.not_(each) in found for each in found):
            return self.false
        for each in found:  # a & ~(a & b) is a & ~b
            inner = each.parts[0].parts if each.kind == "not" and each.parts[0].kind == "and" else ()
            left = [part for part in inner if part not in found]
            if any(self.not_(part) in found for part in inner):
                return self.and_(*(other for other in found if other is not each))
            if len(left) < len(inner):
                return self.and_(*(other for other in found if other is not each), self.not_(self.and_(*left)))
        if len(found) < 2:
            return next(iter(found), self.true)
        return self._make("and", tuple(sorted(found, key=self._order.__getitem__)), True)

    def or_(self, *values: Value) -> Value:
        return self.not_(self.and_(*map(self.not_, values)))

    def at_least_zero(self, index: Index) -> Value:
        if at_least_zero(index):
            return self.true
        return self.false if at_least_zero(-index - 1) else self._make("at_least_zero", (index,), True)

    def zero(self, index: Index) -> Value:
        if index.number is not None:
            return self.constant(index.number == 0)
        if at_least_zero(index - 1) or at_least_zero(-index - 1):
            return self.false
        first = min(index.terms, key=lambda product: (len(product), str(product)))
        return self._make("zero", (index if index.terms[first] > 0 else -index,), True)

    # -- numbers

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        if condition.kind == "constant":
            return a if condition.number else b
        if condition.kind == "not":
            condition, a, b = condition.parts[0], b, a
        if a.kind == "select" and a.parts[0] is condition:
            a = a.parts[1]
        if b.kind == "select" and b.parts[0] is condition:
            b = b.parts[2]
        if a is b:
            return a
        if a.boolean and b.boolean:
            return self.or_(self.and_(condition, a), self.and_(self.not_(condition), b))
        return self._make("select", (condition, self.as_number(a), self.as_number(b)), False)

    def as_number(self, value: Value) -> Value:
        """`value`, with a boolean turned into 1 or 0."""
        if not value.boolean:
            return value
        if value.kind == "constant":
            return self.constant(int(value.number))
        return self.select(value, self.constant(1), self.constant(0))

    def as_boolean(self, value: Value) -> Value:
        return value if value.boolean else self.not_(self.compare("eq", value, self.constant(0)))

    def compare(self, name: str, a: Value, b: Value) -> Value:
        """name: lt, le, eq, gt, ge or ne."""
        if name in ("gt", "ge"):
            return self.compare({"gt": "lt", "ge": "le"}[name], b, a)
        if name == "ne":
            return self.not_(self.compare("eq", a, b))
        a, b = self.as_number(a), self.as_number(b)
        for first, second, swapped in ((a, b, False), (b, a, True)):
            if first.kind == "select" and first.nodes + second.nodes <= MOST_NODES:
                condition, *sides = first.parts
                yes, no = (self.compare(name, *((second, side) if swapped else (side, second))) for side in sides)
                return self.select(condition, yes, no)
        if a.kind == b.kind == "constant":
            return self.constant(bool(getattr(operator, name)(a.number, b.number)))
        indices = [_whole(each, name, left) for each, left in ((a, True), (b, False))]
        if indices[0] is not None and indices[1] is not None:
            return self._compare_indices(name, indices[1] - indices[0])
        if name in ("lt", "le"):  # |index| < size and the like: both ends of a window
            strict = 1 if name == "lt" else 0
            if a.kind == "absolute" and indices[1] is not None:
                limit = indices[1] - strict
                return self.and_(self.at_least_zero(limit - a.parts[0]), self.at_least_zero(limit + a.parts[0]))
            if b.kind == "absolute" and indices[0] is not None:
                return self.not_(self.compare("le" if name == "lt" else "lt", b, a))
        if name == "eq" and self._order[a] > self._order[b]:
            a, b = b, a
        return self._make("compare", (name, a, b), True)

    def _compare_indices(self, name: str, difference: Index) -> Value:
        if name == "eq":
            return self.zero(difference)
        return self.at_least_zero(difference - 1 if name == "lt" else difference)

    def arithmetic(self, function: Callable[..., Any], values: tuple[Value, ...], dtype: torch.dtype) -> Value | None:
        """`function` of the values, element by element, computed in `dtype`. None if the result is not known."""
        values = tuple(map(self.as_number, values))
        for place, value in enumerate(values):
            if value.kind == "select":
                if sum(each.nodes for each in values) > MOST_NODES:
                    return None
                condition, *sides = value.parts
                yes, no = (
                    self.arithmetic(function, (*values[:place], side, *values[place + 1 :]), dtype) for side in sides
                )
                return None if yes is None or no is None else self.select(condition, yes, no)
        if all(value.kind == "constant" for value in values):
            try:
                numbers = [value.number for value in values]
                if dtype not in _HALF:  # a half's function computes with the float32 number
                    numbers = [rounded(number, dtype) for number in numbers]
                return self.constant(rounded(function(*numbers), dtype))
            except (ZeroDivisionError, OverflowError):
                return None
        if not all(value.kind in ("constant", "index") for value in values):
            return None
        indices = [value.parts[0] if value.kind == "index" else value.number for value in values]
        if not all(isinstance(each, int | Index) for each in indices):
            return None
        whole = [each if isinstance(each, Index) else constant(each) for each in indices]
        if not all(is_exact(each, dtype) for each in whole):
            return None
        if function in (operator.add, operator.sub, operator.mul, operator.neg):
            found = function(*whole)
            return self.index(found) if is_exact(found, dtype) else None
        if function is operator.floordiv and isinstance(indices[0], Index) and indices[1] in range(1, 1 << 31):
            return self.index(divided(indices[0], constant(indices[1]))[0])
        return self._make("absolute", (whole[0],), False) if function is abs and is_exact(-whole[0], dtype) else None

    def operand(self, value: Value, dtype: torch.dtype) -> Value | None:
        """`value` as an operand of a comparison in `dtype`; None if it is not known."""
        value = value if dtype == torch.bool else self.as_number(value)
        if value.kind == "select":
            yes, no = (self.operand(side, dtype) for side in value.parts[1:])
            return None if yes is None or no is None else self.select(value.parts[0], yes, no)
        if value.kind in ("index", "absolute"):
            return value if is_exact(value.parts[0], dtype) else None
        if value.kind == "read" and value_of(value.parts[0]).dtype != dtype:
            return self._make("cast", (value, dtype), False)
        if value.kind != "constant" or dtype == torch.bool:
            return value
        try:
            near = rounded(value.number, dtype)
        except OverflowError:
            return None
        if dtype not in _HALF:
            return self.constant(near)
        # Some kernels compare a half with the float32 number.
        return None if near != value.number and math.isfinite(near) and near == int(near) else value

    def cast(self, value: Value, dtype: torch.dtype) -> Value | None:
        """`value` cast to `dtype`; None if the result is not known."""
        if dtype == torch.bool:
            return self.as_boolean(value)
        value = self.as_number(value)
        if value.kind == "constant":
            try:
                return self.constant(rounded(value.number, dtype))
            except OverflowError:
                return None
        if value.kind == "select":
            yes, no = (self.cast(side, dtype) for side in value.parts[1:])
            return None if yes is None or no is None else self.select(value.parts[0], yes, no)
        return value if value.kind in ("index", "absolute") and is_exact(value.parts[0], dtype) else None


_HALF = frozenset({torch.float16, torch.bfloat16})
# A dtype holds all integers from the first to the last. Those of a floating dtype have as many bits as its significand.
_INTEGERS = {
    **{dtype: (-(1 << bits), 1 << bits) for dtype, bits in
       {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}.items()},
    **{dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in
       (torch.int8, torch.uint8, torch.int16, torch.int32)},
}  # fmt: skip


def is_exact(index: Index, dtype: torch.dtype) -> bool:
    """Whether a dtype holds the index exactly at all positions: a float32 rounds 2**24 + 1, an int8 wraps around at 128."""
    if dtype == torch.int64:  # sizes of tensors are far below: only numbers of the model's own may be too large
        return all(abs(factor) < 1 << (31 if product else 62) for product, factor in index.terms.items())
    return dtype in _INTEGERS and stays_between(index, *_INTEGERS[dtype])


_FORMATS = {torch.float16: "e", torch.float32: "f"}


def rounded(number: float, dtype: torch.dtype) -> float:
    """`number` as a tensor of `dtype` holds it. Raises `OverflowError` for a number that an integer dtype cannot hold."""
    if not dtype.is_floating_point:
        if isinstance(number, float) and not math.isfinite(number):
            raise OverflowError
        limits = torch.iinfo(dtype)
        if not limits.min <= int(number) <= limits.max:
            raise OverflowError
        return int(number)
    number = float(number)
    if dtype == torch.bfloat16 and math.isfinite(number):
        bits = int.from_bytes(struct.pack(">f", rounded(number, torch.float32)), "big")
        if bits & 0x7F800000 != 0x7F800000:
            bits += 0x7FFF + (bits >> 16 & 1)
        (number,) = struct.unpack(">f", (bits & 0xFFFF0000).to_bytes(4, "big"))
        return float(number)
    if dtype in _FORMATS and math.isfinite(number):
        try:
            (number,) = struct.unpack(_FORMATS[dtype], struct.pack(_FORMATS[dtype], number))
        except OverflowError:
            number = math.copysign(math.inf, number)
    return number


def _whole(value: Value, name: str, left: bool) -> Index | None:
    """One side of a comparison as an index, None if it is none. A constant is rounded to a whole number that compares alike:
    key < 2.5 is key < 3. left: the value is the left side."""
    if value.kind == "index":
        index: Index = value.parts[0]
        return index
    if value.kind != "constant" or not math.isfinite(value.number):
        return None
    if value.number == int(value.number):
        return constant(int(value.number))
    if name == "eq":
        return None
    # index <= 2.5 is index <= 2, index < 2.5 is index < 3; on the left 2.5 <= index is 3 <= index
    up = (name == "le") == left
    return constant(math.ceil(value.number) if up else math.floor(value.number))


def is_axis(index: Index) -> Place | None:
    """The axis, if the index is a single axis and nothing else; otherwise None."""
    if len(index.terms) == 1:
        ((product, factor),) = index.terms.items()
        if factor == 1 and len(product) == 1 and isinstance(product[0], Place):
            return product[0]
    return None
