"""Rings: keys and values go from rank to rank, and what a rank puts together is the attention of one process."""

import pytest
import torch
import torch.nn.functional as F
from lockstep import Shared, traced
from parity import TOLERANCE, relative
from test_attention import KEY, MASKS, QUERY, VALUE, WIDTH, attend, check, heads, key_padding, randn, sdpa

import attnrewrite
from attnrewrite import Code
from attnrewrite.kernels.logsumexp import WITH_LOGSUMEXP
from attnrewrite.parallel import plans, rings


def is_ring(plan, counts, size, rings=1):
    assert {site.exchange for site in plan.sites} == {plans.RING}
    assert counts == {"all_to_all_single": rings * (size - 1), "all_gather_into_tensor": 1}


@pytest.mark.parametrize(("size", "length"), [(2, 20), (3, 20), (5, 6)])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(mask, size, length):
    """Of 6 tokens on 5 ranks, two ranks hold copies alone."""
    tokens, mask = randn(2, length, WIDTH), MASKS[mask](2, length)
    inputs = [tokens] if mask is None else [tokens, mask]
    plan, counts = check(lambda x, m=None: attend(x, mask=m), inputs, size, "ring")
    (site,) = plan.sites
    if mask is None or mask.dtype == torch.bool or length % size == 0:
        is_ring(plan, counts, size)
        own = -(-length // size) * 2 * WIDTH * 8  # bytes of a rank's keys
        assert site.mib == pytest.approx(2 * own * (size - 1) / 2**20)
    else:
        assert site.exchange == plans.KEYS_GATHERED
        assert site.reason.startswith(f"no ring: it has a mask of numbers, and {size} ranks do not divide its keys")


@pytest.mark.parametrize(("size", "length"), [(2, 12), (3, 13), (5, 6)])
def test_causal_attention(size, length):
    plan, counts = check(lambda x: attend(x, is_causal=True), [randn(2, length, WIDTH)], size, "ring")
    is_ring(plan, counts, size)


def test_a_rank_attends_to_no_keys_of_the_future():
    shared = Shared(3, "ring")
    shared(traced(lambda x: attend(x, is_causal=True), [randn(1, 12, WIDTH)]), [])
    (run,) = shared.runs
    steps = [[node.args[4] for node in rank.module.graph.nodes if node.target is WITH_LOGSUMEXP] for rank in run.ranks]
    assert steps == [[True], [True, False], [True, False, False]]


@pytest.mark.parametrize("mask", ["none", "window", "padding of queries and keys"])
@pytest.mark.parametrize(("size", "lengths"), [(2, (1, 7)), (3, (9, 12))])
def test_joint_attention(mask, size, lengths):
    """Keys of two segments, of which each rank has a part."""

    def function(text, image, mask=None):
        return attend(attend(torch.cat([text, image], 1), mask=mask), mask=mask)

    mask = MASKS[mask](2, sum(lengths))
    inputs = [*(randn(2, length, WIDTH) for length in lengths), *([] if mask is None else [mask])]
    plan, counts = check(function, inputs, size, "ring")
    is_ring(plan, counts, size, rings=2)


def test_joint_causal_attention_runs_whole():
    def function(text, image):
        return attend(torch.cat([text, image], 1), is_causal=True)

    plan, _ = check(function, [randn(1, 4, WIDTH), randn(1, 12, WIDTH)], 2, "ring")
    (site,) = plan.sites
    assert site.exchange == plans.WHOLE
    assert site.reason == "it is causal, and no ring: its queries and keys are no single sequence"


def test_a_row_without_any_key_is_zero():
    """As SDPA's: a step that sees no key of a row has no weight, and neither have all of them."""
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    mask[..., 1:7, 9:] = True  # rows that see keys of the last rank alone; the others see none
    for given in (mask, torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, float("-inf"))):
        plan, counts = check(lambda x, m: attend(x, mask=m), [randn(2, 12, WIDTH), given], 3, "ring")
        is_ring(plan, counts, 3)


