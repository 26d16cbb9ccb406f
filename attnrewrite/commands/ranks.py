"""The processes that torchrun has started, as the ranks of one mesh."""

from __future__ import annotations

import atexit
import os
import random

import torch

from ..parallel.settings import ContextParallel

PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"  # read by PyTorch where it makes a group


def joined_ranks() -> ContextParallel:
    """Joins the processes of torchrun: NCCL and a GPU for each where there are GPUs, gloo on CPUs. All of them draw the same
    random numbers from here on, since every rank must call a model with the same inputs.

    Unless `PRIORITY` says otherwise, NCCL's kernels go before those that wait beside them: an exchange that begins behind a
    matrix product is under way with it, not after it.
    """
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        os.environ.setdefault(PRIORITY, "1")
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    seeds = [torch.initial_seed()]
    torch.distributed.broadcast_object_list(seeds, src=0)
    torch.manual_seed(seeds[0])
    random.seed(seeds[0])
    atexit.register(leave)
    return ContextParallel(mesh)


def leave() -> None:
    """Leaves the process group. Compiled code goes first: NCCL waits for the CUDA graphs that hold its exchanges
    (pytorch/pytorch#115388; seen with NCCL 2.28.9)."""
    torch.compiler.reset()
    torch.distributed.destroy_process_group()
