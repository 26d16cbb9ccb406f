"""The object that `inductor_pass` makes. In a file of its own: importing Inductor takes seconds."""

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


class AttentionPass(CustomGraphPass):
    """A pre-grad pass of Inductor that swaps attention. Equal configuration is an equal object.

    identity: the text of a policy for PyTorch's key, None where there is none."""

    def __init__(self, compiler: AttentionCompiler, identity: Callable[[Policy], str | None] = identity_of) -> None:
        self.compiler = compiler
        self.identity = identity

    @property
    def report(self) -> Report:
        """What the pass did. Where PyTorch finds a compiled graph in its caches it does not call the pass (2.12 and newer)."""
        return self.compiler.report

    def __call__(self, graph: torch.fx.Graph) -> None:
        module = graph.owning_module
        if module is None:
            raise RuntimeError("attnrewrite: Inductor gave its pass a graph without its module; please report this")
        self.compiler.rewrite(module, in_cuda_graph=records_cuda_graphs("inductor"))
        contexts.guard_choice()

    def uuid(self) -> Any:
        """Equal only where the pass would do the same: PyTorch's key for compiled graphs. It is asked at every compilation,
        also where the pass itself is not called, so the choice of the active context is guarded here as well."""
        contexts.guard_choice()
        contexts.mark_used()
        return self.identity(self.compiler.policy_now())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionPass) and self.compiler == other.compiler

    def __hash__(self) -> int:
        return hash(self.compiler)

    def __deepcopy__(self, memo: Any) -> AttentionPass:  # Inductor copies its settings
        return self

    def __reduce__(self) -> Any:  # before 2.12 Inductor's key pickles them: a text that tells configurations apart
        return str, (self.uuid() or repr(self),)

    def __repr__(self) -> str:
        return f"attnrewrite.inductor_pass({self.compiler.policy})"
