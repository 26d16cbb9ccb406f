"""`portable`: exported programs for other tools, as ONNX, OpenVINO and ExecuTorch."""

from __future__ import annotations

from dataclasses import replace

from torch.export import ExportedProgram
from torch.fx import GraphModule

from ..entrances.choices import Rules, make_policy
from ..kernels.decisions import Code, Refused
from ..planning.plans import Plan
from ..planning.policies import Policy
from ..planning.sites import Site
from .check_ops import is_assertion
from .programs import Draft, drafted, finished, original_of, program_policy

# PyTorch's operators that these tools read: SDPA itself, and products and a softmax.
PORTABLE = ("native", "_native_math")


def portable(program: ExportedProgram, *choices: str, rules: Rules | None = None) -> ExportedProgram:
    """Returns a copy of an exported program for another tool: no checks, and only operators that others read.

        program = attnrewrite.portable(torch.export.export(model, args))
        torch.onnx.export(program, dynamo=True).save("model.onnx")

    program: an `ExportedProgram`, also one that was rewritten: its kernels are then replaced. It is not changed; the copy
        shares its weights.
    choices: "_native_math" (the default: products and a softmax, right in every tool that docs/aot.md lists) or "native" (one
        call of SDPA, which some tools have a kernel for: ONNX from opset 23 on). Where a lowered program holds a kernel of
        PyTorch's, "native" is "_native_math".
    rules: as in `rewrite`, with the same choices.

    An attention in tensor operations becomes the choice too. One whose swap rests on a condition on sizes, which a program
    without checks does not hold, stays as it was; `report_of` says which. Dtypes, ranks and ranges of the inputs are for the
    tool to check.

    Raises `TypeError` if `program` is no `ExportedProgram`, `ValueError` for another choice.
    """
    policy = program_policy(choices or ("_native_math",), rules, {})
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program is {type(program).__name__}: give a torch.export.ExportedProgram, as torch.export.export and "
            "attnrewrite.export return it"
        )
    for chosen in (*policy.choices, *(each for _, several in policy.rules for each in several)):
        if chosen.name not in PORTABLE:
            raise ValueError(f"portable takes {' or '.join(map(repr, PORTABLE))}, not {chosen.name!r}: others lack it")
    original = original_of(program)
    draft = drafted(original, policy, None)
    math = make_policy(["_native_math"]).choices
    lowered = {site.name: math for site in draft.outcome.plan.sites if _stays_lowered(site)}
    if lowered:
        policy = replace(policy, rules=(*lowered.items(), *policy.rules))
        draft = drafted(original, policy, None)
    resting: dict[str, tuple[str, str]] = {}  # site: its kernel, and the condition
    while draft.needed:
        resting |= _resting(draft)
        draft = drafted(original, _without(policy, resting), None)
    _erase_checks(draft.module)
    return finished(original, _explained(draft, resting), policy, ())


def _stays_lowered(site: Site) -> bool:
    """Whether `native` leaves a kernel of PyTorch's that a lowered program holds: others lack it."""
    return site.chosen == "native" and site.call.written_as == "kernel"


def _resting(draft: Draft) -> dict[str, tuple[str, str]]:
    """The sites whose swap rests on a condition, each with its kernel and the condition."""
    found = {site: (kernel, str(each.relation)) for each in draft.needed for site, kernel in each.needed_by if site}
    if found:
        return found
    relation = str(draft.needed[0].relation)  # asked for a mask that several sites may share
    return {each.call.site: (each.site.chosen or "", relation) for each in draft.outcome.swapped}


def _without(policy: Policy, sites: dict[str, tuple[str, str]]) -> Policy:
    """The policy, with no choice for some sites."""
    return replace(policy, rules=(*((site, ()) for site in sites), *policy.rules))


def _explained(draft: Draft, resting: dict[str, tuple[str, str]]) -> Draft:
    sites = []
    for site in draft.outcome.plan.sites:
        if site.name in resting:
            kernel, relation = resting[site.name]
            detail = f"{kernel} is right where {relation}, and a portable program has no check"
            refused = Refused(Code.CONTEXT, detail, "The call stays as it is in the model")
            site = replace(site, decisions=((kernel, refused),), rule=None)
        sites.append(site)
    return replace(draft, outcome=replace(draft.outcome, plan=Plan(tuple(sites))))


def _erase_checks(module: GraphModule) -> None:
    """Erases the checks that are left in a program that was rewritten and then changed, by a decomposition say."""
    for each in module.modules():
        if isinstance(each, GraphModule):
            for node in [node for node in each.graph.nodes if is_assertion(node)]:
                each.graph.erase_node(node)
            each.recompile()


__all__ = ["portable"]
