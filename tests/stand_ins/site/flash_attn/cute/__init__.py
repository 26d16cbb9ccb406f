"""Stands in for flash-attn-4 4.0.0b36."""

from . import block_sparsity, interface, utils
from .interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["block_sparsity", "flash_attn_func", "flash_attn_varlen_func", "interface", "utils"]
