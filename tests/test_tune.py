"""`attnrewrite.tune`, plans and `with_backend("tune")`: what is measured, what is dropped and why, what a plan does later."""

import functools
import io
import json
import math
import os
import re
import signal
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decision_specs import PACKAGES
from parity import TOLERANCE, attend, doubled, qkv, relative
from torch._subclasses.fake_tensor import FakeTensorMode

import attnrewrite
from attnrewrite import (
    AttentionCall,
    AttentionCompiler,
    Machine,
    Mask,
    MaskKind,
    Measurement,
    Numerics,
    Plan,
    make_policy,
)
from attnrewrite.commands.demo_model import Demo, inputs
from attnrewrite.entrances.choices import candidates_of
from attnrewrite.entrances.identity import identity_of
from attnrewrite.entrances.tuning import read_search, search_model
from attnrewrite.kernels.machines import satisfies
from attnrewrite.measuring import cache
from attnrewrite.measuring.capturing import capture
from attnrewrite.measuring.choosing import choose, undecided
from attnrewrite.measuring.example_tensors import example
from attnrewrite.measuring.first_use import Tune
from attnrewrite.measuring.measure_site import enough_memory, free_memory, measure_alike, measure_site
from attnrewrite.measuring.reference import reference
from attnrewrite.measuring.search import Search
from attnrewrite.measuring.site_graphs import fills_its_memory, plan_site, site_graph
from attnrewrite.measuring.timing import Stopwatch
from attnrewrite.planning.policies import Policy

CPU = attnrewrite.machine_of(torch.device("cpu"))
KERNELS = ("native", "_native_flash", "_native_math", "flex")
(MATH,) = attnrewrite.records_of("_native_math")
FLASH = attnrewrite.records_of("_native_flash")[1]


QUICK = {"rounds": (3, 3), "more": 1}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """One that nobody else has."""
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "cache"))
    cache._KNOWN.clear()
    cache._WARNED.clear()


def kernel(name, function, **changes):
    """A record of the test's own: `function(query, key, value)` on tensors (batch, heads, length, dim)."""

    def op(query, key, value, mask, *, call):
        return function(query, key, value)

    return replace(MATH, name=name, op=op, prepare=None, all_scores=False, masks=frozenset({MaskKind.NONE}), **changes)


LIBRARY = torch.library.Library("attnrewrite_tests", "FRAGMENT")


def real(name, function):
    """An op that does what `function` does when it runs, and is SDPA while a graph is traced."""
    LIBRARY.define(f"{name}(Tensor query, Tensor key, Tensor value) -> Tensor")
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"attnrewrite_tests::{name}", lambda query, key, value: torch.empty_like(query), lib=LIBRARY
    )
    return getattr(torch.ops.attnrewrite_tests, name).default


def sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value).contiguous()


def raising(query, key, value):
    raise RuntimeError("no kernel image is available")


def sleeping(query, key, value):
    time.sleep(3)
    return sdpa(query, key, value)


def interrupted(query, key, value):
    raise KeyboardInterrupt


RAISING, SLEEPING, SLOW, INTERRUPTED = (
    real("raising", raising), real("sleeping", sleeping),
    real("slow", lambda *given: (time.sleep(0.02), sdpa(*given))[1]), real("interrupted", interrupted),
)  # fmt: skip
NOT_FINITE = real("not_finite", lambda *given: sdpa(*given).index_fill(-1, torch.tensor([3]), torch.nan))
SHORT = real("short", lambda *given: sdpa(*given)[:, :, :-1].contiguous())
WRONG = real("wrong", lambda *given: sdpa(*given) * 1.01)


SLOW_BACKWARD = real("slow_backward", lambda *given: sdpa(*(each.detach() for each in given)))
torch.library.register_autograd(
    "attnrewrite_tests::slow_backward", lambda ctx, grad: (time.sleep(0.02), grad, grad, grad)[1:], lib=LIBRARY
)


def tuned(
    function,
    *tensors,
    candidates=("native", "_native_flash"),
    grad=False,
    progress=False,
    measure=measure_alike,
    inner="eager",
    **options,
):
    """`attnrewrite.tune` in few rounds."""
    search = replace(read_search(function, candidates, inner=inner, **options), **QUICK)
    with torch.set_grad_enabled(grad):
        return search_model(function, [(tensors, {})], search, measure, progress)


def by_name(site):
    return {each.name: each for each in site.measured}


# -- what is measured


@pytest.fixture(scope="module")
def demo():
    """The small model that attends in six ways, and its plan."""
    torch.manual_seed(0)
    model, given = Demo().eval(), inputs()
    return model, given, tuned(model, *given, candidates=KERNELS)


def test_every_kernel_is_timed_and_compared_at_every_site(demo):
    _, _, plan = demo
    assert [site.name for site in plan.sites] == ["causal", "prompt", "spelled_out", "joint", "outer", "positions"]
    for site in plan.sites:
        # flex takes no boolean mask on a CPU before 2.13
        fenced = {"flex"} if site.call.mask.is_boolean and not satisfies(torch.__version__, ">=2.13") else set()
        assert set(by_name(site)) | fenced == set(KERNELS), site.name
        for each in site.measured:
            assert each.milliseconds > 0
            assert each.error < 1e-6, f"{site.name}: {each}"
        assert site.chosen in KERNELS
    assert plan.tuning.machines == (CPU,)
    assert plan.tuning.complete


def test_the_model_with_its_plan_is_right(demo):
    model, given, plan = demo
    backend = attnrewrite.with_backend(plan, inner="eager")
    with torch.no_grad():
        output = torch.compile(model, backend=backend, fullgraph=True)(*given)
        reference = Demo().double().eval()
        reference.load_state_dict(model.state_dict())
        assert relative(output, reference(*map(doubled, given))) < TOLERANCE[torch.float32]
    assert [(site.name, site.chosen) for site in backend.report.sites] == [
        (site.name, site.chosen) for site in plan.sites
    ]
    assert "plan: " in str(backend.report)
    assert "plan of Demo: 6 attention sites, 6 of them distinct" in str(plan)


