"""`machine_of`: the machine that a device belongs to, read once."""

from __future__ import annotations

import functools
import sys

import torch

from ..kernels.machines import PACKAGES, Machine, installed
from .registry import records

PYTORCH = frozenset({"torch", "cuda", "cudnn"})  # PyTorch itself reports their versions


def machine_of(device: torch.device | str) -> Machine:
    """The machine that `device` belongs to. Reads the hardware, so it may initialise CUDA."""
    device = torch.device(device)
    records()  # plug-ins add the packages of their records to PACKAGES
    return _read(device.type, device.index, frozenset(PACKAGES))


@functools.lru_cache
def _read(kind: str, index: int | None, wanted: frozenset[str]) -> Machine:
    packages = {"torch": torch.__version__.split("+")[0]}
    packages |= {name: version for name in sorted(wanted - PYTORCH) if (version := installed(name))}
    if kind == "xla":
        hardware = str(sys.modules["torch_xla.runtime"].device_type())  # an XLA device has imported torch_xla
        return Machine("tpu" if hardware == "TPU" else "xla", None, packages, f"XLA on {hardware}", here=True)
    if kind == "cuda" and torch.version.hip:
        return Machine("rocm", None, packages, torch.cuda.get_device_name(index), here=True)
    if kind != "cuda" or not torch.cuda.is_available():
        return Machine(kind, (0, 0) if kind == "cuda" else None, packages, kind.upper(), here=True)
    if torch.version.cuda:
        packages["cuda"] = torch.version.cuda
    if cudnn := torch.backends.cudnn.version():
        # 91900 is 9.19.0; before 9.0 the thousands were the major version: 8907 is 8.9.7
        major, rest = divmod(cudnn, 10000) if cudnn >= 10000 else divmod(cudnn, 1000)
        packages["cudnn"] = f"{major}.{rest // 100}.{rest % 100}"
    name = torch.cuda.get_device_name(index)
    return Machine(kind, torch.cuda.get_device_capability(index), packages, name, here=True)
