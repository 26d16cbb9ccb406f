"""Exchanges that are under way while Inductor's code computes what comes behind them."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import attnrewrite
from attnrewrite import ContextParallel
from attnrewrite.entrances import compilers
from attnrewrite.parallel import exchanges


@pytest.fixture
def mesh(monkeypatch):
    """Two ranks, of which one is there. Its exchanges return at once, with numbers of no meaning."""
    monkeypatch.setattr(compilers, "agree", lambda *_: None)  # there is nobody to agree with
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_inductor_begins_all_exchanges_before_it_waits(mesh, monkeypatch):
    monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = re.findall(r"_c10d_functional\.(\w+)\.default\(buf", code_of(mesh))
    assert calls[:6] == ["all_to_all_single"] * 3 + ["wait_tensor"] * 3


def test_keys_are_under_way_while_a_ring_attends(mesh):
    calls = re.findall(
        r"(all_to_all_single|_flash_attention_for_cpu|wait_tensor)\.default\(", code_of(ContextParallel(mesh, "ring"))
    )
    step = "_flash_attention_for_cpu"
    assert calls[:4] == ["all_to_all_single", step, "wait_tensor", step]


def code_of(parallel):
    """What Inductor makes of a layer."""
    weights = [torch.randn(16, 16) for _ in range(3)]

    def attend(tokens):
        query, key, value = (F.linear(tokens, weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in weights)
        query, key = (F.rms_norm(each, (8,)) for each in (query, key))
        return tokens + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=attnrewrite.with_backend("native", context_parallel=parallel))
    with torch.no_grad():
        _, codes = run_and_get_code(compiled, torch.randn(1, 12, 16))
    return codes[0][codes[0].index("def call(") :]
