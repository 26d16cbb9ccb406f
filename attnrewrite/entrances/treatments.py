"""The rules that name modules inside a module: modules that the rules treat alike share compiled code, others must not."""

from __future__ import annotations

import fnmatch
import weakref
from typing import Any

from torch.nn import Module

from ..graphs.guards import guard_compilation
from ..graphs.modules import called_module, compiled_paths, named
from ..planning.policies import KINDS, Policy
from .model_parts import _join


def treatment(policy: Policy, path: str, module: Module) -> Any:
    """The rule for each module inside of `module`, which stands at `path`. Modules with the same rules may share compiled
    code."""
    globs = [pattern for pattern, _ in policy.rules if pattern not in KINDS]
    if any("#" in pattern for pattern in globs):  # '#': one of several calls, known only from the graph
        return path
    inside = {name: _join(path, name) for name, _ in named(module)} if globs else {}
    return tuple(
        (name, next((glob for glob in globs if fnmatch.fnmatchcase(full, glob)), None)) for name, full in inside.items()
    )


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

    if not any(pattern not in KINDS for pattern, _ in policy.rules) or not compiled_paths().called_path:
        return ()
    wanted = treated()
    guard_compilation("RULES", "attnrewrite: rules for the modules of this call", lambda _: treated() == wanted)
    return wanted


def comes_later(pattern: str) -> bool:
    """Whether what torch.compile got is compiled in parts, and a rule names one of its modules: that may be compiled later."""
    modules = compiled_paths()
    paths = [path for each in modules.paths.values() for path in each] if modules.called_path else []
    return any(fnmatch.fnmatchcase(path, pattern.split("#")[0]) for path in paths)
