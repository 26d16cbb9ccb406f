"""`rewrite` and `export`: exported programs, and plain graph modules, with swapped kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.fx import GraphModule

from ..entrances.choices import Choice, Choices, Rules, Settings, make_policy, several
from ..graphs.exported import copied, updated
from ..graphs.notes import erase_notes, note_literal
from ..graphs.questions import noted
from ..kernels.machines import Machine
from ..pipeline import Target, rewrite_graph
from ..planning.planner import Libraries
from ..planning.policies import Policy
from ..reports.report import GraphReport, Report
from .assertions import insert_assertions
from .conditions import conditions

if TYPE_CHECKING:
    from typing_extensions import Unpack

RECORD = "attnrewrite"  # in the metadata of the graph module of a rewritten program


@dataclass(frozen=True)
class Record:
    """What a rewritten program knows of itself: the report, what its checks say, and the program that it was made of (which
    has the same weights), so that another choice starts from there. `fingerprint`: the graph that the rewrite gave. Where
    somebody has changed it since (a decomposition, a pass), it starts from what that gave."""

    report: Report
    checks: tuple[str, ...]
    original: Callable[[], Any]
    fingerprint: int


def rewrite(
    program: ExportedProgram | GraphModule,
    *choices: Choice,
    rules: Rules | None = None,
    machine: Machine | None = None,
    **settings: Unpack[Settings],
) -> Any:
    """The program with each attention given to the first of `choices` that may take it; the given one is not changed.

        program = attnrewrite.rewrite(torch.export.export(model, args), "flash_4", "native")

    program: an `ExportedProgram`, as exported or decomposed, or an `fx.GraphModule` whose nodes have fake values. Parameters
        and buffers are shared with the given one. One that was rewritten before, and not changed since, is taken as it was
        before that.
    choices, rules, strict, numerics, cast, trust_remote_code: as in `with_backend`.
    machine: None: the one that the tensors are on. A described one (`Machine("cuda", capability=(9, 0), packages={...})`)
        prepares the program for hardware that is elsewhere: `attnrewrite.load(path, device="cuda")` there.

    What was asked about symbolic sizes, and the dtype and device of the inputs, is checked at every call of the result; a
    call for which the kernels were not chosen raises `AttentionAssertionError`. `report_of` has the plan.

    Raises `TypeError` if `program` is neither, `ValueError` as `with_backend`, `AttentionRefusedError` if strict.
    """
    policy = program_policy(choices, rules, settings)
    if isinstance(program, ExportedProgram):
        return rewrite_program(program, policy, machine)
    if not isinstance(program, GraphModule):
        raise TypeError(
            f"program is {type(program).__name__}: give a torch.export.ExportedProgram or an fx.GraphModule; "
            "attnrewrite.export(model, ...) exports and rewrites in one call"
        )
    module = copy_of(program)
    outcome = rewrite_graph(module, policy, Target(machine), _libraries(machine))
    report = Report(str(policy))
    report.add(GraphReport.of("graph", outcome))
    module.meta[RECORD] = Record(report, (), lambda: program, fingerprint(module))
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
    """`torch.export.export`, then `rewrite`. Gradients are not part of the program: it is traced under `torch.no_grad()`.

    backend: a name or a record, or several in order of preference. settings: those of `rewrite` (rules, strict, numerics,
    cast, trust_remote_code). Raises what `torch.export.export` and `rewrite` raise.
    """
    policy = program_policy(several(backend), rules, settings)  # a wrong name is told before minutes of tracing
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return rewrite_program(program, policy, machine)


def program_policy(choices: Iterable[Choice], rules: Rules | None, settings: Settings) -> Policy:
    """As `make_policy`. Raises `TypeError` for `checks` too: the ops that check values stand in no program."""
    if "checks" in settings:
        raise TypeError(
            "checks looks at values under torch.compile: use with_backend(..., checks=True), or attnrewrite.check"
        )
    return make_policy(choices, rules, **settings)


def report_of(program: ExportedProgram | GraphModule) -> Report:
    """The report of a rewritten program. Raises `ValueError` for one that was not rewritten."""
    record = record_of(program)
    if record is None:
        raise ValueError(
            "this program has no report: it comes neither from attnrewrite.rewrite nor from attnrewrite.load"
        )
    return record.report


def record_of(program: ExportedProgram | GraphModule) -> Record | None:
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    found: Record | None = module.meta.get(RECORD)
    return found


def original_of(program: ExportedProgram) -> ExportedProgram:
    """The program before any rewriting of ours, where that is known."""
    record = record_of(program)
    known = record is not None and record.fingerprint == fingerprint(program.graph_module)
    return record.original() if record is not None and known else program


def fingerprint(module: GraphModule) -> int:
    """Of every node: its name, what it calls, what it reads."""
    return hash(
        tuple(
            (node.name, str(node.target), tuple(each.name for each in node.all_input_nodes))
            for node in module.graph.nodes
        )
    )


def rewrite_program(given: ExportedProgram, policy: Policy, machine: Machine | None) -> ExportedProgram:
    program = original_of(given)
    module = copy_of(program.graph_module)
    _name_literals(module, program)
    before = _outputs(module)
    ranges = program.range_constraints
    with noted(module, ranges) as questions:
        outcome = rewrite_graph(module, policy, Target(machine, exported=True), _libraries(machine))
        device = machine.torch_device if machine is not None else None
        needed = conditions(questions, outcome.swapped, ranges)
    checks = insert_assertions(
        module, program.graph_signature, needed, outcome.swapped, device, _trainable(program), ranges
    )
    erase_notes(module.graph)
    signature = _renamed(program.graph_signature, before, _outputs(module))
    report = Report(str(policy))
    report.add(GraphReport.of("program", outcome))
    made = updated(program, module, signature)
    made.graph_module.meta[RECORD] = Record(report, checks, lambda: program, fingerprint(made.graph_module))
    return made


def _libraries(machine: Machine | None) -> Libraries:
    """A program for a described machine runs there: here its libraries may be missing."""
    return Libraries.LOAD if machine is None else Libraries.NAME


def copy_of(module: GraphModule) -> GraphModule:
    """A copy whose graphs may be changed, without the record."""
    record = module.meta.pop(RECORD, None)
    try:
        return copied(module)
    finally:
        if record is not None:
            module.meta[RECORD] = record


def _name_literals(module: GraphModule, program: ExportedProgram) -> None:
    """A number that the model writes as a tensor is an input of the graph: a constant all the same."""
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
    """The signature names outputs by their nodes: a swapped one may be among them."""
    renamed = copy.deepcopy(signature)
    for spec, old, new in zip(renamed.output_specs, before, after, strict=True):
        if old is not new and getattr(spec.arg, "name", None) == getattr(old, "name", ""):
            spec.arg.name = new.name
    return renamed
