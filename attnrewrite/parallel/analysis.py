"""`analyse`: which tensors of a graph each rank has a part of, and what is exchanged.

From each self attention, the dimension of its tokens (of its batch, where the ranks divide it) is followed back to where it
begins. From there on, each node is visited in order: a call that treats the elements along the shared dimension by themselves
stays as it is, on a part; for any other call the tensors are gathered, so that what is not known is never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..graphs.modules import ModulePaths
from ..graphs.mutations import storage_of, written_by, written_storages
from ..graphs.nodes import SDPA_TARGETS, is_plain_tensor, module_of, value_of
from ..graphs.operators import is_operator
from ..graphs.sizes import UnbackedSizeError, described, has_no_hint, holds, holds_if_guarded
from ..graphs.trees import leaves
from . import plans, steps
from .attention import shared_attention
from .following import Calls, Place, followed, is_member, is_size, member_of
from .layouts import Placement, Shard, same
from .rows import ANY, ATTENTION, Call
from .steps import Placements, Step


class NotSharedError(Exception):
    """The graph runs whole on every rank, for this reason."""


@dataclass
class Analysis:
    """How a rank runs the nodes of one graph."""

    steps: dict[Node, Step] = field(default_factory=dict)  # of each call of an operator
    begins: dict[Node, Shard] = field(default_factory=dict)  # tensors of which each rank goes on with a part
    names: dict[Node, str] = field(default_factory=dict)  # of the sites
    plan: plans.Sharing = field(default_factory=lambda: plans.Sharing(1))


def analyse(
    module: GraphModule,
    names: dict[Node, str],
    ranks: int,
    kind: str = "auto",
    wanted: dict[Node, int] | None = None,
    modules: ModulePaths | None = None,
) -> Analysis:
    """Analyses a graph of aten operators.

    names: the attentions, each with the name of its site.
    kind: of `ContextParallel`.
    wanted: the tensors to share where every rank has them whole, each with a dimension. None: those of self attention.
    modules: the paths of the modules that are compiled, for reports.

    Raises `NotSharedError` where the graph can only run whole on every rank.
    """
    return _Analyser(module, names, ranks, kind, modules or ModulePaths()).run(wanted)


class _Analyser:
    def __init__(
        self, module: GraphModule, names: dict[Node, str], ranks: int, kind: str, modules: ModulePaths
    ) -> None:
        self.module = module
        self.names = names
        self.ranks = ranks
        self.kind = kind
        self.modules = modules
        self.calls = Calls()
        self.written = written_storages(module)
        self.held: dict[Node, list[Any]] = {}  # the placements in which a rank has a tensor; the first is the main one
        self.wanted: dict[Node, int] = {}
        self.result = Analysis(names=names)
        self.begins: list[plans.Begin] = []
        self.sites: list[plans.SharedSite] = []
        self.gathered: list[plans.Gathered] = []

    def run(self, wanted: dict[Node, int] | None) -> Analysis:
        try:
            self.wanted = self._wanted() if wanted is None else wanted
            if self.wanted:
                for node in self.module.graph.nodes:
                    self._visit(node)
        except UnbackedSizeError as error:
            raise NotSharedError(f"a size depends on data ({error})") from error
        summed = sum(bool(step.summed) for step in self.result.steps.values())
        if not self.begins:
            self.sites = []
        self.result.plan = plans.Sharing(
            self.ranks, tuple(self.begins), tuple(self.sites), tuple(self.gathered), summed
        )
        return self.result

    # -- where sharing begins

    def _wanted(self) -> dict[Node, int]:
        """The tensors that are to be shared, with the dimension: those of self attention, back to where they begin."""
        found: dict[Node, int] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_function" and node.target in SDPA_TARGETS:
                for place in sorted(self._of_site(self.calls[node]), key=lambda place: place[1]):
                    found.setdefault(*place)
        return found

    def _of_site(self, call: Call) -> set[Place]:
        operands = call.tensors[:3]
        rank = call.rank()
        batch = call.shape()[0]
        if self.kind == "auto" and rank >= 4 and holds_if_guarded(batch % self.ranks == 0):
            return set().union(*(followed((node, 0), self.calls, self.ranks) for node in operands))
        if rank < 2 or not holds(call.shape()[-2] >= self.ranks):
            return set()
        query, key, value = (
            followed((node, call.rank(at) - 2), self.calls, self.ranks) for at, node in enumerate(operands)
        )
        return query | key | value if query & key else set()

    # -- the nodes, in order

    def _visit(self, node: Node) -> None:
        value = value_of(node)
        if node.op in ("placeholder", "get_attr"):
            self._hold(node, None)
        elif node.op == "output":
            for each in leaves(node.args):
                if isinstance(each, Node):
                    self._need(each, None, "an output of the graph")
        elif is_member(node):
            source, index = member_of(node)
            of_all = self.held[source][0]
            self._hold(node, of_all[index] if isinstance(of_all, tuple) else None)
        elif is_size(node):
            self._hold(node, None)
        elif not _is_tensors(value) or not is_operator(node.target):
            if has_no_hint(value):
                raise NotSharedError(f"{self._name(node)} reads a number out of a tensor")
            for each in node.all_input_nodes:
                self._need(each, None, f"{self._name(node)} is no operator of tensors")
            for each in written_by(node):
                self._not_a_part(node, each, None)
                self._write(each)
            self._hold(node, None)
        else:
            self._call(self.calls[node])
        if isinstance(value, torch.Tensor):
            self._begin(node, value)

    def _begin(self, node: Node, value: torch.Tensor, shard: Placement = None) -> None:
        """Starts to share a tensor that every rank has whole, if it is to be shared."""
        if self.held[node][0] is not None or storage_of(value) in self.written or not is_plain_tensor(value):
            return
        if shard is None:
            if node not in self.wanted:
                return
            dim = self.wanted[node]
            if not holds(value.shape[dim] >= self.ranks):
                return
            shard = Shard(dim, (value.shape[dim],))
        self.held[node] = [shard, None]
        self.result.begins[node] = shard
        shape = tuple(described(size) for size in value.shape)
        lengths = tuple(described(length) for length in shard.lengths)
        self.begins.append(plans.Begin(self._name(node), shape, shard.dim, lengths))

    def _call(self, call: Call) -> None:
        node = call.node
        placements = [self.held[each][0] for each in call.tensors]
        step = self._step(call, placements)
        self.result.steps[node] = step
        reason = self._reason(call, step)
        for each, placement in zip(call.tensors, step.inputs, strict=True):
            if not (isinstance(placement, int) and placement == ANY):
                joint = step.attention is not None and step.attention.exchange == plans.KEYS_GATHERED
                self._need(each, placement, reason, silent=joint)
        inputs = dict(zip(call.tensors, step.inputs, strict=True))
        for each in written_by(node):
            self._not_a_part(node, each, inputs.get(each))
            self._write(each)
        self._views(call, step)
        if step.attention is not None:
            self._site(call, step.attention)
        self._hold(node, step.output)
        if step.then is not None:
            self._begin(node, call.output, step.then)

    def _step(self, call: Call, placements: Placements) -> Step:
        if all(placement is None for placement in placements):
            if call.name == ATTENTION and call.node in self.names:
                return shared_attention(call, placements, self.ranks, self.kind)
            return steps.whole(call)
        if call.name == ATTENTION:
            return shared_attention(call, placements, self.ranks, self.kind)
        writes = written_by(call.node)
        for position in _leads(call, placements):
            shard = placements[position]
            if shard is None or (writes and call.tensors[position] not in writes):
                continue
            step = (
                steps.joined(call, placements, shard)
                or steps.by_row(call, position, shard)
                or steps.cut(call, shard, self.ranks)
                or steps.regrouped(call, shard, self.ranks)
                or steps.reduced(call, shard, self.ranks)
            )
            if step is not None:
                return step
        return steps.whole(call)

    def _need(self, node: Node, placement: Placement, reason: str, silent: bool = False) -> None:
        """Notes that a tensor is needed so. What a rank has of it costs nothing, nor does a part of what it has whole."""
        held = self.held[node]
        if any(same(placement, each) for each in held) or isinstance(held[0], tuple):
            return
        if not any(each is None for each in held):
            value = value_of(node)
            if not silent:
                shape = tuple(described(size) for size in value.shape)
                self.gathered.append(plans.Gathered(self._name(node), shape, self._received(value), reason))
            held.append(None)
        if placement is not None:
            held.append(placement)

    def _hold(self, node: Node, placement: Any) -> None:
        self.held[node] = [placement]

    # -- tensors that are written in place

    def _not_a_part(self, node: Node, target: Node, needed: Any) -> None:
        """A write into a copy would be lost. needed: what the call of `node` gets of the tensor into which it writes."""
        have = self.held[target][0]
        # A tuple is of several tensors, which no call gets as one.
        lost = any(have) if isinstance(have, tuple) else have is not None and not same(needed, have)
        if lost and needed != ANY:
            raise NotSharedError(
                f"{self._name(node)} writes into a tensor of which each rank has a part, and needs it whole"
            )

    def _write(self, target: Node) -> None:
        """A write into a rank's part is seen through every view of that part, and by no copy that was made before."""
        storage = storage_of(value_of(target))
        for node, held in self.held.items():
            if storage is not None and storage_of(value_of(node)) == storage:
                del held[1:]

    def _views(self, call: Call, step: Step) -> None:
        """A view of a copy would not see what is written into the tensor, nor write into it."""
        storages = {storage_of(value) for value in leaves(call.output) if isinstance(value, torch.Tensor)}
        for each, placement in zip(call.tensors, step.inputs, strict=True):
            storage = storage_of(value_of(each))
            if storage not in self.written or storage not in storages or placement == ANY:
                continue
            if not same(placement, self.held[each][0]) or step.then is not None:
                raise NotSharedError(
                    f"{self._name(call.node)} is part of a tensor that is written in place, and needs another part of it"
                )

    # -- the report

    def _site(self, call: Call, attention: steps.Attention) -> None:
        sent: float | None = 0.0
        number = 0
        query, key, value = (value_of(node) for node in call.tensors[:3])
        if attention.exchange == plans.ALL_TO_ALL:
            tensors = [self._part(query, attention.query), self._part(call.output, attention.query)]
            tensors += [self._part(each, attention.key) for each in (key, value)]
            sent = _sum(tensors)
            number = 2
            sent = None if sent is None else sent * (self.ranks - 1) / self.ranks
        elif attention.exchange in (plans.KEYS_GATHERED, plans.RING):
            sent = _sum([self._part(each, attention.key) for each in (key, value)])
            number = self.ranks - 1 if attention.exchange == plans.RING else 1
            sent = None if sent is None else sent * (self.ranks - 1)
        elif attention.exchange == plans.GROUPS:
            together = attention.together
            number = 2 + self.ranks // together - 1
            queries = _sum([self._part(each, attention.query) for each in (query, call.output)])
            keys = _sum([self._part(each, attention.key) for each in (key, value)])
            if queries is None or keys is None:
                sent = None
            else:
                sent = (queries + keys) * (together - 1) / together + keys * (self.ranks // together - 1)
        name = self.names.get(call.node, "attention")
        self.sites.append(plans.SharedSite(name, attention.exchange, sent, attention.reason, number))

    def _part(self, value: torch.Tensor, shard: Placement) -> float | None:
        """MiB of a rank's part of a tensor; None where a size is symbolic."""
        elements = 1
        for dim, size in enumerate(value.shape):
            known = shard.local(self.ranks) if shard is not None and dim == shard.dim else size
            if not isinstance(known, int):
                return None
            elements *= known
        return elements * value.element_size() / plans.MIB

    def _received(self, value: torch.Tensor) -> float | None:
        all_of_it = self._part(value, None)
        return None if all_of_it is None else all_of_it * (self.ranks - 1) / self.ranks

    def _reason(self, call: Call, step: Step) -> str:
        if step.attention is not None:
            return step.attention.reason or f"{call.name} needs all of it"
        known = "works along the dimension that is shared" if call.rows else "has no rule here"
        return f"{self._name(call.node)} {known}"

    def _name(self, node: Node) -> str:
        """A node for readers: "blocks.0.attn1: slice"."""
        if node.op == "placeholder":
            return f"the input {str(node.target).removeprefix('l_').rstrip('_')}"
        call = self.calls[node].name or str(node.target)
        path = module_of(node, self.modules)
        return f"{path}: {call}" if path else call


def _leads(call: Call, placements: Placements) -> Iterator[int]:
    """The shared tensors, the largest first."""

    def size(position: int) -> int:
        result = 1
        for each in call.shape(position):
            result *= each if isinstance(each, int) else each.node.hint
        return -result

    shared = [position for position, placement in enumerate(placements) if placement is not None]
    yield from sorted(shared, key=size)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and bool(value) and all(isinstance(each, torch.Tensor) for each in value)
    )


def _sum(sizes: Iterable[float | None]) -> float | None:
    result = 0.0
    for size in sizes:
        if size is None:
            return None
        result += size
    return result
