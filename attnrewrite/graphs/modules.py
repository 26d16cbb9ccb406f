"""The function that a `torch.nn.Module` calls: `_compiled_call_impl` after a compilation in place, `_call_impl` otherwise
(torch/nn/modules/module.py, 2.9 to 2.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import Module

IMPLEMENTATION = "_compiled_call_impl"  # PyTorch leaves this attribute out of copies and pickles


def implementation_of(module: Module, otherwise: Any = None) -> Any:
    """The function that `module.compile()`, or later code, has set; `otherwise` where none is set."""
    return module.__dict__.get(IMPLEMENTATION, otherwise)


def set_implementation(module: Module, implementation: Any) -> None:
    setattr(module, IMPLEMENTATION, implementation)


def drop_implementation(module: Module) -> None:
    delattr(module, IMPLEMENTATION)


def plain_call(module: Module) -> Callable[..., Any]:
    """The uncompiled call of a module, with its hooks."""
    call: Callable[..., Any] = module._call_impl
    return call
