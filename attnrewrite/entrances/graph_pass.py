"""The object that `inductor_pass` makes, in a file of its own since importing Inductor takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..graphs.inner_compilers import records_cuda_graphs
from ..planning.policies import Policy
from ..reports.report import Report
from . import contexts
from .compilers import AttentionCompiler
from .identity import identity_of
from .treatments import guard_treatment


class AttentionPass(CustomGraphPass):
    """A pre-grad pass of Inductor that swaps attention. Two passes are equal if they are configured equally.

    identity: returns the text of a policy for PyTorch's cache key, None if there is none.
    """

    def __init__(self, compiler: AttentionCompiler, identity: Callable[[Policy], str | None] = identity_of) -> None:
        self.compiler = compiler
        self.identity = identity

    @property
    def report(self) -> Report:
        """The attentions that the pass found. It lacks graphs that PyTorch took from its caches without calling the pass (2.12
        and newer)."""
        return self.compiler.report

    def __call__(self, graph: torch.fx.Graph) -> None:
        module = graph.owning_module
        if module is None:
            raise RuntimeError("attnrewrite: Inductor gave its pass a graph without its module; please report this")
        self.compiler.rewrite(module, in_cuda_graph=records_cuda_graphs("inductor"))
        contexts.guard_choice()

    def uuid(self) -> Any:
        """A part of PyTorch's key for compiled graphs: equal only where the pass would do the same. PyTorch calls it at every
        compilation, also where it does not call the pass, so the active choice is guarded here too."""
        contexts.guard_choice()
        contexts.mark_used()
        policy = self.compiler.policy_now()
        treated, identity = guard_treatment(policy, self.compiler.prefix), self.identity(policy)
        return f"{identity} {treated}" if treated and identity else identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionPass) and self.compiler == other.compiler

    def __hash__(self) -> int:
        return hash(self.compiler)

    def __deepcopy__(self, memo: Any) -> AttentionPass:  # Inductor copies its settings, and the pass with them
        return self

    def __reduce__(self) -> Any:  # before 2.12 Inductor pickles the pass for its key: a text for each configuration
        return str, (self.uuid() or repr(self),)

    def __repr__(self) -> str:
        return f"attnrewrite.inductor_pass({self.compiler.policy})"
