"""The attention layers of torch.nn: what hides their attention is opened, so that it is swapped."""

import copy

import pytest
import torch
from parity import compiled, relative
from torch import nn

import attnrewrite
from attnrewrite.kernels.machines import satisfies

WIDTH, HEADS = 24, 3
PADDING = torch.tensor([5, 9, 7])[:, None] <= torch.arange(9)  # (batch, keys); True: no key
FUTURE = torch.ones(9, 9, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": FUTURE},
    "bias": {"attn_mask": torch.linspace(-1, 1, 81).view(9, 9)},
    "both": {"key_padding_mask": PADDING, "attn_mask": FUTURE},
}


class SelfAttention(nn.Module):
    """Reads only the output of the layer, which computes the weights too unless `need_weights` is False."""

    def __init__(self, autocast=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)
        self.autocast = autocast

    def forward(self, x, memory=None, **masks):
        memory = x if memory is None else memory
        if self.autocast is None:
            return self.attention(x, memory, memory, **masks)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.attention(x, memory, memory, **masks)[0]


def doubled(module):
    return copy.deepcopy(module).double()


def doubled_masks(masks):
    return {name: mask.double() if mask.is_floating_point() else mask for name, mask in masks.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math"])
def test_multi_head_attention_is_opened(kernel, training):
    module = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x, memory = torch.randn(2, 7, 32), torch.randn(2, 11, 32)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 8:] = True

    def step(x, memory, padding):
        return module(x, memory, memory, key_padding_mask=padding, need_weights=False)[0]

    for inner in ("eager", "aot_eager"):
        torch.compiler.reset()
        run, backend = compiled(step, kernel, inner)
        assert relative(run(x, memory, padding).detach(), step(x, memory, padding).detach()) < 1e-5
        (site,) = backend.report.sites
        assert (site.chosen, site.call.heads, site.call.kv_len, site.call.role) == (kernel, 4, 11, "cross")


MULTI_HEAD = {
    "a zero": ({"add_zero_attn": True}, {}),
    "a zero and a bias": ({"add_zero_attn": True, "add_bias_kv": True}, {}),
    "other widths": ({"add_zero_attn": True, "kdim": 12, "vdim": 20}, {}),
    "in float64": ({"add_zero_attn": True, "dtype": torch.float64}, {}),
    "key padding": (
        {"add_zero_attn": True, "add_bias_kv": True},
        {"key_padding_mask": torch.arange(11).expand(3, -1) > 8},
    ),
    "a boolean mask": ({"add_zero_attn": True}, {"attn_mask": torch.arange(11) > torch.arange(7)[:, None] + 2}),
    "a bias": ({"add_zero_attn": True, "bias": False}, {"attn_mask": torch.linspace(-2, 2, 77).view(7, 11)}),
    "a bias by head": ({"add_zero_attn": True}, {"attn_mask": torch.linspace(-2, 2, 12 * 77).view(12, 7, 11)}),
}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *((case, "training") for case in MULTI_HEAD),
        ("key padding", "dynamic"),
        ("a bias by head", "dynamic"),
        ("in float64", "plain"),
    ],
)
def test_multi_head_attention_that_makes_tensors_itself(case, how):
    """`add_zero_attn` makes zeros for a key: they are made in the fake mode of the graph, as all that is traced."""
    options, masks = MULTI_HEAD[case]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(32, 4, batch_first=True, **options)
    widths = (32, options.get("kdim", 32), options.get("vdim", 32))
    tensors = [
        torch.randn(3, length, width, dtype=module.out_proj.weight.dtype)
        for length, width in zip((7, 11, 11), widths, strict=True)
    ]

    def step(*tensors):
        return module(*tensors, **masks, need_weights=False)[0]

    with torch.set_grad_enabled(how == "training"):
        run, backend = compiled(step, "_native_math", dynamic=how == "dynamic")
        output, expected = run(*tensors), step(*tensors)
        assert relative(output.detach(), expected.detach()) < 1e-5
        (site,) = backend.report.sites
        assert (site.chosen, site.call.needs_grad) == ("_native_math", how == "training")
        kv_len = 12 + ("add_bias_kv" in options)
        assert str(site.call.kv_len).endswith(f"({kv_len})") if how == "dynamic" else site.call.kv_len == kv_len
        explained = attnrewrite.explain(step, *tensors, backend="_native_math")
        assert [each.chosen for each in explained.sites] == ["_native_math"]
    if how == "training":
        weights = list(module.parameters())
        found, right = (torch.autograd.grad(each.sin().sum(), weights) for each in (output, expected))
        assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in zip(found, right, strict=True))