class Layers(torch.nn.Module):
    """Self-attention on (batch, tokens, 48), in blocks that are equal."""

    _repeated_blocks = ("Block",)

    def __init__(self, count):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(count))

    def forward(self, tokens, valid=None):
        mask = None if valid is None else valid[:, None, :, None] & valid[:, None, None, :]
        for block in self.blocks:
            tokens = block(tokens, mask)
        return tokens


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(48, 144)

    def forward(self, tokens, mask=None):
        query, key, value = (each.unflatten(-1, (3, 16)).transpose(1, 2) for each in self.qkv(tokens).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        return tokens + attended.transpose(1, 2).flatten(2)


class Fused(torch.nn.Module):
    """Two attentions with equal calls. Queries, keys and values of the first are parts of one tensor, (batch, tokens, 48)."""

    def forward(self, tokens):
        parts = [each.unflatten(-1, (2, 8)).transpose(1, 2) for each in tokens.chunk(3, -1)]
        apart = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in parts]
        return F.scaled_dot_product_attention(*parts) + F.scaled_dot_product_attention(*apart)


def from_the_start(query, key, value):
    """Attention that is wrong for tensors that do not begin where their memory begins."""
    return sdpa(*(each.as_strided(each.shape, each.stride(), 0) for each in (query, key, value)))


FROM_THE_START = kernel("from_the_start", from_the_start)


def test_operands_lie_as_in_the_model():
    """A kernel that is wrong for a part of a tensor is found out there, and is right for whole tensors."""
    sites = tuned(Fused(), torch.randn(2, 9, 48), candidates=["native", FROM_THE_START]).sites
    fused, apart = (by_name(site)["from_the_start"] for site in sites)
    assert fused.error > 0.1
    assert "its error is above" in fused.dropped
    assert sites[0].chosen == "native"
    assert apart.error < 1e-6


def bare(query, key, value, prepared, *, call):
    """flex on a CPU with computed queries and keys: where they are not stored first, Inductor loses the place of the value."""
    flex = attnrewrite.records_of("flex")[0].op
    return flex(query * 2.0, key * 0.5, value, prepared, call=replace(call, device="cuda"))


BARE_FLEX = replace(attnrewrite.records_of("flex")[1], name="bare_flex", op=bare)


def test_what_only_inductor_gets_wrong_is_found():
    """By `tune`, and by `check` at the site, where the compiled model is wrong."""

    def model(tokens):
        return attend(*(each.unflatten(-1, (2, 8)).transpose(1, 2) for each in tokens.chunk(3, -1)))

    tokens = torch.randn(2, 9, 48)
    with torch.no_grad():
        found = attnrewrite.check(model, tokens, backend=attnrewrite.with_backend(BARE_FLEX))
        if found.output.relative_error < 1e-3:
            pytest.skip("this version of PyTorch is right")
        search = replace(read_search(model, ["native", BARE_FLEX]), **QUICK)
        (site,) = search_model(model, [((tokens,), {})], search).sites
    assert found.first_wrong is found.sites[0]
    assert by_name(site)["bare_flex"].error > 0.1
    assert site.chosen == "native"


def test_the_graph_of_a_site_has_views_of_its_memory():
    """One input for the memory that query, key and value share; strides and places are the model's."""
    (math,), graphs = candidates_of("_native_math", "candidates"), []

    def receive(captured):
        site = plan_site(captured.call, math, CPU, Numerics.REORDERED)
        graphs.append((captured, site_graph(captured, site, math, CPU)))

    tokens = torch.randn(2, 9, 48)
    with torch.no_grad():
        capture(Fused(), (tokens,), {}, receive, make_policy(["native"]))
    captured, graph = graphs[0]
    assert [each.shape for each in graph.inputs] == [(tokens.numel(),)]
    views = [node for node in graph.module.graph.nodes if node.target is torch.as_strided]
    tensors = (captured.query, captured.key, captured.value)
    assert [node.args[1:] for node in views[:3]] == [
        (tuple(each.shape), each.stride(), each.storage_offset()) for each in tensors
    ]
    assert [node.args[3] for node in views[:3]] == [0, 16, 32]
    assert relative(graph.module(*graph.inputs)[0], captured.output.transpose(1, 2).flatten(2)) < 1e-6
    assert [len(graph.inputs) for _, graph in graphs] == [1, 3]  # whole tensors are inputs themselves


@pytest.mark.parametrize(
    ("change", "whole"),
    [
        (lambda tensor: tensor, True),
        (lambda tensor: tensor.transpose(1, 2), True),
        (lambda tensor: tensor[:, 1:2], False),
        (lambda tensor: tensor[:1].expand(4, -1, -1), False),
        (lambda tensor: tensor[:1], False),
        (lambda tensor: torch.randn(1, 3, 4).expand(1, 3, 4), True),
        (lambda tensor: torch.randn(1, 12).expand(2, 12), False),  # as many elements in memory, some of them twice
    ],
)
def test_tensors_that_fill_their_memory(change, whole):
    assert fills_its_memory(change(torch.randn(2, 3, 4))) == whole


def test_example_tensors_of_a_fused_projection():
    """A layout that is none of the usual two stands for parts of one tensor."""
    call = AttentionCall("", 2, 3, 3, 7, 11, 8, 8, "float32", layout="strided")
    captured = example(call, torch.device("cpu"))
    assert [each.storage_offset() for each in (captured.query, captured.key, captured.value)] == [0, 24, 48]
    assert captured.query.stride() == (7 * 72, 8, 72, 1)
    assert not any(fills_its_memory(each) for each in (captured.query, captured.key, captured.value))


def test_equal_sites_are_measured_once():
    counted = []

    def count(captured, *rest):
        counted.append(captured.call.site)
        return measure_alike(captured, *rest)

    plan = tuned(Layers(4).eval(), torch.randn(2, 9, 48), measure=count)
    assert counted == ["blocks.0"]
    assert [site.name for site in plan.sites] == [f"blocks.{number}" for number in range(4)]
    assert len({site.measured for site in plan.sites}) == 1
    assert json.loads(plan.to_json())["sites"][0]["names"] == [site.name for site in plan.sites]


