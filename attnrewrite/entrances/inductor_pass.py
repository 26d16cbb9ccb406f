"""`inductor_pass`: swaps attention under `backend="inductor"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .choices import Choice, CompileSettings, Rules
from .compilers import with_backend

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .graph_pass import AttentionPass


def inductor_pass(*choices: Choice, rules: Rules | None = None, **settings: Unpack[CompileSettings]) -> AttentionPass:
    """Makes a pass for Inductor that swaps attention as `with_backend` does, where the backend must stay "inductor".

        torch.compile(model, options={"pre_grad_custom_pass": attnrewrite.inductor_pass("flex", "native")})

    choices, rules, settings: as in `with_backend`, with the same errors.

    Returns an `AttentionPass`, which has a `report`. Its `uuid` is a part of the key of PyTorch's caches. It is made of the
    policy, every record's limits and code, and the versions of this package, of PyTorch and of each kernel's library: when
    one of them changes, no stale graph is found. If a record holds a value that has no text for the key, PyTorch runs the
    pass before it asks its caches, and their key is the rewritten graph.
    """
    from .graph_pass import AttentionPass

    return AttentionPass(with_backend(*choices, rules=rules, **settings))
