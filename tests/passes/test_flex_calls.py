"""A model's own calls of flex_attention: read as SDPA's words, or reported with a reason."""

import math

import pytest
import torch
from parity import TOLERANCE, compiled, doubled, relative
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import attnrewrite
from attnrewrite.graphs.notes import is_ours
from attnrewrite.kernels.machines import satisfies

BATCH, HEADS, Q_LEN, KV_LEN, DIM = 2, 6, 5, 11, 8
INF = math.inf

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(kv_heads=HEADS, q_len=Q_LEN, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shapes = ((HEADS, q_len), (kv_heads, KV_LEN), (kv_heads, KV_LEN))
    return [torch.randn(BATCH, *shape, DIM, dtype=dtype, device=device) for shape in shapes]


def run(function, inputs, kernel="_native_math", dynamic=False, inner="eager"):
    """The one site, and the relative error against float64 eager."""
    torch._dynamo.reset()
    with torch.no_grad():
        call, backend = compiled(function, kernel, inner, dynamic)
        output = call(*inputs)
        reference = function(*map(doubled, inputs))
    (site,) = backend.report.sites
    return site, relative(output, reference)


def modified(score_mod):
    """flex with a function of the score that captures a tensor."""
    return lambda query, key, value, captured: flex_attention(
        query, key, value, score_mod=lambda *given: score_mod(*given, captured), enable_gqa=True
    )


def causal(score, b, h, q, kv, _):
    return torch.where(q >= kv, score, -INF)


def lower_right(score, b, h, q, kv, _):
    return torch.where(q + (KV_LEN - Q_LEN) >= kv, score, -INF)


def window(score, b, h, q, kv, _):
    return torch.where((q - kv <= 3) & (kv <= q), score, -INF)


def bias(score, b, h, q, kv, table):
    return score + table[b, h, q, kv]


def transposed(score, b, h, q, kv, table):
    return score - table[kv, q]  # of a larger table


def one_by_one(score, b, h, q, kv, table):
    return score + table[b][h][q][kv]


def slopes(score, b, h, q, kv, slope):
    return score * 2 + slope[h] * (kv - q)


def relative_positions(score, b, h, q, kv, table):
    return score + table[h, kv - q + Q_LEN]


def scaled_bias(score, b, h, q, kv, table):
    return (score + table[b, h, q, kv]) / 4


def padding(score, b, h, q, kv, keep):
    return torch.where(keep[b, kv], score, -INF)


def documents(score, b, h, q, kv, ids):
    return torch.where(ids[b, q] == ids[b, kv], score, -INF)


def causal_bias(score, b, h, q, kv, table):
    return torch.where(q >= kv, score + table[b, h, q, kv], -INF)


def strides(score, b, h, q, kv, _):
    return torch.where(~(q % 3 < kv % 3), score, -INF)


def slopes_of_alibi(score, b, h, q, kv, _):
    return score + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (kv - q)


TABLE = torch.randn(BATCH, HEADS, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(1))
READ = {
    causal: (None, "causal", Q_LEN),
    lower_right: (None, "causal lower-right", Q_LEN),
    window: (None, "sliding window", KV_LEN),
    bias: (TABLE, "additive", Q_LEN),
    transposed: (TABLE[0, 0].repeat(2, 2).mT.contiguous(), "additive", Q_LEN),
    one_by_one: (TABLE, "additive", Q_LEN),
    strides: (None, "boolean", Q_LEN),
    slopes_of_alibi: (None, "additive", Q_LEN),
    slopes: (TABLE[0, :, 0, 0], "additive", Q_LEN),
    relative_positions: (TABLE[0].reshape(HEADS, -1), "additive", Q_LEN),
    scaled_bias: (TABLE, "additive", Q_LEN),
    padding: (TABLE[:, 0, 0] > -0.5, "key padding", Q_LEN),
    documents: (torch.arange(KV_LEN).repeat(BATCH, 1) // 4, "blocks", KV_LEN),
    causal_bias: (TABLE, "additive", Q_LEN),
}


SYMBOLIC = (lower_right, window, bias, relative_positions, documents)


@pytest.mark.parametrize(
    ("score_mod", "dynamic"), [*((each, False) for each in READ), *((each, True) for each in SYMBOLIC)]
)
def test_functions_of_the_score_become_masks(score_mod, dynamic):
    captured, kind, q_len = READ[score_mod]
    captured = torch.zeros(1) if captured is None else captured
    site, error = run(modified(score_mod), [*tensors(kv_heads=2, q_len=q_len), captured], dynamic=dynamic)
    if not dynamic or score_mod is not lower_right:  # Q_LEN is a number, the lengths are symbols
        assert site.call.mask.kind == kind
    assert (site.chosen, site.call.written_as, site.call.kv_heads) == ("_native_math", "flex", 2)
    assert error < TOLERANCE[torch.float32]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_without_functions_it_is_a_plain_attention_and_leaves_nothing_behind(inner):
    nodes = []

    def look(graph_module, example_inputs):
        nodes.extend(graph_module.graph.nodes)
        return torch._dynamo.lookup_backend(inner)(graph_module, example_inputs)

    backend = attnrewrite.with_backend("_native_math", inner=look)
    site, error = run(lambda *given: flex_attention(*given, scale=0.3), tensors(), kernel=backend)
    assert (site.chosen, site.call.scale, site.call.mask.kind) == ("_native_math", 0.3, "none")
    assert error < TOLERANCE[torch.float32]
    assert not [node for node in nodes if "vmap" in str(node.target) or node.target is torch.ones]


@pytest.mark.skipif(
    satisfies(torch.__version__, "<2.10"), reason="it warns in a way that Dynamo of torch 2.9 does not trace"
)
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_log_sum_exp_that_nobody_reads_is_no_reader(inner):
    site, error = run(lambda q, k, v: flex_attention(q, k, v, return_lse=True)[0], tensors(), inner=inner)
    assert site.chosen == "_native_math"
    assert error < TOLERANCE[torch.float32]


def test_native_makes_it_a_call_of_sdpa():
    site, error = run(modified(causal), [*tensors(), torch.zeros(1)], kernel="native")
    assert (site.chosen, site.swapped) == ("native", True)
    assert error < TOLERANCE[torch.float32]


def test_auto_leaves_a_mask_to_flex():
    site, _ = run(modified(bias), [*tensors(), TABLE], kernel="auto")
    ((_, refused),) = site.refusals
    assert site.chosen is None
    assert refused.detail == "auto: flex computes this mask in its kernel, SDPA would read it from memory"
    assert run(modified(causal), [*tensors(), torch.zeros(1)], kernel="auto")[0].chosen == "native"


def test_a_refused_call_stays_flex_without_the_masks():
    graphs = []
    backend = attnrewrite.with_backend("_native_cudnn", inner=lambda module, _: graphs.append(module) or module.forward)
    site, error = run(modified(slopes), [*tensors(), TABLE[0, :, 0, 0]], kernel=backend)
    assert site.chosen is None
    nodes = list(graphs[0].graph.nodes)
    assert torch.ops.higher_order.flex_attention in [node.target for node in nodes]
    assert not [node for node in nodes if is_ours(node)]
    assert error < TOLERANCE[torch.float32]


BLOCKS = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, Q_LEN, KV_LEN, device="cpu")
# Its mask_mod says causal, its lists of blocks say that nothing is hidden.
BY_HAND = BlockMask.from_kv_blocks(
    torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32),
    torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32),
    mask_mod=lambda b, h, q, kv: q >= kv, seq_lengths=(Q_LEN, KV_LEN),
)  # fmt: skip
LEFT = {
    "block_mask": (lambda q, k, v: flex_attention(q, k, v, block_mask=BLOCKS), "it has a block_mask"),
    "by_hand": (lambda q, k, v: flex_attention(q, k, v, block_mask=BY_HAND), "it has a block_mask"),
    "tanh": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s / 20) * 20),
        "its score_mod computes tanh of the score",
    ),
    "squared": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s),
        "its score_mod computes mul of the score",
    ),
    "constant": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: (i + j).to(s.dtype)),
        "its score_mod does not use the score",
    ),
    "negative": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * -1.0),
        "its score_mod computes mul of the score",
    ),
    "bias_as_fill": (
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -3.0)),
        "its score_mod computes where of the score",
    ),
    "log_sum_exp": (
        lambda q, k, v: sum(each.mean() for each in flex_attention(q, k, v, return_lse=True)),
        "its log-sum-exp or its largest scores are read",
    ),
    "options": (
        lambda q, k, v: flex_attention(q, k, v, kernel_options={"BLOCK_M": 64}),
        "its kernel_options set BLOCK_M",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_a_mask_is_reported_and_stays(name):
    function, reason = LEFT[name]
    if name == "log_sum_exp" and satisfies(torch.__version__, "<2.10"):
        pytest.skip("it warns in a way that Dynamo of torch 2.9 does not trace")
    site, error = run(function, tensors())
    assert site.chosen is None
    assert site.call.obstacle.startswith(reason)
    assert error < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("score_mod", [causal, bias, scaled_bias, padding], ids=lambda each: each.__name__)
def test_gradients(score_mod):
    """flex has no backward on a CPU. `scaled_bias` and `bias` learn their table."""
    given = READ[score_mod][0]
    inputs = [*tensors(device="cuda"), torch.zeros(1, device="cuda") if given is None else given.cuda()]

    def grads(function, cast):
        leaves = [cast(each.detach().clone()) for each in inputs]
        leaves = [each.requires_grad_(each.is_floating_point()) for each in leaves]
        function(*leaves).square().sum().backward()
        return [each.grad for each in leaves if each.grad is not None]

    call, backend = compiled(modified(score_mod), "_native_math", "aot_eager")
    found = grads(call, lambda each: each)
    (site,) = backend.report.sites
    assert site.chosen == "_native_math"
    for have, want in zip(found, grads(modified(score_mod), doubled), strict=True):
        assert relative(have, want) < 1e-4
