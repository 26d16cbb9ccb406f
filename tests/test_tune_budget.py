"""What a budget of errors must not let through: where a kernel that is right at what was measured is wrong."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import qkv, relative
from test_tune import QUICK, by_name, kernel, real
from test_tune import tuned as tuned_at
from test_tune_errors import MEAN, TOKENS, steady
from test_tune_inputs import Scaled, call, tuned
from test_tune_pipeline import SETTINGS, Pipe

import attnrewrite
from attnrewrite import MaskKind, Numerics, OutputError, Plan, schedule_of, tune_pipeline
from attnrewrite.entrances.tuning import read_search, search_model


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    steady(monkeypatch)


def used(model, plan, *given, **named):
    """The output with a plan, and the report."""
    backend = attnrewrite.with_backend(plan, numerics="sparse", inner="eager")
    with torch.no_grad():
        return torch.compile(model, backend=backend)(*given, **named), backend.report


def two_inputs():
    query, key, _ = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
    return query, key * 9


# -- all rows count


def changed(name, change):
    """A sparse kernel that is right but for what `change` does to its output."""

    def function(query, key, value):
        output = F.scaled_dot_product_attention(query, key, value).contiguous()
        change(output)
        return output

    return kernel(name, real(name, function), numerics=Numerics.SPARSE)


def odd_rows(output):
    output[:, :, 1:-1:2] = 0


def part_of_each_block(output):
    output[:, :, [row for row in range(1, output.shape[2] - 1) if row % 64 in range(2, 9)]] = 0


@pytest.mark.parametrize(("change", "length"), [(odd_rows, 510), (part_of_each_block, 8128)])
def test_rows_between_those_that_are_compared_with_float64_count(change, length):
    query, key, _ = qkv(1, 1, q_len=length, kv_len=length)
    plan = tuned_at(
        F.scaled_dot_product_attention, query, key, key, candidates=[changed(change.__name__, change)], numerics="sparse",
        max_error=2e-2,
    )  # fmt: skip
    (site,) = plan.sites
    exact = F.scaled_dot_product_attention(query, key, key)
    wrong = exact.clone()
    change(wrong)
    assert site.chosen == "native"
    assert by_name(site)[change.__name__].error == pytest.approx(relative(wrong, exact), rel=1e-3)


def test_a_few_rows_of_large_norm_count():
    query, key, value = qkv(1, 2, q_len=2048, kv_len=2048)
    query, key[:, :, 7], value[:, :, 7] = query.abs(), -5, value[:, :, 7] * 300
    query[:, :, 1000:1003] *= -1

    def three(output):
        output[:, :, 1000:1003] = 0

    plan = tuned_at(
        F.scaled_dot_product_attention, query, key, value, candidates=[changed("three", three)], numerics="sparse",
        max_error=2e-2,
    )  # fmt: skip
    assert plan.sites[0].chosen == "native"


def one_row_of_nan(output):
    output[:, :, 5] = math.nan


def dead_rows_of_nan(output):
    output[:, :, -64:] = math.nan


def dead_rows_of_numbers(output):
    output[:, :, -64:] = 1e6


@pytest.mark.parametrize("change", [one_row_of_nan, dead_rows_of_nan, dead_rows_of_numbers])
@pytest.mark.parametrize("numerics", ["sparse", "reordered"])
def test_rows_beside_some_that_see_no_key(change, numerics):
    """The last 64 rows see no key: SDPA gives 0 there."""
    query, key, _ = qkv(1, 2, q_len=1024, kv_len=1024)
    mask = torch.ones(1024, 1024, dtype=torch.bool)
    mask[-64:] = False
    name = f"{change.__name__}_{numerics}"

    def wrong(query, key, value):
        output = F.scaled_dot_product_attention(query, key, value, mask).contiguous()
        change(output)
        return output

    record = replace(
        kernel(name, real(name, wrong), numerics=Numerics[numerics.upper()]), masks=frozenset({MaskKind.BOOLEAN})
    )
    plan = tuned_at(
        lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m), query, key, mask, candidates=[record],
        numerics=numerics, max_error=1e-2,
    )  # fmt: skip
    assert plan.sites[0].chosen == "native"
    assert by_name(plan.sites[0])[name].dropped


def test_an_output_of_zeros_is_no_excuse():
    query, key, _ = qkv(1, 2, q_len=64, kv_len=64)
    site = tuned_at(
        F.scaled_dot_product_attention, query, key, key * 0, candidates=[changed("near_zero", near_zero)],
        numerics="sparse", max_error=1e-2,
    ).sites[0]  # fmt: skip
    assert (site.chosen, by_name(site)["near_zero"].error) == ("native", math.inf)


def near_zero(output):
    output += 1e-5


def test_under_dropout_nothing_is_known_of_a_sparse_kernel():
    query, key = two_inputs()
    record = replace(MEAN, name="drops", numerics=Numerics.SPARSE, dropout=True)
    site = tuned_at(
        lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=0.1), query, key, candidates=[record],
        numerics="sparse", max_error=1.0,
    ).sites[0]  # fmt: skip
    assert site.chosen == "native"
    assert by_name(site)["drops"].dropped == "nothing was compared: it has dropout"


def test_a_backward_that_gives_nan_is_dropped():
    given = [each.requires_grad_() for each in qkv(1, 2, q_len=16, kv_len=16)]
    op = torch.library.custom_op(
        "attnrewrite_tests::nan_backward", lambda query, key, value: F.scaled_dot_product_attention(query, key, value).clone(),
        mutates_args=(), schema="(Tensor query, Tensor key, Tensor value) -> Tensor",
    )  # fmt: skip
    op.register_fake(lambda query, key, value: torch.empty_like(query))
    op.register_autograd(lambda _, grad: (grad * math.nan,) * 3)
    record = kernel("nan_backward", op)
    (site,) = tuned_at(F.scaled_dot_product_attention, *given, candidates=[record], grad=True).sites
    assert site.chosen == "native"
    assert by_name(site)["nan_backward"].dropped == "ValueError: returns NaN or infinity in its backward"


# -- where a plan is used


def test_a_kernel_that_is_wrong_at_one_length_takes_no_symbolic_length():
    """448 and 384 have the same power of two: one code may serve both."""
    calls = [call(0.0, 448), call(1.0, 384)]
    plan = tuned(Scaled(), calls, max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["mean", "native"]
    model = Scaled()
    backend = attnrewrite.with_backend(plan, numerics="quantised", inner="eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for args, named in calls:
        assert relative(compiled(*args, **named), model(*args, **named)) < 1e-5


class Branches(torch.nn.Module):
    """The second attention of a call with `more` does not run otherwise."""

    def forward(self, query, key, more=False, scale=None):
        output = F.scaled_dot_product_attention(query * 0, key, key, scale=scale)
        return output + F.scaled_dot_product_attention(query, key, key) if more else output


def test_an_attention_that_was_not_measured_gets_no_sparse_kernel():
    given = two_inputs()
    plan = tuned(Branches(), [(given, {})], max_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["mean"]
    with pytest.warns(UserWarning, match="mean was not measured at this attention"):
        output, report = used(Branches(), plan, *given, more=True)
    assert [site.chosen for site in report.sites] == ["mean", "native"]
    assert relative(output, Branches()(*given, more=True)) < 1e-5
    with pytest.warns(UserWarning, match="mean was not measured at this attention, or with another scale"):
        _, report = used(Branches(), plan, *given, scale=2.0)
    assert [site.chosen for site in report.sites] == ["native"]
    _, report = used(Branches(), plan, *given, scale=given[0].shape[-1] ** -0.5)
    assert [site.chosen for site in report.sites] == ["mean"], "the usual scale, said as a number"


def test_a_kernel_without_a_record_is_named():
    given = two_inputs()
    plan = tuned(Branches(), [(given, {})], max_error=1e-2)
    loaded = Plan.from_json(plan.to_json())
    assert loaded == plan
    with pytest.warns(UserWarning, match="its kernel mean is not known here"):
        _, report = used(Branches(), loaded, *given)
    assert [site.chosen for site in report.sites] == ["native"]
    _, report = used(Branches(), plan, *given)
    assert [site.chosen for site in report.sites] == ["mean"], "no code of the plan that does not know it"


# -- the bound of the output


def writes(query, key):
    output = F.scaled_dot_product_attention(query, key, key)
    query.mul_(1e-4)
    return output


class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, query, key):
        self.runs.add_(1)
        return F.scaled_dot_product_attention(query, key, key) * self.runs


def test_the_output_is_compared_from_the_same_contents():
    query, key = two_inputs()
    given = query.clone()
    with pytest.warns(UserWarning, match="the error of the fastest is 1.0e.00.*and the error is 0.0e.00"):
        plan = tuned(writes, [((given, key), {})], max_error=9.0, max_output_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["native"]
    assert torch.equal(given, query * 1e-4), "as after one run"
    model = Counts()
    with pytest.warns(UserWarning, match="and the error is 0.0e.00"):
        tuned(model, [((query, key), {})] * 2, max_error=9.0, max_output_error=1e-2)
    assert model.runs == 2, "as after one run of both"


def test_complex_outputs_count():
    query, key = two_inputs()

    def model(query, key):
        output = F.scaled_dot_product_attention(query, key, key)
        return query.sum(), torch.complex(output, output)

    with pytest.warns(UserWarning, match="the error of the fastest is 9.9e-01"):
        plan = tuned(model, [((query, key), {})], max_error=9.0, max_output_error=1e-2)
    assert [site.chosen for site in plan.sites] == ["native"]


def test_an_error_without_a_bound_is_no_json_number():
    found = OutputError(1e-2, 0.0, math.inf)
    assert OutputError.from_dict(found.to_dict()) == found
    assert found.to_dict()["before"] == "inf"


def test_an_interruption_leaves_no_plan_without_its_bound():
    def interrupted():
        yield call(0.0)
        raise KeyboardInterrupt

    search = replace(read_search(Scaled(), [MEAN], "quantised", inner="eager", max_output_error=1e-6), **QUICK)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        search_model(Scaled(), interrupted(), search, progress=False)


# -- schedules


def edges(steps):
    """Factors by which the first quarter and the last tenth of a run are no steps for `mean`."""
    return [1.0 if step < 0.25 * (steps - 1) or step > 0.9 * (steps - 1) else 0.0 for step in range(steps)]


@pytest.mark.parametrize("steps", [30, 5, 9])
def test_a_schedule_is_as_long_as_the_run(steps):
    plan = tune_pipeline(Pipe(), edges(9), at=[step / 8 for step in range(9)], max_error=1e-2, **SETTINGS)
    schedule = schedule_of(plan, candidates=[MEAN])
    assert (schedule.first, schedule.last, schedule.of) == (2, 1, 9)
    pipe = Pipe()
    wanted = pipe(edges(steps)).copy()
    with torch.no_grad():
        backend = attnrewrite.set_attention_backend(pipe, schedule, numerics="sparse", inner="eager")
        for one, other in zip(pipe(edges(steps)), wanted, strict=True):
            assert relative(one, other) < 1e-5
    assert {site.chosen for graph in backend.report.graphs for site in graph.plan.sites} == {"native", "mean"}


def test_rules_hold_at_the_edges_too():
    pipe = Pipe()
    schedule = attnrewrite.schedule(first=1, last=1, edge=MEAN, middle="native")
    backend = attnrewrite.set_attention_backend(
        pipe, schedule, rules={"*blocks.0": "native"}, numerics="sparse", inner="eager"
    )
    with torch.no_grad():
        pipe([1.0] * 3)
    used = {
        (bool(graph.context), site.name, site.chosen) for graph in backend.report.graphs for site in graph.plan.sites
    }
    assert (True, "transformer.blocks.0", "native") in used
    assert (True, "transformer.blocks.1", "mean") in used
    assert {chosen for edge, _, chosen in used if not edge} == {"native"}


def test_a_schedule_of_a_plan_from_a_file_has_the_records_that_are_given():
    plan = tune_pipeline(Pipe(), [1.0, 0.0, 0.0, 0.0], at=(0, 0.34, 0.67, 1), max_error=1e-2, **SETTINGS)
    held = tune_pipeline(Pipe(), [0.0] * 4, at=(0, 0.34, 0.67, 1), max_error=1e-2, **SETTINGS)
    for each, chosen in ((plan, "native"), (held, "mean")):
        loaded = Plan.from_json(each.to_json())
        assert [site.chosen for site in loaded.sites] == [chosen] * 2
        schedule = schedule_of(loaded, candidates=[MEAN])
        (middle,) = schedule.middle
        assert [(site.chosen, site.backend) for site in middle.sites] == [("mean", MEAN)] * 2
