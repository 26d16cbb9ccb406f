"""Regional compilation: one AOTInductor package for each class of repeated block, which every block of the class runs with its
own weights.

Compilation takes the time of one block, and the package holds no weights. The modules around the blocks run unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..entrances.choices import Choices, Rules, Settings, several
from ..entrances.model_parts import can_run, repeated_blocks
from ..entrances.strictness import hold_strictly, without_sites
from ..kernels.machines import Machine
from ..reports.report import Report
from .archives import ProgramFileError
from .packages import CompiledPackage, aot_compile, load_package
from .programs import export, program_policy, report_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


def aot_compile_blocks(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    backend: Choices,
    dynamic: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
    machine: Machine | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Unpack[Settings],
) -> dict[str, CompiledPackage]:
    """Compiles one AOTInductor package with swapped kernels for each class of repeated block of a model.

        attnrewrite.aot_compile_blocks(pipe.transformer, "blocks", (), inputs, backend="_native_cudnn")
        attnrewrite.load_blocks(pipe.transformer, "blocks")

    model: its repeated blocks are the modules of the classes in `model._repeated_blocks`, as in diffusers' models.
    folder: receives `<class>.pt2` for each class; made if there is none.
    args, kwargs: `model(*args, **kwargs)` runs once, to find the inputs of the first block of each class.
    backend, rules, machine, settings: as in `export`. Under `strict` a rule must match a site of one of the classes.
    dynamic: class name -> the block's `dynamic_shapes`, as in `torch.export.export`. Shapes of other classes are static.
    options: Inductor's, as in `aot_compile`.

    Returns class name -> package. Raises `ValueError` if the model has no repeated blocks or does not call the first block of a
    class, `NotADirectoryError` if `folder` is a file, and what `export` and `aot_compile` raise.
    """
    can_run(model)
    if Path(folder).is_file():
        raise NotADirectoryError(f"folder is {os.fspath(folder)!r}, which is a file: name a folder")
    policy = program_policy(several(backend), rules, settings)
    first: dict[str, torch.nn.Module] = {}
    for block in repeated_blocks(model):
        first.setdefault(type(block).__name__, block)
    if not first:
        raise ValueError(
            f"{type(model).__name__} declares no repeated blocks (_repeated_blocks): use attnrewrite.export and "
            "attnrewrite.aot_compile"
        )
    given = _inputs(model, first, args, kwargs or {})
    settings["strict"] = False  # a rule may be meant for one class: what strict forbids is seen from all of them
    programs = {
        name: export(
            block, *given[name], backend=backend, dynamic_shapes=(dynamic or {}).get(name), rules=rules, machine=machine,
            **settings,
        )
        for name, block in first.items()
    }  # fmt: skip
    if policy.strict:
        report = Report(str(policy), [graph for program in programs.values() for graph in report_of(program).graphs])
        report.unmatched_rules[:] = without_sites(policy, report.sites)
        hold_strictly(report)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return {
        name: aot_compile(program, Path(folder) / f"{name}.pt2", weights=False, options=options)
        for name, program in programs.items()
    }


def load_blocks(model: torch.nn.Module, folder: str | os.PathLike[str], device_index: int = -1) -> int:
    """Makes every repeated block of `model` run the package of its class, with the block's own weights.

        attnrewrite.load_blocks(pipe.transformer, "blocks")

    model: as in `aot_compile_blocks`. The packages read its weights in place, without a copy.
    folder: where `aot_compile_blocks` wrote the packages.
    device_index: the index of the GPU; -1: the current GPU.

    Returns the number of blocks. `del block.forward` restores a block. Gradients do not flow through a package. Raises
    `ProgramFileError` where `load_package` does, and if the folder lacks a package.
    """
    can_run(model)
    blocks = repeated_blocks(model)
    for name in {type(block).__name__ for block in blocks}:
        if not (Path(folder) / f"{name}.pt2").exists():
            raise ProgramFileError(
                f"{folder}: the package {name}.pt2 is missing. attnrewrite.aot_compile_blocks writes it"
            )
    made = [
        load_package(Path(folder) / f"{type(block).__name__}.pt2", weights=_tensors(block), device_index=device_index)
        for block in blocks
    ]
    for block, package in zip(blocks, made, strict=True):
        block.forward = package.__call__
    return len(blocks)


def _inputs(model: Any, blocks: dict[str, torch.nn.Module], args: Any, kwargs: Any) -> dict[str, tuple[Any, Any]]:
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name, block in blocks.items()
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in blocks if name not in seen]
    if missing:
        raise ValueError(f"the model does not call its block {missing[0]} with these arguments")
    return seen


def _tensors(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, including the buffers that a state_dict leaves out."""
    return {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
