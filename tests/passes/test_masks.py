"""The meaning of a mask is proven from the graph alone, and the swapped kernel computes with exactly that mask."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fuzz import EveryKernel
from parity import TOLERANCE, qkv, relative, skip_if_fenced
from stand_ins import compiler
from torch.utils._pytree import tree_map

import attnrewrite
from attnrewrite import MaskKind
from attnrewrite.kernels.machines import satisfies
from attnrewrite.pipeline import rewrite_graph
from attnrewrite.planning import registry

BATCH, HEADS, Q_LEN, KV_LEN = 3, 4, 7, 11
CAUSAL_PADDING = "causal and key padding (3, 11)"
DENSE, BY_HEAD, SQUARE = "boolean (3, 1, 7, 11)", "boolean (3, 4, 1, 11)", "boolean (3, 1, 11, 11)"
ONE_ROW = "additive (3, 1, 1, 11)"
inf = float("inf")


def valid(length=KV_LEN):
    """Padding on the left, a hole, and a batch element without any key."""
    keep = torch.ones(BATCH, length, dtype=torch.bool)
    keep[0, :3], keep[1, 4:6], keep[1, -1], keep[2] = False, False, False, False
    return keep


def behind(m):
    """Positions from a length on."""
    return torch.arange(m.shape[1]) >= m.sum(1)[:, None]


def joined(m):
    return torch.cat([m[:, :8], m.new_ones(m.shape[0], m.shape[1] - 8)], dim=1)


def filled_in_place(m, q):
    mask = torch.zeros(m.shape, dtype=q.dtype)
    mask.masked_fill_(~m, -inf)
    return mask[:, None, None]


def over_heads(mask, q):
    """As diffusers' `prepare_attention_mask` does it."""
    return mask[:, None].repeat_interleave(q.shape[1], dim=0).view(q.shape[0], q.shape[1], -1, mask.shape[-1])


def lowest(q):
    return torch.finfo(q.dtype).min


# Each: (m, q) -> mask. m is boolean, (batch, kv_len).
KEY_PADDING = {
    "None": lambda m, q: m[:, None, None, :],
    "unsqueeze": lambda m, q: m.unsqueeze(1).unsqueeze(2),
    "expand": lambda m, q: m[:, None, None].expand(-1, q.shape[1], q.shape[2], -1),
    "view, repeat": lambda m, q: m.view(m.shape[0], 1, 1, -1).repeat(1, q.shape[1], q.shape[2], 1),
    "over heads": over_heads,
    "permute": lambda m, q: m.t().reshape(m.shape[1], 1, 1, m.shape[0]).permute(3, 1, 2, 0),
    "reversed batch of one more": lambda m, q: F.pad(m, (0, 0, 1, 0), value=True)[1:, None, None],
    "cat": lambda m, q: torch.cat([m[:, :8], torch.ones(BATCH, m.shape[1] - 8, dtype=torch.bool)], 1)[:, None, None],
    "cat, new_ones": lambda m, q: joined(m)[:, None, None],
    "pad": lambda m, q: F.pad(m[:, 1:], (1, 0), value=True)[:, None, None],
    "not": lambda m, q: ~(~m)[:, None, None],
    "logical_not": lambda m, q: torch.logical_not(m.logical_not().view(m.shape[0], 1, 1, -1)),
    "ones": lambda m, q: m[:, None, None] & torch.ones(q.shape[2], m.shape[1], dtype=torch.bool),
    "lengths": lambda m, q: (torch.arange(m.shape[1]) < m.sum(-1, keepdim=True))[:, None, None],
    "masked_fill of ones": lambda m, q: torch.ones_like(m).masked_fill(behind(m), False)[:, None, None],
    "gathered": lambda m, q: m[torch.arange(BATCH)[:, None, None, None], torch.arange(KV_LEN)[None, None, None]],
    "int and back": lambda m, q: (m.int() * 3)[:, None, None] > 0,
    "two of them": lambda m, q: (m & (torch.arange(KV_LEN) != 9))[:, None, None],
    "static": lambda m, q: (torch.arange(KV_LEN) < 5)[None, None, None],
    "set": lambda m, q: set_(m)[:, None, None],
    "beyond 2**24, and a float": lambda m, q: ((torch.arange(KV_LEN) + (1 << 25) < 33554437.5) & m)[:, None, None],
}  # fmt: skip
ADDITIVE = {
    "where": lambda m, q: torch.where(m, 0.0, -inf)[:, None, None],
    "where of tensors": lambda m, q: torch.where(m[:, None, None], q.new_zeros(()), torch.tensor(-inf, dtype=q.dtype)),
    "masked_fill": lambda m, q: torch.zeros(m.shape, dtype=q.dtype).masked_fill(~m, -inf)[:, None, None],
    "masked_fill_": filled_in_place,
    "expanded": lambda m, q: q.new_zeros(m.shape).masked_fill(m.logical_not(), -inf)[:, None, None].expand(-1, 4, 7, -1),
}  # fmt: skip
FINITE = {
    "-10000": lambda m, q: ((1 - m.to(q.dtype)) * -10000.0)[:, None, None],
    "-10000 over heads": lambda m, q: over_heads((1 - m.to(q.dtype)) * -10000.0, q),
    "-1e9 of half": lambda m, q: ((1.0 - m[:, None, None].float()) * -1e5),
    "rsub": lambda m, q: torch.rsub(m.to(q.dtype), 1).mul(-10000)[:, None, None],
    "finfo.min": lambda m, q: ((1.0 - m.to(q.dtype)) * lowest(q))[:, None, None],
    "masked_fill, finfo.min": lambda m, q: q.new_zeros(m.shape).masked_fill(~m, lowest(q))[:, None, None],
    "inverted": lambda m, q: (lambda i: i.masked_fill(i.bool(), lowest(q)))(1.0 - m[:, None, None].to(q.dtype)),
}  # fmt: skip


