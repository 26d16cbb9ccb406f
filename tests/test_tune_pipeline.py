"""`attnrewrite.tune_pipeline` and `attnrewrite.schedule_of`: a pipeline's own steps, and kernels by step."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import qkv, relative
from test_tune import by_name
from test_tune_errors import MEAN, TOKENS, steady

import attnrewrite
from attnrewrite import Plan, schedule_of, tune_pipeline
from attnrewrite.entrances.pipeline_calls import MOST, Recorded, record
from attnrewrite.graphs.modules import implementation_of


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch):
    steady(monkeypatch)


class Denoiser(torch.nn.Module):
    """Attention in which all keys count alike for a factor of 0, in two blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Attention() for _ in range(2))

    def forward(self, query, key, factor):
        for block in self.blocks:
            key = block(query * factor, key)
        return key


class Attention(torch.nn.Module):
    def forward(self, query, key):
        return F.scaled_dot_product_attention(query, key, key)


class Pipe:
    """Denoises in as many steps as there are factors, with guidance twice a step. It writes into its latents."""

    def __init__(self, **components):
        torch.manual_seed(0)
        self.components = components or {"transformer": Denoiser()}
        self.__dict__ |= self.components
        self.query, self.key, _ = qkv(2, 3, q_len=TOKENS, kv_len=TOKENS)
        self.scheduler = None
        self.outputs = []

    def __call__(self, factors, guidance=True, denoiser="transformer"):
        self.scheduler = SimpleNamespace(timesteps=torch.arange(len(factors)), step_index=None)
        self.outputs.clear()
        latents = self.key.clone()
        for step, factor in enumerate(factors):
            for _ in range(2 if guidance else 1):
                if denoiser is not None:
                    name = denoiser if isinstance(denoiser, str) else denoiser[step]
                    self.outputs.append(getattr(self, name)(self.query, latents, factor=torch.tensor(factor)))
            self.scheduler.step_index = step + 1
            latents.mul_(1.5)
        return self.outputs


SETTINGS = {"candidates": [MEAN], "numerics": "sparse", "inner": "eager", "progress": False}
UNEVEN = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_pipeline_is_tuned_at_its_first_middle_and_last_step():
    pipe = Pipe()
    plan = tune_pipeline(pipe, [1.0, 0.5, 0.0, 0.5, 0.0], max_error=1e-2, **SETTINGS)
    assert plan.tuning.steps == (0, 0, 2, 2, 4, 4), "both calls of each step"
    assert (plan.tuning.of_steps, plan.tuning.inputs, plan.tuning.model) == (5, 6, "Pipe")
    assert [site.name for site in plan.sites] == ["transformer.blocks.0", "transformer.blocks.1"]
    for site in plan.sites:
        errors = by_name(site)["mean"].errors
        assert min(errors[:2]) > 1e-2
        assert max(errors[2:]) < 1e-5
        assert site.chosen == "native"
    assert implementation_of(pipe.transformer) is None
    assert Plan.from_json(plan.to_json()).tuning == plan.tuning

    plan = tune_pipeline(pipe, factors=[0.0, 1.0, 0.0, 1.0, 0.0], guidance=False, max_error=1e-2, **SETTINGS)
    assert plan.tuning.steps == (0, 2, 4)
    assert [site.chosen for site in plan.sites] == ["mean", "mean"]
    backend = attnrewrite.set_attention_backend(pipe, plan, numerics="sparse", inner="eager")
    with torch.no_grad():
        pipe([0.0], guidance=False)
    assert {site.chosen for graph in backend.report.graphs for site in graph.plan.sites} == {"mean"}
    # A pipeline that is set is tuned as well, and is set as before.
    was = implementation_of(pipe.transformer)
    tune_pipeline(pipe, [0.0], max_error=1e-2, **SETTINGS)
    assert implementation_of(pipe.transformer) is was


