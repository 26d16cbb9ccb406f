"""The passes, one per file. Each reads or changes the graph, and returns what it found or did (found.py).

    OPENERS             replace nodes that hide an attention
    READERS             note at nodes that are an attention in other words what they compute
    find_calls          finds every attention of a graph
    understand_masks    proves from the graph what kind of mask each attention has
    [plan]              attnrewrite/pipeline.py
    swap_kernels        puts the chosen kernels in place
    TIDIERS             clean up around the kernels

Imports `planning` and the packages below it.
"""

from collections.abc import Callable, Sequence

from torch.fx import GraphModule

from ..graphs.nodes import Surroundings, graphs_below
from .cancel_transposes import cancel_transposes
from .drop_kernel_contexts import drop_kernel_contexts
from .drop_scratch import drop_scratch
from .find_calls import find_calls
from .flex_calls import read_flex_calls
from .library_calls import read_library_calls
from .open_dtensors import open_dtensors
from .open_fast_paths import open_fast_paths
from .open_functions import open_functions
from .open_multi_head_attention import open_multi_head_attention
from .swap_kernels import swap_kernels
from .understand_masks import understand_masks

# A pass returns the number of places that it changed. Openers and readers also get the surroundings of the graph.
Opener = Callable[[GraphModule, Surroundings], int]
Tidier = Callable[[GraphModule], int]

OPENERS: tuple[Opener, ...] = (open_functions, open_multi_head_attention, open_fast_paths, open_dtensors)
READERS: tuple[Opener, ...] = (read_flex_calls, read_library_calls)
TIDIERS: tuple[Tidier, ...] = (drop_scratch, cancel_transposes, drop_kernel_contexts)


def run_on_all(passes: Sequence[Opener], root: GraphModule) -> list[tuple[GraphModule, Surroundings]]:
    """Runs openers or readers on `root` and every graph that it calls, in place. Returns the graphs with their surroundings."""
    graphs = list(graphs_below(root))
    for module, surroundings in graphs:
        if sum(each(module, surroundings) for each in passes):
            module.recompile()
    return graphs


__all__ = [
    "OPENERS",
    "READERS",
    "TIDIERS",
    "Opener",
    "Tidier",
    "find_calls",
    "run_on_all",
    "swap_kernels",
    "understand_masks",
]
