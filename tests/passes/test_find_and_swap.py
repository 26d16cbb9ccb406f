"""Every form in which scaled_dot_product_attention is called is found, and read right."""

import operator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from parity import attend, compiled, qkv, relative, skip_if_fenced
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite
from attnrewrite import Machine, MaskKind, make_policy, records_of, with_backend
from attnrewrite.kernels.machines import satisfies
from attnrewrite.pipeline import Target, rewrite_graph
from attnrewrite.planning.planner import Libraries

sdpa = F.scaled_dot_product_attention


def only_site(function, *tensors, backend="_native_flash", inner="eager", error=1e-5):
    run, backend = compiled(function, backend, inner)
    output, expected = run(*tensors), function(*tensors)
    assert relative(output, expected) < error
    assert output.dtype == expected.dtype
    (site,) = backend.report.sites
    skip_if_fenced(site)
    return site


FORMS = {
    "positional": lambda q, k, v, m: sdpa(q, k, v, m, 0.0, False),
    "keyword": lambda q, k, v, m: sdpa(
        query=q, key=k, value=v, attn_mask=m, dropout_p=0.0, is_causal=False, scale=0.3, enable_gqa=False
    ),
    "mixed": lambda q, k, v, m: sdpa(q, k, value=v, scale=0.3, attn_mask=m),
    "out of order": lambda q, k, v, m: sdpa(attn_mask=m, value=v, key=k, query=q),
    "aten overload": lambda q, k, v, m: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, m),
    "aten packet": lambda q, k, v, m: torch.ops.aten.scaled_dot_product_attention(q, k, v, m, scale=0.3),
}


@pytest.mark.parametrize("form", FORMS)
def test_argument_forms(form):
    query, key, value = qkv()
    mask = torch.randn(2, 1, 7, 11)
    site = only_site(FORMS[form], query, key, value, mask)
    assert site.chosen == "_native_flash"
    assert site.call.mask.kind is MaskKind.ADDITIVE


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
@pytest.mark.parametrize(
    ("lead", "mask"),
    [
        ((), (7, 11)),
        ((5,), (5, 7, 11)),
        ((5,), (1, 11)),
        ((2, 4), (4, 1, 11)),
        ((2, 3, 4), (2, 1, 4, 7, 11)),
        ((2, 3, 4), (3, 1, 7, 11)),
        ((2, 3, 4), (7, 1)),
        ((3, 1, 2, 4), (3, 1, 1, 1, 7, 11)),
    ],
)
def test_ranks_and_mask_ranks(kernel, lead, mask):
    query, key, value = torch.randn(*lead, 7, 16), torch.randn(*lead, 11, 16), torch.randn(*lead, 11, 16)
    for bias in (torch.randn(mask), torch.rand(mask) > 0.4):
        torch.compiler.reset()
        site = only_site(sdpa, query, key, value, bias, backend=kernel)
        assert site.chosen == kernel


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
def test_what_sdpa_broadcasts_is_expanded(kernel):
    """Kernels do not broadcast: the CPU kernel reads another batch's keys without an error."""
    query, key, value = qkv(batch=3)
    only_site(sdpa, query, key[:1], value, backend=kernel)
    torch.compiler.reset()
    only_site(sdpa, query, key[:, :1], value[:1, :1], backend=kernel)


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
def test_last_dimension_with_a_stride(kernel):
    """The CPU kernel reads such rows as if they were dense."""
    query, key, value = (tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in qkv())
    assert query.stride(-1) != 1
    only_site(sdpa, query, key, value, backend=kernel)


