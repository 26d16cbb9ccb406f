"""Finds every scaled dot-product attention of a graph and describes it as an `AttentionCall`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.dtensors import is_dtensor, why_not_local
from ..graphs.inlining import inside_of
from ..graphs.modules import ModulePaths
from ..graphs.mutations import Writes, unread, unread_behind
from ..graphs.nodes import (
    ENCODER_LAYER,
    LINEAR_TARGETS,
    MHA,
    OPAQUE_TARGETS,
    SDPA_TARGETS,
    Surroundings,
    dtype_name,
    functions_in,
    is_plain_tensor,
    is_transformed,
    needs_grad,
    number_of,
    site_name,
    value_of,
    with_surroundings,
)
from ..graphs.notes import is_ours
from ..graphs.operators import arguments_of, is_opaque
from ..graphs.sizes import Size, always, holds
from ..graphs.trees import leaves
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.logsumexp import WITH_LOGSUMEXP
from ..kernels.shapes import lead_sizes
from .flex_calls import FLEX, flex_reading
from .found import Found, MaskTerm, Missed, Operand, Operands
from .fused_kernels import FUSED_TARGETS, LOWER_RIGHT, fused_arguments
from .joined_sequences import Joins
from .library_calls import TO_HEADS, is_library_call, is_library_function, library_reading, library_sizes
from .masks import mask_of, tensor_mask
from .opaque_functions import is_function, is_inside
from .recognise import Recognised, recognise
from .softmaxes import may_be_softmax

PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class Finds:
    """The attentions of one graph, and the near misses."""

    attentions: tuple[Found, ...] = ()  # in the order of the graph
    missed: tuple[tuple[Node, Missed], ...] = ()  # each softmax that is nearly part of an attention, with the reason


def find_calls(
    graph_module: GraphModule, surroundings: Surroundings, names: dict[str, int], modules: ModulePaths
) -> Finds:
    """Finds every attention of a graph. The graph is not changed.

    All forms are found: SDPA's positional, keyword or mixed arguments, ranks 2 to 5 and above, grouped heads, masks of any
    rank; attention that is written in tensor operations (recognise.py); the kernels that PyTorch has chosen in a lowered
    program (fused_kernels.py); and the functions of `torch.nn` that the passes could not open, which are reported with the
    reason.

    surroundings: the torch.func transform and the autocast regions around the graph. names: counts each site name over all
    graphs of one compilation, so that site names are unique. modules: the paths of the modules that are compiled.
    """
    origins = Origins()
    thrown_away = unread(graph_module)
    spelled_out, missed = _spelled_out(graph_module, thrown_away)
    found: list[Found] = []
    functions: dict[Any, bool] = {}  # whether there is an attention in it

    def unique(node: Node) -> str:
        """The site's name; the second call of one module is called name#2."""
        name = site_name(node, modules)
        names[name] = names.get(name, 0) + 1
        return name if names[name] == 1 else f"{name}#{names[name]}"

    def hidden(node: Node, inside: Surroundings) -> list[AttentionCall]:
        """The attentions inside a function that stands in the graph as one node."""
        if inside.transform or not functions.get(node.target, True):
            return []
        traced = inside_of(node, inside)
        calls = [] if traced is None else [each.call for each in find_calls(traced, inside, {}, modules).attentions]
        functions[node.target] = bool(calls)
        needs_grad = any(getattr(each, "requires_grad", False) for each in leaves(value_of(node)))
        reason = is_inside(node)
        return [replace(call, obstacle=reason, needs_grad=needs_grad, written_as="operations") for call in calls]

    candidates = functions_in(graph_module, _may_attend)
    for node, inside in with_surroundings(graph_module, surroundings):
        if node in spelled_out:
            found.append(_read_spelled_out(spelled_out[node], inside, unique(node), origins))
        elif node.op != "call_function" or node.target not in candidates:
            continue
        elif node.target in SDPA_TARGETS and not is_ours(node):  # another swap has already chosen `native` there
            call, operands = _read(node, inside, unique(node), origins)
            found.append(Found(node, call, operands))
        elif node.target is WITH_LOGSUMEXP:
            found.append(_read_with_logsumexp(node, inside, origins))
        elif node.target in FUSED_TARGETS and not is_ours(node):
            found.append(_read_fused(node, inside, unique(node), origins, thrown_away))
        elif node.target is FLEX and not is_ours(node):
            found.append(_read_flex(node, inside, unique(node), origins, thrown_away))
        elif is_library_call(node) and not is_ours(node):
            found.append(_read_library(node, inside, unique(node), origins, thrown_away))
        elif node.target in OPAQUE_TARGETS:
            found.append(Found(node, _read_opaque(node, inside, unique(node))))
        elif is_function(node):
            found += [Found(node, replace(call, site=unique(node))) for call in hidden(node, inside)]
    joins = Joins()
    found = [replace(each, call=replace(each.call, joined=joins.of(each.call, each.operands))) for each in found]
    return Finds(tuple(found), tuple(missed.items()))


