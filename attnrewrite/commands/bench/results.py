"""The file of a benchmark: JSON with the machine, the versions and what was measured. Written whole or not at all."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from ...files import write_whole
from ...kernels.machines import installed
from ...planning.this_machine import machine_of

VERSION = 1
# What two runs must have in common to stand in one file.
SAME = ("version", "device", "packages", "small")


def header(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Where and with what a run was made."""
    machine = machine_of(device)
    packages = dict(machine.packages)
    if version := installed("diffusers"):
        packages["diffusers"] = version
    return {
        "version": VERSION,
        "device": machine.name,
        "machine": machine.to_dict(),
        "packages": packages,
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "small": small,
    }


def read(path: Path) -> dict[str, Any]:
    """Raises `ValueError` for a file that is no result of `attnrewrite bench`, `OSError` for one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']!r}, known is {VERSION}")
        if not isinstance(found["device"], str) or not {"models", "kernels"} & found.keys():
            raise KeyError("models")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of attnrewrite bench ({error})") from error
    result: dict[str, Any] = found
    return result


def joined(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier result with what was measured now, which replaces what it has of the same model or shape.

    Raises `ValueError` where machine or versions differ: figures of two machines do not stand beside each other.
    """
    for key in SAME:
        if earlier.get(key) != now.get(key):
            raise ValueError(f"its {key} is {earlier.get(key)!r}, of this run {now.get(key)!r}")
    result = {**earlier, **now}
    for key in ("models", "kernels"):
        if key in earlier:
            result[key] = {**earlier[key], **now.get(key, {})}
    for key in ("ceiling", "commands"):
        result[key] = [*earlier.get(key, []), *now.get(key, [])]
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON has no NaN and no infinity: they are written as text."""
    finite = json.loads(json.dumps(result), parse_constant=str)
    write_whole(path, json.dumps(finite, indent=1, allow_nan=False) + "\n")
