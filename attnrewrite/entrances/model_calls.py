"""The calls of a model that a user gives to `tune`: one as arguments, several by `inputs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..graphs.tracing import Call
from .model_parts import has_values

FORM = "give an iterable of calls, each a pair (args, kwargs), as [((), first_step), ((), last_step)]"


def read_calls(
    model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Any, again: bool = False
) -> Iterable[Call]:
    """The calls in the order in which they run. Those of a sequence are checked here, those of an iterator as they are read.

    again: they will be read more than once, so that those of an iterator are kept.

    Raises `TypeError` for what is no iterable of pairs, and for arguments beside `inputs`; `ValueError` for no call at all,
    and for a tensor on the device "meta".
    """
    if inputs is None:
        has_values(model, args, kwargs, "tune")
        return [(args, kwargs)]
    if args or kwargs:
        beside = [f"{len(args)} positional"] if args else []
        raise TypeError(
            f"tune got inputs and arguments of one call beside it ({', '.join([*beside, *kwargs])}): {FORM}, and nothing else "
            "for the model"
        )
    if isinstance(inputs, str | Tensor | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is {_shown(inputs)}: {FORM}")
    calls = _checked(model, inputs)
    return list(calls) if again or isinstance(inputs, Sequence) else calls


def _checked(model: Any, inputs: Iterable[Any]) -> Iterator[Call]:
    number = 0
    for call in inputs:
        if not (
            isinstance(call, tuple | list)
            and len(call) == 2
            and isinstance(call[0], tuple | list)
            and isinstance(call[1], Mapping)
        ):
            raise TypeError(f"inputs[{number}] is {_shown(call)}: {FORM}")
        has_values(model, call[0], call[1], "tune")
        yield tuple(call[0]), call[1]
        number += 1
        del call
    if not number:
        raise ValueError(f"inputs is empty: {FORM}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) < 80 else '...'} ({type(value).__name__})"
