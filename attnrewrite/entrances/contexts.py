"""`attention_backend`: another choice of kernels for the compiled models that are called inside a `with`.

The choice stands in a context variable, so threads and asyncio tasks each have their own. A graph with attention in it is
compiled once a choice: a guard of its compiled code asks whether the choice is still the one that it was made for. A
lambda guard is what Dynamo itself uses for such state (torch/_dynamo/guards.py); a dispatcher in the callable that the
backend returns would cost as much a call, keep an unrewritten copy of every graph alive, and show up in no log of
recompilations.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from torch.compiler import is_compiling

from ..graphs.guards import guard_compilation
from ..graphs.tracing import break_graph
from ..planning.policies import Policy
from .choices import SETTINGS, Choice, CompileSettings, Rules, checks_of_environment, make_policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Override:
    """What a context puts in the place of a model's own policy: choices and rules, and of the settings those in `given`."""

    policy: Policy
    given: frozenset[str] = frozenset()

    def over(self, own: Policy) -> Policy:
        kept = {name: getattr(own, name) for name in SETTINGS if name not in self.given}
        return replace(self.policy, **kept)

    def __str__(self) -> str:
        return str(self.policy)


# What is open: [the override, what is open around it, whether compiled code with attention has run inside]. A list, because
# a context around a call costs as much as making it.
Entered = list[Any]
_ENTERED: ContextVar[Entered] = ContextVar("attnrewrite.attention_backend", default=[None, None, False])  # noqa: B039
_entered, _enter = _ENTERED.get, _ENTERED.set

# Equal choices are one object, so that a guard compares identities. Kept as long as a context or compiled code has them.
_ONE: weakref.WeakKeyDictionary[Override, weakref.ref[Override]] = weakref.WeakKeyDictionary()


def active() -> Override | None:
    """The choice of the innermost open context, None outside of all."""
    override: Override | None = _entered()[0]
    return override


def mark_used() -> None:
    """Compiled code with attention in it runs here: the context has something to change."""
    _entered()[2] = True


def guard_choice() -> None:
    """Makes the graph that is being compiled hold for the active choice only. Without Dynamo there is nothing to guard."""
    wanted = active()
    code = f"attnrewrite.attention_backend is {str(wanted)!r}" if wanted else "no attnrewrite.attention_backend"

    def unchanged(_: Any) -> bool:
        entered = _entered()
        if entered[0] is not wanted:
            return False
        entered[2] = True
        return True

    guard_compilation("ATTENTION_BACKEND", code, unchanged)


class AttentionContext:
    """What `attention_backend` returns: a context manager and a decorator. It may be entered again, also while it is open
    and in several threads and tasks at once."""

    __slots__ = ("override",)

    def __init__(self, override: Override) -> None:
        self.override = override

    def __enter__(self) -> AttentionContext:
        _enter([self.override, _entered(), False])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        override, outer, used = _entered()
        if override is not self.override:
            raise RuntimeError(
                f"{self!r} is left where another context is open: it was entered in another thread or task, or in a "
                "generator that was left open. Put the `with` around the call of the model"
            )
        _enter(outer)
        if used:
            outer[2] = True
        elif kind is None:
            warnings.warn(
                f"{self!r} changed nothing: no attention of a model compiled through attnrewrite ran inside. Compile it with "
                "torch.compile(model, backend=attnrewrite.with_backend(...)), or use "
                "attnrewrite.set_attention_backend(model, ...)",
                stacklevel=2,
            )

    def __call__(self, function: Function) -> Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"attention_backend decorates {function.__qualname__}, a generator, whose caller would run inside the context "
                "between two items: put a `with` around what calls the model"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def call_and_wait(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return call_and_wait  # type: ignore[return-value]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"attnrewrite.attention_backend({self.override})"


def attention_backend(
    *choices: Choice, rules: Rules | None = None, **settings: Unpack[CompileSettings]
) -> AttentionContext:
    """Inside `with attention_backend("flash", "native"):` compiled models use these choices, outside their own.

    It holds for every model compiled with `with_backend`, by `backend="attnrewrite"` or by `set_attention_backend`, on this
    thread or asyncio task. Of nested contexts the innermost holds. Choices and `rules` replace those of the model; the
    settings of `with_backend` do where they are given: `cast=None` turns a model's cast off.

    Each choice compiles once, at the first call inside; switching afterwards compiles nothing. PyTorch counts it as a
    recompilation: `torch._dynamo.config.recompile_limit` (8) is the most variants of one function, sizes included.
    A context in which no such model ran warns when it is left. As a decorator it also takes coroutine functions. A new
    thread starts outside (`contextvars.copy_context().run` takes the context along), an asyncio task with its creator's
    choice. What `torch.utils.checkpoint` runs again in a backward outside the context needs it there too, by its `context_fn`.

    Raises what `with_backend` raises for unknown names and settings.
    """
    if is_compiling():
        _not_traced()
    # Reading names costs tens of microseconds: a context around each step of a loop should not.
    if rules is None and not settings:
        try:
            return _known_context(choices)
        except TypeError:  # what cannot be hashed is neither name nor record: the error says so
            pass
    return _context(choices, rules, **settings)


def _context(choices: Any, rules: Any = None, **settings: Unpack[CompileSettings]) -> AttentionContext:
    if "checks" in settings and settings["checks"] is None:
        settings["checks"] = checks_of_environment()
    override = Override(make_policy(choices, rules, **settings), frozenset(settings))
    known = _ONE.get(override)
    one = known() if known is not None else None
    if one is None:
        _ONE[override] = weakref.ref(override)
        one = override
    return AttentionContext(one)


_known_context = functools.lru_cache(maxsize=256)(_context)


def _not_traced() -> None:
    """A compiled function that opens a context is broken there: what it calls inside is compiled by itself, with the choice."""
    break_graph("attnrewrite.attention_backend is entered inside a compiled function")
