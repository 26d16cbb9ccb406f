"""A softmax that looks like that of an attention and was not taken for one: what is missing, and where."""

import re

import pytest
import torch
import torch.nn.functional as F
from parity import qkv

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