def _may_attend(target: Any) -> bool:
    known = target in SDPA_TARGETS or target in FUSED_TARGETS or target is FLEX or target in OPAQUE_TARGETS
    return known or target is WITH_LOGSUMEXP or is_library_function(target) or is_opaque(target)


def _spelled_out(
    graph_module: GraphModule, thrown_away: Set[Node]
) -> tuple[dict[Node, Recognised], dict[Node, Missed]]:
    """The attentions that `recognise` finds, by their output node; and the near misses, by their softmax."""
    found: dict[Node, Recognised] = {}
    missed: dict[Node, Missed] = {}
    writes = None
    for node in graph_module.graph.nodes:
        if may_be_softmax(node) and node not in thrown_away:
            writes = writes or Writes(graph_module)
            site = recognise(node, writes, thrown_away)
            if isinstance(site, Recognised):
                found[site.node] = site
            elif site is not None:
                missed[node] = site
    return found, missed


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an SDPA node by name, whether they were given by position or by name."""
    given = {**dict(zip(PARAMETERS, node.args, strict=False)), **node.kwargs}
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **{name: number_of(value) for name, value in given.items()}}


def _read(node: Node, inside: Surroundings, site: str, origins: Origins) -> tuple[AttentionCall, Operands | None]:
    given = arguments(node)
    query, key, value = (value_of(given[name]) for name in ("query", "key", "value"))
    mask = value_of(given["attn_mask"])
    obstacle = inside.transform or _obstacle(given, query, key, value, mask, value_of(node))
    terms: tuple[MaskTerm, ...] = ()
    if isinstance(given["attn_mask"], Node):
        boolean = mask.dtype == torch.bool
        terms = (MaskTerm(Operand(given["attn_mask"]), *(("keep", -math.inf) if boolean else ("add", 1.0))),)
    operands = None
    if all(isinstance(given[name], Node) for name in ("query", "key", "value")):
        of_query, of_key, of_value = (Operand(given[name]) for name in ("query", "key", "value"))
        operands = Operands(of_query, of_key, of_value, terms, grouped=given["enable_gqa"] is True)
    output = value_of(node)
    return _call(
        site,
        (query, key, value),
        output,
        output.dtype,
        _mask(mask, given["is_causal"], query, output, inside.autocasts(query.device.type)),
        grouped=bool(given["enable_gqa"]),
        scale=given["scale"] if not isinstance(given["scale"], Node) else None,
        dropout=float(given["dropout_p"]) if not isinstance(given["dropout_p"], Node) else 0.0,
        role=_role(given["query"], given["key"], query, key, origins),
        obstacle=obstacle,
    ), operands


def _read_spelled_out(site: Recognised, inside: Surroundings, name: str, origins: Origins) -> Found:
    """A recognised attention, with its call."""
    output = value_of(site.node)
    obstacle = inside.transform or site.obstacle
    operands = site.operands
    if operands is None:
        scores = value_of(site.softmax)
        batch: Size = 1
        for size in scores.shape[:-3]:
            batch = batch * size
        heads: Size = scores.shape[-3] if scores.dim() > 2 else 1
        call = AttentionCall(
            name, batch, heads, heads, scores.shape[-2], scores.shape[-1], *site.sizes, dtype_name(site.dtype),
            scores.device.type, needs_grad=output.requires_grad, obstacle=obstacle, written_as="operations",
        )  # fmt: skip
        return Found(site.node, call)
    tensors = [each.value for each in (operands.query, operands.key, operands.value)]
    query, key, _ = tensors
    call = _call(
        name,
        tensors,
        output,
        site.dtype,
        mask_of(operands.mask, site.dtype, query, output),
        grouped=operands.grouped,
        scale=_scale(site.scale, query),
        dropout=site.dropout,
        role=_role(operands.query.node, operands.key.node, query, key, origins),
        obstacle=obstacle or _subclass(tensors),
    )
    return Found(site.node, replace(call, written_as="operations"), operands, site.chain)


def _scale(scale: Any, query: torch.Tensor) -> Any:
    """The scale as SDPA's argument: None where it is the one that SDPA takes by itself."""
    head_dim = query.shape[-1]
    return None if scale is not None and isinstance(head_dim, int) and is_standard(scale, head_dim) else scale


