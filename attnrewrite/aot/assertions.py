"""Inserts nodes that check, at every call of a rewritten program, what its kernels were chosen for (ops: check_ops.py)."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graphs.emitting import Emitter
from ..graphs.nodes import dtype_name, value_of
from ..graphs.notes import is_ours
from ..graphs.operators import is_operator, name_in_aten, schema_of
from ..graphs.questions import hints_of, least_of
from ..graphs.sizes import always
from ..passes.found import Swapped
from .check_ops import CHECK_GRADIENT, CHECK_INPUTS, CHECK_SIZE
from .conditions import Condition


def insert_assertions(
    module: GraphModule,
    signature: Any,
    conditions: Sequence[Condition],
    swapped: Sequence[Swapped],
    device: str | None,
    trainable: Collection[str],
    ranges: Mapping[Any, Any],
) -> tuple[str, ...]:
    """Inserts the checks after the inputs of the graph, and returns one sentence for each check.

    signature: the program's graph signature.
    conditions: relations between sizes that must hold.
    swapped: the swapped attention sites.
    device: the device type that the kernels were chosen for, as PyTorch names it. None: the device type of each input.
    trainable: names of the inputs that are parameters with `requires_grad`.
    ranges: the program's range constraints.
    """
    inputs = _user_inputs(module, signature)
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    value = next((value_of(node) for node in inputs if isinstance(value_of(node), Tensor)), None)
    if value is None:
        return ()
    emitter = Emitter(module)
    for node in inputs:
        if isinstance(value_of(node), Tensor):
            emitter.tensor(node)
    said = []
    watched = [node for node in inputs if isinstance(value_of(node), Tensor)] if swapped else []
    below = any(found.node.graph is not module.graph for found in swapped)  # a swap in a subgraph
    places = _places_of_swaps(module)
    if swapped and not below:
        read = _read_by(places)
        watched = [node for node in watched if node in read]
    with emitter.before(first, False, value):
        if watched:
            sites = _sites([_named(found) for found in swapped])
            said.append(_check_inputs(emitter, watched, device, _read_as_they_lie(places), ranges, sites))
        if forward_only := [found for found in swapped if not _has_gradient(found)]:
            tensors = [node for node in inputs if _counts(node) and value_of(node).dtype != torch.bool]
            tensors += _parameters(module, None if below else places, trainable)
            said.append(_check_gradient(emitter, tensors, _sites([_named(found) for found in forward_only])))
        for condition in conditions:
            said.append(_check_size(emitter, inputs, condition))
    return tuple(said)


def _check_inputs(
    emitter: Emitter,
    watched: list[Node],
    device: str | None,
    as_they_lie: set[Node],
    ranges: Mapping[Any, Any],
    sites: str,
) -> str:
    names = [str(node.name) for node in watched]
    dtypes = [dtype_name(value_of(node).dtype) if _counts(node) else "" for node in watched]
    devices = [device or value_of(node).device.type for node in watched]
    devices = ["" if value_of(node).dim() == 0 else kind for node, kind in zip(watched, devices, strict=True)]
    rows = [
        int(node in as_they_lie and value_of(node).dim() > 0 and always(value_of(node).stride(-1) == 1))
        for node in watched
    ]
    limits = [_limits(size, ranges) for node in watched for size in value_of(node).shape]
    emitter.statement(
        CHECK_INPUTS, (watched,), {
            "names": names, "dtypes": dtypes, "kinds": devices, "rows": rows,
            "ranks": [value_of(node).dim() for node in watched],
            "least": [least for least, _ in limits], "most": [most for _, most in limits], "sites": sites,
        }
    )  # fmt: skip
    parts = [
        f"{name} {dtype or 'of integers'}" + (f" on {kind}" if kind else "")
        for name, dtype, kind in zip(names, dtypes, devices, strict=True)
    ]
    return f"inputs are {', '.join(parts)}: {sites}"


def _limits(size: Any, ranges: Mapping[Any, Any]) -> tuple[int, int]:
    """Returns the smallest and the largest size allowed; a largest size of -1 is no limit."""
    if isinstance(size, int):
        return size, size
    found = ranges.get(size.node.expr)  # no limit for a size computed from other sizes: these are checked
    if found is None:
        return 0, -1
    return int(least_of(found, 0)), int(found.upper) if found.upper < sys.maxsize else -1


def _check_gradient(emitter: Emitter, tensors: list[Node], sites: str) -> str:
    emitter.statement(CHECK_GRADIENT, (tensors,), {"sites": sites})
    return f"no gradient is asked for: {sites}"


def _has_gradient(found: Swapped) -> bool:
    """Whether the swapped kernel supports backward although the call was planned without a gradient. True for ops whose
    backward formula needs only their inputs and outputs. The other ops were told not to save tensors for their backward."""
    return found.kernel is not None and (found.kernel.op is None or found.kernel.always_differentiable)


def _places_of_swaps(module: GraphModule) -> list[Node]:
    """The nodes that give the results of the swaps, after all passes: emitted nodes that a node of the model reads."""
    return [
        node for node in module.graph.nodes
        if is_ours(node) and any(not is_ours(user) for user in node.users)
    ]  # fmt: skip


def _read_as_they_lie(places: Sequence[Node]) -> set[Node]:
    """The inputs that reach a kernel only through views and element-wise ops, which keep the order in memory. Where the rows of
    the example are dense, the kernel was chosen for dense rows."""
    behind = _read_by(places, lambda node: is_ours(node) or _keeps_strides(node))
    return {node for node in behind if node.op == "placeholder"}


def _keeps_strides(node: Node) -> bool:
    target = node.target
    if not is_operator(target):
        return target is operator.getitem
    views = any(each.alias_info is not None for each in schema_of(target).returns)
    return views or torch.Tag.pointwise in target.tags or name_in_aten(target) in ("clone", "_to_copy", "to", "reshape")


def _parameters(module: GraphModule, places: Sequence[Node] | None, trainable: Collection[str]) -> list[Node]:
    """For each of `places` the nearest trainable parameter that it is computed from. None: all trainable parameters."""
    nearest: dict[Node, None] = {}
    if places is None:
        return [node for node in module.graph.find_nodes(op="placeholder") if node.name in trainable]
    for place in places:
        seen, waiting = {place}, [place]
        while waiting:
            node = waiting.pop(0)
            if node.op == "placeholder" and node.name in trainable:
                nearest[node] = None
                break
            waiting += [each for each in node.all_input_nodes if each not in seen]
            seen.update(node.all_input_nodes)
    return list(nearest)


def _check_size(emitter: Emitter, inputs: list[Node], condition: Condition) -> str:
    import sympy  # type: ignore[import-untyped]

    sizes = _sizes(inputs)
    relation = condition.relation
    sites = _sites(condition.needed_by)
    signs = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
    sign = signs.get(type(relation))
    if sign is None:  # "or" and the like become a number that must be 1
        left, right, sign = sympy.Piecewise((1, relation), (0, True)), sympy.Integer(1), "=="
    else:
        left, right = relation.lhs, relation.rhs
    shape_env = next(value.node.shape_env for _, _, _, value in sizes)
    symbols = {str(symbol): place for symbol, place in _places(relation, sizes).items()}
    says = f"{_text(left, symbols)} {sign} {_text(right, symbols)}"
    anchor = next(node for node, _, _, _ in sizes if isinstance(value_of(node), Tensor))
    found, needed = (_number(emitter, part, shape_env) for part in (left, right))
    emitter.statement(CHECK_SIZE, (anchor, found, needed), {"relation": sign, "says": says, "sites": sites})
    return f"{says}: {sites}"


def _number(emitter: Emitter, expr: Any, shape_env: Any) -> Any:
    if expr.is_number:
        return int(expr)
    values = hints_of(shape_env)
    known = all(symbol in values for symbol in expr.free_symbols)  # not the sizes that `ShapesSpec` declares (2.15)
    hint = int(expr.xreplace({symbol: values[symbol] for symbol in expr.free_symbols})) if known else None
    return emitter.number(shape_env.create_symintnode(expr, hint=hint))


def _sizes(inputs: list[Node]) -> list[tuple[Node, int, Any, Any]]:
    """Every symbolic size of the inputs: (node, dimension, expression, SymInt)."""
    found: list[tuple[Node, int, Any, Any]] = []
    for node in inputs:
        value = value_of(node)
        if isinstance(value, Tensor):
            found += [
                (node, dim, size.node.expr, size)  # type: ignore[attr-defined]
                for dim, size in enumerate(value.shape)
                if isinstance(size, torch.SymInt)
            ]
    return found


def _places(relation: Any, sizes: Any) -> dict[Any, str]:
    """For each symbol of the relation an input size that holds it, as in "hidden_states.shape[1]"."""
    places: dict[Any, str] = {}
    for node, dim, expr, _ in sizes:
        if expr in relation.free_symbols:
            places.setdefault(expr, f"{node.name}.shape[{dim}]")
    return places


def _text(expr: Any, symbols: dict[str, str]) -> str:
    import sympy

    named = expr.xreplace({s: sympy.Symbol(symbols[str(s)]) for s in expr.free_symbols if str(s) in symbols})
    if type(named).__name__ in ("Mod", "PythonMod") and len(named.args) == 2:
        left, right = named.args
        return f"{left} % {right}" if left.is_Symbol else f"({left}) % {right}"
    return str(named)


def _user_inputs(module: GraphModule, signature: Any) -> list[Node]:
    from torch.export.graph_signature import InputKind

    users = {spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT}
    return [node for node in module.graph.nodes if node.op == "placeholder" and node.name in users]


def _counts(node: Node) -> bool:
    """Whether the dtype of an input is checked. Integers (positions, time steps, token ids) may have any width."""
    value = value_of(node)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _read_by(nodes: Sequence[Node], through: Callable[[Node], bool] = lambda node: True) -> set[Node]:
    """`nodes` and all nodes that they are computed from. The search goes beyond a node only where `through(node)` is True."""
    seen: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes if through(node) else []
    return seen


def _named(found: Swapped) -> tuple[str, str]:
    return found.call.site, found.kernel.name if found.kernel else ""


def _sites(needed_by: Sequence[tuple[str, str]]) -> str:
    """Names the sites for a message: "attention site 'blocks.0.attn1' (_native_flash) and 3 more"."""
    named = [each for each in needed_by if each[0]]
    if not named:
        return "the rewritten attention"
    site, kernel = named[0]
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    return f"attention site {site!r} ({kernel}){more}"
