"""Lets Dynamo trace `torch.backends.cuda.sdp_kernel`, the older context that sets the kernels of SDPA."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch


@functools.cache
def trace_kernel_contexts() -> None:
    """Makes Dynamo trace `sdp_kernel(...)` as the `torch.nn.attention.sdpa_kernel(...)` that it is.

    Dynamo has a rule of its own for this one function, by which the graph ends there, and the code inside the context runs
    uncompiled ("torch.* op returned non-Tensor", torch/_dynamo/trace_rules.py, 2.9 to 2.15). The new rule holds for every
    compilation of the process, and changes no result.
    """
    from torch._dynamo import trace_rules

    trace_rules.manual_torch_name_rule_map.pop("torch.backends.cuda.sdp_kernel", None)
    trace_rules.get_torch_obj_rule_map().pop(torch.backends.cuda.sdp_kernel, None)
    with suppress(ValueError):  # another package has done so already
        torch.compiler.substitute_in_graph(torch.backends.cuda.sdp_kernel, skip_signature_check=True)(_traceable)


def _traceable(
    enable_flash: bool = True,
    enable_math: bool = True,
    enable_mem_efficient: bool = True,
    enable_cudnn: bool = True,
) -> Any:
    """`sdp_kernel` without its warning (torch/backends/cuda/__init__.py, 2.9 to 2.15)."""
    backends = []
    if enable_flash:
        backends.append(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    if enable_mem_efficient:
        backends.append(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)
    if enable_math:
        backends.append(torch.nn.attention.SDPBackend.MATH)
    if enable_cudnn:
        backends.append(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    return torch.nn.attention.sdpa_kernel(backends)
