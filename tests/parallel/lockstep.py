"""Runs the graphs of all ranks side by side in one process: the exchanges copy between them. No process group is needed."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.graphs.nodes import SDPA_TARGETS
from attnrewrite.parallel.analysis import analyse
from attnrewrite.parallel.layouts import Ranks
from attnrewrite.parallel.rewriting import part_of_graph
from attnrewrite.parallel.sharing import planned

collectives = torch.ops._c10d_functional


def all_gather_into_tensor(parts, size, group):
    return [torch.cat(parts)] * size


def all_reduce(parts, how, group):
    assert how == "sum"
    return [sum(parts)] * len(parts)


def all_to_all_single(parts, received, sent, group):
    assert received == sent == [sent[0]] * len(parts)
    split = [part.split(sent) for part in parts]
    return [torch.cat([part[rank] for part in split]) for rank in range(len(parts))]


EXCHANGES = {
    collectives.all_gather_into_tensor.default: all_gather_into_tensor,
    collectives.all_reduce.default: all_reduce,
    collectives.all_to_all_single.default: all_to_all_single,
    collectives.wait_tensor.default: lambda parts: parts,
}


class Lockstep:
    """The graphs of all ranks, from exchange to exchange."""

    def __init__(self, modules):
        self.ranks = [Interpreter(module) for module in modules]
        self.counts = {}

    def __call__(self, *inputs):
        todo = []
        for rank in self.ranks:
            rank.env = {}
            rank.args_iter = iter(inputs)
            todo.append(iter(rank.module.graph.nodes))
        while True:
            nodes = [self._until_exchange(rank, nodes) for rank, nodes in zip(self.ranks, todo, strict=True)]
            if nodes[0].op == "output":
                break
            self._exchange(nodes)
        first, *others = [rank.run_node(node) for rank, node in zip(self.ranks, nodes, strict=True)]
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)
        return first

    def _until_exchange(self, rank, nodes):
        for node in nodes:
            if node.target in EXCHANGES or node.op == "output":
                return node
            rank.env[node] = rank.run_node(node)

    def _exchange(self, nodes):
        (target,) = {node.target for node in nodes}
        self.counts[target._opname] = self.counts.get(target._opname, 0) + 1
        given = [rank.fetch_args_kwargs_from_env(node)[0] for rank, node in zip(self.ranks, nodes, strict=True)]
        assert len({args[0].shape for args in given}) == 1
        assert all(args[1:] == given[0][1:] for args in given), f"unlike: {[args[1:] for args in given]}"
        results = EXCHANGES[target]([args[0] for args in given], *given[0][1:])
        for rank, node, result in zip(self.ranks, nodes, results, strict=True):
            rank.env[node] = result


class Shared:
    """A torch.compile backend that shares each graph among `size` ranks, and runs all of them."""

    def __init__(self, size, kind="auto"):
        self.size = size
        self.kind = kind
        self.plans = []
        self.runs = []

    def __call__(self, module, inputs):
        shared = planned(module, self.size, self.kind)
        self.plans.append(shared.plan)
        if shared.graph is None:
            return module.forward
        graphs = [shared.part(Ranks(self.size, rank, "group")) for rank in range(self.size)]
        self.runs.append(Lockstep([GraphModule(shared.graph, graph) for graph in graphs]))
        return self.runs[-1]

    @property
    def counts(self):
        total = {}
        for run in self.runs:
            for name, number in run.counts.items():
                total[name] = total.get(name, 0) + number
        total.pop("wait_tensor", None)
        return total


def traced(function, inputs):
    """A function of tensors as a graph of aten operators."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(each) for each in inputs]
    with mode, torch.no_grad():
        module = make_fx(lambda *given: function(*given), pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node, new in zip(module.graph.nodes, graph.nodes, strict=True):
        constant = getattr(module, node.target) if node.op == "get_attr" else None
        new.meta["example_value"] = node.meta.get("val") if constant is None else mode.from_tensor(constant)
    return GraphModule(module, graph)


def run(function, inputs, size, kind="auto", dims=None):
    """The result of all ranks together, the plan, and the number of each exchange. dims: the dimension along which each input
    is to be shared, as {0: 1}; None: as self attention wants it."""
    module = traced(function, inputs)
    places = module.graph.find_nodes(op="placeholder")
    wanted = None if dims is None else {places[position]: dim for position, dim in dims.items()}
    names = {node: "attention" for node in module.graph.nodes if node.target in SDPA_TARGETS}
    analysis = analyse(module, names, size, kind, wanted)
    ranks = [GraphModule(module, part_of_graph(module, analysis, Ranks(size, rank, "group"))) for rank in range(size)]
    together = Lockstep(ranks)
    with torch.no_grad():
        result = together(*inputs)
    together.counts.pop("wait_tensor", None)
    return result, analysis.plan, together.counts
