"""The machine that a decision is made for: read once per device, or described by hand to plan for a machine elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from .flags import has_flags


@dataclass(frozen=True)
class Machine:
    """A device and the software on it. To plan for an H200 on a laptop:

        Machine("cuda", capability=(9, 0), packages={"torch": "2.11.0", "cudnn": "9.19.0"})

    device: PyTorch's device type, but "rocm" for an AMD GPU and "tpu" for a TPU, which have kernels of their own. Other devices
        of torch_xla are "xla".
    packages: the version of each distribution by name. `machine_of` reads "torch" and, on NVIDIA GPUs, "cuda" and "cudnn" too.

    Raises `ValueError` for an unknown device and for a CUDA machine without a capability, `TypeError` for a capability that is
    not two integers, for packages and a name that are not text, and for `here` that is no bool.
    """

    device: str
    capability: tuple[int, int] | None = None  # CUDA's compute capability; None on other devices
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    name: str = ""  # the device's name, for people
    here: bool = field(default=False, compare=False, repr=False)  # read by `machine_of`, not described by a user

    def __post_init__(self) -> None:
        has_flags(self)
        if not isinstance(self.name, str):
            raise TypeError(
                f"name is {self.name!r} ({type(self.name).__name__}): give the device's name as text, or none"
            )
        if not isinstance(self.device, str) or not _is_device(self.device):
            raise ValueError(
                f"device is {self.device!r}: give a device type of PyTorch ('cuda', 'cpu', 'xla'), 'rocm' for an AMD GPU, or "
                "'tpu'"
            )
        if self.capability is not None and not _are_two_numbers(self.capability):
            raise TypeError(
                f"capability is {self.capability!r} ({type(self.capability).__name__}): give (major, minor), as (9, 0) for "
                "an H200"
            )
        if self.device == "cuda" and self.capability is None:
            raise ValueError(
                "Machine('cuda') needs capability=(major, minor), as (9, 0) for an H200: kernels are chosen by it"
            )
        texts = isinstance(self.packages, Mapping) and all(isinstance(each, str) for each in self.packages.values())
        if not texts:
            raise TypeError(
                f'packages is {self.packages!r}: give the version of each package as text, as {{"torch": "2.11.0"}}'
            )

    def __str__(self) -> str:
        parts = [self.name or self.device]
        if self.capability:
            parts.append(f"sm_{self.capability[0]}{self.capability[1]}")
        parts += [f"{package} {version}" for package, version in self.packages.items()]
        return ", ".join(parts)

    def has(self, requires: Mapping[str, str]) -> bool:
        """Whether the machine's packages satisfy version specifiers, as {"flash-attn": ">=2.7"}."""
        return all(
            name in self.packages and satisfies(self.packages[name], specifier) for name, specifier in requires.items()
        )

    @property
    def torch_device(self) -> str:
        """PyTorch's device type: "cuda" for "rocm", "xla" for "tpu"."""
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
        numbers = tuple(capability) if isinstance(capability, list) else capability
        return Machine(data["device"], numbers, data["packages"], data["name"])


def _is_device(name: str) -> bool:
    if name in ("rocm", "tpu", "npu"):  # "npu" is known to PyTorch only where torch_npu is
        return True
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def _are_two_numbers(capability: Any) -> bool:
    return isinstance(capability, tuple) and [type(each) for each in capability] == [int, int]


def is_machine(machine: Any) -> None:
    """Raises `TypeError` for anything but a `Machine`."""
    if not isinstance(machine, Machine):
        raise TypeError(
            f"machine is {machine!r} ({type(machine).__name__}): describe it, as "
            'attnrewrite.Machine("cuda", capability=(9, 0), packages={"torch": "2.11.0"})'
        )


def known_machine(machine: Any) -> Machine | None:
    """Returns a machine that a user describes, or None. Raises `TypeError` for anything but a `Machine`, `ValueError` for a
    package whose version is none."""
    if machine is None:
        return None
    is_machine(machine)
    described: Machine = machine
    from packaging.version import InvalidVersion, Version

    for package, version in machine.packages.items():
        try:
            Version(version)
        except InvalidVersion:
            raise ValueError(f"machine has packages[{package!r}] = {version!r}: give a version, as '2.11.0'") from None
    return described


# The distributions that records need, the records of users too: `machine_of` reads the versions.
PACKAGES: set[str] = set()


def installed(distribution: str) -> str | None:
    """The version of a distribution, read without importing it; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version, as "2.13.0", satisfies a specifier, as ">=2.9". Local parts, as "+cu128", do not count."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version.split("+")[0], prereleases=True)
