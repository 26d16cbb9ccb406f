"""Sizes that may be symbolic, and the one function through which a decision may ask about them."""

from __future__ import annotations

import torch

# A size of an AttentionCall: known, or symbolic while its graph is being rewritten. (A report holds its text.)
Size = int | torch.SymInt


class UnbackedSizeError(Exception):
    """A question about a size that only the data decides (from `.item()`, `nonzero()`): no guard can hold its answer."""


def holds(condition: bool | torch.SymBool) -> bool:
    """The answer to a question about sizes, and the promise to ask again when the sizes change.

    A question about known sizes is a plain bool. About symbolic sizes, evaluating it makes PyTorch record the
    answer as a shape guard of the graph being compiled, so that a later call with another answer recompiles:
    refusals too come back when the size comes back within the limit. An idle question therefore costs a
    recompilation: ask about static facts first, about sizes last, and stop at the first refusal.

    Raises `UnbackedSizeError` where the answer depends on data.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

    if statically_known_true(condition):
        return True
    try:
        return bool(condition)
    except GuardOnDataDependentSymNode as error:
        raise UnbackedSizeError(str(condition)) from error


def described(size: Size | str) -> int | str:
    """A size for people and for files: the number, or the symbol with the value it had when the graph was traced."""
    if isinstance(size, torch.SymInt):
        if (known := size.node.maybe_as_int()) is not None:
            return int(known)
        return f"{size} ({size.node.hint})" if size.node.has_hint() else str(size)
    return size
