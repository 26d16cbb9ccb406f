"""What stands between q k^T and the softmax besides numbers and masks: learned temperatures, numbers that the softmax loses,
heads of several dimensions. Each beside the unchanged function in float64, forward and backward, and beside its look-alikes."""

import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, compiled, doubled, qkv, relative, skip_if_fenced

import attnrewrite
from attnrewrite import MaskKind
from attnrewrite.kernels.machines import satisfies
from attnrewrite.pipeline import rewrite_graph

# query (2, 4, 7, 16), key (2, 4, 11, 16), value (2, 4, 11, 24)
BATCH, HEADS, Q_LEN, KV_LEN = 2, 4, 7, 11


def swapped(function, tensors, kernel="_native_math", inner="eager", dynamic=False, error=1e-5):
    """The one site of a function, which is swapped and right, as are the gradients of all tensors that need one."""
    given = [each.detach().clone().requires_grad_(each.requires_grad) for each in tensors]
    wanted = [doubled(each.detach()).requires_grad_(each.requires_grad) for each in tensors]
    run, backend = compiled(function, kernel, inner=inner, dynamic=dynamic)
    output, expected = run(*given), function(*wanted)
    (site,) = backend.report.sites
    skip_if_fenced(site)
    assert site.chosen == kernel, site
    assert relative(output, expected) < error
    if output.requires_grad:
        output.square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(given, wanted, strict=True):
            zero = other.grad is not None and other.grad.norm() < 1e-9
            if other.grad is not None:
                assert one.grad.norm() < 1e-4 if zero else relative(one.grad, other.grad) < error
    return site


def refused(function, *tensors):
    """The reason for which the one site of a function stays, or is none; its result is that of the function."""
    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    run, backend = compiled(function, attnrewrite.with_backend("_native_math", "native", inner=inner))
    assert torch.equal(run(*tensors), function(*tensors))
    assert "softmax" in str(graphs[-1].graph)
    reasons = [decision.detail for site in backend.report.sites for _, decision in site.refusals[:1]]
    (reason,) = [*reasons, *(near.reason for near in backend.report.near_misses)]
    return reason


# Factors: by head, batch, query, key, or one number; and how they meet the scores.
FACTORS = {
    "a head": ((HEADS, 1, 1), lambda s, t: s * t),
    "a head, other way round": ((HEADS, 1, 1), lambda s, t: t * s),
    "a head, over": ((HEADS, 1, 1), lambda s, t: s / t),
    "a head, in place": ((HEADS, 1, 1), lambda s, t: s.mul_(t)),
    "a head, spread": ((HEADS,), lambda s, t: s * t[None, :, None, None].expand(BATCH, -1, Q_LEN, KV_LEN)),
    "a batch": ((BATCH, 1, 1, 1), lambda s, t: s * t),
    "a batch and head": ((BATCH, HEADS, 1, 1), lambda s, t: s * t),
    "one": ((1,), lambda s, t: s * t),
    "no dimension": ((), lambda s, t: s * t),
    "a query": ((HEADS, Q_LEN, 1), lambda s, t: s * t),
    "a key": ((KV_LEN,), lambda s, t: s * t),
    "a key of a batch": ((BATCH, 1, 1, KV_LEN), lambda s, t: s / t),
    "two": ((HEADS, 1, 1), lambda s, t: s * t * t.mT.exp()),
    "a query and a key": ((KV_LEN,), lambda s, t: s * t * t[:Q_LEN, None]),
    "a number between": ((HEADS, 1, 1), lambda s, t: s * 0.5 * t * 3),
    "a bias behind": ((HEADS, 1, 1), lambda s, t: s * t + torch.linspace(-1, 1, Q_LEN * KV_LEN).view(Q_LEN, KV_LEN).to(s)),
    "a fill behind": (
        (HEADS, 1, 1), lambda s, t: (s * t).masked_fill(torch.ones(Q_LEN, KV_LEN).triu(6).bool(), -1e9)
    ),
}  # fmt: skip


def temperature(how):
    shape, times = FACTORS[how]

    def step(q, k, v, t):
        return times(q @ k.mT * 0.3, t.clamp(max=4.6).exp()).softmax(-1) @ v

    return step, torch.randn(shape)


