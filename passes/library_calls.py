"""Calls of libraries' operators, and of PyTorch's below SDPA, by the model itself: each is read as the SDPA call that computes
the same, or stands in the report with the reason why it stays."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.emitting import Emitter
from ..graphs.mutations import unread
from ..graphs.nodes import Surroundings, calls_of, dtype_name, number_of, value_of
from ..graphs.notes import is_ours, note_reading, reading_of, scratch_before
from ..graphs.operators import arguments_of, qualified_name
from ..graphs.sizes import always
from ..kernels.calls import Mask, MaskKind
from .found import MaskTerm, Operand
from .fused_kernels import obstacle_of_results

# Operators of dense tensors (batch, length, heads, dim), as of flash_attn 2.8.3 (flash_attn_interface.py), FlashAttention 3
# (hopper/flash_attn_interface.py and flash_api.cpp), xformers 0.0.35 (ops/fmha/__init__.py, flash.py, flash3.py) and PyTorch
# 2.9 to 2.15 (native_functions.yaml). Their windows and causal masks are lower-right.
_DENSE = frozenset(
    {
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        "xformer::memory_efficient_attention_forward",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
    }
)
_PACKED = frozenset(
    {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_out", "flash_attn::_flash_attn_varlen_forward"}
)
# One word for what each library calls otherwise.
_WORDS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "b": "bias",
    "p": "dropout",
    "dropout_p": "dropout",
    "softmax_scale": "scale",
    "is_causal": "causal",
    "window_left": "left",
    "window_size_left": "left",
    "window_right": "right",
    "window_size_right": "right",
}
# Arguments that say how to compute, or describe the tensors once more.
_ANY_VALUE = frozenset(
    {"return_softmax", "return_debug_mask", "compute_log_sumexp", "max_q", "max_k", "max_seqlen_q", "max_seqlen_k",
     "num_splits", "pack_gqa", "sm_margin", "use_kvsplit", "scheduler_metadata", "rotary_interleaved",
     "is_rotary_interleaved"}
)  # fmt: skip
_TENSORS = frozenset({"query", "key", "value", "bias"})
_READ = _TENSORS | {"dropout", "scale", "causal", "left", "right", "custom_mask_type"}
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
TO_HEADS = (("transpose", (1, 2)),)  # from (batch, length, heads, dim) to (batch, heads, length, dim), and back


@dataclass(frozen=True)
class LibraryReading:
    """What such a call computes, in SDPA's words."""

    tensors: tuple[Operand, Operand, Operand]  # query, key, value; (..., heads, length, dim) where there is no obstacle
    terms: tuple[MaskTerm, ...] = ()
    causal: Mask | None = None  # the mask, where it is SDPA's is_causal
    scale: float | None = None
    dropout: float = 0.0
    obstacle: str | None = None


def read_library_calls(graph_module: GraphModule, surroundings: Surroundings) -> int:
    """Reads each call, and writes the mask of a window in front of it, for a kernel that may take its place.

    flash_attn_func(q, k, v, window_size=(3, 3))  ->  keep = (keys - queries >= -3) & (keys - queries <= 3)
                                                      flash_attn_func(q, k, v, window_size=(3, 3))
    """
    calls = [
        (node, inside)
        for node, inside in calls_of(graph_module, surroundings, is_library_function)
        if is_library_call(node) and not is_ours(node)
    ]
    if not calls:
        return 0
    thrown_away = unread(graph_module)
    for node, inside in calls:
        with scratch_before(node):
            note_reading(node, _read(graph_module, node, inside, thrown_away))
    return len(calls)


def is_library_function(target: Any) -> bool:
    return qualified_name(target) in _DENSE | _PACKED


def is_library_call(node: Node) -> bool:
    return node.op == "call_function" and is_library_function(node.target) and len(_tensors(node)) == 3


def library_reading(node: Node) -> LibraryReading:
    """What `read_library_calls` has read of a call."""
    reading = reading_of(node)
    return reading if isinstance(reading, LibraryReading) else _stays(node, "its arguments were not read")


def library_sizes(node: Node) -> dict[str, Any]:
    """The sizes of a call that stays, by the names of `AttentionCall`; packed sequences are one batch."""
    query, key, value = (value_of(each) for each in _tensors(node))
    return {
        "batch": query.shape[0] if query.dim() > 3 else 1,
        "heads": query.shape[-2],
        "kv_heads": key.shape[-2],
        "q_len": query.shape[-3],
        "kv_len": key.shape[-3],
        "head_dim": query.shape[-1],
        "value_dim": value.shape[-1],
    }


