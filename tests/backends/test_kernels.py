"""Every kernel that a CPU has, against float64 of the unchanged function: dtypes, masks, scales, gradients, Inductor."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, attend, check, compiled, doubled, qkv, relative, skip_if_fenced, windowed
from torch.fx.experimental.proxy_tensor import make_fx

import attnrewrite
from attnrewrite import Backend, Code, MaskKind, Numerics
from attnrewrite.backends import native_folded
from attnrewrite.kernels.machines import satisfies

KERNELS = ("native", "_native_flash", "_native_math", "flex")

MASKS = {
    "none": lambda: None,
    "dense boolean": lambda: torch.rand(2, 4, 7, 11) > 0.4,
    "key padding": lambda: torch.rand(2, 1, 1, 11) > 0.4,
    "rows without a key": lambda: torch.rand(2, 1, 7, 11) > torch.arange(7)[:, None] / 3,
    "one for all": lambda: torch.rand(7, 11) > 0.4,
    "additive": lambda: torch.randn(2, 4, 7, 11),
    "additive over heads": lambda: torch.randn(1, 4, 7, 1),
    "additive with -inf": lambda: torch.randn(7, 11).masked_fill(torch.rand(7, 11) > 0.6, float("-inf")),
    "a number": lambda: torch.randn(1, 1, 1, 1),
    "true": lambda: torch.ones(1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_masks(kernel, mask):
    tensors = qkv()
    mask = MASKS[mask]()
    check(kernel, *tensors, *([] if mask is None else [mask]))


@pytest.mark.parametrize("lengths", [(7, 11), (11, 7), (11, 11), (300, 270)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_is_upper_left(kernel, lengths):
    site = check(kernel, *qkv(q_len=lengths[0], kv_len=lengths[1]), is_causal=True)
    assert site.call.mask.kind is MaskKind.CAUSAL_UPPER_LEFT


@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_scale(kernel, scale):
    check(kernel, *qkv(), scale=scale)


@pytest.mark.skipif(satisfies(torch.__version__, ">=2.13"), reason="the operator's fake version is right from 2.13 on")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["native", "_native_flash", "_native_math"])
def test_gradients_of_hand_written_attention_in_float64(kernel, masked):
    """Inductor's backward of PyTorch's CPU kernel raises there; plain torch.compile runs what the model wrote."""

    def attention(query, key, value, *mask):
        scores = query @ key.transpose(-2, -1) * 0.3
        return torch.softmax(scores if not mask else scores + mask[0], dim=-1) @ value

    given = [each.requires_grad_() for each in qkv(dtype=torch.float64)] + [torch.randn(2, 1, 7, 11).double()] * masked
    run, backend = compiled(attention, kernel, inner="inductor")
    found, exact = run(*given), attention(*given)
    weights = torch.randn_like(exact)
    assert relative(found, exact) < TOLERANCE[torch.float64]
    gradients = zip(*(torch.autograd.grad((each * weights).sum(), given[:3]) for each in (found, exact)), strict=True)
    assert all(relative(one, other) < TOLERANCE[torch.float64] for one, other in gradients)
    assert [site.chosen for site in backend.report.sites] == [kernel]


@pytest.mark.parametrize("kernel", ["native", "_native_flash", "_native_math"])
def test_a_compiler_that_traces_the_graph_anew(kernel):
    """As OpenVINO's does: what a kernel computes with sizes would become symbols that no input has."""

    def inner(graph_module, example_inputs):
        return make_fx(graph_module, tracing_mode="fake", _allow_non_fake_inputs=True)(*example_inputs)

    check(kernel, *qkv(), inner=inner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes(kernel, dtype):
    if (kernel, dtype) == ("flex", torch.float64):
        pytest.skip("refused with DTYPE: tests/test_decisions.py")
    query, key, value = qkv(dtype=dtype)
    check(kernel, query, key, value)
    torch.compiler.reset()
    check(kernel, query, key, value, torch.rand(2, 1, 7, 11) > 0.4)
    torch.compiler.reset()
    check(kernel, query, key, value, torch.randn(2, 1, 7, 11, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_more_exact_than_the_model(kernel):
    """A float32 bias on bfloat16 tensors is added as float32: in bfloat16 these numbers would all be 1000."""
    tensors = (*qkv(dtype=torch.bfloat16), 1000 + torch.randn(2, 1, 7, 11))
    if kernel == "_native_math":  # adds it to bfloat16 scores
        run, backend = compiled(attend, kernel)
        assert relative(run(*tensors), attend(*map(doubled, tensors))) < TOLERANCE[torch.bfloat16]
        assert backend.report.sites[0].refusals[0][1].code is attnrewrite.Code.MASK
        return
    check(kernel, *tensors)


@pytest.mark.parametrize("kernel", ["native", "_native_math", "flex"])
def test_value_dim(kernel):
    check(kernel, *qkv(value_dim=24))


@pytest.mark.parametrize("dim", [7, 40, 72, 88, 112])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dims_of_real_models(kernel, dim):
    check(kernel, *qkv(dim=dim))


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math"])
def test_gradients(kernel):
    mask = torch.randn(2, 1, 7, 11)
    for inner, given in itertools.product(("eager", "aot_eager"), ({}, {"is_causal": True}, {"attn_mask": mask})):
        torch.compiler.reset()
        exact = [tensor.double().detach().requires_grad_() for tensor in qkv()]
        tensors = [tensor.float().detach().requires_grad_() for tensor in exact]
        run, backend = compiled(lambda *qkv: attend_by_name(*qkv, **given), kernel, inner)  # noqa: B023
        run(*tensors).square().sum().backward()
        attend_by_name(*exact, **{name: doubled(value) for name, value in given.items()}).square().sum().backward()
        assert backend.report.sites[0].chosen == kernel
        for one, other in zip(tensors, exact, strict=True):
            assert relative(one.grad, other.grad) < 1e-5


def attend_by_name(query, key, value, attn_mask=None, is_causal=False):
    return attend(query, key, value, attn_mask, is_causal=is_causal)


@pytest.mark.parametrize("kernel", ["native", "_native_math"])
def test_gradient_of_a_learned_bias(kernel):
    bias = torch.randn(2, 1, 7, 11)
    grads = []
    for function in (attend, compiled(attend, kernel)[0]):
        given = bias.clone().requires_grad_()
        torch.manual_seed(1)
        function(*qkv(), given).square().sum().backward()
        grads.append(given.grad)
    assert relative(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
def test_under_inductor(kernel):
    """A site as models have it: projections before, a layout change and a projection behind; one mask read twice."""
    layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)])

    def step(x, mask, layers):
        for _ in range(2):
            q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in layers[:3])
            x = x + layers[3](F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x

    x, mask = torch.randn(2, 9, 64), torch.rand(2, 1, 1, 9) > 0.3
    with torch.no_grad():
        run, backend = compiled(lambda x, mask: step(x, mask, layers), kernel, inner="inductor")
        output = run(x, mask)
        double = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(4)]).double()
        double.load_state_dict(layers.state_dict())
        reference = step(x.double(), mask, double)
    skip_if_fenced(backend.report.sites[0])
    assert [site.chosen for site in backend.report.sites] == [kernel, kernel]
    assert relative(output, reference) < 1e-5


