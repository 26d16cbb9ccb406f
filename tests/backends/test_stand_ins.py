"""Every kernel of another package as its record declares it, through the compiled function, on stand-ins (tests/stand_ins).

`record` is each record; `kernel` one for each function that lands in a graph."""

import copy
import functools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from parity import attend, doubled, qkv, relative, windowed
from stand_ins import KERNELS, RECORDS, compiler, fewest_keys, is_sage_1, machine_for, name_of

from attnrewrite import AttentionCompiler, Code, Machine, MaskKind, make_policy
from attnrewrite.backends import flash_attention_4
from attnrewrite.backends.flash_attention_3 import flash_3, flash_3_fp8, flash_3_varlen
from attnrewrite.graphs.inner_compilers import records_cuda_graphs
from attnrewrite.kernels.logsumexp import WITH_LOGSUMEXP
from attnrewrite.kernels.packing import leading, packing

HALF = 1.2e-2  # rounding to bfloat16


@pytest.fixture(params=RECORDS, ids=name_of)
def record(request, stand_ins):
    return stand_ins(request.param)


@pytest.fixture(params=KERNELS, ids=name_of)
def kernel(request, stand_ins):
    return stand_ins(request.param)


def sizes(record, **given):
    return {"q_len": 7, "kv_len": max(11, fewest_keys(record)), "dim": 64, "dtype": torch.bfloat16} | given


def tensors_for(record, **given):
    return qkv(**sizes(record, **given))


@functools.cache
def trace(arguments, _kinds):
    """A list with what Dynamo makes of `attend` for tensors of some kinds: (graph, example inputs, the place of each input
    among the tensors). The first call of `compiled_by` fills it, and the kernels of all tests take copies: tracing takes most
    of the time, and a trace does not depend on the kernel."""
    return []


def compiled_by(backend, *tensors, **arguments):
    """The output of `attend`, compiled through a backend."""

    def keep(graph_module, example_inputs):
        def run(*inputs):
            places = [next(at for at, tensor in enumerate(tensors) if tensor is each) for each in inputs]
            kept.append((graph_module, example_inputs, places))
            return graph_module(*inputs)

        return run

    kinds = tuple(
        (each.shape, each.stride(), each.storage_offset(), each.dtype, each.requires_grad) for each in tensors
    )
    kept = trace(tuple(arguments.items()), (kinds, torch.is_grad_enabled()))
    if not kept:
        torch.compile(lambda *given: attend(*given, **arguments), backend=keep, fullgraph=True, dynamic=False)(*tensors)
    graph_module, example_inputs, places = kept[0]
    return backend(copy.deepcopy(graph_module), example_inputs)(*(tensors[place] for place in places))[0]


def run(record, *tensors, inner="eager", tolerance=HALF, numerics="quantised", cast=None, **arguments):
    """The site, and the relative error against float64 of the unchanged function. Only another inner compiler than "eager" goes
    through torch.compile as a whole."""
    backend = compiler(record, inner, numerics=numerics, cast=cast)
    with torch.no_grad():
        if inner == "eager":
            output = compiled_by(backend, *tensors, **arguments)
        else:
            function = torch.compile(lambda *given: attend(*given, **arguments), backend=backend, fullgraph=True)
            output = function(*tensors)
    (site,) = backend.report.sites
    error = relative(output, attend(*map(doubled, tensors), **arguments))
    return site, error, output


def right(record, *tensors, **arguments):
    site, error, output = run(record, *tensors, **arguments)
    assert site.chosen == record.name, site.refusals
    limit = record.tolerance.error if record.name == "_flash_3_fp8" else HALF  # its casts are real ones
    assert error < limit
    return site, output


def refused(record, code, *tensors, **arguments):
    site, error, _ = run(record, *tensors, **arguments)
    assert site.chosen is None
    assert site.refusals[0][1].code is code
    assert error < HALF


def test_dtypes(record):
    for name in sorted(record.dtypes):
        torch.compiler.reset()
        right(record, *tensors_for(record, dtype=getattr(torch, name)))


@pytest.mark.parametrize("inner", ["eager_noexcept", "inductor"])  # both through torch.compile
def test_plain(record, inner):
    site, _ = right(record, *tensors_for(record), inner=inner)
    assert site.source is not None
    assert str(record.source).split("@")[0] in site.source