def test_numbers_that_hide_all_keys_of_a_row():
    """Attention to all keys, also where the scores vanish beside the number."""
    for number in (-1024.0, torch.finfo(torch.float64).min):
        mask = torch.zeros(12, 12, dtype=torch.float64).masked_fill(torch.arange(12)[:, None] < 5, number)
        plan, counts = check(lambda x, m: attend(x, mask=m), [randn(2, 12, WIDTH), mask], 3, "ring")
        is_ring(plan, counts, 3)


@pytest.mark.parametrize("mask", ["none", "key padding", "window"])
def test_grouped_heads(mask):
    mask = MASKS[mask](2, 14)
    inputs = [randn(2, 14, WIDTH), *([] if mask is None else [mask])]
    plan, counts = check(lambda x, m=None: attend(x, mask=m, kv_heads=2, enable_gqa=True), inputs, 3, "ring")
    is_ring(plan, counts, 3)


def test_a_value_of_another_width_and_a_scale():
    def function(x, causal):
        query, key = (heads(x, weight) for weight in (QUERY, KEY))
        value = F.linear(x, VALUE[:20]).unflatten(-1, (4, 5)).transpose(1, 2)
        return sdpa(query, key, value, is_causal=causal, scale=0.7).transpose(1, 2).flatten(2)

    for causal in (False, True):
        plan, counts = check(lambda x: function(x, causal), [randn(2, 11, WIDTH)], 2, "ring")  # noqa: B023
        is_ring(plan, counts, 2)


@pytest.mark.parametrize("rank", [3, 5])
def test_tensors_of_other_ranks(rank):
    def function(x, mask=None):
        query, key, value = (heads(x, weight) for weight in (QUERY, KEY, VALUE))
        if rank == 3:
            query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        return sdpa(query, key, value, mask)

    shape = (2, 14, WIDTH) if rank == 3 else (2, 3, 14, WIDTH)

    def heads(x, weight):
        return F.linear(x, weight).unflatten(-1, (4, 6)).transpose(-3, -2)

    plan, counts = check(function, [randn(*shape)], 3, "ring")
    is_ring(plan, counts, 3)
    if rank == 3:
        plan, counts = check(function, [randn(*shape), key_padding(1, 14)[0]], 3, "ring")
        is_ring(plan, counts, 3)


def test_queries_and_keys_of_other_lengths():
    """A resampler: its queries attend to themselves and to the tokens."""

    def function(latents, tokens):
        return attend(latents, torch.cat([F.layer_norm(tokens, (WIDTH,)), F.layer_norm(latents, (WIDTH,))], 1))

    plan, counts = check(function, [randn(2, 6, WIDTH), randn(2, 15, WIDTH)], 2, "ring")
    is_ring(plan, counts, 2)


def test_cross_attention_exchanges_nothing():
    plan, counts = check(lambda x, text: attend(attend(x), text), [randn(2, 13, WIDTH), randn(2, 7, WIDTH)], 3, "ring")
    assert [site.exchange for site in plan.sites] == [plans.RING, plans.KEYS_WHOLE]
    assert counts == {"all_to_all_single": 2, "all_gather_into_tensor": 1}


def test_symbolic_lengths():
    backend = Shared(3, "ring")
    compiled = torch.compile(attend, backend=backend, dynamic=True)
    with torch.no_grad():
        for length in (12, 15, 14):
            tokens = randn(1, length, WIDTH)
            torch.testing.assert_close(compiled(tokens), attend(tokens), rtol=1e-11, atol=1e-12)
    assert [plan.sites[0].exchange for plan in backend.plans] == [plans.RING, plans.KEYS_GATHERED]
    assert "keys, a length that is not fixed" in backend.plans[1].sites[0].reason


