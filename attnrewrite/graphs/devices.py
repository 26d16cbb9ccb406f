"""Requests to a GPU besides running kernels."""

from __future__ import annotations

import torch

_HERTZ = 2.0e9  # above the clock rate of GPUs, so that a pause is too long rather than too short


def pause_gpu(seconds: float) -> None:
    """Queues a kernel on the current stream that idles for at least `seconds`. Work queued behind it waits, so that the time
    to launch that work is not measured."""
    torch.cuda._sleep(int(seconds * _HERTZ))
