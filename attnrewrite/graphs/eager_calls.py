"""Sees the calls of attention, SDPA or a library's, that run outside of every compiled graph: where they stand, and which graph
break is the reason."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from traceback import FrameSummary
from types import FrameType
from typing import Any

import torch
from torch.fx import GraphModule

from .nodes import ENCODER_LAYER, NATIVE_MHA, OUR_FILES, SDPA

_CALLED = {
    SDPA: "scaled_dot_product_attention",
    ENCODER_LAYER: "TransformerEncoderLayer",
    NATIVE_MHA: "MultiheadAttention",
}
# Functions of Python that are attentions too, each with the packages that have it: they are known by name, since no library is
# imported here.
_FLASH = frozenset({"flash_attn", "flash_attn_interface", "flash_attn_3", "fa3_fwd_interface"})
_PYTHON = {
    "memory_efficient_attention": frozenset({"xformers"}),
    "sageattn": frozenset({"sageattention"}),
    "sageattn_varlen": frozenset({"sageattention"}),
    "flash_attn_func": _FLASH,
    "flash_attn_qkvpacked_func": _FLASH,
    "flash_attn_kvpacked_func": _FLASH,
    "flash_attn_varlen_func": _FLASH,
    "flash_attn_varlen_qkvpacked_func": _FLASH,
    "flash_attn_varlen_kvpacked_func": _FLASH,
    "flash_attn_with_kvcache": _FLASH,
}
_PACKAGES = frozenset().union(*_PYTHON.values())
_TORCH = os.path.dirname(torch.__file__) + os.sep
_GRAPHS = ("<eval_with_key>", os.path.join(_TORCH, "fx") + os.sep)  # files of graphs that run as Python code
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")  # what Dynamo calls the rest of a function after a break
MOST_EVENTS = 20_000_000  # of Python's profile hook; then it stops, a few seconds after it started


@dataclass(frozen=True)
class EagerCall:
    """Calls of attention at one line of Python code that ran in no compiled graph."""

    name: str  # "scaled_dot_product_attention", the fused layer of torch.nn, or "flash_attn's flash_attn_func"
    file: str
    line: int
    function: str
    calls: int
    reason: str  # the graph break that took the line out of the graph, as Dynamo says it, with its place; "": not known

    def __str__(self) -> str:
        times = f"{self.calls} calls" if self.calls > 1 else "1 call"
        why = self.reason or "no graph break is known here: code that is never compiled, or a limit of recompilations"
        return f"{times} of {self.name} at {self.file}:{self.line} in {self.function} ({why})"


class EagerCalls:
    """Counts, on one thread, the calls of attention that run outside of compiled graphs.

    Python's profile hook (`sys.setprofile`) sees each call of a C function with the function itself, under whatever name a
    model has imported it, and each call of a Python function with its code. Nothing of PyTorch is changed. The hook is off
    while Dynamo compiles, since it slows Python down.
    Nothing is counted where another profiler has the hook.
    """

    def __init__(
        self, until: FrameType | None = None, then: Callable[[], None] | None = None, compiling: bool = False
    ) -> None:
        """until: counting stops when this frame returns, and `then` is called. compiling: Dynamo is compiling now: counting
        starts at the end of it."""
        self._until, self._then = until, then
        self._found: dict[tuple[str, str, int, str], tuple[int, str]] = {}  # place -> calls, reason of the first
        self._thread = threading.get_ident()
        self._running = False
        self._events = 0
        self._holds = int(compiling)

    def __enter__(self) -> EagerCalls:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def found(self) -> list[EagerCall]:
        """The calls, in the order in which the first of each line ran."""
        return [
            EagerCall(name, file, line, function, calls, reason)
            for (name, file, line, function), (calls, reason) in self._found.items()
        ]

    def start(self) -> None:
        if sys.getprofile() is not None:
            return
        self._running = True
        torch._dynamo.callback.callback_handler.register_start_callback(self._hold)
        torch._dynamo.callback.callback_handler.register_end_callback(self._go_on)
        self._hook()

    def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        self._until = None  # a frame holds its tensors
        with suppress(ValueError):  # torch._dynamo.reset() has removed them
            torch._dynamo.callback.callback_handler.remove_start_callback(self._hold)
        with suppress(ValueError):
            torch._dynamo.callback.callback_handler.remove_end_callback(self._go_on)
        self._unhook()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Counts nothing inside."""
        self._hold()
        try:
            yield
        finally:
            self._go_on()

    def _hold(self, *_: object) -> None:
        if threading.get_ident() == self._thread:
            self._holds += 1
            self._unhook()

    def _go_on(self, *_: object) -> None:
        if threading.get_ident() == self._thread:
            self._holds = max(0, self._holds - 1)
            self._hook()

    def _hook(self) -> None:
        if self._until is not None and not _is_running(self._until):  # it returned while Dynamo was compiling
            self.stop()
        if self._running and not self._holds and sys.getprofile() is None:
            sys.setprofile(self._event)

    def _unhook(self) -> None:
        if sys.getprofile() == self._event:
            sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            if arg in _CALLED:
                self._note(_CALLED[arg], frame)
        elif event == "call":
            if (name := frame.f_code.co_name) in _PYTHON and _package(frame) in _PYTHON[name]:
                self._note_library(f"{_package(frame)}'s {name}", frame.f_back)
        elif event == "return":
            self._events += 1
            if frame is self._until or self._events > MOST_EVENTS:
                self.stop()
                if self._then is not None:
                    self._then()

    def _note_library(self, name: str, caller: FrameType | None) -> None:
        """Notes a call, unless a kernel of ours or a function of such a library makes it."""
        if caller is None or caller.f_code.co_filename.startswith(OUR_FILES) or _package(caller) in _PACKAGES:
            return
        self._note(name, caller)

    def _note(self, name: str, caller: FrameType) -> None:
        stack = []
        for frame in _stack(caller):
            if frame is self._until:
                break
            if frame.f_code.co_filename.startswith(_GRAPHS):
                return
            if not frame.f_code.co_filename.startswith((_TORCH, OUR_FILES)):
                stack.append((frame.f_code.co_filename, _plain(frame.f_code.co_name), frame.f_lineno))
        if stack:
            file, function, line = stack[0]
            calls, reason = self._found.get((name, file, line, function), (0, None))
            self._found[name, file, line, function] = calls + 1, _reason(stack) if reason is None else reason


