"""Finds out which atoms (graphs/axes.py) of an attention are its batch, its heads, its queries and its keys."""

from __future__ import annotations

from dataclasses import dataclass

from ..graphs.axes import Atom, Axes, Axis, Dims
from .operands import Readable


@dataclass(frozen=True)
class Sides:
    """The dims and the operands of the two products of an attention."""

    weights: Dims  # dims of the softmax
    dim: int  # the dimension of the weights that the softmax runs over
    output: Dims  # dims of weights @ v
    inner: Axis  # the axis that q k^T sums over
    width: Axis  # the last axis of the values
    queries: list[Readable]  # tensors that a kernel could read as the query, the nearest to the product first
    keys: list[Readable]  # the same for the key
    values: list[Readable]  # the same for the value


@dataclass(frozen=True)
class Arrangement:
    """The axes of an attention in SDPA's order: (batch, heads, queries, inner) for the query, and so on."""

    batch: Dims  # one dimension; none if query, key and value get rank 3 or 2
    heads: Dims  # one dimension; none if query, key and value get rank 2
    shared: Axis  # the atoms of the heads along which several query heads read one key head
    queries: Axis
    keys: Axis
    inner: Axis  # head dim
    width: Axis  # value dim

    @property
    def query(self) -> Dims:
        return (*self.batch, *self.heads, self.queries, self.inner)

    @property
    def key(self) -> Dims:
        return (*self.batch, *self._few, self.keys, self.inner)

    @property
    def value(self) -> Dims:
        return (*self.batch, *self._few, self.keys, self.width)

    @property
    def of_queries(self) -> Dims:
        """Of a factor of the query: one number for each row of the scores."""
        return (*self.batch, *self.heads, self.queries, ())

    @property
    def of_keys(self) -> Dims:
        """Of a factor of the key: one number for each key."""
        return (*self.batch, *self._few, self.keys, ())

    @property
    def mask(self) -> Dims:
        return (*self.batch, *self.heads, self.queries, self.keys)

    @property
    def output(self) -> Dims:
        return (*self.batch, *self.heads, self.queries, self.width)

    @property
    def _few(self) -> Dims:
        return tuple(tuple(atom for atom in axis if atom not in self.shared) for axis in self.heads)


def arrange(sides: Sides, axes: Axes) -> Arrangement | None:
    """None if one query vector serves all batches: a pooling, which a kernel would compute as many calls."""
    weights = axes.resolved(sides.weights)
    keys, inner, width = weights[sides.dim], axes.atoms(sides.inner), axes.atoms(sides.width)
    asked = sides.queries[0].atoms(axes)
    own = asked - sides.keys[0].atoms(axes) - {*keys, *inner}  # atoms that only the query has
    queries: Axis = ()
    for dim, axis in enumerate(weights):
        if dim != sides.dim and own & set(axis):
            queries = tuple(atom for atom in axis if atom in own)
    lead = tuple(atom for axis in weights for atom in axis if atom not in queries and atom not in keys)
    if not queries and not set(lead) <= asked:
        return None
    other = {*queries, *keys, *inner, *width}
    groups = _groups(sides, axes, lead, other, bool(queries))
    shared = _shared(sides, axes, lead)
    if len(groups) > 2 and shared == groups[-1]:  # (batch, groups, heads of a group): the last two are the heads
        groups = [*groups[:-2], (*groups[-2], *groups[-1])]
    if len(groups) < 2:
        return Arrangement((), tuple(groups), (), queries, keys, inner, width)
    *before, heads = groups
    shared = tuple(atom for atom in shared if atom in heads)
    batch = tuple(atom for axis in before for atom in axis)
    return Arrangement((batch,), (heads,), shared, queries, keys, inner, width)


def _groups(sides: Sides, axes: Axes, lead: Axis, other: set[Atom], has_queries: bool) -> list[Axis]:
    """The atoms before (queries, keys), grouped like the dimensions of a tensor: the last group is the heads. If every tensor
    has these atoms in one dimension, the last atom is the heads."""
    known = []
    for dims in (sides.weights, sides.output, *(each.dims for each in sides.queries)):
        found = [
            tuple(atom for atom in axis if atom not in other)
            for axis in axes.resolved(dims)
            if not axis or not set(axis) <= other
        ]
        if not has_queries and () in found:  # a single query: the last dimension of size 1 is the query's
            found.reverse()
            found.remove(())
            found.reverse()
        if len(found) > 1 and tuple(atom for axis in found for atom in axis) == lead:
            known.append(found)
    for found in known:
        if sum(map(bool, found)) > 1:
            return found
    if len(lead) > 1:
        return [lead[:-1], lead[-1:]]
    if known:
        return known[0]  # the batch or the heads have size 1
    return [lead] if len(sides.weights) > 2 else []


def _shared(sides: Sides, axes: Axes, lead: Axis) -> Axis:
    """The innermost atoms of `lead` that neither keys nor values have."""
    had = sides.keys[-1].atoms(axes) | sides.values[-1].atoms(axes)
    count = 0
    while count < len(lead) and lead[-1 - count] not in had:
        count += 1
    return lead[len(lead) - count :]