def set_(m):
    mask = torch.zeros(m.shape, dtype=torch.bool)
    mask[:, :6] = True
    mask[0, 7:] = True
    mask[2] = m[1]
    return mask


OUTER = {
    "and": lambda m, q: m[:, None, :, None] & m[:, None, None, :],
    "mul": lambda m, q: m[:, None, None, :] * m[:, None, :, None],
    "repeat, transpose": lambda m, q: (lambda r: r & r.transpose(2, 3))(m.view(BATCH, 1, 1, -1).repeat(1, 1, m.shape[1], 1)),
    "floats": lambda m, q: (m.float()[:, None, None] * m.float()[:, None, :, None]) > 0,
    "ints": lambda m, q: (m.long().unsqueeze(1) * m.long().unsqueeze(2)).bool()[:, None].expand(-1, 4, -1, -1),
    "joined": lambda m, q: OUTER["and"](joined(m), q),
    "padded": lambda m, q: OUTER["and"](F.pad(m[:, 2:], (2, 0), value=False), q),
    "of two": lambda m, q: m[:, None, None] & (m[:, None, :, None] & (m.flip(0)[:, None, :, None])),
    "additive": lambda m, q: torch.where(m[:, None, :, None] & m[:, None, None], 0.0, -inf),
}  # fmt: skip


def upper(q_len, kv_len, **given):
    return torch.full((q_len, kv_len), -inf, **given).triu(1)


def positions(q_len, kv_len):
    return torch.arange(q_len)[:, None], torch.arange(kv_len)


def ahead(q, k):
    return torch.lt(*positions(q.shape[2], k.shape[2]))


CAUSAL = {
    "tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(),
    "triu": lambda q, k: ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(diagonal=1),
    "tril of floats": lambda q, k: torch.tril(torch.ones(q.shape[2], k.shape[2])) == 1,
    "ge": lambda q, k: torch.ge(*positions(q.shape[2], k.shape[2])),
    "gt": lambda q, k: (torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]) < 0.5,
    "-inf": lambda q, k: upper(q.shape[2], k.shape[2])[None, None],
    "finfo.min": lambda q, k: torch.full((q.shape[2], k.shape[2]), lowest(q)).triu(1).expand(BATCH, 1, -1, -1),
    "masked_fill_": lambda q, k: torch.zeros(q.shape[2], k.shape[2]).masked_fill_(ahead(q, k), -inf),
    "bfloat16 positions": lambda q, k: torch.ge(*(each.bfloat16() for each in positions(q.shape[2], k.shape[2]))),
    "int8 positions": lambda q, k: torch.ge(*(each.to(torch.int8) + 100 for each in positions(q.shape[2], k.shape[2]))),
}  # fmt: skip
LOWER_RIGHT = {
    "tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]),
    "ge": lambda q, k: torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] >= torch.arange(k.shape[2]),
    "slice": lambda q, k: torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()[-q.shape[2] :],
    "-inf": lambda q, k: torch.full((q.shape[2], k.shape[2]), -inf).triu(k.shape[2] - q.shape[2] + 1),
}


def distance(q):
    rows, columns = positions(q.shape[2], q.shape[2])
    return rows - columns


