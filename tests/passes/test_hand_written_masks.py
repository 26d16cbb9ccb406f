"""The masks of spelled-out attention are understood too: folded heads, several terms, fills, scales after the mask."""

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, doubled, relative, skip_if_fenced
from stand_ins import RECORDS, compiler

import attnrewrite

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 3, 4, 7, 11, 16


def valid():
    """A hole, the left side cut off, and no key at all in the last batch element."""
    mask = torch.rand(BATCH, KV_LEN) > 0.4
    mask[0, :3], mask[0, 5], mask[1, 0] = False, True, True
    mask[2] = False
    return mask


def fill(number, keys=lambda m: m[:, None, None, :]):
    return lambda q, k, v, m: (q @ k.mT * 0.3).masked_fill(~keys(m), number).softmax(-1) @ v


def folded(q, k, v, m):
    """diffusers' AttnProcessor: heads in the batch, the additive mask repeated over them, baddbmm, softmax, bmm."""
    bias = ((1 - m.to(q.dtype)) * -10000.0)[:, None, :].repeat_interleave(HEADS, dim=0)
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    scores = torch.baddbmm(bias.expand(-1, Q_LEN, -1), q, k.mT, beta=1, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (BATCH, HEADS))


def scaled_after(q, k, v, m):
    bias = torch.where(m, 0.0, -40000.0)[:, None, None, :]
    return ((q @ k.mT + bias) * 0.25).softmax(-1) @ v


def two_terms(q, k, v, m):
    causal = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()
    scores = (q @ k.mT * 0.25).masked_fill(~causal, float("-inf"))
    return scores.masked_fill(~(m | ~m.any(-1, keepdim=True))[:, None, None, :], float("-inf")).softmax(-1) @ v


def triangle(q, k, v, m):
    bias = torch.full((Q_LEN, KV_LEN), float("-inf")).triu(1)
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def outside(q, k, v, m):
    """A float from outside may hold any number."""
    return (q @ k.mT * 0.25 + m.float()[:, None, None, :]).softmax(-1) @ v


CASES = {
    "fill of -10000": (fill(-10000.0), "key padding (3, 11)", "mean"),
    "fill of the lowest": (fill(torch.finfo(torch.float32).min), "key padding (3, 11)", "mean"),
    "folded heads": (folded, "key padding (3, 11)", "all keys"),
    "scale behind the mask": (scaled_after, "key padding (3, 11)", "all keys"),
    "triangle": (triangle, "causal", "zeros"),
    "one and zero": (outside, "additive (3, 1, 1, 11)", "zeros"),
}


@pytest.mark.parametrize("kernel", ["_native_math", "native", "flex"])
@pytest.mark.parametrize("case", CASES)
def test_what_it_is_taken_for(case, kernel):
    function, mask, no_key = CASES[case]
    tensors = [torch.randn(BATCH, HEADS, length, DIM) for length in (Q_LEN, KV_LEN, KV_LEN)]
    run, backend = compiled(function, kernel)
    keep = valid()
    with torch.no_grad():
        output = run(*tensors, keep)
    (site,) = backend.report.sites
    skip_if_fenced(site)
    assert (site.chosen, str(site.call.mask), site.call.mask.no_key) == (kernel, mask, no_key)
    # A bias of -10000 rounds the scores that it is added to, in float32 to 1e-3.
    assert relative(output, function(*map(doubled, tensors), keep)) < (2e-3 if no_key == "all keys" else 1e-5)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("kernel", ["native", "auto", "_native_math", "_native_flash"])
def test_causal_lower_right(kernel, lengths):
    """SDPA has no such word: `native` passes the model's mask on where the lengths differ."""
    q_len, kv_len = lengths

    def function(q, k, v):
        keep = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        keep = keep | ~keep.any(-1, keepdim=True)
        return (q @ k.mT * 0.25).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    tensors = [torch.randn(BATCH, HEADS, length, DIM) for length in (q_len, kv_len, kv_len)]
    run, _ = compiled(function, kernel)
    with torch.no_grad():
        assert relative(run(*tensors), function(*map(doubled, tensors))) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("kernel", ["native", "_native_math", "_native_flash"])
def test_causal_with_any_scale(kernel, scale, training):
    """SDPA's CPU kernel gives NaN for `is_causal` with a scale of 0 or less, eager does not."""

    def function(q, k, v):
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        return (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    tensors = [torch.randn(BATCH, HEADS, length, DIM, requires_grad=training) for length in (Q_LEN, KV_LEN, KV_LEN)]
    run, backend = compiled(function, attnrewrite.with_backend(*dict.fromkeys((kernel, "native")), inner="eager"))
    with torch.set_grad_enabled(training):
        assert relative(run(*tensors), function(*map(doubled, tensors))) < 1e-5
    assert backend.report.sites[0].chosen is not None


@pytest.mark.parametrize("kernel", ["_native_math", "flex"])
def test_causal_and_padding_in_two_steps(kernel):
    tensors = [torch.randn(BATCH, HEADS, length, DIM) for length in (Q_LEN, KV_LEN, KV_LEN)]
    run, backend = compiled(two_terms, kernel)
    keep = valid()
    keep[:, 0] = True  # each row sees a key: eager gives NaN otherwise
    with torch.no_grad():
        assert relative(run(*tensors, keep), two_terms(*map(doubled, tensors), keep)) < 1e-5
    skip_if_fenced(backend.report.sites[0])
    assert backend.report.sites[0].chosen == kernel


def test_keys_are_packed_once_for_all_layers(stand_ins):
    """Layers that each make the mask anew: one sort for the graph, and kernels without a mask argument."""
    counted = []

    def inner(graph_module, example_inputs):
        counted.append(sum("argsort" in str(node.target) for node in graph_module.graph.nodes))
        return graph_module.forward

    def step(q, k, v, m):
        for _ in range(3):
            q = folded(q, k, v, m) + F.scaled_dot_product_attention(q, k, v, m[:, None, None, :].expand(-1, -1, 7, -1))
        return q

    (record,) = (each for each in RECORDS if each.name == "flash_varlen")
    tensors = [torch.randn(BATCH, HEADS, length, DIM, dtype=torch.bfloat16) for length in (Q_LEN, KV_LEN, KV_LEN)]
    keep = valid()
    backend = compiler(stand_ins(record), inner)
    with torch.no_grad():
        output = torch.compile(step, backend=backend, fullgraph=True)(*tensors, keep)
    assert [site.chosen for site in backend.report.sites] == ["flash_varlen"] * 6
    assert counted == [2]  # the two masks differ in what a batch element without any key gives
    assert relative(output, step(*map(doubled, tensors), keep)) < 2e-2
