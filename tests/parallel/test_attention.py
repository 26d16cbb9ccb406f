"""Self attention, joint attention and cross attention of small layers, shared among several ranks: equal to one process, with
the exchanges that the plan names and no other."""

import pytest
import torch
import torch.nn.functional as F
from lockstep import EXCHANGES, Shared, run, traced

from attnrewrite.parallel import attending, exchanges, plans, rewriting
from attnrewrite.parallel.analysis import analyse

WIDTH, DIM = 24, 6
sdpa = F.scaled_dot_product_attention


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


QUERY, KEY, VALUE = (randn(WIDTH, WIDTH) * 0.4 for _ in range(3))


def heads(tokens, weight, number=WIDTH // DIM):
    return F.linear(tokens, weight[: number * DIM]).unflatten(-1, (number, DIM)).transpose(1, 2)


def attend(tokens, context=None, mask=None, kv_heads=WIDTH // DIM, **arguments):
    """A layer of a transformer: a norm, attention, and a residual."""
    normed = F.layer_norm(tokens, (WIDTH,))
    context = normed if context is None else context
    query, key, value = heads(normed, QUERY), heads(context, KEY, kv_heads), heads(context, VALUE, kv_heads)
    return tokens + sdpa(query, key, value, mask, **arguments).transpose(1, 2).flatten(2)


def close(result, expected):
    results, expecteds = (each if isinstance(each, tuple) else (each,) for each in (result, expected))
    for one, other in zip(results, expecteds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def check(function, inputs, size, kind="ulysses"):
    result, plan, counts = run(function, inputs, size, kind)
    close(result, function(*inputs))
    return plan, counts


def key_padding(batch, keys):
    return (torch.arange(keys) < torch.tensor([[keys], [keys // 2], [3]])[:batch])[:, None, None]


def window(queries, keys):
    return (torch.arange(queries)[:, None] - torch.arange(keys)).abs() < 4


LENGTH = 20
MASKS = {
    "none": lambda batch, length: None,
    "key padding": key_padding,
    "added padding": lambda batch, length: torch.zeros(1, dtype=torch.float64).masked_fill(
        ~key_padding(batch, length), -1e4
    ),
    "window": lambda batch, length: window(length, length),
    "documents": lambda batch, length: (torch.arange(length)[:, None] // 7 == torch.arange(length) // 7)[None, None],
    "bias of each head": lambda batch, length: randn(WIDTH // DIM, length, length),
    "bias of each batch": lambda batch, length: randn(batch, 1, length, length),
    "padding of queries and keys": lambda batch, length: (m := key_padding(batch, length)) & m.transpose(-1, -2),
}


# Of each way that a mask is cut: by queries, by keys, by heads.
FEW = ("none", "key padding", "window", "bias of each head")


def crossed(hard, easy):
    """Every mask where lengths or heads do not divide, few where they do."""
    return [*((mask, *each) for mask in MASKS for each in hard), *((mask, *each) for mask in FEW for each in easy)]


@pytest.mark.parametrize(("mask", "size", "length"), crossed([(2, 21), (3, 20)], [(2, 20), (4, 9)]))
def test_self_attention(mask, size, length):
    tokens, mask = randn(2, length, WIDTH), MASKS[mask](2, length)
    inputs = [tokens] if mask is None else [tokens, mask]
    plan, counts = check(lambda x, m=None: attend(x, mask=m), inputs, size)
    (site,) = plan.sites
    if size == 3:  # of 4 heads
        assert (site.exchange, site.reason) == (plans.KEYS_GATHERED, "3 ranks do not divide its 4 heads")
        assert counts == {"all_gather_into_tensor": 2}
    else:
        assert site.exchange == plans.ALL_TO_ALL
        assert counts == {"all_to_all_single": 2, "all_gather_into_tensor": 1}
    assert len(plan.gathered) == 1


@pytest.mark.parametrize("mask", ["none", "key padding", "bias of each head"])
@pytest.mark.parametrize("length", [20, 21])
def test_large_tensors_are_exchanged_one_by_one(mask, length, monkeypatch):
    own = -(-length // 2) * WIDTH * 8 * 2  # bytes of a rank's tokens, batch 2
    tokens, mask = randn(2, length, WIDTH), MASKS[mask](2, length)
    inputs = [tokens] if mask is None else [tokens, mask]
    for large, together in ((own + 1, 2), (own, 4)):
        monkeypatch.setattr(exchanges, "LARGE", large)
        _, counts = check(lambda x, m=None: attend(x, mask=m), inputs, 2)
        assert counts == {"all_to_all_single": together, "all_gather_into_tensor": 1}


def test_large_tensors_are_on_their_way_at_the_same_time(monkeypatch):
    monkeypatch.setattr(exchanges, "LARGE", 0)
    shared = Shared(2)
    module = traced(attend, [randn(1, 20, WIDTH)])
    shared(module, [])
    names = [node.target._opname for node in shared.runs[0].ranks[0].module.graph.nodes if node.target in EXCHANGES]
    assert names[:6] == ["all_to_all_single"] * 3 + ["wait_tensor"] * 3


@pytest.mark.parametrize(("size", "length"), [(2, 20), (4, 21)])
def test_causal_attention(size, length):
    plan, counts = check(lambda x: attend(x, is_causal=True), [randn(2, length, WIDTH)], size)
    assert plan.sites[0].exchange == plans.ALL_TO_ALL
    assert counts == {"all_to_all_single": 2, "all_gather_into_tensor": 1}


def test_causal_attention_whose_heads_do_not_divide_runs_whole():
    plan, _ = check(lambda x: attend(x, is_causal=True), [randn(2, 21, WIDTH)], 3)
    (site,) = plan.sites
    assert site.exchange == plans.WHOLE
    assert site.reason == "it is causal, and 3 ranks do not divide its 4 heads"
    assert any("attention" in each.reason or "causal" in each.reason for each in plan.gathered)


@pytest.mark.parametrize("size", [2, 4])
def test_grouped_heads(size):
    plan, _ = check(lambda x: attend(x, kv_heads=2, enable_gqa=True), [randn(2, 16, WIDTH)], size)
    (site,) = plan.sites
    assert site.exchange == (plans.ALL_TO_ALL if size == 2 else plans.KEYS_GATHERED)
    assert site.reason == ("" if size == 2 else "4 ranks do not divide its 2 heads of keys")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_cross_attention_exchanges_nothing(size, masked):
    """Text is whole on every rank, and counts once."""

    def function(x, text, mask=None):
        return attend(attend(x), context=text, mask=mask)

    inputs = [randn(2, 20, WIDTH), randn(2, 7, WIDTH), *([key_padding(2, 7)] if masked else [])]
    plan, counts = check(function, inputs, size)
    assert [site.exchange for site in plan.sites][1] == plans.KEYS_WHOLE
    assert sum(counts.values()) == (3 if size == 2 else 2)


def test_cross_attention_with_a_mask_for_each_query():
    def function(x, text, mask):
        return attend(attend(x), context=text, mask=mask)

    check(function, [randn(2, 21, WIDTH), randn(2, 7, WIDTH), randn(2, 1, 21, 7)], 2)


@pytest.mark.parametrize(("mask", "size", "lengths"), crossed([(2, (7, 13))], [(2, (8, 24)), (4, (8, 12))]))
def test_joint_attention(mask, size, lengths):
    """Text and image are joined for attention and cut apart behind it: each rank joins its own parts, and a mask follows the
    order that this makes."""
    first = lengths[0]

    def function(text, image, mask=None):
        both = attend(torch.cat([text, image], 1), mask=mask)
        text, image = both[:, :first], both[:, first:]
        return text * 2, attend(torch.cat([image, text], 1), mask=mask)

    mask = MASKS[mask](2, sum(lengths))
    inputs = [*(randn(2, length, WIDTH) for length in lengths), *([] if mask is None else [mask])]
    plan, counts = check(function, inputs, size)
    assert [site.exchange for site in plan.sites] == [plans.ALL_TO_ALL] * 2
    assert counts == {"all_to_all_single": 4, "all_gather_into_tensor": 2}


@pytest.mark.parametrize("kind", ["ulysses", "gather", "ring"])
@pytest.mark.parametrize("shape", [(32, 32), (2, 1, 1, 32)])
def test_a_mask_that_is_written_between_two_attentions(shape, kind):
    def function(text, image, bias):
        mask = bias.clone()
        x = attend(torch.cat([text, image], 1), mask=mask)
        mask.add_(bias * 3)
        return attend(x, mask=mask)

    check(function, [randn(2, 8, WIDTH), randn(2, 24, WIDTH), randn(*shape)], 2, kind)


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_a_mask_of_symbolic_lengths(kind):
    def function(text, image, mask):
        return attend(torch.cat([text, image], 1), mask=mask)

    backend = Shared(2, kind)
    compiled = torch.compile(function, backend=backend, dynamic=True)
    with torch.no_grad():
        for lengths in ((4, 12), (6, 18)):
            inputs = [*(randn(2, length, WIDTH) for length in lengths), key_padding(2, sum(lengths))]
            close(compiled(*inputs), function(*inputs))
    assert len(backend.plans) == 1


def test_joint_causal_attention_is_in_order():
    def function(text, image):
        return attend(torch.cat([text, image], 1), is_causal=True)

    plan, _ = check(function, [randn(1, 4, WIDTH), randn(1, 12, WIDTH)], 2)
    assert plan.sites[0].exchange == plans.ALL_TO_ALL


def test_the_batch_is_shared_first():
    def function(x, text, table, mask):
        x = x * table + text.mean(1)[:, None]
        return attend(attend(x, mask=mask), context=text)

    inputs = [randn(4, 21, WIDTH), randn(4, 7, WIDTH), randn(21, WIDTH), randn(4, 1, 1, 21)]
    plan, counts = check(function, inputs, 2, "auto")
    assert {site.exchange for site in plan.sites} == {plans.BATCH}
    assert counts == {"all_gather_into_tensor": 1}
    plan, counts = check(function, inputs, 3, "auto")
    assert plan.sites[0].exchange == plans.KEYS_GATHERED


def test_keys_are_gathered_on_request():
    plan, counts = check(lambda x, m: attend(x, mask=m), [randn(2, 21, WIDTH), randn(21, 21)], 2, "gather")
    (site,) = plan.sites
    assert (site.exchange, site.reason) == (plans.KEYS_GATHERED, 'kind is "gather"')
    assert counts == {"all_gather_into_tensor": 2}


@pytest.mark.parametrize("size", [2, 3])
def test_heads_folded_into_the_batch(size):
    def function(x):
        query, key, value = (heads(x, weight).flatten(0, 1) for weight in (QUERY, KEY, VALUE))
        output = sdpa(query, key, value).unflatten(0, (-1, WIDTH // DIM))
        return x + output.transpose(1, 2).flatten(2)

    plan, _ = check(function, [randn(3, 20, WIDTH)], size)
    assert plan.sites[0].exchange == plans.ALL_TO_ALL  # 3 ranks divide 12, the batch and the heads together


@pytest.mark.parametrize("kind", ["ulysses", "ulysses+ring"])
def test_a_symbolic_number_of_heads(kind):
    """Of the batch and the heads together; the ranks divide it, and that is a guard."""

    def function(x):
        query, key, value = (heads(x, weight).flatten(0, 1) for weight in (QUERY, KEY, VALUE))
        return sdpa(query, key, value).unflatten(0, (-1, WIDTH // DIM)).transpose(1, 2).flatten(2)

    backend = Shared(3, kind)
    compiled = torch.compile(function, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch in (3, 6):
            x = randn(batch, 12, WIDTH)
            close(compiled(x), function(x))
    assert [site.exchange for plan in backend.plans for site in plan.sites] == [plans.ALL_TO_ALL]


def test_attention_with_a_value_of_another_width():
    def function(x):
        query, key = (heads(x, weight) for weight in (QUERY, KEY))
        value = F.linear(x, VALUE[:20]).unflatten(-1, (4, 5)).transpose(1, 2)
        return sdpa(query, key, value).transpose(1, 2).flatten(2)

    for kind in ("ulysses", "gather"):
        check(function, [randn(2, 11, WIDTH)], 2, kind)


def test_queries_and_keys_of_other_lengths():
    """A resampler: its queries attend to themselves and to the tokens."""

    def function(latents, tokens):
        normed = F.layer_norm(latents, (WIDTH,))
        context = torch.cat([F.layer_norm(tokens, (WIDTH,)), normed], 1)
        pairs = ((normed, QUERY), (context, KEY), (context, VALUE))
        return latents + sdpa(*(heads(*pair) for pair in pairs)).transpose(1, 2).flatten(2)

    plan, _ = check(function, [randn(2, 6, WIDTH), randn(2, 15, WIDTH)], 2)
    assert plan.sites[0].exchange == plans.ALL_TO_ALL


def test_convolutions_between_attentions_gather():
    """A UNet: tokens of another resolution, and neighbours that a convolution reads."""
    weight = randn(WIDTH, WIDTH, 3, 3) * 0.1

    def function(x):
        x = F.conv2d(x, weight, padding=1)
        x = attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 5))
        x = F.conv2d(x, weight, padding=1, stride=2)
        x = attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 3))
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)

    plan, _ = check(function, [randn(1, WIDTH, 6, 5)], 2)
    assert [site.exchange for site in plan.sites] == [plans.ALL_TO_ALL] * 2
    assert len(plan.gathered) == 2


def test_spatial_and_temporal_attention():
    """A video model that attends within a frame, then between frames."""

    def function(x):
        x = attend(x.flatten(0, 1)).unflatten(0, (2, 4)).transpose(1, 2)
        return attend(x.flatten(0, 1)).unflatten(0, (2, 9)).transpose(1, 2)

    for size in (2, 3, 4):
        for kind in ("ulysses", "auto"):
            check(function, [randn(2, 4, 9, WIDTH)], size, kind)


def test_a_region_of_autocast():
    """The products inside run in the dtype of the region, also on a part."""

    backend = Shared(2, "ulysses")
    tokens = torch.randn(2, 10, WIDTH)
    weights = [each.float() for each in (QUERY, KEY, VALUE)]

    def single(x, query, key, value):
        with torch.autocast("cpu", torch.bfloat16):
            parts = (F.linear(x, each).unflatten(-1, (-1, DIM)).transpose(1, 2) for each in (query, key, value))
            return sdpa(*parts).transpose(1, 2).flatten(2)

    with torch.no_grad():
        expected = single(tokens, *weights)
        result = torch.compile(single, backend=backend)(tokens, *weights)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)
    assert backend.plans[0].sites[0].exchange == plans.ALL_TO_ALL
    assert not torch.is_autocast_enabled("cpu")


def test_a_mask_by_torch_func():
    """The tensors inside of a transform have no value outside: the graph runs whole."""

    def function(x, valid):
        of_key = torch.vmap(lambda column: column.logical_not(), in_dims=1, out_dims=-1)
        return attend(x, mask=of_key(~valid)[:, None, None])

    inputs = [randn(2, 12, WIDTH), key_padding(2, 12)[:, 0, 0]]
    backend = Shared(2, "ulysses")
    with torch.no_grad():
        close(torch.compile(function, backend=backend)(*inputs), function(*inputs))
    assert [plan.refused for plan in backend.plans] == ["a part of it stands inside torch.func.vmap"]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_fast_path_of_an_encoder_layer(batch):
    """One operator of PyTorch, with an attention inside."""
    torch.compiler.reset()
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 31, batch_first=True).double().eval().requires_grad_(False)
    backend, tokens = Shared(2), randn(batch, LENGTH + 1, WIDTH)
    with torch.no_grad():
        close(torch.compile(layer, backend=backend)(tokens), layer(tokens))
    ((site,),) = (plan.sites for plan in backend.plans)
    assert (site.site, site.exchange) == ("TransformerEncoderLayer", plans.ALL_TO_ALL if batch == 1 else plans.BATCH)


def spelled_out(tokens):
    query, key, value = (heads(tokens, weight) for weight in (QUERY, KEY, VALUE))
    return (query @ key.mT * DIM**-0.5).softmax(-1) @ value


def by_a_kernel(tokens):
    tensors = (heads(tokens, weight) for weight in (QUERY, KEY, VALUE))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors)[0]


def in_a_graph_of_its_own(tokens):
    return torch.cond(tokens.sum() > 1e9, torch.sin, lambda given: attend(given), (tokens,)) + attend(tokens)


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (spelled_out, (1, LENGTH, WIDTH), "only scaled_dot_product_attention is shared, and spelled_out is"),
        (by_a_kernel, (1, LENGTH, WIDTH), "only scaled_dot_product_attention is shared, and by_a_kernel is"),
        (attend, (3, 1, WIDTH), "attend has 1 tokens, fewer than the 2 ranks"),
        (in_a_graph_of_its_own, (1, LENGTH, WIDTH), "it calls graphs of its own, as torch.cond does"),
        (torch.relu, (1, LENGTH, WIDTH), ""),
    ],
)
def test_why_nothing_is_shared(function, shape, reason):
    torch.compiler.reset()
    backend, tokens = Shared(2), randn(*shape)
    close(torch.compile(lambda given: function(given), backend=backend)(tokens), function(tokens))
    (plan,) = backend.plans
    assert plan.refused.startswith(reason)
    assert bool(plan.refused) == bool(reason)
    assert (plan.refused or "nothing is shared") in " ".join(map(str.strip, plan.lines()))


def test_cross_attention_alone_is_not_shared():
    torch.compiler.reset()
    backend, queries, keys = Shared(2), randn(1, 12, WIDTH), randn(1, 7, WIDTH)
    close(torch.compile(lambda *given: attend(*given), backend=backend)(queries, keys), attend(queries, keys))
    (plan,) = backend.plans
    assert "that the queries and the keys of attend both come from" in plan.refused


def test_dropout_runs_whole():
    graph = traced(lambda x: attend(x, dropout_p=0.5), [randn(1, 8, WIDTH)])
    (site,) = analyse(graph, {}, 2, "ulysses").plan.sites
    assert site.exchange == plans.WHOLE
    assert "dropout" in site.reason


def test_what_is_shared_counts_the_bytes_that_are_sent():
    tokens = randn(1, 20, WIDTH)
    plan, _ = check(lambda x: attend(x), [tokens], 2)
    own = 10 * WIDTH * 8  # bytes of a rank's tokens; of these it sends half, of query, key, value and output
    assert plan.sites[0].mib == pytest.approx(4 * own / 2 / 2**20)
    assert plan.gathered[0].mib == pytest.approx(own / 2**20)


def test_a_mask_in_the_wrong_order_would_be_seen(monkeypatch):
    monkeypatch.setattr(attending, "by_rank", lambda tensor, *_: tensor)
    mask = window(32, 32)
    with pytest.raises(AssertionError, match="not close"):
        check(lambda t, i, m: attend(torch.cat([t, i], 1), mask=m), [randn(1, 8, WIDTH), randn(1, 24, WIDTH), mask], 2)


def test_text_counted_twice_would_be_seen(monkeypatch):
    whole = rewriting.whole
    monkeypatch.setattr(rewriting, "whole", lambda part, *more, **how: torch.cat([whole(part, *more, **how)] * 2, 1))
    with pytest.raises((AssertionError, RuntimeError)):
        check(lambda x: attend(x), [randn(2, 20, WIDTH)], 3)
