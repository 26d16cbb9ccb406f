"""A key for PyTorch's caches: a text that two processes share exactly if attnrewrite would rewrite a graph alike in both."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from ..graphs.operators import is_operator, is_packet
from ..kernels.machines import Machine
from ..kernels.sources import Source, SourceError, load
from ..planning.policies import Candidate, Policy
from ..planning.this_machine import machine_of
from ..version import __version__

PACKAGE = __name__.split(".")[0]


class UnknownValueError(Exception):
    """A record holds a value without a text that another process could compare."""


Load = Callable[[Source, bool], str]


def identity_of(
    policy: Policy, version: str = __version__, machines: Sequence[Machine] | None = None, load: Load = load
) -> str | None:
    """Returns a digest of the policy with its records, the machines here with every version, the libraries of the choices, and
    this package itself. None if a record holds a value that cannot be described, or a choice depends on more ("tune").

    Loads the libraries of choices that this machine can run: the commit of a library from the hub is known only then.

    version: of this package. machines: None for those here. load: loads a library and returns which it is (`sources.load`).
    """
    machines = machines_here() if machines is None else machines
    try:
        parts = [version, package_digest(), described(policy), [machine.to_dict() for machine in machines]]
        parts.append(_libraries(policy, machines, load))
    except UnknownValueError:
        return None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def machines_here() -> list[Machine]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [machine_of(torch.device(device)) for device in devices]


def _libraries(policy: Policy, machines: Sequence[Machine], load: Load) -> list[str]:
    found = []
    for machine in machines:
        candidates: list[Candidate] = []
        for each in (*policy.choices, *(each for _, chosen in policy.rules for each in chosen)):
            named = (each,) if isinstance(each, Candidate) else each.libraries(machine)
            if named is None:
                raise UnknownValueError(f"{each.name}: what it chooses depends on more than the policy")
            candidates += named
        for record in (candidate.on(machine) for candidate in candidates):
            if record.source is not None and machine.device in record.devices and machine.has(record.requires):
                try:
                    found.append(load(record.source, policy.trust_remote_code))
                except SourceError as error:  # the plan refuses the kernel for the same reason
                    found.append(str(error.refused.code.value))
    return found


@functools.cache
def package_digest() -> str:
    """The digest of every Python file of this package: in a checkout files change while the version stays."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in package_files())).hexdigest()


def package_files() -> list[Path]:
    """Every Python file of this package, sorted, with those behind the links of a checkout (rglob follows no links)."""
    folders = os.walk(Path(__file__).parents[1], followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))


def described(value: Any) -> Any:
    """Describes a value as JSON; a function by its code, closure, defaults, and its whole file, which holds its helpers."""
    if value is None or isinstance(value, str | bool | int | float):
        return (
            [type(value).__name__, repr(value)] if not isinstance(value, enum.Enum) else [str(type(value)), value.name]
        )
    if isinstance(value, FunctionType):
        return _function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [str(type(value)), [[each.name, described(getattr(value, each.name))] for each in fields(value)]]
    if isinstance(value, Mapping):
        return ["mapping", sorted([described(key), described(item)] for key, item in value.items())]
    if isinstance(value, Set):
        return ["set", sorted(json.dumps(described(item)) for item in value)]
    if isinstance(value, tuple | list):
        return [type(value).__name__, [described(item) for item in value]]
    if isinstance(value, functools.partial):
        return ["partial", described(value.func), described(value.args), described(value.keywords)]
    if is_operator(value) or is_packet(value) or isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value)]
    if isinstance(value, bytes | CodeType):
        return _code(value) if isinstance(value, CodeType) else ["bytes", value.hex()]
    if isinstance(value, type | ModuleType) or inspect.isbuiltin(value):
        return [type(value).__name__, f"{getattr(value, '__module__', '')}.{value.__name__}", _file(value)]
    raise UnknownValueError(repr(value))


def _function(function: FunctionType) -> Any:
    name = f"{function.__module__}.{function.__qualname__}"
    if name.split(".")[0] == PACKAGE and function.__closure__ is None:
        return ["function", name]  # its code is in package_digest
    if not (file := _file(function)):
        raise UnknownValueError(f"{name}, whose file is not known: what it calls may be anything")
    cells = [described(cell.cell_contents) for cell in function.__closure__ or ()]
    defaults = [described(function.__defaults__), described(function.__kwdefaults__)]
    named = {each: function.__globals__.get(each) for each in function.__code__.co_names}
    settings = {each: value for each, value in named.items() if isinstance(value, str | bool | int | float | tuple)}
    return ["function", name, _code(function.__code__), cells, defaults, described(settings), file]


def _code(code: CodeType) -> Any:
    constants = [described(each) if each is not Ellipsis else "..." for each in code.co_consts]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars]


def _file(value: Any) -> str:
    try:
        path = inspect.getsourcefile(value)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    except (TypeError, OSError):  # built in, or typed at a prompt
        return ""