def test_tensors_are_the_sites_own_and_one_site_is_in_memory(demo):
    model, given = Layers(3).eval(), torch.randn(2, 9, 48)
    seen, alive = [], []

    def receive(captured):
        assert not [each for each in alive if each() is not None], "the tensors of an earlier site are kept"
        alive.extend(weakref.ref(each) for each in (captured.query, captured.key, captured.output))
        seen.append((captured.query.clone(), captured.query.stride(), captured.output.clone()))

    with torch.no_grad():
        output = capture(model, (given,), {}, receive, attnrewrite.make_policy(["native"]))
        tokens = given
        for (query, stride, attended), block in zip(seen, model.blocks, strict=True):
            wanted = block.qkv(tokens).chunk(3, dim=-1)[0].unflatten(-1, (3, 16)).transpose(1, 2)
            torch.testing.assert_close(query, wanted)
            assert stride == wanted.stride()  # rows of 144: a copy would have 48
            tokens = tokens + attended.transpose(1, 2).flatten(2)
        torch.testing.assert_close(output, tokens)


def test_a_call_with_a_gradient_is_timed_with_its_backward():
    forward_only = kernel("forward_only", sdpa, backward=False)
    slow_backward = kernel("slow_backward", SLOW_BACKWARD)
    tensors = [each.requires_grad_() for each in qkv(kv_len=7)]
    plan = tuned(attend, *tensors, candidates=[forward_only, slow_backward], grad=True)
    (site,) = plan.sites
    assert site.call.needs_grad
    assert dict(site.refusals)["forward_only"].code is attnrewrite.Code.GRAD
    both = by_name(site)["slow_backward"]
    assert both.milliseconds > 15, "the backward is not in the time"
    assert both.error < 1e-6
    assert all(each.grad is None for each in tensors)


def test_random_numbers_go_on_as_if_nothing_had_been_measured():
    tensors = qkv()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    tuned(lambda *given: attend(*given, dropout_p=0.5), *tensors, candidates=["native", "_native_math"], grad=False)
    torch.manual_seed(5)
    attend(*tensors, dropout_p=0.5)  # the one run of the model draws what it draws
    after_the_model = torch.rand(3)
    torch.manual_seed(5)
    tuned(lambda *given: attend(*given, dropout_p=0.5), *tensors, candidates=["native", "_native_math"])
    assert torch.equal(torch.rand(3), after_the_model)
    assert not torch.equal(after_the_model, wanted)


def test_inside_inference_mode_and_autocast():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plan = attnrewrite.tune(
            Layers(1).eval(), torch.randn(2, 9, 48), candidates=["_native_flash"], inner="eager", progress=False
        )
    (site,) = plan.sites
    assert site.call.dtype == "bfloat16"
    assert all(each.dropped is None and each.error < TOLERANCE[torch.bfloat16] for each in site.measured)


KINDS = [
    (MaskKind.NONE, None, ()), (MaskKind.CAUSAL_UPPER_LEFT, None, ()), (MaskKind.CAUSAL_UPPER_LEFT, "bool", (9, 9)),
    (MaskKind.KEY_PADDING, "bool", (2, 1, 1, 9)), (MaskKind.KEY_PADDING, "float32", (2, 1, 9, 9)),
    (MaskKind.QUERY_KEY_PADDING, "bool", (2, 1, 9, 9)), (MaskKind.CAUSAL_PADDING, "bool", (2, 1, 9, 9)),
    (MaskKind.SLIDING_WINDOW, "bool", (9, 9)), (MaskKind.BLOCKS, "bool", (1, 1, 9, 9)),
    (MaskKind.BOOLEAN, "bool", (1, 4, 9, 9)), (MaskKind.ADDITIVE, "float32", (4, 9, 9)), (MaskKind.NONE, "bool", (9, 9)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "shape"), KINDS, ids=[f"{kind.name}-{dtype}" for kind, dtype, _ in KINDS])
def test_made_up_tensors_of_every_mask(kind, dtype, shape):
    """What "tune" measures on inside a compilation: every kernel that takes the call is right on them."""
    window = (2, 1) if kind is MaskKind.SLIDING_WINDOW else None
    call = AttentionCall(
        "", 2, 4, 2, 9, 9, 16, 16, "float32", mask=Mask(kind, dtype, shape, window=window), layout="bshd"
    )
    site = measure_site(
        example(call, torch.device("cpu")), CPU, Search(candidates_of(KERNELS, ""), inner="eager", **QUICK)
    )
    assert {"native", "_native_math"} <= set(by_name(site))
    for each in site.measured:
        assert each.dropped is None or each.dropped.endswith("measured once"), each
        assert each.error < 1e-6, each


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_the_reference_is_sdpa(rank, mask):
    batch, lead = {2: (1, ()), 3: (3, (3,)), 4: (3, (3, 4)), 5: (6, (3, 2, 4))}[rank]
    heads = 4 if rank > 3 else 1
    query, key, value = (torch.randn(*lead, length, 8, dtype=torch.float64) for length in (7, 11, 11))
    given = {
        None: None,
        "bool": torch.rand(*lead[:1], *(1,) * (rank - 3), 7, 11) > 0.4,
        "bias": torch.randn(7, 11).double(),
    }[mask]
    if mask == "bool" and rank > 2:
        given[0, ..., 2, :] = False  # a row without any key
    call = AttentionCall("", batch, heads, heads, 7, 11, 8, 8, "float64")
    expected = reference(call, query, key, value, given)
    output = F.scaled_dot_product_attention(query, key, value, given)
    assert expected.error(output.reshape(batch, heads, 7, 8)) < 1e-14
    assert (expected.seen is not None) == (mask == "bool" and rank > 2)


# -- what is dropped


