"""The passes, one a file, each a function `(graph_module, context) -> int` that says how many places it changed.

`ANALYSES` only read, or open what hides an attention; after them the plan is made. `REWRITES` carry the plan out. Imports
`planning` and what is below it.
"""

from collections.abc import Callable

from torch.fx import GraphModule

from .cancel_transposes import cancel_transposes
from .context import Context
from .drop_kernel_contexts import drop_kernel_contexts
from .find_calls import find_calls
from .open_multi_head_attention import open_multi_head_attention
from .swap_kernels import swap_kernels
from .understand_masks import understand_masks

Pass = Callable[[GraphModule, Context], int]

ANALYSES: tuple[Pass, ...] = (open_multi_head_attention, find_calls, understand_masks)
REWRITES: tuple[Pass, ...] = (swap_kernels, cancel_transposes, drop_kernel_contexts)

__all__ = ["ANALYSES", "REWRITES", "Context", "Pass"]
