"""Stands in for flash-attn 2.8.3: its signatures, its checks, its memory order, the reference's arithmetic."""

from . import flash_attn_interface
from .flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_interface", "flash_attn_varlen_func"]
