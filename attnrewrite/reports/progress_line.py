"""`ProgressLine`: tells on stderr what a long run is doing."""

from __future__ import annotations

import contextlib
import sys


class ProgressLine:
    """A context that tells what a long run is doing: on a terminal in one line that each text overwrites; elsewhere, as in a
    log, in a line for each text that is no detail.

    name: what runs, as "attnrewrite.tune".
    on: False is silent.
    """

    def __init__(self, name: str, on: bool = True) -> None:
        self._name = name
        self._on = on and sys.stderr is not None
        self._overwrites = self._on and sys.stderr.isatty()
        self._width = 0

    def say(self, text: str, detail: bool = False) -> None:
        """detail: too often for a log."""
        text = f"{self._name}: {text}"
        if self._overwrites:
            text = text[:118]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif self._on and not detail:
            self._write(text + "\n")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Clears the line of a terminal."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # somebody has closed stderr
            sys.stderr.write(text)
            sys.stderr.flush()