def test_grouped_heads_of_rank_3_stay():
    """In a call of rank 3 the first dimension is the heads, which SDPA repeats: such a call is not swapped."""
    query, key, value = torch.randn(8, 7, 16), torch.randn(2, 11, 16), torch.randn(2, 11, 16)
    run, backend = compiled(lambda *given: sdpa(*given, enable_gqa=True), "_native_math")
    assert torch.equal(run(query, key, value), sdpa(query, key, value, enable_gqa=True))
    assert backend.report.sites[0].refusals[0][1].code is attnrewrite.Code.CONTEXT


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
def test_grouped_heads(kernel):
    query, key, value = qkv(heads=6, kv_heads=2)
    site = only_site(lambda *given: sdpa(*given, enable_gqa=True), query, key, value, backend=kernel)
    assert (site.call.heads, site.call.kv_heads) == (6, 2)


def test_the_call_says_what_the_model_asks():
    query, key, value = qkv(value_dim=24)
    run, backend = compiled(lambda q, k, v: sdpa(q, k, v, dropout_p=0.25, scale=0.3), "native")
    run(query, key.requires_grad_(), value)
    call = backend.report.sites[0].call
    assert (call.batch, call.heads, call.q_len, call.kv_len, call.head_dim, call.value_dim) == (2, 4, 7, 11, 16, 24)
    assert (call.dtype, call.device, call.scale, call.dropout) == ("float32", "cpu", 0.3, 0.25)
    assert (call.needs_grad, call.layout, call.mask.kind) == (True, "bshd", MaskKind.NONE)


def test_activation_checkpoint():
    query, key, value = qkv()

    def step(q):
        return torch.utils.checkpoint.checkpoint(attend, q, key, value, use_reentrant=False).square().sum()

    for inner in ("eager", "aot_eager", "inductor"):
        torch.compiler.reset()
        backend = attnrewrite.with_backend("_native_flash", inner=inner)
        expected, given = query.clone().requires_grad_(), query.clone().requires_grad_()
        step(expected).backward()
        torch.compile(step, backend=backend)(given).backward()
        assert [site.chosen for site in backend.report.sites] == ["_native_flash"]
        assert relative(given.grad, expected.grad) < 1e-5


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
def test_branches_of_cond_keep_their_strides(kernel):
    """Both branches must return the same layout, so a swapped one has to restore it."""

    def step(q, k, v):
        return torch.cond(q.sum() > 0, lambda q, k, v: sdpa(q, k, v), lambda q, k, v: sdpa(q, k, v) * 2, (q, k, v))

    query, key, value = qkv()
    for sign in (1, -1):
        torch.compiler.reset()
        run, backend = compiled(step, kernel)
        assert relative(run(query.abs() * sign, key, value), step(query.abs() * sign, key, value)) < 1e-5
        assert [site.chosen for site in backend.report.sites] == [kernel, kernel]


def test_nested_compile_region():
    @torch.compiler.nested_compile_region
    def block(x):
        return sdpa(x, x, x)

    def step(x):
        return block(block(x))

    query = qkv()[0]
    run, backend = compiled(step, "_native_math", inner="aot_eager")
    assert relative(run(query), step(query)) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {"_native_math"}


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query):
        return 3 * sdpa(query, query, query)

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def test_custom_autograd_function():
    query = qkv()[0].requires_grad_()
    run, backend = compiled(lambda q: Tripled.apply(q), "_native_math", inner="aot_eager")
    output = run(query)
    assert relative(output.detach(), Tripled.apply(query).detach()) < 1e-5
    output.sum().backward()
    assert torch.equal(query.grad, torch.full_like(query, 3))
    assert [site.chosen for site in backend.report.sites] == ["_native_math"]


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math", "flex"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_region(kernel, inner):
    """SDPA computes in autocast's dtype whatever it is given; the swapped op must too."""
    query, key, value = qkv()
    mask = torch.randn(2, 1, 7, 11)

    def step(q, k, v, m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k.bfloat16(), v, m)

    run, backend = compiled(step, kernel, inner)
    output = run(query, key, value, mask)
    assert output.dtype == torch.bfloat16
    rounded = [tensor.bfloat16().double() for tensor in (query, key, value, mask)]
    assert relative(output, sdpa(*rounded)) < 1.2e-2
    (site,) = backend.report.sites
    assert (site.chosen, site.call.dtype, site.call.mask.dtype) == (kernel, "bfloat16", "bfloat16")


