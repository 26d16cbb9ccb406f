"""A softmax that a model computes by hand: each form beside the unchanged function in float64, forward and backward, and beside
its look-alikes."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import compiled, doubled, qkv, relative

import attnrewrite
from attnrewrite import MaskKind
from attnrewrite.pipeline import rewrite_graph

BATCH, HEADS, Q_LEN, KV_LEN, SCALE = 2, 4, 7, 11, 0.3
VISIBLE = torch.rand(BATCH, 1, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(3)) > 0.4
VISIBLE[..., 2] = True
BIAS = torch.linspace(-2, 1, Q_LEN * KV_LEN, dtype=torch.float64).view(Q_LEN, KV_LEN)


def scores_of(query, key):
    return query @ key.mT * SCALE


def stable(query, key):
    scores = scores_of(query, key)
    return torch.exp(scores - scores.amax(-1, keepdim=True))


def ratio(query, key, value):
    weights = stable(query, key)
    return (weights / weights.sum(-1, keepdim=True)) @ value


def written_twice(query, key, value):
    scores = scores_of(query, key)
    return (torch.exp(scores) / torch.exp(scores).sum(dim=-1, keepdim=True)) @ value


def all_twice(query, key, value):
    return (stable(query, key) / stable(query, key).sum(-1)[..., None]) @ value


def in_place(query, key, value):
    scores = scores_of(query, key)
    scores -= scores.max(-1, keepdim=True).values
    scores.exp_()
    scores = scores / scores.sum(-1).unsqueeze(-1)
    return scores @ value


def in_place_division(query, key, value):
    weights = stable(query, key)
    weights /= weights.sum(-1, keepdim=True)
    return weights @ value


def reciprocal(query, key, value):
    weights = stable(query, key)
    return (weights * weights.sum(-1, True).reciprocal()) @ value


def one_over(query, key, value):
    weights = stable(query, key)
    return (1 / weights.sum(-1, True) * weights) @ value


def power(query, key, value):
    weights = stable(query, key)
    return weights * weights.sum(-1, True) ** -1 @ value


def spread(query, key, value):
    weights = stable(query, key)
    return torch.div(weights, weights.sum((-1,), keepdim=True).expand_as(weights)) @ value


def keys_first(query, key, value):
    scores = key @ query.mT * SCALE
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return (weights / weights.sum(-2, keepdim=True)).mT @ value


def logarithm(query, key, value):
    scores = scores_of(query, key)
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ value


def logarithm_unsqueezed(query, key, value):
    scores = scores_of(query, key)
    return (scores - scores.logsumexp(dim=-1).unsqueeze(-1)).exp() @ value


def log_softmax(query, key, value):
    return F.log_softmax(scores_of(query, key), dim=-1).exp() @ value


def special(query, key, value):
    return torch.special.log_softmax(scores_of(query, key), -1).exp() @ value


def special_softmax(query, key, value):
    return torch.special.softmax(scores_of(query, key), dim=-1) @ value


def softmin(query, key, value):
    return F.softmin(query @ key.mT * -SCALE, dim=-1) @ value


def powers_of_2(query, key, value):
    scores = (scores_of(query, key) * math.log2(math.e)).masked_fill(~VISIBLE, -torch.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ value


def behind(query, key, value):
    weights = stable(query, key)
    return weights @ value / weights.sum(-1, keepdim=True)


def behind_turned(query, key, value):
    weights = torch.exp(torch.einsum("bhqd,bhkd->bhqk", query, key) * SCALE)
    output = torch.einsum("bhqk,bhkd->bqhd", weights, value)
    return (output / weights.sum(-1).transpose(1, 2)[..., None]).transpose(1, 2)


def behind_folded(query, key, value):
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    weights = torch.exp(torch.bmm(query, key.mT) * SCALE)
    output = torch.bmm(weights, value).unflatten(0, (BATCH, HEADS))
    return output / weights.sum(-1, keepdim=True).view(BATCH, HEADS, -1, 1)


def filled(query, key, value):
    scores = scores_of(query, key).masked_fill(~VISIBLE, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ value


def emptied(query, key, value):
    weights = stable(query, key).masked_fill(~VISIBLE, 0)
    return (weights / weights.sum(-1, keepdim=True)) @ value


def emptied_by_where(query, key, value):
    weights = torch.where(VISIBLE, stable(query, key), 0.0)
    return weights @ value / weights.sum(-1, keepdim=True)


def emptied_by_a_factor(query, key, value):
    weights = stable(query, key) * VISIBLE.to(query)
    return (weights / weights.sum(-1, keepdim=True)) @ value


def biased(query, key, value):
    scores = scores_of(query, key) + BIAS.to(query)
    return torch.exp(scores - scores.amax(-1, keepdim=True).detach()) @ value / written_sum(scores)


def written_sum(scores):
    return torch.exp(scores - scores.amax(-1, keepdim=True).detach()).sum(-1, keepdim=True)


FORMS = {
    ratio: MaskKind.NONE,
    written_twice: MaskKind.NONE,
    all_twice: MaskKind.NONE,
    in_place: MaskKind.NONE,
    in_place_division: MaskKind.NONE,
    reciprocal: MaskKind.NONE,
    one_over: MaskKind.NONE,
    power: MaskKind.NONE,
    spread: MaskKind.NONE,
    keys_first: MaskKind.NONE,
    logarithm: MaskKind.NONE,
    logarithm_unsqueezed: MaskKind.NONE,
    log_softmax: MaskKind.NONE,
    special: MaskKind.NONE,
    special_softmax: MaskKind.NONE,
    softmin: MaskKind.NONE,
    powers_of_2: MaskKind.BOOLEAN,
    behind: MaskKind.NONE,
    behind_turned: MaskKind.NONE,
    behind_folded: MaskKind.NONE,
    filled: MaskKind.BOOLEAN,
    emptied: MaskKind.BOOLEAN,
    emptied_by_where: MaskKind.BOOLEAN,
    emptied_by_a_factor: MaskKind.BOOLEAN,
    biased: MaskKind.ADDITIVE,
}


def tensors(needs_grad):
    return [each.requires_grad_(needs_grad) for each in qkv(value_dim=24)]


def outputs(functions):
    return lambda *given: [function(*given) for function in functions]


@pytest.mark.parametrize(
    ("inner", "dynamic", "needs_grad"), [("eager", False, True), ("eager", True, False), ("aot_eager", False, True)]
)
def test_every_form(inner, dynamic, needs_grad):
    given = tensors(needs_grad)
    wanted = [doubled(each.detach()).requires_grad_(needs_grad) for each in given]
    # Autograd itself refuses a result of exp that was written into.
    forms = [function for function in FORMS if not (needs_grad and function is in_place_division)]
    run, backend = compiled(outputs(forms), "_native_math", inner=inner, dynamic=dynamic)
    found, expected = run(*given), outputs(forms)(*wanted)
    sites, kinds = backend.report.sites, [FORMS[function] for function in forms]
    assert [site.chosen for site in sites] == ["_native_math"] * len(kinds), str(backend.report)
    assert [site.call.mask.kind for site in sites] == kinds
    assert all(site.call.scale == pytest.approx(SCALE) for site in sites)
    for function, one, other in zip(forms, found, expected, strict=True):
        assert relative(one, other) < 1e-5, function
        if needs_grad:
            grads = (
                torch.autograd.grad(each.square().sum(), of, retain_graph=True)
                for each, of in ((one, given), (other, wanted))
            )
            assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 1e-5, function


def test_nothing_of_the_softmax_is_left():
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    run, _ = compiled(outputs(FORMS), attnrewrite.with_backend("_native_math", inner=inner))
    run(*tensors(False))
    words = {str(getattr(node.target, "__name__", node.target)) for node in graphs[0].graph.nodes}
    gone = {
        "softmin",
        "special_softmax",
        "exp2",
        "exp",
        "exp_",
        "sum",
        "amax",
        "max",
        "logsumexp",
        "log_softmax",
        "matmul",
        "truediv",
        "div",
        "itruediv",
        "isub",
    }
    assert not words & gone


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_exported_forms():
    class Attend(torch.nn.Module):
        def forward(self, *given):
            return outputs(FORMS)(*given)

    given = tuple(tensors(False))
    expected = Attend()(*map(doubled, given))
    with torch.no_grad():
        program = torch.export.export(Attend(), given)
        for lowered in ("exported", "core"):
            graph_module = (program if lowered == "exported" else program.run_decompositions()).module()
            outcome = rewrite_graph(graph_module, attnrewrite.with_backend("_native_math").policy)
            # A logsumexp is written out in core.
            left = [WRITTEN_OUT] * 2 * (lowered == "core")
            assert [each.reason for each in outcome.near_misses] == left, lowered
            assert [site.chosen for site in outcome.plan.sites] == ["_native_math"] * (len(FORMS) - len(left)), lowered
            for function, one, other in zip(FORMS, graph_module(*given), expected, strict=True):
                assert relative(one, other) < 1e-5, (lowered, function)


def test_the_sum_in_float32():
    def half(query, key, value):
        weights = torch.exp((query @ key.mT * SCALE).float())
        weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(value.dtype) @ value

    given = qkv(value_dim=24, dtype=torch.bfloat16)
    run, backend = compiled(half, "_native_math")
    output = run(*given)
    assert [site.chosen for site in backend.report.sites] == ["_native_math"]
    assert relative(output, half(*map(doubled, given))) < 1.2e-2


# Look-alikes: each with the reason that the report gives; None: nothing that looks like an attention.
def over_queries(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return (weights / weights.sum(-2, keepdim=True)) @ value


def with_epsilon(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ value


def clamped_behind(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=20.0)


def added_in_place(query, key, value):
    weights = torch.exp(scores_of(query, key))
    total = weights.sum(-1, keepdim=True)
    total.add_(1e-3)
    return (weights / total) @ value


def square_logarithm(query, key, value):
    scores = scores_of(query, key[:, :, :Q_LEN])
    return torch.exp(scores - torch.logsumexp(scores, -1)[:, :, None]) @ value[:, :, :Q_LEN]


def logarithm_of_other_values(query, key, value):
    scores = scores_of(query, key)
    total = scores.logsumexp(-1, keepdim=True)
    scores += 0.5
    return (scores - total).exp() @ value


def logarithm_written_out(query, key, value):
    scores = scores_of(query, key)
    level = scores.amax(-1, keepdim=True)
    total = torch.exp(scores - level).sum(-1, keepdim=True)
    return torch.exp(scores - level - total.log()) @ value


def normalized(query, key, value):
    return F.normalize(torch.exp(scores_of(query, key)), p=1, dim=-1) @ value


def other_sum(query, key, value):
    scores = scores_of(query, key)
    return (torch.exp(scores) / torch.exp(scores * 0.5).sum(-1, keepdim=True)) @ value


def other_maximum(query, key, value):
    scores = scores_of(query, key)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / torch.exp(scores).sum(-1, keepdim=True)) @ value


def other_logarithm(query, key, value):
    scores = scores_of(query, key)
    return torch.exp(scores - torch.logsumexp(scores * 0.5, -1, keepdim=True)) @ value


def logarithm_over_queries(query, key, value):
    scores = scores_of(query, key)
    return torch.exp(scores - torch.logsumexp(scores, -2, keepdim=True)) @ value


def without_gradient(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return (weights / weights.sum(-1, keepdim=True).detach()) @ value


def sum_without_grad(query, key, value):
    weights = torch.exp(scores_of(query, key))
    with torch.no_grad():
        total = weights.sum(-1, keepdim=True)
    return (weights / total) @ value


def logarithm_without_gradient(query, key, value):
    scores = scores_of(query, key)
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True).detach()) @ value


def changed_in_between(query, key, value):
    weights = torch.exp(scores_of(query, key))
    total = weights.sum(-1, keepdim=True)
    weights = weights * 1.5
    return (weights / total) @ value


def written_in_between(query, key, value):
    weights = torch.exp(scores_of(query, key))
    total = weights.sum(-1, keepdim=True)
    weights[:, :, 1:] *= 1.5
    return (weights / total) @ value


def returned(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return (weights / weights.sum(-1, keepdim=True)) @ value + weights.mean()


def sum_returned(query, key, value):
    weights = torch.exp(scores_of(query, key))
    total = weights.sum(-1, keepdim=True)
    return (weights / total) @ value + total


def product_read_twice(query, key, value):
    weights = torch.exp(scores_of(query, key))
    output = weights @ value
    return output / weights.sum(-1, keepdim=True) + output.mean()


def divided_too_often(query, key, value):
    weights = torch.exp(scores_of(query, key))
    return weights @ value / weights.sum((-1, -2), keepdim=True)


def square(query, key, value):
    """The sum of a query divides the weights of a key: both are as many."""
    weights = torch.exp(scores_of(query, key[:, :, :Q_LEN]))
    return (weights / weights.sum(-1).unsqueeze(-2)) @ value[:, :, :Q_LEN]


def of_features(query, key, value):
    """Linear attention."""
    query, key = query.exp(), key.exp()
    return query / query.sum(-1, keepdim=True) @ (key / key.sum(-2, keepdim=True)).mT @ value


def of_relu(query, key, value):
    weights = scores_of(query, key).relu()
    return weights / weights.sum(-1, keepdim=True) @ value


WRITTEN_OUT = "the logarithm that is taken from its scores is not known to be their logsumexp"
CHANGED = "the sum of its exponentials is changed by"
ANOTHER = "the sum of its exponentials divides something else"
ROWS = "the sum of its exponentials does not divide the rows that it belongs to"
GRADIENT = "the sum of its exponentials has no gradient"
# Numbers that a stable softmax takes from its scores: as good as the maximum, which the softmax loses.
LEVELS = {
    "topk": lambda s: s.topk(1, -1).values,
    "topk of three": lambda s: s.topk(3, dim=-1)[0][..., 1:2],
    "sort": lambda s: s.sort(-1).values[..., -1:],
    "sort, the first": lambda s: torch.sort(s, dim=-1, descending=True)[0][..., 0].unsqueeze(-1),
    "cummax": lambda s: s.cummax(-1)[0][..., -1:].detach(),
    "kthvalue": lambda s: s.kthvalue(KV_LEN, -1, keepdim=True).values,
}


def test_other_ways_to_the_maximum():
    def each(query, key, value):
        return [attend_by(level, query, key, value) for level in LEVELS.values()]

    def attend_by(level, query, key, value):
        masked, plain = scores_of(query, key).masked_fill(~VISIBLE, -1e9), scores_of(query, key)
        weights = torch.exp(masked - level(masked))
        return weights / weights.sum(-1, keepdim=True) @ value, (plain - level(plain)).softmax(-1) @ value

    given = tensors(True)
    wanted = [doubled(each.detach()).requires_grad_() for each in given]
    run, backend = compiled(each, "_native_math")
    found, expected = run(*given), each(*wanted)
    assert [site.call.mask.kind for site in backend.report.sites] == [MaskKind.BOOLEAN, MaskKind.NONE] * len(LEVELS)
    assert {site.chosen for site in backend.report.sites} == {"_native_math"}
    for name, one, other in zip(LEVELS, found, expected, strict=True):
        for output, reference in zip(one, other, strict=True):
            assert relative(output, reference) < 1e-5, name
            grads = (
                torch.autograd.grad(made.square().sum(), of, retain_graph=True)
                for made, of in ((output, given), (reference, wanted))
            )
            assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 1e-5, name


LOOK_ALIKES = {
    over_queries: "its softmax runs over dimension 2 of the scores",
    with_epsilon: f"{CHANGED} add",
    clamped_behind: f"{CHANGED} clamp",
    other_sum: ANOTHER,
    other_maximum: ANOTHER,
    logarithm_written_out: WRITTEN_OUT,
    normalized: "its exponentials are divided by a norm",
    added_in_place: "its scores or weights are written into by add_",
    square_logarithm: "its logsumexp is not that of the rows that it is taken from",
    logarithm_of_other_values: "its logsumexp is that of something else",
    other_logarithm: "its logsumexp is that of something else",
    logarithm_over_queries: "its softmax runs over dimension 2 of the scores",
    without_gradient: f"{CHANGED} detach",
    sum_without_grad: GRADIENT,
    logarithm_without_gradient: "its logsumexp is changed by detach",
    changed_in_between: ANOTHER,
    written_in_between: ANOTHER,
    returned: "its attention weights are used elsewhere",
    sum_returned: "its attention weights are used elsewhere",
    product_read_twice: "the product with its values is read before",
    divided_too_often: "sum",
    square: ROWS,
    of_features: None,
    of_relu: None,
}


@pytest.mark.parametrize("function", LOOK_ALIKES, ids=lambda function: function.__name__)
def test_look_alikes_stay(function):
    given = tensors(True)
    run, backend = compiled(function, "_native_math")
    assert torch.equal(run(*given), function(*given))
    reasons = [decision.detail for site in backend.report.sites for _, decision in site.refusals[:1]]
    reasons += [near.reason for near in backend.report.near_misses]
    assert not any(site.chosen for site in backend.report.sites)
    wanted = LOOK_ALIKES[function]
    assert len(reasons) == (wanted is not None), reasons
    assert wanted is None or wanted in reasons[0], reasons
