"""Sizes that may be symbolic, and the one function through which a decision may ask about them."""

from __future__ import annotations

import torch

from .questions import listening

# A size of an AttentionCall: known, or symbolic while its graph is being rewritten. (A report holds its text.)
Size = int | torch.SymInt


class UnbackedSizeError(Exception):
    """A question about a size that only the data decides (from `.item()`, `nonzero()`): no guard can hold its answer."""


def holds(condition: bool | torch.SymBool, at_run_time: bool = False) -> bool:
    """The answer to a question about sizes, and the promise to ask again when the sizes change.

    A question about known sizes is a plain bool. About symbolic sizes, evaluating it makes PyTorch record the
    answer as a shape guard of the graph being compiled, so that a later call with another answer recompiles:
    refusals too come back when the size comes back within the limit. An idle question therefore costs a
    recompilation: ask about static facts first, about sizes last, and stop at the first refusal.

    `at_run_time`: of an exported program, ask again when it runs, even if what PyTorch assumes of symbolic sizes while it
    traces, that they are at least 2, answers it: a program is not held to that.

    Raises `UnbackedSizeError` where the answer depends on data.
    """
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if always(condition):
        questions = listening()
        if at_run_time and questions is not None:
            questions.note(condition.node.expr)
        return True
    try:
        return bool(condition)
    except GuardOnDataDependentSymNode as error:
        raise UnbackedSizeError(str(condition)) from error


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for every value of its symbols. Asks nothing: no guard, and no error on data-dependent
    sizes. For what is right either way and only costs more when it is not known."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return condition if isinstance(condition, bool) else statically_known_true(condition)


def holds_if_guarded(condition: bool | torch.SymBool) -> bool:
    """For what is right either way and costs less where the condition holds: `holds` where there are guards, `always` in an
    exported program, which would be bound to the answer."""
    return holds(condition) if listening() is None else always(condition)


def is_one(size: Size) -> bool:
    """Whether a size is 1, so that it broadcasts. A symbol never is: PyTorch makes a graph of its own for 0 and for 1."""
    return isinstance(size, int) and size == 1


def described(size: Size | str) -> int | str:
    """A size for people and for files: the number, or the symbol with the value it had when the graph was traced."""
    if isinstance(size, torch.SymInt):
        if (number := size.node.maybe_as_int()) is not None:
            return int(number)
        return f"{size} ({size.node.hint})" if size.node.has_hint() else str(size)
    return size
