"""Exchanges that are under way while Inductor's code computes what comes behind them."""

import random
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.testing._internal.distributed.fake_pg import FakeStore

import attnrewrite
from attnrewrite import ContextParallel, pipeline
from attnrewrite.parallel import exchanges, overlapping
from attnrewrite.parallel.overlapping import overlap


@pytest.fixture
def mesh(monkeypatch):
    """Two ranks, of which one is there. Its exchanges return at once, with numbers of no meaning."""
    monkeypatch.setattr(pipeline, "agree", lambda *_: None)  # there is nobody to agree with
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


PRODUCT, BEGIN, ATTENTION, WAIT = "mm", "all_to_all_single", "_flash_attention_for_cpu", "wait_tensor"


def calls_in(code):
    """The calls of these kinds, in their order."""
    return re.findall(rf"({PRODUCT}|{BEGIN}|{ATTENTION}|{WAIT})(?:\.default)?\(", code)


def test_products_of_query_and_key_run_while_the_value_is_under_way(mesh, monkeypatch):
    monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = calls_in(code_of(mesh))
    assert calls[:10] == [PRODUCT, BEGIN] * 3 + [WAIT] * 3 + [ATTENTION]


def test_a_rotation_that_writes_in_place_runs_while_the_value_is_under_way(mesh, monkeypatch):
    """As diffusers' Wan rotates query and key."""
    monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = calls_in(code_of(mesh, rotated))
    assert calls[:3] == [PRODUCT, BEGIN, PRODUCT]
    assert calls[calls.index(WAIT) :][:4] == [WAIT] * 3 + [ATTENTION]


def rotated(tensor):
    result = torch.empty_like(tensor)
    result[..., 0::2] = -tensor[..., 1::2]
    result[..., 1::2] = tensor[..., 0::2]
    return result


@pytest.mark.parametrize("large", [True, False])
def test_an_mlp_beside_the_attention_runs_while_the_last_exchange_is_under_way(mesh, monkeypatch, large):
    if large:
        monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = calls_in(code_of(mesh, mlp=True))
    first = calls.index(WAIT)
    assert calls[:first] == ([PRODUCT, BEGIN] * 3 if large else [PRODUCT] * 3 + [BEGIN]) + [PRODUCT]


def test_keys_are_under_way_while_a_ring_attends(mesh):
    calls = [call for call in calls_in(code_of(ContextParallel(mesh, "ring"))) if call != PRODUCT]
    assert calls[:4] == [BEGIN, ATTENTION, WAIT, ATTENTION]


def code_of(parallel, turned=None, mlp=False):
    """What Inductor makes of a layer. turned: what is done to query and key besides. mlp: with an MLP beside the attention, of
    which the model's code computes the first half before the query."""
    weights = [torch.randn(16, 16) for _ in range(3)]
    wide = torch.randn(48, 16)

    def attend(tokens):
        hidden = F.gelu(F.linear(tokens, wide)) if mlp else tokens
        query, key, value = (F.linear(tokens, weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in weights)
        query, key = (F.rms_norm(each, (8,)) for each in (query, key))
        if turned:
            query, key = turned(query), turned(key)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.cat([attended, hidden], -1)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=attnrewrite.with_backend("native", context_parallel=parallel))
    with torch.no_grad():
        _, codes = run_and_get_code(compiled, torch.randn(1, 12, 16))
    return codes[0][codes[0].index("def call(") :]


BARRIERS = {
    "nothing": lambda graph, x: None,
    "a write": lambda graph, x: graph.call_method("add_", (x, 1)),
    "an operator that writes": lambda graph, x: graph.call_function(torch.ops.aten.mul_.Tensor, (x, 2)),
    "random numbers": lambda graph, x: graph.call_function(torch.ops.aten.bernoulli.default, (x,)),
    "autocast": lambda graph, x: graph.call_function(
        torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None)
    ),
    "autograd": lambda graph, x: graph.call_function(torch._C._set_grad_enabled, (False,)),
    "an unknown function": lambda graph, x: graph.call_function(calls_in, ("",)),
    "another exchange": lambda graph, x: graph.call_function(
        torch.ops._c10d_functional.wait_tensor.default,
        (graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")),),
    ),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_what_must_keep_its_place_is_not_passed(barrier):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.ops.aten.sin.default, (x,))
    BARRIERS[barrier](graph, x)
    second = graph.call_function(torch.ops.aten.cos.default, (x,))
    sent = graph.call_method("contiguous", (x,))
    begun = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (sent, "sum", "0"))
    wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (begun,))
    graph.output((first, second, wait))
    overlap(graph)
    graph.lint()
    place = {node: number for number, node in enumerate(graph.nodes)}
    assert place[sent] < place[begun] < place[second] < place[wait]
    assert (place[first] > place[begun]) == (barrier == "nothing")


def mixed(seed):
    """A graph of new tensors, views, writes in place and exchanges (here: `neg`) in random order, with fake values; it returns
    all tensors."""
    aten, draw = torch.ops.aten, random.Random(seed)
    graph = torch.fx.Graph()
    shown = [graph.placeholder(name) for name in ("x", "y")]
    for _ in range(40):
        one, other = draw.choice(shown), draw.choice(shown)
        kind = draw.choice(("new", "view", "write", "write a row", "exchange"))
        if kind == "new":
            shown.append(graph.call_function(aten.add.Tensor, (one, other)))
        elif kind == "view":
            shown.append(graph.call_function(aten.t.default, (one,)))
        elif kind == "write":
            graph.call_function(aten.copy_.default, (one, graph.call_function(aten.clone.default, (other,))))
        elif kind == "write a row":
            row = graph.call_function(aten.select.int, (one, 0, 1))
            graph.call_function(aten.mul_.Tensor, (row, draw.choice((-1, 2))))
        else:
            shown.append(graph.call_function(aten.neg.default, (one,)))
    graph.output(tuple(shown))
    module = torch.fx.GraphModule({}, graph)
    FakeTensorProp(module).propagate(*inputs_of_mixed())
    return module


def inputs_of_mixed():
    return torch.arange(9.0, dtype=torch.float64).view(3, 3), torch.ones(3, 3, dtype=torch.float64)


def test_a_graph_that_writes_in_place_computes_the_same_behind_the_moves(monkeypatch):
    monkeypatch.setattr(overlapping, "_begins", lambda node: node.target is torch.ops.aten.neg.default)
    moved = 0
    for seed in range(200):
        module = mixed(seed)
        before, expected = list(module.graph.nodes), module(*inputs_of_mixed())
        overlap(module.graph)
        module.recompile()
        moved += list(module.graph.nodes) != before
        for one, other in zip(module(*inputs_of_mixed()), expected, strict=True):
            assert torch.equal(one, other), f"seed {seed}"
    assert moved > 20


def test_nothing_passes_a_write_into_an_input_which_may_be_another_inputs_memory(monkeypatch):
    monkeypatch.setattr(overlapping, "_begins", lambda node: node.target is torch.ops.aten.neg.default)
    aten, graph = torch.ops.aten, torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    read = graph.call_function(aten.sin.default, (y,))
    graph.call_function(aten.mul_.Tensor, (x, 2))
    graph.output((read, graph.call_function(aten.neg.default, (x,))))
    module = torch.fx.GraphModule({}, graph)
    FakeTensorProp(module).propagate(torch.ones(3), torch.ones(3))
    overlap(graph)
    module.recompile()
    ones = torch.ones(3)
    assert torch.equal(module(ones, ones.view(3))[0], torch.ones(3).sin())
