from typing import NamedTuple

import torch


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def listed(number, at, sizes, lengths):
    """Which scores (batch, heads, queries, keys) lie in the blocks of a list."""
    (rows, columns), (q_len, kv_len) = sizes, lengths
    assert number.dtype is at.dtype is torch.int32
    assert number.shape[2] == -(-q_len // rows) and at.shape[2:] == (number.shape[2], -(-kv_len // columns))
    found = torch.zeros(at.shape, dtype=torch.bool)
    first = torch.arange(at.shape[-1]) < number[..., None]
    found.scatter_(-1, at.long(), first)
    return found.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :q_len, :kv_len]
