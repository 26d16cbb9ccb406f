"""Runs the graphs of all ranks side by side in one process: the exchanges copy between them. No process group is needed."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.graphs.emitting import same_autocast
from attnrewrite.graphs.nodes import SDPA_TARGETS
from attnrewrite.graphs.trees import leaves
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


def all_to_all_single(parts, received, sent):
    """received, sent: those of each rank."""
    assert [list(each) for each in zip(*sent, strict=True)] == received
    split = [part.split(sizes) for part, sizes in zip(parts, sent, strict=True)]
    return [torch.cat([part[rank] for part in split]) for rank in range(len(parts))]


def reduce_scatter_tensor(parts, how, size, group):
    assert how == "sum"
    return list(sum(parts).chunk(size))


def all_reduce_coalesced(parts, how, group):
    assert how == "sum"
    return [[sum(each) for each in zip(*parts, strict=True)]] * len(parts)


EXCHANGES = {
    collectives.all_reduce_coalesced.default: all_reduce_coalesced,
    collectives.all_gather_into_tensor.default: all_gather_into_tensor,
    collectives.reduce_scatter_tensor.default: reduce_scatter_tensor,
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
            rank.autocast = torch.is_autocast_enabled("cpu")
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
        """Each rank has its own state of autocast, as in a process of its own: a region may hold an exchange."""
        with same_autocast():
            torch.set_autocast_enabled("cpu", rank.autocast)
            for node in nodes:
                if node.target in EXCHANGES or node.op == "output":
                    rank.autocast = torch.is_autocast_enabled("cpu")
                    return node
                rank.env[node] = rank.run_node(node)

    def _exchange(self, nodes):
        (target,) = {node.target for node in nodes}
        self.counts[target._opname] = self.counts.get(target._opname, 0) + 1
        given = [rank.fetch_args_kwargs_from_env(node)[0] for rank, node in zip(self.ranks, nodes, strict=True)]
        assert len({str([each.shape for each in leaves(args[0])]) for args in given}) == 1
        parts = [args[0] for args in given]
        if target is collectives.all_to_all_single.default:  # in a ring, each rank gives to another one
            assert len({args[3] for args in given}) == 1
            results = all_to_all_single(parts, [args[1] for args in given], [args[2] for args in given])
        else:
            assert all(args[1:] == given[0][1:] for args in given), f"unlike: {[args[1:] for args in given]}"
            results = EXCHANGES[target](parts, *given[0][1:])
        for rank, node, result in zip(self.ranks, nodes, results, strict=True):
            rank.env[node] = result


class Shared:
    """A torch.compile backend that shares each graph among `size` ranks, and runs all of them."""

    def __init__(self, size, kind="auto"):
        self.size = size
        self.kind = kind
        self.plans = []
        self.runs = []
        self.backwards = []

    def __call__(self, module, inputs):
        shared = planned(module, self.size, self.kind)
        self.plans.append(shared.plan)
        if shared.graph is None:
            return module.forward
        graphs = [shared.part(Ranks(self.size, rank, "group")) for rank in range(self.size)]
        modules = [GraphModule(shared.graph, graph) for graph in graphs]
        fakes = [node.meta["example_value"] for node in modules[0].graph.find_nodes(op="placeholder")]
        if not torch.is_grad_enabled() or not any(
            isinstance(fake, torch.Tensor) and fake.requires_grad for fake in fakes
        ):
            self.runs.append(Lockstep(modules))
            return self.runs[-1]
        self.runs.append(Lockstep([traced_forward(module, fakes) for module in modules]))
        self.backwards.append(Lockstep([traced_backward(module, fakes) for module in modules]))
        return with_backward(self.runs[-1], self.backwards[-1])

    @property
    def counts(self):
        """The exchanges of all forwards."""
        return self._counts(self.runs)

    @property
    def backward_counts(self):
        """The exchanges of all backwards, without those of the forward that each of them runs anew."""
        forward, both = self.counts, self._counts(self.backwards)
        return {name: left for name, number in both.items() if (left := number - forward.get(name, 0))}

    def _counts(self, runs):
        total = {}
        for run in runs:
            for name, number in run.counts.items():
                total[name] = total.get(name, 0) + number
        total.pop("wait_tensor", None)
        return total


def traced_forward(module, fakes):
    """The forward of a rank's graph, as the operators below autograd."""
    with fakes_mode(fakes), torch.no_grad():
        return make_fx(lambda *given: list(leaves(module(*given))), _allow_non_fake_inputs=True)(*fresh(fakes))


def traced_backward(module, fakes):
    """A graph of the inputs and of the outputs' gradients: the gradients of the inputs that need one, each a tensor."""

    def both(inputs, gradients):
        outputs = leaves(module(*inputs))
        pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
        wanted = [each for each in inputs if isinstance(each, torch.Tensor) and each.requires_grad]
        found = torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        return [torch.zeros_like(each) if grad is None else grad for each, grad in zip(wanted, found, strict=True)]

    with fakes_mode(fakes):
        inputs = fresh(fakes)
        with torch.no_grad():
            gradients = [torch.ones_like(each) for each in leaves(module(*inputs))]
        result = make_fx(both, _allow_non_fake_inputs=True)(inputs, gradients)
    return flat(result)


def fakes_mode(fakes):
    return next(fake.fake_mode for fake in fakes if isinstance(fake, torch.Tensor))


def fresh(fakes):
    return [
        fake.detach().requires_grad_(fake.requires_grad) if isinstance(fake, torch.Tensor) else fake for fake in fakes
    ]


def flat(module):
    """The same graph with the code of plain arguments."""
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.recompile()
    return module


def with_backward(forward, backward):
    class Together(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.inputs = inputs
            with torch.no_grad():
                return tuple(forward(*inputs))

        @staticmethod
        def backward(ctx, *gradients):
            with torch.no_grad():
                found = iter(backward(*ctx.inputs, *gradients))
            return tuple(
                next(found) if isinstance(each, torch.Tensor) and each.requires_grad else None for each in ctx.inputs
            )

    return Together.apply


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
