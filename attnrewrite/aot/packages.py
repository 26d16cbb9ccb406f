"""AOTInductor packages: a program with swapped kernels, compiled, for Python and for C++."""

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
from ..reports.report import Report
from .archives import ProgramFileError, opened
from .check_ops import CHECKS, is_assertion
from .layouts import Layouts, layouts_of
from .manifests import MANIFEST, Manifest, check_machine, manifest_of
from .programs import record_of

# What a C++ process includes for the nodes that check: the op's C++ half.
CHECKS_HEADER = Path(__file__).with_name("program_checks.h")


LAYOUTS = "extra/attnrewrite_inputs.json"


class NeedsPythonError(RuntimeError):
    """A kernel that only a Python process has, in a package for C++. The message has the sites and the kernels."""


@dataclass(frozen=True)
class CompiledPackage:
    """path: the file. python: "site (kernel)" for each kernel that only a Python process has; empty: C++ may load it.
    report: the plan, None for a program that was not rewritten."""

    path: str
    python: tuple[str, ...]
    report: Report | None

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
    """Compiles a program with AOTInductor, for the device that its tensors are on, and writes the package to `path`.

        attnrewrite.aot_compile(attnrewrite.export(model, args, backend="_native_flash"), "model.pt2")
        step = attnrewrite.load_package("model.pt2")

    cpp: the package is for a C++ process. Raises `NeedsPythonError` now, not at load, if a chosen kernel is a Python function.
        A C++ program includes attnrewrite/aot/program_checks.h, where the nodes that check are implemented.
    weights: False leaves them outside, for `load_package(path, weights=...)`: several models, or blocks of one, then share a
        package.
    options: Inductor's (`torch._inductor.list_options()`).

    The file is written whole or not at all. Raises `TypeError` if `program` is no `ExportedProgram`, `ValueError` for an input
    with gaps in memory and symbolic sizes, and what Inductor raises.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program is {type(program).__name__}: give a torch.export.ExportedProgram, as attnrewrite.export returns it"
        )
    python = python_sites(program.graph_module)
    if cpp and python:
        raise NeedsPythonError(
            f"cpp=True, and {len(python)} of the program's kernels run in Python: {', '.join(python)}. Choose PyTorch's own "
            'kernels ("_native_flash", "_native_cudnn", "native") there, or load the package from Python'
        )
    record, layouts = record_of(program), layouts_of(program)
    settings = dict(options or {})
    if not weights:
        settings.setdefault("aot_inductor.package_constants_in_so", False)
    with whole(path, ".pt2") as temporary, failing_ops_end_the_call(CHECKS):
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=settings)
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{folder}/{LAYOUTS}", layouts)
            if record is not None:
                archive.writestr(f"{folder}/{MANIFEST}", manifest_of(record.report, record.checks, python).to_json())
    return CompiledPackage(os.fspath(path), python, record.report if record else None)


class LoadedPackage:
    """A package that can be called as the model was. Inputs that lie otherwise in memory than the example's are copied.
    `report`: its plan, None for a stranger's package."""

    def __init__(
        self, model: Any, report: Report | None, weights: Mapping[str, Any] | None, layouts: Layouts | None
    ) -> None:
        self.model = model
        self.layouts = layouts
        self.report = report
        self.weights = weights  # the package holds their addresses only

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

    weights: the state_dict for a package that has none of its own. They are read where they are, not copied, and must be
        on the package's device.
    device_index: which GPU, -1 the current one.
    trust_remote_code: as in `with_backend`, for a kernel of the hub.

    Raises `ProgramFileError` where `load` would: a truncated file, another GPU than compiled for, a kernel's library missing
    or of another version; and where `weights` lacks a tensor.
    """
    with opened(path) as archive:
        if not any(name.endswith(".so") for name in archive.entries):
            raise ProgramFileError(
                f"{path}: expected is an AOTInductor package, found is another archive. attnrewrite.aot_compile writes one; "
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
    """What of a graph is computed by Python functions: "site (kernel)", or the op's name."""
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
