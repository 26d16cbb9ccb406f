"""`Manifest`: the plan and the versions in a saved program or package, and the check whether this machine can run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.machines import Machine, installed
from ..kernels.records import Backend
from ..kernels.sources import Hub, Package, SourceError, library, version_in
from ..planning.registry import records_of
from ..planning.sites import Site
from ..planning.this_machine import machine_of
from ..reports.report import Report
from ..version import __version__
from .archives import ProgramFileError

FORMAT = 1
MANIFEST = "extra/attnrewrite.json"
ORIGINAL = "extra/attnrewrite_original_graph.json"


@dataclass(frozen=True)
class Manifest:
    """The description of a program that is saved with it."""

    attnrewrite: str  # the version that wrote the file
    torch: str  # the version that wrote the file
    report: Report  # the plan, with the machine that it is for
    checks: tuple[str, ...] = ()  # a sentence for each check in the graph
    python: tuple[str, ...] = ()  # "site (kernel)" for each kernel that needs a Python process

    @property
    def machine(self) -> Machine | None:
        return next((graph.machine for graph in self.report.graphs if graph.machine), None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The library behind each chosen kernel, with its version or commit."""
        return tuple(dict.fromkeys(site.source for site in self.report.sites if site.source))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "attnrewrite": self.attnrewrite, "torch": self.torch, "sources": self.sources,
            "checks": self.checks, "python": self.python, "report": self.report.to_dict(),
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str | bytes, path: Any) -> Manifest:
        """Raises `ProgramFileError` for a format newer than this attnrewrite reads, and for a text that is no manifest."""
        try:
            data = json.loads(text)
            if data["format"] > FORMAT:
                raise ProgramFileError(
                    f"{path}: it was written by attnrewrite {data['attnrewrite']} in format {data['format']}; "
                    f"attnrewrite {__version__} reads format {FORMAT}. Update attnrewrite"
                )
            report = Report.from_dict(data["report"])
            return Manifest(data["attnrewrite"], data["torch"], report, tuple(data["checks"]), tuple(data["python"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ProgramFileError(
                f"{path}: expected the plan of attnrewrite as JSON, found other text ({error}). Save the program again"
            ) from error


def manifest_of(report: Report, checks: tuple[str, ...], python: tuple[str, ...] = ()) -> Manifest:
    # Without the time that the passes took: equal programs give equal files.
    timeless = replace(report, graphs=[replace(graph, seconds=0.0) for graph in report.graphs])
    return Manifest(__version__, torch.__version__.split("+")[0], timeless, checks, python)


def _machine_like(planned: Machine) -> Machine | None:
    kind = planned.torch_device
    if kind == "cuda" and not torch.cuda.is_available():
        return None
    if kind not in ("cpu", "cuda"):
        return planned  # not checked: other devices report themselves what they cannot run
    return machine_of(torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind))


Installed = Callable[[str], str | None]


def check_machine(
    manifest: Manifest,
    path: Any,
    trust: bool = False,
    here: Callable[[Machine], Machine | None] = _machine_like,
    installed: Installed = installed,
) -> tuple[str, ...]:
    """Checks that this machine has the chosen kernels, and loads the library behind each of them, and nothing else.

    here: returns this machine for a device like that of the given machine, None without such a device.
    installed: returns the version of a distribution, None if it is not installed.

    Returns a sentence for each difference that does not matter: versions of torch and attnrewrite, the name of the GPU. Raises
    `ProgramFileError` where a kernel was chosen for another device or compute capability, or its library is missing, of
    another version, or does not load.
    """
    planned = manifest.machine
    sites = [site for site in manifest.report.sites if _is_bound(site)]
    if not sites or planned is None:
        return _differences(manifest, None)
    found = here(planned)
    remedy = f"Load the file on such a machine, or rewrite it for this one: attnrewrite.retarget({str(path)!r}, ...)"
    named = f"the kernel {sites[0].chosen} of attention site {sites[0].name!r}"
    if found is None:
        raise ProgramFileError(
            f"{path}: {named} was chosen for {planned.device}, this machine has no such device. {remedy}"
        )
    if (found.device, found.capability) != (planned.device, planned.capability):
        raise ProgramFileError(
            f"{path}: {named} was chosen for {_short(planned)}, this machine is {_short(found)} ({found.name}). {remedy}"
        )
    for site in {site.source: site for site in sites if site.source}.values():
        _check_library(site, path, remedy, trust, installed)
    return _differences(manifest, found)


def _check_library(site: Site, path: Any, remedy: str, trust: bool, installed: Installed) -> None:
    text = str(site.source)
    source = next((record.source for record in _records(site) if _is_from(record.source, text)), None)
    needed = f"{path}: the kernel {site.chosen} of attention site {site.name!r} needs {text}"
    if isinstance(source, Package):
        found = installed(source.distribution)
        if found is None:
            raise ProgramFileError(f"{needed}; {source.distribution} is not installed. Install it. {remedy}")
        if text != source.text(found):
            older = _older(found, version_in(text))
            raise ProgramFileError(f"{needed}; {found} is installed{older}. Install the needed version. {remedy}")
    try:
        library(text, trust)
    except SourceError as error:
        raise ProgramFileError(f"{needed}; {error}. {remedy}") from error


def _is_from(source: Any, text: str) -> bool:
    if isinstance(source, Package):
        return source.is_of(text)
    return isinstance(source, Hub) and text.partition("@")[0] == source.repository


def _older(found: str, needed: str) -> str:
    from packaging.version import InvalidVersion, Version

    try:
        return ", which is older" if Version(found) < Version(needed) else ", which is newer"
    except InvalidVersion:
        return ""


def _is_bound(site: Site) -> bool:
    """Whether a site has a kernel that some machines lack: any but `native`."""
    return site.chosen is not None and site.chosen != "native"


def _records(site: Site) -> tuple[Backend, ...]:
    """The records of the site's kernel; empty for a record that a user passed and for a plug-in that is not installed."""
    try:
        return records_of(str(site.chosen))
    except ValueError:
        return ()


def _short(machine: Machine) -> str:
    return str(replace(machine, packages={}, name=""))


def _differences(manifest: Manifest, here: Machine | None) -> tuple[str, ...]:
    planned = manifest.machine
    pairs = [
        ("attnrewrite", manifest.attnrewrite, __version__),
        ("torch", manifest.torch, torch.__version__.split("+")[0]),
    ]
    if planned is not None and here is not None and planned.name:
        pairs.append(("device", planned.name, here.name))
    return tuple(f"{name}: made with {made}, here is {found}" for name, made, found in pairs if made != found)
