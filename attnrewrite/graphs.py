"""What is particular to a kind of graph: where a node's value stands, what a site is called, which graphs hang below.

A Dynamo graph keeps fake values under `meta["example_value"]`, an exported one under `meta["val"]`. Nothing else in
attnrewrite knows the difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

SDPA = torch._C._nn.scaled_dot_product_attention
SDPA_TARGETS = frozenset(
    {SDPA, torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}
)
MHA = torch.nn.functional.multi_head_attention_forward
# Attention inside one operator, which leaves no call to swap. The value: how to have one.
_FUSED = "torch.backends.mha.set_fastpath_enabled(False) before compiling makes it a call that can be swapped"
OPAQUE_TARGETS = {
    torch._transformer_encoder_layer_fwd: _FUSED,
    torch._native_multi_head_attention: _FUSED,
    MHA: "with need_weights=False and outside autocast it is opened, and its attention swapped",
}
INHERITED_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "from_node")

# torch.func's transforms stand in a Dynamo graph as calls that enter and leave a nesting level.
_ENTERS = {"_vmap_increment_nesting": "vmap", "_grad_increment_nesting": "grad", "_jvp_increment_nesting": "jvp"}
_LEAVES = {"_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting"}


def value_key(graph_module: GraphModule) -> str:
    """The metadata key under which the nodes of this graph keep their fake values."""
    exported = any("val" in node.meta and "example_value" not in node.meta for node in graph_module.graph.nodes)
    return "val" if exported else "example_value"


def value_of(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


@contextmanager
def values_only(value: torch.Tensor) -> Iterator[None]:
    """What runs inside computes with fake values such as `value`, sizes symbolic or not, and traces nothing."""
    with torch.no_grad(), enable_python_dispatcher(), getattr(value, "fake_mode", None) or nullcontext():
        yield


def graphs_below(root: GraphModule, obstacle: str | None = None) -> Iterator[tuple[GraphModule, str | None]]:
    """`root` and every graph that it calls (bodies of checkpoints, branches of cond, repeated regions), each once.

    With each comes the torch.func transform that it is called under, if any.
    """
    seen: set[int] = set()
    waiting: list[tuple[GraphModule, str | None]] = [(root, obstacle)]
    while waiting:
        module, inherited = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module, inherited
        for node, transform in with_transforms(module):
            if node.op in ("get_attr", "call_module"):
                child = _attribute(module, str(node.target))
                if isinstance(child, GraphModule):
                    waiting.append((child, transform or inherited))


def with_transforms(module: GraphModule) -> Iterator[tuple[Node, str | None]]:
    """The nodes in order, each with the innermost torch.func transform that it stands in."""
    inside: list[str] = []
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _ENTERS:
            inside.append(_ENTERS[name])
        elif name in _LEAVES and inside:
            inside.pop()
        yield node, f"it stands inside torch.func.{inside[-1]}" if inside else None


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def site_name(node: Node) -> str:
    """The path of the module that makes the call, as "blocks.0.attn1"; a compiled function's own name where no module is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, kind = stack[-1]
        if cleaned := module_path(str(path)):
            return cleaned
        return str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]
    frames = re.findall(r'File "([^"]*)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    # Behind a graph break Dynamo calls the rest of f torch_dynamo_resume_in_f_at_LINE.
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_(\d+)$", r"\1:\2", frames[-1][2]) if frames else "attention"


def module_path(source: str) -> str:
    """Dynamo's expression for a module as a path: L['self'].blocks.0 -> blocks.0, and L['self'] -> ''.

    It also writes L['self'].__dict__['_modules']['blocks']._modules['0'] for the same, and `_orig_mod` where a block was
    compiled by itself.
    """
    text = re.sub(r"^[LG]\['[^']*'\]", "", source)
    parts = re.findall(r"[^.\[\]']+", text)
    return ".".join(part for part in parts if part not in ("__dict__", "_modules", "_orig_mod"))
