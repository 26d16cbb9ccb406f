"""Programs as files: `save`, `load`, `retarget`, `explain_file`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from ..entrances.choices import Choice, Rules, Settings, make_policy
from ..files import whole
from ..graphs.questions import noted
from ..kernels.machines import Machine
from ..pipeline import Target, rewrite_graph
from ..planning.planner import Libraries
from ..reports.report import GraphReport, Report
from .archives import EXTRA, MODEL, Archive, ProgramFileError, graph_text, loaded, opened, with_graph
from .manifests import MANIFEST, ORIGINAL, Manifest, check_machine, manifest_of
from .programs import RECORD, Record, copy_of, fingerprint, original_of, program_policy, record_of, rewrite_program

if TYPE_CHECKING:
    from typing_extensions import Unpack

Path_ = str | os.PathLike[str]


def save(program: ExportedProgram, path: Path_) -> None:
    """`torch.export.save`, with the plan, the versions, and the graph as it was before any swap as extra files.

    The file is written whole or not at all. `torch.export.load` reads it too, after `import attnrewrite`. Raises `TypeError`
    if `program` is no `ExportedProgram`.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program is {type(program).__name__}: give a torch.export.ExportedProgram")
    record, original = record_of(program), original_of(program)
    with whole(path, ".pt2") as temporary, _without_record(program):
        extras = _extras(record, None if original is program else original)
        extra = {name.removeprefix(EXTRA): text.decode() for name, text in extras.items()}
        torch.export.save(program, temporary, extra_files=extra)


def load(path: Path_, device: str | torch.device | None = None, *, trust_remote_code: bool = False) -> ExportedProgram:
    """The program of a file, ready for this machine.

        step = attnrewrite.load("model.pt2", device="cuda").module()

    device: where to move weights, constants and the tensors that the graph makes; None: where they were.
    trust_remote_code: as in `with_backend`, for a kernel of the hub.

    It needs no source of the model. The libraries behind the chosen kernels are loaded, and no others. What differs from the
    machine that it was made on, and may, is said in a warning. Nothing is unpickled but what `torch.export.load` itself does.

    Raises `ProgramFileError`, which names the file, what is expected and what was found: no such file, a truncated one, one of
    a newer format; a kernel's library that is missing or of another version; another device or compute capability than the
    kernels were chosen for.
    """
    with opened(path) as archive:
        archive.program()
        manifest = _manifest(archive)
        original = archive.read(ORIGINAL)
    if manifest is not None and (differing := check_machine(manifest, path, trust_remote_code)):
        warnings.warn(f"{path}: {'; '.join(differing)}", stacklevel=2)
    program = moved(loaded(path), device)
    if manifest is not None:
        program.graph_module.meta[RECORD] = Record(
            manifest.report,
            manifest.checks,
            lambda: moved(with_graph(program, original), device) if original else program,
            fingerprint(program.graph_module),
        )
    return program


def retarget(
    source: Path_,
    target: Path_,
    *choices: Choice,
    rules: Rules | None = None,
    machine: Machine | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Writes `source`, a saved program of ours or of anybody, with other kernels to `target`, which may be the same file.

        attnrewrite.retarget("model.pt2", "hopper.pt2", "flash_4", "native", machine=attnrewrite.Machine("cuda", (9, 0), {...}))

    choices and the rest: as in `rewrite`. It starts from the graph as it was before any swap. So "native" alone is the way
    back: its `numerics` is then "exact", and the result is that of the original, bit for bit. `machine` None: the one that the
    program was made for, or, of a stranger's file, the one that its tensors are on.

    Weights go from file to file in pieces and are never in memory. Returns the report. Raises `ProgramFileError` and what
    `rewrite` raises; `target` is then as it was.
    """
    if choices == ("native",) and not rules:
        settings.setdefault("numerics", "exact")
    policy = program_policy(choices, rules, settings)
    with opened(source) as archive:
        program = _graph(archive)
        manifest = _manifest(archive)
        made = rewrite_program(program, policy, machine or (manifest.machine if manifest else None))
        record = record_of(made)
        assert record is not None
        changed = {MODEL: graph_text(made), **_extras(record, program)}
        with whole(target, ".pt2") as temporary:
            archive.copy(temporary, changed)
    return record.report


def explain_file(path: Path_, *choices: Choice, machine: Machine | None = None) -> Report:
    """The report of a saved program; with `choices`, or for a program that was not rewritten, what they would do to it (all by
    "native" if there are none). Loads no weights and no kernel. Raises `ProgramFileError`."""
    with opened(path) as archive:
        manifest = _manifest(archive)
        if manifest is not None and not choices:
            return manifest.report
        archive.program()
        program = _graph(archive)
    target = machine or (manifest.machine if manifest else None)
    return planned(program, choices or ("native",), target)


def planned(program: ExportedProgram, choices: Iterable[Choice], machine: Machine | None) -> Report:
    """What a rewrite would report, without loading a library."""
    policy = make_policy(choices)
    module = copy_of(program.graph_module)
    with noted(module, program.range_constraints):
        outcome = rewrite_graph(module, policy, Target(machine, exported=True), Libraries.PLAN_ONLY)
    report = Report(str(policy))
    report.add(GraphReport.of("program", outcome))
    return report


def moved(program: ExportedProgram, device: str | torch.device | None) -> ExportedProgram:
    if device is None:
        return program
    from torch.export.passes import move_to_device_pass

    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        # Nodes that name a device stand for that one alone: AOTInductor finds "cuda" unequal to a tensor's "cuda:0".
        place = torch.device("cuda", torch.cuda.current_device())
    return move_to_device_pass(program, str(place))


def _manifest(archive: Archive) -> Manifest | None:
    text = archive.read(MANIFEST)
    return None if text is None else Manifest.from_json(text, archive.path)


def _graph(archive: Archive) -> ExportedProgram:
    """Before any swap, with weights that take no memory."""
    program = archive.graph()
    original = archive.read(ORIGINAL)
    return program if original is None else with_graph(program, original)


def _extras(record: Record | None, original: ExportedProgram | None) -> dict[str, bytes]:
    if record is None:
        return {}
    plan = {MANIFEST: manifest_of(record.report, record.checks).to_json().encode()}
    return plan if original is None else {**plan, ORIGINAL: graph_text(original)}


class _without_record:
    """A record is no metadata that torch.export could save."""

    def __init__(self, program: ExportedProgram) -> None:
        self.meta: dict[str, Any] = program.graph_module.meta

    def __enter__(self) -> None:
        self.record = self.meta.pop(RECORD, None)

    def __exit__(self, *_: object) -> None:
        if self.record is not None:
            self.meta[RECORD] = self.record


__all__ = ["ProgramFileError", "explain_file", "load", "retarget", "save"]
