"""What the passes over one graph hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ..calls import AttentionCall
from ..graphs import Surroundings
from ..plans import Site
from ..records import Backend


@dataclass
class Found:
    """One attention in a graph: its node and what it asks for; after planning also its site of the plan."""

    node: Node
    call: AttentionCall
    site: Site | None = None

    @property
    def kernel(self) -> Backend | None:
        """The chosen kernel, None where the call stays as it is: nothing was chosen, or `native`, which has no op."""
        backend = self.site.backend if self.site is not None else None
        return backend if backend is not None and backend.op is not None else None


@dataclass
class Context:
    """`surroundings`: what this graph is called in.

    `names` counts site names over all graphs of one compilation, so that no two sites share one.
    """

    surroundings: Surroundings = field(default_factory=Surroundings)
    names: dict[str, int] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
