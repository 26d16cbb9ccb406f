"""Sizes that may be symbolic, and `holds`, the only function through which a decision may ask about them."""

from __future__ import annotations

import torch

from .questions import listening

# A size of an AttentionCall: a number, or a symbol while its graph is being rewritten. (A report holds the symbol as text.)
Size = int | torch.SymInt


class UnbackedSizeError(Exception):
    """A question about a size that depends on data (from `.item()`, `nonzero()`): no guard can check its answer."""


def holds(condition: bool | torch.SymBool, at_run_time: bool = False) -> bool:
    """Answers a question about sizes, which is asked again when the sizes change.

    A question about known sizes is a plain bool. For symbolic sizes, PyTorch records the answer as a shape guard of the graph
    being compiled, so that a later call with another answer recompiles: a refused kernel is tried again when the size is back
    within its limit. A needless question therefore costs a recompilation: ask about static facts first, about sizes last, and
    stop at the first refusal.

    at_run_time: check the answer whenever an exported program runs, even where PyTorch's assumption while tracing, that
    symbolic sizes are at least 2, answers the question: a running program may break this assumption.

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
    """Whether a condition holds for every value of its symbols. Adds no guard, and raises nothing for data-dependent sizes.
    For decisions that are right with either answer, and only cost more where the answer is not known."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return condition if isinstance(condition, bool) else statically_known_true(condition)


def holds_if_guarded(condition: bool | torch.SymBool) -> bool:
    """`holds` where there are guards; `always` in an exported program, which the answer would restrict. For decisions that
    are right with either answer, and cost less where the condition holds."""
    return holds(condition) if listening() is None else always(condition)


def is_one(size: Size) -> bool:
    """Whether a size is 1, so that it broadcasts. A symbol never is 1: PyTorch compiles separate graphs for sizes 0 and 1."""
    return isinstance(size, int) and size == 1


def has_no_hint(value: object) -> bool:
    """Whether a value is a symbolic number that depends on data."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and not value.node.has_hint()


def described(size: Size | str) -> int | str:
    """A size for people and for files: the number, or the symbol with its value at tracing, as "s0 (77)"."""
    if isinstance(size, torch.SymInt):
        if (number := size.node.maybe_as_int()) is not None:
            return int(number)
        return f"{size} ({size.node.hint})" if size.node.has_hint() else str(size)
    return size
