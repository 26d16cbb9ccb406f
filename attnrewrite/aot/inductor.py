"""What older versions of Inductor need to be told, so that a check that fails ends the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..kernels.machines import satisfies
from .check_ops import CHECKS

CALL = "aoti_torch_proxy_executor_call_function("


@contextmanager
def checked_calls() -> Iterator[None]:
    """While it is open, AOTInductor writes code that looks at what such a call returns.

    Before torch 2.13 its own code does not (`generate_fallback_kernel_with_runtime_lookup_aot` in
    torch/_inductor/codegen/cpp_wrapper_cpu.py): an op that raises, be it a check or a kernel, was printed, and the package went
    on with outputs that nobody had written. Lines that have the check are left as they are.
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


def keep_checks() -> None:
    """Before torch 2.11 Inductor takes an op for dead code if it returns nothing and its schema writes into nothing
    (`FallbackKernel.has_side_effects` in torch/_inductor/ir.py), which a check does. From here on it keeps them."""
    if satisfies(torch.__version__, ">=2.11"):
        return
    from torch._inductor.ir import FallbackKernel

    kernel: Any = FallbackKernel
    original = kernel.has_side_effects
    if hasattr(original, "keeps_checks"):
        return

    def has_side_effects(self: Any) -> bool:
        return self.op_overload in CHECKS or original(self)

    has_side_effects.keeps_checks = True  # type: ignore[attr-defined]
    kernel.has_side_effects = has_side_effects
