"""What a decision asked about sizes comes back as a guard: graphs counted on both sides of every limit."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import FLEX_TAKES_MASKS, attend, qkv, relative
from torch.utils._pytree import tree_leaves

import attnrewrite
from attnrewrite import Backend, Code, HeadDim, MaskKind, Refused, holds


def toy(query, key, value, prepared, *, call):
    """Attention written out; causal is lower-right."""
    scale = (query.new_ones(()) * query.shape[-1]).rsqrt()
    scores = query @ key.transpose(-2, -1) * scale
    if call.mask.kind is not MaskKind.NONE:
        rows = torch.arange(query.shape[2], device=query.device)[:, None]
        columns = torch.arange(key.shape[2], device=query.device)
        seen = columns <= rows + key.shape[2] - query.shape[2]
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ value


TOY = Backend(
    name="toy",
    family="tests",
    op=toy,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float32"}),
    masks=frozenset({MaskKind.NONE, MaskKind.CAUSAL_LOWER_RIGHT}),
)


def steps_of_16(call, machine):
    if holds(call.kv_len % 16 == 0):
        return None
    return Refused(Code.LENGTH, f"toy takes kv_len in multiples of 16, this is {call.kv_len}", "Pad the keys")


def short(call, machine):
    if holds(call.q_len <= 128):
        return None
    return Refused(Code.LENGTH, f"toy takes q_len up to 128, this is {call.q_len}", "Choose another kernel")


GPU = attnrewrite.Machine("cuda", (9, 0), {"torch": "2.13.0", "cudnn": "9.19.0"})


class Counting:
    """An inner compiler that counts the graphs it gets, and how often each of them runs."""

    def __init__(self):
        self.runs = []

    def __call__(self, graph_module, example_inputs):
        number = len(self.runs)
        self.runs.append(0)

        def run(*inputs):
            self.runs[number] += 1
            return graph_module(*inputs)

        return run

    @property
    def graphs(self):
        return len(self.runs)


class Compiled:
    """A function compiled through one record, called with sizes; each call is compared with the unchanged function."""

    def __init__(self, record, dynamic=True, **arguments):
        self.inner = Counting()
        self.backend = attnrewrite.with_backend(record, inner=self.inner)
        self.function = lambda *tensors: attend(*tensors, **arguments)
        self.run = torch.compile(self.function, backend=self.backend, dynamic=dynamic, fullgraph=True)

    def __call__(self, *mask, **sizes):
        """The number of the graph that ran, and what was chosen in it."""
        tensors = (*qkv(**({"heads": 5, "q_len": 70, "kv_len": 64, "dim": 24} | sizes)), *mask)
        before = list(self.inner.runs)
        assert relative(self.run(*tensors), self.function(*tensors)) < 1e-5
        after = self.inner.runs
        (ran,) = (number for number, runs in enumerate(after) if runs != ([*before, 0])[number])
        assert len(self.backend.report.graphs) == self.inner.graphs
        return ran, self.chosen[ran]

    @property
    def chosen(self):
        return [site.chosen for site in self.backend.report.sites]

    def refused(self, number):
        ((_, refused),) = self.backend.report.sites[number].refusals
        return refused


def test_multiples():
    calls = Compiled(replace(TOY, checks=(steps_of_16,)))
    for kv_len in (64, 32, 48, 96):
        assert calls(kv_len=kv_len) == (0, "toy")
    for kv_len in (40, 47, 65):
        assert calls(kv_len=kv_len) == (1, None)
    for kv_len, expected in ((80, (0, "toy")), (81, (1, None)), (16, (0, "toy"))):
        assert calls(kv_len=kv_len) == expected
    assert calls.refused(1).code is Code.LENGTH
    assert calls.inner.runs == [6, 4]


def test_a_refused_length_comes_first():
    calls = Compiled(replace(TOY, checks=(steps_of_16,)))
    assert calls(kv_len=40) == (0, None)
    assert calls(kv_len=41) == (0, None)
    assert calls(kv_len=48) == (1, "toy")
    assert calls(kv_len=50) == (0, None)
    assert calls(kv_len=160) == (1, "toy")


def test_an_upper_limit():
    calls = Compiled(replace(TOY, checks=(short,)))
    for q_len, expected in (
        (70, (0, "toy")),
        (3, (0, "toy")),
        (128, (0, "toy")),
        (129, (1, None)),
        (300, (1, None)),
        (127, (0, "toy")),
        (130, (1, None)),
    ):
        assert calls(q_len=q_len) == expected, q_len
    assert "up to 128" in calls.refused(1).detail


def test_two_limits_make_a_graph_for_each_answer():
    calls = Compiled(replace(TOY, checks=(short, steps_of_16)))
    assert calls(q_len=100, kv_len=64) == (0, "toy")
    assert calls(q_len=100, kv_len=65) == (1, None)
    assert calls(q_len=200, kv_len=48) == (2, None)
    assert calls(q_len=200, kv_len=50) == (2, None)  # refused for q_len: kv_len was never asked about
    assert calls(q_len=90, kv_len=66) == (1, None)
    assert calls(q_len=90, kv_len=32) == (0, "toy")
    assert calls.inner.graphs == 3


def test_lower_right_causal():
    """For an upper-left call only where there are as many keys as queries."""
    calls = Compiled(TOY, is_causal=True)
    for q_len, kv_len, expected in (
        (64, 64, (0, "toy")),
        (40, 40, (0, "toy")),
        (40, 48, (1, None)),
        (48, 40, (1, None)),
        (33, 33, (0, "toy")),
        (34, 35, (1, None)),
    ):
        assert calls(q_len=q_len, kv_len=kv_len) == expected, (q_len, kv_len)
    assert calls.refused(1).code is Code.CAUSAL


def test_lower_right_causal_refused_first():
    calls = Compiled(TOY, is_causal=True)
    for q_len, kv_len, expected in ((40, 48, (0, None)), (41, 41, (1, "toy")), (50, 49, (0, None)), (9, 9, (1, "toy"))):
        assert calls(q_len=q_len, kv_len=kv_len) == expected, (q_len, kv_len)


# Between them these cross every limit of this file. That values get another width than keys is a graph of Dynamo's own.
SIZES = ({}, {"kv_len": 65}, {"q_len": 300}, {"dim": 40}, {"batch": 3, "q_len": 3, "heads": 7}, {"value_dim": 33},
         {"q_len": 64}, {"value_dim": 34, "kv_len": 16, "heads": 9}, {"dim": 17, "kv_len": 17})  # fmt: skip


@functools.cache
def plain_graphs(is_causal=False):
    """How many graphs Dynamo makes of the function for SIZES by itself."""
    torch.compiler.reset()
    inner = Counting()
    run = torch.compile(lambda *given: attend(*given, is_causal=is_causal), backend=inner, dynamic=True)
    for sizes in SIZES:
        run(*qkv(**({"heads": 5, "q_len": 70, "kv_len": 64, "dim": 24} | sizes)))
    torch.compiler.reset()
    return inner.graphs


def test_without_a_limit_nothing_is_asked():
    graphs = plain_graphs()
    calls = Compiled(replace(TOY, value_dim=True, gqa=True))
    assert {calls(**sizes)[1] for sizes in SIZES} == {"toy"}
    assert calls.inner.graphs == graphs


STATIC = {
    "dtype": ({"dtypes": frozenset({"float16"})}, Code.DTYPE),
    "device": ({"devices": frozenset({"cuda"})}, Code.DEVICE),
    "package": ({"requires": {"no-such-kernel": ">=1"}}, Code.MISSING),
}


@pytest.mark.parametrize("fact", STATIC)
def test_idle_questions_cost_nothing(fact):
    """A call that is refused anyway is never compiled again for a size, on either side of any limit."""
    fields, code = STATIC[fact]
    graphs = plain_graphs()
    calls = Compiled(replace(TOY, checks=(short, steps_of_16), head_dim=HeadDim(max=32), **fields))
    assert {calls(**sizes)[1] for sizes in SIZES} == {None}
    assert calls.refused(0).code is code
    assert calls.inner.graphs == graphs


def test_active_questions_cost_a_graph_for_each_answer():
    """The counterpart of the test above: the same sizes, the same limits, and nothing static against it."""
    graphs = plain_graphs()
    calls = Compiled(replace(TOY, checks=(short, steps_of_16), head_dim=HeadDim(max=32)))
    assert {calls(**sizes)[1] for sizes in SIZES} == {"toy", None}
    assert calls.inner.graphs > graphs


def test_idle_questions_of_flex():
    """Refused because lengths are symbols, for a mask tensor: no length is asked about."""
    calls = Compiled("flex")
    for q_len, kv_len in ((70, 64), (300, 129), (5, 6)):
        assert calls(torch.rand(2, 1, 1, kv_len) > 0.4, q_len=q_len, kv_len=kv_len) == (0, None)
    assert calls.refused(0).code is (Code.MASK if FLEX_TAKES_MASKS else Code.VERSION)


def test_values_as_wide_as_keys():
    """The one question of PyTorch's CPU kernel."""
    calls = Compiled("_native_flash")
    assert calls(dim=24) == (0, "_native_flash")
    assert calls(dim=40, q_len=300, kv_len=7) == (0, "_native_flash")
    assert calls(dim=24, value_dim=40) == (1, None)
    assert calls(dim=16, value_dim=17) == (1, None)
    assert calls(dim=17) == (0, "_native_flash")
    assert calls.refused(1).code is Code.VALUE_DIM


