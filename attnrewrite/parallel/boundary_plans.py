"""`BoundaryPlan`: a plan of diffusers (`_cp_plan`) as plain data, and `given_plan`, which reads one.

diffusers is not imported: a given plan is read by the names of its attributes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Module, ModuleList

from ..graphs.boundaries import Boundary, parameters_of


@dataclass(frozen=True)
class Cut:
    """A tensor that a plan splits among the ranks, or gathers from them."""

    at: Boundary
    dim: int
    dims: int | None  # the number of dimensions that the tensor has; None: not said


@dataclass(frozen=True)
class Disagreement:
    """Where a given plan and the graph differ."""

    where: str  # the argument or output, and its module
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class BoundaryPlan:
    """What `_cp_plan` of diffusers would be for a model. `str()` prints it as Python code, and what a given plan has wrong."""

    model: str  # the name of its class
    ranks: int
    splits: tuple[Cut, ...] = ()
    gathers: tuple[Cut, ...] = ()
    unsaid: tuple[str, ...] = ()  # what no such plan can say about the model, in words
    given: str = ""  # the plan that was compared: "_cp_plan" or "given"; "" without one
    disagreements: tuple[Disagreement, ...] = ()  # of the given plan and the graph
    remarks: tuple[str, ...] = ()  # what the graph alone cannot decide

    def code(self) -> str:
        """The plan as Python code; it needs `ContextParallelInput` and `ContextParallelOutput` of diffusers."""
        lines = ["{"]
        entries: dict[str, dict[int | str, list[Cut]]] = {}
        for each in self.splits:
            key = each.at.position if each.at.is_output else each.at.argument
            entries.setdefault(each.at.module, {}).setdefault(key, []).append(each)
        for module, arguments in entries.items():
            lines.append(f"    {module!r}: {{")
            # An argument that is a tuple has one list, behind the arguments that are tensors.
            for key, cuts in sorted(arguments.items(), key=lambda item: _is_tuple(item[1])):
                values = ", ".join(map(_split, cuts))
                lines.append(f"        {key!r}: {f'[{values}]' if _is_tuple(cuts) else values},")
            lines.append("    },")
        for each in self.gathers:
            lines.append(
                f"    {each.at.module!r}: ContextParallelOutput(gather_dim={each.dim}, expected_dims={each.dims}),"
            )
        return "\n".join([*lines, "}"]).replace("'", '"')

    def __str__(self) -> str:
        lines = [f"context parallelism of {self.model} over {self.ranks} ranks, in the form of diffusers:"]
        lines += [f"_cp_plan = {self.code()}"] if self.splits else ["no plan"]
        lines += _listed("no such plan can say:", self.unsaid)
        if self.given and not self.disagreements:
            lines.append(f"{self.given} agrees with the graph")
        lines += _listed(f"{self.given} disagrees with the graph:", map(str, self.disagreements))
        lines += _listed("to be checked by hand:", self.remarks)
        return "\n".join(lines)


def _listed(heading: str, items: Iterable[str]) -> list[str]:
    """A list, in which what is the same at several blocks stands once."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(re.sub(r"\.\d+\b", ".*", item), []).append(item)
    found = []
    for group in groups.values():
        more = f" (and {len(group) - 1} more such)" if len(group) > 1 else ""
        found += textwrap.wrap(f"{group[0]}{more}", 116, initial_indent="  - ", subsequent_indent="    ")
    return [heading, *found] if found else []


def starred(cuts: Iterable[Cut], model: Module) -> tuple[Cut, ...]:
    """Cuts that are alike at every module of a list, as one for "blocks.*"."""
    groups: dict[Any, list[Cut]] = {}
    for each in cuts:
        path = re.sub(r"\.\d+(?=\.|$)", ".*", each.at.module, count=1)
        groups.setdefault((path, each.at.argument, each.at.position, each.dim, each.dims), []).append(each)
    found: list[Cut] = []
    for (path, argument, position, dim, dims), group in groups.items():
        every = {name for name, _ in _below(model, path)}
        if len(every) > 1 and every == {each.at.module for each in group}:
            found.append(Cut(Boundary(path, argument, position), dim, dims))
        else:
            found += group
    return tuple(found)


def _is_tuple(cuts: list[Cut]) -> bool:
    """Whether these are parts of an argument that is a tuple."""
    return not cuts[0].at.is_output and cuts[0].at.position >= 0


def _split(cut: Cut) -> str:
    return f"ContextParallelInput(split_dim={cut.dim}, expected_dims={cut.dims}, split_output={cut.at.is_output})"


def given_plan(model: Module, plan: Any) -> tuple[list[Cut], list[Cut], list[Disagreement]]:
    """What a plan in the form of diffusers splits and gathers, and what of it names no part of the model.

    Raises `TypeError` for a plan that has another form.
    """
    if not isinstance(plan, Mapping):
        raise TypeError(
            f"given is {plan!r} ({type(plan).__name__}): give a dict of module paths, as _cp_plan of diffusers"
        )
    splits: list[Cut] = []
    gathers: list[Cut] = []
    wrong: list[Disagreement] = []
    for path, entry in plan.items():
        modules = dict(_below(model, str(path)))
        if not modules:
            wrong.append(Disagreement(f"the entry {path!r}", f"{type(model).__name__} has no such module"))
        for name, module in modules.items():
            if isinstance(entry, Mapping):
                for key, value in entry.items():
                    if isinstance(key, str) and key not in parameters_of(module):
                        text = f"forward of {type(module).__name__} has no such parameter"
                        wrong.append(Disagreement(f"{key} of {name or 'the model'!r}", text))
                    else:
                        splits += _splits(name, key, value)
            else:
                gathers += [
                    Cut(Boundary(name, "", position), each.gather_dim, each.expected_dims)
                    for position, each in enumerate(_several(entry))
                    if _has(each, "gather_dim", path)
                ]
    return splits, gathers, wrong


def _splits(module: str, key: Any, value: Any) -> Iterator[Cut]:
    for position, each in enumerate(_several(value)):
        if _has(each, "split_dim", f"{module}, {key}"):
            at = position if isinstance(value, list | tuple) else -1
            output = bool(each.split_output)
            boundary = Boundary(module, "", int(key)) if output else Boundary(module, str(key), at)
            yield Cut(boundary, each.split_dim, each.expected_dims)


def _has(each: Any, attribute: str, where: str) -> bool:
    if not hasattr(each, attribute):
        kind = "ContextParallelInput" if attribute == "split_dim" else "ContextParallelOutput"
        raise TypeError(f"given has {each!r} at {where!r}: give a {kind} of diffusers")
    return True


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _below(module: Module, path: str, before: str = "") -> Iterator[tuple[str, Module]]:
    """The modules that a path names, "*" for every module of a list."""
    if not path:
        yield before, module
        return
    first, _, rest = path.partition(".")
    names = list(module._modules) if first == "*" and isinstance(module, ModuleList) else [first]
    for name in names:
        child = module._modules.get(name)
        if child is not None:
            yield from _below(child, rest, f"{before}.{name}" if before else name)