@pytest.mark.parametrize("kv_len", [7, 11])
def test_multi_head_attention_says_that_it_trains(kv_len):
    """The attention inside must be planned as one that needs a gradient: flex has none on a CPU."""
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 7, 32)
    memory = x if kv_len == 7 else torch.randn(2, kv_len, 32)  # else its weights are split in two
    run, backend = compiled(lambda x, memory: module(x, memory, memory, need_weights=False)[0], "flex")
    run(x, memory)
    (site,) = backend.report.sites
    assert site.call.needs_grad
    assert site.refusals[0][1].code is attnrewrite.Code.GRAD
    with torch.no_grad():
        run, backend = compiled(lambda x, memory: module(x, memory, memory, need_weights=False)[0], "flex")
        run(x, memory)
    assert backend.report.sites[0].chosen == "flex"


def test_multi_head_attention_trains():
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 7, 32)
    grads = []
    for function in (
        module,
        torch.compile(module, backend=attnrewrite.with_backend("_native_flash", inner="aot_eager")),
    ):
        module.zero_grad()
        function(x, x, x, need_weights=False)[0].square().sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert relative(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize(("mask", "dynamic"), [*((mask, False) for mask in MASKS), ("both", True)])
def test_weights_that_nobody_reads(mask, dynamic):
    """The default is need_weights=True: the layer computes a softmax of its own, which its module seldom reads."""
    model, x = SelfAttention(), torch.randn(3, 9, WIDTH)
    run, backend = compiled(
        model, "_native_math", "aot_eager" if mask in ("none", "both") and not dynamic else "eager", dynamic
    )
    output = run(x, **MASKS[mask])
    assert relative(output, doubled(model)(x.double(), **doubled_masks(MASKS[mask]))) < 1e-5
    output.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    exact = doubled(model)
    exact.zero_grad()
    exact(x.double(), **doubled_masks(MASKS[mask])).square().sum().backward()
    for name, grad, (_, parameter) in zip(range(9), grads, exact.named_parameters(), strict=False):
        assert relative(grad, parameter.grad) < 1e-4, name
    (site,) = backend.report.sites
    assert (site.chosen, site.call.heads, site.call.head_dim, site.call.written_as) == (
        "_native_math",
        3,
        8,
        "operations",
    )
    assert str(site.call.mask).startswith({"none": "none", "padding": "key padding"}.get(mask, "additive"))


def test_other_widths_of_keys_and_values():
    model = SelfAttention(kdim=10, vdim=14)
    x, keys, values = torch.randn(2, 9, WIDTH), torch.randn(2, 5, 10), torch.randn(2, 5, 14)
    run, backend = compiled(lambda *given: model.attention(*given)[0], "_native_flash")
    reference = doubled(model).attention(x.double(), keys.double(), values.double())[0]
    assert relative(run(x, keys, values), reference) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen, site.call.q_len, site.call.kv_len, site.call.role) == ("_native_flash", 9, 5, "cross")


@pytest.mark.parametrize("where", ["region", "ambient", "off inside"])
@pytest.mark.parametrize(
    ("mask", "need_weights"), [("none", False), ("padding", True), ("padding", False), ("bias", True)]
)
def test_autocast(mask, need_weights, where):
    """The layer's operators get the casts of autocast where they stand in the graph; baddbmm casts the mask that it adds."""
    model = SelfAttention({"region": True, "ambient": None, "off inside": False}[where])
    x, masks = torch.randn(3, 9, WIDTH), {**MASKS[mask], "need_weights": need_weights}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=where != "region"):
        run, backend = compiled(model, "_native_math", "aot_eager")
        output, eager = run(x, **masks), model(x, **masks)
    assert output.dtype == eager.dtype == (torch.float32 if where == "off inside" else torch.bfloat16)
    reference = doubled(model.attention)(*[x.double()] * 3, **doubled_masks(MASKS[mask]))[0]
    assert relative(output, reference) < (1e-5 if where == "off inside" else 1.2e-2)
    (site,) = backend.report.sites
    assert (site.chosen, site.call.dtype) == ("_native_math", str(eager.dtype).removeprefix("torch."))


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
def test_weights_that_are_read_stay(mask):
    model, x = SelfAttention().attention, torch.randn(3, 9, WIDTH)
    run, backend = compiled(lambda x: model(x, x, x, average_attn_weights=False, **MASKS[mask]), "_native_math")
    output, weights = run(x)
    exact = doubled(model)(*[x.double()] * 3, average_attn_weights=False, **MASKS[mask])
    assert relative(output, exact[0]) < 1e-5
    assert relative(weights, exact[1]) < 1e-5
    (site,) = backend.report.sites
    call = site.call
    assert (site.chosen, call.batch, call.heads, call.q_len, call.kv_len, call.head_dim) == (None, 3, 3, 9, 9, 8)
    assert "weights are used elsewhere" in site.refusals[0][1].detail
    assert (str(call.mask) == "none") == (mask == "none")