@pytest.mark.parametrize("kernel", ["_native_math", "native"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernels_for_any_size(kernel, is_causal):
    graphs = plain_graphs(is_causal=is_causal)
    calls = Compiled(kernel, is_causal=is_causal)
    assert {calls(**sizes)[1] for sizes in SIZES} == {kernel}
    assert calls.inner.graphs == graphs


LENGTHS = [(70, 64), (128, 128), (3, 65), (129, 64), (300, 100), (300, 129), (129, 300), (100, 129), (3, 200)]


def test_lengths_of_flex():
    calls = Compiled("flex")
    assert {calls(q_len=q_len, kv_len=kv_len) for q_len, kv_len in LENGTHS} == {(0, "flex")}


def test_lengths_of_causal_flex():
    """Its block lists are one block long or longer: a graph for each, of queries and of keys."""
    calls = Compiled("flex", is_causal=True)
    graphs = {}
    for q_len, kv_len in LENGTHS:
        ran, chosen = calls(q_len=q_len, kv_len=kv_len)
        assert chosen == "flex"
        graphs.setdefault((q_len > 128, kv_len > 128), set()).add(ran)
    assert len(graphs) == 4
    assert {len(ran) for ran in graphs.values()} == {1}


def test_head_dims_of_flex():
    """The scale is a number in the operator, so a head dim is one too, unless the model gives the scale: then all wide heads
    have one graph, and narrow ones another (`_odd` in backends/flex.py)."""
    calls, scaled_calls = Compiled("flex"), Compiled("flex", scale=0.3)
    for number, (dim, scaled_number) in enumerate(((24, 0), (40, 0), (17, 1))):
        assert calls(dim=dim) == (number, "flex")
        assert scaled_calls(dim=dim) == (scaled_number, "flex")


def test_a_number_computed_from_a_symbolic_size():
    """An op is plain PyTorch code: it may compute its scale from a size that is a symbol."""
    calls = Compiled(replace(TOY, op=scaled))
    assert [calls(dim=dim) for dim in (24, 40, 17)] == [(0, "toy")] * 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_head_dims(dynamic):
    """A limit on a size that is static where dynamic=False: a graph for each size, a graph for each side."""
    calls = Compiled(replace(TOY, head_dim=HeadDim(max=32)), dynamic)
    asked = (16, 24, 32, 33, 48, 16, 48)
    ran = [calls(dim=dim) for dim in asked]
    assert [chosen for _, chosen in ran] == ["toy" if dim <= 32 else None for dim in asked]
    numbers = [0, 0, 0, 1, 1, 0, 1] if dynamic else [0, 1, 2, 3, 4, 0, 4]
    assert [number for number, _ in ran] == numbers
    assert "up to 32" in calls.refused(numbers[3]).detail


@pytest.mark.parametrize("given", [{}, {"scale": 0.3}], ids=["no scale", "scale"])
def test_padded_head_dims_under_a_limit(given):
    """Three graphs: not padded, padded, too wide. The scale of a padded head dim is a number, unless the model gives one:
    then each of them has its own graph."""
    calls = Compiled(replace(TOY, op=scaled_by_the_call, head_dim=HeadDim(max=32, multiple=8, pad=True)), **given)
    ran = [calls(dim=dim) for dim in (24, 16, 20, 27, 32, 33, 40, 8, 20)]
    assert [chosen for _, chosen in ran] == ["toy"] * 5 + [None] * 2 + ["toy"] * 2
    assert [number for number, _ in ran] == ([0, 0, 1, 1, 0, 2, 2, 0, 1] if given else [0, 0, 1, 2, 0, 3, 3, 0, 1])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_padded_head_dim_that_is_symbolic(inner):
    """The padding is cut off the output by a slice, whose symbolic length must be a node of the graph."""
    record = replace(TOY, op=scaled_by_the_call, head_dim=HeadDim(multiple=8, pad=True))
    backend = attnrewrite.with_backend(record, inner=inner)
    run = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for dim in (24, 20, 27):
        tensors = qkv(heads=5, dim=dim)
        assert relative(run(*tensors, scale=0.3), attend(*tensors, scale=0.3)) < 1e-5
    assert len(backend.report.graphs) == 2


def test_numbers_in_a_graph_are_nodes_or_known():
    """With symbolic lengths, no argument in the graph (as of a GPU kernel's bias) is a symbol without a node."""
    left = []

    def inner(graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            leaves = [part for leaf in tree_leaves((node.args, node.kwargs)) for part in parts_of(leaf)]
            left.extend((node.name, leaf) for leaf in leaves if isinstance(leaf, torch.SymInt | torch.SymFloat))
        return no_values(graph_module, example_inputs)

    for kernel in ("_native_efficient", "_native_cudnn", "flex"):
        torch.compiler.reset()
        backend = attnrewrite.AttentionCompiler(attnrewrite.make_policy([kernel]), inner, GPU)
        run = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
        query, key, value, mask = (tensor.half() for tensor in (*qkv(heads=5, dim=20), torch.randn(2, 1, 7, 11)))
        run(query, key, value, mask)
        assert backend.report.sites[0].chosen == kernel
    assert left == []


def parts_of(leaf):
    return (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,)


def scaled_by_the_call(query, key, value, prepared, *, call):
    """`toy` with the scale of the call, where the call has one: the scale of the head dim before padding."""
    if call.scale is None:
        return toy(query, key, value, prepared, call=call)
    return torch.softmax(query @ key.transpose(-2, -1) * call.scale, -1) @ value


def scaled(query, key, value, prepared, *, call):
    return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, -1) @ value


def test_the_first_call_decides_what_is_symbolic():
    """With dynamic=None sizes are static until they change; the limit holds all the same."""
    calls = Compiled(replace(TOY, checks=(steps_of_16,)), dynamic=None)
    chosen = [calls(kv_len=kv_len)[1] for kv_len in (64, 48, 40, 32, 41, 80)]
    assert chosen == ["toy", "toy", None, "toy", None, "toy"]
    assert calls.inner.graphs == 3  # 64; multiples of 16; others


def test_grouped_heads():
    inner = Counting()
    backend = attnrewrite.with_backend(TOY, inner=inner)
    run = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for heads, kv_heads, graphs in ((4, 4, 1), (6, 6, 1), (6, 2, 2), (9, 3, 2), (5, 5, 2)):
        tensors = qkv(heads=heads, kv_heads=kv_heads, q_len=7, kv_len=12, dim=24)
        output = run(*tensors, enable_gqa=True)
        assert relative(output, attend(*tensors, enable_gqa=True)) < 1e-5
        assert inner.graphs == graphs, (heads, kv_heads)
    assert [site.chosen for site in backend.report.sites] == ["toy", None]
    assert backend.report.sites[1].refusals[0][1].code is Code.GQA


def test_the_next_choice_takes_what_the_first_refuses():
    inner = Counting()
    backend = attnrewrite.with_backend(replace(TOY, checks=(steps_of_16,)), "_native_math", inner=inner)
    run = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for kv_len in (64, 48, 40, 41, 32):
        tensors = qkv(heads=5, kv_len=kv_len, dim=24)
        assert relative(run(*tensors), attend(*tensors)) < 1e-5
    assert [site.chosen for site in backend.report.sites] == ["toy", "_native_math"]
    assert inner.runs == [3, 2]


def test_a_strict_policy_raises_where_the_limit_is_crossed():
    inner = Counting()
    backend = attnrewrite.with_backend(replace(TOY, checks=(steps_of_16,)), inner=inner, strict=True)
    run = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for kv_len in (64, 48):
        run(*qkv(heads=5, kv_len=kv_len, dim=24))
    with pytest.raises(Exception, match="no kernel that may take them") as caught:
        run(*qkv(heads=5, kv_len=40, dim=24))
    assert "LENGTH" in str(caught.value)
    run(*qkv(heads=5, kv_len=32, dim=24))
    assert inner.runs == [3]


# -- one model, several backends


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projections = torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x):
        query, key, value = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in self.projections)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def alternately(*backends, times=3):
    """One model compiled through each, and run in turns."""
    model, x = Layer(), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = model(x)
        compiled = [torch.compile(model, backend=backend, fullgraph=True) for backend in backends]
        for _ in range(times):
            for run in compiled:
                assert relative(run(x), expected) < 1e-5


