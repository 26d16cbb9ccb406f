"""Index arithmetic: sums of products of axes and sizes, with what can be proven of them.

An element of a mask stands at (batch, head, query, key). Reading a tensor through a chain of views, slices, repeats and
concatenations is reading it at *indices*: expressions in these axes. `row * 77 + column`, then `// 77`, is `row` again.
Sizes may be symbolic; nothing here asks a question that becomes a guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..graphs.sizes import Size, always


@dataclass(frozen=True)
class Place:
    """A position along one dimension of a mask, counted from its end: -1 the key, -2 the query. 0 <= axis < extent."""

    dim: int
    extent: Index

    def __str__(self) -> str:
        return {-1: "key", -2: "query"}.get(self.dim, f"axis{self.dim}")


@dataclass(frozen=True)
class Symbol:
    """A symbolic size. It is known by its text; PyTorch's own object comes along to ask what holds for all its values."""

    text: str
    size: Any  # torch.SymInt

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Quotient:
    """above // below where that could not be resolved."""

    above: Index
    below: Index

    def __str__(self) -> str:
        return f"(({self.above}) // ({self.below}))"


Factor = Place | Symbol | Quotient
Monomial = tuple[Factor, ...]  # sorted; () is 1


class Index:
    """An integer: a sum of products with integer factors. Equal sums are equal objects for `==` and `hash`."""

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
        """The value, if it is the same everywhere and known."""
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
        """What an atom is multiplied with; None if it stands in a power or inside a quotient."""
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
    """The axis itself; 0 where there is but one position."""
    return constant(0) if extent.number == 1 else Index({(Place(dim, extent),): 1})


def index_of(size: Size) -> Index:
    """A size as an index: its symbols become atoms, so that `2 * s0 + 9` is seen to be a sum."""
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


def at_least_zero(index: Index) -> bool:
    """Whether it is provably >= 0, wherever its axes stand. An index is linear in an axis, so its least value is at an end."""
    if (number := index.number) is not None:
        return number >= 0
    for each in dict.fromkeys(atom for product in index.terms for atom in product if not isinstance(atom, Symbol)):
        slope = index.factor_of(each)
        if slope is None:
            return False
        rest = index - slope * Index({(each,): 1})
        if at_least_zero(slope) and (isinstance(each, Place) or at_least_zero(each.above)):
            return at_least_zero(rest)  # at position 0; a quotient is at least 0
        if isinstance(each, Place) and at_least_zero(-slope):
            return at_least_zero(rest + slope * (each.extent - 1))
        return False
    return always(_evaluated(index) >= 0)


def _evaluated(index: Index) -> Any:
    total: Any = 0
    for product, factor in index.terms.items():
        value: Any = factor
        for atom in product:
            value = value * atom.size  # type: ignore[union-attr]
        total = total + value
    return total


def within(index: Index, size: Index) -> bool:
    """Whether 0 <= index < size, provably."""
    return at_least_zero(index) and at_least_zero(size - 1 - index)


def divided(above: Index, below: Index) -> tuple[Index, Index]:
    """(above // below, above % below), resolved where it is provable: (row * 77 + key) // 77 is row where key < 77."""
    if below.number == 1:
        return above, constant(0)
    for quotient in _candidates(above, below):
        rest = above - quotient * below
        if within(rest, below):
            return quotient, rest
    quotient = Index({(Quotient(above, below),): 1})
    return quotient, above - quotient * below


def _candidates(above: Index, below: Index) -> Iterator[Index]:
    """What the quotient may be: the terms that are multiples of `below`, by each of its terms."""
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
    """With two axes in each other's place."""

    def atom(each: Factor) -> Factor:
        if isinstance(each, Place) and each.dim in (one, other):
            return Place(one + other - each.dim, each.extent)
        return Quotient(exchanged(each.above, one, other), each.below) if isinstance(each, Quotient) else each

    return Index({tuple(sorted(map(atom, product), key=str)): factor for product, factor in index.terms.items()})