def _read_fused(node: Node, inside: Surroundings, site: str, origins: Origins, thrown_away: Set[Node]) -> Found:
    """A kernel that PyTorch has chosen, as the SDPA call that it came from."""
    given = fused_arguments(node, thrown_away)
    query, key, value = (value_of(given[name]) for name in ("query", "key", "value"))
    bias = given["bias"]
    mask = value_of(bias)
    output = value_of(node)[0]
    terms = (MaskTerm(Operand(bias), "add", 1.0),) if isinstance(bias, Node) else ()
    masking = _mask(mask, given["is_causal"], query, output, autocast=False)
    if given["is_causal"] is True and node.target in LOWER_RIGHT:
        masking = Mask(MaskKind.CAUSAL_LOWER_RIGHT)
    of_query, of_key, of_value = (Operand(given[name]) for name in ("query", "key", "value"))
    operands = Operands(of_query, of_key, of_value, terms, grouped=True)
    call = _call(
        site,
        (query, key, value),
        output,
        output.dtype,
        masking,
        grouped=True,
        scale=given["scale"],
        dropout=float(given["dropout_p"]),
        role=_role(given["query"], given["key"], query, key, origins),
        obstacle=inside.transform or given["obstacle"] or _subclass((query, key, value)),
    )
    return Found(node, replace(call, written_as="kernel"), operands, unread_behind([node], thrown_away))


def _read_with_logsumexp(node: Node, inside: Surroundings, origins: Origins) -> Found:
    """A step of a ring. All steps of a ring have the name of the attention that they make up."""
    given = arguments_of(node)
    of_query, of_key, of_value = (Operand(given[name]) for name in ("query", "key", "value"))
    tensors = query, key, _ = [each.value for each in (of_query, of_key, of_value)]
    output, bias = value_of(node)[0], given["mask"]
    terms: tuple[MaskTerm, ...] = ()
    if isinstance(bias, Node):
        boolean = value_of(bias).dtype == torch.bool
        terms = (MaskTerm(Operand(bias), *(("keep", -math.inf) if boolean else ("add", 1.0))),)
    call = _call(
        given["site"],
        tensors,
        output,
        output.dtype,
        _mask(value_of(bias), given["is_causal"], query, output, autocast=False),
        grouped=True,
        scale=given["scale"],
        dropout=0.0,
        role=_role(given["query"], given["key"], query, key, origins),
        obstacle=inside.transform,
    )
    call = replace(call, written_as="kernel", logsumexp=True)
    return Found(node, call, Operands(of_query, of_key, of_value, terms, grouped=True))


def _read_flex(node: Node, inside: Surroundings, site: str, origins: Origins, thrown_away: Set[Node]) -> Found:
    """A call of flex_attention, as the SDPA call that computes the same."""
    reading = flex_reading(node)
    tensors = [value_of(each) for each in node.args[:3]]
    query, key, _ = tensors
    output = value_of(node)[0]
    of_query, of_key, of_value = (Operand(each) for each in node.args[:3])  # type: ignore[arg-type]
    call = _call(
        site,
        tensors,
        output,
        output.dtype,
        mask_of(reading.terms, output.dtype, query, output),
        grouped=True,
        scale=_scale(reading.scale, query),
        dropout=0.0,
        role=_role(node.args[0], node.args[1], query, key, origins),
        obstacle=inside.transform or reading.obstacle,
    )
    call = replace(call, needs_grad=needs_grad(node), written_as="flex")
    operands = Operands(of_query, of_key, of_value, reading.terms, grouped=True)
    return Found(node, call, operands, (*unread_behind([node], thrown_away), *reading.around))


