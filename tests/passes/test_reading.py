"""The expressions read from a graph equal the elements of its tensors. Tested on random chains of functions."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Interpreter

from attnrewrite.graphs.nodes import value_of
from attnrewrite.masks.indices import Place, Quotient, axis, index_of
from attnrewrite.masks.reading import Reader

# -- one step after another, chosen by the shape and dtype at hand


def views(x, choose):
    dim = choose(range(x.dim()))
    size = x.shape[dim]
    low = choose(range(size))
    steps = [
        lambda x: x[(slice(None),) * dim + (slice(low, None),)],
        lambda x: x[(slice(None),) * dim + (slice(low, size, 2),)],
        lambda x: x.narrow(dim, low, size - low),
        lambda x: x.transpose(dim, 0),
        lambda x: x.permute(*reversed(range(x.dim()))),
        lambda x: x.flip(dim),
        lambda x: x.repeat(*(2 if place == dim else 1 for place in range(x.dim()))),
        lambda x: x.repeat_interleave(2, dim=dim),
        lambda x: torch.cat([x, torch.ones_like(x), x[(slice(None),) * dim + (slice(1),)]], dim=dim),
        lambda x: torch.cat([x.new_zeros(x.shape), x], dim=dim),
        lambda x: F.pad(x, (1, 2), value=True),
        lambda x: F.pad(x, (0, 1, 2, 0) if x.dim() > 1 else (0, 1)),
        lambda x: x.reshape(-1),
        lambda x: x.flatten(0, 1) if x.dim() > 1 else x,
        lambda x: x.clone(),
        lambda x: x[..., torch.arange(x.shape[-1])] if x.dim() == 1 else x,
    ]
    if x.dim() < 4:
        steps += [
            lambda x: x.unsqueeze(dim), lambda x: x[None], lambda x: x[..., None, :],
            lambda x: x.expand(3, *x.shape), lambda x: x.unflatten(dim, (1, size)),
        ]  # fmt: skip
        for factor in (2, 3):
            if x.numel() % factor == 0:
                steps.append(lambda x, factor=factor: x.reshape(-1, factor))
    if x.dim() > 1:
        steps += [
            lambda x: x.select(dim, low),
            lambda x: x[(slice(None),) * dim + (low - size,)],
            lambda x: x.squeeze(dim),
        ]
    return choose(steps)


def positions(x, dim):
    return torch.arange(x.shape[dim]).view(*(-1 if place == dim else 1 for place in range(x.dim())))


def boolean(x, choose):
    dim, other, number = choose(range(x.dim())), choose(range(x.dim())), choose(range(-2, 4))
    compare = choose([torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne])
    steps = [
        lambda x: ~x,
        lambda x: x.logical_not(),
        lambda x: x & compare(positions(x, dim), number),
        lambda x: x | compare(positions(x, dim), positions(x, other) + number),
        lambda x: x & compare((positions(x, dim) - positions(x, other)).abs(), number),
        lambda x: x & compare(positions(x, dim) // 2, positions(x, other) // 3),
        lambda x: compare(x.int(), 0.5),
        lambda x: compare(1 - x.float(), number),
        lambda x: (x.int() * 3 - 1).bool(),
        lambda x: torch.where(x, compare(positions(x, dim), number), ~x),
        lambda x: x.masked_fill(compare(positions(x, dim), 2 * number), choose_once),
        lambda x: x * compare(positions(x, dim), number),
        lambda x: compare(torch.where(x, -torch.inf, 1.0), number),
        lambda x: torch.logical_and(x.float(), positions(x, dim)),
    ]
    choose_once = choose([True, False])
    if x.dim() > 1:
        steps += [lambda x: x.tril(number), lambda x: torch.triu(x, diagonal=number)]
    return choose(steps)


def in_place(x, choose):
    dim = choose(range(x.dim()))
    low, number = choose(range(x.shape[dim])), choose([True, False])

    def set_(x, index, value):
        x = x.clone()
        x[index] = value
        return x

    def twice(x):
        x = x.clone()
        x.masked_fill_(positions(x, dim) > low, number)
        y = x.logical_not()
        x &= y if number else x
        return x

    def read_before(x):
        x = x.clone()
        y = x[..., :1]
        z = ~x
        x.logical_not_()
        return (x | y) & z

    def through_a_view(x):
        x = x.clone()
        x[..., :1].fill_(number)
        return x

    return choose([
        lambda x: set_(x, (slice(None),) * dim + (slice(low, None),), number),
        lambda x: set_(x, (slice(None),) * dim + (low,), number),
        lambda x: set_(x, (..., slice(None, -1)), x[..., 1:]),
        twice, read_before, through_a_view,
    ])  # fmt: skip


def _negated(x):
    return x.logical_not_()


def _filled_and_replaced(x):
    x.fill_(True)
    return torch.zeros_like(x)


# Functions that stay one node of a graph: it does not say what they read, write and return.
OPAQUE = [
    torch.compiler.allow_in_graph(function)
    for function in (
        lambda x: x.transpose(0, -1), lambda x: x.unsqueeze(0), lambda x: x[0] if x.dim() > 1 else x, lambda x: x.reshape(-1),
        lambda x: x.flip(-1), lambda x: x, _negated, _filled_and_replaced,
    )
]  # fmt: skip
OPAQUE += [torch._dynamo.nonstrict_trace(_negated), torch._dynamo.nonstrict_trace(lambda x: x.transpose(0, -1))]


def opaque(x, choose):
    function, other = choose(OPAQUE), choose(OPAQUE)

    def written_before(x):
        x = x.clone()
        x[..., :1] = True
        return function(x)

    def written_after(x):
        y = function(x.clone())
        y[..., :1].fill_(False)
        return y.logical_not_()

    def read_beside(x):
        x = x.clone()
        before, y = x.clone(), function(x)
        return y | x[..., :1].any() & before.any()

    return choose([
        written_before, written_after, read_beside, lambda x: function(x.clone()), lambda x: other(function(x.clone())),
    ])  # fmt: skip


def program(seed, kinds=(views, views, boolean, boolean, in_place)):
    """A function of a boolean tensor."""
    choose = random.Random(seed).choice
    x = torch.rand(2, 3, 5) > 0.5
    steps = []
    for _ in range(7):
        step = choose(kinds)(x, choose)
        new = step(x)
        if 0 < new.numel() <= 200 and new.dim() <= 4:
            x, _ = new, steps.append(step)

    def function(x):
        for step in steps:
            x = step(x)
        return x

    return function


# -- the value of an expression where its axes stand


def number_of(index, places):
    total = 0
    for product, factor in index.terms.items():
        for atom in product:
            if isinstance(atom, Place):
                factor *= places[atom.dim]
            elif isinstance(atom, Quotient):
                factor *= number_of(atom.above, places) // number_of(atom.below, places)
            else:
                factor *= int(atom.size)
        total += factor
    return total


def evaluated(value, places, held):
    def part(which):
        return evaluated(value.parts[which], places, held)

    if value.kind == "constant":
        return value.number
    if value.kind in ("index", "absolute", "at_least_zero", "zero"):
        number = number_of(value.parts[0], places)
        return {"index": number, "absolute": abs(number), "at_least_zero": number >= 0, "zero": number == 0}[value.kind]
    if value.kind == "read":
        node, indices = value.parts
        at = tuple(number_of(index, places) for index in indices)
        inside = all(0 <= place < size for place, size in zip(at, held[node].shape, strict=True))
        return held[node][at].item() if inside else held[None]
    if value.kind == "cast":
        return torch.tensor(part(0)).to(value.parts[1]).item()
    if value.kind == "select":
        return part(1) if part(0) else part(2)
    if value.kind == "compare":
        return {"lt": float.__lt__, "le": float.__le__, "eq": float.__eq__}[value.parts[0]](
            float(part(1)), float(part(2))
        )
    if value.kind == "not":
        return not part(0)
    assert value.kind == "and"
    return all(part(which) for which in range(len(value.parts)))


class Holding(Interpreter):
    """Runs a graph and keeps the value of each node, as it is at the end of the run."""

    def __init__(self, module):
        super().__init__(module)
        self.held = {}

    def run_node(self, n):
        self.held[n] = super().run_node(n)
        return self.held[n]


def check(function, *inputs):
    """Compares each element of a function's output with the expression read from its graph. Returns the expression."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    expected = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    if not graphs:
        return None
    output = graphs[0].graph.output_node()
    (node,) = output.args[0]
    holding = Holding(graphs[0])
    holding.run(*inputs)
    value_shape = value_of(node).shape
    indices = tuple(axis(dim - len(value_shape), index_of(size)) for dim, size in enumerate(value_shape))
    value = Reader(graphs[0]).element(node, indices, output)
    for places in itertools.product(*map(range, expected.shape)):
        named = {dim - len(places): place for dim, place in enumerate(places)}
        for anything in (False, True):  # the value outside of a tensor must not matter
            found = evaluated(value, named, {**holding.held, None: anything})
            assert found == expected[places].item(), (places, value)
    return value


