"""`explain`: reports which attentions of a model would be swapped, and why not, without running or compiling a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ..graphs.tracing import AttributesOf, predicted, traced, uncompiled
from ..kernels.machines import Machine
from ..planning.planner import Libraries, refuse
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
    """Traces `model(*args, **kwargs)` and reports what `backend` would do at each attention, without running a kernel.

        print(attnrewrite.explain(model, *inputs, backend=["flash", "native"]))

    model: a module or a function; on the "meta" device it needs no memory. For an inference call `explain` under
        `torch.no_grad()`, as you would call the model: a kernel may refuse a call that needs a gradient.
    args, kwargs: the inputs of the model.
    backend: the object from `with_backend`, or its choices: a name, a record, or several in order of preference.
    machine: a description of the machine to plan for, which may be elsewhere. None: the one that the tensors are on.

    Returns a `Report`. No graph runs: each returns zeros of the right shape, so that tracing goes on after a graph break. Code
    outside of any graph does run, on those zeros. The model, its buffers and PyTorch's compile caches stay unchanged.

    Raises the errors of `with_backend`, and under `strict` an `AttentionRefusedError` that names every refused site of the
    model, not only those of its first graph.
    """
    backend = compiler_of(backend)
    strict = backend.policy_now().strict
    planner = AttentionCompiler(backend.policy, backend.inner, machine, lenient=True)

    def plan_only(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        planner.rewrite(graph_module, Libraries.PLAN_ONLY)
        return predicted(graph_module)

    with AttributesOf(uncompiled(model)):
        traced(model, args, kwargs, plan_only)
    planner.check_rules()
    if strict:
        refuse(planner.report.sites)
    return planner.report
