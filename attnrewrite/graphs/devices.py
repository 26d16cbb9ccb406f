"""What is asked of a GPU besides running kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_HERTZ = 2.0e9  # above the clock rate of GPUs, so that a pause is too long rather than too short


_HERE: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which the tensor's GPU is the current CUDA device. Costs nothing where it is so already, or on a CPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def pause_gpu(seconds: float) -> None:
    """Queues a kernel on the current stream that idles for at least `seconds`. Work queued behind it waits, so that the time
    to launch that work is not measured."""
    torch.cuda._sleep(int(seconds * _HERTZ))
