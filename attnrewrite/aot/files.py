"""Exported programs in .pt2 files: `save`, `load`, `retarget`, `explain_file`."""

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
from ..kernels.flags import are_flags
from ..kernels.machines import Machine, known_machine
from ..pipeline import Target, rewrite_graph
from ..planning.planner import Libraries
from ..reports.report import GraphReport, Report
from .archives import EXTRA, MODEL, NAME, Archive, ProgramFileError, graph_text, loaded, opened, with_graph
from .manifests import MANIFEST, ORIGINAL, Manifest, check_machine, manifest_of
from .programs import RECORD, Record, copy_of, fingerprint, original_of, program_policy, record_of, rewrite_program

if TYPE_CHECKING:
    from typing_extensions import Unpack

Path_ = str | os.PathLike[str]


def save(program: ExportedProgram, path: Path_) -> None:
    """Writes an exported program to a .pt2 file, as `torch.export.save` does.

        attnrewrite.save(program, "model.pt2")

    program: an `ExportedProgram`. For a rewritten program the file also holds, as extra files, its plan with the versions of
        attnrewrite and torch, and its graph before any swap.
    path: the file to write. It is written whole or not at all.

    `torch.export.load` reads the file too, after `import attnrewrite`. Raises `TypeError` if `program` is no `ExportedProgram`.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program is {type(program).__name__}: give a torch.export.ExportedProgram")
    record, original = record_of(program), original_of(program)
    with whole(path, NAME) as temporary, _without_record(program):
        extras = _extras(record, None if original is program else original)
        extra = {name.removeprefix(EXTRA): text.decode() for name, text in extras.items()}
        torch.export.save(program, temporary, extra_files=extra)


def load(path: Path_, device: str | torch.device | None = None, *, trust_remote_code: bool = False) -> ExportedProgram:
    """Loads an exported program from a .pt2 file, after checking that this machine has the kernels in it.

        step = attnrewrite.load("model.pt2", device="cuda").module()

    path: a file of `attnrewrite.save` or `torch.export.save`. The model's source is not needed.
    device: the device to move weights, constants and the tensors made by the graph to. None: the devices in the file.
    trust_remote_code: as in `with_backend`, for a kernel of the kernels hub.

    Returns the `ExportedProgram`. Only the libraries behind the chosen kernels are imported, and only what `torch.export.load`
    unpickles is unpickled. Another version of torch or attnrewrite, or another GPU of the same compute capability, gives a
    warning.

    Raises `ProgramFileError`, which names the file, the expected and the found content: the file is missing, truncated or of a
    newer format; a kernel's library is missing or of another version; the kernels were chosen for another device or compute
    capability.
    """
    are_flags(trust_remote_code=trust_remote_code)
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
    """Swaps the attention kernels of a saved program, from file to file, without the model's source.

        attnrewrite.retarget("model.pt2", "hopper.pt2", "flash_4", "native", machine=attnrewrite.Machine("cuda", (9, 0), {...}))

    source: a .pt2 of `attnrewrite.save` or `torch.export.save`.
    target: the file to write; it may be `source`.
    choices, rules, settings: as in `rewrite`. They apply to the graph before any swap. "native" alone, without rules, therefore
        restores the original: `numerics` is then "exact", and results equal the original's bit for bit.
    machine: as in `rewrite`. None: the machine that the program was rewritten for, or else the machine of its tensors.

    Weights are copied in chunks and are never in memory as a whole. Returns the report. Raises `ProgramFileError` and what
    `rewrite` raises; `target` is then unchanged.
    """
    if choices == ("native",) and not rules:
        settings.setdefault("numerics", "exact")
    policy = program_policy(choices, rules, settings)
    known_machine(machine)
    with opened(source) as archive:
        program = _graph(archive)
        manifest = _manifest(archive)
        made = rewrite_program(program, policy, machine or (manifest.machine if manifest else None))
        record = record_of(made)
        assert record is not None
        changed = {MODEL: graph_text(made), **_extras(record, program)}
        with whole(target, NAME) as temporary:
            archive.copy(temporary, changed)
    return record.report


def explain_file(path: Path_, *choices: Choice, machine: Machine | None = None) -> Report:
    """Returns the report of a saved program, without loading its weights or a kernel.

        print(attnrewrite.explain_file("model.pt2"))

    path: a .pt2 of `attnrewrite.save` or `torch.export.save`, or a package of `aot_compile` (without `choices`).
    choices: plan the program for these kernels instead of returning the plan in the file. Without choices, a program that was
        not rewritten is planned for "native".
    machine: the machine to plan for. None: as in `retarget`.

    Raises `ProgramFileError`, and `ValueError` as `with_backend`.
    """
    known_machine(machine)
    with opened(path) as archive:
        manifest = _manifest(archive)
        if manifest is not None and not choices:
            return manifest.report
        archive.program()
        program = _graph(archive)
    target = machine or (manifest.machine if manifest else None)
    return planned(program, choices or ("native",), target)


def planned(program: ExportedProgram, choices: Iterable[Choice], machine: Machine | None) -> Report:
    """Returns the report that a rewrite would give, without loading a library."""
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
        # AOTInductor compares devices literally: a node's "cuda" is not equal to a tensor's "cuda:0".
        place = torch.device("cuda", torch.cuda.current_device())
    return move_to_device_pass(program, str(place))


def _manifest(archive: Archive) -> Manifest | None:
    text = archive.read(MANIFEST)
    return None if text is None else Manifest.from_json(text, archive.path)


def _graph(archive: Archive) -> ExportedProgram:
    """The program before any swap, with placeholder weights, which take no memory."""
    program = archive.graph()
    original = archive.read(ORIGINAL)
    return program if original is None else with_graph(program, original)


def _extras(record: Record | None, original: ExportedProgram | None) -> dict[str, bytes]:
    if record is None:
        return {}
    plan = {MANIFEST: manifest_of(record.report, record.checks).to_json().encode()}
    return plan if original is None else {**plan, ORIGINAL: graph_text(original)}


class _without_record:
    """Removes the record from the program's metadata for a while: torch.export cannot save it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.meta: dict[str, Any] = program.graph_module.meta

    def __enter__(self) -> None:
        self.record = self.meta.pop(RECORD, None)

    def __exit__(self, *_: object) -> None:
        if self.record is not None:
            self.meta[RECORD] = self.record


__all__ = ["ProgramFileError", "explain_file", "load", "retarget", "save"]