def test_causal(record):
    if not any(kind.value.startswith("causal") for kind in record.masks):
        refused(record, Code.MASK, *tensors_for(record, q_len=64, kv_len=64), is_causal=True)
        return
    right(record, *tensors_for(record, q_len=64, kv_len=64), is_causal=True)


def test_causal_of_another_alignment(kernel):
    tensors = tensors_for(kernel, q_len=7, kv_len=64)
    if MaskKind.CAUSAL_UPPER_LEFT in kernel.masks and "sage" not in kernel.name:
        right(kernel, *tensors, is_causal=True)
    else:
        causal = any(kind.value.startswith("causal") for kind in kernel.masks)
        refused(kernel, Code.CAUSAL if causal else Code.MASK, *tensors, is_causal=True)


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_scale(kernel, scale):
    if kernel.name == "sage_blackwell_hub":
        refused(kernel, Code.SCALE, *tensors_for(kernel), scale=scale)
    else:
        right(kernel, *tensors_for(kernel), scale=scale)


@pytest.mark.parametrize("dim", [20, 72, 128])
def test_head_dims(kernel, dim):
    tensors = tensors_for(kernel, dim=dim)
    multiple = kernel.head_dim.multiple
    if dim % multiple and not kernel.head_dim.pad:
        refused(kernel, Code.HEAD_DIM, *tensors)
        return
    site, _ = right(kernel, *tensors)
    padded = -(-dim // multiple) * multiple
    expected = [("pad_head_dim", dim, padded), ("pad_value_dim", dim, padded)] if padded != dim else []
    assert [(step.name, step.before, step.after) for step in site.steps] == expected


def test_grouped_heads(kernel):
    tensors = tensors_for(kernel, heads=6, kv_heads=2)
    if kernel.gqa:
        right(kernel, *tensors, enable_gqa=True)
    else:
        refused(kernel, Code.GQA, *tensors, enable_gqa=True)


@pytest.mark.parametrize("pair", [(192, 128), (64, 128), (128, 64)])
def test_value_dim(kernel, pair):
    taken = kernel.value_dim
    if kernel.op is flash_3_fp8:
        taken = pair == (192, 128)
    elif kernel.op in (flash_3, flash_3_varlen):
        taken = pair != (128, 64)
    tensors = tensors_for(kernel, dim=pair[0], value_dim=pair[1])
    if taken:
        right(kernel, *tensors)
    elif kernel.head_dim.max is None or max(pair) <= kernel.head_dim.max:
        refused(kernel, Code.VALUE_DIM, *tensors)


@pytest.mark.parametrize("mask", ["none", "causal", "key padding"])
def test_log_sum_exps(kernel, mask):
    """A step of a ring: the kernel returns them, or is refused."""
    query, key, value = tensors_for(kernel, q_len=64, kv_len=64, heads=6, kv_heads=2)
    keep = (torch.arange(64) < torch.tensor([[40], [7]]))[: len(key), None, None] if mask == "key padding" else None

    def step(query, key, value, keep):
        return WITH_LOGSUMEXP(query, key, value, keep, mask == "causal", 0.3, "a step")

    backend = compiler(kernel, "eager", numerics="sparse")
    with torch.no_grad():
        output, logsumexp = torch.compile(step, backend=backend)(query, key, value, keep)
    (site,) = backend.report.sites
    if kernel.logsumexp is None:
        assert site.chosen is None
        assert site.refusals[0][1].code is Code.CONTEXT
    else:
        assert site.chosen == kernel.name
    wide = [each.double().repeat_interleave(3, 1) for each in (key, value)]
    scores = query.double() @ wide[0].mT * 0.3
    if mask == "causal":
        scores = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), float("-inf"))
    elif keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    assert relative(output, scores.softmax(-1) @ wide[1]) < HALF
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("window", [(3, 2), (3, 0), (None, 2), (2, None)])
def test_windows(kernel, window):
    """Forward, and backward where there is one; kernels without windows refuse, whatever else they take."""
    exact = [tensor.double().requires_grad_(kernel.backward) for tensor in tensors_for(kernel, q_len=67, kv_len=67)]
    tensors = [tensor.detach().to(torch.bfloat16).requires_grad_(kernel.backward) for tensor in exact]
    backend = compiler(kernel)
    output = torch.compile(windowed(*window), backend=backend, fullgraph=True)(*tensors)
    expected = windowed(*window)(*exact)
    (site,) = backend.report.sites
    assert (site.call.mask.kind, site.call.mask.window) == (MaskKind.SLIDING_WINDOW, window)
    takes = {MaskKind.SLIDING_WINDOW, MaskKind.BOOLEAN} & kernel.masks
    assert site.chosen == (kernel.name if takes else None)
    assert relative(output, expected) < HALF
    if kernel.backward:
        output.square().sum().backward()
        expected.square().sum().backward()
        assert all(relative(one.grad, other.grad) < 3e-2 for one, other in zip(tensors, exact, strict=True))


