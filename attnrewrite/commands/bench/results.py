"""The result file of a benchmark: JSON with the machine, the versions and the measurements. Written whole or not at all."""

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
# Two runs can share a file only if they agree in these.
SAME = ("version", "device", "packages", "small")


def header(device: torch.device, small: bool = False) -> dict[str, Any]:
    """Describes the machine and the versions of a run."""
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
    """Reads a result. Raises `ValueError` if the file is no result of `attnrewrite bench`, `OSError` if it is unreadable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"its version is {found['version']!r}, this attnrewrite reads version {VERSION}")
        if not isinstance(found["device"], str) or not {"models", "kernels"} & found.keys():
            raise KeyError("models")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of attnrewrite bench ({error})") from error
    result: dict[str, Any] = found
    return result


def joined(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Merges two results. New records replace earlier ones of the same model or shape.

    Raises `ValueError` where the machine or the versions differ: figures of two machines must not share a table.
    """
    for key in SAME:
        if earlier.get(key) != now.get(key):
            raise ValueError(f"its {key} is {earlier.get(key)!r}, the {key} of this run is {now.get(key)!r}")
    result = {**earlier, **now}
    for key in ("models", "kernels"):
        if key in earlier:
            result[key] = {**earlier[key], **now.get(key, {})}
    for key in ("ceiling", "commands"):
        result[key] = [*earlier.get(key, []), *now.get(key, [])]
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result. NaN and infinity become text, because JSON has neither."""
    finite = json.loads(json.dumps(result), parse_constant=str)
    write_whole(path, json.dumps(finite, indent=1, allow_nan=False) + "\n")
