"""What a decision may know of the machine: read once a device, or described by hand to plan for one that is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any


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

    @property
    def torch_device(self) -> str:
        """PyTorch's own word for the device's type."""
        return {"rocm": "cuda", "tpu": "xla"}.get(self.device, self.device)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "capability": list(self.capability) if self.capability else None,
            "packages": dict(self.packages),
            "name": self.name,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Machine:
        capability = data["capability"]
        return Machine(
            data["device"], (capability[0], capability[1]) if capability else None, data["packages"], data["name"]
        )


# Distributions that some record needs: a machine's `packages` has their versions, of a user's own record too.
PACKAGES: set[str] = set()


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
