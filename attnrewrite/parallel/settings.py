"""`ContextParallel`: the ranks that share a model's tokens, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .layouts import Ranks
from .rates import Rates

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

KINDS = ("auto", "ulysses", "ring", "ulysses+ring", "gather")


@dataclass(frozen=True)
class ContextParallel:
    """Spreads the tokens of a model over the devices of a mesh. Every rank calls the model with the same inputs, and gets the
    same outputs.

    mesh: a `torch.distributed.DeviceMesh` of one dimension and at least two devices. This process must be one of its ranks.
    kind: what the ranks exchange around self attention.
        "auto": nothing, where the number of ranks divides the batch (guidance as a batch of 2); otherwise as "ulysses".
        "ulysses": tokens are spread; an all-to-all gives each rank all tokens of a part of the heads. Where the number of
        ranks does not divide the heads, as "gather".
        "ring": tokens are spread; the keys and values of each rank go from rank to rank, and each rank puts the attention of
        its queries to them together. Where an attention cannot be put together so, as "gather"; so is one with a gradient.
        "ulysses+ring": as "ulysses" in groups of as many ranks as divide the heads, and a ring of the groups.
        "gather": tokens are spread; each rank gets the keys and values of all tokens.

    timeout: how long, in seconds, a rank waits for the others to compile the same graph. (How long it waits in an exchange
        is the timeout of the process group.)

    Raises `TypeError` for something that is no DeviceMesh, `ValueError` for a mesh of several dimensions, of one device or
    without this process, for an unknown kind and for a timeout that is not above 0.
    """

    mesh: DeviceMesh
    kind: str = "auto"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if not isinstance(self.timeout, int | float) or isinstance(self.timeout, bool) or not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout!r}: give a number of seconds above 0")
        if not torch.distributed.is_available():
            raise ValueError("context_parallel needs torch.distributed, which this build of PyTorch does not have")
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(self.mesh, DeviceMesh):
            raise TypeError(
                f"context_parallel got the mesh {self.mesh!r} ({type(self.mesh).__name__}): give a DeviceMesh, as "
                "torch.distributed.init_device_mesh('cuda', (2,))"
            )
        if self.mesh.ndim != 1:
            raise ValueError(
                f"context_parallel got a mesh of {self.mesh.ndim} dimensions, {tuple(self.mesh.shape)}: give one of its "
                "dimensions, as mesh['context']"
            )
        if self.mesh.size() == 1:
            raise ValueError(
                "context_parallel got a mesh of one device: leave context_parallel out, there is nothing to share"
            )
        if self.mesh.get_coordinate() is None:
            raise ValueError(
                f"context_parallel got a mesh of the ranks {self.mesh.mesh.tolist()}, and this process is rank "
                f"{torch.distributed.get_rank()}: give a mesh that holds this process"
            )

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.mesh.size(), self.mesh.get_local_rank(), self.mesh.get_group().group_name)

    @property
    def members(self) -> list[int]:
        """The global numbers of the ranks."""
        found: list[int] = self.mesh.mesh.tolist()
        return found


@dataclass(frozen=True)
class DescribedRanks:
    """Devices that are elsewhere, for `explain`.

        attnrewrite.explain(model, *inputs, backend="auto", context_parallel=DescribedRanks(8, "ring", Rates(link=50)))

    size: their number.
    kind: as of `ContextParallel`.
    rates: what a device computes and sends in a second, for the estimate of the exchanges' share of a step. Fields that are
        None: those of the machine to plan for, where they are known.

    Raises `TypeError` and `ValueError` for a number that is not above 1, `ValueError` for an unknown kind, and `TypeError` for
    rates that are no `Rates`.
    """

    size: int
    kind: str = "auto"
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_devices(self.size)
        if not isinstance(self.rates, Rates):
            raise TypeError(f"rates is {self.rates!r} ({type(self.rates).__name__}): give Rates(tflops=989, link=450)")

    @property
    def ranks(self) -> Ranks:
        """As the last one of them, which computes most of a causal ring."""
        return Ranks(self.size, self.size - 1)


def check_devices(number: Any, argument: str = "context_parallel") -> None:
    """Raises `TypeError` and `ValueError` for a number of devices that is not above 1."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{argument} is {number!r} ({type(number).__name__}): give the number of devices")
    if number < 2:
        raise ValueError(f"{argument} is {number}: give the number of devices, 2 or more")


def check_kind(kind: Any) -> None:
    """Raises `ValueError` for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it is one of {', '.join(map(repr, KINDS))}")


def read_context_parallel(given: Any) -> ContextParallel | None:
    """The value of the argument `context_parallel`: a `ContextParallel`, a `DeviceMesh` for its default kind, or None. Raises
    as `ContextParallel`."""
    return given if given is None or isinstance(given, ContextParallel) else ContextParallel(given)
