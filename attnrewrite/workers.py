"""`Worker`: runs functions on a thread of its own, and leaves it behind when one does not come back in time.

A new thread also has none of the caller's modes (a compilation in progress, autocast, fake tensors, inference mode).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class OverdueError(Exception):
    """A function is still running at its time limit. It cannot be stopped: its thread goes on without anybody waiting."""


class Worker:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Any] | None = None

    def run(self, function: Callable[[], Result], seconds: float) -> Result:
        """What the function returns or raises. Raises `OverdueError` after so many seconds."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(self._jobs,), name="attnrewrite.tune", daemon=True).start()
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

    def leave(self) -> None:
        """Ends the thread behind what it is doing now."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

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
                job = function = finished = None  # what it held is free