STRUCTURE = {
    "window": (lambda m, q: distance(q).abs() <= 3, "sliding window (3, 3)"),
    "strict window": (lambda m, q: distance(q).abs() < 3, "sliding window (2, 2)"),
    "causal window": (lambda m, q: (distance(q) >= 0) & (distance(q) < 4), "sliding window (3, 0)"),
    "one side": (lambda m, q: distance(q) <= 2, "sliding window (2, all)"),
    "ahead": (lambda m, q: distance(q) >= -2, "sliding window (all, 2)"),
    "additive window": (lambda m, q: torch.zeros(11, 11).masked_fill(distance(q).abs() > 4, -inf), "sliding window (4, 4)"),
    "finite window": (lambda m, q: torch.where(distance(q).abs() > 4, -1e4, 0.0), "sliding window (4, 4)"),
    "triangles": (lambda m, q: torch.ones(11, 11, dtype=torch.bool).triu(-2).tril(1), "sliding window (2, 1)"),
    "documents of positions": (lambda m, q: (torch.arange(11) // 4)[:, None] == torch.arange(11) // 4, "blocks"),
    "causal padding": (lambda m, q: (distance(q) >= 0) & m[:, None, None], CAUSAL_PADDING),
    "causal padding, -inf": (lambda m, q: upper(11, 11) + torch.where(m, 0.0, -inf)[:, None, None], CAUSAL_PADDING),
    "causal padding, finite": (lambda m, q: torch.where((distance(q) >= 0) & m[:, None, None], 0.0, -1e4), CAUSAL_PADDING),
}  # fmt: skip
NOTHING = {
    "ones": lambda m, q: torch.ones(m.shape, dtype=torch.bool)[:, None, None],
    "zeros": lambda m, q: torch.zeros(q.shape[2], m.shape[1]),
    "zeros times": lambda m, q: torch.zeros(m.shape)[:, None, None] * -10000.0,
    "or": lambda m, q: (m | ~m)[:, None, None],
    "positions": lambda m, q: (torch.arange(11) < 11)[None, None, None],
    "full": lambda m, q: torch.full((11,), True)[None, None, None],
}


def attention(build):
    """As the model computes it, and the reference: the very same mask, everything else in float64."""

    def step(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, build(m, q))

    def reference(q, k, v, m):
        mask = build(m, q)
        mask = mask.double() if mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)

    return step, reference


# Kernels that share a dtype share a trace of Dynamo, which takes most of the time.
VARLEN = ("flash_varlen",)
KERNELS = (("_native_math", "_native_flash", "flex"), VARLEN)
DTYPES = {"flash_varlen": torch.bfloat16}


def tensors(kernel, q_len=Q_LEN):
    return qkv(BATCH, HEADS, q_len=q_len, kv_len=KV_LEN, dtype=DTYPES.get(kernel, torch.float32))


def backend_of(kernel, inner="eager"):
    if kernel == "flash_varlen":
        return compiler(registry.records_of(kernel)[0], inner)
    return attnrewrite.with_backend(kernel, inner=inner)


def right(kernels, build, said, q_len=Q_LEN, m=None, dynamic=False, inner="eager", chosen=True):
    """Asserts what the site's mask is said to be, that each kernel takes it (or leaves it), and what comes out. Returns the
    site of each kernel."""
    step, reference = attention(build)
    q, k, v = tensors(kernels[0], q_len)
    m = valid() if m is None else m
    every = EveryKernel({kernel: backend_of(kernel, inner) for kernel in kernels})
    run = torch.compile(step, backend=every, fullgraph=True, dynamic=dynamic)
    exact = reference(q, k, v, m)
    # SDPA itself loses digits of a score that it adds to -10000.
    own = relative(step(q, k, v, m), exact) if q.dtype == torch.float32 else 0
    sites = []
    for kernel, backend in every.backends.items():
        every.now = kernel
        with torch.no_grad():
            output = run(q, k, v, m)
        (site,) = backend.report.sites
        assert str(site.call.mask) == said, kernel
        if chosen:
            skip_if_fenced(site)
        assert site.chosen == (kernel if chosen else None), site.refusals
        assert relative(output, exact) < max(TOLERANCE[q.dtype], 2 * own), kernel
        sites.append(site)
    return sites


@pytest.fixture(params=KERNELS, ids="+".join)
def kernels(request, stand_ins):
    return request.param


@pytest.mark.parametrize("spelling", KEY_PADDING)
def test_key_padding(kernels, spelling):
    build = KEY_PADDING[spelling]
    said = "key padding (1, 11)" if spelling == "static" else "key padding (3, 11)"
    right(kernels, build, said)


@pytest.mark.parametrize("spelling", ADDITIVE)
def test_additive_key_padding(kernels, spelling):
    for site in right(kernels, ADDITIVE[spelling], "key padding (3, 11)"):
        assert site.call.mask.dtype != "bool"
        assert site.call.mask.no_key == "zeros"


@pytest.mark.parametrize("spelling", FINITE)
def test_finite_key_padding(kernels, spelling):
    for site in right(kernels, FINITE[spelling], "key padding (3, 11)"):
        assert site.call.mask.no_key == ("mean" if "finfo" in spelling or spelling == "inverted" else "all keys")


@pytest.mark.parametrize("spelling", OUTER)
def test_padding_of_queries_and_keys(kernels, spelling):
    right(kernels, OUTER[spelling], "padding of queries and keys", q_len=KV_LEN)


@pytest.mark.parametrize("q_len", [Q_LEN, KV_LEN])
@pytest.mark.parametrize("spelling", CAUSAL)
def test_causal(kernels, spelling, q_len):
    k = tensors(kernels[0], q_len)[1]
    taken = kernels != VARLEN or q_len == KV_LEN
    right(kernels, lambda m, q: CAUSAL[spelling](q, k), "causal", q_len, chosen=taken)


@pytest.mark.parametrize("spelling", LOWER_RIGHT)
def test_causal_lower_right(kernels, spelling):
    if not satisfies(
        torch.__version__, ">=2.13"
    ):  # flex on a CPU takes boolean masks from there on: no word for this one
        kernels = tuple(kernel for kernel in kernels if kernel != "flex")
    k = tensors(kernels[0])[1]
    right(kernels, lambda m, q: LOWER_RIGHT[spelling](q, k), "causal lower-right")
    torch.compiler.reset()
    right(kernels, lambda m, q: LOWER_RIGHT[spelling](q, k), "causal", KV_LEN)


@pytest.mark.parametrize("spelling", STRUCTURE)
def test_windows_documents_and_causal_padding(kernels, spelling):
    build, said = STRUCTURE[spelling]
    right(kernels, build, said, KV_LEN, chosen=kernels != VARLEN or said.startswith("sliding window"))


@pytest.mark.parametrize("spelling", NOTHING)
def test_masks_that_hide_nothing(kernels, spelling):
    for site in right(kernels, NOTHING[spelling], "none"):
        assert site.call.mask.kind is MaskKind.NONE


def test_documents(kernels):
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]).repeat(BATCH, 1)
    ids[1] += torch.arange(KV_LEN) > 3

    def build(ids, q):
        return (ids[:, :, None] == ids[:, None, :])[:, None]

    right(kernels, build, "blocks", KV_LEN, ids, chosen=kernels != VARLEN)


