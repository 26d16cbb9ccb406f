"""`capture`: runs a model once and hands over the real tensors of each attention, one site at a time.

The rewritten graph runs uncompiled. An op before each site keeps the site's input tensors; an op after the site hands them
over together with the site's output. So the tensors of only one site are kept, which the model itself has alive there. Both
are torch ops whose schema writes into no argument, so that subgraphs (checkpoints, branches) take them like any other op.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graphs.axes import Views, applied
from ..graphs.emitting import Emitter
from ..graphs.nodes import value_of
from ..graphs.notes import mark_ours
from ..graphs.sizes import Size
from ..graphs.tracing import Call, traced_calls
from ..kernels.calls import SIZES, AttentionCall
from ..kernels.decisions import Accepted
from ..kernels.machines import Machine
from ..kernels.ops import LIBRARY
from ..kernels.shapes import lead_sizes
from ..masks.building import built
from ..parallel.settings import ContextParallel
from ..passes.found import Operand, Operands, Planned
from ..passes.masks import build_mask
from ..pipeline import Target, rewrite_graph, rewrite_shared
from ..planning.policies import Policy
from ..planning.registry import records_of
from ..planning.sites import Site


@dataclass(frozen=True)
class Captured:
    """One attention as it ran. The tensors are the model's own, detached, with their strides: only read them, and do not
    keep them after the callback.

    call: the call, with numbers for all sizes.
    site: the plan for the call; `site.chosen` names the kernel.
    query, key, value: SDPA's form (..., heads, length, dim), rank 3 or more, in the model's dtypes. The products are computed
        in `call.dtype`, which is another dtype under autocast.
    mask: SDPA's attn_mask, boolean or additive, broadcasts to (..., heads, q_len, kv_len). None if the model passes no
        tensor: a causal mask then shows in `call.mask.kind` alone.
    keep: the boolean tensor for a kernel that takes the kind of mask which the graph proves (key padding, documents, ...);
        None where nothing is proven.
    rows: for padding of queries and keys: False where a row of the output becomes zero. None for other masks.
    grouped: several query heads share a key head.
    output: the site's output, SDPA's form (..., heads, q_len, value_dim); None for an attention that did not run.
    """

    call: AttentionCall
    site: Site
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keep: Tensor | None
    rows: Tensor | None
    grouped: bool
    output: Tensor | None


Receive = Callable[[Captured], None]


def capture(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    receive: Receive,
    policy: Policy,
    machine: Machine | None = None,
    aside: Callable[[Site], bool] | None = None,
    parallel: ContextParallel | None = None,
) -> Any:
    """Runs `model(*args, **kwargs)` once, calls `receive` at each attention, in the order in which they run, and returns the
    model's output.

    policy: the kernels that are swapped in before the run.
    machine: the machine to plan for. None: the one that the tensors are on.
    aside: returns True for a site whose kernel cannot run in this uncompiled graph. The site's call then runs unchanged
        (`native`), and the site is handed over with its own plan.
    parallel: ranks that share the model, each of which calls this alike: `receive` gets what this rank has of each attention.

    A site without tensors of its own (torch.nn's fused layers) or inside a torch.func transform is not handed over. An
    exception of `receive` ends the run and is raised unchanged. For an inference call it under `torch.no_grad()`, as you
    would call the model.
    """
    results: list[Any] = []
    capture_calls(model, [(args, kwargs)], receive, policy, machine, aside, parallel, results.append)
    return results[0]


def capture_calls(
    model: Callable[..., Any],
    calls: Iterable[Call],
    receive: Receive,
    policy: Policy,
    machine: Machine | None = None,
    aside: Callable[[Site], bool] | None = None,
    parallel: ContextParallel | None = None,
    finish: Callable[[Any], object] = lambda output: None,
) -> None:
    """As `capture`, for calls one after another, each an (args, kwargs). finish: gets the model's output of each."""
    run = _Run(receive, aside)

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite_shared(graph_module, parallel, lambda: rewrite_graph(graph_module, policy, Target(machine), watch=run))
        return graph_module.forward

    _RUNS[run.number] = run
    try:
        traced_calls(model, calls, backend, finish)
    finally:
        del _RUNS[run.number]


class _Run:
    """Emits the two ops around each site, and receives the tensors from them."""

    def __init__(self, receive: Receive, aside: Callable[[Site], bool] | None = None) -> None:
        self.number = next(_NUMBERS)
        self._receive = receive
        self._aside = aside
        self._sites: list[Planned] = []  # with their own plan, also where `native` runs instead
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._places: dict[int, int] = {}  # index of an attention in the graph -> index in `_sites`

    def before(self, module: GraphModule, attentions: Sequence[Planned]) -> Sequence[Planned]:
        emitter = Emitter(module)
        self._places = {}
        run: list[Planned] = []
        for planned in attentions:
            if planned.operands is not None and planned.call.obstacle is None:
                self._places[len(run)] = place = len(self._sites)
                self._sites.append(planned)
                _emit_before(planned, planned.operands, emitter, {"run": self.number, "site": place})
                if self._aside is not None and self._aside(planned.site):
                    planned = replace(planned, site=_as_it_stands(planned.site))
            run.append(planned)
        return run

    def after(self, module: GraphModule, attentions: Sequence[Planned]) -> None:
        for number, place in self._places.items():
            node = attentions[number].node
            outputs = [node]
            if isinstance(value_of(node), tuple):  # a fused kernel that the graph had before: its first output
                outputs = [user for user in node.users if user.args[1] == 0]
            with module.graph.inserting_after(outputs[0]):
                numbers: Any = {"run": self.number, "site": place}
                mark_ours(module.graph.call_function(AFTER, (outputs[0],), numbers))

    def inputs(self, place: int, tensors: tuple[Tensor | None, ...]) -> None:
        self._waiting[place] = tensors

    def output(self, place: int, output: Tensor) -> None:
        planned = self._sites[place]
        operands = planned.operands
        assert operands is not None
        query, key, value, mask, keep, rows = self._waiting.pop(place)
        call = with_numbers(planned.call, query, key, value, mask, operands.grouped)
        site = replace(planned.site, call=call)
        if operands.result:
            heads = [call.heads] if query.dim() > 3 else []
            shape = (*lead_sizes(query, key, value), *heads, call.q_len, call.value_dim)
            output = undone(output, operands.result, tuple(int(size) for size in shape))
        self._receive(Captured(call, site, query, key, value, mask, keep, rows, operands.grouped, output.detach()))


def _as_it_stands(site: Site) -> Site:
    (native,) = records_of("native")
    return Site(site.call, ((native.name, Accepted(mask_as="given")),), native.name, backend=native)


def undone(tensor: Tensor, views: Views, shape: tuple[int, ...]) -> Tensor:
    """Inverts views: returns the tensor of `shape` from which `views`, which only move elements, make `tensor`."""
    places = applied(torch.arange(math.prod(shape), device=tensor.device).view(shape), views).reshape(-1)
    before = tensor.new_empty(math.prod(shape))
    before[places] = tensor.reshape(-1)
    return before.view(shape)


_RUNS: dict[int, _Run] = {}
_NUMBERS = itertools.count()


def _emit_before(planned: Planned, operands: Operands, emitter: Emitter, numbers: Any) -> None:
    call, value, proof = planned.call, value_of(planned.node), planned.proof

    def tensor(operand: Operand) -> Tensor:
        return operand.emitted(emitter)

    with emitter.before(planned.node, call.needs_grad, value[0] if isinstance(value, tuple) else value):
        tensors = [tensor(each) for each in (operands.query, operands.key, operands.value)]
        mask = build_mask(operands.mask, getattr(torch, call.dtype), tensor)
        keep = rows = None
        if mask is not None and proof is not None and proof.keep is not None:
            mask_as = "keys" if proof.queries else "proven"
            kernel = built(call, proof, mask_as, lambda: mask, ("captured", numbers["site"]), emitter)
            keep, rows = kernel.mask, kernel.queries
        nodes: list[Node | None] = [emitter.node(each) for each in tensors]
        nodes += [None if each is None else emitter.node(each) for each in (mask, keep, rows)]
        emitter.statement(BEFORE, tuple(nodes), numbers)


def with_numbers(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool
) -> AttentionCall:
    """Replaces the call's symbolic sizes with the sizes of its tensors."""
    sizes = (*(getattr(call, name) for name in SIZES), *call.mask.shape, *call.joined)
    if all(isinstance(size, int) for size in sizes):
        return call
    lead = lead_sizes(query, key, value)
    heads, kv_heads = (each.shape[-3] if query.dim() > 3 else 1 for each in (query, key))
    if not grouped:
        heads = kv_heads = max(heads, kv_heads)
    shape = tuple(mask.shape) if mask is not None else ()
    return replace(
        call, batch=math.prod(lead), heads=heads, kv_heads=kv_heads, q_len=query.shape[-2], kv_len=key.shape[-2],
        head_dim=query.shape[-1], value_dim=value.shape[-1], mask=replace(call.mask, shape=shape),
        joined=_numbered(call.joined, key.shape[-2]),
    )  # fmt: skip


def _numbered(joined: Sequence[Size], length: int) -> tuple[int, ...]:
    """The lengths of the parts of a sequence as numbers: one that is symbolic is what the others leave of the whole. () where
    several are."""
    known = [size for size in joined if isinstance(size, int)]
    if len(known) + 1 < len(joined):
        return ()
    return tuple(size if isinstance(size, int) else length - sum(known) for size in joined)


def _before(*tensors: Tensor | None, run: int, site: int) -> None:
    _RUNS[run].inputs(site, tuple(None if each is None else each.detach() for each in tensors))


def _after(output: Tensor, *, run: int, site: int) -> None:
    _RUNS[run].output(site, output)


def _define(name: str, schema: str, function: Callable[..., None]) -> Any:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.attnrewrite, name).default


BEFORE = _define(
    "before_site",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? keep, Tensor? rows, *, int run, int site) -> ()",
    _before,
)
AFTER = _define("after_site", "(Tensor output, *, int run, int site) -> ()", _after)
