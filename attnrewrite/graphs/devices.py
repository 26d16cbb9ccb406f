"""What is asked of a GPU besides running kernels."""

from __future__ import annotations

import torch

_HERTZ = 2.0e9  # more than GPUs clock: a pause is rather too long


def pause_gpu(seconds: float) -> None:
    """Queues a kernel on the current stream that does nothing for at least so long. What is queued behind it waits, so that
    launching it is no part of its time."""
    torch.cuda._sleep(int(seconds * _HERTZ))