BAD = [
    ("raising", RAISING, {}, "RuntimeError: no kernel image is available"),
    ("not_finite", NOT_FINITE, {}, "ValueError: returns NaN or infinity in 56 of 56 rows"),
    ("short", SHORT, {}, r"ValueError: returns \(2, 6, 64\) where SDPA gives \(2, 7, 64\)"),
    ("wrong", WRONG, {}, "its error is above .* 10 times native's"),
    ("strange", lambda query, key, value: sdpa(query, key, value)[:, :1], {}, "RuntimeError: the op of attention backend"),
    ("sleeping", SLEEPING, {"time_limit": 0.5}, "not ready within its 0.5 s, and left running"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "options", "reason"), BAD, ids=[bad[0] for bad in BAD])
def test_a_bad_candidate_is_dropped_with_the_reason(name, function, options, reason):
    started = time.perf_counter()
    plan = tuned(attend, *qkv(kv_len=7), candidates=[kernel(name, function), "_native_flash"], **options)
    (site,) = plan.sites
    assert plan.tuning.complete
    assert site.chosen in ("native", "_native_flash")
    assert {each.name for each in site.measured if each.dropped is None} >= {"native"}
    assert re.match(reason, by_name(site)[name].dropped), by_name(site)[name]
    assert name in str(plan)
    assert time.perf_counter() - started < 10  # and who hangs is not waited for


def test_a_slow_one_is_measured_once_and_not_chosen():
    (site,) = tuned(attend, *qkv(), candidates=[kernel("slow", SLOW)]).sites
    slow = by_name(site)["slow"]
    assert slow.milliseconds > 15
    assert slow.dropped.endswith("measured once")
    assert site.chosen == "native"


def test_more_memory_than_there_is_is_not_tried():
    measure = functools.partial(measure_alike, free=lambda device: 1000)
    (site,) = tuned(attend, *qkv(), candidates=["_native_math"], measure=measure).sites
    assert by_name(site)["_native_math"].dropped.startswith("MemoryError: needs about")
    assert by_name(site)["native"].dropped is None


def test_memory_for_all_scores():
    call, cpu = AttentionCall("", 2, 3, 3, 100, 200, 8, 8, "float32"), torch.device("cpu")
    wanted = 3 * 4 * 2 * 3 * 100 * 200  # bytes
    for free in (None, 2 * wanted):
        enough_memory(MATH, call, cpu, lambda device, free=free: free)
    with pytest.raises(MemoryError, match="needs about"):
        enough_memory(MATH, call, cpu, lambda device: wanted)
    enough_memory(replace(MATH, all_scores=False), call, cpu, lambda device: 0)
    if free_memory(cpu) is not None:
        with pytest.raises(MemoryError, match=r"needs about \d+\.\d GiB for its scores, \d+\.\d GiB are free"):
            enough_memory(MATH, replace(call, q_len=10**6, kv_len=10**6), cpu)


def test_errors_have_a_limit():
    tensors = qkv(dtype=torch.bfloat16)
    (site,) = tuned(attend, *tensors, candidates=["_native_math"], max_error=1e-9).sites
    assert all("above 1.0e-09, max_error" in each.dropped for each in site.measured)
    assert site.chosen == "native"  # the call as it stands
    exact = reference(site.call, *tensors, None).error(F.scaled_dot_product_attention(*tensors))
    assert by_name(site)["native"].error == pytest.approx(exact)


def heads(*given):
    return F.scaled_dot_product_attention(*given)


