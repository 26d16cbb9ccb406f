"""Finds every scaled dot-product attention of a graph and says what it asks for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..calls import AttentionCall, Mask, MaskKind
from ..graphs import MHA, OPAQUE_TARGETS, SDPA_TARGETS, Surroundings, site_name, value_of, with_surroundings
from ..sizes import Size, holds, known
from .context import Context, Found

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_LINEAR = frozenset({torch._C._nn.linear, torch.ops.aten.linear.default, torch.conv2d, torch.conv1d, torch.conv3d})


def find_calls(graph_module: GraphModule, context: Context) -> int:
    """Fills `context.found`, in the order of the graph.

    Every call form counts: positional, keyword or mixed arguments, ranks 2 to 5 and above, grouped heads, masks of any
    rank, and the fused multi-head kernels of `torch.nn`, which cannot be swapped and are reported with the reason.
    """
    origins = Origins()
    for node, inside in with_surroundings(graph_module, context.surroundings):
        if node.op != "call_function":
            continue
        if node.target in SDPA_TARGETS:
            context.found.append(Found(node, _read(node, inside, _unique(node, context), origins)))
        elif node.target in OPAQUE_TARGETS:
            context.found.append(Found(node, _read_opaque(node, _unique(node, context))))
    return len(context.found)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an SDPA node by name, whichever way they were given."""
    given = {**dict(zip(PARAMETERS, node.args, strict=False)), **node.kwargs}
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **{name: _number(value) for name, value in given.items()}}


def _number(value: Any) -> Any:
    """Under dynamic=True Dynamo makes symbols of a module's floats. SDPA has asked for their values (its schema says
    `float? scale`), so they are guarded already and reading them costs nothing."""
    symbol = value_of(value)
    kinds = {torch.SymFloat: float, torch.SymBool: bool, torch.SymInt: int}
    return kinds[type(symbol)](symbol) if type(symbol) in kinds else value


def _unique(node: Node, context: Context) -> str:
    """The site's name; the second call of one module is called name#2."""
    name = site_name(node)
    context.names[name] = context.names.get(name, 0) + 1
    return name if context.names[name] == 1 else f"{name}#{context.names[name]}"


def _read(node: Node, inside: Surroundings, site: str, origins: Origins) -> AttentionCall:
    given = arguments(node)
    query, key, value = (value_of(given[name]) for name in ("query", "key", "value"))
    output = value_of(node)
    mask = value_of(given["attn_mask"])
    obstacle = inside.transform or _obstacle(given, query, key, value, mask)

    shaping = (query, key, value) if obstacle is None else (query,)  # sizes that stay as they are need not fit
    batch: Size = 1
    for size in leading(*shaping):
        batch = batch * size
    heads: tuple[Size, ...] = tuple(tensor.shape[-3] if tensor.dim() > 3 else 1 for tensor in (query, key, value))
    if obstacle is None and not given["enable_gqa"]:  # heads broadcast as matmul does
        everywhere = torch.broadcast_shapes(*((size,) for size in heads))[0]
        heads = (everywhere, everywhere, everywhere)
    elif obstacle is None and not holds(heads[1] == heads[2]):
        obstacle = "its keys and values have different numbers of heads"

    return AttentionCall(
        site=site,
        batch=batch,
        heads=heads[0],
        kv_heads=heads[1],
        q_len=query.shape[-2],
        kv_len=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        dtype=_name(output.dtype),
        device=query.device.type,
        mask=_mask(mask, given["is_causal"], query, output, inside.autocasts(query.device.type)),
        scale=given["scale"] if not isinstance(given["scale"], Node) else None,
        dropout=float(given["dropout_p"]) if not isinstance(given["dropout_p"], Node) else 0.0,
        needs_grad=output.requires_grad,
        layout=_layout(query),
        role=_role(given, query, key, origins),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        obstacle=obstacle,
    )


def leading(*tensors: torch.Tensor) -> tuple[Size, ...]:
    """The sizes before (heads, length, dim), or before (length, dim) where there is one head: as SDPA broadcasts them."""
    return tuple(torch.broadcast_shapes(*(tensor.shape[: -3 if tensor.dim() > 3 else -2] for tensor in tensors)))


