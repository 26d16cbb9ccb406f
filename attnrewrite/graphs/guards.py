"""Adds a guard of our own to the code that Dynamo is compiling.

Dynamo itself uses lambda guards for state that is not a tensor (torch/_dynamo/guards.py, 2.9 to 2.15).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._guards import Guard, TracingContext


def guard_compilation(name: str, code: str, holds: Callable[[Any], bool]) -> None:
    """Restricts the code that is being compiled to calls for which `holds(...)` is true. Dynamo calls `holds` at every call,
    with an argument that carries no information. A compilation gets one guard of a name; later ones are left out. Does
    nothing outside of Dynamo.

    name, code: shown in logs of guards and of recompilations.
    """
    tracing = TracingContext.try_get()
    if tracing is None:
        return
    guards = tracing.guards_context.dynamo_guards
    if any(getattr(guard.create_fn, "__name__", "") == name for guard in guards):
        return
    from torch._dynamo.guards import get_verbose_code_parts
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, guard: Guard) -> None:
        guard.guard_types, guard.code_list = [name], [code]
        parts = get_verbose_code_parts([code], guard)
        root = builder.guard_manager.root
        try:
            root.add_lambda_guard(holds, parts, guard.user_stack)
        except TypeError:  # before 2.12
            root.add_lambda_guard(holds, parts)

    create.__name__ = name
    guards.add(Guard(GlobalStateSource(), create))
