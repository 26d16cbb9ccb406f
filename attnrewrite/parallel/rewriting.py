"""`part_of_graph`: the graph that one rank runs, after an analysis."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..graphs.emitting import Emitter
from ..graphs.mutations import storage_of, written_by, written_storages
from ..graphs.nodes import value_of
from ..graphs.operators import as_given
from ..graphs.sizes import Size, always
from ..graphs.spellings import name_of
from . import gradients, plans
from .analysis import Analysis, NotSharedError
from .attending import Attentions
from .exchanges import all_used_for_parts, needs_gradient, part_of, summed, used_for_parts, whole
from .following import is_member, is_size, member_of
from .layouts import Placement, Ranks, Shard, same
from .orders import lying_as
from .overlapping import overlap
from .rows import ANY, VIEWS, Call
from .steps import Attention, Step

# Beside the views, what may or may not copy.
MOVES = ("transpose", "permute", "movedim", "t", "contiguous", "clone", "slice", "select", "detach", "alias")


def part_of_graph(module: GraphModule, analysis: Analysis, ranks: Ranks) -> Graph:
    """A new graph with the inputs and outputs of `module`, in which a rank computes its parts and the ranks exchange theirs.

    Raises `RuntimeError` if a rank's tensor has another shape or dtype than the analysis says.
    """
    return _Rewriter(module, analysis, ranks).run()


class _Rewriter:
    def __init__(self, module: GraphModule, analysis: Analysis, ranks: Ranks) -> None:
        self.module = module
        self.analysis = analysis
        self.ranks = ranks
        self.graph = Graph()
        self.emitter = Emitter(module)
        self.emitter.graph = self.graph
        self.written = written_storages(module)
        self.held: dict[Node, list[tuple[Placement, Any]]] = {}  # the main value first
        self.for_parts: dict[Node, torch.Tensor] = {}  # whole tensors, as each rank uses them for its own part
        self.nodes: dict[Node, Node] = {}  # of values that are no tensors
        self.writes: Counter[int | None] = Counter()  # so far, into each storage
        self.attentions = Attentions(self.emitter, ranks, analysis.names, self.writes)

    def run(self) -> Graph:
        first = next(value for node in self.module.graph.nodes if isinstance(value := value_of(node), torch.Tensor))
        for node in self.module.graph.find_nodes(op="placeholder"):
            self._input(node)
        with self.emitter.around(first, torch.is_grad_enabled()):
            for inputs in gradients.buckets(gradients.used_for_parts(self.module, self.analysis)):
                values = all_used_for_parts([self._get(node, None) for node in inputs], self.ranks)
                self.for_parts |= dict(zip(inputs, values, strict=True))
            for node in self.module.graph.nodes:
                self._visit(node)
        overlap(self.graph)
        return self.graph

    def _input(self, node: Node) -> None:
        new = self.graph.node_copy(node)
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            self.emitter.tensor(new)
        self.nodes[node] = new
        self.held[node] = [(None, value)]

    def _visit(self, node: Node) -> None:
        self.emitter.attribute(node)
        if node.op == "get_attr":
            self._input(node)
        elif node.op == "output":
            self.graph.output(map_arg(node.args[0], self._result))
        elif is_member(node):
            source, index = member_of(node)
            values, step = self.held[source][0][1], self.analysis.steps.get(source)
            placement = step.output[index] if step is not None and isinstance(step.output, tuple) else None
            self.held[node] = [(placement, values[index])]
        elif node.op == "call_function" and is_size(node):
            self.held[node] = [(None, value_of(node))]
        elif node in self.analysis.steps:
            self._call(Call(node), self.analysis.steps[node])
        elif node.op == "call_function":
            self._other(node)
        shard = self.analysis.begins.get(node)
        if shard is not None:
            value = self.held[node][0][1]
            self.held[node] = [(shard, part_of(value, shard, self.ranks)), (None, value)]

    def _other(self, node: Node) -> None:
        """A call of no operator: of a higher-order operator, or one that enters autocast."""
        args: Any = map_arg(node.args, self._of_other)
        kwargs: Any = map_arg(node.kwargs, self._of_other)
        written = map_arg(node.args, self._result), map_arg(node.kwargs, self._result)
        result = self.emitter.replay(node, node.target, args, kwargs, written)
        self.held[node] = [(None, result)]
        self._written_by(node)
        if not isinstance(result, torch.Tensor | tuple | list):
            self.nodes[node] = next(iter(reversed(self.graph.nodes)))

    def _of_other(self, node: Node) -> Any:
        return self._get(node, None)

    def _result(self, node: Node) -> Any:
        """The node of a whole value."""
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            return self.emitter.node(self._get(node, None))
        if isinstance(value, torch.SymInt | torch.SymFloat):
            return self.emitter.number(value)
        return self.nodes[node]

    def _get(self, node: Node, placement: Any, for_parts: bool = False) -> Any:
        """The value of a node as a rank needs it. for_parts: for a result that differs on each rank."""
        if for_parts and placement is None:
            return self._for_parts(node)
        held = self.held[node]
        main, value = held[0]
        if not isinstance(value, torch.Tensor) or placement == ANY:
            return value
        # What was made of it where autograd was off has no gradient.
        held = [each for each in held if each[1].requires_grad or not needs_gradient(value)]
        for have, each in held:
            if same(have, placement):
                return each
        full: Any = next((each for have, each in held if have is None), None)
        if full is None and main is not None:
            full = lying_as(whole(value, main, self.ranks), value_of(node))
            self.held[node].append((None, full))
        if placement is None:
            return full
        part = part_of(full, placement, self.ranks)
        self.held[node].append((placement, part))
        return part

    def _for_parts(self, node: Node) -> Any:
        """A whole tensor that each rank uses for its own part. Its gradient is added up once, for all that use it so."""
        full = self._get(node, None)
        if not isinstance(full, torch.Tensor) or not needs_gradient(full):
            return full
        if node not in self.for_parts:
            self.for_parts[node] = used_for_parts(full, self.ranks)
        return self.for_parts[node]

    def _call(self, call: Call, step: Step) -> None:
        node = call.node
        if step.attention is not None and step.attention.exchange in plans.EXCHANGED:
            result = self._attention(call, step, step.attention)
        else:
            result = self._plain(call, step)
        # Elsewhere the order costs a copy that nobody asks for.
        if step.attention is not None and self._is_written(node):
            result = lying_as(result, call.output)
        if step.summed:
            result = summed(result, self.ranks)
            if step.summed == "mean":
                result = result / self.ranks.size
        self._check(node, result, step.output)
        if step.output is not None and isinstance(result, torch.Tensor):
            result = self._apart(call, result)
        self.held[node] = [(step.output, result)]
        self._written_by(node)

    def _written_by(self, node: Node) -> None:
        """What was made of a tensor before a write into it is stale."""
        for target in written_by(node):
            storage = storage_of(value_of(target))
            self.writes[storage] += 1
            for other, held in self.held.items():
                if storage is not None and storage_of(value_of(other)) == storage:
                    del held[1:]
                    self.for_parts.pop(other, None)

    def _apart(self, call: Call, result: torch.Tensor) -> torch.Tensor:
        """A copy of a rank's result, where the call copies in the whole graph and not on a rank, whose parts lie otherwise
        (`contiguous`): a write into one would be seen in the other."""
        storage = storage_of(value_of(call.node))
        for each in call.tensors:
            of_input = storage_of(value_of(each))
            if not {storage, of_input} & self.written:
                continue
            shown = {storage_of(value) for _, value in self.held[each]}
            if storage_of(result) in shown and storage != of_input:
                return result.clone()
            if storage_of(result) not in shown and storage == of_input:
                raise NotSharedError(
                    f"{call.name} is a view of a tensor that is written in place, and a copy on a rank"
                )
        return result

    def _plain(self, call: Call, step: Step) -> Any:
        """The same call, on what the rank has."""
        node, places = call.node, iter(step.inputs)
        target: Any = node.target

        def local(each: Node) -> Any:
            if not isinstance(value_of(each), torch.Tensor):
                return self._get(each, None)
            return self._get(each, next(places), step.differs)

        # In the order of the schema, which is that of `Call.tensors`.
        arguments = {name: map_arg(given, local) for name, given in call.arguments.items()}
        arguments |= step.changed
        if (
            isinstance(step.output, Shard)
            and (call.name in VIEWS or call.name == "expand")
            and "dtype" not in arguments
        ):
            return self._view(call, step, next(iter(arguments.values())))
        args, kwargs = as_given(node, arguments)
        return self.emitter.replay(node, target, args, kwargs)

    def _view(self, call: Call, step: Step, tensor: torch.Tensor) -> Any:
        """A view to the shape of the rank's part."""
        shape = list(call.output_shape)
        shape[step.output.dim] = step.output.local(self.ranks.size)
        if call.name == "expand":
            return self.emitter.replay(call.node, torch.ops.aten.expand.default, (tensor, shape), {})
        storage = storage_of(value_of(call.node))
        aliased = storage in self.written and any(storage_of(value_of(each)) == storage for each in call.tensors)
        target = torch.ops.aten.view.default if aliased else torch.ops.aten.reshape.default
        return self.emitter.replay(call.node, target, (tensor, shape), {})

    def _attention(self, call: Call, step: Step, how: Attention) -> torch.Tensor:
        query, key, value, *masks = [
            self._get(node, placement, step.differs) for node, placement in zip(call.tensors, step.inputs, strict=True)
        ]
        return self.attentions.write(call, how, query, key, value, masks[0] if masks else None)

    def _is_written(self, node: Node) -> bool:
        """Whether a tensor, or one that may be made of it without a copy, is written in place."""
        waiting, seen = [node], {node}
        while waiting:
            now = waiting.pop()
            if storage_of(value_of(now)) in self.written:
                return True
            views = [user for user in now.users if name_of(user) in (*VIEWS, *MOVES) and user not in seen]
            seen.update(views)
            waiting += views
        return False

    def _check(self, node: Node, result: Any, placement: Any) -> None:
        """Compares what a rank gets with what the analysis says that it gets."""
        expected = value_of(node)
        if not isinstance(expected, torch.Tensor):
            places = placement if isinstance(placement, tuple) else (placement,) * len(expected)
            for one, other, place in zip(result, expected, places, strict=True):
                self._same(node, one, other, place)
        else:
            self._same(node, result, expected, placement)

    def _same(self, node: Node, result: torch.Tensor, expected: torch.Tensor, placement: Placement) -> None:
        shape: list[Size] = list(expected.shape)
        if placement is not None:
            shape[placement.dim] = placement.local(self.ranks.size)
        equal = len(shape) == result.dim() and all(
            always(one == other) for one, other in zip(result.shape, shape, strict=True)
        )
        if not equal or result.dtype != expected.dtype:
            raise RuntimeError(
                f"attnrewrite expected {tuple(shape)} of {expected.dtype} of {node.format_node()} on a rank, and got "
                f"{tuple(result.shape)} of {result.dtype}; please report this graph"
            )
