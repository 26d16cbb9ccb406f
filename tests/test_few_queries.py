"""Exact attention of a few queries in parts of the keys (kernels/few_queries.py), against float64."""

import pytest
import torch
from parity import relative

from attnrewrite.kernels import few_queries
from attnrewrite.kernels.few_queries import MULTIPLE, PARTS, attend_few

KEYS = PARTS * MULTIPLE * 2 + 100


def expected(query, key, value, mask, scale):
    query, key, value = (each.double().transpose(1, 2) for each in (query, key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def tensors(batch, queries, keys, device="cpu", dim=72):
    """Views of fused projections, as models have them; keys that grow, so that the parts weigh differently."""
    torch.manual_seed(0)
    fused = torch.randn(batch, keys, 3, 5, dim, device=device)
    fused[:, :, 1] *= torch.linspace(0.2, 2.0, keys, device=device)[:, None, None]
    query, key, value = fused.to(torch.bfloat16).unbind(2)
    return query[:, -queries:], key, value


def near_of(keys, hidden, first):
    return (0, hidden) if first else (keys - hidden, keys)


def masks(batch, keys, near, device="cpu"):
    """None, a part of the near keys hidden, and all of them."""
    start, end = near
    some, every = (torch.ones(batch, keys, dtype=torch.bool, device=device) for _ in range(2))
    some[:, start + 3 : end - 1] = False
    every[:, start:end] = False
    return (None, some, every, some[:1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(1, 130, KEYS), (2, 130, KEYS), (1, 7, 300), (1, 1030, KEYS), (1, 1, PARTS * MULTIPLE + 77 + 1)],
)
def test_against_float64(batch, queries, keys, first):
    given = tensors(batch, queries, keys)
    near = near_of(keys, 77, first)
    for mask in masks(batch, keys, near):
        for scale in (None, 0.3):
            output = attend_few(*given, mask, scale, near)
            assert (output.shape, output.dtype) == (given[0].shape, torch.bfloat16)
            assert relative(output, expected(*given, mask, scale)) < 1e-2


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "cut"),
    [(1, 130, KEYS, True), (2, 130, KEYS, False), (1, 1030, KEYS, False), (1, 7, 300, False)],
)
def test_which_calls_are_cut(monkeypatch, batch, queries, keys, cut):
    """One sequence of few queries; the output of eight parts is as large as eight outputs."""
    calls = []
    attended = few_queries.WITH_LOGSUMEXP
    monkeypatch.setattr(few_queries, "WITH_LOGSUMEXP", lambda *given: calls.append(given) or attended(*given))
    attend_few(*tensors(batch, queries, keys), None, None, near_of(keys, 77, False))
    assert len(calls) == (2 if cut else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False])
def test_on_a_gpu(first):
    for dim, queries, keys in ((128, 256, 9000), (64, 100, 5001)):
        given = tensors(1, queries, keys, "cuda", dim)
        near = near_of(keys, 256, first)
        for mask in masks(1, keys, near, "cuda"):
            error = relative(attend_few(*given, mask, None, near), expected(*given, mask, None))
            print(f"{queries} queries of {dim} to {keys} keys, text first: {first}: error {error:.1e}")
            assert error < 1e-2