def test_only_the_weights_are_read():
    model, x = SelfAttention().attention, torch.randn(3, 9, WIDTH)
    run, backend = compiled(lambda x: model(x, x, x)[1], "_native_math")
    assert relative(run(x), doubled(model)(*[x.double()] * 3)[1]) < 1e-5
    assert all(site.chosen is None for site in backend.report.sites)


def test_inside_a_transform_it_stays():
    model, x = SelfAttention().attention, torch.randn(2, 3, 9, WIDTH)

    def attend(x):
        return model(x, x, x, key_padding_mask=PADDING)[0]

    with torch.no_grad():
        run, backend = compiled(torch.func.vmap(attend), "_native_math")
        assert relative(run(x), torch.stack([attend(each) for each in x])) < 1e-5
    assert all(site.chosen is None and "vmap" in site.refusals[0][1].detail for site in backend.report.sites)
    assert all(site.call.mask.is_tensor for site in backend.report.sites)


# -- the fast paths, which run without a gradient


def encoder_masks(masks):
    names = {"key_padding_mask": "src_key_padding_mask", "attn_mask": "src_mask"}
    return {names[name]: mask for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("mask", "norm_first", "dynamic"),
    [
        ("none", False, False),
        ("none", True, False),
        ("padding", False, False),
        ("causal", True, False),
        ("both", True, True),
    ],
)
def test_encoder_layer(mask, norm_first, dynamic):
    if dynamic and not satisfies(torch.__version__, ">=2.13"):
        pytest.skip("Dynamo does not take symbolic sizes into the fast path before 2.13")
    torch.manual_seed(0)
    activation = "gelu" if norm_first else "relu"
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True, norm_first=norm_first, activation=activation)
    layer, x, masks = layer.eval(), torch.randn(3, 9, WIDTH), encoder_masks(MASKS[mask])
    with torch.no_grad():
        run, backend = compiled(layer, "_native_math", "aot_eager" if mask == "none" else "eager", dynamic)
        assert relative(run(x, **masks), doubled(layer)(x.double(), **masks)) < 1e-5
    (site,) = backend.report.sites
    assert (site.chosen, site.call.heads, site.call.head_dim) == ("_native_math", 4, 6)
    assert str(site.call.mask).startswith({"none": "none", "padding": "key padding"}.get(mask, "boolean"))


def test_encoder_layer_reads_numbers_as_a_boolean_mask():
    """PyTorch's fast path takes a mask of numbers for a boolean one, unlike its slow path: -1.5 hides a key."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True).eval()
    x, masks = torch.randn(3, 9, WIDTH), {"src_key_padding_mask": torch.zeros(3, 9).masked_fill(PADDING, -1.5)}
    with torch.no_grad():
        run, backend = compiled(layer, "_native_math")
        assert relative(run(x, **masks), layer(x, **masks)) < 1e-5
    assert backend.report.swapped == 1


def test_encoder_layer_with_a_row_without_keys():
    """The row is NaN in the fast path; opened it is what the slow path gives, zeros out of the attention."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True).eval()
    x, padding = torch.randn(3, 9, WIDTH), PADDING.clone()
    padding[1] = True
    with torch.no_grad():
        run, _ = compiled(layer, "_native_math")
        output = run(x, src_key_padding_mask=padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = doubled(layer)(x.double(), src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert relative(output, slow) < 1e-5


def test_whole_encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        run, backend = compiled(encoder, "_native_flash", "aot_eager")
        assert relative(run(x), doubled(encoder)(x.double())) < 1e-5
    assert [(site.name, site.chosen) for site in backend.report.sites] == [
        ("layers.0", "_native_flash"),
        ("layers.1", "_native_flash"),
    ]


def native(module, query, key, value, mask, mask_type, need_weights=False):
    projections = (module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias)
    width = (WIDTH, HEADS)
    return torch._native_multi_head_attention(
        query, key, value, *width, *projections, mask, need_weights, mask_type=mask_type
    )


@pytest.mark.parametrize(("mask", "mask_type"), [(None, None), (FUTURE, 0), (PADDING, 1)])
def test_native_multi_head_attention(mask, mask_type):
    module, x = SelfAttention().attention.eval(), torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        run, backend = compiled(lambda x: native(module, x, x, x, mask, mask_type)[0], "_native_math")
        assert relative(run(x), native(module, x, x, x, mask, mask_type)[0]) < 1e-5
        assert backend.report.swapped == 1
        run, backend = compiled(lambda x: native(module, x, x, x, mask, mask_type, need_weights=True), "_native_math")
        for output, expected in zip(run(x), native(module, x, x, x, mask, mask_type, need_weights=True), strict=True):
            assert relative(output, expected) < 1e-6
    (site,) = backend.report.sites
    assert site.chosen is None
    assert site.call.mask.is_tensor == (mask is not None)
    assert "its weights are read" in site.refusals[0][1].detail
