"""`rewrite` and `export`: exported programs and plain graph modules with swapped kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx import GraphModule

from ..entrances.choices import Choice, Choices, Rules, Settings, make_policy, several
from ..entrances.model_parts import can_run
from ..entrances.strictness import hold_strictly, without_sites
from ..graphs.exported import copied, updated
from ..graphs.notes import erase_notes, note_literal
from ..graphs.questions import noted
from ..kernels.machines import Machine, known_machine
from ..pipeline import Outcome, Target, rewrite_graph
from ..planning.planner import Libraries
from ..planning.policies import Policy
from ..reports.report import GraphReport, Report
from .assertions import insert_assertions
from .conditions import Condition, conditions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Program = TypeVar("Program", ExportedProgram, GraphModule)

RECORD = "attnrewrite"  # key of the `Record` in the metadata of a rewritten graph module


@dataclass(frozen=True)
class Record:
    """How a program was rewritten. Another rewrite starts from `original`, unless the graph has changed since (by a
    decomposition or a pass): then it starts from the changed graph."""

    report: Report
    checks: tuple[str, ...]  # a sentence for each check in the graph
    original: Callable[[], Any]  # returns the program before the rewrite, which has the same weights
    fingerprint: int  # of the rewritten graph; another value now means that the graph has changed


def rewrite(
    program: ExportedProgram | GraphModule,
    *choices: Choice,
    rules: Rules | None = None,
    machine: Machine | None = None,
    **settings: Unpack[Settings],
) -> Any:
    """Returns a copy of an exported program in which each attention runs the first of `choices` that may take it.

        program = attnrewrite.rewrite(torch.export.export(model, args), "flash_4", "native")

    program: an `ExportedProgram`, before or after decomposition, or an `fx.GraphModule` whose nodes have fake values. It is not
        changed; the copy shares its parameters and buffers. If the program was rewritten before, and its graph has not changed
        since, the rewrite starts from its graph before any swap.
    choices, rules, strict, numerics, cast, trust_remote_code: as in `with_backend`.
    machine: the machine to choose kernels for. None: the machine of the program's tensors. A description, as in
        `Machine("cuda", capability=(9, 0), packages={...})`, prepares the program for another machine, where
        `attnrewrite.load(path, device="cuda")` loads it.

    Returns the type of `program`. `report_of` returns the plan. A rewritten `ExportedProgram` checks at every call its input
    dtypes and devices and the conditions on symbolic sizes that its kernels need, and raises `AttentionAssertionError`.

    Raises `TypeError` for another type of `program`, `ValueError` as `with_backend`, and, under `strict`,
    `AttentionRefusedError` for an attention that no choice may take and for a program without attention, `ValueError` for a
    rule that matches no site.
    """
    policy = program_policy(choices, rules, settings)
    known_machine(machine)
    if isinstance(program, ExportedProgram):
        return rewrite_program(program, policy, machine)
    if not isinstance(program, GraphModule):
        raise TypeError(
            f"program is {type(program).__name__}: give a torch.export.ExportedProgram or an fx.GraphModule; "
            "attnrewrite.export(model, ...) exports and rewrites in one call"
        )
    original = original_of(program)
    module = copy_of(original)
    outcome = rewrite_graph(module, policy, Target(machine), _libraries(machine))
    erase_notes(module.graph)
    report = Report(str(policy))
    report.add(GraphReport.of("graph", outcome))
    _check(report, policy)
    module.meta[RECORD] = Record(report, (), lambda: original, fingerprint(module))
    return module


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    backend: Choices,
    dynamic_shapes: Any = None,
    rules: Rules | None = None,
    machine: Machine | None = None,
    **settings: Unpack[Settings],
) -> ExportedProgram:
    """Exports a model with `torch.export.export` and swaps its attention kernels with `rewrite`.

        program = attnrewrite.export(model, args, backend=["flash_4", "native"])
        attnrewrite.save(program, "model.pt2")

    model: traced under `torch.no_grad()`, so the program computes no gradients.
    args, kwargs: example inputs.
    backend: a name or a record, or several in order of preference.
    dynamic_shapes: as in `torch.export.export`.
    rules, machine, strict, numerics, cast, trust_remote_code: as in `rewrite`.

    Returns the rewritten `ExportedProgram`. Raises what `torch.export.export` and `rewrite` raise.
    """
    can_run(model)
    policy = program_policy(several(backend), rules, settings)  # first: a wrong name raises before minutes of tracing
    known_machine(machine)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return rewrite_program(program, policy, machine)


def program_policy(choices: Iterable[Choice], rules: Rules | None, settings: Settings) -> Policy:
    """As `make_policy`. Raises `TypeError` for `checks` too: no exported program holds the ops that check values."""
    if "checks" in settings:
        raise TypeError(
            "checks is not available for exported programs: use with_backend(..., checks=True) with torch.compile, or "
            "attnrewrite.check"
        )
    return make_policy(choices, rules, **settings)


def report_of(program: ExportedProgram | GraphModule) -> Report:
    """Returns the report of a rewritten program: the plan, with a reason for each attention that kept its kernel.

        print(attnrewrite.report_of(program))

    program: what `rewrite`, `export` or `load` returned. Raises `ValueError` for a program that was not rewritten, `TypeError`
        for what is no program.
    """
    if not isinstance(program, ExportedProgram | GraphModule):
        raise TypeError(
            f"program is {type(program).__name__}: give what attnrewrite.rewrite, attnrewrite.export or attnrewrite.load "
            "returned"
        )
    record = record_of(program)
    if record is None:
        raise ValueError(
            "this program has no report: attnrewrite.rewrite, attnrewrite.export and attnrewrite.load return programs with one"
        )
    return record.report


def record_of(program: ExportedProgram | GraphModule) -> Record | None:
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    found: Record | None = module.meta.get(RECORD)
    return found


def original_of(program: Program) -> Program:
    """The program before any rewrite; the given program if that is not known."""
    record = record_of(program)
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    known = record is not None and record.fingerprint == fingerprint(module)
    return record.original() if record is not None and known else program


def fingerprint(module: GraphModule) -> int:
    """A hash of the name, the target and the inputs of every node."""
    return hash(
        tuple(
            (node.name, str(node.target), tuple(each.name for each in node.all_input_nodes))
            for node in module.graph.nodes
        )
    )


@dataclass(frozen=True)
class Draft:
    """The graph of a program with swapped kernels, before its checks."""

    module: GraphModule
    outcome: Outcome
    needed: tuple[Condition, ...]  # what the swapped kernels need to hold at each call
    outputs: list[Any]  # of the graph before the swap


def rewrite_program(given: ExportedProgram, policy: Policy, machine: Machine | None) -> ExportedProgram:
    program = original_of(given)
    draft = drafted(program, policy, machine)
    device = machine.torch_device if machine is not None else None
    checks = insert_assertions(
        draft.module, program.graph_signature, draft.needed, draft.outcome.swapped, device, _trainable(program),
        program.range_constraints,
    )  # fmt: skip
    return finished(program, draft, policy, checks)


def drafted(program: ExportedProgram, policy: Policy, machine: Machine | None) -> Draft:
    module = copy_of(program.graph_module)
    _name_literals(module, program)
    before = _outputs(module)
    ranges = program.range_constraints
    with noted(module, ranges) as questions:
        outcome = rewrite_graph(module, policy, Target(machine, exported=True), _libraries(machine))
        needed = conditions(questions, outcome.swapped, ranges)
    return Draft(module, outcome, needed, before)


def finished(program: ExportedProgram, draft: Draft, policy: Policy, checks: tuple[str, ...]) -> ExportedProgram:
    """`program` with the graph of the draft. checks: a sentence for each check that was inserted."""
    erase_notes(draft.module.graph)
    signature = _renamed(program.graph_signature, draft.outputs, _outputs(draft.module))
    report = Report(str(policy))
    report.add(GraphReport.of("program", draft.outcome))
    _check(report, policy)
    made = updated(program, draft.module, signature)
    made.graph_module.meta[RECORD] = Record(report, checks, lambda: program, fingerprint(made.graph_module))
    return made


def _check(report: Report, policy: Policy) -> None:
    """Notes the rules that match none, and raises under strict, also for a program without attention."""
    report.unmatched_rules[:] = without_sites(policy, report.sites)
    if policy.strict:
        hold_strictly(report)


def _libraries(machine: Machine | None) -> Libraries:
    """A program for a described machine does not run here, so its libraries may be missing here and are only named."""
    return Libraries.LOAD if machine is None else Libraries.NAME


def copy_of(module: GraphModule) -> GraphModule:
    """Returns a copy whose graphs can be changed, without the record."""
    record = module.meta.pop(RECORD, None)
    try:
        return copied(module)
    finally:
        if record is not None:
            module.meta[RECORD] = record


def _name_literals(module: GraphModule, program: ExportedProgram) -> None:
    """Notes the values of scalar tensors in the model's code: torch.export makes inputs of them, but they are constants."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in module.graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if spec is None or spec.kind is not InputKind.CONSTANT_TENSOR:
            continue
        tensor = program.constants.get(str(spec.target))
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and not tensor.is_complex():
            note_literal(node, tensor.item())


def _trainable(program: ExportedProgram) -> set[str]:
    specs = program.graph_signature.input_specs
    parameters = {
        spec.arg.name: program.state_dict.get(str(spec.target)) for spec in specs if spec.kind is InputKind.PARAMETER
    }
    return {name for name, tensor in parameters.items() if tensor is not None and tensor.requires_grad}


def _outputs(module: GraphModule) -> list[Any]:
    output = module.graph.output_node()
    return list(output.args[0])  # type: ignore[arg-type]


def _renamed(signature: ExportGraphSignature, before: list[Any], after: list[Any]) -> ExportGraphSignature:
    """Returns the graph signature with the new names of outputs: a swap may have replaced the node of an output."""
    renamed = copy.deepcopy(signature)
    for spec, old, new in zip(renamed.output_specs, before, after, strict=True):
        if old is not new and getattr(spec.arg, "name", None) == getattr(old, "name", ""):
            spec.arg.name = new.name
    return renamed