def _read_library(node: Node, inside: Surroundings, site: str, origins: Origins, thrown_away: Set[Node]) -> Found:
    """A call of a library's operator, as the SDPA call that computes the same."""
    reading = library_reading(node)
    of_query, of_key, of_value = reading.tensors
    tensors = query, key, _ = [each.value for each in reading.tensors]
    role = _role(of_query.node, of_key.node, query, key, origins)
    if reading.obstacle:
        call = AttentionCall(
            site=site,
            **library_sizes(node),
            dtype=dtype_name(query.dtype),
            device=query.device.type,
            needs_grad=needs_grad(node),
            role=role,
            obstacle=reading.obstacle,
            written_as="function",
        )
        return Found(node, call)
    output = value_of(node)
    several = not isinstance(output, torch.Tensor)
    output = (output[0] if several else output).transpose(1, 2)
    call = _call(
        site,
        tensors,
        output,
        output.dtype,
        reading.causal or mask_of(reading.terms, output.dtype, query, output),
        grouped=True,
        scale=_scale(reading.scale, query),
        dropout=reading.dropout,
        role=role,
        obstacle=_subclass(tensors),
    )
    call = replace(call, needs_grad=needs_grad(node), written_as="function")
    operands = Operands(of_query, of_key, of_value, reading.terms, result=TO_HEADS, grouped=True)
    return Found(node, call, operands, unread_behind([node], thrown_away) if several else ())


def is_standard(scale: float, head_dim: int) -> bool:
    """Whether a scale is SDPA's own."""
    return head_dim > 0 and math.isclose(scale, head_dim**-0.5, rel_tol=1e-12)


def _call(
    site: str,
    tensors: Sequence[torch.Tensor],
    output: torch.Tensor,
    dtype: torch.dtype,
    mask: Mask,
    grouped: bool,
    scale: float | None,
    dropout: float,
    role: str,
    obstacle: str | None,
) -> AttentionCall:
    query, key, value = tensors
    shaping = (query, key, value) if obstacle is None else (query,)  # sizes of a call that must stay need not match
    batch: Size = 1
    for size in lead_sizes(*shaping):
        batch = batch * size
    heads: tuple[Size, ...] = tuple(tensor.shape[-3] if tensor.dim() > 3 else 1 for tensor in (query, key, value))
    if obstacle is None and not grouped:  # heads broadcast as in matmul
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
        dtype=dtype_name(dtype),
        device=query.device.type,
        mask=mask,
        scale=scale,
        dropout=dropout,
        needs_grad=output.requires_grad,
        layout=_layout(query),
        role=role,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        obstacle=obstacle,
    )


def _obstacle(given: dict[str, Any], query: Any, key: Any, value: Any, mask: Any, output: Any) -> str | None:
    for name in ("dropout_p", "is_causal", "scale", "enable_gqa"):
        if isinstance(given[name], Node):
            return f"its {name} is computed in the graph"
    if mask is not None and given["is_causal"]:
        return "it has both attn_mask and is_causal=True"
    if given["enable_gqa"] is True and query.dim() == 3:
        return "it has enable_gqa=True with tensors of rank 3"
    if any(map(is_dtensor, (query, key, value, mask))):
        return why_not_local(query, key, value, mask, output) or "it has dropout on DTensors"
    return _subclass((query, key, value))


def _subclass(tensors: Sequence[torch.Tensor]) -> str | None:
    ranks = [tensor.dim() for tensor in tensors]
    for tensor in tensors:
        if tensor.is_nested:
            return "its tensors are nested"
        if tensor.dim() != ranks[0]:
            return f"its tensors have different ranks ({', '.join(map(str, ranks))})"
        if not is_plain_tensor(tensor):
            return f"it works on a tensor subclass ({type(tensor).__name__})"
        if is_transformed(tensor):
            return "it stands inside a torch.func transform"
    return None