@pytest.mark.parametrize("how", FACTORS)
def test_learned_temperatures(how):
    """Swin V2, XCiT, LSA. The factor goes into the query or the key, and gets its gradient there."""
    step, factor = temperature(how)
    tensors = [each.requires_grad_() for each in (*qkv(value_dim=24), factor)]
    site = swapped(step, tensors, inner="aot_eager" if how == "a head" else "eager")
    behind = {"a bias behind": MaskKind.ADDITIVE, "a fill behind": MaskKind.BOOLEAN}
    assert (site.call.mask.kind, site.call.scale) == (
        behind.get(how, MaskKind.NONE),
        0.3 if how != "a number between" else pytest.approx(0.45),
    )


@pytest.mark.parametrize("kernel", ["native", "flex", "_native_flash"])
@pytest.mark.parametrize("how", ["a head", "a key"])
def test_temperatures_with_kernels(how, kernel):
    step, factor = temperature(how)
    with torch.no_grad():
        swapped(step, [*qkv(), factor], kernel)


@pytest.mark.parametrize("lead", [(), (3,), (3, 5)])
def test_temperatures_of_other_ranks(lead):
    """Without heads, or with heads folded into the batch."""

    def step(q, k, v, t):
        return (q @ k.mT * t).softmax(-1) @ v

    tensors = [torch.randn(*lead, length, 16) for length in (Q_LEN, KV_LEN, KV_LEN)]
    with torch.no_grad():
        swapped(step, [*tensors, torch.randn(*lead[-1:], 1, 1).exp()])


def test_temperatures_of_folded_and_grouped_heads():
    def folded(q, k, v, t):
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        scores = torch.bmm(q, k.mT).view(BATCH, HEADS, Q_LEN, KV_LEN) * t
        return torch.bmm(scores.view(-1, Q_LEN, KV_LEN).softmax(-1), v)

    def grouped(q, k, v, t):
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        return (q @ k.mT * t).softmax(-1) @ v

    with torch.no_grad():
        factor = torch.randn(HEADS, 1, 1).exp()
        swapped(folded, [*qkv(), factor])
        assert swapped(grouped, [*qkv(kv_heads=2), factor]).call.kv_heads == 2
        # A number for each key and query head is none for a key head.
        of_keys = torch.randn(HEADS, 1, KV_LEN)
        assert refused(grouped, *qkv(kv_heads=2), of_keys) == "its scores are multiplied by a tensor"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_temperatures_of_halves(dtype, wide):
    """As exact as eager: queries in float32 are not rounded, halves times a factor are rounded once, not the scores."""

    def step(q, k, v, t):
        if wide:
            return ((q.float() @ k.float().mT) * t).softmax(-1).to(q.dtype) @ v
        return (q @ k.mT * t).softmax(-1).to(q.dtype) @ v

    query, key, value = qkv(dtype=dtype)
    factor = torch.randn(HEADS, 1, 1).exp()
    run, backend = compiled(step, "_native_math")
    with torch.no_grad():
        output, reference = run(query, key, value, factor), step(*map(doubled, (query, key, value, factor)))
        eager = step(query, key, value, factor)
    (site,) = backend.report.sites
    assert (site.chosen, site.call.dtype) == ("_native_math", "float32" if wide else str(dtype)[6:])
    assert output.dtype == dtype
    assert relative(output, reference) < max(TOLERANCE[dtype], relative(eager, reference) * 1.1)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_temperatures_with_dynamic_sizes_and_in_exported_programs():
    step, factor = temperature("a head")
    with torch.no_grad():
        swapped(step, [*qkv(batch=3, q_len=9), factor], dynamic=True)

    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return step(*tensors)

    tensors = [*qkv(), factor]
    with torch.no_grad():
        program = torch.export.export(Attend(), tuple(tensors)).run_decompositions()
        graph_module = program.module()
        outcome = rewrite_graph(graph_module, attnrewrite.with_backend("_native_math").policy)
        assert [site.chosen for site in outcome.plan.sites] == ["_native_math"]
        assert relative(graph_module(*tensors), step(*map(doubled, tensors))) < 1e-5