FLAGS = {
    "FLASHATTENTION_DISABLE_FP16": ("float16", {}),
    "FLASHATTENTION_DISABLE_LOCAL": ("bfloat16", {"function": windowed(3, 2)}),
    "FLASHATTENTION_DISABLE_VARLEN": ("bfloat16", {"mask": True}),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_builds_of_flash_attention_3_without_a_kernel(flag, stand_ins, monkeypatch):
    """setup.py writes what was left out into flash_attn_config: a refusal, instead of the library's error at run time."""
    (record,) = (each for each in RECORDS if each.name == "_flash_3" and "flash-attn-3" in each.requires)
    dtype, given = FLAGS[flag]
    function, mask = given.get("function", attend), [torch.rand(2, 1, 1, 11) > 0.4] if "mask" in given else []
    config = types.ModuleType("flash_attn_config")
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    for disabled in (True, False):
        torch.compiler.reset()
        config.CONFIG = {"build_flags": {flag: disabled}}
        tensors = tensors_for(record, q_len=11, dtype=getattr(torch, dtype))
        backend = compiler(stand_ins(record))
        with torch.no_grad():
            output = torch.compile(function, backend=backend, fullgraph=True)(*tensors, *mask)
        (site,) = backend.report.sites
        assert site.chosen == (None if disabled else "_flash_3")
        assert not disabled or flag in site.refusals[0][1].detail
        assert relative(output, function(*map(doubled, tensors), *mask)) < HALF


def fused(dtype, kv_len):
    return [x.transpose(1, 2) for x in torch.randn(2, kv_len, 3, 4, 64, dtype=dtype).unbind(2)]


def heads_first(dtype, kv_len):
    return [torch.randn(2, 4, size, 64, dtype=dtype) for size in (7, kv_len, kv_len)]


def cut_out(dtype, kv_len):
    return [torch.randn(2, 4, size, 72, dtype=dtype)[..., :64] for size in (7, kv_len, kv_len)]


@pytest.mark.parametrize("layout", [fused, heads_first, cut_out])
def test_layouts(kernel, layout):
    right(kernel, *layout(torch.bfloat16, sizes(kernel)["kv_len"]))


PACKS = ["pack_keys: key padding to packed keys, a copy of keys and values, and a sort for each mask"]
STEPS = {"_native_xla": ["pad_keys: 11 to 128, 11.64 times the products"]}


def padding(batch, kv_len):
    """Keys anywhere: a hole, the left side cut off, and in the last batch none at all."""
    mask = torch.rand(batch, kv_len) > 0.4
    mask[0, :3] = False
    mask[1, 0], mask[1, 5] = True, False
    mask[-1] = False
    return mask[:, None, None]


@pytest.mark.parametrize("expanded", [False, True])
def test_key_padding(record, expanded):
    tensors = tensors_for(record, batch=3)
    kv_len = tensors[1].shape[2]
    mask = padding(3, kv_len)
    mask = mask.expand(3, 4, 7, kv_len) if expanded else mask
    if not record.masks & {MaskKind.KEY_PADDING, MaskKind.BOOLEAN}:
        site, _, _ = run(record, *tensors, mask)
        assert (site.chosen, site.refusals[0][1].code) == (None, Code.MASK)
        return
    site, output = right(record, *tensors, mask)
    assert site.call.mask.kind is MaskKind.KEY_PADDING
    assert output[-1].abs().max() == 0
    assert [str(step) for step in site.steps] == STEPS.get(
        record.name, PACKS if record.prepare in (packing, leading, flash_attention_4.prepare) else []
    )


@pytest.mark.parametrize("shape", [(2, 4, 7, 11), (2, 1, 7, 11), (7, 11), (1, 4, 1, 11)])
def test_dense_masks(kernel, shape):
    tensors = tensors_for(kernel, kv_len=11)
    boolean = torch.rand(*shape) > 0.4
    boolean[..., 0] = True
    for kind, mask in ((MaskKind.BOOLEAN, boolean), (MaskKind.ADDITIVE, 3 * torch.randn(*shape).bfloat16())):
        torch.compiler.reset()
        if kind in kernel.masks:
            right(kernel, *tensors, mask, scale=0.3 if shape == (2, 1, 7, 11) else None)
        else:
            refused(kernel, Code.MASK, *tensors, mask)


def test_masks_with_strides(kernel):
    """A mask that is a view, or expanded, along its last dimension."""
    if MaskKind.ADDITIVE not in kernel.masks:
        pytest.skip("takes no mask")
    tensors = tensors_for(kernel, kv_len=32)
    wide = torch.randn(2, 4, 7, 64, dtype=torch.bfloat16)
    for mask in (wide[..., ::2], wide[:1, :1, :1, ::2], wide[:, :1, :, :1], wide[:, :1, :, :1].expand(2, 1, 7, 32)):
        right(kernel, *tensors, mask)


@pytest.mark.parametrize("fill", ["-inf", "lowest"])
def test_rows_without_a_key(kernel, fill):
    """A bias of -inf throughout gives zeros, the lowest number throughout the mean of the values."""
    if MaskKind.ADDITIVE not in kernel.masks:
        pytest.skip("takes no mask")
    mask = torch.zeros(2, 1, 7, 11, dtype=torch.bfloat16)
    mask[0, :, :, :4] = mask[1, :, :3] = float("-inf") if fill == "-inf" else torch.finfo(torch.bfloat16).min
    _, output = right(kernel, *tensors_for(kernel, kv_len=11), mask)
    assert (output[1, :3].abs().max() == 0) == (fill == "-inf")


def test_one_mask_and_two_scales(kernel):
    """What a mask becomes is shared by sites, whatever their scales are."""
    if MaskKind.ADDITIVE not in kernel.masks:
        pytest.skip("takes no mask")

    def step(q, k, v, mask):
        return (
            attend(q, k, v, mask, scale=0.125) + 2 * attend(q, k, v, mask, scale=1.0) + attend(q, k, v, mask, scale=0.3)
        )

    tensors = (*tensors_for(kernel), torch.randn(2, 1, 7, 11).bfloat16())
    backend = compiler(kernel)
    with torch.no_grad():
        output = torch.compile(step, backend=backend, fullgraph=True)(*tensors)
    assert {site.chosen for site in backend.report.sites} == {kernel.name}
    assert relative(output, step(*map(doubled, tensors))) < HALF


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_lengths_that_the_data_decides(kernel):
    """Right, or refused with the size in question: no guard can be made of it, and nothing fails."""

    def keys(q, k, mask, index):
        where = index.nonzero().squeeze(1)
        torch._check(where.shape[0] >= 2)
        return F.scaled_dot_product_attention(q, k[:, :, where], k[:, :, where], mask[..., where])

    def queries(q, k, mask, index):
        where = index.nonzero().squeeze(1)
        torch._check(where.shape[0] >= 2)
        return F.scaled_dot_product_attention(k[:, :, where], q, q)

    query, key, _ = tensors_for(kernel, kv_len=64)
    mask, index = torch.rand(2, 1, 7, 64) > 0.4, torch.tensor([1, 0, 0, 1] * 16)
    for function in (keys, queries):
        torch.compiler.reset()
        backend = compiler(kernel)
        with torch.no_grad():
            output = torch.compile(function, backend=backend, fullgraph=True)(query, key, mask, index)
        (site,) = backend.report.sites
        expected = function(query.double(), key.double(), mask, index)
        assert site.chosen or site.refusals[0][1].code in (Code.UNBACKED, Code.MASK, Code.LENGTH)
        assert relative(output, expected) < max(HALF, kernel.tolerance.error)
        assert output.stride() == function(query, key, mask, index).stride()


GRADIENTS = ("plain", "scale", "padded", "causal", "grouped", "key padding", "mask")


# Scale and causality are arguments, padding of heads is done outside the op: AOTAutograd sees other ops in these alone.
@pytest.mark.parametrize(
    ("case", "inner"),
    [
        *((case, "eager") for case in GRADIENTS),
        *((case, "aot_eager") for case in ("plain", "grouped", "key padding", "mask")),
    ],
)
def test_gradients(kernel, case, inner):
    kv_heads, dim = 2 if case == "grouped" else 6, 40 if case == "padded" else 64
    tensors = tensors_for(kernel, q_len=11, kv_len=11, heads=6, kv_heads=kv_heads, dim=dim)
    masks = {"key padding": torch.rand(2, 1, 1, 11) > 0.4, "mask": torch.randn(2, 1, 11, 11).bfloat16()}
    mask = [masks[case]] if case in masks else []
    arguments = {
        "is_causal": case == "causal",
        "enable_gqa": case == "grouped",
        "scale": 0.3 if case == "scale" else None,
    }
    exact = [tensor.double().detach().requires_grad_() for tensor in tensors]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    backend = compiler(kernel, inner)
    if inner == "eager":
        output = compiled_by(backend, *tensors, *mask, **arguments)
    else:
        output = torch.compile(lambda *given: attend(*given, **arguments), backend=backend, fullgraph=True)(
            *tensors, *mask
        )
    output.square().sum().backward()
    attend(*exact, *map(doubled, mask), **arguments).square().sum().backward()
    (site,) = backend.report.sites
    if not kernel.backward:
        assert site.refusals[0][1].code is Code.GRAD
    elif case in ("plain", "scale", "padded", "causal") or (case == "grouped" and kernel.name != "xformers"):
        assert site.chosen == kernel.name
    else:
        kind = site.call.mask.kind
        taken = kind in kernel.masks or (kind is MaskKind.KEY_PADDING and MaskKind.BOOLEAN in kernel.masks)
        assert (site.chosen == kernel.name) == (taken and case != "grouped")
    for one, other in zip(tensors, exact, strict=True):
        assert relative(one.grad, other.grad) < 3e-2


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_gradients_under_deterministic_algorithms(kernel, deterministic):
    """The flag reaches the library's backward (the stand-ins check it), or the kernel is refused."""
    if not kernel.backward:
        pytest.skip("no backward: refused with GRAD")
    backend = compiler(kernel)
    tensors = [tensor.requires_grad_() for tensor in tensors_for(kernel)]
    torch.compile(attend, backend=backend, fullgraph=True)(*tensors).sum().backward()
    (site,) = backend.report.sites
    if kernel.name == "xformers":
        assert site.refusals[0][1].code is Code.DETERMINISTIC
    else:
        assert site.chosen == kernel.name


def test_zeros(kernel):
    """A head of zeros has no largest number to scale by: its values come out as they are, no NaN."""
    query, key, value = tensors_for(kernel)
    query[:, 1], key[:, 2] = 0, 0
    right(kernel, query, key, value)


def test_lengths_of_sage_1(stand_ins):
    for record in filter(is_sage_1, map(stand_ins, RECORDS)):
        torch.compiler.reset()
        refused(record, Code.LENGTH, *tensors_for(record, kv_len=77))


def test_sage_on_an_a100_takes_a_block_of_keys(stand_ins):
    """There it chooses the kernel with float16 values."""
    (sage,) = (stand_ins(record) for record in RECORDS if record.name == "sage" and not is_sage_1(record))
    for capability, keys, chosen in (((8, 0), 63, None), ((8, 0), 64, "sage"), ((9, 0), 63, "sage")):
        torch.compiler.reset()
        machine = Machine("cuda", capability, machine_for(sage).packages)
        backend = AttentionCompiler(make_policy([sage], numerics="quantised"), "eager", machine)
        torch.compile(attend, backend=backend)(*tensors_for(sage, kv_len=keys))
        (site,) = backend.report.sites
        assert site.chosen == chosen
        assert chosen or site.refusals[0][1].code is Code.LENGTH


def test_inputs_are_left_alone(kernel):
    tensors = tensors_for(kernel)
    copies = [tensor.clone() for tensor in tensors]
    right(kernel, *tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_dynamic_lengths(kernel):
    lengths = (128, 192, 256) if fewest_keys(kernel) == 64 else (33, 40, 51)
    backend = compiler(kernel)
    function = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in lengths:
            tensors = qkv(q_len=length + 2, kv_len=length, dim=64, dtype=torch.bfloat16)
            assert relative(function(*tensors), attend(*map(doubled, tensors))) < max(HALF, kernel.tolerance.error)
    assert {site.chosen for site in backend.report.sites} == {kernel.name}
    assert len(backend.report.graphs) == 1


def test_a_mask_is_packed_once(kernel):
    """Two sites that read one mask share its packing; a site with another mask has its own."""
    if kernel.prepare not in (packing, leading) or MaskKind.KEY_PADDING not in kernel.masks:
        pytest.skip("packs nothing")
    counted = []

    def inner(graph_module, example_inputs):
        counted.append(sum("argsort" in str(node.target) for node in graph_module.graph.nodes))
        return graph_module.forward

    def step(q, k, v, one, two):
        for mask in (one, one, two):
            q = F.scaled_dot_product_attention(q, k, v, mask)
        return q

    tensors, masks = tensors_for(kernel), [torch.rand(2, 1, 1, sizes(kernel)["kv_len"]) > 0.4 for _ in range(2)]
    with torch.no_grad():
        output = torch.compile(step, backend=compiler(kernel, inner), fullgraph=True)(*tensors, *masks)
    assert counted == [2]
    assert relative(output, step(*map(doubled, tensors), *masks)) < max(HALF, kernel.tolerance.error)


def test_cast(kernel):
    """float32 tensors are refused, or cast where the policy says so; the output is float32 again."""
    tensors = tensors_for(kernel, dtype=torch.float32)
    if "float32" in kernel.dtypes:
        site, _ = right(kernel, *tensors, cast="bfloat16")
        assert site.steps == ()
        return
    refused(kernel, Code.DTYPE, *tensors)
    torch.compiler.reset()
    site, output = right(kernel, *tensors, cast="bfloat16")
    assert output.dtype is torch.float32
    assert [str(step) for step in site.steps] == ["cast: float32 to bfloat16"]


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, float("-inf")])
def test_cast_of_a_mask(kernel, fill):
    """What is finite stays finite: the lowest float32 is -inf in bfloat16, and its rows would have no key at all."""
    if MaskKind.ADDITIVE not in kernel.masks or "float32" in kernel.dtypes:
        pytest.skip("casts no mask")
    mask = torch.zeros(2, 1, 7, 11)
    mask[0, :, :, :4] = mask[1, :, :3] = fill
    right(kernel, *tensors_for(kernel, dtype=torch.float32), mask, cast="bfloat16")


