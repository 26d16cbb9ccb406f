"""Replaces a call in a graph by the operators that it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .nodes import INHERITED_META, Surroundings, value_key, value_of
from .tracing import traced_operators
from .trees import flattened, leaves, mapped, unflattened


def inlined(
    graph_module: GraphModule,
    node: Node,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inside: Surroundings,
    needs_grad: bool,
) -> list[Any]:
    """Puts the operators that `function(*args, **kwargs)` calls in front of `node`, which stays. Returns the leaves of the
    function's result, each tensor as the node that gives it.

    args, kwargs: may hold nodes of the graph, at any depth. inside: the surroundings of `node`: where autocast is on, the
    function is traced under it, and the operators stand in the graph without its casts. needs_grad: whether the result needs a
    gradient.
    """
    traced, inputs = _traced(node, function, args, kwargs, inside, needs_grad)
    traced.graph.eliminate_dead_code()  # what the function computes and does not return

    key = value_key(graph_module)
    inherited = {name: node.meta[name] for name in INHERITED_META if name in node.meta}
    placeholders = iter(inputs)
    copies: dict[Any, Any] = {}
    results: Any = ()
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(placeholders)
        elif inner.op == "output":
            results = inner.args[0]
        else:
            if inner.op == "get_attr":
                name = f"{node.name}_{inner.target}".replace(".", "_")
                setattr(graph_module, name, getattr(traced, str(inner.target)))
            with graph_module.graph.inserting_before(node):
                copy = graph_module.graph.node_copy(inner, lambda old: copies[old])
            if inner.op == "get_attr":
                copy.target = name
            copy.meta = {**inherited, key: inner.meta.get("val")}
            if needs_grad:
                copy.meta[key] = _differentiable(copy.meta[key], copy)
            copies[inner] = copy
    return [copies[each] if isinstance(each, Node) else each for each in results]


def inside_of(node: Node, inside: Surroundings) -> GraphModule | None:
    """A graph of the operators that the function of a node calls; None if it cannot run on the graph's fake tensors."""
    assert callable(node.target)
    try:
        return _traced(node, node.target, node.args, node.kwargs, inside, False)[0]
    except Exception:  # a function that nobody here knows may raise anything
        return None


def _traced(
    node: Node,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inside: Surroundings,
    needs_grad: bool,
) -> tuple[GraphModule, list[Node]]:
    """A graph of the operators that a function calls, and the nodes that are its inputs."""
    flat, structure = flattened((list(args), dict(kwargs)), is_leaf=lambda value: isinstance(value, Node))
    inputs = list(dict.fromkeys(value for value in flat if isinstance(value, Node)))

    def body(*tensors: Any) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        ours, theirs = unflattened([given[value] if isinstance(value, Node) else value for value in flat], structure)
        return leaves(function(*ours, **theirs))

    fake = [value_of(value) for value in inputs]
    return traced_operators(body, fake, needs_grad, inside.autocast_around(node)), inputs


def _differentiable(value: Any, node: Node) -> Any:
    """`value` (a tensor, or several of `split`), which needs a gradient if an input of its node needs one: make_fx detaches the
    values that it keeps."""
    given = leaves([value_of(source) for source in node.all_input_nodes])
    if not any(getattr(each, "requires_grad", False) for each in given):
        return value

    def differentiable(each: Any) -> Any:
        return each.requires_grad_() if isinstance(each, torch.Tensor) and each.is_floating_point() else each

    return mapped(differentiable, value)