UNKNOWN = {
    "all": (lambda query, key, value: (query * math.nan, key * math.nan, value * math.nan), "its query, key, value"),
    "one key": (lambda query, key, value: (query, key.index_fill(2, torch.tensor(4), math.inf), value), "its key"),
    "no key seen": (lambda *given: (*given, torch.zeros(7, 11, dtype=torch.bool)), "no row of it sees a key"),
    "no query": (lambda query, key, value: (query[:, :, :0], key, value), "no row of it sees a key"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_where_nothing_is_compared_native_stays_with_a_warning(kind, tmp_path):
    change, why = UNKNOWN[kind]
    quick = replace(MATH, name="quick", empty=True)
    with pytest.warns(UserWarning, match=f"compared nothing at heads: .*{why}. native stays there"):
        plan = tuned(heads, *change(*qkv()), candidates=[quick], max_error=0.1)
    (site,) = plan.sites
    assert site.chosen == "native"
    assert all(math.isnan(each.error) for each in site.measured)
    assert by_name(site)["quick"].dropped.startswith("nothing was compared: ")
    assert by_name(site)["native"].dropped is None
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert "NaN" not in text  # JSON has none
    again = attnrewrite.Plan.load(tmp_path / "plan.json")
    assert again == plan.described()
    assert str(again) == str(plan)
    assert math.isnan(again.sites[0].measured[0].error)


def test_quantised_kernels_take_part_where_they_are_asked_for():
    quantised = kernel("quantised", WRONG, numerics=Numerics.QUANTISED)
    (site,) = tuned(attend, *qkv(kv_len=7), candidates=[quantised]).sites
    assert dict(site.refusals)["quantised"].code is attnrewrite.Code.NUMERICS
    (site,) = tuned(attend, *qkv(kv_len=7), candidates=[quantised], numerics="quantised").sites
    assert by_name(site)["quantised"].error == pytest.approx(0.01, rel=1e-3)
    assert "error" not in (by_name(site)["quantised"].dropped or "")  # it is within twice what the record states


@pytest.mark.parametrize("numerics", ["quantised", "sparse"])
def test_a_plan_and_its_reports_name_the_measured_error_of_a_kernel_that_does_more_than_round(numerics, tmp_path):
    tensors = qkv(kv_len=7)

    class SecondIsFaster(Stopwatch):
        """Runs nothing. It sees `native` first."""

        first = None

        def sample(self, call, calls):
            self.first = self.first or call
            return 2e-3 if call is self.first else 1e-3

    coarse = kernel("coarse", WRONG, numerics=Numerics[numerics.upper()])
    measure = functools.partial(measure_alike, clock=SecondIsFaster)
    plan = tuned(attend, *tensors, candidates=[coarse], numerics=numerics, measure=measure)
    (site,) = plan.sites
    assert site.chosen == "coarse"
    assert (site.inexact.numerics, site.inexact.measured) == (numerics, True)
    assert site.inexact.error == pytest.approx(0.01, rel=1e-3)
    said = f"{numerics}, error 1.0e-02 measured"
    assert f"coarse is {said}" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert str(Plan.load(tmp_path / "plan.json")) == str(plan)
    backend = attnrewrite.with_backend(plan, inner="eager", numerics=numerics)
    torch.compile(attend, backend=backend)(*tensors)
    assert f"coarse: {said}; plan: 1 ms, native 2 ms" in str(backend.report)


def test_ctrl_c_leaves_the_plan_so_far(capsys):
    plan = tuned(Demo().eval(), *inputs(), candidates=[kernel("interrupted", INTERRUPTED)])
    assert [site.name for site in plan.sites] == ["causal", "prompt", "spelled_out", "joint", "outer", "positions"]
    called = []

    def measure(captured, *given):
        called.append(captured.call.site)
        if len(called) == 2:
            raise KeyboardInterrupt
        return measure_alike(captured, *given)

    plan = tuned(Demo().eval(), *inputs(), candidates=["native"], measure=measure)
    assert [site.name for site in plan.sites] == called[:1]
    assert not plan.tuning.complete
    assert "ended by Ctrl-C" in str(plan)
    assert "interrupted, returning the plan so far" in capsys.readouterr().err


def test_ctrl_c_before_anything_was_measured_is_raised_and_leaves_no_thread(capsys):
    def endless(*given):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            time.sleep(0.01)

    candidates = [kernel("endless", real("endless", endless))]
    running = set(threading.enumerate())  # a kernel of another test may have been left to run
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            tuned(attend, *qkv(), candidates=candidates)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [each for each in set(threading.enumerate()) - running if each.name == "attnrewrite.tune"]
    assert "returning the plan" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"candidates": ["nativ"]},
            ValueError,
            "candidates: no attention backend is called 'nativ'; did you mean 'native'",
        ),
        ({"candidates": []}, ValueError, "candidates is empty"),
        ({"candidates": ["native", "auto"]}, ValueError, "candidates names 'auto', which chooses among kernels itself"),
        ({"candidates": 3}, TypeError, "candidates is 3"),
        ({"numerics": "close"}, ValueError, "numerics is 'close'"),
        ({"max_error": -1}, ValueError, "max_error is -1"),
        ({"max_error": 10**400}, ValueError, "max_error is 10000"),
        ({"min_gain": "2%"}, ValueError, "min_gain is '2%'"),
        ({"time_limit": float("nan")}, ValueError, "time_limit is nan"),
        ({"inner": "inducto"}, ValueError, "inner is 'inducto'"),
    ],
)
def test_bad_arguments(given, error, words):
    with pytest.raises(error, match=words):
        attnrewrite.tune(attend, *qkv(), **given)


def test_meta_tensors_are_refused():
    given = [each.to("meta") for each in qkv()]
    with pytest.raises(ValueError, match=r"tune runs the model, .* \(device 'meta'\): .* ask attnrewrite\.explain"):
        attnrewrite.tune(attend, *given)
    model = torch.nn.BatchNorm1d(3)
    model.running_mean = model.running_mean.to("meta")
    with pytest.raises(ValueError, match=r"tensor \(3,\) without values"):
        attnrewrite.tune(model, torch.zeros(2, 3))
    with FakeTensorMode():
        fakes = [torch.empty(each.shape) for each in qkv()]
    for run in (attnrewrite.tune, functools.partial(attnrewrite.check, backend="native")):
        with pytest.raises(ValueError, match=r"without values \(a FakeTensor\): .* ask attnrewrite\.explain"):
            run(attend, *fakes, progress=False)


def test_a_model_that_is_none_and_one_without_attention():
    with pytest.raises(TypeError, match="model is 3"):
        attnrewrite.tune(3)
    pipeline = SimpleNamespace(components={"transformer": Layers(1)})
    with pytest.raises(TypeError, match="give its denoiser"):
        attnrewrite.tune(pipeline)
    plan = tuned(torch.nn.Linear(3, 4), torch.randn(2, 3))
    assert plan.sites == ()
    assert "plan of Linear: 0 attention sites" in str(plan)
    assert str(plan).endswith("no attention found")


# -- which is chosen


def choice(samples, min_gain=0.02, **dropped):
    measured = [Measurement(name, 1.0, dropped=dropped.get(name)) for name in samples]
    return choose(measured, samples, min_gain)


def test_a_kernel_that_is_slow_to_launch_does_not_win_by_its_work():
    """On an H100 a UNet with hundreds of small calls became slower by kernels that are quick on the GPU (0.90x)."""
    samples = {"native": [33e-6] * 9, "quick": [30e-6] * 9}
    for host, chosen in ((None, "quick"), (0.02, "quick"), (0.15, "native")):
        measured = [Measurement("native", 0.033, host=0.025), Measurement("quick", 0.030, host=host)]
        assert choose(measured, samples, 0.02) == chosen
    assert [each.least for each in measured] == [0.033, 0.15]
    # Nor one that is quick to launch, by that alone.
    measured = [Measurement("native", 0.013, host=0.060), Measurement("slow", 0.024, host=0.058)]
    assert choose(measured, {"native": [13e-6] * 9, "slow": [24e-6] * 9}, 0.02) == "native"


def test_the_fastest_wins_if_the_gain_is_worth_it():
    assert choice({"native": [1.0] * 9, "a": [0.9] * 9}) == "a"
    assert choice({"native": [1.0] * 9, "a": [0.99] * 9}) == "native"
    assert choice({"native": [1.0] * 9, "a": [0.99] * 9}, min_gain=0) == "a"
    assert choice({"native": [1.0] * 9, "a": [0.9] * 9}, a="too inexact") == "native"
    assert choice({"a": [1.0] * 9, "b": [0.99] * 9, "c": [0.9] * 9}) == "c"
    assert choice({"a": [0.91] * 9, "b": [0.9] * 9, "native": [1.0] * 9}) == "a"  # as fast as b, and before it
    # Not by way of b: a is as fast as b, but no gain over native.
    assert choice({"native": [1.0] * 9, "a": [0.985] * 9, "b": [0.97] * 9}) == "b"
    assert choice({}) is None


def test_what_is_within_the_noise_is_equal():
    noisy = [0.8, 1.1, 0.85, 1.05, 0.9, 1.1, 0.8, 0.95, 1.0]
    assert choice({"native": [1.0] * 9, "a": noisy}) == "native"
    drift = [1.0 + 0.1 * number for number in range(9)]  # both alike: the ratio is what counts
    assert choice({"native": drift, "a": [0.9 * each for each in drift]}) == "a"


@pytest.mark.parametrize(("jitter", "rounds"), [(0.0, 7), (0.02, 21)])
def test_more_rounds_where_noise_hides_which_is_worth_it(jitter, rounds):
    """The second kernel is faster by 3 %: where rounds differ by 2 %, seven of them cannot tell that."""
    noise = torch.Generator().manual_seed(0)

    class Noisy(Stopwatch):
        """Runs nothing. It sees `native` first, to learn how long a call takes."""

        def __init__(self, device):
            super().__init__(device)
            self.seen = []

        def sample(self, call, calls):
            new = call not in self.seen
            self.seen += [call] * new
            strays = 1.0 if new else 1 + jitter * torch.randn((), generator=noise).item()
            return strays * (1.0 if call is self.seen[0] else 0.97)

    call = AttentionCall("site", 2, 3, 3, 7, 9, 8, 8, "float32", "cpu")
    search = Search(candidates_of(["native", "_native_flash"], "candidates"), rounds=(7, 7), more=3)
    site = measure_site(example(call, torch.device("cpu")), CPU, search, clock=Noisy)
    assert [each.rounds for each in site.measured] == [rounds, rounds]


def test_what_noise_hides():
    assert not undecided([[1.0] * 9, [0.9] * 9], 0.02)
    assert not undecided([[1.0] * 9], 0.02)
    assert not undecided([], 0.02)
    noisy = [0.85, 1.08, 0.88, 1.05, 0.93, 1.1, 0.87, 0.95, 1.0]
    assert undecided([[1.0] * 9, noisy], 0.02)  # some per cent faster, or not
    assert not undecided([[1.0] * 9, [0.5 * each for each in noisy]], 0.02)  # whatever the noise, it is faster
    small = [1.0 + 0.1 * (each - 1.0) for each in noisy]
    assert not undecided([[1.021] * 9, small], 0.1)  # less than what would be a gain
    drift = [1.0 + 0.1 * number for number in range(9)]  # both alike: the ratio is what counts
    assert not undecided([drift, [0.9 * each for each in drift]], 0.02)


# -- plans


VALID = torch.arange(9) < torch.tensor([[9], [5]])  # of two prompts, one is shorter


@pytest.fixture(scope="module")
def plan():
    """Of self-attention on 9 tokens, all of them valid or not: two sites each, all of which chose `_native_math` for both."""
    with torch.no_grad():
        given = torch.randn(2, 9, 48)
        found = [tuned(Layers(2).eval(), given, *rest, candidates=["_native_math"]).sites for rest in ((), (VALID,))]
        made = tuned(Layers(2).eval(), given, candidates=["_native_math"])
    return replace(made, sites=tuple(replace(site, chosen="_native_math") for sites in found for site in sites))


def test_a_plan_goes_to_a_file_and_back(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan.described()
    assert Plan.load(str(path)).tuning.machines[0].packages == CPU.packages
    assert str(Plan.load(path)) == str(plan)
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_plan_is_written_whole_or_not_at_all(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", raising)
    with pytest.raises(TypeError):
        replace(plan, sites=()).save(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "plan.json: this is no plan of attnrewrite"),
        ("[1]", "this is no plan of attnrewrite"),
        ('{"attnrewrite plan": 7}', "its version is 7, 1 is known here"),
        ('{"attnrewrite plan": 1, "tuning": null, "sites": [{"names": ["a"]}]}', "KeyError: 'call'"),
    ],
)
def test_a_file_that_is_no_plan(text, words, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_that_was_not_measured_is_no_choice():
    with pytest.raises(ValueError, match="this plan was not measured: make one with"):
        attnrewrite.with_backend(Plan())


def chosen_by(backend, model, *given, **options):
    compiled = torch.compile(model, backend=backend, fullgraph=True, **options)
    with torch.no_grad():
        assert relative(compiled(*given), model(*given)) < TOLERANCE[torch.float32]
    return [site.chosen for site in backend.report.sites]


def test_a_plan_serves_blocks_that_are_compiled_by_themselves(plan):
    model, given = Layers(3).eval(), torch.randn(2, 9, 48)
    backend = attnrewrite.set_attention_backend(model, plan, inner="eager")
    with torch.no_grad():
        model(given)
        model(given, VALID)
    # The plan knows what the model makes of its mask; a block knows the tensor alone, which is alike.
    assert [str(site.call.mask) for site in plan.sites[::2]] == ["none", "padding of queries and keys"]
    assert [str(site.call.mask) for site in backend.report.sites] == ["none", "boolean (2, 1, 9, 9)"]
    assert [site.chosen for site in backend.report.sites] == ["_native_math"] * 2
    assert not any(site.stale for site in backend.report.sites)


def test_a_call_that_was_not_measured_goes_to_auto_and_is_named(plan):
    backend = attnrewrite.with_backend(plan, inner="eager")
    words = r"plan of Layers: it has no such call.*not used at blocks.0-1 \(2\)"
    with pytest.warns(UserWarning, match=words) as caught:
        chosen_by(backend, Layers(2).eval(), torch.randn(2, 10, 48), torch.ones(2, 10, dtype=torch.bool))
    torch.compiler.reset()
    chosen_by(backend, Layers(2).eval(), torch.randn(2, 11, 48))
    assert {site.chosen for site in backend.report.sites} == {"native"}
    assert len(caught) == 1  # once
    assert "it has no such call; auto: " in str(backend.report)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (Machine("cpu", None, {**CPU.packages, "torch": "2.8.0"}, CPU.name), "it was measured with torch"),
        (Machine("cpu", None, CPU.packages, "another"), "it was measured on another, this is CPU"),
        (Machine("cuda", (9, 0), PACKAGES), "it was measured on cuda, this is cpu"),
    ],
)
def test_a_plan_of_another_machine(plan, machine, words):
    there = replace(plan, tuning=replace(plan.tuning, machines=(machine,)))
    backend = attnrewrite.with_backend(there, inner="eager")
    with pytest.warns(UserWarning, match=words):
        assert chosen_by(backend, Layers(1).eval(), torch.randn(2, 9, 48)) == ["native"]


