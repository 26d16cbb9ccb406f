"""Writes files completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str], name: str = "part") -> Iterator[Path]:
    """A temporary file, which replaces `path` at the end if the code inside raised nothing: a reader of `path`, in this process
    or another, sees the old content or the new one. Raises `OSError`, which names `path`, and leaves the old file in place.

    name: of the temporary file, in a folder of its own beside `path`. Archives of PyTorch have it, without its ending, in them.
    """
    known_path(path)
    target = Path(path)
    writable(target)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise type(error)(error.errno, f"{target} cannot be written: {error.strerror}") from error
    try:
        yield folder / name
        os.replace(folder / name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def known_path(path: object) -> None:
    """Raises `TypeError` for what names no file: zipfile would read any other object as an open file."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {path!r} ({type(path).__name__}): give the name of a file, as text or a Path")


def writable(path: Path) -> None:
    """Raises `OSError` if no file can be written at `path`, before the work that fills the file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a folder. Name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no folder. Make it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no files may be made in {path.parent}")