LIKE_TEMPERATURES = {
    "queries and keys": (lambda s, t: s * t, (Q_LEN, KV_LEN), "its scores are multiplied by a tensor"),
    "queries and keys of one head": (lambda s, t: s / t, (BATCH, 1, Q_LEN, KV_LEN), "its scores are multiplied by a tensor"),
    "behind a bias": (lambda s, t: (s + s.new_ones(Q_LEN, KV_LEN).triu()) * t, (HEADS, 1, 1), "after they were masked"),
    "behind a fill": (
        lambda s, t: s.masked_fill(torch.ones(Q_LEN, KV_LEN).triu(6).bool(), -1e9) * t, (HEADS, 1, 1),
        "after they were masked",
    ),
    "of the scores": (lambda s, t: s * s.amax(-1, keepdim=True), (1,), "its attention scores are used elsewhere"),
    "to a power": (lambda s, t: s**2 * t, (HEADS, 1, 1), "its scores are computed by pow"),
    "rounded": (lambda s, t: torch.div(s, t, rounding_mode="floor"), (HEADS, 1, 1), "its scores are rounded"),
    "over the scores": (lambda s, t: t / s, (HEADS, 1, 1), "its scores come from outside the graph"),
}  # fmt: skip


@pytest.mark.parametrize("how", LIKE_TEMPERATURES)
def test_what_is_no_temperature(how):
    times, shape, reason = LIKE_TEMPERATURES[how]

    def step(q, k, v, t):
        return times(q @ k.mT, t).softmax(-1) @ v

    with torch.no_grad():
        assert reason in refused(step, *qkv(), torch.randn(shape).abs() + 1)


def test_a_temperature_that_is_written_into():
    """The kernel would read what was written."""

    def step(q, k, v, t):
        t = t.clone()
        scores = q @ k.mT * t
        t.zero_()
        return scores.softmax(-1) @ v + t.sum()

    with torch.no_grad():
        reason = refused(step, *qkv(), torch.randn(HEADS, 1, 1))
    assert "written into" in reason


LEVELS = {
    "amax": lambda s: s - s.amax(dim=-1, keepdim=True),
    "amax, detached": lambda s: s - s.amax(dim=-1, keepdim=True).detach(),
    "max": lambda s: s - s.max(-1, keepdim=True)[0],
    "max by name": lambda s: s - torch.max(s, dim=-1, keepdim=True).values,
    "max, unsqueezed": lambda s: s.sub_(s.max(dim=-1)[0].unsqueeze(-1)),
    "max, spread": lambda s: s - s.detach().amax(-1, keepdim=True).expand_as(s),
    "of all": lambda s: s - s.max(),
    "of all of a head": lambda s: s - s.flatten(2).amax(-1)[..., None, None],
    "mean": lambda s: s - s.mean(-1, keepdim=True),
    "logsumexp": lambda s: s - s.logsumexp(-1, keepdim=True),
    "added": lambda s: s + -s.amax(-1, keepdim=True),
    "CogView's": lambda s: (s / 32 - s.detach().abs().amax(dim=(-1, -2), keepdim=True) / 32) * 32,
    "dalle2's": lambda s: (s / 1024 - (s / 1024).amax(dim=-1, keepdim=True).detach()) * 1024,
    "of masked scores": lambda s: (
        (m := s.masked_fill(torch.ones(Q_LEN, KV_LEN).triu(6).bool(), -1e9)) - m.amax(-1, True)
    ),
    "masked behind": lambda s: (s - s.amax(-1, True)).masked_fill(torch.ones(Q_LEN, KV_LEN).triu(6).bool(), -1e9),
}


@pytest.mark.parametrize("how", LEVELS)
def test_the_stable_softmax(how):
    def step(q, k, v):
        return LEVELS[how](q @ k.mT * 0.3).softmax(-1) @ v

    graphs = []

    def inner(graph_module, example_inputs):
        graphs.append(str(graph_module.graph))
        return graph_module

    site = swapped(step, [each.requires_grad_() for each in qkv()], "native", inner=inner)
    if "masked" not in how:
        assert site.call.mask.kind is MaskKind.NONE
    assert not any(word in graphs[0] for word in ("max", "mean", "logsumexp", "softmax", "matmul"))