def test_numerics(record):
    """Quantised kernels are asked for."""
    site, _, _ = run(record, *tensors_for(record), numerics="reordered")
    assert (site.chosen is None) == (record.numerics.name == "QUANTISED")


def test_every_third_party_record_has_a_stand_in(stand_ins):
    """A new record fails here until it has one."""
    from attnrewrite.kernels.sources import load

    for record in RECORDS:
        assert load(record.source)


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        ("cudagraphs", {}),
        ("inductor", {"mode": "reduce-overhead"}),
        ("inductor", {"options": {"triton.cudagraphs": True}}),
    ],
)
def test_cuda_graphs(record, inner, options):
    """A kernel that a CUDA graph cannot hold is refused where one is recorded, with the reason."""
    if record.capturable:
        pytest.skip("a CUDA graph holds it")
    tensors, backend = tensors_for(record), compiler(record, inner)
    with torch.no_grad():
        output = torch.compile(attend, backend=backend, fullgraph=True, **options)(*tensors)
    (site,) = backend.report.sites
    assert (site.chosen, site.refusals[0][1].code) == (None, Code.CAPTURE)
    assert relative(output, attend(*map(doubled, tensors))) < HALF


def test_compilers_that_record_no_cuda_graph():
    for options in ({}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"triton.cudagraphs": False}}):
        assert not records_cuda_graphs("inductor", **options)
    assert not records_cuda_graphs("eager")
    assert not records_cuda_graphs("aot_eager", mode="reduce-overhead")