def test_two_backends_on_one_model():
    inner = Counting()
    one, other = (attnrewrite.with_backend(name, inner=inner) for name in ("_native_math", "_native_flash"))
    alternately(one, other)
    assert inner.runs == [3, 3]
    assert [[site.chosen for site in each.report.sites] for each in (one, other)] == [
        ["_native_math"],
        ["_native_flash"],
    ]


def test_equal_backends_share_a_compilation():
    inner = Counting()
    one, other = (attnrewrite.with_backend("_native_math", inner=inner) for _ in range(2))
    assert (one == other, hash(one) == hash(other), one is other) == (True, True, False)
    alternately(one, other)
    assert inner.runs == [6]
    assert [len(each.report.graphs) for each in (one, other)] == [1, 0]
    assert "share compiled code" in str(other.report)


@pytest.mark.parametrize(
    "other",
    [
        {"choices": ["_native_flash"]},
        {"choices": ["_native_math", "flex"]},
        {"rules": {"self": "flex"}},
        {"strict": True},
        {"numerics": "quantised"},
        {"inner": Counting()},
        {"inner": "eager"},
        {"choices": [replace(TOY, name="_native_math")]},
    ],
    ids=lambda other: "".join(other),
)
def test_backends_that_differ_are_not_equal(other):
    def made(choices=("_native_math",), inner="aot_eager", **arguments):
        return attnrewrite.with_backend(*choices, inner=inner, **arguments)

    assert made() == made()
    assert made() != made(**other)
    assert made(**other) == made(**other)


