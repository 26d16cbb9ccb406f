"""Nested arguments and results as flat lists. PyTorch makes these functions public, as `torch.utils.pytree`, from 2.15 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree


def leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    return _pytree.tree_leaves(tree, is_leaf=is_leaf)


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same structure, with the function applied to each leaf."""
    return _pytree.tree_map(function, tree)


def flattened(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """The leaves, and the structure that `unflattened` takes."""
    return _pytree.tree_flatten(tree, is_leaf=is_leaf)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    return _pytree.tree_unflatten(leaves, structure)


def in_order(kwargs: dict[str, Any], structure: Any) -> dict[str, Any]:
    """Keyword arguments in the order of a call's structure, which is that of (args, kwargs)."""
    from torch.export._tree_utils import reorder_kwargs

    return reorder_kwargs(kwargs, structure)


def structure_of(text: str) -> Any:
    """Reads a structure from text, the form in which AOTInductor keeps the structure of a call."""
    return _pytree.treespec_loads(text)
