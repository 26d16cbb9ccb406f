"""A softmax that looks like that of an attention and was not taken for one: what is missing, and where."""

import re

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, qkv, relative

import attnrewrite

SCALE = 0.3
TRIANGLE = torch.ones(9, 9, dtype=torch.bool).tril()


class Attention(torch.nn.Module):
    """Spelled out, with something between the products: `between(scores)`, or instead of them."""

    def __init__(self, between=None, whole=None):
        super().__init__()
        self.between, self.whole = between, whole

    def forward(self, query, key, value):
        if self.whole is not None:
            return self.whole(query, key, value)
        return self.between(query @ key.mT * SCALE).softmax(-1) @ value


class Model(torch.nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        self.blocks = torch.nn.ModuleList(attentions)

    def forward(self, query, key, value):
        return [block(query, key, value) for block in self.blocks]


def explained(*attentions):
    tensors = qkv(q_len=9, kv_len=9)
    with torch.no_grad():
        return attnrewrite.explain(Model(*attentions), *tensors, backend="_native_math")


def written(scores):
    scores = scores.clone()
    scores[:, :, 1:, 1:] += 1.0
    return scores


def talking_heads(query, key, value):
    """The heads of the weights are mixed before the values are read."""
    weights = (query @ key.mT * SCALE).softmax(-1)
    mixed = torch.einsum("bhij,hg->bgij", weights, torch.ones(4, 4))
    return mixed @ value


def one_key(query, key, value):
    """A sequence of one: each query's weight is 1."""
    return (query @ key[:, :, :1].mT * SCALE).softmax(-1) @ value[:, :, :1]


def twice_mixed(query, key, value):
    """vit-pytorch's CaiT."""
    scores = torch.einsum("bhij,hg->bgij", query @ key.mT * SCALE, torch.ones(4, 4))
    return torch.einsum("bhij,hg->bgij", scores.softmax(-1), torch.ones(4, 4)) @ value


def mixed_before(query, key, value):
    return torch.einsum("bhij,hg->bgij", query @ key.mT, torch.ones(4, 4)).softmax(-1) @ value


def mixed_by_linear(query, key, value):
    """timm's CaiT."""
    scores = F.linear((query @ key.mT).permute(0, 2, 3, 1), torch.ones(4, 4)).permute(0, 3, 1, 2)
    weights = F.linear(scores.softmax(-1).permute(0, 2, 3, 1), torch.ones(4, 4)).permute(0, 3, 1, 2)
    return weights @ value


def mixed_by_convolution(query, key, value):
    return torch.conv2d((query @ key.mT).softmax(-1), torch.ones(4, 4, 1, 1)) @ value


def returned_mask(query, key, value):
    weights = (query @ key.mT * SCALE).softmax(-1)
    return torch.cumsum(weights, -1) @ value


MISSES = {
    "written into": (Attention(written), "its scores are written into by add_"),
    "sorted": (Attention(lambda scores: scores.sort(-1).values), r"its scores are computed by getitem"),
    "relu": (Attention(torch.relu), r"its scores are computed by relu"),
    "rounded": (Attention(lambda scores: torch.div(scores, 2, rounding_mode="floor")), "its scores are rounded"),
    "fill of the graph": (
        Attention(lambda scores: scores.masked_fill(TRIANGLE, scores.max())),
        "the value that fills its scores is not known to be a number",
    ),
    "two tensors": (
        Attention(lambda scores: torch.where(TRIANGLE, scores, scores.mT)),
        r"its scores are selected from two tensors \(where\)",
    ),
    "one key": (Attention(whole=one_key), "it has a single key"),
    "heads are mixed": (Attention(whole=talking_heads), "its heads are mixed by einsum"),
    "heads are mixed twice": (Attention(whole=twice_mixed), "its heads are mixed by einsum"),
    "heads are mixed before": (Attention(whole=mixed_before), "its heads are mixed by einsum"),
    "heads are mixed by a layer": (Attention(whole=mixed_by_linear), r"its scores are mixed by a learned layer \(linear\)"),
    "heads are mixed by a layer behind": (
        Attention(whole=mixed_by_convolution), r"its weights are mixed by a learned layer \(conv2d\)"
    ),
    "weights are computed on": (Attention(whole=returned_mask), "its weights are read by cumsum"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_what_is_missing(name):
    attention, reason = MISSES[name]
    report = explained(attention)
    assert report.sites == []
    (near,) = report.near_misses
    assert near.site == "blocks.0"
    assert re.search(reason, near.reason), near.reason
    assert f"not recognised as attention: softmax at blocks.0: {near.reason}" in " ".join(str(report).split())


def gate(query, key, value):
    return F.softmax(query.mean(-1, keepdim=True), 1) * value[..., :9, :]


def router(query, key, value):
    """Experts, chosen by a linear layer."""
    weights = F.linear(query, torch.ones(5, query.shape[-1])).softmax(-1)
    return weights.topk(2, -1).values.sum() * value


def classifier(query, key, value):
    return (query.flatten(2) @ torch.ones(query.shape[2] * query.shape[3], 7)).softmax(-1)


@pytest.mark.parametrize("function", [gate, router, classifier])
def test_a_softmax_of_something_else_is_not_listed(function):
    assert explained(Attention(whole=function)).near_misses == []


def test_one_line_for_many_layers_and_nothing_is_lost_in_json():
    report = explained(*(Attention(torch.relu) for _ in range(4)), Attention(lambda scores: scores))
    assert [site.name for site in report.sites] == ["blocks.4"]
    assert "softmax at blocks.0-3 (4): its scores are computed by relu" in " ".join(str(report).split())
    again = attnrewrite.Report.from_json(report.to_json())
    assert again.near_misses == report.near_misses
    assert str(again) == str(report)


def test_check_lists_them_too():
    tensors = qkv(q_len=9, kv_len=9)
    with torch.no_grad():
        found = attnrewrite.check(
            Model(Attention(torch.relu), Attention(lambda scores: scores)), *tensors, backend="native"
        )
    assert found.ok
    assert "softmax at blocks.0: its scores are computed by relu" in " ".join(str(found).split())
    assert '"reason": "its scores are computed by relu"' in found.to_json()


def test_a_compiled_models_report_lists_them():
    backend = attnrewrite.with_backend("native", inner="eager")
    torch.compile(Model(Attention(torch.relu)), backend=backend)(*qkv(q_len=9, kv_len=9))
    assert [str(each) for each in backend.report.near_misses] == [
        "softmax at blocks.0: its scores are computed by relu"
    ]


def test_exported_programs_list_them():
    program = torch.export.export(Model(Attention(torch.relu)), tuple(qkv(q_len=9, kv_len=9)))
    report = attnrewrite.report_of(attnrewrite.rewrite(program, "native"))
    assert [each.reason for each in report.near_misses] == ["its scores are computed by relu"]


def broken_before_the_softmax(query, key, value):
    scores = query @ key.mT * SCALE
    torch._dynamo.graph_break()
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ value


def broken_before_the_mask(query, key, value):
    """Another axis order, and a bias with the shape of the scores that comes in too."""
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    bias = scores.tanh()
    torch._dynamo.graph_break()
    weights = F.softmax((scores * SCALE + bias).masked_fill(~TRIANGLE, -1e9), dim=3)
    return torch.einsum("bhij,bhjd->bihd", F.dropout(weights, 0.0), value)


def broken_behind_the_softmax(query, key, value):
    weights = F.dropout((query @ key.mT * SCALE).softmax(-1), 0.0)
    torch._dynamo.graph_break()
    return weights @ value


OTHER_GRAPH = (
    "its scores come from outside the graph, as behind a graph break: the product of its queries and keys is not in it"
)
NO_VALUES = "its weights leave the graph, as in front of a graph break: the product with its values is not in it"
BROKEN = {
    broken_before_the_softmax: OTHER_GRAPH,
    broken_before_the_mask: OTHER_GRAPH,
    broken_behind_the_softmax: NO_VALUES,
}


@pytest.mark.parametrize("whole", BROKEN)
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_graph_break_within_an_attention_is_named(whole, dynamic):
    backend = attnrewrite.with_backend("native", inner="eager")
    tensors = qkv(q_len=9, kv_len=9)
    found = torch.compile(Attention(whole=whole), backend=backend, dynamic=dynamic)(*tensors)
    assert backend.report.sites == []
    assert [each.reason for each in backend.report.near_misses] == [BROKEN[whole]]
    exact = whole(*(each.double() for each in tensors))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def of_experts(scores, outputs):
    """A router: each token's own experts."""
    return torch.einsum("bhte,bhted->bhtd", scores.softmax(-1), outputs)


def of_experts_by_matmul(scores, outputs):
    return (scores.softmax(-1)[..., None, :] @ outputs).squeeze(-2)


def of_each_channel(scores, outputs):
    return (scores.softmax(-1)[..., None] * outputs).sum(-2)


def weighted(scores, values):
    return scores.softmax(-1) @ values


def over_the_queries(scores, values):
    """Slot attention takes the softmax over its slots."""
    return scores.softmax(-2) @ values


def over_another_dimension(scores, values):
    return torch.einsum("bhitj,bhtd->bhijd", scores.softmax(-1), values)


def of_a_layer(scores, values):
    """The weights are computed from the tokens, as in a dense Synthesizer: no key has a part in them."""
    return F.linear(scores, torch.ones(7, 7)).softmax(-1) @ values


def of_a_layer_and_a_bias(scores, values):
    return (scores + F.linear(scores, torch.ones(7, 7))).softmax(-1) @ values


def linear_attention(scores, values):
    """The keys of linear attention, with a softmax over the tokens."""
    context = scores.softmax(-1) @ values
    return (context * SCALE).mT @ scores


def linear_attention_of_queries(scores, values):
    return scores.softmax(-1) @ (values @ values.mT)


def logits(scores, values):
    return scores.softmax(-1), values


def logits_of_a_layer(scores, values):
    return F.linear(scores, torch.ones(7, 7)).softmax(-1)


def returned(scores, values):
    return (scores @ values).softmax(-1)


SCORES, VALUES, EXPERTS = (2, 3, 5, 7), (2, 3, 7, 4), (2, 3, 5, 7, 4)
LOOK_ALIKES = {
    "experts of each token": (of_experts, SCORES, EXPERTS),
    "experts of each token, by matmul": (of_experts_by_matmul, SCORES, EXPERTS),
    "soft experts: slots for keys, tokens for queries": (weighted, (2, 5, 7), (2, 7, 4)),
    "the mean of a table under logits": (weighted, SCORES, (7, 4)),
    "a pooling": (weighted, (2, 3, 1, 7), VALUES),
    "a weight for each channel": (of_each_channel, SCORES, EXPERTS),
    "slots": (over_the_queries, SCORES, VALUES),
    "a sum over another dimension": (over_another_dimension, EXPERTS, VALUES),
    "a layer of scores": (of_a_layer, SCORES, VALUES),
    "a layer and a bias": (of_a_layer_and_a_bias, SCORES, VALUES),
    "keys of linear attention": (linear_attention, SCORES, VALUES),
    "queries of linear attention": (linear_attention_of_queries, SCORES, VALUES),
    "logits": (logits, SCORES, VALUES),
    "logits of a layer": (logits_of_a_layer, SCORES, VALUES),
    "matches of two sets, without heads": (returned, (2, 5, 4), (2, 4, 7)),
    "distances to a table": (returned, SCORES, (7, 6)),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_softmax_of_an_input_that_is_no_attention_is_not_listed(name):
    function, *shapes = LOOK_ALIKES[name]
    report = attnrewrite.explain(function, *map(torch.randn, shapes), backend="native")
    assert (report.sites, report.near_misses) == ([], [])


def test_the_same_softmax_with_queries_heads_and_values_is_listed():
    """What the look-alikes lack."""
    inputs = torch.randn(SCORES), torch.randn(VALUES)
    report = attnrewrite.explain(weighted, *inputs, backend="native")
    assert [each.reason for each in report.near_misses] == [OTHER_GRAPH]


class Synthesizer(torch.nn.Module):
    """A learned matrix of scores."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.randn(1, 3, 5, 7))

    def forward(self, value):
        return self.scores.softmax(-1) @ value


def test_a_learned_matrix_of_scores_is_not_listed():
    model, value = Synthesizer(), torch.randn(1, 3, 7, 4)
    assert attnrewrite.explain(model, value, backend="native").near_misses == []


class Map(torch.nn.Module):
    def forward(self, query, key):
        return (query @ key.mT * SCALE).softmax(-1)


@pytest.mark.parametrize(("model", "shapes"), [(Synthesizer(), [(1, 3, 7, 4)]), (Map(), [(2, 3, 5, 4), (2, 3, 7, 4)])])
def test_an_exported_program_has_no_graph_breaks(model, shapes):
    program = torch.export.export(model, tuple(torch.randn(shape) for shape in shapes))
    assert attnrewrite.report_of(attnrewrite.rewrite(program, "native")).near_misses == []


def weights_of(query, key):
    return (query @ key.mT * SCALE).softmax(-1)


def kept_copy(query, key, value):
    """As for a caller that looks at the weights, which is not there."""
    weights = weights_of(query, key)
    kept = torch.empty_like(weights)
    kept.copy_(weights)
    return weights @ value


def kept_in_turn(query, key, value):
    weights = weights_of(query, key)
    kept, again = torch.zeros(2, *weights.shape), torch.zeros(2, *weights.shape)
    kept[1] = weights
    again.copy_(kept)
    torch.mul(weights, 2.0, out=again[0])
    return weights @ value


def kept_and_read(query, key, value):
    weights = weights_of(query, key)
    kept, again = torch.zeros(2, *weights.shape), torch.zeros(2, *weights.shape)
    kept[1] = weights
    again.copy_(kept)
    return weights @ value + again[1].sum()


def read_through_a_view(query, key, value):
    weights = weights_of(query, key)
    kept = torch.zeros(2, *weights.shape)
    shown = kept[1].detach()
    kept[1].copy_(weights)
    return weights @ value + shown.sum()


def kept_in_an_input(query, key, value):
    weights = weights_of(query, key)
    query[..., :9].copy_(weights)
    return weights @ value


def kept_at_random(query, key, value):
    """The random numbers behind it would be others."""
    weights = weights_of(query, key)
    torch.empty_like(weights).copy_(weights).uniform_()
    return weights @ value


@pytest.mark.parametrize(
    ("function", "swapped"),
    [(kept_copy, True), (kept_in_turn, True), (kept_and_read, False), (read_through_a_view, False), (kept_in_an_input, False),
     (kept_at_random, False)],
)  # fmt: skip
def test_a_copy_of_the_weights_that_nobody_reads(function, swapped):
    tensors = qkv(q_len=9, kv_len=9)
    wanted = [each.double() for each in tensors]
    run, backend = compiled(function, "_native_math")
    assert relative(run(*tensors), function(*wanted)) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen is not None) == swapped
    assert swapped or "its attention weights are used elsewhere" in site.refusals[0][1].detail
    assert all(relative(one, other) < 1e-6 for one, other in zip(tensors, wanted, strict=True))
