"""`explain` for devices that are elsewhere: no process group is needed."""

import pytest
import torch

import attnrewrite
from attnrewrite import DescribedRanks
from attnrewrite.__main__ import main
from attnrewrite.commands.demo_model import Demo, inputs
from attnrewrite.parallel import plans


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_plan_for_other_devices(size):
    demo = Demo().eval().requires_grad_(False)
    report = attnrewrite.explain(demo, *inputs(), backend="native", context_parallel=size)
    (graph,) = report.graphs
    sharing = graph.parallel
    assert sharing.ranks == size
    assert {begin.where for begin in sharing.begins} == {"the input text", "the input image"}
    assert [site.site for site in sharing.sites] == ["causal", "prompt", "joint", "outer", "positions"]
    exchanges = {site.exchange for site in sharing.sites}
    if size == 2:
        assert exchanges == {plans.BATCH}
    elif size == 3:  # of 4 heads: the causal attention runs whole
        assert plans.KEYS_GATHERED in exchanges
    assert f"context parallelism over {size} ranks" in str(report)
    assert attnrewrite.Report.from_json(report.to_json()).to_json() == report.to_json()


def test_a_kernel_that_cannot_be_a_step_of_a_ring():
    demo = Demo().eval().requires_grad_(False)
    report = attnrewrite.explain(
        demo, *inputs(), backend=["flex", "native"], context_parallel=DescribedRanks(3, "ring")
    )
    (graph,) = report.graphs
    rings = [site.site for site in graph.parallel.sites if site.exchange == plans.RING]
    assert rings == ["causal", "prompt", "joint", "outer"]
    steps = [site for site in graph.plan.sites if site.call.logsumexp]
    assert [site.name for site in steps] == [name for name in rings for _ in range(3)]
    for step in steps:
        assert step.chosen == "native"
        ((name, refused),) = step.refusals
        assert name == "flex"
        assert "flex does not return the log-sum-exp of the scores, which a ring" in str(refused)
        assert 'Give ContextParallel the kind "ulysses"' in str(refused)
    assert "ring: keys and values go from rank to rank" in str(report)
    assert attnrewrite.Report.from_json(report.to_json()).to_json() == report.to_json()


def test_at_the_command_line(capsys):
    main(["explain", "--context-parallel", "4"])
    assert "context parallelism over 4 ranks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["explain", "--context-parallel", "1"])
    assert "--context-parallel 1: give 2 devices or more" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "kind", "text"), [("2", TypeError, "is '2' (str)"), (1, ValueError, "is 1: give")])
def test_a_number_of_devices(given, kind, text):
    with pytest.raises(kind) as raised:
        attnrewrite.explain(torch.nn.Identity(), torch.ones(2), backend="native", context_parallel=given)
    assert text in str(raised.value)