def test_records_of_ones_own_that_differ_in_a_package_are_not_equal():
    """`requires` is a mapping, so it is no part of the hash; it is part of what is equal."""
    one, other = (replace(TOY, requires=requires) for requires in ({"torch": ">=2"}, {"torch": ">=99"}))
    inner = Counting()
    first, second = (attnrewrite.with_backend(record, inner=inner) for record in (one, other))
    assert first != second
    alternately(first, second)
    assert [[site.chosen for site in each.report.sites] for each in (first, second)] == [["toy"], [None]]


# -- sizes that data decides


def ragged(scores, query, key, value, mask=None):
    """Attention over the keys that are wanted: their number is known when the graph runs. (Without the bound Dynamo itself
    does not trace the attention.)"""
    (wanted,) = torch.nonzero(scores > 0, as_tuple=True)
    torch._check(wanted.shape[0] >= 1)
    mask = mask if mask is None else mask[..., wanted]
    return F.scaled_dot_product_attention(query, key[:, :, wanted], value[:, :, wanted], mask)


def run_ragged(record, *mask):
    """The site of a graph whose kv_len data decides, run with two of them."""
    inner = Counting()
    backend = attnrewrite.with_backend(record, inner=inner)
    query, key, value = qkv(q_len=7, kv_len=40)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(ragged, backend=backend, fullgraph=True)
        for seed in (1, 2):
            scores = torch.randn(40, generator=torch.Generator().manual_seed(seed))
            given = (scores, query, key, value, *mask)
            assert relative(run(*given), ragged(*given)) < 1e-5
    assert inner.runs == [2]
    (site,) = backend.report.sites
    return site


