"""Ops that are called from a package through PyTorch's proxy: what they raise must end the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
