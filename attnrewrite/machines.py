"""What a decision may know of the machine: read once a device, or described by hand to plan for one that is elsewhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """A device and the software on it.

    `device` is PyTorch's device type, but "rocm" for an AMD GPU and "tpu" for a TPU ("xla" is what else torch_xla runs on):
    their kernels are others. `capability` is CUDA's compute
    capability, None elsewhere. `packages` maps a distribution's name to its version;
    "torch", "cuda" and "cudnn" are always among those that `here` reads. An H200 seen from a laptop:

        Machine("cuda", capability=(9, 0), packages={"torch": "2.11.0", "cudnn": "9.19.0"})

    Raises `ValueError` for a CUDA machine without a capability.
    """

    device: str
    capability: tuple[int, int] | None = None
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    name: str = ""

    def __post_init__(self) -> None:
        if self.device == "cuda" and self.capability is None:
            raise ValueError(
                "Machine('cuda') needs capability=(major, minor), as (9, 0) for an H200: kernels are chosen by it"
            )

    def __str__(self) -> str:
        parts = [self.name or self.device]
        if self.capability:
            parts.append(f"sm_{self.capability[0]}{self.capability[1]}")
        parts += [f"{package} {version}" for package, version in self.packages.items()]
        return ", ".join(parts)

    def has(self, requires: Mapping[str, str]) -> bool:
        """Whether its packages satisfy version specifiers, as {"flash-attn": ">=2.7"}."""
        return all(
            name in self.packages and satisfies(self.packages[name], specifier) for name, specifier in requires.items()
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "capability": list(self.capability) if self.capability else None,
            "packages": dict(self.packages),
            "name": self.name,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Machine:
        capability = data["capability"]
        return Machine(
            data["device"], (capability[0], capability[1]) if capability else None, data["packages"], data["name"]
        )


def machine_of(device: torch.device) -> Machine:
    """The machine that `device` belongs to. Reads the hardware, so it may initialise CUDA."""
    return _read(device.type, device.index)


@functools.lru_cache
def _read(kind: str, index: int | None) -> Machine:
    packages = {"torch": torch.__version__.split("+")[0]}
    packages |= {name: version for name in _kernel_packages() if (version := installed(name))}
    if kind == "xla":
        hardware = str(sys.modules["torch_xla.runtime"].device_type())  # there is no such device without torch_xla
        return Machine("tpu" if hardware == "TPU" else "xla", None, packages, f"XLA on {hardware}")
    if kind == "cuda" and torch.version.hip:
        return Machine("rocm", None, packages, torch.cuda.get_device_name(index))
    if kind != "cuda" or not torch.cuda.is_available():
        return Machine(kind, (0, 0) if kind == "cuda" else None, packages, kind.upper())
    if torch.version.cuda:
        packages["cuda"] = torch.version.cuda
    if cudnn := torch.backends.cudnn.version():
        # 91900 is 9.19.0; before 9.0 the major was at the thousands: 8907 is 8.9.7
        major, rest = divmod(cudnn, 10000) if cudnn >= 10000 else divmod(cudnn, 1000)
        packages["cudnn"] = f"{major}.{rest // 100}.{rest % 100}"
    return Machine(kind, torch.cuda.get_device_capability(index), packages, torch.cuda.get_device_name(index))


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version (as "2.13.0") is within a specifier (as ">=2.9")."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version.split("+")[0], prereleases=True)


def _kernel_packages() -> set[str]:
    from .registry import records

    return {package for record in records() for package in record.requires} - {"torch", "cuda", "cudnn"}
