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
from attnrewrite import ContextParallel, pipeline
from attnrewrite.parallel import exchanges


@pytest.fixture
def mesh(monkeypatch):
    """Two ranks, of which one is there. Its exchanges return at once, with numbers of no meaning."""
    monkeypatch.setattr(pipeline, "agree", lambda *_: None)  # there is nobody to agree with
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


PRODUCT, BEGIN, ATTENTION, WAIT = "mm", "all_to_all_single", "_flash_attention_for_cpu", "wait_tensor"


def calls_in(code):
    """The calls of these kinds, in their order."""
    return re.findall(rf"({PRODUCT}|{BEGIN}|{ATTENTION}|{WAIT})(?:\.default)?\(", code)


def test_products_of_query_and_key_run_while_the_value_is_under_way(mesh, monkeypatch):
    monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = calls_in(code_of(mesh))
    assert calls[:10] == [PRODUCT, BEGIN] * 3 + [WAIT] * 3 + [ATTENTION]


@pytest.mark.parametrize("large", [True, False])
def test_an_mlp_beside_the_attention_runs_while_the_last_exchange_is_under_way(mesh, monkeypatch, large):
    if large:
        monkeypatch.setattr(exchanges, "LARGE", 0)
    calls = calls_in(code_of(mesh, mlp=True))
    first = calls.index(WAIT)
    assert calls[:first] == ([PRODUCT, BEGIN] * 3 if large else [PRODUCT] * 3 + [BEGIN]) + [PRODUCT]


def test_keys_are_under_way_while_a_ring_attends(mesh):
    calls = [call for call in calls_in(code_of(ContextParallel(mesh, "ring"))) if call != PRODUCT]
    assert calls[:4] == [BEGIN, ATTENTION, WAIT, ATTENTION]


def code_of(parallel, mlp=False):
    """What Inductor makes of a layer. mlp: with an MLP beside the attention, of which the model's code computes the first half
    before the query."""
    weights = [torch.randn(16, 16) for _ in range(3)]
    wide = torch.randn(48, 16)

    def attend(tokens):
        hidden = F.gelu(F.linear(tokens, wide)) if mlp else tokens
        query, key, value = (F.linear(tokens, weight).unflatten(-1, (2, 8)).transpose(1, 2) for weight in weights)
        query, key = (F.rms_norm(each, (8,)) for each in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.cat([attended, hidden], -1)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=attnrewrite.with_backend("native", context_parallel=parallel))
    with torch.no_grad():
        _, codes = run_and_get_code(compiled, torch.randn(1, 12, 16))
    return codes[0][codes[0].index("def call(") :]
