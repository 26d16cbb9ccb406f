"""Arguments and fields that are True or False, and nothing that only counts as one of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def are_flags(**given: Any) -> None:
    """Raises `TypeError` for a value that is neither True nor False: in a configuration "no" would count as True."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}): give True or False")


def has_flags(record: Any) -> None:
    """`are_flags` for the fields of a dataclass that are annotated `bool`."""
    are_flags(**{field.name: getattr(record, field.name) for field in fields(record) if field.type in ("bool", bool)})
