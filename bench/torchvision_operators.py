"""torchvision, which timm and many packages import, beside a PyTorch for CPUs."""

from __future__ import annotations

import importlib.util

import torch

_LIBRARIES: list[torch.library.Library] = []  # an operator is gone with the object that defined it


def import_torchvision() -> None:
    """Imports torchvision, where it is installed, also if its operators do not load.

    PyPI's torchvision is built for CUDA. Beside a PyTorch for CPUs its operators are missing, and its import fails, since it
    describes `nms` (torchvision 0.29, `_registrations`). The definitions here have no code: a model that calls one raises."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error) or _LIBRARIES:
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARIES.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