def test_other_steps_and_the_errors_are_those_of_the_steps():
    """The latents are as they were in that step, though the pipeline writes into them."""
    plan = tune_pipeline(Pipe(), UNEVEN, guidance=False, at=(0, 0.25, 0.6, 1), max_error=1e-2, **SETTINGS)
    assert plan.tuning.steps == (0, 2, 5, 8)
    pipe = Pipe()
    for number, step in enumerate(plan.tuning.steps):
        exact = attention(pipe.query * UNEVEN[step], pipe.key * 1.5**step)
        error = relative(pipe.key.mean(2, keepdim=True).expand_as(exact) * 1.5**step, exact)
        assert by_name(plan.sites[0])["mean"].errors[number] == pytest.approx(error, rel=0.1, abs=1e-6)


def attention(query, key):
    return F.scaled_dot_product_attention(query.double(), key.double(), key.double())


def test_two_denoisers_share_the_steps():
    pipe = Pipe(transformer=Denoiser(), transformer_2=Denoiser())
    turns = ["transformer"] * 3 + ["transformer_2"] * 2
    plan = tune_pipeline(
        pipe,
        [0.0, 0.0, 0.0, 1.0, 1.0],
        guidance=False,
        denoiser=turns,
        max_error=1e-2,
        max_output_error=0.5,
        **SETTINGS,
    )
    assert plan.tuning.steps == (0, 1, 2, 3, 4)
    by = {site.name: (site.chosen, by_name(site)["mean"].errors) for site in plan.sites}
    assert {name: chosen for name, (chosen, _) in by.items()} == {
        "transformer.blocks.0": "mean", "transformer.blocks.1": "mean",
        "transformer_2.blocks.0": "native", "transformer_2.blocks.1": "native",
    }  # fmt: skip
    assert [error is None for error in by["transformer.blocks.0"][1]] == [False, False, False, True, True]
    assert [error is None for error in by["transformer_2.blocks.1"][1]] == [True, True, True, False, False]
    assert plan.tuning.output.held


def test_the_steps_that_are_kept():
    recorded = Recorded()
    for step in range(7, 107):
        for _ in range(2):
            recorded.add(step, (), {})
            assert len(recorded.kept) <= MOST + 2
    assert recorded.at((0, 1)) == [7, 106]
    (middle,) = recorded.at((0.5,))
    assert abs(middle - 56) <= 8
    assert all(len(calls) == 2 for calls in recorded.kept.values())
    assert recorded.at((0, 0, 0.001)) == [7]


def test_the_pipeline_is_left_as_it_was_if_it_raises():
    pipe = Pipe()
    with pytest.raises(TypeError, match=r"not iterable|object of type"):
        tune_pipeline(pipe, 3, **SETTINGS)
    assert implementation_of(pipe.transformer) is None


def test_recorded_tensors_are_copies_on_the_cpu():
    pipe = Pipe()
    with torch.no_grad():
        recorded, steps = record(pipe, {"transformer": pipe.transformer}, ([0.5, 0.5],), {})
    assert steps == 2
    (first, _), (second, _) = recorded["transformer"].kept.values()
    assert torch.equal(first[0][1].tensor * 1.5, second[0][1].tensor)


@pytest.mark.parametrize(
    ("given", "settings", "error", "words"),
    [
        (
            lambda: Denoiser(),
            {},
            TypeError,
            r"pipe is a module \(Denoiser\): give its pipeline, or call attnrewrite.tune",
        ),
        (lambda: 3, {}, TypeError, "int"),
        (lambda: SimpleNamespace(components={"transformer": Denoiser()}), {}, TypeError, "cannot be called"),
        (lambda: Pipe(vae=Denoiser()), {}, ValueError, "Pipe has no transformer or transformer_2 or unet"),
        (Pipe, {"denoiser": None}, ValueError, "Pipe did not call its transformer"),
        (Pipe, {"at": ()}, ValueError, r"at is \(\): give numbers from 0"),
        (Pipe, {"at": (0, 1.5)}, ValueError, "at is"),
        (Pipe, {"at": (True,)}, ValueError, "at is"),
        (Pipe, {"at": 0.5}, ValueError, "at is 0.5"),
        (Pipe, {"at": "01"}, ValueError, "at is '01'"),
        (Pipe, {"max_error": -1}, ValueError, "max_error is -1"),
        (Pipe, {"max_output_error": float("nan")}, ValueError, "max_output_error is nan"),
    ],
)
def test_bad_arguments(given, settings, error, words):
    with pytest.raises(error, match=words):
        tune_pipeline(given(), [0.0], **{**SETTINGS, **settings})