def _tensors(node: Node) -> list[Node]:
    """The first three tensors of at least three dimensions: the query, the key, the value."""
    nodes = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, Node)]
    return [each for each in nodes if isinstance(value_of(each), torch.Tensor) and value_of(each).dim() > 2][:3]


def _stays(node: Node, why: str) -> LibraryReading:
    name = qualified_name(node.target).replace("::", ".")
    query, key, value = (Operand(each) for each in _tensors(node))
    return LibraryReading((query, key, value), obstacle=f"the model calls the operator {name} itself: {why}")


def _read(graph_module: GraphModule, node: Node, inside: Surroundings, thrown_away: Set[Node]) -> LibraryReading:
    if inside.transform:
        return _stays(node, inside.transform)
    if qualified_name(node.target) in _PACKED:
        return _stays(node, "its sequences are packed into one")
    said = {
        _WORDS.get(name, name): number_of(value) for name, value in arguments_of(node).items() if name not in _ANY_VALUE
    }
    others = [name for name, value in said.items() if name not in _READ and (isinstance(value, Node) or value)]
    if others:
        return _stays(node, f"its {others[0]} is set")
    computed = [name for name, value in said.items() if isinstance(value, Node) and name not in _TENSORS]
    if computed:
        return _stays(node, f"its {computed[0]} is computed in the graph")
    tensors = [value_of(each) for each in _tensors(node)]
    if any(tensor.dim() != 4 for tensor in tensors) or any(tensor.dtype not in _DTYPES for tensor in tensors):
        return _stays(node, f"its query is {tuple(tensors[0].shape)} of {dtype_name(tensors[0].dtype)}")
    bias = said.get("bias")
    if bias is not None and not (isinstance(bias, Node) and value_of(bias).is_floating_point()):
        return _stays(node, "its bias is no tensor of floating-point numbers")
    autocast = inside.autocast_dtype(tensors[0].device.type)
    if autocast not in (None, tensors[0].dtype):
        return _stays(node, f"autocast to {dtype_name(autocast)} is on around it and changes SDPA, not this operator")
    if isinstance(value_of(node), tuple | list) and (results := obstacle_of_results(node, thrown_away)):
        return _stays(node, results)

    query, key, value = (Operand(each, TO_HEADS) for each in _tensors(node))
    terms = [] if bias is None else [MaskTerm(Operand(bias), "add", 1.0)]
    band, causal = _band(said), None
    square = always(query.value.shape[-2] == key.value.shape[-2])
    if (band.left, band.right) == (None, 0) and not terms and (square or not band.lower_right):
        causal = Mask(MaskKind.CAUSAL_UPPER_LEFT)
    elif (band.left, band.right) != (None, None):
        terms.append(MaskTerm(Operand(_written(graph_module, node, band)), "keep", -math.inf))
    return LibraryReading(
        (query, key, value), tuple(terms), causal, said.get("scale"), float(said.get("dropout") or 0.0)
    )


@dataclass(frozen=True)
class _Band:
    """The keys that a query sees: from `left` before its own position to `right` behind it. None: all of them."""

    left: int | None
    right: int | None
    lower_right: bool = True  # the last query stands at the last key; False: the first at the first


def _band(said: dict[str, Any]) -> _Band:
    left, right = (None if (size := said.get(name)) is None or size < 0 else size for name in ("left", "right"))
    kind = said.get("custom_mask_type") or 0  # of the memory-efficient kernel: 1 causal, 2 causal from the lower right
    if kind or said.get("causal"):
        right = 0
    return _Band(left, right, kind != 1)


def _written(graph_module: GraphModule, node: Node, band: _Band) -> Node:
    """Writes a boolean mask (q_len, kv_len) in front of the call."""
    emitter = Emitter(graph_module)
    output = value_of(node)
    with emitter.before(node, False, output if isinstance(output, torch.Tensor) else output[0]):
        query, key = (emitter.tensor(each) for each in _tensors(node)[:2])
        q_len, kv_len = query.shape[1], key.shape[1]
        keys = torch.arange(kv_len, device=query.device)
        queries = torch.arange(q_len, device=query.device).unsqueeze(-1)
        if band.lower_right and not always(q_len == kv_len):
            queries = queries + (kv_len - q_len)
        keep = None
        if band.left is not None:
            keep = keys >= queries - band.left
        if band.right is not None:
            before = keys <= queries + band.right
            keep = before if keep is None else keep & before
    assert keep is not None
    return emitter.node(keep)
