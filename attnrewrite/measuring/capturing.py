"""`capture`: runs a model once and hands over the real tensors of each attention, one site at a time.

The graph that is run is the rewritten one, uncompiled: in front of each site stands an op that keeps its tensors, behind it
one that hands them over together with what the site gave. So memory holds the tensors of one site, no more than the model
itself has alive there. Both are torch ops with a schema: they write into nothing, and graphs below (checkpoints, branches)
take them like any other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..graphs.axes import Views, applied
from ..graphs.emitting import Emitter
from ..graphs.nodes import value_of
from ..graphs.notes import mark_ours
from ..graphs.tracing import traced
from ..kernels.calls import SIZES, AttentionCall
from ..kernels.decisions import Accepted
from ..kernels.machines import Machine
from ..kernels.ops import LIBRARY
from ..kernels.shapes import lead_sizes
from ..masks.building import built
from ..passes.found import Operand, Operands, Planned
from ..passes.masks import build_mask
from ..pipeline import Target, rewrite_graph
from ..planning.policies import Policy
from ..planning.registry import records_of
from ..planning.sites import Site


@dataclass(frozen=True)
class Captured:
    """One attention as it ran. Tensors are the model's own, detached, with their strides: read them, write into none, and
    keep none of them behind the callback.

    call: with numbers for sizes. site: what was planned for it (`site.chosen`).
    query, key, value: in SDPA's form (..., heads, length, dim), of rank 3 or more, in the dtypes that the model has; the
        products are computed in `call.dtype` (under autocast another one).
    mask: boolean or additive, as SDPA would get it (broadcasts to (..., heads, q_len, kv_len)); None without a tensor.
        Causal without a tensor is a word: `call.mask.kind`.
    keep: where the graph proves what the mask is (key padding, documents, ...), the boolean tensor that a kernel with a word
        for it gets; rows: of padding of queries and keys, False where a row of the output becomes zeros. None elsewhere.
    grouped: several query heads share a key head.
    output: what the site gave, in SDPA's form (..., heads, q_len, value_dim).
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
    output: Tensor


Receive = Callable[[Captured], None]


def capture(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    receive: Receive,
    policy: Policy,
    machine: Machine | None = None,
    aside: Callable[[Site], bool] | None = None,
) -> Any:
    """Runs `model(*args, **kwargs)` once, calls `receive` at each attention, in the order in which they run, and returns what
    the model returns.

    policy: the choices that are put in place first, for `machine` (None: where the tensors are).
    aside: sites whose kernel does not run in this graph, which nobody compiles, and whose call runs as it stands. They are
        handed over with their own plan.

    A site without tensors of its own (torch.nn's fused layers) or inside torch.func transforms is not handed over. An
    exception of `receive` ends the run and comes out as it is. Call it under `torch.no_grad()` for an inference, as the
    model itself.
    """
    run = _Run(receive, aside)

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        rewrite_graph(graph_module, policy, Target(machine), watch=run)
        return graph_module.forward

    _RUNS[run.number] = run
    try:
        return traced(model, args, kwargs, backend)
    finally:
        del _RUNS[run.number]


class _Run:
    """Writes the two ops around each site, and gets what they see."""

    def __init__(self, receive: Receive, aside: Callable[[Site], bool] | None = None) -> None:
        self.number = next(_NUMBERS)
        self._receive = receive
        self._aside = aside
        self._sites: list[Planned] = []  # as planned, whatever runs in their place
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._places: dict[int, int] = {}  # of a graph's attentions that are captured, in `_sites`

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
            if isinstance(value_of(node), tuple):  # a kernel that was there before, and stays
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
    """The tensor of that shape that these views, which only rename places, have made into this one."""
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
    """The call with the sizes that its tensors have, where the graph holds symbols."""
    if all(isinstance(size, int) for size in (*(getattr(call, name) for name in SIZES), *call.mask.shape)):
        return call
    lead = lead_sizes(query, key, value)
    heads, kv_heads = (each.shape[-3] if query.dim() > 3 else 1 for each in (query, key))
    if not grouped:
        heads = kv_heads = max(heads, kv_heads)
    shape = tuple(mask.shape) if mask is not None else ()
    return replace(
        call, batch=math.prod(lead), heads=heads, kv_heads=kv_heads, q_len=query.shape[-2], kv_len=key.shape[-2],
        head_dim=query.shape[-1], value_dim=value.shape[-1], mask=replace(call.mask, shape=shape),
    )  # fmt: skip


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
