"""Attention that is spelled out in tensor operations is found, read right, and becomes one call."""

import copy
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from fuzz import EveryKernel
from hand_written_models import IDS, MODELS, PADDING, quiet
from parity import FLEX_TAKES_MASKS, TOLERANCE, compiled, doubled, qkv, relative, skip_if_fenced
from torch import nn

import attnrewrite
from attnrewrite import Code, MaskKind
from attnrewrite.pipeline import rewrite_graph

SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")


def sizes(site):
    return tuple(getattr(site.call, name) for name in SIZES)


def softmaxes(graph):
    return [node.name for node in graph.nodes if "softmax" in str(node.target)]


def seen(graphs):
    """An inner compiler that keeps what it gets."""

    def inner(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module

    return inner


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    module, arguments, calls = MODELS[name]()
    graphs = {kernel: [] for kernel in ("_native_flash", "_native_math", "native", "flex")}
    every = EveryKernel({kernel: attnrewrite.with_backend(kernel, inner=seen(kept)) for kernel, kept in graphs.items()})
    run = torch.compile(module, backend=every)
    with torch.no_grad():
        reference = copy.deepcopy(module).double()(*map(doubled, arguments))
    for kernel, backend in every.backends.items():
        every.now = kernel
        with torch.no_grad():
            assert relative(run(*arguments), reference) < 1e-5
        assert [sizes(site) for site in backend.report.sites] == calls
        if kernel == "_native_flash" and name == "grouped_attention":  # value_dim
            continue
        for site in backend.report.sites:
            skip_if_fenced(site)
        assert {site.chosen for site in backend.report.sites} == {kernel}
        assert [graph.unchanged for graph in backend.report.graphs] == [0]
        (graph,) = (each.graph for each in graphs[kernel])
        assert softmaxes(graph) == []
        assert not [node for node in graph.nodes if spells_scores(node, calls)]


def spells_scores(node, calls):
    """Whether a node still has the shape of the scores: what was swapped leaves nothing of them behind."""
    value = node.meta.get("example_value", node.meta.get("val"))
    q_len, kv_len = calls[0][3:5]
    shaped = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-2:] == (q_len, kv_len)
    return (
        shaped
        and node.op != "placeholder"
        and getattr(node.target, "__name__", "") in ("matmul", "bmm", "baddbmm", "einsum")
    )


def every_kernel(*kernels):
    """A backend that gives one trace of Dynamo to each kernel."""
    return EveryKernel({kernel: attnrewrite.with_backend(kernel, inner="eager") for kernel in kernels})


class Several(nn.Module):
    """Models side by side in one program: torch.export and its decompositions take a second for the smallest."""

    def __init__(self, modules, counts):
        super().__init__()
        self.models, self.counts = nn.ModuleList(modules), counts

    def forward(self, *arguments):
        outputs, start = [], 0
        for module, count in zip(self.models, self.counts, strict=True):
            outputs.append(module(*arguments[start : start + count]))
            start += count
        return tuple(outputs)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_exported_models():
    modules, given, calls = zip(*(build() for build in MODELS.values()), strict=True)
    arguments = tuple(argument for each in given for argument in each)
    with torch.no_grad():
        references = [
            copy.deepcopy(module).double()(*map(doubled, each)) for module, each in zip(modules, given, strict=True)
        ]
        program = torch.export.export(Several(modules, [*map(len, given)]), arguments)
        found = program.module(), program.run_decompositions().module()
        for exported, kernel in itertools.product(found, ("_native_math", "native", "flex")):
            graph_module = copy.deepcopy(exported)
            outcome = rewrite_graph(graph_module, attnrewrite.with_backend(kernel).policy)
            for name, output, reference in zip(MODELS, graph_module(*arguments), references, strict=True):
                assert relative(output, reference) < 1e-5, name
            assert [sizes(site) for site in outcome.plan.sites] == [call for each in calls for call in each]
            if kernel == "flex" and not FLEX_TAKES_MASKS:
                continue
            assert {site.chosen for site in outcome.plan.sites} == {kernel}
            assert outcome.unchanged == 0
            assert softmaxes(graph_module.graph) == []


SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 50}
OTHERS = {
    "BertModel": (SMALL, 3),
    "BloomModel": ({"hidden_size": 24, "n_layer": 1, "n_head": 3, "vocab_size": 50}, 3),  # baddbmm with its position bias
    "DebertaV2Model": ({**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, 3),
    "FalconModel": (SMALL, 1),  # one key head
    "GPT2Model": ({"n_embd": 24, "n_layer": 1, "n_head": 3, "vocab_size": 50}, 3),
    "GPTNeoModel": (
        {"hidden_size": 24, "num_layers": 1, "num_heads": 3, "vocab_size": 50, "attention_types": [[["local"], 1]],
         "window_size": 4}, 3,
    ),
    "MptModel": ({"d_model": 24, "n_layers": 1, "n_heads": 4, "vocab_size": 50}, 4),
    "XLMModel": ({"emb_dim": 24, "n_layers": 1, "n_heads": 3, "vocab_size": 50}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_of_transformers(name):
    """As they come, with what they have around their attention."""
    options, kv_heads = OTHERS[name]
    config = quiet(getattr(transformers, name.replace("Model", "Config"))(**options))
    module = getattr(transformers, name)(config).eval()
    graphs = []
    backend = attnrewrite.with_backend("_native_math", inner=seen(graphs))
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = torch.compile(module, backend=backend)
        output = run(IDS, attention_mask=PADDING, return_dict=False)[0]
        expected = module(IDS, attention_mask=PADDING, return_dict=False)[0]
    assert relative(output, expected) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen, site.call.kv_heads) == ("_native_math", kv_heads)
    assert not any(softmaxes(graph.graph) for graph in graphs)


def test_capped_scores_stay():
    config = transformers.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8)
    module = transformers.Gemma2Model(quiet(config)).eval()
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    with torch.no_grad():
        output = torch.compile(module, backend=backend)(IDS, attention_mask=PADDING, use_cache=False)[0]
        assert torch.equal(output, module(IDS, attention_mask=PADDING, use_cache=False)[0])
    (site,) = backend.report.sites
    assert site.refusals[0][1].detail == "its scores are capped (tanh)"


def weights_of(scores):
    return F.softmax(scores, dim=-1)


def in_place_scores(q, k, v, m):
    scores = q @ k.mT
    scores *= 0.3
    scores += m
    return scores.softmax(-1) @ v


def discarded_in_place(q, k, v, m):
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores.mul_(0.3)
    scores.add_(m)
    return torch.matmul(scores.softmax(-1), v)


def folded(tensor):
    return tensor.reshape(-1, *tensor.shape[-2:])


def unfolded(tensor, like):
    return tensor.view(*like.shape[:-2], *tensor.shape[-2:])


def bmm_with_4d_mask(q, k, v, m):
    scores = unfolded(torch.bmm(folded(q), folded(k).transpose(1, 2)), q) * 0.3 + m
    return unfolded(torch.bmm(folded(weights_of(scores)), folded(v)), q)


def upcast_softmax(q, k, v, m):
    return weights_of((q @ k.mT * 0.3).float() + m.float()).to(q.dtype) @ v


# query (2, 4, 7, 16), key (2, 4, 11, 16), value (2, 4, 11, 24), a bias (2, 1, 7, 11): what they compute, and with which scale.
SCALINGS = {
    "scores times": (lambda q, k, v, m: weights_of(q @ k.mT * 0.3) @ v, 0.3),
    "number first": (lambda q, k, v, m: weights_of(0.3 * (q @ k.mT)) @ v, 0.3),
    "scores over": (lambda q, k, v, m: weights_of(q @ k.mT / 4.0) @ v, None),
    "over a constant tensor": (lambda q, k, v, m: weights_of(q @ k.mT / torch.full([], 5.0)) @ v, 0.2),
    "over the root of one": (lambda q, k, v, m: weights_of(q @ k.mT / torch.sqrt(torch.tensor(25.0))) @ v, 0.2),
    "query": (lambda q, k, v, m: weights_of(q * 0.3 @ k.mT) @ v, 0.3),
    "key": (lambda q, k, v, m: weights_of(q @ (k / 8).mT) @ v, 0.125),
    "key turned first": (lambda q, k, v, m: weights_of(q @ (k.mT * 0.3)) @ v, 0.3),
    "both": (lambda q, k, v, m: weights_of((q * 0.5) @ (k * 0.5).mT) @ v, None),
    "all of them": (lambda q, k, v, m: weights_of((q * 0.5) @ (k * 4.0).mT / 2 * 0.5) @ v, 0.5),
    "none": (lambda q, k, v, m: weights_of(q @ k.mT) @ v, 1.0),
    "negative": (lambda q, k, v, m: weights_of(q @ k.mT * -0.3) @ v, -0.3),
    "alpha": (
        lambda q, k, v, m: unfolded(
            torch.bmm(
                weights_of(torch.baddbmm(q.new_empty(8, 7, 11), folded(q), folded(k).mT, beta=0, alpha=0.3)), folded(v)
            ),
            q,
        ),
        0.3,
    ),
    "alpha on zeros": (
        lambda q, k, v, m: unfolded(
            torch.bmm(weights_of(folded(q).new_zeros(8, 7, 11).baddbmm(folded(q), folded(k).mT, alpha=0.3)), folded(v)), q
        ),
        0.3,
    ),
    "bias": (lambda q, k, v, m: weights_of(q @ k.mT * 0.3 + m) @ v, 0.3),
    "bias first": (lambda q, k, v, m: weights_of(m + 0.3 * q @ k.mT) @ v, 0.3),
    "bias before the scale": (lambda q, k, v, m: weights_of((q @ k.mT + m) * 0.3) @ v, 0.3),
    "bias less": (lambda q, k, v, m: weights_of(q @ k.mT * 0.3 - m) @ v, 0.3),
    "bias times alpha": (lambda q, k, v, m: weights_of(torch.add(q @ k.mT * 0.3, m, alpha=2)) @ v, 0.3),
    "two biases": (lambda q, k, v, m: weights_of((q @ k.mT + m) * 0.3 + m[:1, :, :1]) @ v, 0.3),
    "bias of rank 2": (lambda q, k, v, m: weights_of(q @ k.mT * 0.3 + m[0, 0]) @ v, 0.3),
    "bias and a number": (lambda q, k, v, m: weights_of(q @ k.mT * 0.3 + m + 1.5) @ v, 0.3),
    "bias through baddbmm": (
        lambda q, k, v, m: unfolded(
            weights_of(torch.baddbmm(folded(m.expand(2, 4, 7, 11)), folded(q), folded(k).mT, beta=2, alpha=0.3)) @ folded(v), q
        ),
        0.3,
    ),
    "bias repeated over heads": (
        lambda q, k, v, m: unfolded(
            weights_of(folded(q) @ folded(k).mT * 0.3 + m.squeeze(1).repeat_interleave(4, 0)) @ folded(v), q
        ),
        0.3,
    ),
    "bias expanded over heads": (
        lambda q, k, v, m: unfolded(
            weights_of(folded(q) @ folded(k).mT * 0.3 + folded(m.expand(-1, 4, -1, -1))) @ folded(v), q
        ),
        0.3,
    ),
    "in place": (in_place_scores, 0.3),
    "in place, result discarded": (discarded_in_place, 0.3),
    "bmm with a 4-D bias": (bmm_with_4d_mask, 0.3),
    "upcast softmax": (upcast_softmax, 0.3),
    "softmax with a dtype": (lambda q, k, v, m: F.softmax(q @ k.mT * 0.3, -1, dtype=torch.float64).type_as(q) @ v, 0.3),
    "softmax module": (lambda q, k, v, m: nn.Softmax(dim=3)(q @ k.mT * 0.3) @ v, 0.3),
    "dropout that is off": (lambda q, k, v, m: F.dropout(weights_of(q @ k.mT * 0.3), 0.5, training=False) @ v, 0.3),
}  # fmt: skip


def only_site(function, *tensors, kernels=("_native_math",), error=1e-5, **options):
    """The one site of a function, which each kernel takes and computes right, from one trace of Dynamo."""
    graphs = {kernel: [] for kernel in kernels}
    every = EveryKernel({kernel: attnrewrite.with_backend(kernel, inner=seen(kept)) for kernel, kept in graphs.items()})
    run = torch.compile(function, backend=every, fullgraph=True, dynamic=False, **options)
    own, expected = function(*tensors), function(*map(doubled, tensors))
    for kernel, backend in every.backends.items():
        every.now = kernel
        output = run(*tensors)
        (site,) = backend.report.sites
        skip_if_fenced(site)
        assert site.chosen == kernel, site
        assert relative(output, expected) < error, kernel
        assert output.dtype == own.dtype
        assert output.stride() == own.stride()
        assert softmaxes(graphs[kernel][-1].graph) == []
    return site


@pytest.mark.parametrize("spelling", SCALINGS)
def test_scalings_and_biases(spelling):
    function, scale = SCALINGS[spelling]
    if spelling == "softmax with a dtype":
        function = SCALINGS["upcast softmax"][0]
    query, key, value = qkv(value_dim=24)
    site = only_site(function, query, key, value, torch.randn(2, 1, 7, 11), kernels=("_native_math", "native"))
    assert sizes(site) == (2, 4, 4, 7, 11, 16, 24)
    assert site.call.scale == scale or math.isclose(site.call.scale, scale, rel_tol=1e-12)
    if "bias" in spelling:
        assert site.call.mask.kind is MaskKind.ADDITIVE


# Orders of axes, as letters; sizes: batch 2, heads 4, queries 7, keys 11, dim 16, value 24.
EINSUMS = [
    ("bhqd,bhkd->bhqk", "bhqk,bhkv->bhqv", (2, 4, 4)),
    ("bqhd,bkhd->bhqk", "bhqk,bkhv->bqhv", (2, 4, 4)),
    ("qbhd,kbhd->bhqk", "bhqk,kbhv->qbhv", (2, 4, 4)),
    ("bqhd,bkhd->bqkh", None, None),
    ("bhdq,bhdk->bhqk", "bhqk,bhvk->bhvq", (2, 4, 4)),
    ("bqd,bkd->bqk", "bqk,bkv->bqv", (2, 1, 1)),
    ("bhqd,bkd->bhqk", "bhqk,bkv->bhqv", (2, 4, 1)),
    ("...qd,...kd->...qk", "...qk,...kv->...qv", (2, 4, 4)),
    ("qd,kd->qk", "qk,kv->qv", (1, 1, 1)),
    ("xyhqd,xyhkd->xyhqk", "xyhqk,xyhkv->xyhqv", (15, 4, 4)),
    ("kbhd,qbhd->bhqk", "kbhv,bhqk->vbhq", (2, 4, 4)),
]
LETTERS = {"b": 2, "h": 4, "q": 7, "k": 11, "d": 16, "v": 24, "x": 3, "y": 5}


@pytest.mark.parametrize(("scores", "values", "lead"), [each for each in EINSUMS if each[1]])
def test_einsum(scores, values, lead):
    one, other = scores.split("->")[0].replace("...", "bh").split(",")
    weights, value = values.split("->")[0].replace("...", "bh").split(",")
    value = value if "v" in value else weights
    query, key, value = (torch.randn([LETTERS[letter] for letter in text]) for text in (one, other, value))
    swapped = values.split(",")[1].startswith("bhqk")

    def step(a, b, v):
        w = (torch.einsum(scores, a, b) * 0.3).softmax(-1)
        return torch.einsum(values, *((v, w) if swapped else (w, v)))

    site = only_site(step, query, key, value, kernels=("_native_math", "native", "flex"))
    assert sizes(site) == (*lead, 7, 11, 16, 24)


def keep(*shape):
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True  # no row without a key
    return mask


FILLS = {
    "masked_fill": lambda s, m, fill: s.masked_fill(~m, fill),
    "masked_fill in place": lambda s, m, fill: s.masked_fill_(m.logical_not(), fill),
    "where": lambda s, m, fill: torch.where(m, s, fill),
    "where of a tensor": lambda s, m, fill: torch.where(m, s, torch.tensor(fill, dtype=s.dtype)),
    "where of a full tensor": lambda s, m, fill: torch.where(m, s, torch.full_like(s, fill)),
    "where, inverted": lambda s, m, fill: torch.where(~m, fill, s),
    "where, a method": lambda s, m, fill: s.where(m, torch.full((), fill, dtype=s.dtype)),
    "torch.masked_fill": lambda s, m, fill: torch.masked_fill(s, mask=torch.logical_not(m), value=fill),
}


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("spelling", FILLS)
def test_fills(spelling, number):
    """Each number in each spelling; whether it is scaled too alternates among the spellings."""
    fill = (-math.inf, -1e9, torch.finfo(torch.float32).min)[number]
    scale_first = ([*FILLS].index(spelling) + number) % 2 == 0

    def step(q, k, v, m):
        scores = q @ k.mT * (0.3 if scale_first else 1.0)
        return (FILLS[spelling](scores, m, fill) * (1.0 if scale_first else 0.3)).softmax(-1) @ v

    query, key, value = qkv()
    site = only_site(step, query, key, value, keep(2, 1, 7, 11))
    assert site.call.mask.kind is (MaskKind.BOOLEAN if math.isinf(fill) else MaskKind.ADDITIVE)
    assert math.isclose(site.call.scale, 0.3)


def test_key_padding_is_told_by_its_shape():
    def step(q, k, v, m):
        return (q @ k.mT).masked_fill(~m[:, None, None, :], -math.inf).softmax(-1) @ v

    site = only_site(step, *qkv(), keep(2, 11))
    assert site.call.mask.kind is MaskKind.KEY_PADDING


def test_two_masks_are_one():
    def step(q, k, v, m, n):
        return (q @ k.mT).masked_fill(~m, -math.inf).masked_fill(n, -math.inf).softmax(-1) @ v

    blocked = torch.ones(7, 11).triu(5).bool()
    site = only_site(step, *qkv(), keep(2, 1, 1, 11), blocked)
    assert site.call.mask.kind is MaskKind.BOOLEAN
    assert site.call.mask.shape == (2, 1, 7, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", [-1e4, -65504.0, -3e38])
def test_rows_of_nothing_but_fills_are_the_mean(fill, dtype):
    """A softmax of equal numbers gives all keys the same weight; SDPA's boolean mask would give zeros."""
    if dtype == torch.float16 and fill < -65504:
        fill = -65504.0

    def step(q, k, v, m):
        return (q @ k.mT * 0.3).masked_fill(~m, fill).softmax(-1) @ v

    query, key, value = qkv(dtype=dtype)
    mask = keep(2, 1, 7, 11)
    mask[1, :, 3] = False
    reference = step(query.double(), key.double(), value.double(), mask)
    every = every_kernel("_native_math", "native", "flex")
    run = torch.compile(step, backend=every, fullgraph=True, dynamic=False)
    for kernel, backend in every.backends.items():
        every.now = kernel
        output = run(query, key, value, mask)
        (site,) = backend.report.sites
        if site.chosen is None:  # float16 needs a bias in float32, which flex may not take
            assert site.refusals[0][1].code is Code.MASK
            continue
        assert relative(output, reference) < TOLERANCE[dtype]
        assert relative(output[1, :, 3], value.double()[1].mean(-2)) < TOLERANCE[dtype]


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "softmax"),
    [
        (torch.float32, lambda scores: F.softmax(scores, -1, dtype=torch.float32)),
        (torch.float32, lambda scores: torch.softmax(scores, -1, torch.float32)),
        (torch.bfloat16, lambda scores: scores.float().softmax(-1)),
        (torch.bfloat16, lambda scores: F.softmax(scores, dim=-1, dtype=torch.float32)),
    ],
)
def test_a_softmax_in_float32_loses_scores_beside_a_large_number(dtype, softmax, needs_grad):
    """A row that -1e9 hides as a whole has equal weights there, in whatever dtype the model runs; without float32 it has the
    weights of its scores in float64."""

    def step(q, k, v, m):
        scores = q @ k.mT * 0.3 + torch.where(m, 0.0, -1e9).to(q.dtype)
        return softmax(scores).to(v.dtype) @ v

    mask = keep(2, 1, 1, 11)
    mask[1] = False
    given = [each.requires_grad_(needs_grad) for each in qkv(dtype=dtype)]
    exact = [each.detach().double().requires_grad_(needs_grad) for each in given]
    every = every_kernel("native", "_native_math")
    run, reference = torch.compile(step, backend=every, fullgraph=True, dynamic=False), step(*exact, mask)
    for kernel, backend in every.backends.items():
        every.now = kernel
        output = run(*given, mask)
        (site,) = backend.report.sites
        # `native` has no gradient for a row that a finite number hides; the model's own operations stay.
        assert site.chosen == (None if needs_grad and kernel == "native" else kernel), site.refusals
        assert relative(output.detach(), reference.detach()) < TOLERANCE[dtype]
        assert relative(output[1].detach(), exact[2][1].mean(-2, keepdim=True).detach()) < TOLERANCE[dtype]
        if needs_grad:
            found, wanted = (
                torch.autograd.grad(each.double().sin().sum(), to, retain_graph=True)
                for each, to in ((output, given), (reference, exact))
            )
            for one, other in zip(found, wanted, strict=True):
                assert relative(one, other) < 10 * TOLERANCE[dtype]


