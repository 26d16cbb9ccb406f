"""Traces a model with PyTorch for a backend of ours, and leaves no compiled code behind."""

from __future__ import annotations

import functools
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import CodeType, TracebackType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from .modules import implementation_of, plain_call
from .nodes import autocasting, fake_mode_of
from .trees import mapped

Call = tuple[Sequence[Any], Mapping[str, Any]]  # the positional and the keyword arguments of one call of a model


def traced(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Callable[..., Any],
    fullgraph: bool = False,
) -> Any:
    """The result of the model compiled by `backend`, even if the model is set to another compiler. Sizes are static. Drops
    the compiled code afterwards. fullgraph: raises an error of the model, where Dynamo would leave its code alone from then on.
    """
    results: list[Any] = []
    traced_calls(model, [(args, kwargs)], backend, results.append, fullgraph)
    return results[0]


def traced_calls(
    model: Callable[..., Any],
    calls: Iterable[Call],
    backend: Callable[..., Any],
    receive: Callable[[Any], object],
    fullgraph: bool = False,
) -> None:
    """As `traced`, for calls one after another, which share what is compiled. receive: gets each result."""
    compiled: Any = torch.compile(uncompiled(model), backend=backend, dynamic=False, fullgraph=fullgraph)
    with CompiledCode(), recompilations(10_000):
        for args, kwargs in calls:
            receive(compiled(*args, **kwargs))
            del args, kwargs  # freed before the next call is made


@functools.cache
def _as_itself(kind: Any) -> Any:
    from torch._dynamo.exc import ShortenTraceback

    def reduced(self: Exception) -> Any:
        return kind, self.args

    return type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__reduce__": reduced})


def as_itself(error: Exception) -> Exception:
    """The exception in a class below its own that Dynamo raises as it is; it wraps others in `BackendCompilerFailed`."""
    kind: Any = type(error)
    raised: Exception = _as_itself(kind)(*error.args, first_useful_frame=None)
    return raised


# In the errors of PyTorch and Dynamo (2.9 to 2.15) where code asks for the values of a tensor on "meta". The last one: Dynamo
# makes a tensor of a number, outside of its fake mode.
VALUES = ("meta tensor", "register_meta", "convert all Tensors to FakeTensors")


def asks_for_values(error: RuntimeError) -> bool:
    """Whether the model asked for the values of a tensor on "meta"."""
    return any(words in str(error) for words in VALUES)


def told(error: Exception) -> tuple[str, str]:
    """The first sentences of an error in one line, and the place in the user's code ("file.py:12"; "" if not known). Dynamo
    wraps the error of an operator in a page of its own."""
    text = str(error)
    inner = re.search(r"got \w+\((['\"])(.*?)\1\)", text)
    places = re.findall(r'File "([^"]+)", line (\d+)', text.partition("from user code:")[2])
    place = f"{places[-1][0]}:{places[-1][1]}" if places else ""
    said = inner[2] if inner else text.strip().splitlines()[0]
    return said if len(said) <= 160 else f"{said[:160]}...", place


@contextmanager
def unlogged() -> Iterator[None]:
    """Keeps PyTorch from logging the errors of operators on fake tensors, for code that expects them."""
    logger = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def recompilations(most: int) -> AbstractContextManager[Any]:
    """Sets Dynamo's limits inside: recompile_limit to `most` (8 by default), accumulated_recompile_limit to 10,000."""
    limits: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=most, accumulated_recompile_limit=10_000
    )
    return limits


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled since its last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compilation() -> tuple[str, Any] | None:
    """Dynamo's id of the current compilation, as "0/1" (the frame, and the number of its earlier compilations), and a key of
    the current attempt: Dynamo may start a frame again, which is a new attempt. None outside of a compilation."""
    context = torch._guards.CompileContext.try_get()
    return (str(context.compile_id), (context, context.attempt)) if context else None


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, in which tensors may be dual."""
    return torch.autograd.forward_ad._current_level >= 0


def without_modes() -> AbstractContextManager[Any]:
    """Keeps the code inside out of a graph that is being traced or written."""
    modes: AbstractContextManager[Any] = _disable_current_modes()
    return modes


def break_graph(reason: str) -> None:
    """Ends the graph here, in a function that Dynamo traces; Dynamo compiles the following code as another graph."""
    torch._dynamo.graph_break(reason)


def traced_operators(
    function: Callable[..., Any],
    fake: Sequence[Any],
    needs_grad: bool,
    autocast: Mapping[str, torch.dtype] | None = None,
) -> GraphModule:
    """A graph of the operators that a function of fake tensors calls, above autograd and autocast. Each node has its value
    under "val": the value as autocast computes it, for the device types in `autocast`.

    It runs inside the tensors' fake mode: what the function makes itself (the zeros of `add_zero_attn`) is fake too."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(needs_grad))
        stack.enter_context(autocasting(autocast))
        if (mode := next((mode for mode in map(fake_mode_of, fake) if mode is not None), None)) is not None:
            stack.enter_context(mode)
        module: GraphModule = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*fake)
    return module


def uncompiled(model: Any) -> Any:
    """The callable of a model without `torch.compile(model)` and `model.compile()`."""
    target = getattr(model, "_orig_mod", model)
    compiled = isinstance(target, torch.nn.Module) and implementation_of(target) is not None
    return plain_call(target) if compiled else target


def predicted(graph_module: GraphModule) -> Callable[..., Any]:
    """The graph as a function that computes no values: it returns zeros with the shapes, dtypes and strides of the outputs."""

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
            return made.clone() if value.requires_grad else made  # not a leaf, so that later code may write into it

        fakes = mapped(fake, inputs)
        with mode:
            outputs = graph_module(*fakes)
        return mapped(zeros, outputs)

    return call


class AttributesOf:
    """Restores, at its end, the attributes of a model's modules: a forward that assigns to `self` would leave our zeros
    there."""

    def __init__(self, model: Any) -> None:
        owner = getattr(model, "__self__", model)  # the object of a bound method
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
    """Drops, at its end, the code that Dynamo compiled inside: a later call must not reuse an explanation's code, and this
    code must not count towards the recompilation limit."""

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
            for entry in _entries(code):  # entries of the user's own compilations stay
                if id(entry.code) not in before:
                    gone = DeletedGuardManagerWrapper("attnrewrite.explain has ended")
                    # An entry guarded on the identity of an object that the frame does not have is not counted
                    # towards the recompilation limit (torch/_dynamo/cache_size.py).
                    gone.id_matched_objs = {"attnrewrite.explain": weakref.ref(CompiledCode)}
                    entry.guard_manager.extra_state.invalidate(entry, gone)


def _entries(code: CodeType) -> list[Any]:
    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries
