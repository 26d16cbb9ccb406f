"""`attnrewrite.tune` at several inputs of a model, and with a limit on the error of the model's output."""

import json
import math
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import attend, qkv, relative
from test_tune import QUICK, by_name, kernel, real
from test_tune_errors import MEAN, TOKENS, Uneven, errors_of, mean, steady

import attnrewrite
from attnrewrite import Numerics, OutputError, Plan
from attnrewrite.entrances.model_calls import read_calls
from attnrewrite.entrances.tuning import read_search, search_model


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    steady(monkeypatch)


def tuned(model, calls, candidates=(MEAN,), numerics="quantised", **options):
    """`attnrewrite.tune(model, inputs=calls)` in few rounds."""
    search = replace(read_search(model, candidates, numerics, inner="eager", **options), **QUICK)
    again = search.max_output_error is not None
    with torch.no_grad():
        return search_model(model, read_calls(model, (), {}, calls, again), search, progress=False)


class Scaled(torch.nn.Module):
    """Attention in which all keys count alike for a factor of 0."""

    def forward(self, query, key, *, factor):
        return F.scaled_dot_product_attention(query * factor, key, key)


def call(factor, length=TOKENS):
    query, key, _ = qkv(2, 3, q_len=length, kv_len=length)
    return (query, key * 9), {"factor": torch.tensor(factor)}


def test_the_error_is_the_worst_of_all_inputs():
    calls = [call(0.0), call(0.02), call(1.0)]
    (site,) = (plan := tuned(Scaled(), calls, max_error=1e-2)).sites
    found = by_name(site)["mean"]
    wanted = [errors_of(lambda *args, one=one: Scaled()(*args, **one[1]), mean, *one[0]) for one in calls]
    assert found.errors == pytest.approx([next(iter(each.values()))[0] for each in wanted], rel=1e-3, abs=1e-6)
    assert found.error == max(found.errors) > 0.5
    assert found.errors[0] < 1e-6
    assert site.chosen == "native"
    assert by_name(site)["native"].errors == ()
    assert plan.tuning.inputs == 3
    again = Plan.from_json(plan.to_json())
    assert by_name(again.sites[0])["mean"].errors == found.errors
    assert tuned(Scaled(), [call(0.0), call(0.0)], max_error=1e-2).sites[0].chosen == "mean"


def test_tune_takes_inputs():
    with torch.no_grad():
        plan = attnrewrite.tune(
            Scaled(), inputs=[call(0.0), call(1.0)], candidates=[MEAN], numerics="quantised", max_error=1e-2,
            inner="eager", progress=False,
        )  # fmt: skip
    assert [len(by_name(site)["mean"].errors) for site in plan.sites] == [2]


def test_inputs_of_other_sizes_are_sites_of_their_own():
    """The second input has other sizes, the third those of the first."""
    plan = tuned(Scaled(), [call(0.0), call(0.0, TOKENS + 64), call(1.0)], max_error=1e-2)
    assert [(site.call.q_len, site.chosen) for site in plan.sites] == [(TOKENS, "native"), (TOKENS + 64, "mean")]
    first, second = (by_name(site)["mean"].errors for site in plan.sites)
    assert (first[1], second[0], second[2]) == (None, None, None)
    assert second[1] < 1e-6 < 0.5 < first[2]
    assert by_name(Plan.from_json(plan.to_json()).sites[0])["mean"].errors == first


def test_nothing_compared_at_one_input_is_no_error_of_zero():
    with pytest.warns(UserWarning, match="compared nothing at"):
        plan = tuned(Scaled(), [call(0.0), call(math.nan)], max_error=1e-2)
    (site,) = plan.sites
    assert site.chosen == "native"
    assert math.isnan(by_name(site)["mean"].error)
    assert by_name(site)["mean"].dropped == "nothing was compared: values that are not finite come in by its query"
    text = plan.to_json()
    assert "NaN" not in text
    assert math.isnan(by_name(Plan.from_json(text).sites[0])["mean"].errors[1])


def test_an_iterator_is_read_as_its_calls_run():
    alive = []

    def calls():
        for _ in range(3):
            ends = time.monotonic() + 2  # the thread that measured frees them a moment later
            while [each for each in alive if each() is not None] and time.monotonic() < ends:
                time.sleep(0.01)
            assert not [each for each in alive if each() is not None], "an earlier call's tensors are kept"
            one = call(0.0)
            alive.extend(map(weakref.ref, one[0]))
            yield one
            del one

    plan = tuned(Scaled(), calls(), max_error=1e-2)
    assert len(alive) == 6
    assert plan.tuning.inputs == 3


