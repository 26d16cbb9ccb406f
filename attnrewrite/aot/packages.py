"""AOTInductor packages: compiled programs with swapped kernels, for Python and C++ processes."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from ..files import whole
from ..graphs.inductor_patches import failing_ops_end_the_call
from ..graphs.operators import defined_in_python
from ..kernels.flags import are_flags
from ..reports.report import Report
from .archives import NAME, ProgramFileError, opened, timeless
from .check_ops import CHECKS, is_assertion
from .layouts import Layouts, layouts_of, without_overlaps
from .manifests import MANIFEST, Manifest, check_machine, manifest_of
from .programs import record_of

# The header with the C++ implementation of the checks. A C++ program that loads a package includes it.
CHECKS_HEADER = Path(__file__).with_name("program_checks.h")


LAYOUTS = "extra/attnrewrite_inputs.json"


class NeedsPythonError(RuntimeError):
    """A package for C++ was asked for, but a chosen kernel is a Python function. The message names sites and kernels."""


@dataclass(frozen=True)
class CompiledPackage:
    """A package that `aot_compile` has written."""

    path: str  # of the file
    python: tuple[str, ...]  # "site (kernel)" for each kernel that needs a Python process; empty: C++ can load it
    report: Report | None  # the plan; None for a program that was not rewritten

    def __str__(self) -> str:
        needs = f"needs Python for {', '.join(self.python)}" if self.python else "runs from Python and C++"
        return f"{self.path}: {needs}"


def aot_compile(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    cpp: bool = False,
    weights: bool = True,
    options: Mapping[str, Any] | None = None,
) -> CompiledPackage:
    """Compiles an exported program with AOTInductor, for the device of its tensors, and writes the package to a file.

        attnrewrite.aot_compile(attnrewrite.export(model, args, backend="_native_flash"), "model.pt2")
        step = attnrewrite.load_package("model.pt2")

    program: an `ExportedProgram`, rewritten or not.
    path: the file to write. It is written whole or not at all.
    cpp: True: the package is for a C++ process. A chosen kernel that is a Python function then raises `NeedsPythonError` now
        instead of failing at load. The C++ program includes attnrewrite/aot/program_checks.h, which implements the checks.
    weights: False leaves the weights out of the package, for `load_package(path, weights=...)`. Several models, or blocks of
        one model, can then share a package.
    options: options of Inductor (`torch._inductor.list_options()`).

    Returns a `CompiledPackage`. Raises `TypeError` if `program` is no `ExportedProgram`, `ValueError` for an input with gaps in
    memory and symbolic sizes, and what Inductor raises.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program is {type(program).__name__}: give a torch.export.ExportedProgram, as attnrewrite.export returns it"
        )
    are_flags(cpp=cpp, weights=weights)
    python = python_sites(program.graph_module)
    if cpp and python:
        raise NeedsPythonError(
            f"cpp=True, and {len(python)} of the program's kernels run in Python: {', '.join(python)}. Choose PyTorch's own "
            'kernels ("_native_flash", "_native_cudnn", "native") there, or load the package from Python'
        )
    record, program = record_of(program), without_overlaps(program)
    layouts = layouts_of(program)
    settings = dict(options or {})
    if not weights:
        settings.setdefault("aot_inductor.package_constants_in_so", False)
    with whole(path, NAME) as temporary, failing_ops_end_the_call(CHECKS):
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=settings)
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(timeless(f"{folder}/{LAYOUTS}"), layouts)
            if record is not None:
                text = manifest_of(record.report, record.checks, python).to_json()
                archive.writestr(timeless(f"{folder}/{MANIFEST}"), text)
    return CompiledPackage(os.fspath(path), python, record.report if record else None)


class LoadedPackage:
    """A loaded package, called with the arguments of the model. Inputs whose strides differ from the example's are copied.

    report: the plan; None if the package holds none.
    """

    def __init__(
        self, model: Any, report: Report | None, weights: Mapping[str, Any] | None, layouts: Layouts | None
    ) -> None:
        self.model = model
        self.layouts = layouts
        self.report = report
        self.weights = weights  # kept alive: the package holds only their addresses

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layouts is not None:
            args, kwargs = self.layouts(args, kwargs)
        return self.model(*args, **kwargs)


def load_package(
    path: str | os.PathLike[str],
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    device_index: int = -1,
    trust_remote_code: bool = False,
) -> LoadedPackage:
    """Loads a package of `aot_compile` into this process.

        step = attnrewrite.load_package("model.pt2")
        output = step(*args, **kwargs)

    path: the file of the package.
    weights: the state_dict for a package that was compiled with `weights=False`. The package reads these tensors in place,
        without a copy; they must be on its device.
    device_index: the index of the GPU; -1: the current GPU.
    trust_remote_code: as in `with_backend`, for a kernel of the kernels hub.

    Returns a `LoadedPackage`. Raises `ProgramFileError` for a missing or truncated file, another device or compute
    capability than the kernels were chosen for, a kernel's library that is missing or of another version, and `weights` that
    lack a tensor.
    """
    are_flags(trust_remote_code=trust_remote_code)
    with opened(path) as archive:
        if not any(name.endswith(".so") for name in archive.entries):
            raise ProgramFileError(
                f"{path}: expected an AOTInductor package, found another archive. attnrewrite.aot_compile writes packages; "
                "attnrewrite.load reads exported programs"
            )
        text, layouts = archive.read(MANIFEST), archive.read(LAYOUTS)
    manifest = None if text is None else Manifest.from_json(text, path)
    if manifest is not None and (differing := check_machine(manifest, path, trust_remote_code)):
        warnings.warn(f"{path}: {'; '.join(differing)}", stacklevel=2)
    model = torch._inductor.aoti_load_package(os.fspath(path), device_index=device_index)
    if weights is not None:
        needed = {name: weights[name] for name in model.get_constant_fqns() if name in weights}
        missing = [name for name in model.get_constant_fqns() if name not in weights]
        if missing:
            raise ProgramFileError(f"{path}: the package reads {missing[0]!r}, which is not among the weights given")
        model.load_constants(needed, check_full_update=True, user_managed=True)
    return LoadedPackage(
        model, manifest.report if manifest else None, weights, Layouts(layouts, model) if layouts else None
    )


def python_sites(module: GraphModule) -> tuple[str, ...]:
    """Names the ops of a graph that are Python functions: "site (kernel)", or the name of an op that is not attnrewrite's."""
    found = []
    for each in module.modules():
        if isinstance(each, GraphModule):
            found += [_named(node) for node in each.graph.nodes if _is_python(node) and not is_assertion(node)]
    return tuple(dict.fromkeys(found))


def _is_python(node: Node) -> bool:
    return node.op == "call_function" and defined_in_python(node.target)


def _named(node: Node) -> str:
    given = node.kwargs
    if "site" in given and "backend" in given:
        return f"{given['site']} ({given['backend']})"
    return str(node.target)


__all__ = ["CHECKS_HEADER", "CompiledPackage", "LoadedPackage", "NeedsPythonError", "aot_compile", "load_package"]
