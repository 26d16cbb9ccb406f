"""`make_plan`: decides which kernel takes each call, by the policy and the machine of the call."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from ..graphs.questions import asking
from ..kernels.calls import AttentionCall
from ..kernels.decisions import Accepted, Code, Decision, Refused
from ..kernels.machines import Machine, is_machine
from ..kernels.records import Backend
from ..kernels.sources import Source, SourceError, library, load
from .measurements import Inexact
from .plans import Plan
from .policies import Policy
from .reasons import decide
from .sites import Site


class AttentionRefusedError(RuntimeError):
    """Raised under `strict=True` if no choice may take a site. The message names the site and every reason."""


class Libraries(Enum):
    """Whether `make_plan` loads the libraries of the kernels that it chooses."""

    LOAD = "load"  # load them; a kernel whose library cannot be loaded is refused
    NAME = "name"  # load nothing: the graph runs on another machine, whose packages tell the library and its version
    PLAN_ONLY = "plan only"  # load and name nothing: no call will be swapped


def make_plan(
    calls: Sequence[AttentionCall],
    policy: Policy,
    machines: Sequence[Machine],
    libraries: Libraries = Libraries.PLAN_ONLY,
) -> Plan:
    """Decides which kernel takes each call; `machines` has the machine of each call. Side effects: the guards that `holds`
    records; under `Libraries.LOAD` also the libraries that are loaded, and the measurements of "tune".

    Raises `AttentionRefusedError` if the policy is strict and no choice may take a site, `TypeError` for what is no machine.
    """
    for machine in machines:
        is_machine(machine)
    loaded: dict[Source, str | Refused] = {}
    sites = tuple(
        _site(call, policy, machine, libraries, loaded) for call, machine in zip(calls, machines, strict=True)
    )
    if policy.strict:
        refuse(sites)
    return Plan(sites)


def refuse(sites: Sequence[Site]) -> None:
    """Raises `AttentionRefusedError` if some of the sites have no kernel that may take them. A site that "auto" leaves, since
    the model's own code is faster, is a choice and no refusal."""
    refused = [site for site in sites if site.chosen is None and not site.preferred]
    if refused:
        lines = [f"  {site.name}: {name}: {decision}" for site in refused for name, decision in site.refusals]
        raise AttentionRefusedError(
            f"strict=True, and {len(refused)} of {len(sites)} attention sites have no kernel that may take them:\n"
            + "\n".join(lines)
        )


def _site(
    call: AttentionCall,
    policy: Policy,
    machine: Machine,
    libraries: Libraries,
    loaded: dict[Source, str | Refused],
) -> Site:
    taken: list[tuple[str, Decision]] = []
    rule = policy.rule_for(call)
    for candidate in policy.candidates(call, machine, measure=libraries is Libraries.LOAD):
        backend = candidate.on(machine)
        with asking(call.site, candidate.name):
            decision = decide(backend, call, machine, policy.numerics, policy.cast)
        if candidate.keeps is not None and isinstance(decision, Accepted):
            decision = Refused(Code.PREFERENCE, candidate.keeps, "Name a kernel to replace the call")
        source: str | None = None
        if isinstance(decision, Accepted) and backend.source is not None:
            if libraries is Libraries.NAME:
                source = backend.source.on(machine.packages)
            elif libraries is Libraries.LOAD:
                found = _loaded(backend.source, policy.trust_remote_code, loaded)
                refused = found if isinstance(found, Refused) else lacking(backend, found, call, machine)
                decision = refused or decision
                source = None if refused is not None else str(found)
        taken.append((candidate.name, decision))
        if isinstance(decision, Accepted):
            return Site(
                call, tuple(taken), candidate.name, rule, source, backend, candidate.note, candidate.stale,
                inexact=Inexact.of(backend, candidate.error),
            )  # fmt: skip
    return Site(call, tuple(taken), None, rule)


def lacking(backend: Backend, source: str, call: AttentionCall, machine: Machine) -> Refused | None:
    """Why the loaded library lacks the kernel of this call on this machine; None if it has the kernel."""
    return backend.library_check(library(source), call, machine) if backend.library_check else None


def _loaded(source: Source, trust: bool, loaded: dict[Source, str | Refused]) -> str | Refused:
    """The name and version of a loaded library, or why it does not load. Each library is tried once per plan."""
    if source not in loaded:
        try:
            loaded[source] = load(source, trust)
        except SourceError as error:
            loaded[source] = error.refused
    return loaded[source]
