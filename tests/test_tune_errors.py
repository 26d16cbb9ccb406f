"""`attnrewrite.tune` with kernels whose error depends on values: measured at each site, kept apart in the plan and where the
plan is used."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import attend, qkv, relative
from test_tune import CPU, Block, by_name, kernel, real, tuned

import attnrewrite
from attnrewrite import Numerics, Plan, make_policy
from attnrewrite.entrances.choices import candidates_of
from attnrewrite.measuring.capturing import capture
from attnrewrite.measuring.reference import reference
from attnrewrite.measuring.site_graphs import inputs_for, plan_site, site_graph
from attnrewrite.measuring.timing import Stopwatch
from attnrewrite.planning.matching import find

TOKENS = 384


def steady(monkeypatch):
    """Each kernel takes a tenth of `native`'s time, whatever else runs on this machine. `native` is sampled first."""

    def sample(self, call, calls):
        first = self.__dict__.setdefault("first", call)
        return 1e-3 if call is first else 1e-4

    monkeypatch.setattr(Stopwatch, "sample", sample)


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    steady(monkeypatch)


def test_a_sparse_kernel_far_ahead_drops_no_other(monkeypatch):
    """Where it is too inexact, or not allowed, the fastest of the others counts: they are timed in rounds and not once."""
    times = {"native": 1.0, "quick": 0.5, "slow": 3.5, "coarse": 0.3, "mean": 0.02, "late": 0.07}
    order = []

    def sample(self, call, calls):
        if call not in order:
            order.append(call)
        return 1e-3 * list(times.values())[order.index(call)]

    monkeypatch.setattr(Stopwatch, "sample", sample)
    classes = {"quick": "REORDERED", "slow": "REORDERED", "coarse": "QUANTISED", "mean": "SPARSE", "late": "SPARSE"}
    op = real("far_ahead", mean)
    candidates = [kernel(name, op, numerics=Numerics[word]) for name, word in classes.items()]
    same = qkv(q_len=TOKENS, kv_len=TOKENS)[0].mean(2, keepdim=True).expand(-1, -1, TOKENS, -1).contiguous()
    plan = tuned(attend, same, same, same, candidates=candidates, numerics="sparse")
    found = by_name(plan.sites[0])
    assert plan.sites[0].chosen == "mean"
    assert {name for name, each in found.items() if each.dropped} == {"slow"}
    assert "7.0 times as slow as the fastest: measured once" in found["slow"].dropped
    assert {found[name].rounds for name in ("quick", "coarse", "mean", "late")} == {found["native"].rounds} != {1}


def mean(query, key, value):
    """Right where all keys count alike, as sparse attention is right for data with structure; faster than any attention."""
    return value.mean(2, keepdim=True).expand_as(query).contiguous()


MEAN = kernel("mean", real("mean", mean), numerics=Numerics.QUANTISED)


class Uneven(torch.nn.Module):
    """Equal blocks of self-attention on (batch, tokens, 48). In those of `alike` every key counts the same."""

    _repeated_blocks = ("Block",)

    def __init__(self, count, alike):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(count))
        for number, block in enumerate(self.blocks):
            with torch.no_grad():
                block.qkv.weight[:48] *= 0 if number in alike else 9
                block.qkv.bias[:48] = 0

    def forward(self, tokens):
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


@pytest.fixture
def tokens():
    return torch.randn(2, TOKENS, 48, generator=torch.Generator().manual_seed(1))


def errors_of(model, function, *given):
    """By the site's name: the error of `function` on what each attention of a model gets."""
    found = {}

    def receive(captured):
        tensors = captured.query, captured.key, captured.value
        exact = reference(captured.call, *tensors, captured.mask)
        output = function(*tensors)
        apart = relative(output, captured.output) - exact.error(captured.output)
        found.setdefault(captured.call.site, []).append(max(exact.error(output), apart))

    with torch.no_grad():
        capture(model, given, {}, receive, make_policy(["native"]))
    return found


