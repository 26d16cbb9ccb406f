"""The processes that torchrun has started, as the ranks of one mesh."""

from __future__ import annotations

import atexit
import os
import random

import torch

from ..parallel.settings import ContextParallel


def joined_ranks() -> ContextParallel:
    """Joins the processes of torchrun: NCCL and a GPU for each where there are GPUs, gloo on CPUs. All of them draw the same
    random numbers from here on, since every rank must call a model with the same inputs."""
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    seeds = [torch.initial_seed()]
    torch.distributed.broadcast_object_list(seeds, src=0)
    torch.manual_seed(seeds[0])
    random.seed(seeds[0])
    atexit.register(torch.distributed.destroy_process_group)
    return ContextParallel(mesh)