@pytest.mark.parametrize("seed", range(100))
def test_programs(seed):
    x = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(seed)) > 0.5
    check(program(seed), x)


@pytest.mark.parametrize("seed", range(40))
def test_programs_with_opaque_functions(seed):
    """What a function may do that the graph says nothing of: it writes into its argument, returns a view of it, or both."""
    x = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(seed)) > 0.5
    check(program(seed, (views, boolean, in_place, opaque, opaque)), x)


DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
          torch.float64)  # fmt: skip
LIMITS = (0, 1, 127, 255, 256, 2048, 1 << 15, 1 << 24, 1 << 31, 1 << 53)
COMPARE = (torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne)


def of_positions(seed):
    """A comparison of positions near the largest integer that some dtype holds, in some dtype."""
    choose = random.Random(seed).choice
    kinds, near = (choose(DTYPES), choose(DTYPES)), choose(LIMITS)
    far, back, moved = near + choose(range(-5, 5)), choose((0, near)), choose((0, 2.5, near, -1))
    compare = choose(COMPARE)

    def cast(x):
        return (torch.arange(x.shape[1]) + far).to(kinds[0])

    def made(x):
        return torch.arange(far, far + x.shape[1], dtype=kinds[0])

    def sum_(x):
        return torch.arange(x.shape[1]).to(kinds[0]) + far

    def product(x):
        return torch.arange(x.shape[1], dtype=kinds[0]) * choice_

    def distance(x):
        return (torch.arange(x.shape[1]).to(kinds[0]) - far).abs()

    def filled(x):
        return torch.full((5,), far, dtype=torch.int64).to(kinds[0]) + torch.arange(5, dtype=kinds[0])

    choice_ = choose((2, 3, 64, near))
    left, right = choose((cast, made, sum_, product, distance, filled)), choose((cast, made, sum_))

    def function(x):
        columns = choose_right(x)
        return compare((left(x) - back)[:, None], columns[None])

    choose_right = choose([
        lambda x: right(x) - back, lambda x: torch.arange(x.shape[1]).to(kinds[1]),
        lambda x: (torch.arange(x.shape[1]) + far - back).to(kinds[1]),
        lambda x: torch.full((1,), 1, dtype=kinds[1]) * moved,
    ])  # fmt: skip
    return function


