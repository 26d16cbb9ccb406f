"""Nested arguments and results as flat lists. Public in PyTorch under `torch.utils.pytree` from 2.15 on only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    return _pytree.tree_leaves(tree, is_leaf=is_leaf)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure, with each leaf replaced by what the function makes of it."""
    return _pytree.tree_map(function, tree)


def flattened(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """The leaves, and the structure that `unflattened` takes."""
    return _pytree.tree_flatten(tree, is_leaf=is_leaf)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    return _pytree.tree_unflatten(leaves, structure)


def in_order(kwargs: dict[str, Any], structure: Any) -> dict[str, Any]:
    """Keyword arguments in the order that the structure of a call, of (args, kwargs), has them in."""
    from torch.export._tree_utils import reorder_kwargs

    return reorder_kwargs(kwargs, structure)


def structure_of(text: str) -> Any:
    """A structure that was written as text, as AOTInductor keeps that of a call."""
    return _pytree.treespec_loads(text)
