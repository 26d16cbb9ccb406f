"""Follows the axes of an attention through the views, permutations, expansions and products of a graph.

An `Atom` is one indivisible axis: the batch, the heads, the queries or the keys. `Dims` list the atoms of each dimension of a
tensor, outermost first: heads folded into the batch are one dimension with two atoms, and a dimension of size 1 has no atom.
Atoms are compared by identity, never by size, so that axes of equal size stay apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .sizes import Size, always, is_one

# Tensor methods with their arguments, applied in order: ("transpose", (-2, -1)).
Views = tuple[tuple[str, tuple[Any, ...]], ...]


class Atom:
    """One axis, with its size; compared by identity."""

    def __init__(self, size: Size) -> None:
        self.size = size


Axis = tuple[Atom, ...]
Dims = tuple[Axis, ...]


class Axes:
    """The atoms of one attention. A view may split an atom in two: then the atom stands for these two in all `Dims`."""

    def __init__(self) -> None:
        self._parts: dict[Atom, Axis] = {}

    def fresh(self, shape: Sequence[Size]) -> Dims:
        return tuple((Atom(size),) for size in shape)

    def atoms(self, axis: Iterable[Atom]) -> Axis:
        """The finest atoms of an axis, without those of size 1."""
        found: list[Atom] = []
        for atom in axis:
            if atom in self._parts:
                found += self.atoms(self._parts[atom])
            elif not is_one(atom.size):
                found.append(atom)
        return tuple(found)

    def resolved(self, dims: Dims) -> Dims:
        return tuple(self.atoms(axis) for axis in dims)

    def reshaped(self, dims: Dims, shape: Sequence[Size]) -> Dims | None:
        """The dims after a view to `shape`, or before a view from `shape`: both keep the order of elements. None where the
        sizes do not show how a dimension splits an atom."""
        waiting = list(reversed([atom for axis in dims for atom in self.atoms(axis)]))
        result: list[Axis] = []
        for size in shape:
            axis: list[Atom] = []
            rest = size
            while not is_one(rest):
                if not waiting:
                    return None
                atom = waiting.pop()
                if always(atom.size == rest):
                    axis.append(atom)
                    break
                if _divides(atom.size, rest):
                    axis.append(atom)
                    rest = rest // atom.size
                elif _divides(rest, atom.size):
                    outer, inner = Atom(rest), Atom(atom.size // rest)
                    self._parts[atom] = (outer, inner)
                    axis.append(outer)
                    waiting.append(inner)
                    break
                else:
                    return None
            result.append(tuple(axis))
        return None if waiting else tuple(result)

    def broadcast(self, dims: Dims, shape: Sequence[Size], wide: Sequence[Size]) -> Dims | None:
        """The dims of a tensor of `shape` that broadcasts to the shape `wide` with `dims`; None where it does not."""
        missing = len(wide) - len(shape)
        if missing < 0:
            return None
        result: list[Axis] = []
        for axis, size, full in zip(dims[missing:], shape, wide[missing:], strict=True):
            if is_one(size):
                result.append(())
            elif always(size == full):
                result.append(axis)
            else:
                return None
        return tuple(result)

    def views(self, source: Dims, target: Dims) -> Views | None:
        """The views that turn a tensor with dims `source` into one with dims `target`. A target dimension gets size 1 where
        the tensor has none of its atoms, and is expanded over the missing atoms where the tensor has some of them. None
        where the tensor has an atom twice, or one that the target lacks."""
        have, want = self.resolved(source), self.resolved(target)
        if have == want:
            return ()
        present = {atom for axis in have for atom in axis}
        if len(present) != sum(map(len, have)) or not present <= {atom for axis in want for atom in axis}:
            return None
        steps: list[tuple[str, tuple[Any, ...]]] = []
        ones = tuple(dim for dim, axis in enumerate(have) if not axis)
        if ones:
            steps.append(("squeeze", (ones,)))
        # 1. Split dimensions into runs of atoms that stay together.
        runs = [self._runs(axis, want) for axis in have if axis]
        for dim in reversed(range(len(runs))):
            if len(runs[dim]) > 1:
                steps.append(("unflatten", (dim, tuple(size_of(run) for run in runs[dim]))))
        flat = [run for axis in runs for run in axis]
        # 2. Bring the runs into the target's order.
        starts = {run[0]: run for run in flat}
        order = [starts[atom] for axis in want for atom in axis if atom in starts]
        moves = [flat.index(run) for run in order]
        moved = [dim for dim, source_dim in enumerate(moves) if dim != source_dim]
        if len(moved) == 2:
            steps.append(("transpose", (moved[0] - len(moves), moved[1] - len(moves))))
        elif moved:
            steps.append(("permute", (tuple(moves),)))
        # 3. Merge the runs that form one target dimension, and expand over missing atoms.
        return tuple(steps) + self._joined(order, want)

    def _joined(self, order: list[Axis], want: Dims) -> Views:
        steps: list[tuple[str, tuple[Any, ...]]] = []
        waiting = list(order)
        for dim, axis in enumerate(want):
            mine = [run for run in waiting if run[0] in axis]
            waiting = waiting[len(mine) :]
            if not mine:
                steps.append(("unsqueeze", (dim,)))
            elif len(mine) > 1 or mine[0] != axis:
                held = {atom for run in mine for atom in run}
                pieces = self._pieces(axis, mine)
                for position, piece in enumerate(pieces):
                    if piece[0] not in held:
                        steps.append(("unsqueeze", (dim + position,)))
                if any(piece[0] not in held for piece in pieces):
                    sizes = tuple(size_of(piece) for piece in pieces)
                    # -1 keeps the sizes of the dimensions before and after.
                    after = len(waiting)
                    steps.append(("expand", ((-1,) * dim + sizes + (-1,) * after,)))
                steps.append(("flatten", (dim, dim + len(pieces) - 1)))
        return tuple(steps)

    @staticmethod
    def _pieces(axis: Axis, runs: list[Axis]) -> list[Axis]:
        """Splits an axis into the given runs and single atoms for the rest of it, in the axis's order."""
        first = {run[0]: run for run in runs}
        inside = {atom for run in runs for atom in run[1:]}
        return [first.get(atom, (atom,)) for atom in axis if atom not in inside]

    @staticmethod
    def _runs(axis: Axis, want: Dims) -> list[Axis]:
        """Splits an axis into runs: atoms that follow one another in one dimension of the target too."""
        following = {(one, two) for each in want for one, two in itertools.pairwise(each)}
        runs: list[Axis] = []
        for atom in axis:
            if runs and (runs[-1][-1], atom) in following:
                runs[-1] = (*runs[-1], atom)
            else:
                runs.append((atom,))
        return runs


def applied(tensor: torch.Tensor, views: Views) -> torch.Tensor:
    """Applies the views to the tensor, in order."""
    for name, arguments in views:
        tensor = getattr(tensor, name)(*arguments)
    return tensor


def size_of(axis: Axis) -> Size:
    """The size of a dimension with the atoms of `axis`."""
    size: Size = 1
    for atom in axis:
        size = size * atom.size
    return size


def _divides(size: Size, other: Size) -> bool:
    if isinstance(size, int) and size == 0:
        return False
    rest: Any = other % size  # type: ignore[operator]
    return always(rest == 0)
