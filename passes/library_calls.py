"""Operators of libraries, and of PyTorch below SDPA, that a model calls itself: each stands in the report, and stays."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..graphs.nodes import value_of
from ..graphs.operators import qualified_name

_PACKED = "its sequences are packed into one"
_OTHER = "its kernel was chosen by the model, and its arguments are not read"
# Why each stays. Tensors are (batch, length, heads, dim), or (tokens, heads, dim) where sequences are packed.
_OPERATORS = {
    "torch_attn::_varlen_attn": _PACKED,
    "torch_attn::_varlen_attn_out": _PACKED,
    "flash_attn::_flash_attn_varlen_forward": _PACKED,
    "flash_attn::_flash_attn_forward": _OTHER,
    "flash_attn_3::_flash_attn_forward": _OTHER,
    "flash_attn_3::fwd": _OTHER,
    "xformers_flash::flash_fwd": _OTHER,
    "xformers_flash3::flash_fwd": _OTHER,
    "aten::_flash_attention_forward": _OTHER,
    "aten::_efficient_attention_forward": _OTHER,
    "aten::_cudnn_attention_forward": _OTHER,
}


def is_library_call(node: Node) -> bool:
    return node.op == "call_function" and qualified_name(node.target) in _OPERATORS and len(_tensors(node)) == 3


def library_obstacle(node: Node) -> str:
    """Why such a call stays."""
    name = qualified_name(node.target)
    return f"the model calls the operator {name.replace('::', '.')} itself: {_OPERATORS[name]}"


def library_sizes(node: Node) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Query, key and value, and their sizes by the names of `AttentionCall`; packed sequences are one batch."""
    tensors = _tensors(node)
    query, key, value = tensors
    sizes = {
        "batch": query.shape[0] if query.dim() > 3 else 1,
        "heads": query.shape[-2],
        "kv_heads": key.shape[-2],
        "q_len": query.shape[-3],
        "kv_len": key.shape[-3],
        "head_dim": query.shape[-1],
        "value_dim": value.shape[-1],
    }
    return tensors, sizes


def _tensors(node: Node) -> list[torch.Tensor]:
    """The first three tensors of at least three dimensions: the query, the key, the value."""
    values = [value_of(each) for each in (*node.args, *node.kwargs.values()) if isinstance(each, Node)]
    return [each for each in values if isinstance(each, torch.Tensor) and each.dim() > 2][:3]
