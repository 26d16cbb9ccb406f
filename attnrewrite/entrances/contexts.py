"""`attention_backend`: other choices of kernels for the compiled models that are called inside a `with`.

The active choice is a context variable, so that each thread and asyncio task has its own. A graph with attention is compiled
once for each choice: a guard of the compiled code checks that the active choice is still the one that the code was compiled
for. Dynamo itself uses lambda guards for such state (torch/_dynamo/guards.py). A dispatcher in the callable that the backend
returns would cost as much at each call, keep an unrewritten copy of every graph alive, and appear in no log of recompilations.
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
from ..planning.policies import Chosen, Policy
from .choices import SETTINGS, Choice, CompileSettings, Rules, checks_of_environment, make_policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Override:
    """The policy of a context. Its choices and rules replace those of a model, and so do the settings in `given`."""

    policy: Policy
    given: frozenset[str] = frozenset()  # names of the settings that the user gave

    def over(self, own: Policy) -> Policy:
        kept = {name: getattr(own, name) for name in SETTINGS if name not in self.given}
        return replace(self.policy, **kept)

    def __str__(self) -> str:
        return str(self.policy)


# An open context: [its override, the open context around it, whether compiled code with attention has run inside]. A list,
# because every `with` makes one, and a list is made fast.
Entered = list[Any]
_ENTERED: ContextVar[Entered] = ContextVar("attnrewrite.attention_backend", default=[None, None, False])  # noqa: B039
_entered, _enter = _ENTERED.get, _ENTERED.set

# Equal overrides are one object, so that guards compare identities. An entry lives while a context or compiled code holds it.
_ONE: weakref.WeakKeyDictionary[Override, weakref.ref[Override]] = weakref.WeakKeyDictionary()


def active() -> Override | None:
    """The override of the innermost open context, None outside of any."""
    override: Override | None = _entered()[0]
    return override


def mark_used() -> None:
    """Notes that compiled code with attention runs in the open context, which then does not warn."""
    _entered()[2] = True


def guard_choice() -> None:
    """Guards the code that is being compiled on the active choice. Without Dynamo there is nothing to guard."""
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
    """The context manager and decorator that `attention_backend` returns. It may be entered several times, also while it is
    open, and in several threads and tasks at once."""

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
                f"{self!r} changed nothing: no attention of a model compiled through attnrewrite ran inside. Compile the "
                "model with torch.compile(model, backend=attnrewrite.with_backend(...)), or use "
                "attnrewrite.set_attention_backend(model, ...)",
                stacklevel=2,
            )

    def __call__(self, function: Function) -> Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"attention_backend decorates {function.__qualname__}, a generator, whose caller would run inside the context "
                "between two items: put a `with` around the call of the model"
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
    """Makes a context in which compiled models use other kernels.

        with attnrewrite.attention_backend("flash", "native"):
            compiled(x)      # flash
        compiled(x)          # the model's own choices

    choices, rules: as in `with_backend`. They replace those of the model.
    settings: as in `with_backend`. A setting that is given replaces that of the model: `cast=None` turns the model's cast off.

    Returns a context manager, which also decorates functions and coroutine functions. It applies to every model compiled with
    `with_backend`, `backend="attnrewrite"` or `set_attention_backend`, on this thread or asyncio task; of nested contexts the
    innermost applies. A new thread starts without a context (`contextvars.copy_context().run` takes it along), an asyncio
    task starts with its creator's. At its end a context warns if no such model ran inside.

    Each choice compiles once, at the first call inside; switching afterwards compiles nothing. PyTorch counts each choice as a
    recompilation: `torch._dynamo.config.recompile_limit` (8) is the most variants of one function, sizes included. If
    `torch.utils.checkpoint` runs the model again in a backward outside of the context, give it the context by `context_fn`.

    Raises the errors of `with_backend` for unknown names and settings.
    """
    if is_compiling():
        _not_traced()
    # Cached, since reading names costs tens of microseconds, too much for a context around each step of a loop.
    if rules is None and not settings:
        try:
            return _known_context(choices)
        except TypeError:  # a choice without a hash is neither name nor record: `_context` raises the error
            pass
    return _context(choices, rules, **settings)


def with_rules(context: AttentionContext, rules: tuple[tuple[str, tuple[Chosen, ...]], ...]) -> AttentionContext:
    """The context with these rules too, of which the context's own come first."""
    policy = context.override.policy
    return _of(replace(context.override, policy=replace(policy, rules=(*policy.rules, *rules))))


def _context(choices: Any, rules: Any = None, **settings: Unpack[CompileSettings]) -> AttentionContext:
    if "checks" in settings and settings["checks"] is None:
        settings["checks"] = checks_of_environment()
    return _of(Override(make_policy(choices, rules, **settings), frozenset(settings)))


def _of(override: Override) -> AttentionContext:
    known = _ONE.get(override)
    one = known() if known is not None else None
    if one is None:
        _ONE[override] = weakref.ref(override)
        one = override
    return AttentionContext(one)


_known_context = functools.lru_cache(maxsize=256)(_context)


def _not_traced() -> None:
    """Breaks the graph of a compiled function that opens a context; calls inside are compiled separately, with the choice."""
    break_graph("attnrewrite.attention_backend is entered inside a compiled function")