def test_a_fill_and_a_bias():
    """GPT-2's: causal by a fill, padding by a bias, both as low as the dtype goes."""
    low = torch.finfo(torch.float32).min

    def step(q, k, v, causal, padding):
        scores = torch.where(causal, q @ k.mT * 0.3, torch.full([], low, dtype=q.dtype))
        return (scores + padding).softmax(-1) @ v

    query, key, value = qkv(q_len=11)
    causal = torch.ones(11, 11).tril().bool()
    padding = torch.zeros(2, 1, 1, 11).masked_fill(~keep(2, 1, 1, 11), low)
    only_site(step, query, key, value, causal, padding)


def test_a_fill_that_is_no_mask_is_refused():
    def step(q, k, v, m):
        return (q @ k.mT).masked_fill(m, -5.0).softmax(-1) @ v

    (site,), same = stays(step, *qkv(), keep(2, 1, 7, 11))
    assert "fills masked scores with -5" in site.refusals[0][1].detail
    assert same


def stays(function, *tensors, **options):
    """The sites of a function that no choice may take, and whether its graph is unchanged."""
    graphs, plain = [], []
    backend = attnrewrite.with_backend("_native_math", "native", inner=seen(graphs))
    with torch.no_grad():
        output = torch.compile(function, backend=backend, fullgraph=True, **options)(*tensors)
        torch.compiler.reset()
        expected = torch.compile(function, backend=seen(plain), fullgraph=True, **options)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(*map(leaves, (output, expected)), strict=True))
    assert all(site.chosen is None for site in backend.report.sites)
    assert all(refused.code is Code.CONTEXT for site in backend.report.sites for _, refused in site.refusals)
    assert [graph.unchanged for graph in backend.report.graphs] == [len(backend.report.sites)]
    return backend.report.sites, str(graphs[0].graph) == str(plain[0].graph)


