"""`Worker`: runs functions on a thread of its own, and abandons the thread if a function does not return in time.

The thread has none of the caller's modes (a compilation in progress, autocast, fake tensors, inference mode).
"""

from __future__ import annotations

import atexit
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..graphs.nodes import new_fake_mode

Result = TypeVar("Result")


class OverdueError(Exception):
    """A function is still running at its time limit. It cannot be stopped: its thread goes on, and its result is lost."""


_LEFT: list[threading.Thread] = []
PATIENCE = 5.0  # seconds that the process waits at its end for abandoned threads


def said(error: BaseException) -> str:
    """The first line of an error as text, which keeps none of the error's frames and tensors alive."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


class Worker:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Any] | None = None
        self._thread: threading.Thread | None = None

    def run(self, function: Callable[[], Result], seconds: float) -> Result:
        """Returns the function's result, or raises its exception. Raises `OverdueError` after `seconds`."""
        if self._jobs is None:
            _enter_a_fake_mode()
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._work, args=(self._jobs,), name="attnrewrite.tune", daemon=True)
            self._thread.start()
        finished: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._jobs.put((function, finished))
        try:
            well, result = finished.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.leave()
            raise OverdueError(f"still running after {seconds:.1f} s") from None
        if well:
            return result  # type: ignore[no-any-return]
        raise result

    def attempt(
        self, function: Callable[[], Result], limit: float, spent: float = 0.0
    ) -> tuple[Result | None, str | None]:
        """The function's result; or why there is none: it raised, or took longer than the rest of `limit` seconds."""
        try:
            return self.run(function, limit - spent), None
        except OverdueError:
            return None, f"not ready within its {limit:g} s, and left running"
        except Exception as problem:
            return None, said(problem)

    def leave(self) -> None:
        """Ends the thread after its current function."""
        if self._jobs is not None and self._thread is not None:
            self._jobs.put(None)
            _LEFT[:] = [*(thread for thread in _LEFT if thread.is_alive()), self._thread]
            self._jobs = self._thread = None

    def interrupt(self, seconds: float = PATIENCE) -> None:
        """Raises `SystemExit` in the thread's Python code, and waits up to `seconds` for the thread to end: code in C++ runs
        to its end first. `SystemExit` is the exception of which threads print no traceback."""
        thread = self._thread
        self.leave()
        if thread is not None and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(seconds)

    def check(self) -> None:
        """Raises `OverdueError` if the running function was abandoned. To be called between two of its steps."""
        if threading.current_thread() is not self._thread:
            raise OverdueError("nobody waits for this")

    def _work(self, jobs: queue.SimpleQueue[Any]) -> None:
        with torch.no_grad():
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while (job := jobs.get()) is not None:
                function, finished = job
                try:
                    finished.put((True, function()))
                except BaseException as error:
                    finished.put((False, error))
                job = function = finished = None  # frees the tensors that these hold


def _enter_a_fake_mode() -> None:
    """Makes sure that a worker is never the first thread to enter a fake tensor mode. Without a GPU, a PyTorch built for CUDA
    keeps a device guard of that first thread, and reads it after the thread has ended (segfault, 2.11)."""
    with new_fake_mode():
        pass


@atexit.register
def _wait() -> None:
    """Waits for abandoned threads: a thread that returns from C++ into an interpreter that has ended aborts the process
    (before Python 3.14)."""
    end = time.monotonic() + PATIENCE
    for thread in _LEFT:
        thread.join(max(0.0, end - time.monotonic()))
