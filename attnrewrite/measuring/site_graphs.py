"""One site as a graph of its own, with one kernel: the nodes that the swap writes into the model, and nothing else.

query, key, value, mask  ->  [casts, padding, packing, the kernel]  ->  heads side by side, as in most models

An operand that is a part of other memory, or lies in it more than once, is a view of that memory inside the graph, as in the
model: a compiler may lose the place of a view, never that of an input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graphs.nodes import SDPA, new_fake_mode, values_only
from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.machines import Machine
from ..kernels.ops import zero_unless
from ..kernels.records import Numerics
from ..passes import TIDIERS, swap_kernels
from ..passes.found import MaskTerm, Operand, Operands, Planned
from ..planning.planner import Libraries, make_plan
from ..planning.policies import Candidate, Policy
from ..planning.sites import Site
from .capturing import Captured

VALUE = "example_value"


@dataclass(frozen=True)
class Lies:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Lies:
        return Lies(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()), tensor.dtype)


@dataclass(frozen=True)
class Memory:
    """Where the operands of a site lie in the inputs of its graph."""

    inputs: dict[str, Lies]
    operands: dict[str, tuple[str, Lies]]  # by the operand's name: the input's name, and where the operand lies in it


@dataclass(frozen=True)
class SiteGraph:
    """A graph and its inputs. `module(*inputs)` returns a tuple of one tensor: (batch, q_len, heads * value_dim) for a query
    of rank 4, SDPA's own form for other ranks."""

    module: GraphModule
    inputs: tuple[
        Tensor, ...
    ]  # query, key, value, and mask and rows if the graph has them; or the memory they are parts of
    site: Site  # the plan of the graph's call
    memory: Memory  # where the operands lie in the inputs


def plan_site(call: AttentionCall, candidate: Candidate, machine: Machine, numerics: Numerics) -> Site:
    """Plans a call with one candidate as the only choice, and loads the candidate's library."""
    (site,) = make_plan([call], Policy((candidate,), numerics=numerics), [machine], Libraries.LOAD).sites
    return site


def site_graph(captured: Captured, site: Site, candidate: Candidate, machine: Machine) -> SiteGraph:
    """Builds the graph of a captured attention with the candidate's kernel. site: the plan that accepted the candidate."""
    call, given = _operands(captured, site)
    mask = given.get("mask")
    build = _Build(call.needs_grad)
    inputs, memory = _inputs(given)
    nodes = {name: build.placeholder(name, tensor) for name, tensor in inputs.items()}
    for name, of in memory.items():
        part = given[name]
        place = (tuple(part.shape), tuple(part.stride()), part.storage_offset())
        nodes[name] = build.call(torch.as_strided, nodes[of], *place)
    options: dict[str, Any] = {"dropout_p": call.dropout, "scale": call.scale, "enable_gqa": captured.grouped}
    options["is_causal"] = mask is None and call.mask.is_causal
    attention = build.call(SDPA, nodes["query"], nodes["key"], nodes["value"], nodes.get("mask"), **options)
    output = build.call(zero_unless, nodes["rows"], attention) if "rows" in nodes else attention
    if captured.query.dim() == 4:
        output = build.call(torch.flatten, build.call(torch.transpose, output, 1, 2), 2)
    build.graph.output((output,))
    module = GraphModule(torch.nn.Module(), build.graph)

    asked = plan_site(call, candidate, machine, max(Numerics))
    if asked.chosen is None:  # where a tensor stands for a proof, the mask's kind differs from the model's
        raise RuntimeError(f"{candidate.name} accepts the site, but refuses its copy: {asked.refusals[0][1]}")
    term = (
        (MaskTerm(Operand(nodes["mask"]), *(("keep", -torch.inf) if mask.dtype == torch.bool else ("add", 1.0))),)
        if mask is not None
        else ()
    )
    query, key, value = (Operand(nodes[name]) for name in ("query", "key", "value"))
    operands = Operands(query, key, value, term, grouped=captured.grouped)
    swap_kernels(module, [Planned(attention, call, operands, site=replace(asked, call=call))])
    for tidier in TIDIERS:
        tidier(module)
    module.graph.lint()
    module.recompile()
    return SiteGraph(module, tuple(inputs.values()), asked, _memory(given, inputs, memory))


def _operands(captured: Captured, site: Site) -> tuple[AttentionCall, dict[str, Tensor]]:
    """The call of a site's graph, and its operands by name."""
    call, mask, rows = _asked(captured, site)
    dtype = getattr(torch, call.dtype)
    tensors = [each.detach() for each in (captured.query, captured.key, captured.value)]
    tensors = [each if each.dtype == dtype else each.to(dtype) for each in tensors]  # as autocast, which is off here
    if call.needs_grad:
        tensors = [each.requires_grad_() for each in tensors]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(getattr(torch, str(call.mask.dtype)))
    names = ("query", "key", "value", "mask", "rows")
    return call, {name: each for name, each in zip(names, (*tensors, mask, rows), strict=True) if each is not None}


def _memory(given: dict[str, Tensor], inputs: dict[str, Tensor], memory: dict[str, str]) -> Memory:
    return Memory(
        {name: Lies.of(each) for name, each in inputs.items()},
        {name: (memory.get(name, name), Lies.of(each)) for name, each in given.items()},
    )