def leaves(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


def returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def averaged(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


def used_twice(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ v.square()


def weights_edited(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights.mul_(2)
    return weights @ v


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (returned, "its attention weights are used elsewhere (returned)"),
        (averaged, "its attention weights are used elsewhere (used by mean)"),
        (scores_returned, "its attention scores are used elsewhere (returned)"),
        (used_twice, "its attention weights are used elsewhere"),
        (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "its softmax runs over dimension 2 of the scores"),
        (lambda q, k, v: (q @ k.mT / 4).softmax(1) @ v, "its softmax runs over dimension 1 of the scores"),
        (lambda q, k, v: (torch.tanh(q @ k.mT / 50) * 50).softmax(-1) @ v, "its scores are capped (tanh)"),
        (
            lambda q, k, v: (q @ k.mT * torch.arange(77.0).view(7, 11)).softmax(-1) @ v,
            "its scores are multiplied by a tensor",
        ),
        (lambda q, k, v: (q @ k.mT).double().softmax(-1).float() @ v, "its softmax runs in float64"),
    ],
)
def test_what_must_stay(function, reason):
    (site,), same = stays(function, *qkv())
    assert reason in site.refusals[0][1].detail
    assert [name for name, _ in site.refusals] == ["_native_math", "native"]
    assert same


def copied_scores(q, k, v, thrown_away):
    scores = q @ k.mT
    thrown_away += [scores.clone(), scores.detach().float(), scores.view(8, 7, 11)]
    return scores.softmax(-1) @ v


def copied_weights(q, k, v, thrown_away):
    weights = (q @ k.mT).softmax(-1)
    thrown_away += [weights.mean(1), torch.stack([weights, weights * 2]).max(0).values, weights.topk(2)]
    return F.dropout(weights, 0.5, training=False) @ v


def second_product(q, k, v, thrown_away):
    weights = (q @ k.mT).softmax(-1)
    thrown_away.append(weights.mT @ q)
    return weights @ v


def lent_dtype(q, k, v, thrown_away):
    """ESM's: the second of two copies reads the dtype of the first."""
    scores = q @ k.mT
    weights = scores.float().softmax(-1)
    copy = weights.type_as(scores)
    return weights.type_as(copy) @ v


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("function", [copied_scores, copied_weights, second_product, lent_dtype])
def test_readers_that_nobody_reads(function, training, exported):
    """Whisper's and x-transformers' copies for a caller that throws them away. Nothing of them is left."""

    class Attend(nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v, [])

    tensors = [each.requires_grad_(training) for each in qkv()]
    wanted = [each.detach().double().requires_grad_(training) for each in tensors]
    if exported:
        graph_module = torch.export.export(Attend(), tuple(tensors)).module()
        sites = rewrite_graph(graph_module, attnrewrite.with_backend("native").policy).plan.sites
        graphs, run = [graph_module], graph_module
    else:
        graphs = []
        run, backend = compiled(Attend(), "native", inner=seen(graphs))
        run(*tensors)
        sites = backend.report.sites
    assert [site.chosen for site in sites] == ["native"]
    assert not [
        node for node in graphs[0].graph.nodes if not node.users and node.op in ("call_function", "call_method")
    ]
    assert softmaxes(graphs[0].graph) == []
    output, expected = run(*tensors), Attend()(*wanted)
    assert relative(output, expected) < 1e-5
    if training:
        output.square().sum().backward()
        expected.square().sum().backward()
        assert all(relative(a.grad, b.grad) < 1e-5 for a, b in zip(tensors, wanted, strict=True))


def written_copy(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights.view(8, 7, 11).mul_(2)
    return weights @ v


def returned_copy(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    copy = weights.type_as(scores)
    return weights.type_as(copy) @ v, copy


def kept_in_a_buffer(q, k, v):
    kept = torch.zeros(2, 4, 7, 11)
    weights = (q @ k.mT).softmax(-1)
    kept[:] = weights
    return weights @ v, kept


def random_reader(q, k, v):
    """A random number more or less would change all others."""
    weights = (q @ k.mT).softmax(-1)
    F.dropout(weights, 0.5)
    return weights @ v


@pytest.mark.parametrize(
    ("function", "reported"), [(written_copy, 0), (returned_copy, 1), (kept_in_a_buffer, 1), (random_reader, 1)]
)
def test_readers_without_readers_that_do_something(function, reported):
    torch.manual_seed(0)
    graphs = []
    backend = attnrewrite.with_backend("_native_math", inner=seen(graphs))
    torch.compile(function, backend=backend, fullgraph=True)(*qkv())
    assert [site.chosen for site in backend.report.sites] == [None] * reported
    assert len(backend.report.sites) + len(backend.report.near_misses) == 1
    assert softmaxes(graphs[0].graph)


def test_a_fused_kernel_whose_log_sum_exp_is_thrown_away():
    def step(q, k, v):
        output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
        log_sum_exp.exp().mean(1)
        return output

    graphs = []
    run, backend = compiled(step, "_native_math", inner=seen(graphs))
    tensors = qkv()
    assert relative(run(*tensors), F.scaled_dot_product_attention(*map(doubled, tensors))) < 1e-5
    assert [site.chosen for site in backend.report.sites] == ["_native_math"]
    assert "exp" not in str(graphs[0].graph)


def test_an_attention_for_nobody_is_not_listed():
    def step(q, k, v):
        (q @ k.mT).softmax(-1) @ v
        return q + 1

    assert stays(step, *qkv()) == ([], True)


def test_strict_raises():
    run, _ = compiled(returned, attnrewrite.with_backend("native", inner="eager", strict=True))
    with pytest.raises(Exception, match="its attention weights are used elsewhere"):
        run(*qkv())


class Router(nn.Module):
    """A mixture of experts: top-k of a softmax over the experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(5, 16))
        self.experts = nn.Parameter(torch.randn(5, 16, 16))

    def forward(self, x):
        probabilities = (x @ self.gate.mT).softmax(-1)
        weights, chosen = probabilities.topk(2, -1)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, weights)
        return torch.einsum("bse,edf,bsd->bsf", weights, self.experts, x)


def classifier(x, weight, bias):
    return F.linear(x, weight, bias).softmax(-1)


def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def pooling(x, query):
    """One learned vector that all tokens are compared with."""
    return ((x @ query) / 4).softmax(-1).unsqueeze(1) @ x


def learned_row(x, query):
    return (query[None, :] @ x.mT).softmax(-1) @ x


def gated(q, k, v):
    return torch.sigmoid(q @ k.mT) @ v


def not_the_scores(q, k, v):
    return ((q @ k.mT).softmax(-1) + 1) @ v


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (Router(), lambda: [torch.randn(2, 7, 16)]),
        (classifier, lambda: [torch.randn(2, 16), torch.randn(5, 16), torch.randn(5)]),
        (linear_attention, qkv),
        (pooling, lambda: [torch.randn(2, 7, 16), torch.randn(16)]),
        (learned_row, lambda: [torch.randn(2, 7, 16), torch.randn(16)]),
        (gated, qkv),
        (not_the_scores, qkv),
        (weights_edited, qkv),
    ],
)
def test_what_is_no_attention(function, arguments):
    sites, same = stays(function, *arguments())
    assert not sites
    assert same


def test_sana_linear_attention_is_none():
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    module = Attention(24, heads=3, dim_head=8, processor=SanaLinearAttnProcessor2_0()).eval()
    assert stays(module, torch.randn(2, 7, 24)) == ([], True)


@pytest.mark.parametrize("kernel", ["_native_math", "native"])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients(kernel, learned):
    def step(q, k, v, bias):
        return (q * 0.5 @ (k * 0.5).mT + bias).softmax(-1) @ v.repeat_interleave(1, 1)

    tensors = [*qkv(), torch.randn(4, 7, 11)]
    given = [each.clone().requires_grad_(learned or i < 3) for i, each in enumerate(tensors)]
    wanted = [each.double().detach().requires_grad_(learned or i < 3) for i, each in enumerate(tensors)]
    run, backend = compiled(step, kernel, inner="aot_eager")
    run(*given).square().sum().backward()
    step(*wanted).square().sum().backward()
    (site,) = backend.report.sites
    assert (site.chosen, site.call.needs_grad, site.call.mask.needs_grad) == (kernel, True, learned)
    for one, other in zip(given[: 3 + learned], wanted, strict=False):
        assert relative(one.grad, other.grad) < 1e-5


def test_a_learned_bias_is_for_kernels_that_give_it_a_gradient():
    query, key, value = qkv()
    bias = torch.randn(4, 7, 11, requires_grad=True)
    run, backend = compiled(lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, "_native_flash")
    run(query, key, value, bias)
    assert backend.report.sites[0].refusals[0][1].code is Code.GRAD


def test_dropout_goes_with_it():
    def step(q, k, v):
        return F.dropout((q @ k.mT / 4).softmax(-1), 0.25) @ v

    query, key, value = qkv(q_len=400, kv_len=500)
    run, backend = compiled(step, "native")
    output = run(query, key, torch.ones_like(value))
    assert backend.report.sites[0].call.dropout == 0.25
    assert 0.9 < output.mean() < 1.1
    assert output.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("upcast", "expected"),
    [
        ("none", "half"),
        ("softmax", "half"),
        ("query and key", "half"),
        ("all", "float32"),
        ("float32 query", "float32"),
        ("scores only half", "float32"),
    ],
)
def test_dtypes(upcast, expected, dtype):
    """The call has the dtype that the products are computed in, unless float32 only holds what was half before."""

    def step(q, k, v):
        if upcast == "softmax":
            return F.softmax(q @ k.mT / 4, -1, dtype=torch.float32).to(q.dtype) @ v
        if upcast == "query and key":
            return (q.float() @ k.float().mT / 4).softmax(-1).to(q.dtype) @ v
        if upcast == "all":
            return (q.float() @ k.float().mT / 4).softmax(-1) @ v.float()
        if upcast == "float32 query":
            return (q.float().sin() @ k.float().cos().mT / 4).softmax(-1).to(q.dtype) @ v
        if upcast == "scores only half":
            return (q @ k.mT / 4).float().softmax(-1) @ v.float()
        return (q @ k.mT / 4).softmax(-1) @ v

    def exact(q, k, v):
        q, k, v = q.double(), k.double(), v.double()
        q, k = (q.sin(), k.cos()) if upcast == "float32 query" else (q, k)
        return (q @ k.mT / 4).softmax(-1) @ v

    query, key, value = qkv(dtype=dtype)
    run, backend = compiled(step, "_native_math")
    output, eager, reference = run(query, key, value), step(query, key, value), exact(query, key, value)
    (site,) = backend.report.sites
    assert site.chosen == "_native_math"
    assert site.call.dtype == (str(dtype).removeprefix("torch.") if expected == "half" else expected)
    assert output.dtype == eager.dtype
    assert relative(output, reference) <= relative(eager, reference) * 1.1 + 1e-7


@pytest.mark.parametrize("kernel", ["_native_math", "native"])
def test_autocast(kernel):
    def step(q, k, v, m):
        with torch.autocast("cpu", torch.bfloat16):
            scores = torch.matmul(q, k.mT) * 0.3
            return (scores + m if kernel == "native" else scores).softmax(-1) @ v

    tensors = [*qkv(), torch.randn(2, 1, 7, 11)]
    run, backend = compiled(step, kernel)
    output, expected = run(*tensors), step(*tensors)
    (site,) = backend.report.sites
    assert (site.chosen, site.call.dtype, output.dtype) == (kernel, "bfloat16", expected.dtype)
    assert relative(output, step(*tensors)) < 2e-2


def test_dynamic_sizes():
    module, _, _ = MODELS["compvis_cross_attention_with_mask"]()
    every = every_kernel("_native_math", "native")
    run = torch.compile(module, backend=every, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, q_len, kv_len in ((2, 7, 11), (3, 9, 13), (5, 6, 8)):
            arguments = torch.randn(batch, q_len, 24), torch.randn(batch, kv_len, 20), torch.rand(batch, kv_len) > 0.3
            reference = copy.deepcopy(module).double()(*map(doubled, arguments))
            for kernel in every.backends:
                every.now = kernel
                assert relative(run(*arguments), reference) < 1e-5
    for kernel, backend in every.backends.items():
        assert [site.chosen for site in backend.report.sites] == [kernel]
        assert len(backend.report.graphs) == 1


def test_dynamic_grouped_heads():
    module, _, _ = MODELS["qwen2"]()
    run, backend = compiled(module, "_native_math", dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 9)):
            ids, mask = torch.randint(5, 50, (batch, length)), torch.ones(batch, length, dtype=torch.long)
            assert relative(run(ids, mask), copy.deepcopy(module).double()(ids, mask)) < 1e-5
    assert {(site.chosen, site.call.kv_heads) for site in backend.report.sites} == {("_native_math", 2)}


def test_sites_that_feed_one_another():
    def step(q, k, v):
        first = (q @ k.mT / 4).softmax(-1) @ v
        second = F.scaled_dot_product_attention(first, k, v)
        return (second @ k.mT / 4).softmax(-1) @ v

    query, key, value = qkv()
    run, backend = compiled(step, "_native_math")
    assert relative(run(query, key, value), step(*map(doubled, (query, key, value)))) < 1e-5
    assert [site.chosen for site in backend.report.sites] == ["_native_math"] * 3
    assert [site.call.written_as for site in backend.report.sites] == ["operations", "sdpa", "operations"]


@pytest.mark.parametrize("where", ["query", "scaled query", "mask"])
def test_what_is_written_into_meanwhile(where):
    """A swapped kernel reads its inputs at the place of the output. It cannot read an input that was written to before that."""

    def step(q, k, v, m):
        q, m = q.clone(), m.clone()
        scores = (q * 0.5 if where == "scaled query" else q) @ k.mT + m
        (m if where == "mask" else q).zero_()
        return scores.softmax(-1) @ v + q.sum() + m.sum()

    tensors = [*qkv(), torch.randn(2, 1, 7, 11)]
    run, backend = compiled(step, "_native_math")
    assert relative(run(*tensors), step(*map(doubled, tensors))) < 1e-5
    chosen = [site.chosen for site in backend.report.sites]
    assert chosen == (["_native_math"] if where == "scaled query" else [])


def test_an_operand_that_was_scaled_in_place():
    def step(q, k, v):
        q = q.clone()
        q *= 0.5
        k = k.clone()
        k.mul_(0.5)
        return (q @ k.mT).softmax(-1) @ v

    site = only_site(step, *qkv())
    assert site.call.scale == 1.0


def test_in_checkpoint_and_cond():
    def body(q, k, v):
        return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v

    def step(q, k, v):
        q = torch.utils.checkpoint.checkpoint(body, q, k, v, use_reentrant=False)
        return torch.cond(q.sum() > 0, body, lambda q, k, v: body(q, k, v) * 2, (q, k, v))

    query, key, value = qkv()
    run, backend = compiled(step, "_native_math", inner="aot_eager")
    assert relative(run(query, key, value), step(query, key, value)) < 1e-5
    assert [site.chosen for site in backend.report.sites] == ["_native_math"] * 3


def test_inside_a_transform_it_stays():
    def step(q, k, v):
        return torch.func.vmap(lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v)(q, k, v)

    query, key, value = qkv()
    run, backend = compiled(step, "_native_math")
    assert relative(run(query, key, value), step(query, key, value)) < 1e-5
    (site,) = backend.report.sites
    assert "torch.func.vmap" in site.refusals[0][1].detail


def test_explain_changes_nothing():
    module, arguments, calls = MODELS["sliced_attn_processor"]()
    with torch.no_grad():
        report = attnrewrite.explain(module, *arguments, backend="_native_math")
    assert [sizes(site) for site in report.sites] == calls
    assert {site.call.written_as for site in report.sites} == {"operations"}
    assert attnrewrite.Report.from_json(report.to_json()).sites == report.sites


def test_a_shared_bias_is_built_once():
    module, arguments, _ = MODELS["t5_encoder"]()
    graphs = []
    run, _ = compiled(module, "_native_math", inner=seen(graphs))
    with torch.no_grad():
        run(*arguments)
    sums = [node for node in graphs[0].graph.nodes if node.target is torch.Tensor.add or node.target is operator.add]
    wide = [node for node in sums if node.meta["example_value"].shape == (2, 3, 7, 7)]
    built = [node for node in graphs[0].graph.nodes if node.target == "add" and node.op == "call_method"]
    assert len(wide) + len(built) == 1


def test_numerics_exact_leaves_it():
    backend = attnrewrite.with_backend("native", numerics="exact", inner="eager")
    run, _ = compiled(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend)
    query, key, value = qkv()
    assert torch.equal(run(query, key, value), (query @ key.mT).softmax(-1) @ value)
    assert backend.report.sites[0].refusals[0][1].code is Code.NUMERICS


def lowered(function, *tensors):
    """The graph that AOTAutograd lowers a function to."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep_graph(graph_module, example_inputs):
        graphs.append(graph_module)
        return make_boxed_func(graph_module.forward)

    with torch.no_grad():
        torch.compile(function, backend=aot_autograd(fw_compiler=keep_graph), fullgraph=True)(*tensors)
    return graphs[0]


@pytest.mark.parametrize("mask", [None, "bias", "causal"])
def test_a_kernel_that_pytorch_has_chosen(mask):
    bias = torch.randn(2, 1, 7, 11) if mask == "bias" else None

    def step(q, k, v, bias=bias):
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask == "causal", scale=0.3)

    tensors = qkv()
    reference = step(*map(doubled, (*tensors, bias)))
    lowered_ = lowered(step, *tensors)
    inputs = [each for each in (*tensors, bias) if each is not None]
    assert len(inputs) == len(list(lowered_.graph.find_nodes(op="placeholder")))
    for kernel in ("_native_math", "flex", "native"):
        graph_module = copy.deepcopy(lowered_)
        outcome = rewrite_graph(graph_module, attnrewrite.with_backend(kernel).policy)
        (site,) = outcome.plan.sites
        assert (site.chosen, site.call.written_as, outcome.unchanged) == (kernel, "kernel", int(kernel == "native"))
        (output,) = graph_module(*inputs)
        assert relative(output, reference) < 1e-5


FORMS = ("plain", "boolean", "bias", "causal", "grouped")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning")  # torch.export's own
def test_sdpa_that_was_decomposed():
    """Core ATen has no SDPA. Its decomposition gives zeros for rows without any key."""

    class Attend(nn.Module):
        def forward(self, q, k, v, m):
            outputs = []
            for form in FORMS:
                mask = {"boolean": m, "bias": m.to(q.dtype)}.get(form)
                keys, values = (each[:, :2] if form == "grouped" else each for each in (k, v))
                options = {"is_causal": form == "causal", "enable_gqa": form == "grouped", "scale": 0.3}
                outputs.append(F.scaled_dot_product_attention(q, keys, values, mask, **options))
            return torch.stack(outputs)

    tensors = qkv()
    mask = keep(2, 1, 7, 11)
    mask[1, :, 3] = False
    program = torch.export.export(Attend(), (*tensors, mask)).run_decompositions()
    assert "scaled_dot_product" not in str(program.graph)
    references = Attend()(*map(doubled, tensors), mask)
    for kernel in ("_native_math", "native"):
        graph_module = program.module()
        outcome = rewrite_graph(graph_module, attnrewrite.with_backend(kernel).policy)
        assert [(site.chosen, site.call.kv_heads) for site in outcome.plan.sites] == [
            (kernel, 2 if form == "grouped" else 4) for form in FORMS
        ]
        assert all(site.call.scale == pytest.approx(0.3) for site in outcome.plan.sites)
        for form, output, reference in zip(FORMS, graph_module(*tensors, mask), references, strict=True):
            assert relative(output, reference) < 1e-5, form
        assert softmaxes(graph_module.graph) == []
        assert not [node for node in graph_module.graph.nodes if "eq" in node.name or "any" in node.name]


def test_a_kernel_whose_log_sum_exp_is_used_stays():
    def step(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)

    run, backend = compiled(
        lambda q, k, v: step(q, k, v)[:2], attnrewrite.with_backend("_native_math", "native", inner="eager")
    )
    tensors = qkv()
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), step(*tensors)[:2], strict=True))
    (site,) = backend.report.sites
    assert site.chosen == "native"
    assert "its kernel's other results are used" in site.refusals[0][1].detail


