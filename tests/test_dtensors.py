"""Tensor parallelism with DTensors: the chosen kernel runs on the heads that a rank holds."""

import re

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from parity import attend, relative
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from attnrewrite import with_backend
from attnrewrite.kernels.machines import satisfies

MATH = "_native_math"
from_2_11 = pytest.mark.skipif(
    not satisfies(torch.__version__, ">=2.11"),
    reason="DTensor shares no mask there",
)
from_2_13 = pytest.mark.skipif(
    not satisfies(torch.__version__, ">=2.13"), reason="SDPA of DTensors with mixed placements does not trace there"
)


@register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
def sharding_of_the_kernel_for_cpus(query, key, value, *args, attn_mask=None, **kwargs):
    """PyTorch has such rules for its CUDA kernels only; without one, SDPA itself takes no DTensor on a CPU."""
    rows = []
    for rule in (Shard(0), Shard(1), Replicate()):
        whole = attn_mask is None or rule == Replicate() or len(attn_mask.shape) < 4 or attn_mask.shape[rule.dim] == 1
        masked = [] if attn_mask is None else [Replicate() if whole else rule]
        rows.append(([rule, rule], [rule, rule, rule, *(None for _ in args), *masked]))
    return rows


@pytest.fixture
def two_ranks():
    """This process is the first of two ranks, of which the other does not exist: nothing may be exchanged."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


class Attention(torch.nn.Module):
    """Grouped heads: 4 of queries, 2 of keys. Values are as wide as keys: others take PyTorch's plain operations, which make a
    causal mask that is no DTensor (2.13)."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(24, width, bias=False) for width in (32, 16, 16))
        self.out = torch.nn.Linear(32, 24)

    def forward(self, x):
        query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.key, self.value))
        return x + self.out(attend(query, key, value, is_causal=True, enable_gqa=True))


def test_a_model_with_tensor_parallelism(one_rank):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 7, 24)
    exact = Attention().double()
    exact.load_state_dict(model.state_dict())
    shared = {name: ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")}
    parallelize_module(model, one_rank, {**shared, "out": RowwiseParallel()})
    backend = with_backend(MATH, inner="aot_eager")
    output = torch.compile(model, backend=backend, fullgraph=True)(x)
    expected = exact(x.double())
    assert relative(output.detach(), expected.detach()) < 1e-5
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert relative(one.grad.full_tensor(), other.grad) < 1e-5, name
    assert [site.chosen for site in backend.report.sites] == [MATH]


def parts(mesh, tensors, placements):
    """DTensors of which this rank holds the first half."""
    made = []
    for tensor, placement in zip(tensors, placements, strict=True):
        local = tensor if placement == Replicate() else tensor.chunk(2, placement.dim)[0]
        made.append(DTensor.from_local(local, mesh, [placement], run_check=False))
    return made


HEADS, BATCH, ALL = Shard(1), Shard(0), Replicate()


@pytest.mark.parametrize(
    ("sharded", "mask", "of_mask", "calls"),
    [
        (HEADS, None, None, (2, 2)),
        (BATCH, None, None, (1, 4)),
        (ALL, None, None, (2, 4)),
        pytest.param(HEADS, (5, 7), ALL, (2, 2), marks=from_2_11),
        pytest.param(HEADS, (2, 4, 5, 7), HEADS, (2, 2), marks=from_2_11),
        pytest.param(HEADS, (2, 1, 1, 7), ALL, (2, 2), marks=from_2_11),
        pytest.param(BATCH, (2, 1, 5, 7), BATCH, (1, 4), marks=from_2_11),
    ],
)
def test_the_kernel_runs_on_the_heads_of_this_rank(two_ranks, sharded, mask, of_mask, calls):
    given = [torch.randn(2, 4, *sizes) for sizes in ((5, 8), (7, 8), (7, 8))] + ([torch.randn(mask)] if mask else [])
    placements = [sharded] * 3 + ([of_mask] if mask else [])
    backend = with_backend(MATH, inner="eager")
    output = torch.compile(F.scaled_dot_product_attention, backend=backend, fullgraph=True)(
        *parts(two_ranks, given, placements)
    )
    assert (output.shape, output.placements) == ((2, 4, 5, 8), (sharded,))
    exact = F.scaled_dot_product_attention(*(each.double() for each in given))
    assert relative(output.to_local(), parts(two_ranks, [exact], [sharded])[0].to_local()) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen, site.call.batch, site.call.heads) == (MATH, *calls)


@pytest.mark.parametrize(
    ("placements", "reason"),
    [
        pytest.param((HEADS, BATCH, BATCH), "not sharded alike", marks=from_2_13),
        ((Shard(2), ALL, ALL), "not sharded alike"),
        ((Shard(3), Shard(3), Shard(3)), "not sharded alike|by tokens or within a head"),
        ((Partial(), Partial(), Partial()), "not sharded alike|neither sharded nor replicated"),
    ],
)
def test_others_are_left_with_the_reason(two_ranks, placements, reason):
    given = [torch.randn(2, 4, *sizes) for sizes in ((6, 8), (10, 8), (10, 4))]
    local = [
        each if kind in (ALL, Partial()) else each.chunk(2, kind.dim)[0]
        for each, kind in zip(given, placements, strict=True)
    ]
    whole = [
        DTensor.from_local(each, two_ranks, [kind], run_check=False)
        for each, kind in zip(local, placements, strict=True)
    ]

    backend = with_backend(MATH, inner=lambda graph_module, inputs: graph_module)
    torch.compile(F.scaled_dot_product_attention, backend=backend, fullgraph=True)(*whole)
    (site,) = backend.report.sites
    assert site.chosen is None
    assert re.search(reason, site.call.obstacle), site.call.obstacle


def test_uneven_parts_are_left(two_ranks):
    given = [
        DTensor.from_local(torch.randn(2, 2, 5, 8), two_ranks, [HEADS], shape=(2, 3, 5, 8), stride=(120, 40, 8, 1))
    ] * 3
    backend = with_backend(MATH, inner="eager")
    torch.compile(F.scaled_dot_product_attention, backend=backend)(*given)
    assert "sharded unevenly" in backend.report.sites[0].call.obstacle
