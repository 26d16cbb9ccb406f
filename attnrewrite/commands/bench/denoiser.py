"""`Denoiser`: a model of diffusers with its inputs. `Place`: where and at which size a model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeVar

import torch

from ...graphs.modules import set_implementation

Number = TypeVar("Number")

LOOSE = 0.3  # the norm of the random part of a query or key, relative to the part that all tokens share


@dataclass(frozen=True)
class Place:
    """Where and at which size a model is built."""

    device: torch.device
    dtype: torch.dtype
    small: bool = False  # True: the sizes of a test instead of the published sizes
    structured: bool = False  # True: queries and keys that follow position (structure.py), in models that can have them
    loose: float = LOOSE  # of queries and keys that follow position

    def pick(self, published: Number, small: Number) -> Number:
        return small if self.small else published

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def full(self, *values: float) -> torch.Tensor:
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    def mask_of(self, lengths: tuple[int, ...], longest: int) -> torch.Tensor:
        """A boolean mask (batch, longest), True for the tokens of each prompt, False for its padding."""
        return torch.arange(longest, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]

    def built(self, kind: str, **configuration: Any) -> torch.nn.Module:
        """A model in eval mode. kind: the name of its class in diffusers."""
        diffusers: Any = imported()
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model: torch.nn.Module = getattr(diffusers, kind)(**configuration).eval()
            # Parameters made by torch.Tensor([...]) lie on the CPU whatever the default device is (SVD's mix_factor).
            return model.to(self.device)
        finally:
            torch.set_default_dtype(before)


@dataclass(eq=False)
class Denoiser:
    """A model and its inputs. Equal to itself alone."""

    model: torch.nn.Module
    inputs: dict[str, Any]  # the keyword arguments of a step
    blocks: tuple[str, ...]  # classes compiled one by one (as `compile_repeated_blocks`); (): one graph
    about: str  # name and sizes, for tables
    data: str = "random"  # or "structured ...": what queries and keys are made of (structure.py)

    def step(self) -> torch.Tensor:
        output: torch.Tensor = self.model(**self.inputs, return_dict=False)[0]
        return output

    def compile(self, backend: Any, mode: str | None = None) -> Callable[[], torch.Tensor]:
        """Returns a function that runs one step compiled with `backend`. Steps of several backends can run in turn.

        mode: torch.compile's, for example "reduce-overhead".
        """
        regions = [module for module in self.model.modules() if type(module).__name__ in self.blocks] or [self.model]
        codes: dict[type, CodeType] = {}
        calls = [torch.compile(_own(module, codes), backend=backend, dynamic=False, mode=mode) for module in regions]

        def step() -> torch.Tensor:
            for module, call in zip(regions, calls, strict=True):
                set_implementation(module, call)
            try:
                return self.step()
            finally:
                for module in regions:
                    set_implementation(module, None)

        return step


def _own(module: torch.nn.Module, codes: dict[type, CodeType]) -> MethodType:
    """Returns `module.forward` with a code object of its own, shared by all modules of its class through `codes`. Dynamo keeps
    compiled code with the code object, and each call searches it: variants with a common one would slow each other down."""
    forward: Any = type(module).forward
    code = codes.setdefault(type(module), forward.__code__.replace())
    function = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    function.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(function, module)


def imported() -> Any:
    """Imports diffusers. Raises `ImportError`, which says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"attnrewrite bench --models builds models of diffusers: pip install diffusers ({error})"
        ) from error
    return diffusers
