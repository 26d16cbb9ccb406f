"""Stands in for flash-attn-4 4.0.0b36."""

from . import interface
from .interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "interface"]