def nodes_of(value):
    found, waiting = set(), [value]
    while waiting:
        each = waiting.pop()
        found |= {each.parts[0]} if each.kind == "read" else set()
        waiting += [part for part in each.parts if hasattr(part, "kind")]
    return found


def test_positions_are_exact_only_up_to_a_bound():
    """float32 rounds from 2**24 on, float16 from 2048, bfloat16 from 256, and integers wrap around."""
    read, proven, seed = 0, 0, 0
    while read + proven < 40:
        function, seed = of_positions(seed), seed + 1
        torch.compiler.reset()
        try:
            function(torch.ones(5, 5))
        except RuntimeError:  # a number that the dtype cannot hold, where PyTorch says so
            continue
        value = check(function, torch.ones(5, 5))
        if value is not None:
            read, proven = read + bool(nodes_of(value)), proven + (not nodes_of(value))
    assert min(read, proven) > 8  # many are proven, many are not


def test_views_are_read_through():
    """The expression of these views reads the input directly, so the programs above do test the reading of views."""

    def function(x):
        x = torch.cat([x, torch.ones_like(x)], dim=1).transpose(0, 2)[1:, :, None].repeat(1, 2, 3, 1)
        return F.pad(x.flatten(0, 1).repeat_interleave(2, dim=0), (0, 1), value=True).view(8, -1, 3, 3)[:, ::2]

    value = check(function, torch.rand(2, 3, 5) > 0.5)
    assert {node.op for node in nodes_of(value)} == {"placeholder"}


def test_an_input_that_is_expanded_is_the_same_along_it():
    x = (torch.rand(3, 1, 1, 5) > 0.5).expand(3, 2, 4, 5)
    value = check(lambda x: x.clone() & True, x)
    assert value.axes == {-4, -1}
