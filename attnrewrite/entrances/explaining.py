"""`explain`: reports which attentions of a model would be swapped, and why not, without running or compiling a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ..graphs.eager_calls import EagerCalls
from ..graphs.tracing import AttributesOf, asks_for_values, predicted, told, traced, uncompiled
from ..kernels.machines import Machine
from ..parallel.settings import DescribedRanks
from ..planning.planner import Libraries
from ..reports.report import Report
from .choices import Choices
from .compilers import AttentionCompiler, compiler_of
from .model_parts import can_run, tensors_of
from .strictness import hold_strictly


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: AttentionCompiler | Choices,
    machine: Machine | None = None,
    context_parallel: int | DescribedRanks | None = None,
    **kwargs: Any,
) -> Report:
    """Traces `model(*args, **kwargs)` and reports what `backend` would do at each attention, without running a kernel.

        print(attnrewrite.explain(model, *inputs, backend=["flash", "native"]))

    model: a module or a function; on the "meta" device it needs no memory. For an inference call `explain` under
        `torch.no_grad()`, as you would call the model: a kernel may refuse a call that needs a gradient.
    args, kwargs: the inputs of the model.
    backend: the object from `with_backend`, or its choices: a name, a record, or several in order of preference.
    machine: a description of the machine to plan for, which may be elsewhere. None: the one that the tensors are on.
    context_parallel: the number of devices that share the model, which may be elsewhere too, or a `DescribedRanks` with a kind
        and rates: the report says what each of them has a part of, what they exchange, and the estimated part of the time that
        this takes. None: as in `backend`.

    Returns a `Report`. No graph runs: each returns zeros of the right shape, so that tracing goes on after a graph break. Code
    outside of any graph does run, on those zeros. The model, its buffers and PyTorch's compile caches stay unchanged.

    Raises the errors of `with_backend`, `TypeError` for a model that cannot be called (a class, a pipeline), and `RuntimeError`
    for a model that asks for values of tensors which are on "meta". Under `strict` it raises, for the whole model and not only
    its first graph, an `AttentionRefusedError` that names every refused site or says that there is no attention, and
    `ValueError` for a rule that matches no site.
    """
    can_run(model)
    backend = compiler_of(backend)
    strict = backend.policy_now().strict
    planner = AttentionCompiler(
        backend.policy, backend.inner, machine, lenient=True, context_parallel=_described(context_parallel, backend)
    )

    def plan_only(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        planner.rewrite(graph_module, Libraries.PLAN_ONLY)
        call = predicted(graph_module)

        def uncounted(*inputs: Any) -> Any:
            with eager.held():
                return call(*inputs)

        return uncounted

    try:
        with AttributesOf(uncompiled(model)), EagerCalls() as eager:
            traced(model, args, kwargs, plan_only)
    except RuntimeError as error:
        if any(each.is_meta for each in tensors_of(model, args, kwargs)) and asks_for_values(error):
            raise RuntimeError(_not_on_meta(model, error)) from None
        raise
    planner.report.eager_calls[:] = eager.found
    planner.check_rules()
    if strict:
        hold_strictly(planner.report)
    return planner.report


def _not_on_meta(model: Any, error: RuntimeError) -> str:
    name = getattr(model, "__qualname__", None) or type(getattr(model, "_orig_mod", model)).__name__
    what, place = told(error)
    at = f" ({place})" if place else ""
    return (
        f"{name} does not trace on meta{at}: run it on CPU with machine=, which plans for a machine that is elsewhere. "
        f"PyTorch says: {what}"
    )


def _described(given: int | DescribedRanks | None, backend: AttentionCompiler) -> DescribedRanks | None:
    """The devices to plan for: explaining runs no exchange, so no rank waits for another."""
    if given is None:
        own = backend.context_parallel
        return None if own is None else DescribedRanks(own.ranks.size, own.kind)
    return given if isinstance(given, DescribedRanks) else DescribedRanks(given)
