"""From the indices of an element in a view to its indices in the viewed tensor, for each view of graphs/axes.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graphs.axes import Views, applied
from ..graphs.nodes import values_only
from .indices import Index, constant, divided, index_of


def before_views(tensor: torch.Tensor, views: Views, indices: tuple[Index, ...]) -> tuple[Index, ...]:
    """The indices in a (fake) tensor of the element that is at `indices` after `views`."""
    shapes = []
    with values_only(tensor):
        for place, view in enumerate(views):
            shapes.append(tuple(map(index_of, tensor.shape)))
            if place + 1 < len(views):
                tensor = applied(tensor, (view,))
    for (name, arguments), shape in zip(reversed(views), reversed(shapes), strict=True):
        indices = _BEFORE[name](list(indices), shape, *arguments)
    return indices


def _before_transpose(at: list[Index], shape: tuple[Index, ...], one: int, other: int) -> tuple[Index, ...]:
    at[one], at[other] = at[other], at[one]
    return tuple(at)


def _before_permute(at: list[Index], shape: tuple[Index, ...], dims: tuple[int, ...]) -> tuple[Index, ...]:
    return tuple(at[dims.index(dim)] for dim in range(len(shape)))


def _before_squeeze(at: list[Index], shape: tuple[Index, ...], dims: tuple[int, ...]) -> tuple[Index, ...]:
    left = iter(at)
    return tuple(constant(0) if dim in dims else next(left) for dim in range(len(shape)))


def _before_unsqueeze(at: list[Index], shape: tuple[Index, ...], dim: int) -> tuple[Index, ...]:
    return tuple(at[:dim] + at[dim + 1 :])


def _before_expand(at: list[Index], shape: tuple[Index, ...], sizes: tuple[Any, ...]) -> tuple[Index, ...]:
    return tuple(constant(0) if size.number == 1 else index for size, index in zip(shape, at, strict=True))


def _before_unflatten(at: list[Index], shape: tuple[Index, ...], dim: int, sizes: tuple[Any, ...]) -> tuple[Index, ...]:
    joined = constant(0)
    for size, index in zip(sizes, at[dim : dim + len(sizes)], strict=True):
        joined = joined * index_of(size) + index
    return (*at[:dim], joined, *at[dim + len(sizes) :])


def _before_flatten(at: list[Index], shape: tuple[Index, ...], first: int, last: int) -> tuple[Index, ...]:
    rest = at[first]
    split: list[Index] = []
    for size in reversed(shape[first + 1 : last + 1]):
        rest, place = divided(rest, size)
        split.insert(0, place)
    return (*at[:first], rest, *split, *at[first + 1 :])


def _before_cast(at: list[Index], shape: tuple[Index, ...], dtype: torch.dtype) -> tuple[Index, ...]:
    return tuple(at)


# The views that `Axes.views` makes, and the cast of a mask.
_BEFORE: dict[str, Callable[..., tuple[Index, ...]]] = {
    "transpose": _before_transpose,
    "permute": _before_permute,
    "squeeze": _before_squeeze,
    "unsqueeze": _before_unsqueeze,
    "expand": _before_expand,
    "unflatten": _before_unflatten,
    "flatten": _before_flatten,
    "to": _before_cast,
}
