"""Stands in for FlashAttention 3 built from source: as fa3-fwd, with float16, and returning a tuple as older builds do."""

import fa3_fwd_interface
import torch

fa3_fwd_interface.DTYPES = (torch.bfloat16, torch.float16)
fa3_fwd_interface.WINDOWS = True


def flash_attn_func(*args, **kwargs):
    return fa3_fwd_interface.flash_attn_func(*args, **kwargs, return_attn_probs=True)


def flash_attn_varlen_func(*args, **kwargs):
    return fa3_fwd_interface.flash_attn_varlen_func(*args, **kwargs, return_attn_probs=True)


def flash_attn_with_kvcache(*args, **kwargs):
    return fa3_fwd_interface.flash_attn_with_kvcache(*args, **kwargs, return_softmax_lse=True)