BAD = [
    ([], ValueError, r"inputs is empty: give an iterable of calls, each a pair \(args, kwargs\)"),
    (iter([]), ValueError, "inputs is empty"),
    (3, TypeError, r"inputs is 3 \(int\)"),
    ({"query": 1}, TypeError, r"inputs is \{'query': 1\} \(dict\)"),
    (torch.zeros(2, 3), TypeError, r"inputs is a tensor \(2, 3\)"),
    ([((), {}), {"query": 1}], TypeError, r"inputs\[1\] is \{'query': 1\} \(dict\): give an iterable of calls"),
    ([(torch.zeros(2), torch.zeros(3))], TypeError, r"inputs\[0\] is .*tuple\): give"),
    ([((torch.zeros(2, device="meta"),), {})], ValueError, "without values"),
]


@pytest.mark.parametrize(("given", "error", "words"), BAD)
def test_bad_inputs(given, error, words):
    with pytest.raises(error, match=words):
        attnrewrite.tune(Scaled(), inputs=given, candidates=["native"], inner="eager", progress=False)


def test_inputs_and_the_arguments_of_one_call():
    with pytest.raises(
        TypeError, match=r"tune got inputs and arguments of one call beside it \(1 positional, factor\)"
    ):
        attnrewrite.tune(Scaled(), torch.zeros(2), inputs=[call(0.0)], factor=1.0)


# -- the error of the output


class Graded(torch.nn.Module):
    """Attentions whose keys count the less alike the larger their factor is, and whose outputs are added."""

    def __init__(self, factors):
        super().__init__()
        self.parts = torch.nn.ModuleList(Part(factor) for factor in factors)

    def forward(self, query, key):
        output = query * 0
        for part in self.parts:
            output = output + part(query, key)
        return output


class Part(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, query, key):
        return F.scaled_dot_product_attention(query * self.factor, key, key)


FACTORS = (0.1, 0.6, 0.0, 0.3)


@pytest.fixture
def given():
    torch.manual_seed(0)
    query, key, _ = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
    return query, key


def error_with(model, plan, *given):
    """Of the compiled model against the unchanged one."""
    backend = attnrewrite.with_backend(plan, inner="eager", numerics="quantised")
    with torch.no_grad():
        return relative(torch.compile(model, backend=backend, fullgraph=True)(*given), model(*given))


def test_sites_are_given_back_the_worst_first_until_the_output_holds(given):
    model = Graded(FACTORS)
    free = tuned(model, [(given, {})], max_error=9.0)
    assert [site.chosen for site in free.sites] == ["mean"] * 4
    assert free.tuning.output is None
    before = error_with(model, free, *given)
    runs = []

    class Counted:
        def __iter__(self):
            runs.append(None)
            yield given, {}

    search = replace(
        read_search(model, [MEAN], "quantised", 9.0, inner="eager", max_output_error=0.25 * before), **QUICK
    )
    with torch.no_grad():
        plan = search_model(model, Counted(), search, progress=False)
    found = plan.tuning.output
    assert len(runs) <= 5, "one to measure, one unchanged, and three plans: with all kernels, and two by bisection"
    assert (found.limit, found.before) == (0.25 * before, pytest.approx(before, rel=1e-3))
    assert found.held
    assert found.error == pytest.approx(error_with(model, plan, *given), rel=1e-3)
    assert 0 < found.error <= 0.25 * before

    worst_first = sorted(free.sites, key=lambda site: -by_name(site)["mean"].error)
    given_back = [each.site for each in found.given_back]
    assert given_back == [site.name for site in worst_first[: len(given_back)]]
    assert [site.chosen for site in plan.sites] == [
        "native" if site.name in given_back else "mean" for site in plan.sites
    ]
    for each in found.given_back:
        site = next(site for site in plan.sites if site.name == each.site)
        assert (each.kernel, each.instead) == ("mean", "native")
        assert each.error == by_name(site)["mean"].error
        assert each.milliseconds == by_name(site)["native"].milliseconds - by_name(site)["mean"].milliseconds > 0
    assert found.seconds == pytest.approx(sum(each.milliseconds for each in found.given_back) / 1e3)

    # One site less would not do.
    last = found.given_back[-1].site
    kept = next(site for site in free.sites if site.name == last)
    less = replace(plan, sites=tuple(kept if site.name == last else site for site in plan.sites))
    assert error_with(model, less, *given) > 0.25 * before

    again = Plan.from_json(plan.to_json())
    assert again.tuning.output == found
    assert f"output error {found.error:.1e} of at most" in str(again)
    assert str(again) == str(plan)


