"""Regional packages: one AOTInductor package for a block that a model repeats, which every repetition runs with its own
weights.

Compiling takes the time of one block, and the package holds no weights. What stands around the blocks runs as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..entrances.choices import Choices, Rules, Settings
from ..entrances.model_parts import repeated_blocks
from ..kernels.machines import Machine
from .archives import ProgramFileError
from .packages import CompiledPackage, aot_compile, load_package
from .programs import export

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
    """Runs `model(*args, **kwargs)` once for the inputs of its repeated blocks, exports the first of each class, swaps its
    kernels, and writes `folder/<class>.pt2`. `load_blocks` puts them to use.

    The blocks are modules of the classes that `model._repeated_blocks` names, as diffusers' models do.
    dynamic: for a class its `dynamic_shapes`, as `torch.export.export` takes them; static without.
    settings: as for `export`. Raises `ValueError` if the model repeats no block, and what `export` and `aot_compile` raise.
    """
    first: dict[str, torch.nn.Module] = {}
    for block in repeated_blocks(model):
        first.setdefault(type(block).__name__, block)
    if not first:
        raise ValueError(
            f"{type(model).__name__} declares no repeated blocks (_repeated_blocks): use attnrewrite.export and "
            "attnrewrite.aot_compile"
        )
    given = _inputs(model, first, args, kwargs or {})
    Path(folder).mkdir(parents=True, exist_ok=True)
    packages = {}
    for name, block in first.items():
        block_args, block_kwargs = given[name]
        program = export(
            block, block_args, block_kwargs, backend=backend, dynamic_shapes=(dynamic or {}).get(name), rules=rules,
            machine=machine, **settings,
        )  # fmt: skip
        packages[name] = aot_compile(program, Path(folder) / f"{name}.pt2", weights=False, options=options)
    return packages


def load_blocks(model: torch.nn.Module, folder: str | os.PathLike[str], device_index: int = -1) -> int:
    """Lets every repeated block of `model` run the package of its class, with its own weights, which are not copied.

    Returns how many do. `del block.forward` undoes it. Gradients do not flow through.

    Raises `ProgramFileError` as `load_package` does, and if the folder lacks a package.
    """
    blocks = repeated_blocks(model)
    for name in {type(block).__name__ for block in blocks}:
        if not (Path(folder) / f"{name}.pt2").exists():
            raise ProgramFileError(
                f"{folder}: expected is a package {name}.pt2, found is none. aot_compile_blocks writes it"
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
    """Parameters and all buffers, also those that a state_dict leaves out."""
    return {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