LIKE_LEVELS = {
    "of the queries": lambda s: s - s.amax(-2, keepdim=True),
    "of the heads": lambda s: s - s.amax(1, keepdim=True),
    "read too": lambda s: s - (m := s.amax(-1, keepdim=True)) + m.argmax(),
    "large": lambda s: s - 1e20 * s.amax(-1, keepdim=True),
    "position": lambda s: s - s.max(-1, keepdim=True)[1],
    "times": lambda s: s * s.amax(-1, keepdim=True),
    "random": lambda s: s - F.dropout(s.amax(-1, keepdim=True), 0.0),
}


@pytest.mark.parametrize("how", LIKE_LEVELS)
def test_what_the_softmax_does_not_lose(how):
    def step(q, k, v):
        return LIKE_LEVELS[how](q @ k.mT).softmax(-1) @ v

    with torch.no_grad():
        assert "its attention scores are used elsewhere" in refused(step, *qkv())


@pytest.mark.parametrize("number", [0.5, -1e4, torch.finfo(torch.float32).min])
def test_a_row_bias_from_elsewhere_stays_a_mask(number):
    """Scores vanish beside finfo.min: all keys are equal then. And a learned bias gets a gradient, of zero."""

    def step(q, k, v, bias):
        return (q @ k.mT * 0.3 + bias).softmax(-1) @ v

    query, key, value = (each.requires_grad_() for each in qkv())
    bias = torch.zeros(BATCH, 1, Q_LEN, 1)
    bias[1, :, 3:] = number
    site = swapped(step, [query, key, value, bias.requires_grad_()], error=1e-5 if number != -1e4 else 2e-3)
    assert str(site.call.mask) == "additive (2, 1, 7, 1)"


TIED = {
    "r i n h d": ("rinhd,rjnhd->hnij", "hnij,rjnhd->rinhd", (3, 7, 2, 4, 16), (3, 11, 2, 4, 16)),
    "r last": ("nhidr,nhjdr->nhij", "nhij,nhjdr->nhidr", (2, 4, 7, 16, 3), (2, 4, 11, 16, 3)),
    "only scores": ("rnhid,rnhjd->nhij", "nhij,nhjv->nhiv", (3, 2, 4, 7, 16), (3, 2, 4, 11, 16)),
}


@pytest.mark.parametrize("kernel", ["_native_math", "native"])
@pytest.mark.parametrize("how", TIED)
def test_two_summed_dimensions(how, kernel):
    """ESM's tied rows: all rows of an alignment share their weights, one attention with wider heads."""
    scores, values, of_query, of_key = TIED[how]

    def step(q, k, v):
        return torch.einsum(values, (torch.einsum(scores, q, k) * 0.1).softmax(-1), v)

    value = torch.randn(of_key) if how != "only scores" else torch.randn(2, 4, 11, 24)
    site = swapped(
        step, [each.requires_grad_() for each in (torch.randn(of_query), torch.randn(of_key), value)], kernel
    )
    call = site.call
    assert {call.batch, call.heads} == {2, 4}
    assert (call.q_len, call.kv_len, call.head_dim) == (7, 11, 48)
    assert call.value_dim == (24 if how == "only scores" else 48)


def test_keys_of_two_dimensions():
    """The keys of an image, summed over rows and columns."""

    def step(q, k, v):
        weights = torch.einsum("bhid,bhyxd->bhiyx", q, k).flatten(3).softmax(-1).unflatten(3, (3, 5))
        return torch.einsum("bhiyx,bhyxd->bhid", weights, v)

    tensors = [torch.randn(2, 4, 7, 16), torch.randn(2, 4, 3, 5, 16), torch.randn(2, 4, 3, 5, 24)]
    site = swapped(step, [each.requires_grad_() for each in tensors])
    assert (site.call.q_len, site.call.kv_len, site.call.value_dim) == (7, 15, 24)


@pytest.mark.parametrize(
    ("scores", "values", "reason"),
    [
        ("rbid,rbjd->bij", "bij,rjbd->ribd", None),
        ("rbid,rbjd->rbij", "rbij,rbjd->bid", "its values are not summed over a dimension that only its keys have"),
    ],
)
def test_what_is_summed_besides_the_keys(scores, values, reason):
    """Values that are summed over the rows too are a sum of attentions."""

    def step(q, k, v):
        return torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)

    tensors = [torch.randn(3, 2, 7, 16), torch.randn(3, 2, 11, 16)]
    value = torch.randn(3, 11, 2, 24) if reason is None else torch.randn(3, 2, 11, 24)
    if reason is None:
        swapped(step, [*tensors, value])
    else:
        assert refused(step, *tensors, value) == reason


