"""Reads a number that is written into a part of the scores: `scores[..., n:] = -inf`, `scores[mask] = -1e9`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graphs.axes import Dims
from ..graphs.nodes import value_of
from ..graphs.sizes import always
from ..graphs.spellings import argument, first, is_number, spelled


def number_written(edit: Node) -> Any:
    """The number that a write gives to all elements of its part: `x[i] = 0.5`, `x[i].fill_(0.5)`, `x[i].copy_(tensor(0.5))`.
    None where it writes anything else."""
    name = spelled(edit)
    if name == "zero":
        return 0.0
    place = {"setitem": 2, "index_put": 2, "fill": 1, "copy": 1}.get(str(name))
    if place is None or argument(edit, 3, "accumulate") is True:
        return None
    given = argument(edit, place, "values", "value", "src")
    return given if is_number(given) else None


def number_in(value: Any) -> Any:
    """The number that every element of `value` is: fill(slice(x), 0.5), full_like(slice(x), 0.5). None for any other value."""
    if isinstance(value, Node) and spelled(value) in ("fill", "copy"):
        return number_written(value)
    return value if is_number(value) else None


def masked_index(edit: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """The boolean tensor, and its dims, by which `x[mask]` or `x[:, :, mask]` takes elements of x, which has `dims`."""
    index = argument(edit, 1, "indices", "index")
    entries: list[Any] = list(index) if isinstance(index, list | tuple) else [index]
    mask = entries.pop() if entries else None
    if not isinstance(mask, Node):
        return None
    value, target = value_of(mask), value_of(first(edit))
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() == 0:
        return None
    before = len(dims) - value.dim() if entries and entries[0] is Ellipsis else len(entries)
    whole = (Ellipsis,) if len(entries) == 1 else ()
    if not all(each in whole or each is None or each == slice(None) for each in entries):
        return None
    # None is a whole dimension for index_put, and a new one for setitem.
    if spelled(edit) == "setitem" and None in entries:
        return None
    part = slice(before, before + value.dim())
    sizes = tuple(target.shape)[part]
    if before < 0 or len(sizes) != value.dim():
        return None
    return (mask, dims[part]) if all(always(a == b) for a, b in zip(value.shape, sizes, strict=True)) else None
