"""The inner compiler, which compiles a graph after the swap: its name, its options, its call."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import GraphModule

Inner = str | Callable[..., Any]

# The name of the entry point (pyproject.toml), under which torch.compile finds this package.
NAME = "attnrewrite"
OBJECTS = "attnrewrite objects"  # the name of `_Objects`, which no user gives


def known_compilers() -> list[str]:
    """The names that torch.compile accepts as `backend`."""
    return [name for name in torch._dynamo.list_backends(exclude_tags=()) if name != OBJECTS]


class _Objects:
    """Equals every backend object of one class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{OBJECTS!r} is no backend: give {NAME!r}, or an object from attnrewrite.with_backend")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self.kind)

    __hash__ = object.__hash__


@functools.cache
def register_objects(kind: type) -> None:
    """Makes Dynamo take every object of `kind` for a registered backend: only then does it release the tracing state after a
    compilation, and while that is alive, `model.to(...)` can fail.

    Dynamo 2.15 asks whether the backend is among the registered ones, by `in` (torch/_dynamo/backends/registry.py). So one
    registered backend equals them all. It must not be the one that `backend="attnrewrite"` names: Dynamo would take that and
    an object for equal, and share compiled code between them.
    """
    torch._dynamo.register_backend(_Objects(kind), name=OBJECTS, tags=("debug",))


def reset_compiler(inner: Inner) -> None:
    """Resets the inner compiler, as `torch._dynamo.reset()` resets a backend: Inductor drops its CUDA graphs."""
    if inner == "inductor":
        torch._TorchCompileInductorWrapper(None, None, None).reset()


def inner_name(inner: Inner) -> str:
    """A text that names a compiler, the same in every process; a local function is named by its address, which changes."""
    if isinstance(inner, str):
        return inner
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
    return repr(inner) if "<" in name or name.endswith(".") else name


def known_inner(inner: Inner) -> Inner:
    """Returns `inner`. Raises `ValueError` for a name that torch.compile does not know, and for our own."""
    if callable(inner):
        return inner
    known = known_compilers()
    if inner not in known or inner == NAME:
        near = difflib.get_close_matches(str(inner), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}."
        raise ValueError(f"inner is {inner!r}, which is no backend of torch.compile; {hint} A callable is accepted too")
    return inner


def known_options(options: Collection[str], inner: Inner, own: Collection[str]) -> None:
    """Raises `ValueError` for an option that neither attnrewrite (`own`) nor Inductor has. The options of other compilers are
    not known here: only a near miss of one of ours is taken for a typing error."""
    for option in options:
        if inner == "inductor":
            theirs = torch._inductor.list_options()
            if option.replace("-", "_") in theirs:
                continue
            near = difflib.get_close_matches(option, [*own, *theirs], n=1, cutoff=0.6)
        elif not (near := difflib.get_close_matches(option, own, n=1, cutoff=0.8)):
            continue
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"options has {option!r}, which is no option of attnrewrite{' or Inductor' if inner == 'inductor' else ''}; {hint}"
            f"attnrewrite's are {', '.join(own)}; torch._inductor.list_options() lists Inductor's"
        )


def records_cuda_graphs(inner: Inner, mode: str | None = None, options: dict[str, Any] | None = None, **_: Any) -> bool:
    """Whether the inner compiler records CUDA graphs, by torch.compile's arguments and Inductor's settings."""
    if inner != "inductor":
        return inner == "cudagraphs"
    settings: dict[str, Any] = {**torch._inductor.list_mode_options().get(mode or "default", {}), **(options or {})}
    return bool(settings.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs))


def runs_as_it_stands(inner: Inner) -> bool:
    """Whether the inner compiler compiles nothing: the graph runs as it is, under plain autograd."""
    return inner in ("eager", "eager_noexcept")


def compile_with(
    inner: Inner, graph_module: GraphModule, example_inputs: list[Any], in_order: bool = False, **kwargs: Any
) -> Callable[..., Any]:
    """Calls the inner compiler as torch.compile would.

    in_order: the operations of the graph keep their order. Inductor would put each in front of its first use, and reorder them
        for a lower peak of memory, with each wait right behind its exchange: nothing would run while an exchange is under way
        (torch 2.9 to 2.15).
    """
    if inner == "inductor":
        options = {"reorder_for_locality": False, "reorder_for_peak_memory": False} if in_order else {}
        # The object that torch.compile(backend="inductor") makes: it applies mode and options for this one compilation.
        compiler = torch._TorchCompileInductorWrapper(
            kwargs.get("mode"), {**options, **(kwargs.get("options") or {})}, None
        )
        compiled: Callable[..., Any] = compiler(graph_module, example_inputs)
        return compiled
    function = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    result: Callable[..., Any] = function(graph_module, example_inputs, **kwargs)
    return result
