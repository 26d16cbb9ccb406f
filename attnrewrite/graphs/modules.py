"""What a `torch.nn.Module` calls: `_compiled_call_impl` where somebody has compiled it in place, `_call_impl` otherwise
(torch/nn/modules/module.py, 2.9 to 2.15)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import Module

IMPLEMENTATION = "_compiled_call_impl"  # which PyTorch leaves out of copies and pickles


def implementation_of(module: Module, otherwise: Any = None) -> Any:
    """What `module.compile()`, or somebody after it, has put there."""
    return module.__dict__.get(IMPLEMENTATION, otherwise)


def set_implementation(module: Module, implementation: Any) -> None:
    setattr(module, IMPLEMENTATION, implementation)


def drop_implementation(module: Module) -> None:
    delattr(module, IMPLEMENTATION)


def plain_call(module: Module) -> Callable[..., Any]:
    """The call of a module, hooks and all, as nobody has compiled it."""
    call: Callable[..., Any] = module._call_impl
    return call