def test_what_a_mask_becomes_is_built_once():
    """Two sites that read one mask share its bias; a site with another mask has its own."""
    query, key, value = qkv(q_len=11)
    counted = []

    def inner(graph_module, example_inputs):
        counted.append(sum(node.target is torch.where for node in graph_module.graph.nodes))
        return graph_module.forward

    def step(q, k, v, one, two):
        return sum(F.scaled_dot_product_attention(q, k, v, mask) for mask in (one, one, two))

    masks = [torch.rand(2, 1, 1, 11) > 0.4 for _ in range(2)]
    run, _ = compiled(step, attnrewrite.with_backend("_native_flash", inner=inner))
    assert relative(run(query, key, value, *masks), step(query, key, value, *masks)) < 1e-5
    assert counted == [2]


def test_no_python_of_ours_runs_in_a_compiled_step():
    from torch._inductor.utils import run_and_get_code

    for kernel, op in (("_native_flash", "_scaled_dot_product_flash_attention_for_cpu"), ("native", "_for_cpu")):
        torch.compiler.reset()
        _, (code,) = run_and_get_code(compiled(attend, kernel, inner="inductor")[0], *qkv())
        assert op in code
        assert "attnrewrite" not in code


# -- toy kernels: an op gets what its record promises, and a wrong op is noticed


