"""The key-value store of `torch.distributed`: how ranks tell each other what they compile, without a collective."""

from __future__ import annotations

import datetime
from typing import Any

import torch


def published(key: str, text: str) -> None:
    """Puts a text where the other ranks find it."""
    _store().set(key, text)


def awaited(key: str, seconds: float) -> str | None:
    """The text under a key, as soon as some rank has published it; None if none has within `seconds`."""
    store = _store()
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
    except RuntimeError:  # DistStoreError, DistNetworkError: the limit has passed, or the store's process has ended
        return None
    found: bytes = store.get(key)
    return found.decode()


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
