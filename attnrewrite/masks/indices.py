"""Index arithmetic: sums of products of axes and sizes, and proofs about their bounds.

An element of a mask has the position (batch, head, query, key). Reading a tensor through a chain of views, slices, repeats and
concatenations means reading it at *indices*, which are expressions in these axes: `(row * 77 + column) // 77` is `row` again
if column < 77. Sizes may be symbolic; only `stays_between` may add a guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..graphs.sizes import Size, UnbackedSizeError, always, holds_if_guarded


@dataclass(frozen=True)
class Place:
    """The position along one dimension of a mask: 0 <= position < extent."""

    dim: int  # counted from the end: -1 is the key, -2 the query
    extent: Index

    def __str__(self) -> str:
        return {-1: "key", -2: "query"}.get(self.dim, f"axis{self.dim}")


@dataclass(frozen=True)
class Symbol:
    """A symbolic size. Two symbols are equal if their texts are."""

    text: str
    size: Any  # torch.SymInt, to prove what holds for all values of the symbol

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Quotient:
    """`above // below`, where it cannot be simplified."""

    above: Index
    below: Index

    def __str__(self) -> str:
        return f"(({self.above}) // ({self.below}))"


Factor = Place | Symbol | Quotient
Monomial = tuple[Factor, ...]  # a product of its factors, sorted; () is 1


class Index:
    """An integer expression: a sum of products with integer coefficients. Equal sums are equal for `==` and `hash`."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self.terms: dict[Monomial, int] = {product: factor for product, factor in terms.items() if factor}
        self._hash: int | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.terms == other.terms

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __add__(self, other: Index | int) -> Index:
        terms = dict(self.terms)
        for product, factor in _index(other).terms.items():
            terms[product] = terms.get(product, 0) + factor
        return Index(terms)

    def __neg__(self) -> Index:
        return Index({product: -factor for product, factor in self.terms.items()})

    def __sub__(self, other: Index | int) -> Index:
        return self + -_index(other)

    def __mul__(self, other: Index | int) -> Index:
        terms: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in _index(other).terms.items():
                product = tuple(sorted(left + right, key=str))
                terms[product] = terms.get(product, 0) + a * b
        return Index(terms)

    def __str__(self) -> str:
        parts = ["*".join([str(factor), *map(str, product)]) for product, factor in self.terms.items()]
        return " + ".join(parts) or "0"

    __repr__ = __str__

    @property
    def number(self) -> int | None:
        """The value of a constant index; None for any other."""
        if not self.terms:
            return 0
        return self.terms[()] if len(self.terms) == 1 and () in self.terms else None

    def axes(self) -> Iterator[Place]:
        for product in self.terms:
            for atom in product:
                if isinstance(atom, Place):
                    yield atom
                elif isinstance(atom, Quotient):
                    yield from atom.above.axes()

    def factor_of(self, atom: Factor) -> Index | None:
        """The coefficient of `atom`, outside of quotients; None if a product has `atom` more than once."""
        found: dict[Monomial, int] = {}
        for product, factor in self.terms.items():
            rest = list(product)
            if atom in rest:
                rest.remove(atom)
                if atom in rest:
                    return None
                found[tuple(rest)] = factor
        return Index(found)


def constant(value: int) -> Index:
    return Index({(): value})


def axis(dim: int, extent: Index) -> Index:
    """The axis as an index; 0 if its extent is 1."""
    return constant(0) if extent.number == 1 else Index({(Place(dim, extent),): 1})


def index_of(size: Size) -> Index:
    """A size as an index. Each symbol becomes a factor of its own, so `2 * s0 + 9` is a sum of two products."""
    if isinstance(size, int):
        return constant(size)
    if (number := size.node.maybe_as_int()) is not None:
        return constant(int(number))
    return _from_sympy(size.node.expr, size)