def toy(query, key, value, prepared, *, call):
    """Attention written out, on (batch, length, heads, dim)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = query @ key.transpose(-2, -1) * scale
    if prepared is not None:
        scores = scores.masked_fill(~prepared, float("-inf")) if prepared.dtype == torch.bool else scores + prepared
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


TOY = Backend(
    name="toy",
    family="tests",
    op=toy,
    devices=frozenset({"cpu"}),
    dtypes=frozenset({"float32"}),
    masks=frozenset({MaskKind.NONE, MaskKind.BOOLEAN, MaskKind.ADDITIVE}),
    value_dim=True,
    layout="bshd",
    numerics=Numerics.REORDERED,
)


def with_op(op, **fields):
    return replace(TOY, op=op, **fields)


def arguments():
    return (*qkv(q_len=11, heads=5), torch.randn(2, 1, 11, 11))


def test_a_record_of_ones_own():
    site = check(TOY, *arguments(), scale=0.3)
    assert site.chosen == "toy"


WRONG = {
    "layout": lambda q, k, v, m, *, call: toy(*(t.transpose(1, 2) for t in (q, k, v)), None, call=call).transpose(1, 2),
    "mask": lambda q, k, v, m, *, call: toy(q, k, v, None, call=call),
    "scale": lambda q, k, v, m, *, call: toy(q, k, v, m, call=replace(call, scale=None)),
    "keys as values": lambda q, k, v, m, *, call: toy(q, k, k, m, call=call),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_fails_parity(fault):
    with pytest.raises(AssertionError, match="relative error"):
        check(with_op(WRONG[fault]), *arguments(), scale=0.3)


def test_an_op_of_the_wrong_shape_is_named():
    wrong = with_op(lambda q, k, v, m, *, call: toy(q, k, v, m, call=call)[:, :, :-1])
    with pytest.raises(
        Exception, match=r"'toy' returned \(2, 4, 11, 16\).* at site .* where SDPA gives \(2, 5, 11, 16\)"
    ):
        check(wrong, *arguments())


def test_head_dims_are_padded():
    seen = []

    def op(query, key, value, prepared, *, call):
        seen.append((query.shape[-1], value.shape[-1], call.scale))
        return toy(query, key, value, prepared, call=call)

    padding = with_op(op, head_dim=attnrewrite.HeadDim(max=32, multiple=8, pad=True))
    check(padding, *qkv(dim=12, value_dim=17))
    assert seen == [(16, 24, 12**-0.5)]


def test_transposes_cancel():
    """(B, S, H, D) -> SDPA's layout -> the kernel's layout is no work at all."""
    names = []

    def inner(graph_module, example_inputs):
        names.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    def step(q, k, v):
        q, k, v = (tensor.unflatten(-1, (5, 16)).transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    opaque = with_op(lambda q, k, v, m, *, call: torch.relu(q) + v * k)  # any op: only the transposes count
    tensors = [torch.randn(2, 11, 80) for _ in range(3)]
    compiled(step, attnrewrite.with_backend(opaque, inner=inner))[0](*tensors)
    assert names.count("transpose") == 0


BLOCK_MASKS = {
    "key padding": lambda: (torch.arange(270) < torch.tensor([[200], [131]]))[:, None, None],
    "blocks that nobody sees": lambda: (torch.rand(2, 1, 300, 270) > 0.4) & (torch.arange(270) // 128 != 1),
    "blocks that all see": lambda: (torch.rand(300, 270) > 0.4) | (torch.arange(270) < 128),
}


@pytest.mark.parametrize("mask", BLOCK_MASKS)
def test_flex_skips_the_right_blocks(mask):
    """Only a compiled kernel reads the block lists: eager flex reads the whole mask."""
    check("flex", *qkv(q_len=300, kv_len=270), BLOCK_MASKS[mask](), inner="inductor")


@pytest.mark.parametrize("lengths", [(300, 270), (256, 384)])
def test_flex_skips_the_right_blocks_of_causal(lengths):
    check("flex", *qkv(q_len=lengths[0], kv_len=lengths[1]), inner="inductor", is_causal=True)


def test_flex_takes_no_boolean_mask_on_the_cpu_of_an_older_torch():
    """It would end the process where two sites share the mask."""
    (record,) = [each for each in attnrewrite.records_of("flex") if "cpu" in each.devices]
    mask = attnrewrite.Mask(MaskKind.BOOLEAN, "bool", (2, 1, 1, 9))
    call = attnrewrite.AttentionCall("", 2, 4, 4, 9, 9, 16, 16, "float32", mask=mask)
    new, old = (attnrewrite.Machine("cpu", packages={"torch": version}) for version in ("2.13.0", "2.11.0"))
    assert isinstance(attnrewrite.decide(record, call, new), attnrewrite.Accepted)
    assert attnrewrite.decide(record, call, old).code is attnrewrite.Code.VERSION


def test_what_reads_the_output_of_flex():
    """Inductor's CPU template fails if it has to fuse the ops after flex (2.13): rows set to zero, then heads concatenated."""

    def step(query, key, value, mask):
        keep = mask[:, None, :, None] & mask[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, keep).transpose(1, 2).flatten(2)

    mask = torch.rand(2, 11) > 0.3
    mask[:, 0] = True
    tensors, backend = qkv(q_len=11, kv_len=11, dim=16), attnrewrite.with_backend("flex")
    with torch.no_grad():
        output = torch.compile(step, backend=backend, fullgraph=True)(*tensors, mask)
    (site,) = backend.report.sites
    assert site.chosen == "flex" or site.refusals[0][1].code is Code.VERSION  # before 2.13
    assert relative(output, step(*map(doubled, tensors), mask)) < 1e-5


