"""FlashAttention 4 under boolean masks, of which it gets lists of blocks: on a stand-in, and the library itself on a GPU."""

from dataclasses import replace

import pytest
import torch
from parity import attend, compiled, doubled, on_this_gpu, qkv, relative
from stand_ins import compiler, machine_for

import attnrewrite
from attnrewrite import AttentionCall, Code, Mask, MaskKind
from attnrewrite.planning import registry
from attnrewrite.planning.reasons import decide

HALF = 1.2e-2  # rounding to bfloat16
(RECORD,) = registry.records_of("flash_4")
LENGTHS = ((300, 300), (130, 391), (257, 128), (1, 200), (77, 141))
SIZES = {"batch": 3, "heads": 6, "dim": 64, "dtype": torch.bfloat16}


def documents(q_len, kv_len, device):
    rows, columns = (torch.arange(size, device=device) for size in (q_len, kv_len))
    return (rows[:, None] // 100 == columns // 100) & (columns < 380)  # rows without a key, and whole blocks of them


def prefix(q_len, kv_len, device):
    rows, columns = (torch.arange(size, device=device) for size in (q_len, kv_len))
    return (rows[:, None] >= columns) | (columns < 90)


def random(q_len, kv_len, device):
    """Another mask for each batch element and head."""
    return torch.rand(SIZES["batch"], SIZES["heads"], q_len, kv_len, device=device) > 0.5


def for_heads(q_len, kv_len, device):
    """The same for every query, another for each head: some heads see nothing."""
    seen = torch.rand(1, SIZES["heads"], 1, kv_len, device=device) > 0.7
    seen[:, 0] = False
    return seen


def queries(q_len, kv_len, device):
    """The same for every key."""
    return torch.rand(SIZES["batch"], 1, q_len, 1, device=device) > 0.3


def turned(q_len, kv_len, device):
    """Columns lie behind one another in memory."""
    return prefix(kv_len, q_len, device).T


def everything(q_len, kv_len, device):
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device)


MASKS = {each.__name__: each for each in (documents, prefix, random, for_heads, queries, turned, everything)}


def right(backend, tensors, mask, **arguments):
    run, _ = compiled(lambda *given: attend(*given, **arguments), backend)
    with torch.no_grad():
        output = run(*tensors, mask)
    (site,) = backend.report.sites
    assert site.chosen == "flash_4", site.refusals
    reference = attend(*(tensor.double().cpu() for tensor in tensors), mask.cpu(), **arguments)
    assert relative(output.cpu(), reference) < HALF
    rows = ~mask.expand(len(output), SIZES["heads"], *mask.shape[-2:]).any(-1)
    hidden = rows.expand(-1, -1, output.shape[1]).transpose(1, 2).cpu()
    assert not output.unflatten(-1, (SIZES["heads"], -1)).cpu()[hidden].any()
    return site


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(stand_ins, mask, lengths):
    tensors = qkv(q_len=lengths[0], kv_len=lengths[1], **SIZES)
    site = right(compiler(stand_ins(RECORD)), tensors, MASKS[mask](*lengths, "cpu"))
    padding = site.call.mask.kind is MaskKind.KEY_PADDING  # one row
    assert site.decisions[0][1].steps[0].name == ("pack_keys" if padding else "skip_blocks")


def test_inductor_does_not_see_the_sort(stand_ins):
    """Its Triton kernel for it unrolls every step (kernels/block_lists.py)."""
    targets = []

    def inner(graph_module, example_inputs):
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    right(compiler(stand_ins(RECORD), inner), qkv(q_len=300, kv_len=300, **SIZES), prefix(300, 300, "cpu"))
    assert targets.count("attnrewrite.block_order.default") == 2
    assert not [target for target in targets if "sort" in target]


def test_grouped_heads_and_a_scale(stand_ins):
    tensors = qkv(q_len=130, kv_len=300, kv_heads=2, **SIZES)
    right(compiler(stand_ins(RECORD)), tensors, random(130, 300, "cpu"), enable_gqa=True, scale=0.3)


def proven(query, key, value, numbers, valid):
    """Documents, causal within what takes part, and padding of queries and keys, as the graph proves them of its inputs."""
    position = torch.arange(query.shape[2], device=query.device)
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    both = valid[:, None, :, None] & valid[:, None, None, :]
    causal = (position[:, None] >= position)[None, None] & valid[:, None, None]
    return torch.stack([attend(query, key, value, mask) for mask in (same, causal, both)])


KINDS = (MaskKind.BLOCKS, MaskKind.CAUSAL_PADDING, MaskKind.QUERY_KEY_PADDING)


