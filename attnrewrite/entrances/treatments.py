"""The rules and plans that name modules inside a module: modules that they treat alike share compiled code, others must not."""

from __future__ import annotations

import fnmatch
import weakref
from dataclasses import replace
from typing import Any

from torch.nn import Module

from ..graphs.guards import guard_compilation
from ..graphs.modules import called_module, compiled_paths, named
from ..planning.matching import apart, same_end
from ..planning.policies import KINDS, Chosen, Policy
from ..planning.selectors import Planned
from ..planning.sites import Site
from .model_parts import _join


def treatment(policy: Policy, path: str, module: Module) -> Any:
    """The rule for each module inside of `module`, which stands at `path`, and the kernels of a plan that chose others for
    attentions that are alike. Modules with the same rules and kernels may share compiled code."""
    globs = [pattern for pattern, _ in policy.rules if pattern not in KINDS]
    if any("#" in pattern for pattern in globs):  # '#': one of several calls, known only from the graph
        return path
    planned = _apart(policy)
    inside = {name: _join(path, name) for name, _ in named(module)} if globs or planned else {}
    ruled = tuple(
        (name, next((glob for glob in globs if fnmatch.fnmatchcase(full, glob)), None)) for name, full in inside.items()
    )
    return (ruled, *((name, _kernels(full, planned)) for name, full in inside.items())) if planned else ruled


def _apart(policy: Policy) -> list[dict[str, list[Site]]]:
    """For each plan of a policy the sites whose kernels differ from those of an alike site, by the module's path."""
    found = []
    for chosen in (policy.choices, *(choices for _, choices in policy.rules)):
        for each in chosen:
            by_module: dict[str, list[Site]] = {}
            for site in apart(each.plan.sites) if isinstance(each, Planned) else ():
                by_module.setdefault(site.name.partition("#")[0], []).append(site)
            found += [by_module] if by_module else []
    return found


def _kernels(path: str, planned: list[dict[str, list[Site]]]) -> Any:
    """The kernels of each plan for the attentions of the module at `path`."""
    return tuple(
        (
            number,
            site.name.partition("#")[2],
            site.chosen,
            tuple(each.name for each in site.measured if each.dropped is None),
        )
        for number, by_module in enumerate(planned)
        for module in (path, *(each for each in by_module if each != path and same_end(each, path)))
        for site in by_module.get(module, ())
    )


def share(policy: Policy, paths: tuple[str, ...]) -> Policy:
    """The policy for code that several blocks share: a plan gives it what it gives to all of them."""

    def shared(choices: tuple[Chosen, ...]) -> tuple[Chosen, ...]:
        return tuple(replace(each, sharing=paths) if isinstance(each, Planned) else each for each in choices)

    if not paths[1:]:
        return policy
    rules = tuple((pattern, shared(choices)) for pattern, choices in policy.rules)
    return replace(policy, choices=shared(policy.choices), rules=rules)


def guard_treatment(policy: Policy, prefix: str) -> Any:
    """Guards the code that is being compiled on the rules for the called module, if that is a part of what torch.compile
    got: after a graph break (of a hook around each block, say) Dynamo would run the code of one block for every block.

    prefix: the path of the compiled module. Returns the treatment; () where nothing is guarded.
    """
    known: weakref.WeakKeyDictionary[Module, Any] = weakref.WeakKeyDictionary()

    def treated() -> Any:
        module = called_module()
        if module is None:
            return ()
        if module not in known:
            paths = compiled_paths()
            known[module] = treatment(policy, _join(prefix, paths.called_path), module) if paths.called else ()
        return known[module]

    named_apart = any(pattern not in KINDS for pattern, _ in policy.rules) or bool(_apart(policy))
    if not named_apart or not compiled_paths().called_path:
        return ()
    wanted = treated()
    guard_compilation("RULES", "attnrewrite: rules for the modules of this call", lambda _: treated() == wanted)
    return wanted


def comes_later(pattern: str) -> bool:
    """Whether what torch.compile got is compiled in parts, and a rule names one of its modules: that may be compiled later."""
    modules = compiled_paths()
    paths = [path for each in modules.paths.values() for path in each] if modules.called_path else []
    return any(fnmatch.fnmatchcase(path, pattern.split("#")[0]) for path in paths)