def of_windows(q, k, v, bias):
    """timm's MViT: relative positions of rows and of columns, without the class token."""
    scores = q @ k.mT * 0.3
    rows, columns = bias[:, :, :5, None], bias[:, :, None, 5:7]
    part = scores[:, :, 1:, 1:].view(BATCH, -1, 2, 3, 5, 2)
    rows, columns = (each.unflatten(1, (2, 3)) for each in (rows, columns))
    scores[:, :, 1:, 1:] = (part + rows + columns).view(BATCH, -1, 6, 10)
    return scores.softmax(-1) @ v


def part_of(write):
    def step(q, k, v, bias):
        scores = q @ k.mT * 0.3
        returned = write(scores, bias)
        return (scores if returned is None else returned).softmax(-1) @ v

    return step


def iadd(scores, bias):
    scores[:, :, 1:, 1:] += bias


def isub(scores, bias):
    scores[:, :, 1:, 1:] -= bias


def setitem(scores, bias):
    scores[:, :, 1:, 1:] = scores[..., 1:, 1:] + bias


def setitem_of_a_copy(scores, bias):
    scores = scores.clone()
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:].clone() + bias
    return scores


def twice(scores, bias):
    scores[:, :, 1:, 1:] += bias
    scores[:, :, 1:] += bias[:, :, :1]
    scores.mul_(0.5)
    scores[:, :, :, :-1] += bias[:, :1]
    return scores


def through_a_view(scores, bias):
    scores.view(BATCH, 2, 2, Q_LEN, KV_LEN)[..., 1:, 1:].add_(bias.unflatten(0, (2, 2)))


def of_all_through_a_view(scores, bias):
    scores.view(BATCH, 2, 2, Q_LEN, KV_LEN).add_(F.pad(bias, (1, 0, 1, 0)).unflatten(0, (2, 2)))


def one_row(scores, bias):
    scores[:, :, 0, 1:] += bias[:, 0]


def one_key(scores, bias):
    scores[:, :, 1:, -1].add_(bias[:, :, 0])


def some_heads(scores, bias):
    scores[:, 1:3, 1:, 1:] += bias[1:3]


def narrowed(scores, bias):
    scores.narrow(2, 1, 6).narrow(3, 1, 10).add_(bias, alpha=2)


def spread(scores, bias):
    scores[:, :, 1:, 1:] += bias[:, :1, :1]


def masked(scores, bias):
    scores[:, :, 1:, 1:].masked_fill_(bias > 1.5, float("-inf"))


def kept(scores, bias):
    scores[:, :, 1:, 1:] = torch.where(bias < 1.5, scores[:, :, 1:, 1:], -1e9)


def last_keys(scores, bias):
    scores[..., 8:] = float("-inf")


def first_keys(scores, bias):
    scores[:, :, :, :3] = -1e9


def corner(scores, bias):
    scores[:, :, 1:, 1:] = torch.finfo(scores.dtype).min


def one_pair(scores, bias):
    scores[:, 1:3, 2, -4] = float("-inf")


def filled_in_place(scores, bias):
    scores[..., 8:].fill_(float("-inf"))


def number_of_a_tensor(scores, bias):
    scores[:, :, 2:, 8:] = torch.tensor(float("-inf"), dtype=scores.dtype)


def by_a_mask(scores, bias):
    scores[F.pad(bias > 1.5, (1, 0, 1, 0)).expand_as(scores)] = float("-inf")


def by_pairs(scores, bias):
    scores[:, :, F.pad(bias[0] > 1.5, (1, 0, 1, 0))] = -1e9


def by_keys_of_a_part(scores, bias):
    scores[:, :, :, 1:][..., bias[0, 0] > 0.5] = float("-inf")


def fill_between(scores, bias):
    scores[:, :, 1:, 1:] += bias
    scores[..., 8:] = float("-inf")
    scores[:, :, 1:, 1:] -= bias[:1]