def inputs_for(memory: Memory, captured: Captured, site: Site) -> tuple[Tensor, ...] | None:
    """The inputs with which a graph that was built for an attention like this one computes this attention: its own tensors
    if they lie as the graph has it, else copies that do. None if no copy does.

    memory: of that graph. site: the plan that accepted the graph's candidate.
    """
    _, given = _operands(captured, site)
    inputs, parts = _inputs(given)
    here = _memory(given, inputs, parts)
    if here == memory:
        return tuple(inputs.values())
    for name, (_, lies) in memory.operands.items():
        if name not in given or not _holds(lies, here.operands[name][1]):
            return None
    if given.keys() != memory.operands.keys():
        return None
    device = captured.query.device
    made = {
        name: torch.empty_strided(lies.shape, lies.stride, dtype=lies.dtype, device=device).zero_()
        for name, lies in memory.inputs.items()
    }
    for name, (of, lies) in memory.operands.items():
        place = made[of] if of == name else made[of].as_strided(lies.shape, lies.stride, lies.offset)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in lies.stride)
        place[once].copy_(given[name].detach()[once])
    return tuple(each.requires_grad_(name in given and given[name].requires_grad) for name, each in made.items())


def _holds(lies: Lies, other: Lies) -> bool:
    """Whether memory in which a tensor lies holds the elements of another tensor: where one element of memory stands for
    several of the first tensor (stride 0), it does so for the other."""
    repeats = any(
        size > 1 and stride == 0 and of_other != 0
        for size, stride, of_other in zip(lies.shape, lies.stride, other.stride, strict=False)
    )
    return lies.shape == other.shape and lies.dtype == other.dtype and not repeats


def _inputs(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the graph's inputs by name, and for each operand that is a view of memory the name of the input that holds this
    memory, flat. Operands that need a gradient are inputs themselves, since the gradient of such a view takes time."""
    inputs: dict[str, Tensor] = {}
    memory: dict[str, str] = {}
    known: dict[tuple[int, torch.dtype], str] = {}
    for name, tensor in given.items():
        if tensor.requires_grad or fills_its_memory(tensor):
            inputs[name] = tensor
            continue
        storage = tensor.untyped_storage()
        of = memory[name] = known.setdefault((storage.data_ptr(), tensor.dtype), f"memory_of_{name}")
        inputs[of] = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
    return inputs, memory


def fills_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, each element once, in any order of dimensions."""
    moves = all(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    return moves and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def lies(captured: Captured) -> tuple[Any, ...]:
    """How query, key and value lie in memory: for each the strides, whether it begins where its memory does, and which of them
    share memory. Equal for attentions that a kernel reads alike."""
    tensors = (captured.query, captured.key, captured.value)
    start = [each.untyped_storage().data_ptr() for each in tensors]
    return tuple(
        (each.stride(), each.storage_offset() > 0, start.index(at)) for each, at in zip(tensors, start, strict=True)
    )


def _asked(captured: Captured, site: Site) -> tuple[AttentionCall, Tensor | None, Tensor | None]:
    """Returns the call of a model that passes exactly the mask that the kernel gets, this mask, and a boolean tensor that is
    False for the rows that become zero after the kernel."""
    call = replace(captured.call, written_as="sdpa")
    mask, given = call.mask, captured.mask
    own = replace(call, mask=mask.given or mask)
    if site.backend is None or site.backend.op is None or site.mask_as == "given":
        if mask.kind is MaskKind.CAUSAL_LOWER_RIGHT and given is None and call.q_len != call.kv_len:
            q_len, kv_len = int(call.q_len), int(call.kv_len)
            ones = torch.ones(q_len, kv_len, dtype=torch.bool, device=captured.query.device)
            given = ones.tril(kv_len - q_len)
            own = replace(call, mask=Mask(MaskKind.BOOLEAN, "bool", (q_len, kv_len)))
        return own, given, None
    if given is None or not mask.is_tensor:
        return replace(call, mask=mask if mask.kind is MaskKind.ADDITIVE else mask.bare), None, None
    if captured.keep is None:
        return call, given, None
    kinds = {"keys": MaskKind.KEY_PADDING, "boolean": MaskKind.BOOLEAN}
    kind, rows = kinds.get(site.mask_as, mask.kind), captured.rows if site.mask_as == "keys" else None
    return replace(call, mask=replace(mask.bare, kind=kind, shape=tuple(captured.keep.shape))), captured.keep, rows


class _Build:
    """Builds a graph as Dynamo would trace it: each node has its fake value."""

    def __init__(self, needs_grad: bool) -> None:
        self.graph = Graph()
        self._mode = new_fake_mode()
        self._needs_grad = needs_grad

    def placeholder(self, name: str, tensor: Tensor) -> Node:
        node = self.graph.placeholder(name)
        node.meta[VALUE] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Node:
        values = [each.meta[VALUE] if isinstance(each, Node) else each for each in args]
        with values_only(values[0]), torch.set_grad_enabled(self._needs_grad):
            value = function(*values, **kwargs)
        node = self.graph.call_function(function, args, kwargs)
        node.meta[VALUE] = value
        return node
