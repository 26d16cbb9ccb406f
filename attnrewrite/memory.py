"""Whether a kernel that keeps all scores has the memory for them."""

from __future__ import annotations

from pathlib import Path

import torch

from .calls import AttentionCall
from .records import Backend


def enough_memory(record: Backend, call: AttentionCall, device: torch.device) -> None:
    """Raises `MemoryError` where a kernel that keeps all scores would not fit: on a CPU the system would end the process."""
    if not record.all_scores:
        return
    wanted = 3 * 4 * int(call.batch) * int(call.heads) * int(call.q_len) * int(call.kv_len)
    free = free_memory(device)
    if free is not None and wanted > 0.8 * free:
        raise MemoryError(f"needs about {wanted / 2**30:.1f} GiB for its scores, {free / 2**30:.1f} GiB are free")


def free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