FILLS = {
    "masked": MaskKind.BOOLEAN, "kept": MaskKind.BOOLEAN, "last_keys": MaskKind.KEY_PADDING, "first_keys": MaskKind.KEY_PADDING,
    "corner": MaskKind.BOOLEAN, "one_pair": MaskKind.BOOLEAN, "filled_in_place": MaskKind.KEY_PADDING,
    "number_of_a_tensor": MaskKind.BOOLEAN, "by_a_mask": MaskKind.BOOLEAN, "by_pairs": MaskKind.BOOLEAN,
    "by_keys_of_a_part": MaskKind.KEY_PADDING,
}  # fmt: skip
WRITES = {each.__name__: part_of(each) for each in (
    iadd, isub, setitem, setitem_of_a_copy, twice, through_a_view, of_all_through_a_view, one_row, one_key, some_heads,
    narrowed, spread, masked, kept, last_keys, first_keys, corner, one_pair, filled_in_place, number_of_a_tensor, by_a_mask,
    by_pairs, by_keys_of_a_part, fill_between,
)}  # fmt: skip
WRITES["of_windows"] = of_windows


@pytest.mark.parametrize("how", WRITES)
def test_writes_into_a_part_of_the_scores(how):
    """An additive mask with zeros elsewhere, and its gradient; a fill, which passes no gradient, is a boolean mask. The kernels
    take turns: both get the same mask."""
    kernel = ("_native_math", "native")[[*WRITES].index(how) % 2]
    bias = torch.randn(HEADS, 6, 7 if how == "of_windows" else 10)
    tensors = [*qkv(value_dim=24), bias]
    tensors = [each.requires_grad_(place < 3 or how not in FILLS) for place, each in enumerate(tensors)]
    site = swapped(WRITES[how], tensors, kernel)
    assert site.call.mask.kind is FILLS.get(how, MaskKind.ADDITIVE)