WINDOWS = [
    ((100, 20), "inductor"),
    ((100, 20), "eager"),
    ((None, 130), "eager"),
    ((200, None), "eager"),
    ((0, 0), "eager"),
]


@pytest.mark.parametrize(("window", "inner"), WINDOWS)
def test_flex_knows_a_window_by_its_size(window, inner):
    """Its block lists and its mask are computed from the window; the mask tensor, of three blocks by three, is not read."""
    site = check("flex", *qkv(q_len=300, kv_len=300), function=windowed(*window), inner=inner)
    assert (site.call.mask.kind, site.call.mask.window) == (MaskKind.SLIDING_WINDOW, window)


# -- _native_folded: its kernel runs on a GPU, what stands around it anywhere


def lower_right(query, key, value):
    hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(key.shape[-2] - query.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, hidden)


@pytest.mark.parametrize(
    ("function", "batch", "q_len", "kv_len", "fold"),
    [
        (attend, 12, 14, 14, 4),
        (attend, 10, 14, 14, 2),
        (attend, 64, 1, 2, 32),
        (attend, 8, 3, 17, 2),
        (attend, 4, 32, 9, 2),
        (lambda *given: attend(*given, is_causal=True), 16, 8, 8, 8),
        (lambda *given: attend(*given, is_causal=True), 4, 13, 11, 4),
        (lower_right, 8, 5, 16, 4),
        (lambda *given: attend(*given, scale=-0.3), 4, 7, 7, 4),
    ],
)
def test_folded_sequences(function, batch, q_len, kv_len, fold, monkeypatch):
    def sdpa(query, key, value, bias, *, call):
        assert bias.stride(-2) % 16 == 0  # as the kernel needs it
        assert query.shape[2] == fold * q_len
        return F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=call.scale)

    monkeypatch.setattr(native_folded, "efficient", sdpa)
    record = replace(
        native_folded.NATIVE_FOLDED,
        name="folded on a CPU",
        devices=frozenset({"cpu"}),
        capability=None,
        dtypes=frozenset({"float64"}),
    )

    def projected(x):
        query, key, value = (part.transpose(1, 2) for part in x.unbind(2))
        output = function(query[:, :, :q_len], key[:, :, :kv_len], value[:, :, :kv_len, :5])
        return output.transpose(1, 2).flatten(2)

    x = torch.randn(batch + 2, max(q_len, kv_len), 3, 3, 8, dtype=torch.float64)[2:].requires_grad_()
    run, backend = compiled(projected, record)
    expected = projected(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    output = run(x)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    (site,) = backend.report.sites
    assert (site.chosen, str(site.steps[-1])) == (
        record.name,
        f"fold_batch: {kv_len} to {fold * kv_len}, {fold:.2f} times the products",
    )
    assert relative(output, expected) < 1e-12
    assert relative(gradient, wanted) < 1e-12