def causal_from(start, dtype):
    queries, keys = ((torch.arange(length) + start).to(dtype) for length in (7, 11))
    return queries[:, None] >= keys


# Each: (m, q) -> mask, and what it must not be taken for.
NEAR = {
    "causal and one more": (lambda m, q: torch.ones(7, 11, dtype=torch.bool).tril(1), "boolean (7, 11)"),
    "upper triangle": (lambda m, q: torch.ones(7, 11, dtype=torch.bool).triu(), "boolean (7, 11)"),
    "a list of keys": (lambda m, q: torch.full((7, 11), -inf).triu(0)[:, [0]], "additive (7, 1)"),
    "without the diagonal, square": (lambda m, q: torch.ones(11, 11, dtype=torch.bool).tril(-1), "boolean (11, 11)"),
    "flipped": (lambda m, q: torch.arange(7).flip(0)[:, None] >= torch.arange(11), "boolean (7, 11)"),
    "every second": (lambda m, q: 2 * torch.arange(7)[:, None] >= torch.arange(11), "boolean (7, 11)"),
    "float32 beyond 2**24": (lambda m, q: causal_from(1 << 25, torch.float32), "boolean (7, 11)"),
    "float32 up to beyond 2**24": (lambda m, q: causal_from((1 << 24) - 5, torch.float32), "boolean (7, 11)"),
    "float64 beyond 2**53": (lambda m, q: causal_from(1 << 54, torch.float64), "boolean (7, 11)"),
    "float16 beyond 2048": (lambda m, q: causal_from(2050, torch.float16), "boolean (7, 11)"),
    "bfloat16 beyond 256": (lambda m, q: causal_from(300, torch.bfloat16), "boolean (7, 11)"),
    "int8 that wraps around": (lambda m, q: causal_from(120, torch.int8), "boolean (7, 11)"),
    "uint8 that wraps around": (lambda m, q: causal_from(-3, torch.uint8), "boolean (7, 11)"),
    "queries": (lambda m, q: m[:, None, :7, None], "boolean (3, 1, 7, 1)"),
    "queries or keys": (lambda m, q: m[:, None, :7, None] | m[:, None, None], DENSE),
    "a first key": (lambda m, q: (m[:, None, :7, None] & m[:, None, None]) | (torch.arange(11) == 0), DENSE),
    "lengths of queries": (lambda m, q: (torch.arange(11) < (m[:, :7] + 3).cumsum(-1)[..., None])[:, None], DENSE),
    "heads": (lambda m, q: m[:, None, None].repeat(1, 4, 1, 1) & (torch.arange(4) < 2)[:, None, None], BY_HEAD),
    "heads and keys mixed": (lambda m, q: m[:, None].expand(-1, 4, -1).reshape(3, 11, 4).transpose(1, 2)[:, :, None], BY_HEAD),
    "small": (lambda m, q: (1 - m.float())[:, None, None] * -100, ONE_ROW),
    "ones and zeros": (lambda m, q: m.float()[:, None, None], ONE_ROW),
    "large and positive": (lambda m, q: m.float()[:, None, None] * 10000, ONE_ROW),
    "two numbers": (lambda m, q: torch.where(m, torch.where(behind(m), -1e4, 0.0), -2e4)[:, None, None], ONE_ROW),
    "finite outer": (lambda m, q: torch.where(m[:, None, :7, None] & m[:, None, None], 0.0, -1e4), "additive (3, 1, 7, 11)"),
    "a bias too": (lambda m, q: torch.where(m, 0.0, -inf)[:, None, None] + 0.1 * torch.arange(11), ONE_ROW),
    "numbers": (lambda m, q: (1 - m.float().cumsum(-1))[:, None, None] * -10000, ONE_ROW),
}  # fmt: skip


@pytest.mark.parametrize("kernels", [("_native_math", "flex"), VARLEN], indirect=True, ids="+".join)
@pytest.mark.parametrize("case", NEAR)
def test_near_misses(kernels, case):
    build, said = NEAR[case]
    q_len = KV_LEN if "square" in case else Q_LEN
    right(kernels, build, said, q_len, chosen=kernels != VARLEN)


def turned(m):
    return m.transpose(-2, -1)


def put(m):
    m.logical_not_()
    return m.new_ones(m.shape)


# Functions that are one node of a graph, as einops before 0.8.2 puts its own there: the graph shows nothing of them.
same_, turned_, put_, flipped_, row_, joined_ = map(
    torch.compiler.allow_in_graph,
    (
        lambda m: m,
        lambda m: turned(m),
        put,
        lambda m: m.flip(-1),
        lambda m: m[:, None, None],
        lambda m, n: turned(m) | n,
    ),
)
untraced = torch._dynamo.nonstrict_trace(turned)


