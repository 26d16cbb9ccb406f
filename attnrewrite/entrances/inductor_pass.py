"""`inductor_pass`: the swap for people who keep `backend="inductor"`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .choices import Choice, CompileSettings, Rules
from .compilers import with_backend

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .graph_pass import AttentionPass


def inductor_pass(*choices: Choice, rules: Rules | None = None, **settings: Unpack[CompileSettings]) -> AttentionPass:
    """A pass for Inductor that does what `with_backend` does, for a compile call whose backend must stay "inductor":

        torch.compile(model, options={"pre_grad_custom_pass": attnrewrite.inductor_pass("flex", "native")})

    Arguments and errors are those of `with_backend`. The object has a `report`. Its `uuid`, which PyTorch's caches use as
    a part of their key, is made of the policy, every record's limits and code, the versions of this package, of PyTorch
    and of each kernel's library: nothing stale is found when one of them changes. With a record that holds a value without
    such a text, PyTorch runs the pass before it asks its caches, whose key is the rewritten graph then.
    """
    from .graph_pass import AttentionPass

    return AttentionPass(with_backend(*choices, rules=rules, **settings))
