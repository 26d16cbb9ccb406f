"""Makes a failing op end the call in older versions of Inductor. The patches are active only during our own compilation, and
only in the versions that need them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.torch_version import TorchVersion

CALL = "aoti_torch_proxy_executor_call_function("


@contextmanager
def failing_ops_end_the_call(ops: Collection[Any], version: str = torch.__version__) -> Iterator[None]:
    """Applies the patches that a PyTorch `version` needs.

    ops: the ops without results that raise, which Inductor must not remove as dead code.
    """
    with ExitStack() as patches:
        if TorchVersion(version) < "2.13":
            patches.enter_context(_calls_are_checked())
        if TorchVersion(version) < "2.11":
            patches.enter_context(_kept(ops))
        yield


@contextmanager
def _calls_are_checked() -> Iterator[None]:
    """Makes AOTInductor's code check the error code that a call of an op from outside of PyTorch returns.

    Before torch 2.13 this code ignores it (`generate_fallback_kernel_with_runtime_lookup_aot` in
    torch/_inductor/codegen/cpp_wrapper_cpu.py): the error of an op was printed, and the package went on with outputs that
    nothing had written.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    wrapper: Any = CppWrapperCpu
    inherited = wrapper.writeline

    def writeline(self: Any, line: Any) -> None:
        if isinstance(line, str) and line.startswith(CALL):
            line = f"AOTI_TORCH_ERROR_CODE_CHECK({line.removesuffix(';')});"
        inherited(self, line)

    wrapper.writeline = writeline
    try:
        yield
    finally:
        del wrapper.writeline


@contextmanager
def _kept(ops: Collection[Any]) -> Iterator[None]:
    """Before torch 2.11 Inductor removes an op as dead code if the op returns nothing and its schema writes to no argument
    (`FallbackKernel.has_side_effects` in torch/_inductor/ir.py)."""
    from torch._inductor.ir import FallbackKernel

    kernel: Any = FallbackKernel
    original = kernel.has_side_effects

    def has_side_effects(self: Any) -> bool:
        return self.op_overload in ops or original(self)

    kernel.has_side_effects = has_side_effects
    try:
        yield
    finally:
        kernel.has_side_effects = original