def test_an_output_that_holds_keeps_every_site(given):
    plan = tuned(Graded(FACTORS), [(given, {})], max_error=9.0, max_output_error=2)
    assert [site.chosen for site in plan.sites] == ["mean"] * 4
    assert plan.tuning.output.given_back == ()
    assert plan.tuning.output.error == plan.tuning.output.before < 2


def test_the_worst_of_all_inputs_counts_for_the_output(given):
    model, (query, key) = Graded((0.3,)), given
    near = tuned(model, [((query * 0, key), {})], max_error=9.0, max_output_error=1e-3)
    assert [site.chosen for site in near.sites] == ["mean"]
    with pytest.warns(UserWarning, match="native takes every site"):
        both = tuned(model, iter([((query * 0, key), {}), ((query, key), {})]), max_error=9.0, max_output_error=1e-3)
    assert [site.chosen for site in both.sites] == ["native"]


def test_a_limit_that_no_kernel_reaches_gives_the_exact_plan_and_says_so(given):
    with pytest.warns(
        UserWarning, match=r"max_output_error=0 is held by no plan .*native takes every site, and the error is"
    ):
        plan = tuned(Graded(FACTORS), [(given, {})], (MEAN, "_native_math"), max_error=9.0, max_output_error=0)
    assert {site.chosen for site in plan.sites} == {"native"}
    assert plan.tuning.output.error == 0
    assert plan.tuning.output.before > 0.05
    assert len(plan.tuning.output.given_back) == 4
    assert error_with(Graded(FACTORS), plan, *given) == 0, "with what only rounds, too"


def test_an_output_that_is_not_finite_is_never_within_a_limit(given):
    def model(query, key):
        return F.scaled_dot_product_attention(query * 0, key, key) / 0

    with pytest.warns(UserWarning, match="native takes every site, and nothing could be compared"):
        plan = tuned(model, [(given, {})], max_error=1e-2, max_output_error=1.0)
    assert [site.chosen for site in plan.sites] == ["native"]
    assert math.isnan(plan.tuning.output.error)
    assert not plan.tuning.output.held
    assert "NaN" not in plan.to_json()
    assert math.isnan(Plan.from_json(plan.to_json()).tuning.output.error)


@pytest.mark.parametrize("name", ["max_error", "max_output_error"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, True, "1e-2"])
def test_bad_budgets(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}: give a number from 0 on, the relative error"):
        attnrewrite.tune(attend, *qkv(), **{name: value})


def test_plans_of_earlier_versions_load():
    data = json.loads(tuned(Scaled(), [call(0.0)]).to_json())
    for name in ("inputs", "output", "steps", "of_steps"):
        del data["tuning"][name]
    for site in data["sites"]:
        for each in site["measured"]:
            del each["errors"], each["limit"]
    plan = Plan.from_dict(data)
    assert (plan.tuning.inputs, plan.tuning.output, plan.tuning.steps) == (1, None, ())
    assert by_name(plan.sites[0])["mean"].errors == ()


def test_what_a_limit_cost_is_plain_data():
    found = OutputError(1e-2, math.nan, 3.0, (attnrewrite.GivenBack("a", "mean", "native", math.nan, 2.0),))
    text = json.dumps(found.to_dict())
    assert "NaN" not in text
    again = OutputError.from_dict(json.loads(text))
    assert math.isnan(again.error)
    assert math.isnan(again.given_back[0].error)
    assert (again.seconds, again.before) == (2e-3, 3.0)


def test_a_kernel_that_only_rounds_stays_where_it_holds():
    rounds = kernel("rounds", real("rounds", mean), numerics=Numerics.REORDERED)
    model = Uneven(2, {0, 1}).eval()
    tokens = torch.randn(2, TOKENS, 48)
    plan = tuned(model, [((tokens,), {})], (rounds,), "reordered", max_error=1e-2, max_output_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["rounds"] * 2
    assert plan.tuning.output.given_back == ()
    assert plan.tuning.output.error < 1e-5
