"""What the passes over one graph hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ..calls import AttentionCall
from ..plans import Site


@dataclass
class Found:
    """One attention in a graph: its node and what it asks for; after planning also its site of the plan."""

    node: Node
    call: AttentionCall
    site: Site | None = None


@dataclass
class Context:
    """`obstacle`: a reason, inherited from the caller of this graph, why its calls must stay as they are.

    `names` counts site names over all graphs of one compilation, so that no two sites share one.
    """

    obstacle: str | None = None
    names: dict[str, int] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