def test_a_kernel_in_another_version_than_it_was_measured_in():
    call = AttentionCall("site", 1, 24, 24, 4608, 4608, 128, 128, "bfloat16", "cuda")
    h200 = Machine("cuda", (9, 0), {"torch": "2.11.0", "fa3-fwd": "0.0.3"}, "NVIDIA H200")
    site = attnrewrite.Site(call, (), "_flash_3", measured=(Measurement("_flash_3", 1.0), Measurement("native", 2.0)))
    made = Plan((site,), attnrewrite.Tuning("Model", (h200,), "0.1.0"))
    newer = replace(h200, packages={**h200.packages, "fa3-fwd": "0.0.4"})
    (same,) = attnrewrite.make_plan([call], make_policy([made]), [h200]).sites
    (other,) = attnrewrite.make_plan([call], make_policy([made]), [newer]).sites
    assert (same.chosen, same.note, same.stale) == ("_flash_3", "plan: 1 ms, native 2 ms", None)
    assert "_flash_3 was measured with fa3-fwd 0.0.3, here it is 0.0.4" in other.stale


def test_a_quantised_choice_is_asked_for_again():
    call = AttentionCall("site", 1, 24, 24, 32760, 32760, 128, 128, "bfloat16", "cuda")
    h200 = Machine("cuda", (9, 0), {"torch": "2.11.0", "fa3-fwd": "0.0.3"}, "NVIDIA H200")
    timed = (Measurement("native", 3.0), Measurement("_flash_3", 2.0), Measurement("_flash_3_fp8", 1.0))
    made = Plan(
        (attnrewrite.Site(call, (), "_flash_3_fp8", measured=timed),), attnrewrite.Tuning("Model", (h200,), "0.1.0")
    )
    (plain,) = attnrewrite.make_plan([call], make_policy([made]), [h200]).sites
    (asked,) = attnrewrite.make_plan([call], make_policy([made], numerics="quantised"), [h200]).sites
    assert (asked.chosen, plain.chosen) == ("_flash_3_fp8", "_flash_3")
    assert dict(plain.refusals)["_flash_3_fp8"].code is attnrewrite.Code.NUMERICS


def test_symbolic_sizes_up_to_the_next_power_of_two(plan):
    backend = attnrewrite.with_backend(plan, inner="eager")
    compiled = torch.compile(Layers(1).eval(), backend=backend, fullgraph=True)
    taken = {}

    def at(length):
        torch._dynamo.maybe_mark_dynamic(given := torch.randn(2, length, 48), 1)
        compiled(given)
        taken[length] = backend.report.sites[-1].chosen

    with torch.no_grad():
        at(9)
        at(15)
        with pytest.warns(UserWarning, match="it has no such call"):
            at(30)
        graphs = len(backend.report.graphs)
        at(14)
        at(31)
    assert taken[9] == taken[15] == "_native_math"
    assert taken[30] == "native"
    assert len(backend.report.graphs) == graphs == 2


def test_plans_are_compared_and_known_to_caches(plan):
    one, other = make_policy([plan]), make_policy([replace(plan, sites=plan.sites[:1])])
    assert one == make_policy([Plan.from_json(plan.to_json())]) or one != other
    assert attnrewrite.with_backend(plan) == attnrewrite.with_backend(plan)
    assert identity_of(one) is not None
    assert identity_of(one) != identity_of(other)
    assert identity_of(make_policy(["auto"])) is not None
    assert identity_of(make_policy(["tune"])) is None  # what it chooses is on the disk
    with attnrewrite.attention_backend(plan):
        pass_through = attnrewrite.with_backend("native", inner="eager")
        assert chosen_by(pass_through, Layers(1).eval(), torch.randn(2, 9, 48)) == ["_native_math"]


# -- tuning inside the first compilation


class Few:
    """`with_backend("tune", inner="eager")` with two kernels and few rounds; `measured`: the calls that it has measured."""

    def __init__(self):
        self.measured = []
        self.tune = Tune(candidates=lambda: candidates_of(["native", "_native_math"], ""), measure=self.measure)

    def measure(self, captured, machine, search):
        self.measured.append(captured.call)
        return measure_site(captured, machine, replace(search, **QUICK))

    def backend(self, machine=None, **settings):
        return AttentionCompiler(Policy((self.tune,), **settings), "eager", machine)


@pytest.fixture
def few():
    return Few()


def test_tune_by_its_name(tmp_path):
    """The same, with every kernel of this machine."""
    assert make_policy(["tune"]) == Policy((Tune(),))
    backend = attnrewrite.with_backend("tune", inner="eager")
    assert chosen_by(backend, Layers(1).eval(), torch.randn(2, 9, 48)) != [None]
    key = json.loads(only_file(tmp_path).read_text())["key"]
    assert set(key) == {"version", "attnrewrite", "machine", "inner", "numerics", "candidates", "call"}
    assert {"native", "_native_math", "flex"} <= set(key["candidates"])
    assert (key["inner"], key["numerics"], key["machine"]) == ("eager", "reordered", CPU.to_dict())
    assert attnrewrite.explain(attend, *qkv(), backend="tune").sites[0].chosen == "native"
    assert only_file(tmp_path).exists()  # explaining has measured nothing