def test_a_mask_under_autocast_is_cast_with_tensors_that_need_no_cast():
    """The dtypes of the call do not show that autocast is on; the autocast regions of the graph and of its subgraphs do."""
    mask = torch.randn(2, 1, 7, 11)

    def inside(q, k, v, m):
        return sdpa(q, k, v, m) + torch.utils.checkpoint.checkpoint(sdpa, q, k, v, m, use_reentrant=False)

    def step(q, k, v, m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                first = inside(q, k, v, m)
            second = inside(q, k, v, m)
        return first, second, inside(q, k, v, m)

    class Step(torch.nn.Module):
        def forward(self, *given):
            return step(*given)

    tensors = qkv(dtype=torch.bfloat16)
    run, backend = compiled(step, "_native_math")
    run(*tensors, mask)
    dtypes = ["bfloat16"] * 2 + ["float32"] * 4
    assert sorted(site.call.mask.dtype for site in backend.report.sites) == dtypes
    exported = torch.export.export(Step(), (*tensors, mask))
    plan = rewrite_graph(exported.graph_module, make_policy(["_native_math"]), libraries=Libraries.PLAN_ONLY).plan
    assert sorted(site.call.mask.dtype for site in plan.sites) == dtypes


def test_autocast_around_the_compiled_function():
    query, key, value = qkv()
    run, backend = compiled(sdpa, "_native_flash", "aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(query, key, value)
    assert output.dtype == torch.bfloat16
    assert backend.report.sites[0].call.dtype == "bfloat16"


def graph_of(function, *tensors, backend="_native_flash"):
    """The names of the calls in the graph that the inner compiler receives."""
    seen = []

    def inner(graph_module, example_inputs):
        seen.append([str(getattr(node.target, "__name__", node.target)) for node in graph_module.graph.nodes])
        return graph_module.forward

    compiled(function, attnrewrite.with_backend(backend, inner=inner))[0](*tensors)
    return seen[0]


def within_math(q):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, q, q)


def nested_contexts(q):
    with sdpa_kernel(SDPBackend.MATH):
        first = sdpa(q, q, q)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return sdpa(first, q, q)


@pytest.mark.parametrize("function", [within_math, nested_contexts])
def test_kernel_contexts_go_in_pairs(function):
    """The choice of `sdpa_kernel` is neither set nor restored in the graph where no op reads it any more."""
    query = qkv()[0]
    assert "_sdpa_kernel" not in graph_of(function, query)
    torch.compiler.reset()
    before = graph_of(function, query, backend="native")
    assert before.count("_sdpa_kernel") == 2 * (1 + (function is nested_contexts))


def test_kernel_context_stays_for_a_call_that_stays():
    def step(q, v):
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(q, q, q), sdpa(q, q, v)  # the CPU kernel refuses another value_dim

    query, _, value = qkv(q_len=11, value_dim=24)
    names = graph_of(step, query, value)
    assert names.count("_sdpa_kernel") == 2
    assert "scaled_dot_product_attention" in names


def test_the_choice_of_the_process_is_left_alone():
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    run, _ = compiled(nested_contexts, "_native_flash")
    run(qkv()[0])
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before


TRANSFORMS = {
    "grad": lambda q: torch.func.grad(lambda q: sdpa(q, q, q).square().sum())(q),
    "vmap": lambda q: torch.func.vmap(lambda q: sdpa(q, q, q))(torch.stack([q, 2 * q])),
    "jvp": lambda q: torch.func.jvp(lambda q: sdpa(q.double(), q.double(), q.double()).sum(), (q,), (q,))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch, of vmap over its own CPU kernel
def test_functorch_transforms(transform):
    """Kernels have no rules for every transform: the call stays SDPA there, with the reason."""
    function = TRANSFORMS[transform]
    query = qkv()[0]
    if transform == "jvp":
        with sdpa_kernel(SDPBackend.MATH):
            run, backend = compiled(function, "_native_math")
            assert relative(run(query), function(query)) < 1e-5
    else:
        run, backend = compiled(function, "_native_math")
        assert relative(run(query), function(query)) < 1e-5
    (site,) = backend.report.sites
    assert site.chosen is None
    assert f"torch.func.{transform}" in site.refusals[0][1].detail


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transform_around_a_subgraph():
    """The branch of a cond does not say that it is called under torch.func.vmap."""

    def branch(q):
        return sdpa(q, q, q)

    def step(q):
        return torch.func.vmap(lambda q: torch.cond(torch.tensor(True), branch, lambda q: 2 * q, (q,)))(q)

    query = torch.stack(qkv()[0:1] * 3)
    run, backend = compiled(step, "_native_math")
    assert relative(run(query), torch.func.vmap(branch)(query)) < 1e-5
    (site,) = backend.report.sites
    assert site.chosen is None
    assert "torch.func.vmap" in site.refusals[0][1].detail


def test_mask_together_with_is_causal_stays():
    """Before 2.14, the CPU kernel of SDPA takes both, others raise: nothing else can be right. Since then SDPA raises."""

    def both(*given):
        return sdpa(*given, is_causal=True)

    query, key, value = qkv()
    bias = torch.randn(7, 11)
    if satisfies(torch.__version__, ">=2.14"):
        for run in (both, torch.compile(both, backend=with_backend("_native_math", inner="eager"))):
            with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
                run(query, key, value, bias)
        return
    site = only_site(both, query, key, value, bias)
    assert site.chosen is None
    assert "both attn_mask and is_causal" in site.refusals[0][1].detail


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = (
            layer(source).unflatten(-1, (4, 8)).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        return sdpa(q, k, v).transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Attention(), Attention()])
        self.cross = Attention()

    def forward(self, x, memory):
        for block in self.blocks:
            x = block(x)
        return self.cross(x, memory)


def test_site_names_and_roles():
    model = Model()
    run, backend = compiled(model, "native")
    run(torch.randn(2, 7, 32), torch.randn(2, 7, 32))
    assert [(site.name, site.call.role) for site in backend.report.sites] == [
        ("blocks.0", "self"),
        ("blocks.1", "self"),
        ("cross", "cross"),
    ]


def test_two_calls_of_one_module_have_two_names():
    run, backend = compiled(lambda q: sdpa(sdpa(q, q, q), q, q), "native")
    run(qkv()[0])
    assert [site.name for site in backend.report.sites] == ["<lambda>", "<lambda>#2"]


def test_view_behind_a_kernel_of_another_layout():
    """SDPA's CPU kernel returns (B, S, H, D) memory, which the model may `view`; math returns (B, H, S, D)."""

    def step(q, k, v):
        return sdpa(q, k, v).transpose(1, 2).view(2, 7, 64)

    query, key, value = qkv()
    only_site(step, query, key, value, backend="_native_math")


@pytest.mark.parametrize(
    "tail",
    [
        lambda x: x.clone().as_strided((2, 7, 64), (448, 64, 1)),
        lambda x: x.transpose(1, 2).reshape(2, 7, 4, 16).view(2, 7, 64),
        lambda x: x.flatten(0, 0).transpose(1, 2).view(2, 7, 64),
        lambda x: torch.einsum("bhsd->bshd", x).view(2, 7, 64),
        lambda x: torch.cat([x.transpose(1, 2)], -1).add(1).transpose(1, 2).clone(),
    ],
    ids=["clone", "reshape", "flatten", "einsum", "cat"],
)
def test_what_passes_strides_on(tail):
    """An op after the attention keeps the memory order for a later reader."""

    def step(q, k, v):
        return tail(sdpa(q, k, v))

    query, key, value = qkv()
    run, backend = compiled(step, "_native_math")
    output, expected = run(query, key, value), step(query, key, value)
    assert backend.report.sites[0].chosen == "_native_math"
    assert relative(output, expected) < 1e-5
    assert output.stride() == expected.stride()


def test_a_copy_that_would_be_a_view():
    """With the CPU kernel's (B, S, H, D) memory this reshape is a view, with math's (B, H, S, D) a copy: a write shows it."""

    def step(q, k, v, weight):
        output = sdpa(q, k, v)
        output.reshape(2, 4, -1).add_(1.0)
        return F.linear(output, weight)

    tensors = (*qkv(), torch.randn(5, 16))
    run, _ = compiled(step, "_native_math")
    assert relative(run(*tensors), step(*tensors)) < 1e-5


@torch.library.custom_op("attnrewrite_tests::reads_dense_memory", mutates_args=())
def reads_dense_memory(x: torch.Tensor) -> torch.Tensor:
    """As a kernel in C that is given dense memory and looks at no strides."""
    return torch.as_strided(x, (x.numel(),), (1,)).clone().view(x.shape)


@reads_dense_memory.register_fake
def _(x):
    return x.new_empty(x.shape)


@pytest.mark.parametrize("kernel", ["_native_math", "_native_flash", "flex"])
def test_an_op_that_nobody_knows_gets_the_strides_that_it_had(kernel):
    def step(q, k, v, weight):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.linear(reads_dense_memory(sdpa(q, k, v).transpose(1, 2)).flatten(2), weight)

    tensors = (*(each.transpose(1, 2).contiguous() for each in qkv()), torch.randn(5, 64))
    run, _ = compiled(step, kernel)
    with torch.no_grad():
        assert relative(run(*tensors), step(*tensors)) < 1e-5


@torch.library.custom_op("attnrewrite_tests::flash_is_on", mutates_args=())
def flash_is_on(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float(torch.backends.cuda.flash_sdp_enabled()))


@flash_is_on.register_fake
def _(x):
    return torch.empty_like(x)


def test_kernel_context_stays_for_an_op_that_may_ask_for_it():
    def step(q):
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(q, q, q) + flash_is_on(q)

    query = qkv()[0]
    run, backend = compiled(step, "_native_flash")
    assert relative(run(query), step(query)) < 1e-5
    assert backend.report.swapped == 1


def test_no_copy_where_nobody_would_notice():
    """The usual ops after attention give a dense tensor, whether they copy math's (B, H, S, D) memory or not."""
    assert "contiguous" not in graph_of(attend, *qkv(), backend="_native_math")


def test_returned_output_keeps_its_strides():
    query, key, value = qkv()
    run, _ = compiled(sdpa, "_native_math")
    assert run(query, key, value).stride() == sdpa(query, key, value).stride()


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.scale = 0.0, 0.25

    def forward(self, query):
        return sdpa(query, query, query, dropout_p=self.dropout, scale=self.scale)


def test_numbers_that_dynamic_shapes_make_symbolic():
    module = Scaled()
    run, backend = compiled(module, "_native_flash", dynamic=True)
    query = qkv()[0]
    assert relative(run(query), module(query)) < 1e-5
    assert (backend.report.sites[0].chosen, backend.report.sites[0].call.scale) == ("_native_flash", 0.25)
    module.scale = 0.5
    assert relative(run(query), module(query)) < 1e-5


def test_a_mask_that_is_written_to_is_read_again():
    """Its bias is built once a mask, but not across a write."""

    def step(q, k, v, mask):
        mask = mask.clone()
        first = sdpa(q, k, v, mask)
        mask[..., 3:] = True
        second = sdpa(q, k, v, mask)
        mask[..., 0, :].fill_(True)
        return first + 2 * second + 3 * sdpa(q, k, v, mask)

    only = compiled(step, "_native_flash")[0]
    query, key, value = qkv()
    mask = torch.rand(2, 1, 7, 11) > 0.5
    assert relative(only(query, key, value, mask), step(query, key, value, mask)) < 1e-5


@torch.library.custom_op("attnrewrite_tests::hide", mutates_args=("mask",))
def hide(mask: torch.Tensor) -> None:
    mask[..., 3:] = 0


@hide.register_fake
def _(mask):
    return None


@torch.compiler.allow_in_graph
def hide_unseen(mask):
    mask[..., 3:] = 0
    return mask


WRITES = {
    "custom op": hide,
    "allowed in graph": hide_unseen,
    "inplace=": lambda mask: F.relu(mask, inplace=True),
    "inplace by position": lambda mask: F.elu(mask, 1.0, True),
    "foreach": lambda mask: torch._foreach_mul_([mask], -3.0),
    "out=": lambda mask: torch.add(mask, 5.0, out=mask),
    "+=": lambda mask: operator.iadd(mask, torch.arange(11.0)),
    "function": torch.relu_,
    "of a view": lambda mask: mask[..., 2:].mul_(-2),
    "aten": lambda mask: torch.ops.aten.mul_(mask, -3.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_kind_of_write_is_noticed(write):
    def step(q, k, v, mask):
        mask = mask.clone()
        first = sdpa(q, k, v, mask)
        WRITES[write](mask)
        return first + 2 * sdpa(q, k, v, mask)

    query, key, value = qkv()
    mask = torch.randn(2, 1, 7, 11)
    copies = replace(records_of("_native_math")[0], prepare=lambda mask, key, call: mask.clone())
    run, backend = compiled(step, copies)
    assert relative(run(query, key, value, mask), step(query, key, value, mask)) < 1e-5
    assert all(site.chosen for site in backend.report.sites)


def biases(step, *tensors):
    """How many boolean masks become a bias in the graph."""
    return graph_of(step, *tensors, backend="_native_math").count("where")


def test_what_is_only_read_is_shared():
    """The other way round: an op that writes elsewhere, and functions that write nothing, leave one bias for both sites."""

    def step(q, k, v, mask):
        first = sdpa(q, k, v, mask)
        F.relu(first, inplace=True)
        hide(first)
        seen = torch.ops.aten.logical_not(mask).sum() + F.dropout(first, 0.5, False).sum()
        return first + 2 * sdpa(q, k, v, mask) + seen

    assert biases(step, *qkv(), torch.rand(2, 1, 7, 11) > 0.5) == 1


def test_a_learned_bias_that_nobody_trains():
    """Under no_grad a parameter still says that it requires a gradient."""
    bias = torch.nn.Parameter(torch.randn(2, 1, 7, 11))
    for mode, chosen in ((torch.no_grad(), "_native_flash"), (torch.enable_grad(), None)):
        torch.compiler.reset()
        run, backend = compiled(lambda q, k, v: sdpa(q, k, v, bias), "_native_flash")
        with mode:
            assert relative(run(*(tensors := qkv())), sdpa(*tensors, bias)) < 1e-5
        assert backend.report.sites[0].chosen == chosen


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="a fake tensor on a second GPU needs one where there is a first"
)
def test_two_devices_in_one_graph():
    """What is built once is built on the device where it is read."""
    graph, mode = torch.fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        values = [torch.empty(2, 4, 7, 64, dtype=torch.bfloat16, device=f"cuda:{index}") for index in (0, 1)]
        for index, value in enumerate(values):
            node = graph.placeholder(f"x{index}")
            node.meta["example_value"] = value
            node = graph.call_function(sdpa, (node, node, node))
            node.meta["example_value"] = value.clone()
    graph.output(())
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    machine = Machine("cuda", (9, 0), {"torch": torch.__version__})
    plan = rewrite_graph(module, make_policy(["_native_varlen"]), Target(machine)).plan
    assert [site.chosen for site in plan.sites] == ["_native_varlen"] * 2
    for node in module.graph.nodes:
        read = [source.meta["example_value"] for source in node.all_input_nodes]
        assert len({value.device for value in read if isinstance(value, torch.Tensor)}) < 2


def test_transposes_of_the_model_are_its_own():
    def step(q):
        return sdpa(q, q, q), q.transpose(1, 2).transpose(1, 2)

    names = graph_of(step, qkv()[0])
    assert names.count("transpose") == 2