# -- schedules


@pytest.fixture(scope="module")
def uneven():
    """A plan of a pipeline where `mean` is right in the steps 2 to 7 of 9."""
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        return tune_pipeline(Pipe(), UNEVEN, at=[step / 8 for step in range(9)], max_error=1e-2, **SETTINGS)


def test_a_schedule_is_exact_at_the_steps_where_a_kernel_does_not_hold(uneven):
    schedule = schedule_of(uneven, candidates=[MEAN])
    assert (schedule.first, schedule.last, schedule.steps) == (2, 1, None)
    (middle,) = schedule.middle
    assert [site.chosen for site in uneven.sites] == ["native", "native"]
    assert [site.chosen for site in middle.sites] == ["mean", "mean"]
    assert all(by_name(site)["mean"].error < 1e-5 for site in middle.sites), "the worst of the middle"

    pipe = Pipe()
    wanted = pipe(UNEVEN).copy()
    with torch.no_grad():
        backend = attnrewrite.set_attention_backend(pipe, schedule, numerics="sparse", inner="eager")
        found = pipe(UNEVEN)
        for one, other in zip(found, wanted, strict=True):
            assert relative(one, other) < 1e-5
    used = {(bool(graph.context), site.chosen) for graph in backend.report.graphs for site in graph.plan.sites}
    assert used == {(True, "native"), (False, "mean")}


def test_steps_between_two_that_were_measured_are_not_trusted():
    plan = tune_pipeline(Pipe(), UNEVEN, at=(0, 0.5, 0.75, 1), max_error=1e-2, **SETTINGS)
    assert plan.tuning.steps == (0, 0, 4, 4, 6, 6, 8, 8)
    schedule = schedule_of(plan, candidates=[MEAN])
    assert (schedule.first, schedule.last) == (4, 2)


def test_where_a_kernel_holds_everywhere_or_nowhere_the_plan_takes_every_step():
    for factor, chosen in ((0.0, "mean"), (1.0, "native")):
        plan = tune_pipeline(Pipe(), [factor] * 5, max_error=1e-2, **SETTINGS)
        schedule = schedule_of(plan, candidates=[MEAN])
        assert (schedule.first, schedule.last, schedule.middle) == (0, 0, (plan,))
        assert [site.chosen for site in plan.sites] == [chosen] * 2


def test_steps_of_a_loop_of_ones_own(uneven):
    without = Plan(
        uneven.sites, attnrewrite.Tuning.from_dict({**uneven.tuning.to_dict(), "steps": (), "of_steps": None})
    )
    with pytest.raises(ValueError, match="steps is None: give the number of all denoising steps"):
        schedule_of(without)
    at = [10 * step for step in range(9) for _ in range(2)]
    schedule = schedule_of(without, at=at, steps=90, candidates=[MEAN])
    assert (schedule.first, schedule.last, schedule.steps) == (20, 90 - 1 - 70, 90)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"at": [0, 1]}, ValueError, r"at is \[0, 1\]: give the step of each of the plan's 18 inputs, from 0 to 8"),
        ({"at": [9] * 18}, ValueError, "from 0 to 8"),
        ({"at": 3}, ValueError, "at is 3: give the step of each"),
        ({"at": [True] * 18}, ValueError, "from 0 to 8"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": True}, ValueError, "steps is True"),
        ({"steps": 5}, ValueError, "from 0 to 4"),
    ],
)
def test_bad_steps(uneven, given, error, words):
    with pytest.raises(error, match=words):
        schedule_of(uneven, **given)


def test_plans_that_give_no_schedule():
    with pytest.raises(TypeError, match="plan is 'auto'"):
        schedule_of("auto")
    one = tune_pipeline(Pipe(), [0.0], guidance=False, **SETTINGS)
    with pytest.raises(ValueError, match="was not measured at several steps"):
        schedule_of(one)
    with pytest.raises(ValueError, match="was not measured at several steps"):
        schedule_of(Plan(one.sites))
    bound = tune_pipeline(Pipe(), [0.0, 0.0], max_output_error=0.1, **SETTINGS)
    with pytest.raises(ValueError, match="tuned with max_output_error"):
        schedule_of(bound)
