"""Opens the fast paths of `nn.TransformerEncoderLayer` and `nn.MultiheadAttention`: operators with an attention inside."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from ..graphs.inlining import inlined
from ..graphs.nodes import ENCODER_LAYER, NATIVE_MHA, Surroundings, calls_of, value_of


def open_fast_paths(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Replaces the operators by the operations that they compute, so that their attention can be found.

    _transformer_encoder_layer_fwd(x, ...)  ->  linear, scaled_dot_product_attention, linear, layer_norm, linear, ...

    Both run only without a gradient and outside of CUDA's autocast. (Under a CPU's the first one gives float32, as in plain
    torch.compile, where the uncompiled one gives bfloat16: 2.13.) A row without any key is NaN there, and zero afterwards, as
    in the modules' slow path. Nested tensors stay; so does a node whose weights are read.
    """
    opened = 0
    for node, inside in calls_of(graph_module, surroundings, (ENCODER_LAYER, NATIVE_MHA).__contains__):
        if inside.transform:
            continue
        if any(getattr(value_of(each), "is_nested", False) for each in node.all_input_nodes):
            continue
        if node.target is ENCODER_LAYER:
            (result,) = inlined(graph_module, node, encoder_layer, node.args, node.kwargs, inside, False)
            node.replace_all_uses_with(result)
        else:
            outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            if any(user.users for user in node.users if user not in outputs):
                continue
            (result,) = inlined(graph_module, node, multi_head_attention, node.args, node.kwargs, inside, False)
            for user in outputs:
                user.replace_all_uses_with(result)
            for user in list(node.users):
                graph_module.graph.erase_node(user)
        graph_module.graph.erase_node(node)
        opened += 1
    return opened


def encoder_layer(
    x: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd` (aten/src/ATen/native/transformers/transformer.cpp, PyTorch 2.13)."""

    def attend(x: Tensor) -> Tensor:
        return multi_head_attention(
            x, x, x, width, heads, in_weight, in_bias, out_weight, out_bias, mask, mask_type=mask_type
        )

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, weight_1, bias_1)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), weight_2, bias_2)

    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight, bias, eps)

    if norm_first:
        x = x + attend(normed(x, norm_weight_1, norm_bias_1))
        return x + feed_forward(normed(x, norm_weight_2, norm_bias_2))
    x = normed(x + attend(x), norm_weight_1, norm_bias_1)
    return normed(x + feed_forward(x), norm_weight_2, norm_bias_2)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_weights: bool = True,
    mask_type: int | None = None,
) -> Tensor:
    """The output of `torch._native_multi_head_attention` (aten/src/ATen/native/transformers/attention.cpp, PyTorch 2.13).

    Tensors are (batch, length, width). mask: True, or any number but 0, hides a key; a float mask is read as a boolean one.
    mask_type: 0: (q_len, kv_len). 1: (batch, kv_len). 2: (batch, heads, q_len, kv_len).
    """
    weights, biases = in_weight.split(width), in_bias.split(width)
    heads_of_query, heads_of_key, heads_of_value = (
        F.linear(x, weight, bias).unflatten(-1, (heads, width // heads)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    keep: Any = None
    if mask is not None:
        keep = (mask if mask.dtype == torch.bool else mask.to(torch.bool)).logical_not()
        if mask_type == 1:
            keep = keep[:, None, None, :]
    output = F.scaled_dot_product_attention(heads_of_query, heads_of_key, heads_of_value, attn_mask=keep)
    return F.linear(output.transpose(1, 2).flatten(2), out_weight, out_bias)