def triangle():
    return torch.ones(11, 11, dtype=torch.bool).tril()


def put_into(m):
    x = m.clone()
    put_(x)
    return x


def with_out(m):
    x = torch.zeros_like(m)
    torch.logical_or(m, behind(m), out=x)
    return x


# Each: (m, q) -> mask, and its kind.
OPAQUE = {
    "view of another rank": (lambda m, q: row_(m), "key padding (3, 11)"),
    "of a mask of rows": (lambda m, q: same_(m[:, None, None]), "key padding (3, 11)"),
    "a row that becomes a column": (lambda m, q: turned_(m.any(0, keepdim=True)), "boolean (11, 1)"),
    "causal, turned": (lambda m, q: turned_(triangle()), "boolean (11, 11)"),
    "causal, not traced": (lambda m, q: untraced(triangle()), "boolean (11, 11)"),
    "causal, flipped": (lambda m, q: flipped_(triangle()), "boolean (11, 11)"),
    "causal, as it is": (lambda m, q: same_(triangle()), "boolean (11, 11)"),
    "causal, negated": (lambda m, q: put_into(triangle()), "boolean (11, 11)"),
    "causal, left as it is for another": (lambda m, q: put_(triangle()), "boolean (11, 11)"),
    "causal, turned, then set": (lambda m, q: turned_(triangle()).logical_or_(distance(q) == 1), "boolean (11, 11)"),
    "of two tensors": (lambda m, q: joined_(triangle(), m[0]), "boolean (11, 11)"),
    "key padding, negated": (lambda m, q: put_into(m)[:, None, None], "key padding (3, 11)"),
    "out=": (lambda m, q: with_out(m)[:, None, None], "key padding (3, 11)"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)  # copies of its graph
@pytest.mark.parametrize("kernels", [("_native_math", "flex")], indirect=True, ids="+".join)
@pytest.mark.parametrize("case", OPAQUE)
def test_an_opaque_function_proves_nothing(kernels, case):
    build, said = OPAQUE[case]
    right(kernels, build, said, KV_LEN)


IDS = torch.randint(0, 3, (2, BATCH, KV_LEN))
GIVEN = {
    "additive": (lambda m, q: m[:, None, None].float(), torch.randn(BATCH, KV_LEN), ONE_ROW),
    "of ints": (lambda m, q: (1 - m.float())[:, None, None] * -10000, torch.randint(0, 2, (BATCH, KV_LEN)), ONE_ROW),
    "of floats": (lambda m, q: (1 - m)[:, None, None] * -10000, torch.rand(BATCH, KV_LEN), ONE_ROW),
    "two documents": (lambda m, q: m[0, :, None, :7, None] == m[1, :, None, None], IDS, DENSE),
    "not of a document": (lambda m, q: m[:, None, :, None] != m[:, None, None], IDS[0], SQUARE),
    "ints as booleans": (lambda m, q: m.bool()[:, None, None], torch.randint(0, 2, (BATCH, KV_LEN)), "key padding (3, 11)"),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_nothing_is_assumed_of_what_comes_from_outside(stand_ins, case):
    build, m, said = GIVEN[case]
    for kernels in (("_native_math", "flex"), VARLEN):
        torch.compiler.reset()
        taken = kernels != VARLEN or said.startswith("key padding")
        right(kernels, build, said, KV_LEN if "not of" in case else Q_LEN, m, chosen=taken)


ADVISED = {
    "int64": (lambda m, q: ((1 - m.to(q.dtype)) * -10000.0)[:, None, None], torch.int64),
    "float32": (lambda m, q: ((1 - m.to(q.dtype)) * -10000.0)[:, None, None], torch.float32),
    "its own dtype, over heads": (lambda m, q: over_heads((1.0 - m) * lowest(q), q), torch.bfloat16),
    "uint8, added": (lambda m, q: ((m.to(q.dtype) - 1) * 10000.0).view(BATCH, 1, 1, -1), torch.uint8),
}
NOT_ADVISED = {
    "a bias": (lambda m, q: m[:, None, None].to(q.dtype), torch.int64),
    "near zero": (lambda m, q: ((1 - m.to(q.dtype)) * -10.0)[:, None, None], torch.int64),
    "two inputs' worth": (
        lambda m, q: ((1 - m.to(q.dtype)) * m * -10000.0)[:, None, None] + q[:, :1, :, :1],
        torch.int64,
    ),
    "computed": (lambda m, q: ((1 - m.cumsum(-1).to(q.dtype)) * -10000.0)[:, None, None], torch.int64),
}


@pytest.mark.parametrize("case", [*ADVISED, *NOT_ADVISED])
def test_a_mask_of_zeros_and_ones_is_to_be_boolean(stand_ins, case):
    """Nothing is assumed of the numbers, and the refusal says which dtype proves more. It is true: right() says so."""
    build, dtype = {**ADVISED, **NOT_ADVISED}[case]
    backend, (q, k, v) = backend_of("flash_varlen"), tensors("flash_varlen")
    step, _ = attention(build)
    m = valid()
    m[2, 1] = True
    with torch.no_grad():
        torch.compile(step, backend=backend, fullgraph=True)(q, k, v, m.to(dtype))
    (site,) = backend.report.sites
    ((_, refused),) = site.refusals
    assert refused.code is attnrewrite.Code.MASK
    assert site.call.mask.kind is MaskKind.ADDITIVE
    assert refused.fix == (
        "If the model's mask holds only 0 and 1, pass it as torch.bool: then it is key padding"
        if case in ADVISED
        else "Add a kernel that takes this mask as the next choice"
    )
    again = attnrewrite.Site.from_dict(site.to_dict())
    assert again.call.mask.if_boolean is site.call.mask.if_boolean
    if case in ADVISED:
        right(
            VARLEN,
            lambda m, q: build(m.to(torch.int64) if case == "its own dtype, over heads" else m, q),
            "key padding (3, 11)",
            m=m,
        )


def test_nan_is_no_mask():
    """0 * -inf, where a key is to take part."""
    step, _ = attention(lambda m, q: (1 - m.float())[:, None, None] * -inf)
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    output = torch.compile(step, backend=backend, fullgraph=True)(*tensors("_native_math"), valid())
    assert output[:2].isnan().all()
    assert backend.report.sites[0].call.mask.kind is MaskKind.ADDITIVE


def test_autocast_makes_infinity_of_the_lowest_number():
    """float32's lowest number is out of bfloat16's range: SDPA casts it to -inf, and a row without a key gives zeros."""
    q, k, v = tensors("_native_math")

    def step(q, k, v, m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, FINITE["finfo.min"](m, q))

    for kernel in ("flex", "_native_math"):
        backend = attnrewrite.with_backend(kernel, inner="eager")
        output = torch.compile(step, backend=backend, fullgraph=True)(q, k, v, valid())
        (site,) = backend.report.sites
        assert (str(site.call.mask), site.call.mask.no_key) == ("key padding (3, 11)", "zeros")
        assert output[2].abs().max() == 0
        torch.compiler.reset()


# -- masks that are written into


def several(*masks):
    """Attention after attention, each with the mask that one of the functions makes or changes."""

    def step(q, k, v, m):
        outputs, held = [], {}
        for mask in masks:
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask(m, held)))
        return torch.stack(outputs)

    return step