MASKS = {
    "none": lambda: (),
    "boolean": lambda: (torch.rand(2, 1, 7, 40) > 0.3,),
    "key padding": lambda: (torch.rand(2, 1, 1, 40) > 0.3,),
    "additive": lambda: (torch.randn(7, 40),),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex", "native"])
def test_data_dependent_lengths(kernel, mask):
    """Taken where the bound answers every question."""
    site = run_ragged(kernel, *MASKS[mask]())
    if kernel == "flex" and mask != "none":
        boolean = mask != "additive"
        code = Code.VERSION if boolean and not FLEX_TAKES_MASKS else Code.MASK
        assert [refused.code for _, refused in site.refusals] == [code]
    else:
        assert site.chosen == kernel


def test_a_question_that_data_decides():
    site = run_ragged(replace(TOY, checks=(steps_of_16,)))
    assert site.chosen is None
    ((_, refused),) = site.refusals
    assert refused.code is Code.UNBACKED
    assert "u0" in refused.detail


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", ["_native_flash", "_native_efficient", "_native_cudnn", "flex"])
def test_data_dependent_lengths_of_gpu_kernels(kernel, mask):
    """Traced for a described GPU: taken, or refused with a reason; never an error of the compilation."""
    backend = attnrewrite.AttentionCompiler(attnrewrite.make_policy([kernel]), no_values, GPU)
    tensors = [tensor.half() if tensor.is_floating_point() else tensor for tensor in (*qkv(kv_len=40), *MASKS[mask]())]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(ragged, backend=backend, fullgraph=True)(torch.ones(40), *tensors)
    (site,) = backend.report.sites
    codes = {refused.code for _, refused in site.refusals}
    assert codes <= {Code.UNBACKED, Code.MASK}
    assert bool(codes) == (site.chosen is None)


def no_values(graph_module, example_inputs):
    return lambda *inputs: (inputs[0],)