def test_half_precision_and_autocast():
    """Steps are put together in float32."""
    tokens, weights = torch.randn(2, 18, WIDTH), [each.float() for each in (QUERY, KEY, VALUE)]

    def function(x, query, key, value):
        with torch.autocast("cpu", torch.bfloat16):
            parts = (F.linear(x, each).unflatten(-1, (4, 6)).transpose(1, 2) for each in (query, key, value))
            return sdpa(*parts)

    backend = Shared(3, "ring")
    with torch.no_grad():
        result = torch.compile(function, backend=backend)(tokens, *weights)
        expected = function(tokens, *weights)
        exact = sdpa(*((tokens.double() @ each.double().mT).unflatten(-1, (4, 6)).transpose(1, 2) for each in weights))
    assert backend.plans[0].sites[0].exchange == plans.RING
    assert result.dtype == torch.bfloat16
    assert (result - exact).norm() < 1.2 * (expected - exact).norm()


def test_a_gradient_has_no_ring():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(WIDTH, WIDTH).double(), randn(1, 12, WIDTH)
    backend = Shared(3, "ring")
    torch.compile(lambda x: attend(layer(x)), backend=backend)(x).square().sum().backward()
    found, layer.weight.grad = layer.weight.grad, None
    attend(layer(x)).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-10, atol=1e-11)
    (site,) = backend.plans[0].sites
    assert site.exchange == plans.KEYS_GATHERED
    assert site.reason == 'no ring: a gradient is needed, which a ring does not have: use kind="ulysses"'


@pytest.mark.parametrize(("size", "kv_heads", "groups"), [(4, 2, 2), (6, 4, 3)])
@pytest.mark.parametrize("mask", ["none", "causal", "key padding", "padding of queries and keys", "bias of each head"])
def test_a_ring_of_groups(mask, size, kv_heads, groups):
    """Neighbours share the heads, and their groups make a ring."""
    length = 48 if mask == "bias of each head" else 27
    causal = mask == "causal"
    given = None if causal else MASKS[mask](2, length)
    inputs = [randn(2, length, WIDTH), *([] if given is None else [given])]

    def function(x, mask=None):
        return attend(x, mask=mask, kv_heads=kv_heads, enable_gqa=True, is_causal=causal)

    plan, counts = check(function, inputs, size, "ulysses+ring")
    (site,) = plan.sites
    assert (site.exchange, site.reason) == (plans.GROUPS, f"{size // groups} of {size} ranks divide its heads")
    # Query, key and value; the steps; the output.
    assert counts == {"all_to_all_single": 1 + groups - 1 + 1, "all_gather_into_tensor": 1}
    own = -(-length // size) * 2 * 6 * 8  # bytes of a rank's tokens of one head
    together = size // groups
    expected = own * ((2 * 4 + 2 * kv_heads) * (together - 1) / together + 2 * kv_heads * (groups - 1))
    assert site.mib == pytest.approx(expected / 2**20)


@pytest.mark.parametrize("mask", ["none", "documents"])
def test_a_ring_of_groups_of_joint_tokens(mask):
    def function(text, image, mask=None):
        return attend(attend(torch.cat([text, image], 1), mask=mask), mask=mask)

    mask = MASKS[mask](2, 26)
    inputs = [randn(2, 7, WIDTH), randn(2, 19, WIDTH), *([] if mask is None else [mask])]
    plan, _ = check(function, inputs, 6, "ulysses+ring")
    assert {site.exchange for site in plan.sites} == {plans.GROUPS}


def test_groups_of_all_ranks_and_of_one():
    plan, _ = check(lambda x: attend(x), [randn(2, 20, WIDTH)], 4, "ulysses+ring")
    assert plan.sites[0].exchange == plans.ALL_TO_ALL
    plan, _ = check(lambda x: attend(x), [randn(2, 20, WIDTH)], 3, "ulysses+ring")
    assert plan.sites[0].exchange == plans.RING


def equal_weights(before, part):
    if before is None:
        return ADDED(before, part)
    return ADDED(before, (part[0], before.largest))


WRONG = {
    "equal weights": equal_weights,
    "weights in another base": lambda before, part: ADDED(before, (part[0], part[1] * 1.44)),
}
ADDED = rings.added


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_would_be_seen(name, monkeypatch):
    monkeypatch.setattr(rings, "added", WRONG[name])
    with pytest.raises(AssertionError, match="not close"):
        check(lambda x: attend(x), [randn(2, 18, WIDTH)], 3, "ring")


def test_copies_that_count_would_be_seen(monkeypatch):
    monkeypatch.setattr(rings, "_cut", lambda tensor, *_: tensor)
    with pytest.raises(AssertionError, match="not close"):
        check(lambda x: attend(x), [randn(2, 20, WIDTH)], 3, "ring")


CPU = [
    ("cpu", name, dtype) for name in ("native", "_native_flash", "_native_math") for dtype in ("bfloat16", "float64")
]
OURS = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "_flash_3", "flash_4")
GPU = [("cuda", name, "bfloat16") for name in OURS]
STEPS = [*CPU, *(pytest.param(*each, marks=pytest.mark.gpu) for each in GPU)]