def _from_sympy(expression: Any, size: torch.SymInt) -> Index:
    if expression.is_Integer:
        return constant(int(expression))
    if expression.is_Add or expression.is_Mul:
        result = constant(0 if expression.is_Add else 1)
        for part in expression.args:
            each = _from_sympy(part, size)
            result = result + each if expression.is_Add else result * each
        return result
    whole = size.node.expr == expression
    symbol = size if whole else size.node.shape_env.create_symintnode(expression, hint=None)
    return Index({(Symbol(str(expression), symbol),): 1})


def _index(value: Index | int) -> Index:
    return value if isinstance(value, Index) else constant(value)


def at_least_zero(index: Index, asked: Callable[[Any], bool] = always) -> bool:
    """Whether `index` is provably >= 0 at all positions. An index is linear in each axis, so its minimum is at either end.

    asked: answers whether the minimum, in sizes alone, is at least 0."""
    if (number := index.number) is not None:
        return number >= 0
    for each in dict.fromkeys(atom for product in index.terms for atom in product if not isinstance(atom, Symbol)):
        slope = index.factor_of(each)
        if slope is None:
            return False
        rest = index - slope * Index({(each,): 1})
        if at_least_zero(slope) and (isinstance(each, Place) or at_least_zero(each.above)):
            return at_least_zero(rest, asked)  # the minimum is at position 0; a quotient is at least 0
        if isinstance(each, Place) and at_least_zero(-slope):
            return at_least_zero(rest + slope * (each.extent - 1), asked)
        if isinstance(each, Quotient) and at_least_zero(-slope) and at_least_zero(each.above):
            return at_least_zero(rest + slope * each.above, asked)  # a quotient is at most what is divided
        return False
    return asked(_evaluated(index) >= 0)


def stays_between(index: Index, low: int, high: int) -> bool:
    """Whether low <= index <= high at all positions. Asks about symbolic sizes: a model of 2**24 keys is another graph."""
    try:
        return at_least_zero(index - low, holds_if_guarded) and at_least_zero(-index + high, holds_if_guarded)
    except UnbackedSizeError:
        return False


def _evaluated(index: Index) -> Any:
    total: Any = 0
    for product, factor in index.terms.items():
        value: Any = factor
        for atom in product:
            value = value * atom.size  # type: ignore[union-attr]
        total = total + value
    return total


def within(index: Index, size: Index) -> bool:
    """Whether 0 <= index < size is provable."""
    return at_least_zero(index) and at_least_zero(size - 1 - index)


def divided(above: Index, below: Index) -> tuple[Index, Index]:
    """(above // below, above % below), simplified where provable: (row * 77 + key) // 77 is row if key < 77."""
    if below.number == 1:
        return above, constant(0)
    for quotient in _candidates(above, below):
        rest = above - quotient * below
        if within(rest, below):
            return quotient, rest
    quotient = Index({(Quotient(above, below),): 1})
    return quotient, above - quotient * below


def _candidates(above: Index, below: Index) -> Iterator[Index]:
    """Candidates for above // below, one for each term of `below`: the terms of `above` divided by that term."""
    for product, factor in below.terms.items():
        found: dict[Monomial, int] = {}
        for other, number in above.terms.items():
            rest = list(other)
            if all(_take(rest, atom) for atom in product) and number // factor:
                found[tuple(rest)] = number // factor
        yield Index(found)


def _take(atoms: list[Factor], atom: Factor) -> bool:
    if atom not in atoms:
        return False
    atoms.remove(atom)
    return True


def exchanged(index: Index, one: int, other: int) -> Index:
    """`index` with the axes `one` and `other` exchanged."""

    def atom(each: Factor) -> Factor:
        if isinstance(each, Place) and each.dim in (one, other):
            return Place(one + other - each.dim, each.extent)
        return Quotient(exchanged(each.above, one, other), each.below) if isinstance(each, Quotient) else each

    return Index({tuple(sorted(map(atom, product), key=str)): factor for product, factor in index.terms.items()})