def _mask(mask: Any, is_causal: Any, query: torch.Tensor, output: torch.Tensor, autocast: bool) -> Mask:
    if mask is None:
        return Mask(MaskKind.CAUSAL_UPPER_LEFT if is_causal is True else MaskKind.NONE)
    # Under autocast SDPA casts a floating mask like its other arguments, but never float64.
    cast = autocast and not {mask.dtype, output.dtype} & {torch.bool, torch.float64}
    dtype = output.dtype if cast else mask.dtype
    return tensor_mask(mask, dtype, query, mask.requires_grad and output.requires_grad)


def _layout(query: torch.Tensor) -> str:
    if query.dim() != 4:
        return "strided"
    _, heads, length, dim = query.shape
    for name, strides in {
        "bhsd": (heads * length * dim, length * dim, dim, 1),
        "bshd": (heads * length * dim, dim, heads * dim, 1),
    }.items():
        if all(always(a == b) for a, b in zip(query.stride(), strides, strict=True)):
            return name
    return "strided"


def _role(asking: Any, answering: Any, query: torch.Tensor, key: torch.Tensor, origins: Origins) -> str:
    """The role: "self" if queries and keys are projected from the same tensor, else "cross".

    If the graph has no projections, "self" if q_len == kv_len.
    """
    asked, answered = origins.of(asking), origins.of(answering)
    if asked and answered:
        return "self" if asked & answered else "cross"
    return "self" if always(query.shape[-2] == key.shape[-2]) else "cross"


class Origins:
    """For a node, the inputs of the last linear layers and convolutions before it."""

    def __init__(self) -> None:
        self._known: dict[Node, frozenset[Node]] = {}

    def of(self, node: Node, depth: int = 100) -> frozenset[Node]:
        if node not in self._known:
            if node.op == "call_function" and node.target in LINEAR_TARGETS:
                first = node.args[0] if node.args else node.kwargs.get("input")
                self._known[node] = frozenset({first} if isinstance(first, Node) else ())
            elif depth == 0:
                return frozenset()
            else:
                self._known[node] = frozenset().union(*(self.of(each, depth - 1) for each in node.all_input_nodes))
        return self._known[node]


def _read_opaque(node: Node, inside: Surroundings, site: str) -> AttentionCall:
    """The call inside a function of torch.nn that the passes have not opened. Hidden states are (batch, length, width); in
    `multi_head_attention_forward` they are (length, batch, width)."""
    name = getattr(node.target, "__name__", str(node.target))
    masks: tuple[Any, ...]
    if node.target is MHA:
        given = inspect.signature(MHA).bind(*node.args, **node.kwargs).arguments
        query, key = (value_of(given[name]) for name in ("query", "key"))
        width, heads = given["embed_dim_to_check"], given["num_heads"]
        masks = (given.get("attn_mask"), given.get("key_padding_mask"))
    elif node.target is ENCODER_LAYER:
        query = key = value_of(node.args[0])
        width, heads = node.args[1:3]
        masks = (*node.args, node.kwargs.get("mask"))[18:19]
    else:
        query, key = value_of(node.args[0]), value_of(node.args[1])
        width, heads = node.args[3:5]
        masks = (*node.args, node.kwargs.get("mask"))[9:10]
    mask = next((value for each in masks if isinstance(value := value_of(each), torch.Tensor)), None)
    nested = "its tensors are nested" if query.is_nested or key.is_nested else None
    length, batch = (0, 1) if node.target is MHA else (-2, 0)
    reason = inside.transform or nested or "its weights are read"
    return AttentionCall(
        site=site,
        batch=query.shape[batch] if query.dim() > 2 else 1,
        heads=heads,
        kv_heads=heads,
        q_len=query.shape[length],
        kv_len=key.shape[length],
        head_dim=width // heads,
        value_dim=width // heads,
        dtype=dtype_name(query.dtype),
        device=query.device.type,
        mask=Mask() if mask is None else tensor_mask(mask, mask.dtype, query, mask.requires_grad),
        needs_grad=torch.is_grad_enabled() and query.requires_grad,
        obstacle=f"it is part of {name}, which cannot be opened: {reason}",
    )
