"""Hides the differences between kinds of graphs: the metadata key of values, the names of sites, the graphs that a graph calls.

A Dynamo graph keeps fake values under `meta["example_value"]`, an exported graph under `meta["val"]`. Nothing else in
attnrewrite knows the difference.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from .modules import ModulePaths

SDPA = torch._C._nn.scaled_dot_product_attention
SDPA_TARGETS = frozenset(
    {SDPA, torch.ops.aten.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}
)
LINEAR_TARGETS = frozenset(
    {torch._C._nn.linear, torch.ops.aten.linear.default, torch.conv2d, torch.conv1d, torch.conv3d}
)
# `with torch.nn.attention.sdpa_kernel(...)` becomes this call in a graph: it sets the kernels that SDPA may choose.
SETS_KERNELS = torch.nn.attention._sdpa_kernel
MHA = torch.nn.functional.multi_head_attention_forward
ENCODER_LAYER = torch._transformer_encoder_layer_fwd  # the fast path of nn.TransformerEncoderLayer
NATIVE_MHA = torch._native_multi_head_attention  # the fast path of nn.MultiheadAttention
# Functions of torch.nn with an attention inside. Those that the passes cannot open leave no call to swap.
OPAQUE_TARGETS = frozenset({MHA, ENCODER_LAYER, NATIVE_MHA})
INHERITED_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "from_node")

# Frames of this package name no site: under `attnrewrite run` a function of ours counts the calls of SDPA.
OUR_FILES = str(Path(__file__).parents[1]) + os.sep
# Neither do those of PyTorch's own functions of attention in Python.
_ATTENTION_FILES = str(Path(torch.nn.attention.__file__).parent) + os.sep

# A transform of torch.func becomes two calls in a Dynamo graph, which enter and leave a nesting level.
_ENTERS = {"_vmap_increment_nesting": "vmap", "_grad_increment_nesting": "grad", "_jvp_increment_nesting": "jvp"}
_LEAVES = {"_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting"}
_CHANGES = _ENTERS.keys() | _LEAVES | {"_enter_autocast", "_exit_autocast"}


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
def values_only(value: torch.Tensor, needs_grad: bool = False) -> Iterator[None]:
    """Runs the code inside on fake values, in the fake mode of `value`, with known or symbolic sizes; traces nothing."""
    with torch.set_grad_enabled(needs_grad), enable_python_dispatcher(), fake_mode_of(value) or nullcontext():
        yield


def is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def new_fake_mode() -> FakeTensorMode:
    return FakeTensorMode()


def fake_mode_of(value: Any) -> Any:
    """The fake mode of a fake tensor, None for anything else."""
    return getattr(value, "fake_mode", None)


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not of a subclass with behaviour of its own."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, FakeTensor)


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is wrapped by a transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@dataclass(frozen=True)
class Surroundings:
    """The torch.func transform and the autocast regions around a node."""

    transform: str | None = None  # the innermost one, as a sentence for refusals
    # (device type, dtype, or None where autocast is off) of each region, the innermost last
    autocast: tuple[tuple[str, torch.dtype | None], ...] = ()

    def autocasts(self, device: str) -> bool:
        """Whether autocast is on for a device type."""
        return self.autocast_dtype(device) is not None

    def autocast_dtype(self, device: str) -> torch.dtype | None:
        """The dtype to which autocast casts on a device type, by the innermost region, or else by the state at compilation;
        None where autocast is off."""
        said = [dtype for kind, dtype in self.autocast if kind == device]
        if said:
            return said[-1]
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if on else None

    def autocast_around(self, node: Node) -> dict[str, torch.dtype]:
        """The dtypes to which autocast casts the arguments of a node, by device type; empty where autocast is off."""
        tensors = [value for each in node.all_input_nodes if isinstance(value := value_of(each), torch.Tensor)]
        dtypes = {each.device.type: self.autocast_dtype(each.device.type) for each in tensors}
        return {device: dtype for device, dtype in dtypes.items() if dtype is not None}


@contextmanager
def autocasting(dtypes: Mapping[str, torch.dtype] | None) -> Iterator[None]:
    """Turns autocast on for these device types; without any, it is off inside."""
    with ExitStack() as stack:
        for device, dtype in (dtypes or {}).items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))  # the cache would keep fake weights
        if not dtypes:
            stack.enter_context(torch._C._DisableAutocast())
        yield


def graphs_below(root: GraphModule) -> Iterator[tuple[GraphModule, Surroundings]]:
    """Yields `root` and each graph that it calls (bodies of checkpoints, branches of cond, repeated regions) once, with the
    surroundings of the call."""
    seen: set[int] = set()
    waiting: list[tuple[GraphModule, Surroundings]] = [(root, Surroundings())]
    while waiting:
        module, inherited = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module, inherited
        for node, inside in with_surroundings(module, inherited):
            if node.op in ("get_attr", "call_module"):
                child = _attribute(module, str(node.target))
                if isinstance(child, GraphModule):
                    waiting.append((child, _around_the_call(node, inside)))


def with_surroundings(module: GraphModule, outer: Surroundings) -> Iterator[tuple[Node, Surroundings]]:
    """Yields the nodes in order, each with its surroundings."""
    transforms: list[str] = []
    regions: dict[Node, tuple[str, torch.dtype | None]] = {}
    now = outer
    for node in module.graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name in _ENTERS:
            transforms.append(_ENTERS[name])
        elif name in _LEAVES and transforms:
            transforms.pop()
        elif name == "_enter_autocast":
            regions[node] = _region(*node.args[:3])
        elif name == "_exit_autocast":
            regions.pop(node.args[0], None)
        if name in _CHANGES:
            transform = f"it stands inside torch.func.{transforms[-1]}" if transforms else outer.transform
            now = Surroundings(transform, (*outer.autocast, *regions.values()))
        yield node, now


def calls_of(
    module: GraphModule, outer: Surroundings, wanted: Callable[[Any], bool]
) -> list[tuple[Node, Surroundings]]:
    """The calls of every function that is `wanted`, in order, each with its surroundings."""
    if not (functions := functions_in(module, wanted)):
        return []
    nodes = with_surroundings(module, outer)
    return [(node, inside) for node, inside in nodes if node.op == "call_function" and node.target in functions]


def functions_in(module: GraphModule, wanted: Callable[[Any], bool]) -> set[Any]:
    """The functions that a graph calls and that are `wanted`. A graph has many nodes and few functions, of which each is asked
    about once."""
    functions = {node.target for node in module.graph.nodes if node.op == "call_function"}
    return {function for function in functions if wanted(function)}


def _around_the_call(graph: Node, inside: Surroundings) -> Surroundings:
    """The surroundings of a called graph: an exported program keeps an autocast region as an operator that calls a graph."""
    for user in graph.users:
        if getattr(user.target, "__name__", "") == "wrap_with_autocast":
            return replace(inside, autocast=(*inside.autocast, _region(*user.args[:3])))
    return inside


def _region(device: Any, dtype: Any, enabled: Any) -> tuple[str, torch.dtype | None]:
    """An autocast region by the arguments of torch.autocast. Without a dtype, it has the default of its device type."""
    return str(device), (dtype or torch.get_autocast_dtype(str(device))) if enabled else None


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def module_of(node: Node, modules: ModulePaths) -> str:
    """The path of the module that makes the call, as "blocks.0.attn1"; "" for the compiled module or function itself."""
    return modules.of(node.meta.get("nn_module_stack") or {})


def site_name(node: Node, modules: ModulePaths) -> str:
    """The path of the module that makes the call; without a path, the name of the compiled module's class or function."""
    if path := module_of(node, modules):
        return path
    if stack := list((node.meta.get("nn_module_stack") or {}).values()):
        kind = stack[-1][1]
        return str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]
    frames = re.findall(r'File "([^"]*)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith((OUR_FILES, _ATTENTION_FILES))]
    # After a graph break, Dynamo names the rest of f torch_dynamo_resume_in_f_at_LINE.
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_(\d+)$", r"\1:\2", frames[-1][2]) if frames else "attention"


def kernels_now() -> list[str]:
    """The names of the kernels that SDPA may choose outside of the graph, sorted."""
    return sorted(backend.name for backend in torch.nn.attention._cur_sdpa_kernel_backends())


def needs_grad(node: Node) -> bool:
    """Whether the output needs a gradient: the fake value of a higher-order operator does not say so in each version."""
    tensors = [value for each in node.all_input_nodes if isinstance(value := value_of(each), torch.Tensor)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def number_of(value: Any) -> Any:
    """The number behind a symbol: under dynamic=True Dynamo makes symbols of a module's floats. SDPA has read their values
    already (its schema says `float? scale`), so they are guarded, and reading them here adds no guard."""
    symbol = value_of(value)
    kinds = {torch.SymFloat: float, torch.SymBool: bool, torch.SymInt: int}
    return kinds[type(symbol)](symbol) if type(symbol) in kinds else value


def dtype_name(dtype: torch.dtype | None) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
