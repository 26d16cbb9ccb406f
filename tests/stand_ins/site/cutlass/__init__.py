"""Stands in for the DSL of nvidia-cutlass-dsl 4.8.1: its numbers are torch tensors."""

import torch

from . import cute

__all__ = ["Int32", "cute", "min"]


def Int32(number):
    return torch.as_tensor(number, dtype=torch.int32)


def min(one, other):
    return torch.minimum(one, torch.as_tensor(other, dtype=one.dtype))