def forget():
    cache._KNOWN.clear()
    torch.compiler.reset()


def test_the_first_compilation_measures_and_the_next_process_does_not(few, tmp_path):
    backend = few.backend()
    names = chosen_by(backend, Layers(3).eval(), torch.randn(2, 9, 48))
    assert len(few.measured) == 1  # three equal sites
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    assert "tune: " in str(backend.report)
    forget()
    again = few.backend()
    assert chosen_by(again, Layers(3).eval(), torch.randn(2, 9, 48)) == names
    assert len(few.measured) == 1
    chosen_by(few.backend(numerics=Numerics.EXACT), Layers(1).eval(), torch.randn(2, 9, 48))
    assert len(few.measured) == 2  # other search are another question


def only_file(folder):
    (path,) = (folder / "cache").glob("*.json")
    return path


@pytest.mark.parametrize("damage", ["corrupt", "foreign", "empty"])
def test_a_bad_entry_is_ignored_with_a_warning(damage, few, tmp_path):
    chosen_by(few.backend(), Layers(1).eval(), torch.randn(2, 9, 48))
    path = only_file(tmp_path)
    good = json.loads(path.read_text())
    other = {**good, "key": {**good["key"], "attnrewrite": "0.0.1"}}
    path.write_text({"corrupt": path.read_text()[:200], "foreign": json.dumps(other), "empty": ""}[damage])
    forget()
    with pytest.warns(UserWarning, match="is ignored .* the call is measured again"):
        chosen_by(few.backend(), Layers(1).eval(), torch.randn(2, 9, 48))
    assert len(few.measured) == 2
    assert json.loads(path.read_text())["key"] == good["key"]  # written anew


def test_a_folder_that_cannot_be_written(few, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNREWRITE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be") as caught:
        chosen_by(few.backend(), Layers(2).eval(), torch.randn(2, 9, 48))
    assert any("Set ATTNREWRITE_CACHE" in str(each.message) for each in caught)
    assert len(few.measured) == 1  # this process remembers


def test_many_writers_do_no_harm(few, tmp_path):
    call = AttentionCall("", 2, 4, 4, 9, 9, 16, 16, "float32")
    search = Search(candidates_of(["native", "_native_math"], ""), inner="eager", **QUICK)
    site = measure_site(example(call, torch.device("cpu")), CPU, search)
    failed = []

    def write_and_read():
        for _ in range(20):
            cache.save(site, CPU, search)
            cache._KNOWN.clear()
            if cache.load(call, CPU, search) != site.described():
                failed.append(1)

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_explaining_measures_nothing(few):
    report = attnrewrite.explain(attend, *qkv(), backend=few.backend())
    assert report.sites[0].chosen == "native"
    assert few.measured == []
    with torch.no_grad():
        described = few.backend(Machine("cpu", None, CPU.packages, "elsewhere"))
        assert chosen_by(described, Layers(1).eval(), torch.randn(2, 9, 48)) == ["native"]
    assert few.measured == []


def test_training_is_not_measured_inside_a_compilation(few):
    backend = few.backend()
    torch.compile(attend, backend=backend)(*[each.requires_grad_() for each in qkv()]).sum().backward()
    assert few.measured == []
    assert backend.report.sites[0].chosen == "native"


def test_symbolic_sizes_are_measured_at_a_power_of_two(few):
    backend = few.backend()
    compiled = torch.compile(attend, backend=backend, dynamic=True)
    for length in (9, 15, 12, 20):
        compiled(*qkv(q_len=length, kv_len=length))
    assert [(call.q_len, call.kv_len) for call in few.measured] == [(8, 8), (16, 16)]
    assert len(backend.report.graphs) == 2


# -- on a GPU


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_time_is_measured_and_not_the_hosts():
    tensors = qkv(2, 8, None, 257, 300, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        plan = attnrewrite.tune(attend, *tensors, candidates=["_native_flash", "_native_cudnn"], progress=False)
    (site,) = plan.sites
    for each in site.measured:
        assert each.dropped is None, each
        assert each.error < TOLERANCE[torch.bfloat16]
        assert each.milliseconds < 0.05, "queued behind a pause, a kernel of microseconds takes microseconds"


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu_is_dropped():
    tensors = qkv(1, 64, None, 40000, 40000, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        plan = attnrewrite.tune(attend, *tensors, candidates=["_native_math"], inner="eager", progress=False)
    dropped = by_name(plan.sites[0])["_native_math"].dropped
    assert dropped.startswith(("MemoryError", "OutOfMemoryError"))
    assert plan.sites[0].chosen == "native"


def test_progress(capsys):
    """A line for each kernel, from the start; no rounds, of which a log would have hundreds."""
    tuned(attend, *qkv(), candidates=["native", "_native_math"], progress=True)
    assert capsys.readouterr().err.splitlines() == [
        "attnrewrite.tune: running the model to its first attention",
        "attnrewrite.tune: site 1, attend (2, 4, 7, 16): native (1/2)",
        "attnrewrite.tune: site 1, attend (2, 4, 7, 16): _native_math (2/2)",
    ]
    tuned(attend, *qkv(), candidates=["native"], progress=False)
    assert capsys.readouterr().err == ""
    attnrewrite.tune(attend, *qkv(), candidates=["native"], inner="eager")
    assert "attnrewrite.tune: site 1" in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"progress is 'no' \(str\): give True or False"):
        attnrewrite.tune(attend, *qkv(), progress="no")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line_with_the_rounds(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    tuned(attend, *qkv(), candidates=["native"], progress=True)
    written = terminal.getvalue()
    assert "\n" not in written
    assert "\rattnrewrite.tune: site 1, attend (2, 4, 7, 16): round 3/3" in written
    assert written.rstrip(" \r").endswith("round 3/3")  # and at the end it is cleared
    assert re.search(r"\r +\r$", written)