def watch_rest_of_call(then: Callable[[list[EagerCall]], None]) -> None:
    """Watches the rest of the call in which Dynamo is compiling now, on this thread, and calls `then` with what was found when
    the compiled function returns. Does nothing outside of such a call."""
    compiling = [
        each for each in _stack(sys._getframe(1)) if each.f_code.co_filename == torch._dynamo.eval_frame.__file__
    ]
    if not compiling:
        return
    calls = EagerCalls(compiling[-1], lambda: then(calls.found), compiling=True)
    calls.start()


def ends_in_a_break(graph_module: GraphModule) -> bool:
    """Whether Dynamo ended this graph before the code that it was compiling had ended."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def _reason(stack: list[tuple[str, str, int]]) -> str:
    """The last graph break in one of the functions of a stack, or in what such a function calls of PyTorch's Python code, the
    innermost function first."""
    breaks = []
    for each in torch._dynamo.utils.graph_break_reasons:
        own = [place for place in each.user_stack or () if not place.filename.startswith(_TORCH)]
        if own:
            breaks.append((own[-1], each.user_stack[-1], each.reason))
    for file, function, _ in stack:
        for place, inner, reason in reversed(breaks):
            if (place.filename, _plain(place.name)) == (file, function):
                at = f"line {place.lineno}" if file == stack[0][0] else f"{file}:{place.lineno}"
                return f"graph break at {at}: {_described(reason, None if inner is place else inner)}"
    return ""


def _described(reason: str, inside: FrameSummary | None) -> str:
    """What Dynamo says of a graph break in one line. inside: the place in PyTorch's own code, which names no line of a model's.

    Dynamo's first line says what kind of break it is ("Attempted to call function marked as skipped"). Inside of PyTorch, where
    no user wrote such a call, the explanation is said, and the place."""
    lines = [line.strip() for line in reason.strip().splitlines()]
    if inside is None:
        return lines[0]
    explained = next((line for line in lines if line.startswith("Explanation: ")), "").removeprefix("Explanation: ")
    file = inside.filename.removeprefix(os.path.dirname(_TORCH.rstrip(os.sep)) + os.sep)
    return f"{explained.rstrip('.') or lines[0]}, in {inside.name} at {file}:{inside.lineno}"


def _package(frame: FrameType) -> str:
    """The package whose code a frame runs."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_running(sought: FrameType) -> bool:
    """Whether this thread is still in a frame."""
    return any(frame is sought for frame in _stack(sys._getframe(1)))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _plain(function: str) -> str:
    return _RESUMED.sub(r"\1", function)
