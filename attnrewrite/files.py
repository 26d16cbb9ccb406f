"""Writes files completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str], suffix: str = ".part") -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` at the end if the code inside raised nothing: a reader of `path`,
    in this process or another, sees the old content or the new one. Raises `OSError`, and leaves the old file in place.

    suffix: the end of the temporary file's name, where a writer requires one.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}. Make it first")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp gives permissions to the owner only
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes bytes, or text as UTF-8."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def writable(path: Path) -> None:
    """Raises `OSError` if no file can be written at `path`, before the work that fills the file."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to")
