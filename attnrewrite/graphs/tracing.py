"""A model traced by PyTorch: what a backend of ours sees of it, with nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import CodeType, TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from .modules import implementation_of, plain_call
from .trees import mapped


def traced(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> Any:
    """What the model gives when `backend` compiles it, whatever compiles it otherwise. Sizes are numbers. Nothing that was
    compiled for it is left behind."""
    compiled: Any = torch.compile(uncompiled(model), backend=backend, dynamic=False)
    with CompiledCode(), recompilations(10_000):
        return compiled(*args, **kwargs)


def recompilations(most: int) -> AbstractContextManager[Any]:
    """Inside, one function may be compiled so many times (8 by default), and 10,000 times with all that it calls."""
    limits: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=most, accumulated_recompile_limit=10_000
    )
    return limits


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled since it was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compilation() -> tuple[str, Any] | None:
    """Dynamo's id of the compilation that is under way, as "0/1" (the frame, and how many times it was compiled before), and
    what tells tries at it apart: where Dynamo starts a frame again, the next try is another one. None outside of any."""
    context = torch._guards.CompileContext.try_get()
    return (str(context.compile_id), (context, context.attempt)) if context else None


def without_modes() -> AbstractContextManager[Any]:
    """What runs inside is no part of a graph that is being traced or written."""
    modes: AbstractContextManager[Any] = _disable_current_modes()
    return modes


def break_graph(reason: str) -> None:
    """Inside a function that Dynamo traces: the graph ends here, and what follows is compiled by itself."""
    torch._dynamo.graph_break(reason)


def traced_operators(function: Callable[..., Any], fake: Sequence[Any], needs_grad: bool) -> GraphModule:
    """The operators that a function of fake tensors calls, above autograd and without autocast. Each node has its value under
    "val"."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.set_grad_enabled(needs_grad), torch._C._DisableAutocast():
        module: GraphModule = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*fake)
    return module


def uncompiled(model: Any) -> Any:
    """What a model calls where nobody compiles it."""
    target = getattr(model, "_orig_mod", model)
    compiled = isinstance(target, torch.nn.Module) and implementation_of(target) is not None
    return plain_call(target) if compiled else target


def predicted(graph_module: GraphModule) -> Callable[..., Any]:
    """The graph as a function that computes no values: zeros of the shapes, dtypes and strides that it would return."""

    def call(*inputs: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        given: dict[int, Any] = {}

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            made = mode.from_tensor(value, static_shapes=True)
            given[id(made)] = value
            return made

        def zeros(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or id(value) in given:
                return given.get(id(value), value)
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            made = empty.zero_().requires_grad_(value.requires_grad)
            return made.clone() if value.requires_grad else made  # no leaf, so that code behind may write into it

        fakes = mapped(fake, inputs)
        with mode:
            outputs = graph_module(*fakes)
        return mapped(zeros, outputs)

    return call


class AttributesOf:
    """Puts back, at its end, what the modules of a model had as attributes: a forward that assigns to `self` would leave
    our zeros there."""

    def __init__(self, model: Any) -> None:
        owner = getattr(model, "__self__", model)  # of a bound method, its object
        self._modules = list(owner.modules()) if isinstance(owner, torch.nn.Module) else []

    def __enter__(self) -> AttributesOf:
        registries = ("_parameters", "_buffers", "_modules")
        self._before = [
            (module.__dict__.copy(), {name: getattr(module, name).copy() for name in registries})
            for module in self._modules
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for module, (attributes, registries) in zip(self._modules, self._before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in registries.items():
                getattr(module, name).clear()
                getattr(module, name).update(entries)


class CompiledCode:
    """Forgets, at its end, what Dynamo compiled inside: an explanation is no compilation that a later call may reuse,
    nor one that counts towards the recompilation limit."""

    def __enter__(self) -> CompiledCode:
        self._before: dict[CodeType, set[int]] = {}
        self._hook = torch._dynamo.convert_frame.register_bytecode_hook(self._compiled)
        return self

    def _compiled(self, code: CodeType, new_code: CodeType) -> None:
        self._before.setdefault(code, {id(entry.code) for entry in _entries(code)})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        from torch._dynamo.guards import DeletedGuardManagerWrapper

        self._hook.remove()
        for code, before in self._before.items():
            if not before:
                torch._C._dynamo.eval_frame.reset_code(code)
                continue
            for entry in _entries(code):  # beside the user's own: they stay
                if id(entry.code) not in before:
                    gone = DeletedGuardManagerWrapper("attnrewrite.explain has ended")
                    # An entry guarded on the identity of an object that the frame does not have is not counted
                    # towards the recompilation limit (torch/_dynamo/cache_size.py).
                    gone.id_matched_objs = {"attnrewrite.explain": weakref.ref(CompiledCode)}
                    entry.guard_manager.extra_state.invalidate(entry, gone)


def _entries(code: CodeType) -> list[Any]:
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries
