"""The passes, one a file. Each reads the graph, or changes it, and gives back what it has found or done (found.py).

    OPENERS             open what hides an attention
    find_calls          every attention of a graph
    understand_masks    what the graph proves of their masks
    [plan]              attnrewrite/pipeline.py
    swap_kernels        puts the chosen kernels in place
    TIDIERS             clean up around them

Imports `planning` and what is below it.
"""

from collections.abc import Callable

from torch.fx import GraphModule

from .cancel_transposes import cancel_transposes
from .drop_kernel_contexts import drop_kernel_contexts
from .find_calls import find_calls
from .open_multi_head_attention import open_multi_head_attention
from .swap_kernels import swap_kernels
from .understand_masks import understand_masks

# Each returns how many places it changed.
Pass = Callable[[GraphModule], int]

OPENERS: tuple[Pass, ...] = (open_multi_head_attention,)
TIDIERS: tuple[Pass, ...] = (cancel_transposes, drop_kernel_contexts)

__all__ = ["OPENERS", "TIDIERS", "Pass", "find_calls", "swap_kernels", "understand_masks"]
