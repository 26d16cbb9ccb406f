"""Times cuDNN's attention on packed sequences, which `torch.nn.attention.varlen_attn` prefers on Hopper from PyTorch 2.14 on,
beside FlashAttention 2 inside PyTorch, which is what `_native_varlen` calls.

    python bench/cudnn_varlen.py        # needs an sm_90 GPU

Prints, for each shape, the milliseconds that the GPU takes (the median of ten calls in turn), those that the host takes to
launch the operator, and the relative error to float64 of some rows.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrewrite.commands.bench.rounds import in_turn
from attnrewrite.measuring.timing import Stopwatch

aten = torch.ops.aten
# batch, heads, q_len, kv_len, head_dim, keys in use
SHAPES = {
    "HunyuanVideo, padded": (1, 24, 32896, 32896, 128, (32700,)),
    "Qwen-Image, padded": (2, 24, 7145, 7145, 128, (7145, 6800)),
    "4,096 tokens of 128, padded": (2, 24, 4096, 4096, 128, (4000, 3000)),
    "6,144 tokens of 64, padded": (2, 32, 6144, 6144, 64, (6144, 5000)),
    "LTX-Video, cross, padded": (2, 32, 6144, 128, 64, (128, 100)),
}
ROWS = 50


def cudnn(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, q_len: int, kv_len: int
) -> Tensor:
    """query, key, value: (tokens, heads, dim); starts: int32 (batch + 1,)."""
    output: Tensor = aten._cudnn_attention_forward(
        query, key, value, None, starts_q, starts_k, q_len, kv_len, False, 0.0, False, False
    )[0]
    return output


def flash(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, q_len: int, kv_len: int
) -> Tensor:
    output: Tensor = aten._flash_attention_forward(
        query, key, value, starts_q, starts_k, q_len, kv_len, 0.0, False, False
    )[0]
    return output


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one sequence in float64: (tokens, heads, dim)."""
    return F.scaled_dot_product_attention(*(each.double().transpose(0, 1) for each in (query, key, value))).transpose(
        0, 1
    )


def measure(name: str) -> None:
    batch, heads, q_len, kv_len, dim, used = SHAPES[name]
    torch.manual_seed(0)
    query = torch.randn(batch * q_len, heads, dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, batch * kv_len, heads, dim, device="cuda", dtype=torch.bfloat16)
    starts_q = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * q_len
    ends = torch.tensor(used, device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts_k = torch.cat([ends.new_zeros(1), ends])
    calls = {
        kernel.__name__: partial(kernel, query, key, value, starts_q, starts_k, q_len, kv_len)
        for kernel in (flash, cudnn)
    }
    rows = torch.arange(0, q_len, q_len // ROWS, device="cuda")
    begins = starts_k.tolist()
    parts = [
        exact(query[one * q_len + rows], key[begins[one] : begins[one + 1]], value[begins[one] : begins[one + 1]])
        for one in range(batch)
    ]
    right = torch.cat(parts)
    at = torch.cat([one * q_len + rows for one in range(batch)])
    watch = Stopwatch(query.device)
    times = in_turn({kernel: partial(watch.sample, call, 1) for kernel, call in calls.items()}, 10)
    for kernel, call in calls.items():
        error = ((call()[at].double() - right).norm() / right.norm()).item()
        gpu, host = 1e3 * statistics.median(times[kernel]), 1e3 * watch.host(call)
        print(f"{name:30} {kernel:6} GPU {gpu:8.3f} ms  host {host:8.3f} ms  error {error:.1e}", flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    for shape in SHAPES:
        measure(shape)
