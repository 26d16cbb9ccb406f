"""Shared by all pictures: matplotlib, imported only when a picture is drawn, and files that are written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from ..files import writable, write_whole

FORMATS = (".png", ".svg", ".pdf")
# Colours that people with a colour vision deficiency tell apart (Okabe and Ito, https://jfly.uni-koeln.de/color/), and grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def possible(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a picture after checking that it can be drawn. Raises `ImportError` without matplotlib,
    `ValueError` for an ending that is not in `FORMATS`, `OSError` for a path that cannot be written."""
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{str(path)!r} ends in {file.suffix!r}: a picture is one of {', '.join(FORMATS)}")
    writable(file)
    figure(1, 1)
    return file


def figure(width: float, height: float) -> Any:
    """Makes a matplotlib figure of `width` x `height` inches, without `pyplot` and its process-wide state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}): pip install 'attnrewrite[plot]', or keep the numbers as JSON"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(made: Any, file: Path) -> None:
    content = io.BytesIO()
    made.savefig(content, format=file.suffix[1:].lower(), dpi=150)
    write_whole(file, content.getvalue())