def of_proven_kinds(backend, device):
    tensors = qkv(q_len=300, kv_len=300, device=device, **SIZES)
    numbers = torch.arange(300, device=device) // torch.tensor([[100], [37], [299]], device=device)
    valid = torch.arange(300, device=device) < torch.tensor([[300], [123], [128]], device=device)
    run, _ = compiled(proven, backend)
    with torch.no_grad():
        output = run(*tensors, numbers, valid)
    assert [site.call.mask.kind for site in backend.report.sites] == list(KINDS)
    assert [site.chosen for site in backend.report.sites] == ["flash_4"] * 3
    assert relative(output, proven(*map(doubled, tensors), numbers, valid)) < HALF


def test_proven_kinds(stand_ins):
    of_proven_kinds(compiler(stand_ins(RECORD)), "cpu")


@pytest.mark.parametrize(
    ("needs_grad", "dim", "capability", "code"),
    [
        (True, 64, (9, 0), Code.GRAD),
        (False, 136, (9, 0), Code.HEAD_DIM),
        (False, 64, (10, 0), Code.MASK),
        (False, 64, (9, 0), None),
    ],
)
def test_what_is_refused_under_a_mask(stand_ins, needs_grad, dim, capability, code):
    tensors = [each.requires_grad_(needs_grad) for each in qkv(q_len=40, kv_len=50, **SIZES | {"dim": dim})]
    machine = replace(machine_for(RECORD), capability=capability)
    backend = attnrewrite.AttentionCompiler(attnrewrite.make_policy([stand_ins(RECORD)]), "eager", machine)
    output = compiled(attend, backend)[0](*tensors, prefix(40, 50, "cpu"))
    (site,) = backend.report.sites
    assert [refused.code for _, refused in site.refusals] == ([code] if code else [])
    assert relative(output, attend(*map(doubled, tensors), prefix(40, 50, "cpu"))) < HALF


def test_a_ring_s_step_is_refused_under_a_mask():
    mask = Mask(MaskKind.BOOLEAN, "bool", (1, 1, 64, 64))
    for logsumexp, code in ((True, Code.MASK), (False, None)):
        call = AttentionCall("", 2, 4, 4, 64, 64, 64, 64, "bfloat16", "cuda", mask, logsumexp=logsumexp)
        decision = decide(RECORD, call, machine_for(RECORD), attnrewrite.Numerics.REORDERED)
        assert getattr(decision, "code", None) is code


# -- on a GPU


@pytest.fixture
def gpu():
    on_this_gpu("flash_4")


def on_gpu(inner="eager"):
    return attnrewrite.with_backend("flash_4", inner=inner)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
class TestLibrary:
    @pytest.mark.parametrize("lengths", [*LENGTHS, (1111, 2100)])
    @pytest.mark.parametrize("mask", MASKS)
    def test_masks(self, gpu, mask, lengths):
        tensors = qkv(q_len=lengths[0], kv_len=lengths[1], device="cuda", **SIZES)
        right(on_gpu(), tensors, MASKS[mask](*lengths, "cuda"))

    @pytest.mark.parametrize("dim", [40, 72, 96, 128])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_head_dims(self, gpu, dim, dtype):
        tensors = qkv(q_len=300, kv_len=391, device="cuda", **SIZES | {"dim": dim, "dtype": dtype})
        right(on_gpu(), tensors, documents(300, 391, "cuda"))

    @pytest.mark.parametrize("dims", [(64, 128), (128, 64)])
    def test_other_value_dims(self, gpu, dims):
        tensors = qkv(q_len=300, kv_len=391, device="cuda", value_dim=dims[1], **SIZES | {"dim": dims[0]})
        right(on_gpu(), tensors, documents(300, 391, "cuda"))

    @pytest.mark.parametrize("inner", ["eager", "inductor"])
    def test_grouped_heads_and_a_scale(self, gpu, inner):
        tensors = qkv(q_len=130, kv_len=300, kv_heads=2, device="cuda", **SIZES)
        right(on_gpu(inner), tensors, random(130, 300, "cuda"), enable_gqa=True, scale=0.3)

    @pytest.mark.parametrize("inner", ["eager", "inductor"])
    def test_proven_kinds(self, gpu, inner):
        of_proven_kinds(on_gpu(inner), "cuda")

    def test_a_mask_of_more_than_2_to_the_31_scores(self, gpu):
        length = 46_400
        tensors = qkv(batch=1, heads=1, q_len=length, kv_len=length, dim=64, dtype=torch.bfloat16, device="cuda")
        position = torch.arange(length, device="cuda")
        mask = position[:, None] // 5000 == position // 5000
        run, backend = compiled(attend, on_gpu())
        with torch.no_grad():
            output = run(*tensors, mask)
            last = attend(*(tensor[:, :, -1400:].double() for tensor in tensors))
        assert backend.report.sites[0].chosen == "flash_4"
        assert relative(output[:, -1400:], last) < HALF
