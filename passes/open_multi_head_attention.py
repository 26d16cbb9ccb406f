"""Opens `F.multi_head_attention_forward`, a single node of a Dynamo graph that hides an attention."""

import inspect
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.nodes import INHERITED_META, MHA, value_key, value_of
from ..graphs.tracing import traced_operators
from ..graphs.trees import flattened, leaves, mapped, unflattened


def open_multi_head_attention(graph_module: GraphModule) -> int:
    """Replaces the node by the operations that it computes, so that its attention can be found.

    multi_head_attention_forward(q, k, v, ...)  ->  linear, reshape, scaled_dot_product_attention, reshape, linear

    With `need_weights=True` PyTorch computes the softmax itself and returns it: the node has no SDPA call inside. Under
    autocast (the output has another dtype than the query) the casts would be traced away. Such nodes stay and are reported.
    """
    opened = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=MHA):
        given = inspect.signature(MHA).bind(*node.args, **node.kwargs).arguments
        autocast = value_of(node)[0].dtype != value_of(given["query"]).dtype
        if given.get("need_weights", True) is False and not autocast:
            _open(graph_module, node)
            opened += 1
    return opened


def _open(graph_module: GraphModule, node: Node) -> None:
    flat, spec = flattened((node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Node))
    inputs = [value for value in flat if isinstance(value, Node)]
    fake = [value_of(value) for value in inputs]

    def body(*tensors: Any) -> Any:
        given = iter(tensors)
        args, kwargs = unflattened([next(given) if isinstance(value, Node) else value for value in flat], spec)
        return MHA(*args, **kwargs)[0]

    needs_grad = value_of(node)[0].requires_grad
    traced = traced_operators(body, fake, needs_grad)

    key = value_key(graph_module)
    inherited = {name: node.meta[name] for name in INHERITED_META if name in node.meta}
    placeholders = iter(inputs)
    copies: dict[Node, Node] = {}
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(placeholders)
        elif inner.op == "output":
            result = copies[inner.args[0]]
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
    for user in list(node.users):  # getitem 0 is the output, getitem 1 the weights: None
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
            graph_module.graph.erase_node(user)
        elif not user.users:
            graph_module.graph.erase_node(user)
    if not node.users:
        graph_module.graph.erase_node(node)


def _differentiable(value: Any, node: Node) -> Any:
    """`value` (a tensor, or several of `split`), which needs a gradient if an input of its node needs one: make_fx detaches the
    values that it keeps."""
    given = leaves([value_of(source) for source in node.all_input_nodes])
    if not any(getattr(each, "requires_grad", False) for each in given):
        return value

    def differentiable(each: Any) -> Any:
        return each.requires_grad_() if isinstance(each, torch.Tensor) and each.is_floating_point() else each

    return mapped(differentiable, value)