EXPORTED_WRITES = (
    "iadd", "setitem", "twice", "one_row", "masked", "of_windows", "last_keys", "corner", "filled_in_place", "by_a_mask",
    "by_pairs",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_exported_writes_into_a_part():
    """All in one program: torch.export and its decompositions take most of the time."""

    class Attend(torch.nn.Module):
        def forward(self, q, k, v, bias, windows):
            return [WRITES[how](q, k, v, windows if how == "of_windows" else bias) for how in EXPORTED_WRITES]

    tensors = (*qkv(), torch.randn(HEADS, 6, 10), torch.randn(HEADS, 6, 7))
    expected = Attend()(*map(doubled, tensors))
    with torch.no_grad():
        program = torch.export.export(Attend(), tensors)
        for lowered in ("exported", "functional", "core"):
            if lowered != "exported":
                graph_module = program.run_decompositions({} if lowered == "functional" else None).module()
            else:
                graph_module = program.module()
            outcome = rewrite_graph(graph_module, attnrewrite.with_backend("_native_math").policy)
            # A scatter of one row is a `where` of positions in core.
            left = ["its scores are selected from two tensors (where)"] if lowered == "core" else []
            assert [each.reason for each in outcome.near_misses] == left, lowered
            assert [site.chosen for site in outcome.plan.sites] == ["_native_math"] * (len(expected) - len(left))
            for how, one, other in zip(EXPORTED_WRITES, graph_module(*tensors), expected, strict=True):
                assert relative(one, other) < 1e-5, (lowered, how)
            assert len([node for node in graph_module.graph.nodes if "softmax" in str(node.target)]) == len(left)
            if not left:
                assert "scatter" not in str(graph_module.graph)


def test_dynamic_writes_into_a_part():
    run, backend = compiled(WRITES["iadd"], "_native_math", dynamic=True)
    with torch.no_grad():
        for q_len, kv_len in ((7, 11), (9, 6), (4, 13)):
            tensors = [*qkv(q_len=q_len, kv_len=kv_len), torch.randn(HEADS, q_len - 1, kv_len - 1)]
            assert relative(run(*tensors), WRITES["iadd"](*map(doubled, tensors))) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {"_native_math"}


@pytest.mark.parametrize("sizes", [((4, 11), (3, 13), (5, 9)), ((9, 11), (3, 6))])
def test_parts_of_symbolic_sizes(sizes):
    """Where a part begins is not known of all sizes: a guard holds it."""

    def step(q, k, v, count):
        last, first = q @ k.mT * 0.3, q @ k.mT
        last[..., count:] = float("-inf")
        first[..., : k.shape[2] - count] = -1e9
        first[:, :, :, 8:] = -1e9
        return last.softmax(-1) @ v, first.softmax(-1) @ v

    run, backend = compiled(step, "_native_math", dynamic=True)
    with torch.no_grad():
        for count, kv_len in sizes:
            tensors = qkv(q_len=kv_len - 2, kv_len=kv_len)
            for one, other in zip(run(*tensors, count), step(*map(doubled, tensors), count), strict=True):
                assert relative(one, other) < 1e-5
    assert not backend.report.near_misses or sizes[1][1] < 8  # a part without elements is none
    assert {site.chosen for site in backend.report.sites} == {"_native_math"}


def test_what_a_written_part_hides_is_understood():
    """Padding of the last keys, written into the scores."""

    def step(q, k, v, valid):
        scores = q @ k.mT * 0.3
        scores[..., 5:].masked_fill_(~valid[:, None, None, :], float("-inf"))
        return scores.softmax(-1) @ v

    valid = torch.rand(BATCH, KV_LEN - 5) > 0.5
    with torch.no_grad():
        assert swapped(step, [*qkv(), valid], "_native_flash").call.mask.kind is MaskKind.KEY_PADDING


def number(scores, bias):
    scores[:, :, 1:, 1:] += 1.0


def every_other_filled(scores, bias):
    scores[..., 1::2] = float("-inf")


def filled_by_positions(scores, bias):
    scores[:, :, :, torch.tensor([1, 3])] = float("-inf")


def filled_by_a_mask_of_values(scores, bias):
    scores[:, :, 1:, 1:][bias.expand(BATCH, -1, -1, -1) > 1.5] = (
        scores[:, :, 1:, 1:][bias.expand(BATCH, -1, -1, -1) > 1.5] * 2
    )


def filled_wholly(scores, bias):
    scores[:, :] = -1e9


def replaced(scores, bias):
    scores[:, :, 1:, 1:] = bias


def scaled(scores, bias):
    scores[:, :, 1:, 1:] *= 0.5


def multiplied(scores, bias):
    scores[:, :, 1:, 1:] *= bias


def shifted(scores, bias):
    scores[:, :, 1:, 1:] = scores[:, :, :-1, :-1] + bias


def shifted_and_added(scores, bias):
    scores[:, :, 1:, 1:].add_(scores[:, :, :-1, :-1])


def turned(scores, bias):
    scores[:, :, 4:, 4:] = scores[:, :, 4:, 4:-4].mT.mT.flip(-1).repeat(1, 1, 1, 3)[..., :7]


def every_other(scores, bias):
    scores[:, :, 1:, 1::2] += bias[..., ::2]


def chosen_rows(scores, bias):
    scores[:, :, torch.tensor([1, 3])] += bias[:, :2, :1]


def old_values(scores, bias):
    before = scores[:, :, 1:, 1:] + bias
    scores.mul_(2.0)
    scores[:, :, 1:, 1:] = before


def read_too(scores, bias):
    scores[:, :, 1:, 1:] += scores[:, :, 1:, 1:].amax()


OF_VALUES = pytest.param(
    filled_by_a_mask_of_values,
    marks=pytest.mark.skipif(
        not satisfies(torch.__version__, ">=2.11"), reason="before torch 2.11 Dynamo does not trace an index by values"
    ),
)
LIKE_WRITES = (
    number, every_other_filled, filled_by_positions, OF_VALUES, filled_wholly, replaced,
    scaled, multiplied, shifted, shifted_and_added, turned, every_other, chosen_rows, old_values,
    read_too,
)  # fmt: skip


@pytest.mark.parametrize("write", LIKE_WRITES)
def test_writes_that_are_no_mask(write):
    with torch.no_grad():
        reason = refused(part_of(write), *qkv(), torch.randn(HEADS, 6, 10))
    assert "written into by" in reason or "used elsewhere" in reason or "written into before" in reason


def test_a_bias_that_is_written_into_after_it_was_added():
    def write(scores, bias):
        bias = bias.clone()
        scores[:, :, 1:, 1:] += bias
        bias.zero_()

    with torch.no_grad():
        assert "written into" in refused(part_of(write), *qkv(), torch.randn(HEADS, 6, 10))