def _obstacle(given: dict[str, Any], query: Any, key: Any, value: Any, mask: Any) -> str | None:
    for name in ("dropout_p", "is_causal", "scale", "enable_gqa"):
        if isinstance(given[name], Node):
            return f"its {name} is computed in the graph"
    if mask is not None and given["is_causal"]:
        return "it has both attn_mask and is_causal=True"
    if given["enable_gqa"] is True and query.dim() == 3:
        return "it shares key heads among tensors of rank 3"
    for tensor in (query, key, value):
        if tensor.is_nested:
            return "its tensors are nested"
        if tensor.dim() != query.dim():
            return f"its tensors have different ranks ({query.dim()}, {key.dim()}, {value.dim()})"
        if type(tensor) not in _PLAIN:
            return f"it works on a tensor subclass ({type(tensor).__name__})"
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "it stands inside a torch.func transform"
    return None


_PLAIN = {torch.Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor}


def _mask(mask: Any, is_causal: Any, query: torch.Tensor, output: torch.Tensor, autocast: bool) -> Mask:
    if mask is None:
        return Mask(MaskKind.CAUSAL_UPPER_LEFT if is_causal is True else MaskKind.NONE)
    kind = MaskKind.ADDITIVE
    if mask.dtype == torch.bool:
        kind = MaskKind.KEY_PADDING if _is_key_padding(mask, query) else MaskKind.BOOLEAN
    # SDPA's autocast takes a floating mask with the rest, and leaves float64 alone.
    cast = autocast and kind is MaskKind.ADDITIVE and torch.float64 not in (mask.dtype, output.dtype)
    learned = mask.requires_grad and output.requires_grad  # under no_grad a parameter requires one too
    return Mask(kind, _name(output.dtype if cast else mask.dtype), tuple(mask.shape), learned)


def _is_key_padding(mask: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether a boolean mask is the same for every head and query by its shape and strides alone."""
    shared = (-2, -3) if query.dim() > 3 else (-2,)
    return all(known(mask.shape[dim] == 1) or known(mask.stride(dim) == 0) for dim in shared if -dim <= mask.dim())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(query: torch.Tensor) -> str:
    if query.dim() != 4:
        return "strided"
    _, heads, length, dim = query.shape
    for name, strides in {
        "bhsd": (heads * length * dim, length * dim, dim, 1),
        "bshd": (heads * length * dim, dim, heads * dim, 1),
    }.items():
        if all(known(a == b) for a, b in zip(query.stride(), strides, strict=True)):
            return name
    return "strided"


def _role(given: dict[str, Any], query: torch.Tensor, key: torch.Tensor, origins: Origins) -> str:
    """self or cross: whether keys are projected from a tensor that queries are projected from too.

    Where no projection is in the graph, lengths decide.
    """
    asked, answered = origins.of(given["query"]), origins.of(given["key"])
    if asked and answered:
        return "self" if asked & answered else "cross"
    return "self" if known(query.shape[-2] == key.shape[-2]) else "cross"


class Origins:
    """For a node, the inputs of the linear layers and convolutions that it was last computed by."""

    def __init__(self) -> None:
        self._known: dict[Node, frozenset[Node]] = {}

    def of(self, node: Node, depth: int = 100) -> frozenset[Node]:
        if node not in self._known:
            if node.op == "call_function" and node.target in _LINEAR:
                first = node.args[0] if node.args else node.kwargs.get("input")
                self._known[node] = frozenset({first} if isinstance(first, Node) else ())
            elif depth == 0:
                return frozenset()
            else:
                self._known[node] = frozenset().union(*(self.of(each, depth - 1) for each in node.all_input_nodes))
        return self._known[node]


def _read_opaque(node: Node, site: str) -> AttentionCall:
    """torch.nn's operators take hidden states (batch, length, width), `multi_head_attention_forward` (length, batch, width),
    and the number of heads."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.target is MHA:
        given = inspect.signature(MHA).bind(*node.args, **node.kwargs).arguments
        query, key = (value_of(given[name]).transpose(0, -2) for name in ("query", "key"))
        width, heads = given["embed_dim_to_check"], given["num_heads"]
    elif name == "_transformer_encoder_layer_fwd":
        query = key = value_of(node.args[0])
        width, heads = node.args[1:3]
    else:
        query, key = value_of(node.args[0]), value_of(node.args[1])
        width, heads = node.args[3:5]
    return AttentionCall(
        site=site,
        batch=query.shape[0] if query.dim() > 2 else 1,
        heads=heads,
        kv_heads=heads,
        q_len=query.shape[-2],
        kv_len=key.shape[-2],
        head_dim=width // heads,
        value_dim=width // heads,
        dtype=_name(query.dtype),
        device=query.device.type,
        needs_grad=torch.is_grad_enabled() and query.requires_grad,
        obstacle=f"it is part of {name}: {OPAQUE_TARGETS[node.target]}",  # type: ignore[index]
    )