def test_the_error_is_each_sites_own_and_the_time_is_shared(tokens):
    compiled = []

    def inner(module, inputs):
        compiled.append(module)
        return module.forward

    model = Uneven(4, {0, 2}).eval()
    plan = tuned(model, tokens, candidates=[MEAN], numerics="quantised", max_error=1e-2, inner=inner)
    assert len(compiled) == 2, "two kernels, whatever the number of sites"
    assert [site.chosen for site in plan.sites] == ["mean", "native", "mean", "native"]
    wanted = errors_of(model, mean, tokens)
    for site in plan.sites:
        assert by_name(site)["mean"].error == pytest.approx(wanted[site.name][0], rel=1e-3, abs=1e-6), site.name
    assert by_name(plan.sites[1])["mean"].error > 0.1
    assert "above 1.0e-02, max_error" in by_name(plan.sites[1])["mean"].dropped
    assert len({by_name(site)["mean"].milliseconds for site in plan.sites}) == 1
    assert Plan.from_json(plan.to_json()).described().sites == plan.described().sites


def test_a_sparser_variant_that_is_wrong_at_a_site_leaves_it_to_the_next(tokens, monkeypatch):
    """Whatever their times: "careful" takes five times as long as "mean", and half as long as `native`."""
    order, times = [], [1e-3, 1e-4, 5e-4]

    def sample(self, call, calls):
        if call not in order:
            order.append(call)
        return times[order.index(call)]

    monkeypatch.setattr(Stopwatch, "sample", sample)
    careful = kernel("careful", real("careful", F.scaled_dot_product_attention), numerics=Numerics.SPARSE)
    model = Uneven(3, {0, 2}).eval()
    plan = tuned(model, tokens, candidates=[MEAN, careful], numerics="sparse", max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["mean", "careful", "mean"]


def test_a_kernel_that_is_wrong_at_the_first_site_serves_the_next(tokens):
    plan = tuned(Uneven(2, {1}).eval(), tokens, candidates=[MEAN], numerics="quantised", max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["native", "mean"]


def test_where_the_plan_is_used_each_site_gets_its_own_kernel(tokens):
    model = Uneven(4, {0, 2}).eval()
    plan = tuned(model, tokens, candidates=[MEAN], numerics="quantised", max_error=1e-2)
    chosen = [(f"blocks.{number}", name) for number, name in enumerate(["mean", "native", "mean", "native"])]
    with torch.no_grad():
        exact = Uneven(4, {0, 2}).double()(tokens.double())
        backend = attnrewrite.with_backend(plan, inner="eager", numerics="quantised")
        output = torch.compile(model, backend=backend, fullgraph=True)(tokens)
        assert relative(output, exact) < 1e-5
        assert [(site.name, site.chosen) for site in backend.report.sites] == chosen

        # Blocks that share code share kernels: two compilations, of blocks 0 and 2, and of 1 and 3.
        pipeline = type("Pipeline", (), {"components": {"transformer": model}})()
        backend = attnrewrite.set_attention_backend(pipeline, plan, inner="eager", numerics="quantised")
        assert relative(model(tokens), exact) < 1e-5
        attnrewrite.reset_attention_backend(pipeline)
        assert [(graph.sharing, graph.plan.sites[0].chosen) for graph in backend.report.graphs] == [
            (("transformer.blocks.0", "transformer.blocks.2"), "mean"),
            (("transformer.blocks.1", "transformer.blocks.3"), "native"),
        ]

        # Where a block does not know its name it takes what is right for all of them.
        backend = attnrewrite.with_backend(plan, inner="eager", numerics="quantised")
        torch.compile(model.blocks[0], backend=backend)(tokens)
        assert backend.report.sites[0].chosen == "native"

        # A context has the plan, and the code is shared by blocks to which the plan gives different kernels.
        backend = attnrewrite.set_attention_backend(model, "native", inner="eager", numerics="quantised")
        with attnrewrite.attention_backend(plan):
            assert relative(model(tokens), exact) < 1e-5
        attnrewrite.reset_attention_backend(model)


def test_blocks_behind_a_graph_break_get_their_own_kernels(tokens):
    model = Uneven(3, {0, 2}).eval()
    plan = tuned(model, tokens, candidates=[MEAN], numerics="quantised", max_error=1e-2)
    for block in model.blocks:
        block.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
    backend = attnrewrite.with_backend(plan, inner="eager", numerics="quantised")
    with torch.no_grad():
        output = torch.compile(model, backend=backend)(tokens)
        assert relative(output, Uneven(3, {0, 2}).double()(tokens.double())) < 1e-5


def test_names_decide_only_among_alike_sites():
    plan = tuned(Uneven(2, {0}).eval(), torch.randn(2, TOKENS, 48), candidates=[MEAN], numerics="quantised")
    call = plan.sites[0].call

    def chosen(name, *names):
        return find(plan.sites, replace(call, site=name), names).chosen

    assert [chosen(name) for name in ("blocks.0", "pipe.blocks.0", "0", "", "other")] == [
        "mean", "mean", "mean", "native", "native",
    ]  # fmt: skip
    assert chosen("blocks.1") == "native"
    assert chosen("blocks.0", "blocks.0", "blocks.1") == "native"
    assert find(plan.sites, replace(call, site="blocks.0", heads=5)) is None
    both = find(plan.sites, replace(call, site=""))
    assert by_name(both)["mean"].error == by_name(plan.sites[1])["mean"].error, "the worst"


class Looped(torch.nn.Module):
    """One attention that runs twice, in code that is compiled once: Dynamo leaves a loop with a break in it alone."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, query, key):
        for _ in range(2):
            query = self.attention(query, key)
            torch._dynamo.graph_break()
        return query


class Attention(torch.nn.Module):
    def forward(self, query, key):
        return F.scaled_dot_product_attention(query, key, key)


def test_a_site_that_runs_again_counts_with_its_worst_error():
    query, key, _ = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
    given = query * 0, key * 9
    plan = tuned(Looped(), *given, candidates=[MEAN], numerics="quantised", max_error=1e-2)
    (site,) = plan.sites
    first, second = errors_of(Looped(), mean, *given)[site.name]
    assert first < 1e-6 < 1e-2 < second
    assert by_name(site)["mean"].error == pytest.approx(second, rel=1e-3)
    assert site.chosen == "native"


class Scaled(torch.nn.Module):
    """Two attentions that differ in their scale."""

    def forward(self, query, key, value):
        first = F.scaled_dot_product_attention(query, key, value, scale=0.5)
        return first, F.scaled_dot_product_attention(query, key, value, scale=2.0)


def test_the_code_for_one_scale_is_not_run_for_another():
    def op(query, key, value, mask, *, call):
        return torch.softmax(query @ key.transpose(-1, -2) * call.scale, -1) @ value

    scaled = replace(kernel("scaled", mean, numerics=Numerics.QUANTISED), op=op)
    plan = tuned(Scaled(), *qkv(kv_len=7), candidates=[scaled], numerics="quantised", max_error=1e-2)
    assert len(plan.sites) == 2
    assert all(by_name(site)["scaled"].error < 1e-6 for site in plan.sites)


class Spoilt(torch.nn.Module):
    """Two attentions with equal calls; the second gets what `spoil` makes of its value."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def forward(self, query, key, value):
        first = F.scaled_dot_product_attention(query, key, value)
        return first, F.scaled_dot_product_attention(query, key, self.spoil(value))


@pytest.mark.parametrize("spoil", [lambda value: value * math.nan, lambda value: value / 0])
def test_where_nothing_is_compared_a_kernel_that_follows_values_stays_out(spoil):
    query, key, value = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
    with pytest.warns(UserWarning, match="compared nothing at .* by its value. No quantised or sparse kernel is used"):
        plan = tuned(Spoilt(spoil), query * 0, key, value, candidates=[MEAN], numerics="quantised", max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["mean", "native"]
    assert math.isnan(by_name(plan.sites[1])["mean"].error)
    assert by_name(plan.sites[1])["mean"].dropped.startswith("nothing was compared: values that are not finite")


def fussy(query, key, value):
    if bool((value > 50).any()):
        raise RuntimeError("value is too large for me")
    return mean(query, key, value)


def test_a_kernel_that_raises_at_a_later_site_is_dropped_there():
    query, key, value = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
    candidate = kernel("fussy", real("fussy", fussy), numerics=Numerics.QUANTISED)
    model = Spoilt(lambda value: value * 100)
    plan = tuned(model, query * 0, key, value, candidates=[candidate], numerics="quantised", max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["fussy", "native"]
    assert by_name(plan.sites[1])["fussy"].dropped == "RuntimeError: value is too large for me"


# -- code that was compiled for one attention, run for another


def parts(memory, first):
    """(1, 4, 9, 16) from the middle of memory."""
    return memory[first : first + 1]


def masks(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3


PAIRS = {
    "the same place": (lambda: qkv(1, 4), lambda: qkv(1, 4), True),
    "another place": (
        lambda: [parts(torch.randn(3, 4, 9, 16), 1) for _ in range(3)],
        lambda: [parts(torch.randn(7, 4, 9, 16), 4) for _ in range(3)],
        True,
    ),
    "another order of its memory": (
        lambda: [torch.randn(1, 4, 9, 16) for _ in range(3)],
        lambda: [torch.randn(1, 9, 4, 16).transpose(1, 2) for _ in range(3)],
        True,
    ),
    "one key for all heads, in both": (
        lambda: [torch.randn(1, 4, 9, 16), *(torch.randn(1, 1, 9, 16).expand(1, 4, 9, 16) for _ in range(2))],
        lambda: [torch.randn(1, 4, 9, 16), *(torch.randn(2, 1, 9, 16)[1:].expand(1, 4, 9, 16) for _ in range(2))],
        True,
    ),
    "one key for all heads, in the first": (
        lambda: [torch.randn(1, 4, 9, 16), *(torch.randn(1, 1, 9, 16).expand(1, 4, 9, 16) for _ in range(2))],
        lambda: [torch.randn(1, 4, 9, 16) for _ in range(3)],
        False,
    ),
    "a mask in another order": (
        lambda: [*(torch.randn(1, 4, 9, 16) for _ in range(3)), masks(1, 4, 9, 9)],
        lambda: [*(torch.randn(1, 4, 9, 16) for _ in range(3)), masks(1, 4, 9, 9).transpose(2, 3)],
        True,
    ),
    "a mask of one row, in the first": (
        lambda: [*(torch.randn(1, 4, 9, 16) for _ in range(3)), masks(1, 1, 1, 9).expand(1, 4, 9, 9)],
        lambda: [*(torch.randn(1, 4, 9, 16) for _ in range(3)), masks(1, 4, 9, 9)],
        False,
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_code_runs_for_other_tensors_or_says_that_it_cannot(kind):
    first, second, possible = PAIRS[kind]
    (math_,) = candidates_of("_native_math", "candidates")

    def captured(tensors):
        found = []
        with torch.no_grad():
            capture(lambda *given: attend(*given), tensors, {}, found.append, make_policy(["native"]))
        return found[0]

    one, other = captured(first()), captured(second())
    site = plan_site(one.call, math_, CPU, Numerics.REORDERED)
    graph = site_graph(one, site, math_, CPU)
    inputs = inputs_for(graph.memory, other, replace(site, call=other.call))
    assert (inputs is not None) == possible
    if inputs is not None:
        assert relative(graph.module(*inputs)[0], other.output.transpose(1, 2).flatten(2)) < 1e-6