def test_a_graph_is_rewritten_once():
    """A rewrite does not find the kernels that a rewrite has inserted."""
    graphs = []
    run, _ = compiled(lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v, "_native_flash", inner=seen(graphs))
    run(*qkv())
    assert not rewrite_graph(graphs[0], attnrewrite.with_backend("_native_math").policy).plan.sites


def test_a_sum_of_sums_is_walked_once():
    """Scores that are added to themselves, again and again, are a tree of a million leaves."""

    def step(q, k, v):
        scores = q @ k.mT
        for _ in range(20):
            scores = scores * 0.3 + scores * 0.2
        return scores.softmax(-1) @ v

    (site,), same = stays(step, *qkv())
    assert "its attention scores are used elsewhere" in site.refusals[0][1].detail
    assert same


@pytest.mark.parametrize("how", ["tiled heads", "keys of one batch", "values of one batch"])
def test_repetitions_that_are_no_groups(how):
    """Head i reads key head i % 2 where heads are tiled; SDPA's groups are i // 2."""

    def step(q, k, v):
        if how == "tiled heads":
            k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        elif how == "keys of one batch":
            k = k[:1].expand(2, -1, -1, -1)
        else:
            v = v[:1].expand(2, -1, -1, -1)
        return (q @ k.mT / 4).softmax(-1) @ v

    tensors = qkv(kv_heads=2 if how == "tiled heads" else 4)
    site = only_site(step, *tensors, kernels=("_native_math", "native"))
    assert (site.call.batch, site.call.heads, site.call.kv_heads) == (2, 4, 4)


