"""What a gradient asks of a graph that ranks share: which graphs cannot be shared with one, and which inputs each rank uses for
its own part, so that the summands of their gradients are added up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ..graphs.mutations import storage_of, written_storages
from ..graphs.nodes import value_of
from ..graphs.operators import is_higher_order, is_opaque
from .analysis import Analysis
from .exchanges import needs_gradient
from .rows import Call

# The inputs whose gradients are added up in one exchange have at most so many bytes together: the exchange of some runs while
# the gradients of others are computed.
BUCKET = 32 * 1024**2


def is_needed(module: GraphModule) -> bool:
    """Whether some input of the graph needs a gradient."""
    return any(_needs(node) for node in module.graph.find_nodes(op="placeholder"))


def begins_inside(module: GraphModule) -> bool:
    """Whether the graph turns autograd on where it is off around the graph, and some input has a gradient then. Ranks take
    their parts of inputs outside of that region, where nothing of it is recorded."""
    if torch.is_grad_enabled():
        return False
    inputs = [value_of(node) for node in module.graph.find_nodes(op="placeholder")]
    return any(isinstance(each, torch.Tensor) and each.requires_grad for each in inputs) and any(
        getattr(node.target, "__name__", "") == "_set_grad_enabled" and node.args == (True,)
        for node in module.graph.nodes
        if node.op == "call_function"
    )


def obstacle(module: GraphModule) -> str:
    """Why a graph of Dynamo cannot be shared with a gradient; "" where it can. Sharing writes the graph in operators, each with
    its own gradient: what says otherwise would be lost."""
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and (is_higher_order(node.target) or is_opaque(node.target)):
            if "checkpoint" in name:
                return "it holds an activation checkpoint: compile the blocks inside of the checkpoint"
            return f"a gradient is needed, and {name} may define one of its own"
        if _is_autograds(node):
            return f"a gradient is needed, and {name} works on gradients itself"
    return ""


def _is_autograds(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in ("requires_grad_", "register_hook", "retain_grad")
    module = str(getattr(node.target, "__module__", None) or "")
    return module.startswith(("torch.autograd", "torch.distributed", "torch._functorch"))


def used_for_parts(module: GraphModule, analysis: Analysis) -> list[Node]:
    """The inputs that need a gradient, and that some rank uses whole for its own part, in the order of first use."""
    found: dict[Node, None] = {}
    written = written_storages(module)
    for node, step in analysis.steps.items():
        if step.differs:
            for each, placement in zip(Call(node).tensors, step.inputs, strict=True):
                if placement is None and each.op == "placeholder" and _needs(each):
                    found.setdefault(each)
    return [node for node in found if storage_of(value_of(node)) not in written]


def buckets(inputs: list[Node]) -> Iterator[list[Node]]:
    """Inputs whose gradients are added up together: of one dtype and device, known sizes, at most `BUCKET` bytes. Others are
    left out."""
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[list[Node], int]] = {}
    for node in inputs:
        value = value_of(node)
        size = value.numel() * value.element_size()
        if not isinstance(size, int) or value.is_complex():
            continue
        kind = (value.dtype, value.device)
        members, total = open_ones.get(kind, ([], 0))
        if members and total + size > BUCKET:
            yield members
            members, total = [], 0
        open_ones[kind] = ([*members, node], total + size)
    yield from (members for members, _ in open_ones.values())


def _needs(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and needs_gradient(value)
