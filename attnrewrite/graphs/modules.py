"""The function that a `torch.nn.Module` calls: `_compiled_call_impl` after a compilation in place, `_call_impl` otherwise
(torch/nn/modules/module.py, 2.9 to 2.15). The paths of modules, whoever wraps them."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

IMPLEMENTATION = "_compiled_call_impl"  # PyTorch leaves this attribute out of copies and pickles


def implementation_of(module: Module, otherwise: Any = None) -> Any:
    """The function that `module.compile()`, or later code, has set; `otherwise` where none is set."""
    return module.__dict__.get(IMPLEMENTATION, otherwise)


def set_implementation(module: Module, implementation: Any) -> None:
    setattr(module, IMPLEMENTATION, implementation)


def drop_implementation(module: Module) -> None:
    delattr(module, IMPLEMENTATION)


UNSET = object()  # `implementation_of(module, UNSET)` where none is set


def restore_implementation(module: Module, before: Any) -> None:
    """before: what `implementation_of(module, UNSET)` returned."""
    if before is UNSET:
        drop_implementation(module)
    else:
        set_implementation(module, before)


def plain_call(module: Module) -> Callable[..., Any]:
    """The uncompiled call of a module, with its hooks."""
    call: Callable[..., Any] = module._call_impl
    return call


# Attributes that hold the module that was wrapped: by torch.compile, FullyShardedDataParallel, checkpoint_wrapper.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_NO_PARTS = (*WRAPPED, "__dict__", "_modules")
# A forward that somebody replaced (hooks of diffusers and accelerate, functools.wraps) leads to the module that it is of.
_REPLACED = re.compile(
    r"\.\w*forward(\.\w*forward|\.func|\.__wrapped__|\._torchdynamo_inline|\.__closure__\[\d+\]\.cell_contents)*"
    r"(\.__self__|\.args\[0\])"
)


def module_path(source: str) -> str:
    """Turns Dynamo's expression for a module into a path: L['self'].blocks.0 -> blocks.0, and L['self'] -> ''.

    Dynamo also writes L['self'].__dict__['_modules']['blocks']._modules['0'] for the same module, with `_orig_mod` where a
    block was compiled by itself, and L['old'].__self__.blocks.0 or L['self'].forward.func.args[0].blocks.0 behind a forward
    that somebody replaced.
    """
    text = re.sub(r"^[LG]\['[^']*'\](\.__self__)?", "", source)
    parts = re.findall(r"[^.\[\]']+", _REPLACED.sub("", f".{text.lstrip('.')}"))
    return ".".join(part for part in parts if part not in _NO_PARTS)


def paths_of(root: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """Every module below `root`, and `root` itself, with its path; a module at two places comes twice. Wrappers are not part
    of a path: a wrapper and the module in it have the same one."""
    yield path, root
    for name, child in root._modules.items():
        if child is not None:
            wrapped = name in WRAPPED or (name == "module" and isinstance(root, DataParallel | DistributedDataParallel))
            yield from paths_of(child, path if wrapped else f"{path}.{name}" if path else name)


def named(root: Module) -> list[tuple[str, Module]]:
    """Every module below `root`, and `root` itself, once, with its first path."""
    first: dict[int, tuple[str, Module]] = {}
    for path, module in paths_of(root):
        first.setdefault(id(module), (path, module))
    return list(first.values())


@dataclass(frozen=True)
class ModulePaths:
    """The paths of the modules in a callable that torch.compile got."""

    paths: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by the id of the module
    called: Module | None = None  # the innermost module of those that is called now
    called_path: str = ""  # its path: "" for the compiled module itself

    def of(self, stack: Mapping[str, Any]) -> str:
        """The path of the innermost module of a node's `nn_module_stack`; "" for the compiled module itself.

        The stack begins at the frame that Dynamo compiles: after a graph break inside the model that is a part of it. Its
        keys are ids of modules (those of torch.export are not), with "@1" behind it at a second call.
        """
        if not stack:
            return self.called_path
        key, (source, *_) = list(stack.items())[-1]
        read, number = module_path(str(source)), str(key).partition("@")[0]
        known = self.paths.get(int(number), ()) if number.isdecimal() else ()
        return read if read in known or not known else known[0]


def compiled_paths() -> ModulePaths:
    """The paths of the modules in what torch.compile got, inside its call; none where it got a function."""
    compiled, called = _calls()
    if compiled is None:
        return ModulePaths()
    paths: dict[int, tuple[str, ...]] = {}
    for path, module in paths_of(compiled):
        paths[id(module)] = (*paths.get(id(module), ()), path)
    if called is None or id(called) not in paths:
        return ModulePaths(paths)
    return ModulePaths(paths, called, paths[id(called)][0])


def called_module() -> Module | None:
    """The innermost module that is called now inside a compiled callable."""
    return _calls()[1]


def _calls() -> tuple[Module | None, Module | None]:
    """The module that torch.compile got, and the innermost module that is called inside of it. Both stand in frames of PyTorch
    (`compile_wrapper` in torch/_dynamo/eval_frame.py, `_call_impl` in torch/nn/modules/module.py, 2.9 to 2.15)."""
    frame, called = sys._getframe().f_back, None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if called is None and function == "_call_impl" and file.endswith(_MODULE_FILE):
            called = frame.f_locals.get("self")
        elif function == "compile_wrapper" and file.endswith(_EVAL_FRAME_FILE):
            compiled = getattr(inspect.unwrap(frame.f_locals.get("fn", id)), "__self__", None)
            return (compiled if isinstance(compiled, Module) else None), called
        frame = frame.f_back
    return None, None


_MODULE_FILE = os.path.join("torch", "nn", "modules", "module.py")
_EVAL_FRAME_FILE = os.path.join("torch", "_dynamo", "eval_frame.py")
