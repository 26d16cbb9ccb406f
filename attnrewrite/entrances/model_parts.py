"""The model that a user gives: what may run, and its parts to compile (components, encoders and decoders, repeated blocks)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import Module

from ..graphs.nodes import is_fake
from ..graphs.trees import leaves

DENOISERS = ("transformer", "transformer_2", "unet")


def parts(model: Any, components: Iterable[str] | None = None) -> dict[str, Module]:
    """The modules to compile, by their paths in `model`; "" is the path of `model` itself."""
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model is the result of torch.compile(...): set the backend on the model that was compiled, or compile that with "
            "torch.compile(model, backend=attnrewrite.with_backend(...))"
        )
    if isinstance(model, Module):
        if components is not None:
            raise ValueError(f"components is {components!r}, and model is a module: components are parts of a pipeline")
        return dict(called_parts("", model))
    named = _components(model)
    if components is None:
        components = [name for name in DENOISERS if name in named]
        if not components:
            raise ValueError(
                f"{type(model).__name__} has no {' or '.join(DENOISERS)}: name its parts by components=, of {', '.join(named)}"
            )
    found: dict[str, Module] = {}
    for name in _known(components, named):
        if hasattr(named[name], "_orig_mod"):
            raise TypeError(
                f"{name} of the pipeline is the result of torch.compile(...): set the pipeline before torch.compile, or use "
                "only one of the two"
            )
        found |= dict(called_parts(name, named[name]))
    return found


def can_run(model: Any) -> None:
    """Raises `TypeError` for a model that cannot be called with the inputs of one step."""
    _no_class(model)
    if isinstance(getattr(model, "components", None), dict):
        raise TypeError(
            f"model is a pipeline ({type(model).__name__}): give its denoiser, as pipe.transformer, with the inputs of one step"
        )
    if not callable(model):
        raise TypeError(
            f"model is {model!r} ({type(model).__name__}): give a torch.nn.Module, or a function of tensors"
        )


def _no_class(model: Any) -> None:
    """torch.compile would change the class itself, for every later object of it."""
    if isinstance(model, type):
        raise TypeError(f"model is the class {model.__name__}: give an object of it, as {model.__name__}(...)")


def has_values(model: Any, args: Any, kwargs: Any, function: str) -> None:
    """Raises `ValueError` for a tensor on the device "meta" and for a fake one, for a function that runs the model."""
    owner = getattr(model, "__self__", model)  # the object of a bound method
    for each in tensors_of(owner, args, kwargs):
        if each.is_meta or is_fake(each):
            what = "a FakeTensor" if is_fake(each) else "device 'meta'"
            raise ValueError(
                f"{function} runs the model, and it has a tensor {tuple(each.shape)} without values ({what}): give real "
                "tensors, or ask attnrewrite.explain, which needs none"
            )


def tensors_of(model: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The inputs, the parameters and the buffers."""
    held = [*model.parameters(), *model.buffers()] if isinstance(model, Module) else []
    return [each for each in (*leaves((args, kwargs)), *held) if isinstance(each, torch.Tensor)]


def _components(pipeline: Any) -> dict[str, Module]:
    _no_class(pipeline)
    named = getattr(pipeline, "components", None)
    if not isinstance(named, Mapping):
        raise TypeError(f"model is {type(pipeline).__name__}: give a torch.nn.Module or a diffusers pipeline")
    return {name: part for name, part in named.items() if isinstance(part, Module)}


def _known(components: Iterable[str], named: Mapping[str, Module]) -> list[str]:
    wanted = [components] if isinstance(components, str) else list(components)
    for name in wanted:
        if name not in named:
            raise ValueError(f"components has {name!r}, which is no module of this pipeline; it has {', '.join(named)}")
    return wanted


def called_parts(path: str, module: Module) -> Iterator[tuple[str, Module]]:
    """The modules that are called: the module itself, or encoder and decoder of a module with `encode` and `decode`."""
    inside = [name for name in ("encoder", "decoder") if isinstance(getattr(module, name, None), Module)]
    if inside and hasattr(module, "encode") and hasattr(module, "decode"):
        for name in inside:
            yield _join(path, name), getattr(module, name)
    else:
        yield path, module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    declared = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in declared]
