"""What older versions of Inductor must be told so that an op that fails ends the call: patched while our own compilation runs,
and only in the versions that need it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.torch_version import TorchVersion

CALL = "aoti_torch_proxy_executor_call_function("


@contextmanager
def failing_ops_end_the_call(ops: Collection[Any], version: str = torch.__version__) -> Iterator[None]:
    """ops: those without results that raise, which Inductor must not take for dead code."""
    with ExitStack() as patches:
        if TorchVersion(version) < "2.13":
            patches.enter_context(_calls_are_checked())
        if TorchVersion(version) < "2.11":
            patches.enter_context(_kept(ops))
        yield


@contextmanager
def _calls_are_checked() -> Iterator[None]:
    """AOTInductor writes code that looks at what a call of an op outside of PyTorch returns.

    Before torch 2.13 its own code does not (`generate_fallback_kernel_with_runtime_lookup_aot` in
    torch/_inductor/codegen/cpp_wrapper_cpu.py): an op that raised was printed, and the package went on with outputs that nobody
    had written.
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
    """Before torch 2.11 Inductor takes an op for dead code if it returns nothing and its schema writes into nothing
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