def first(m, held):
    held["x"] = m.clone()
    held["view"] = held["x"][:, None, None]
    return held["view"]


def zeros(m, held):
    held["x"] = torch.zeros(m.shape)
    held["view"] = held["x"][:, None, None]
    return held["view"]


def then(change, read=lambda held: held["view"]):
    def mask(m, held):
        change(held["x"], m)
        return read(held)

    return mask


def set_column(x, m):
    x[:, 2] = False


def through_a_view(x, m):
    x[:, :4].fill_(False)


def narrowed(x, m):
    x &= torch.arange(11) < 7


def widened(x, m):
    x |= ~x


WRITTEN = {
    "set": ((first, then(set_column)), ["key padding (3, 11)"] * 2),
    "filled": ((first, then(lambda x, m: x.fill_(True))), ["key padding (3, 11)", "none"]),
    "filled through a view": ((first, then(through_a_view)), ["key padding (3, 11)"] * 2),
    "masked": ((zeros, then(lambda x, m: x.masked_fill_(~m, -inf))), ["none", "key padding (3, 11)"]),
    "masked and filled": (
        (zeros, then(lambda x, m: x.masked_fill_(~m, -inf)), then(lambda x, m: x.zero_())),
        ["none", "key padding (3, 11)", "none"],
    ),
    "added to": ((zeros, then(lambda x, m: x.add_(3.0))), ["none", "additive (3, 1, 1, 11)"]),
    "augmented": (
        (first, then(narrowed), then(widened)),
        ["key padding (3, 11)", "key padding (3, 11)", "none"],
    ),
    "out": (
        (first, then(lambda x, m: torch.logical_and(x, behind(m), out=x)), then(lambda x, m: x.logical_or_(~x))),
        ["key padding (3, 11)", "key padding (3, 11)", "none"],
    ),
    "copied": ((first, then(lambda x, m: x.copy_(m.flip(0)))), ["key padding (3, 11)"] * 2),
    "the input": ((lambda m, held: m[:, None, None], lambda m, held: m.fill_(True)[:, None, None]), None),
    "another": ((first, then(lambda x, m: x.copy_(m.flip(0)), lambda held: held["x"].logical_not()[:, None, None])), None),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_masks_written_into_between_sites(stand_ins, case):
    masks, said = WRITTEN[case]
    step, every = several(*masks), EveryKernel({kernel: backend_of(kernel) for kernel in ("_native_math", *VARLEN)})
    run = torch.compile(step, backend=every, fullgraph=True)
    q, k, v = tensors("flash_varlen")
    expected = step(q, k, v, valid())
    for kernel, backend in every.backends.items():
        every.now = kernel
        with torch.no_grad():
            output = run(q, k, v, valid())
        if said is not None:
            assert [str(site.call.mask) for site in backend.report.sites] == said
        assert relative(output, expected) < 2 * TOLERANCE[q.dtype], kernel


# -- one sort a mask


def counting(counted, name="argsort"):
    def inner(graph_module, example_inputs):
        counted.append(sum(name in str(node.target) for node in graph_module.graph.nodes))
        return graph_module.forward

    return inner


LAYERS = {
    "the same tensor": (lambda m, q, layer: m, 1),
    "a cat in each layer": (lambda m, q, layer: KEY_PADDING["cat"](m[:, 0, 0], q), 1),
    "additive in each layer": (lambda m, q, layer: over_heads((1 - m[:, 0, 0].to(q.dtype)) * -10000, q), 1),
    "in two spellings": (lambda m, q, layer: m if layer % 2 else (~torch.logical_not(m)).expand(-1, 4, -1, -1), 1),
    "outer in each layer": (lambda m, q, layer: m & m.transpose(-1, -2), 1),
    "another in each layer": (lambda m, q, layer: m & (torch.arange(KV_LEN) != layer), 5),
    "another number": (lambda m, q, layer: torch.where(m, 0.0, -1e4 - 1000 * layer).to(q.dtype), 1),
    "another answer for no key": (lambda m, q, layer: torch.where(m, 0.0, -inf if layer % 2 else -1e4).to(q.dtype), 2),
}


@pytest.mark.parametrize("case", LAYERS)
def test_equal_masks_are_packed_once(stand_ins, case):
    build, sorts = LAYERS[case]

    def step(q, k, v, m):
        for layer in range(5):
            q = q + F.scaled_dot_product_attention(q, k, v, build(m, q, layer))
        return q

    counted = []
    q, k, v = tensors("flash_varlen", KV_LEN)
    m = valid()[:, None, None]
    with torch.no_grad():
        backend = backend_of("flash_varlen", counting(counted))
        output = torch.compile(step, backend=backend, fullgraph=True)(q, k, v, m)
        assert {site.chosen for site in backend.report.sites} == {"flash_varlen"}
        assert counted == [sorts]
        assert relative(output, step(q, k, v, m)) < 3 * TOLERANCE[torch.bfloat16]


# -- symbolic sizes, gradients, exported graphs


DYNAMIC = {
    "cat": lambda m, q: torch.cat([m[:, :8], torch.ones(m.shape[0], m.shape[1] - 8, dtype=torch.bool)], 1)[:, None, None],
    "over heads": lambda m, q: over_heads((1 - m.to(q.dtype)) * -10000, q),
    "repeat": lambda m, q: m.view(m.shape[0], 1, 1, -1).repeat(1, q.shape[1], q.shape[2], 1),
    "joined": lambda m, q: torch.cat([m, m], 1)[:, : m.shape[1]].reshape(-1).view(m.shape[0], 1, 1, -1),
}  # fmt: skip


@pytest.mark.parametrize("spelling", [*DYNAMIC, "outer", "causal", "lower-right", "window"])
def test_symbolic_sizes(stand_ins, spelling):
    square = spelling in ("outer", "causal", "window")
    build = {
        **DYNAMIC,
        "outer": OUTER["and"],
        "causal": lambda m, q: torch.ones(q.shape[2], m.shape[1], dtype=torch.bool).tril(),
        "lower-right": lambda m, q: torch.ones(q.shape[2], m.shape[1], dtype=torch.bool).tril(m.shape[1] - q.shape[2]),
        "window": lambda m, q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(2),
    }[spelling]
    kinds = {"outer": "padding of queries and keys", "causal": "causal", "window": "sliding window (all, 2)",
             "lower-right": "causal lower-right"}  # fmt: skip
    step, reference = attention(build)
    every = EveryKernel({kernel: backend_of(kernel) for kernel in ("_native_math", *VARLEN)})
    run = torch.compile(step, backend=every, fullgraph=True, dynamic=True)
    for batch, q_len, kv_len in ((3, 7, 11), (2, 9, 17), (5, 13, 21)):
        q_len = kv_len if square else q_len
        q, k, v = qkv(batch, HEADS, q_len=q_len, kv_len=kv_len, dtype=torch.bfloat16)
        m = torch.rand(batch, kv_len) > 0.3
        for kernel in every.backends:
            every.now = kernel
            with torch.no_grad():
                assert relative(run(q, k, v, m), reference(q, k, v, m)) < TOLERANCE[q.dtype], kernel
    again = spelling == "lower-right" and not satisfies(torch.__version__, ">=2.11")  # its offset is guarded there
    for kernel, backend in every.backends.items():
        assert len(backend.report.graphs) == (2 if again else 1)
        site = backend.report.sites[-1]
        assert str(site.call.mask).startswith(kinds.get(spelling, "key padding"))
        skip_if_fenced(site)
        assert site.chosen == kernel


def test_float_positions_of_symbolic_sizes():
    """float32 positions are exact up to 2**24: one guard more, and no graph more until there."""

    def step(q, k, v, start):
        queries, keys = ((torch.arange(each.shape[2]) + start).float() for each in (q, k))
        return F.scaled_dot_product_attention(q, k, v, queries[:, None] >= keys)

    backend = attnrewrite.with_backend("_native_math", inner="eager")
    run = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for graphs, (q_len, kv_len, start) in enumerate([(7, 11, 1000), (9, 17, 3000), (13, 21, 1 << 25)]):
        q, k, v = qkv(2, HEADS, q_len=q_len, kv_len=kv_len)
        assert relative(run(q, k, v, start), step(q.double(), k.double(), v.double(), start)) < TOLERANCE[q.dtype]
        assert len(backend.report.graphs) == (2 if graphs == 2 else 1)
    assert [str(site.call.mask).partition(" ")[0] for site in backend.report.sites] == ["causal", "boolean"]


@pytest.mark.parametrize("build", [KEY_PADDING["cat"], FINITE["-10000"], ADDITIVE["where"], OUTER["and"]])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients(stand_ins, build, inner):
    step, _ = attention(build)
    given = [tensor.requires_grad_() for tensor in tensors("flash_varlen", KV_LEN)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    backend = backend_of("flash_varlen", inner)
    m = valid()
    torch.compile(step, backend=backend, fullgraph=True)(*given, m).square().sum().backward()
    mask = build(m, given[0])
    F.scaled_dot_product_attention(
        *exact, mask if mask.dtype == torch.bool else mask.double()
    ).square().sum().backward()
    assert backend.report.sites[0].chosen == "flash_varlen"
    for one, other in zip(given, exact, strict=True):
        assert relative(one.grad, other.grad) < 3e-2


def test_the_mean_of_all_values_has_another_gradient(stand_ins):
    """So a mask of finfo.min stays additive where a gradient is needed, and packed keys do not take it."""
    step, _ = attention(FINITE["finfo.min"])
    backend = backend_of("flash_varlen")
    given = [tensor.requires_grad_() for tensor in tensors("flash_varlen")]
    torch.compile(step, backend=backend, fullgraph=True)(*given, valid())
    (site,) = backend.report.sites
    assert (str(site.call.mask), site.chosen) == (ONE_ROW, None)


def test_a_learned_mask_is_left_alone():
    """Its gradient goes through the additive tensor."""
    bias = torch.zeros((), requires_grad=True)
    step, _ = attention(lambda m, q: torch.where(m, 0.0 * bias, -inf)[:, None, None])
    backend = attnrewrite.with_backend("_native_math", inner="eager")
    torch.compile(step, backend=backend, fullgraph=True)(*tensors("_native_math"), valid())
    assert str(backend.report.sites[0].call.mask) == ONE_ROW


class Exported(torch.nn.Module):
    """An attention for each mask: torch.export takes most of the time."""

    def __init__(self, builds):
        super().__init__()
        self.builds = builds

    def forward(self, q, k, v, m):
        return torch.stack([F.scaled_dot_product_attention(q, k, v, build(m, q)) for build in self.builds])


# What each mask is said to be: (length of the queries, {spelling: (build, said)}).
EXPORTED = {
    "key padding": (Q_LEN, {
        spelling: (build, "key padding (1, 11)" if spelling == "static" else "key padding (3, 11)")
        for spelling, build in KEY_PADDING.items()
    }),
    # torch.export lifts the constant of "where of tensors" out: it is a tensor from outside.
    "additive": (Q_LEN, {
        spelling: (build, ONE_ROW if spelling == "where of tensors" else "key padding (3, 11)")
        for spelling, build in (ADDITIVE | FINITE).items()
    }),
    "outer": (KV_LEN, {spelling: (build, "padding of queries and keys") for spelling, build in OUTER.items()}),
    "structure": (KV_LEN, STRUCTURE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("group", EXPORTED)
def test_exported_graphs(group, decomposed):
    q_len, masks = EXPORTED[group]
    builds, said = zip(*masks.values(), strict=True)
    given = (*tensors("_native_math", q_len), valid())
    with torch.no_grad():
        program = torch.export.export(Exported(builds), given)
        module = (program.run_decompositions({}) if decomposed else program).module()
        outcome = rewrite_graph(module, attnrewrite.make_policy(["_native_math"]))
        outputs = module(*given)
    assert [str(site.call.mask) for site in outcome.plan.sites] == list(said)
    assert [site.chosen for site in outcome.plan.sites] == ["_native_math"] * len(said)
    for spelling, build, output in zip(masks, builds, outputs, strict=True):
        assert relative(output, attention(build)[1](*given)) < 2e-3, spelling


# -- what real models ask for


def test_qwen_image_sorts_once(request):
    """Each of its blocks makes the mask anew."""
    pytest.importorskip("diffusers")
    from model_zoo import MODELS

    module, kwargs = MODELS["qwen_image"]()  # before the stand-ins: diffusers would take them for the real libraries
    request.getfixturevalue("stand_ins")
    exact = copy.deepcopy(module)
    counted = []
    backend = backend_of("flash_varlen", counting(counted))
    halved = tree_map(
        lambda each: each.bfloat16() if torch.is_tensor(each) and each.is_floating_point() else each, kwargs
    )
    with torch.no_grad():
        output = torch.compile(module.bfloat16(), backend=backend)(**halved)[0]
        expected = exact(**kwargs)[0]
    assert [site.chosen for site in backend.report.sites] == ["flash_varlen"] * 2
    assert counted == [1]
    assert relative(output, expected) < 5e-2  # a whole model in bfloat16


@pytest.mark.parametrize(
    ("kernel", "build", "said", "q_len"),
    [
        ("flex", FINITE["-10000 over heads"], "key padding (3, 11)", Q_LEN),
        ("flex", STRUCTURE["window"][0], "sliding window (3, 3)", KV_LEN),
        ("flash_varlen", FINITE["finfo.min"], "key padding (3, 11)", Q_LEN),
        ("flash_varlen", OUTER["and"], "padding of queries and keys", KV_LEN),
    ],
)
def test_under_inductor(stand_ins, kernel, build, said, q_len):
    right((kernel,), build, said, q_len, inner="inductor")
