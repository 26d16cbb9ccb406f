"""`explain`: what would be swapped in a model, and why not, without running a kernel or compiling one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from ..graphs.tracing import AttributesOf, predicted, traced, uncompiled
from ..kernels.machines import Machine
from ..planning.planner import Libraries
from ..reports.report import Report
from .choices import Choices
from .compilers import AttentionCompiler, compiler_of


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: AttentionCompiler | Choices,
    machine: Machine | None = None,
    **kwargs: Any,
) -> Report:
    """Traces `model(*args, **kwargs)` and reports what `backend` would do at each attention.

    backend: the object from `with_backend`, or what it takes: a name, a record, or several in order of preference. A
        strict policy is explained too: it does not raise here.
    machine: a described machine plans for hardware that is not there; None: the one that the tensors are on. A model on
        the "meta" device needs no memory.

    No graph is run: each returns zeros of the right shape, so that tracing goes on behind a graph break. Code that stands
    outside any graph does run, on those zeros. The model, its buffers and PyTorch's compile caches are left as they were.
    Call it under `torch.no_grad()` for an inference, as the model itself: gradients are part of the question.
    """
    backend = compiler_of(backend)
    planner = AttentionCompiler(replace(backend.policy, strict=False), backend.inner, machine)

    def plan_only(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        planner.rewrite(graph_module, Libraries.PLAN_ONLY)
        return predicted(graph_module)

    with AttributesOf(uncompiled(model)):
        traced(model, args, kwargs, plan_only)
    planner.check_rules()
    return planner.report
