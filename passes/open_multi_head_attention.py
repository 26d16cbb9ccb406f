"""Opens `F.multi_head_attention_forward`, a single node of a Dynamo graph that hides an attention."""

import inspect
import operator
from typing import Any

from torch.fx import GraphModule

from ..graphs.inlining import inlined
from ..graphs.nodes import MHA, Surroundings, calls_of, value_of


def open_multi_head_attention(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Replaces the node by the operations that it computes, so that its attention can be found.

    multi_head_attention_forward(q, k, v, ...)  ->  linear, reshape, scaled_dot_product_attention, reshape, linear

    With `need_weights=True` PyTorch computes the softmax itself: the attention is then one in tensor operations, which stays
    if the weights are read. A node inside a torch.func transform stays.
    """
    opened = 0
    for node, inside in calls_of(graph_module, surroundings, lambda target: target is MHA):
        if inside.transform or any(user.target is not operator.getitem for user in node.users):
            continue
        read = {user.args[1]: user for user in node.users if user.users}  # 0 is the output, 1 the weights
        needs_grad = value_of(node)[0].requires_grad

        def body(*args: Any, wanted: tuple[Any, ...] = tuple(read), **kwargs: Any) -> Any:
            results = MHA(*args, **kwargs)
            return [results[position] for position in wanted]

        given = inspect.signature(MHA).bind(*node.args, **node.kwargs).arguments
        results = inlined(graph_module, node, body, (), given, inside, needs_grad)
        for user, result in zip(read.values(), results, strict=True):
            user.replace_all_uses_with(result)
        for user in list(node.users):
            graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)
        opened += 1
    return opened
