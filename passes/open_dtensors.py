"""Opens attention on DTensors: tensor parallelism with `use_local_output=False`, whose heads are shared among ranks."""

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ..graphs.dtensors import is_dtensor, whole_of, why_not_local
from ..graphs.nodes import (
    INHERITED_META,
    SDPA,
    SDPA_TARGETS,
    Surroundings,
    autocasting,
    calls_of,
    value_key,
    value_of,
    values_only,
)
from ..graphs.notes import is_ours
from .find_calls import arguments


def open_dtensors(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Replaces SDPA on DTensors by SDPA on the parts that this rank holds, where that is the same: batch or heads are sharded,
    in equal parts. PyTorch does the same below the graph, with its own kernel.

        scaled_dot_product_attention(q, k, v)
            ->  whole_of(scaled_dot_product_attention(q.to_local(), k.to_local(), v.to_local()), q)

    A call with dropout stays: each rank draws its own numbers there, and DTensor keeps their order.
    """
    opened = 0
    for node, inside in calls_of(graph_module, surroundings, SDPA_TARGETS.__contains__):
        if is_ours(node) or inside.transform:
            continue
        given = arguments(node)
        query, key, value, mask = (value_of(given[name]) for name in ("query", "key", "value", "attn_mask"))
        if not any(map(is_dtensor, (query, key, value, mask))) or any(
            isinstance(given[name], Node) for name in ("dropout_p", "is_causal", "scale", "enable_gqa")
        ):
            continue
        if not given["dropout_p"] and why_not_local(query, key, value, mask, value_of(node)) is None:
            _opened(graph_module, node, given["query"], inside)
            opened += 1
    return opened


def _opened(graph_module: GraphModule, node: Node, query: Node, inside: Surroundings) -> None:
    graph, key = graph_module.graph, value_key(graph_module)
    kept = {name: node.meta[name] for name in INHERITED_META if name in node.meta}
    whole = value_of(node)
    needs_grad = whole.requires_grad
    local: dict[Node, Node] = {}
    with graph.inserting_before(node):
        for each in node.all_input_nodes:
            with torch.set_grad_enabled(needs_grad):
                part = value_of(each).to_local()
            local[each] = graph.call_method("to_local", (each,))
            local[each].meta = {**kept, key: part}
        call = graph.node_copy(node, lambda each: local[each])
        call.target = SDPA
        args: Any
        kwargs: Any
        args, kwargs = map_aggregate((call.args, call.kwargs), value_of)
        with values_only(value_of(local[query]), needs_grad), autocasting(inside.autocast_around(call)):
            call.meta[key] = SDPA(*args, **kwargs)
        output = graph.call_function(whole_of, (call, query))
        output.meta = {**kept, key: whole}
    node.replace_all_uses_with(output)
    graph.erase_node(node)