@pytest.mark.parametrize(("device", "name", "dtype"), CPU)
def test_a_step_of_rows_that_a_number_hides(device, name, dtype):
    """The mean of the values: the scores are lost beside the number, and so is the number of keys in the log-sum-exp."""
    dtype = getattr(torch, dtype)
    query, key, value = (torch.randn(2, 3, length, 40).to(device, dtype) for length in (7, 11, 11))
    bias = torch.zeros(1, 1, 7, 11, dtype=dtype).masked_fill(torch.arange(7)[:, None] < 5, torch.finfo(dtype).min)
    backend = attnrewrite.with_backend(name, inner="aot_eager")

    def step(query, key, value, bias):
        return WITH_LOGSUMEXP(query, key, value, bias, False, 0.3, "a step")

    with torch.no_grad():
        output, _ = torch.compile(step, backend=backend)(query, key, value, bias)
    wanted = torch.softmax(query.double() @ key.double().mT * 0.3, -1) @ value.double()
    wanted[:, :, :5] = value.double().mean(2, keepdim=True)
    assert relative(output, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("device", "name", "dtype"), STEPS)
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_a_step_returns_the_log_sum_exp(device, name, dtype, mask):
    """Of queries and keys of other lengths, of which a kernel may fill up tiles."""
    dtype, q_len, kv_len = getattr(torch, dtype), 45, 45 if mask == "causal" else 70
    query, key = torch.randn(2, 4, q_len, 40), torch.randn(2, 4, kv_len, 40)
    tensors = [each.to(device, dtype) for each in (query, key, torch.randn(2, 4, kv_len, 40))]
    bias = None
    if mask in ("boolean", "additive"):
        bias = (torch.rand(2, 1, q_len, kv_len) < 0.6) | (torch.arange(kv_len) == 3)
        bias = (
            bias.to(device)
            if mask == "boolean"
            else torch.where(bias, torch.randn(bias.shape), -30.0).to(device, dtype)
        )

    def step(query, key, value, bias):
        return WITH_LOGSUMEXP(query, key, value, bias, mask == "causal", 0.3, "a step")

    backend = attnrewrite.with_backend(name, inner="inductor" if device == "cuda" else "aot_eager")
    with torch.no_grad():
        output, logsumexp = torch.compile(step, backend=backend)(*tensors, bias)
    (site,) = backend.report.graphs[0].plan.sites
    if device == "cuda" and any(refused.code in (Code.MISSING, Code.MASK) for _, refused in site.refusals):
        pytest.skip(str(site.refusals[0][1]))
    assert (site.name, site.chosen) == ("a step", name)

    query, key, value = (each.double() for each in tensors)
    scores = query @ key.mT * 0.3
    if mask == "causal":
        scores = scores.masked_fill(torch.ones(q_len, kv_len, dtype=torch.bool, device=device).triu(1), float("-inf"))
    elif bias is not None:
        scores = scores.masked_fill(~bias, float("-inf")) if mask == "boolean" else scores + bias.double()
    exact = dtype == torch.float64
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value, rtol=0, atol=1e-12 if exact else 2e-2)
    assert logsumexp.dtype == (torch.float64 if exact else torch.float32)
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=1e-12 if exact else 1e-2)