@pytest.mark.parametrize("folded_", [False, True])
def test_a_bias_of_part_of_the_batch(folded_):
    """Windows in the batch, each with a bias of its own, as in Swin."""

    def step(q, k, v, m):
        scores = q @ k.mT / 4
        scores = (scores.view(3, 5, 4, 7, 11) + m).view(15, 4, 7, 11) if folded_ else scores + m
        return scores.softmax(-1) @ v

    lead = (15, 4) if folded_ else (3, 5, 4)
    tensors = torch.randn(*lead, 7, 16), torch.randn(*lead, 11, 16), torch.randn(*lead, 11, 16)
    site = only_site(step, *tensors, torch.randn(5, 1, 7, 11), kernels=("_native_math", "native", "flex"))
    assert (site.call.batch, site.call.heads) == (15, 4)


@pytest.mark.parametrize("first", [True, False])
def test_a_bias_that_is_a_product_too(first):
    """Relative positions: queries times a table. The keys are those of the other product."""

    def step(q, k, v, table):
        bias, scores = torch.einsum("bhqd,qkd->bhqk", q, table), q @ k.mT
        return (bias + scores if first else scores + bias).softmax(-1) @ v

    site = only_site(step, *qkv(), torch.randn(7, 11, 16))
    assert sizes(site) == (2, 4, 4, 7, 11, 16, 16)
    assert site.call.mask.shape == (2, 4, 7, 11)
