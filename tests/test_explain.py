"""`explain` says what a backend would do, runs no attention and leaves nothing behind."""

import copy

import pytest
import torch
from model_zoo import MODELS
from parity import attend, qkv, relative

import attnrewrite
from attnrewrite import AttentionRefusedError, Code, Machine, MaskKind, Report, explain, with_backend
from attnrewrite.kernels.machines import satisfies

HOPPER = Machine("cuda", capability=(9, 0), packages={"torch": "2.11.0", "cudnn": "9.19.0"})


# PyTorch's own, of a graph break in training: Dynamo looks whether the tensors in between have a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 32)

    def forward(self, x, mask=None):
        query = self.project(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return attend(query, query, query, mask)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x, mask=None):
        return self.attn(x, mask)


class Model(torch.nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


class Broken(Model):
    """No loop: a graph break in one makes Dynamo leave the whole frame to Python."""

    def forward(self, x):
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        return self.blocks[2](x)


def hidden(length=7, **options):
    return torch.randn(2, length, 32, **options)


def names(report):
    return [site.name for site in report.sites]


ATTENTIONS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


# -- what can be explained


def test_function():
    report = explain(attend, *qkv(), backend="_native_math")
    assert (names(report), report.swapped) == (["attend"], 1)


def test_keyword_arguments():
    query, key, value = qkv()
    report = explain(attend, query=query, key=key, value=value, is_causal=True, backend="_native_math")
    assert report.sites[0].call.mask.kind is MaskKind.CAUSAL_UPPER_LEFT


def test_method():
    assert explain(Model().forward, hidden(), backend="_native_math").swapped == 3


def test_module():
    report = explain(Model(), hidden(), backend="_native_math")
    assert (names(report), report.swapped) == (ATTENTIONS, 3)


@pytest.mark.parametrize("called", [False, True])
def test_compiled_module(called):
    backend = with_backend("native", inner="eager")
    model = torch.compile(Model(), backend=backend)
    if called:
        model(hidden())
    report = explain(model, hidden(), backend="_native_math")
    assert (names(report), report.swapped) == (ATTENTIONS, 3)
    assert backend.report.native == 3 * called


@pytest.mark.parametrize("called", [False, True])
def test_module_compiled_in_place(called):
    backend = with_backend("native", inner="eager")
    model = Model()
    model.compile(backend=backend)
    if called:
        model(hidden())
    report = explain(model, hidden(), backend="_native_math")
    assert (names(report), report.swapped) == (ATTENTIONS, 3)
    assert len(backend.report.graphs) == called
    assert model._compiled_call_impl is not None


def test_compiled_function():
    backend = with_backend("native", inner="eager")
    run = torch.compile(attend, backend=backend)
    run(*qkv())
    assert explain(run, *qkv(), backend="_native_math").sites[0].chosen == "_native_math"
    assert len(backend.report.graphs) == 1


def test_module_whose_blocks_are_compiled():
    backend = with_backend("native", inner="eager")
    model = Model()
    for block in model.blocks:
        block.compile(backend=backend)
    model(hidden())
    before = backend.report.to_json()
    assert names(explain(model, hidden(), backend="_native_math")) == ATTENTIONS
    assert backend.report.to_json() == before


def test_graph_breaks():
    report = explain(Broken(), hidden(), backend="_native_math")
    assert names(report) == ATTENTIONS
    assert len(report.graphs) == 3


@pytest.mark.parametrize(
    "backend",
    [
        "flex",
        ["flex"],
        ("flex", "native"),
        attnrewrite.records_of("flex")[1],
        [attnrewrite.records_of("flex")[1], "native"],
        with_backend("flex", inner="eager"),
    ],
    ids=["name", "list", "tuple", "record", "list with a record", "object"],
)
def test_ways_to_name_a_backend(backend):
    with torch.no_grad():
        assert {site.chosen for site in explain(Model(), hidden(), backend=backend).sites} == {"flex"}


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="did you mean 'flex'"):
        explain(attend, *qkv(), backend="flx")


def test_rules_are_explained():
    report = explain(Model(), hidden(), backend=with_backend("native", rules={"*.1.attn": "_native_math"}))
    assert [(site.chosen, site.rule) for site in report.sites] == [
        ("native", None),
        ("_native_math", "*.1.attn"),
        ("native", None),
    ]


def test_strict_names_every_refused_site():
    backend = with_backend("_native_cudnn", strict=True)
    sites = explain(Model(), hidden(), backend=with_backend("_native_cudnn")).sites
    with pytest.raises(AttentionRefusedError, match=f"{len(sites)} of {len(sites)} attention sites") as raised:
        explain(Model(), hidden(), backend=backend)
    for site in sites:
        assert f"  {site.name}: _native_cudnn: DEVICE" in str(raised.value)


@pytest.mark.filterwarnings("ignore:rules. .* matches none")
def test_strict_of_a_model_without_attention_and_of_rules_without_a_match():
    plain = torch.nn.Linear(32, 32)
    with pytest.raises(AttentionRefusedError, match="no attention was found"):
        explain(plain, hidden(), backend=with_backend("native", strict=True))
    assert str(explain(plain, hidden(), backend="native")).endswith("no attention found")
    rules = {"*.attn": "native", "*.atn": "flex", "cross": "flex"}
    with pytest.raises(
        ValueError, match=r"rules match none of the 3 attention sites:\n  '\*\.atn'; one of the sites is '.*attn'$"
    ):
        explain(Model(), hidden(), backend=with_backend("native", rules=rules, strict=True))


@pytest.mark.parametrize("call", [explain, attnrewrite.check, attnrewrite.tune])
def test_a_class_is_refused_before_pytorch_changes_it(call):
    class Net(Model):
        pass

    before = Net.__call__
    for model, said in ((Net, r"model is the class Net: give an object of it, as Net\(...\)"), (3, "model is 3")):
        with pytest.raises(TypeError, match=said):
            call(model, hidden(), **({} if call is attnrewrite.tune else {"backend": "native"}))
    assert Net.__call__ is before
    with torch.no_grad():
        assert torch.compile(Net().eval(), backend="eager")(hidden()).shape == hidden().shape


def test_strict_of_a_context_too():
    with pytest.raises(AttentionRefusedError), attnrewrite.attention_backend("_native_cudnn", strict=True):
        explain(Model(), hidden(), backend="native")


@pytest.mark.filterwarnings("ignore:rules. .* matches none")  # before the second graph is there
def test_what_is_explained_is_what_happens():
    model, x = Broken(), hidden()
    backend = with_backend("_native_cudnn", "_native_flash", rules={"*.1.attn": "_native_math"}, inner="eager")
    report = explain(model, x, backend=backend)
    torch.compile(model, backend=backend, dynamic=False)(x)
    assert report.sites == backend.report.sites


# -- nothing runs


@pytest.fixture
def executed():
    """The calls of an operator that were given real tensors."""
    seen = []
    library = torch.library.Library("attnrewrite_tests", "FRAGMENT")
    library.define("scaled(Tensor x) -> Tensor")
    library.impl("scaled", lambda x: (seen.append(tuple(x.shape)), 2 * x)[1], "CPU")
    library.impl("scaled", torch.empty_like, "Meta")
    yield seen
    library._destroy()


def test_operators_are_not_run(executed):
    def step(query, key, value):
        query = torch.ops.attnrewrite_tests.scaled(query)
        torch._dynamo.graph_break()
        return attend(torch.ops.attnrewrite_tests.scaled(query), key, value)

    given = qkv()
    step(*given)
    assert len(executed) == 2
    assert len(explain(step, *given, backend="_native_flash").sites) == 1
    assert len(executed) == 2


@pytest.mark.parametrize("kernel", ["native", "_native_math"])
def test_no_attention_is_run(kernel):
    """It would take 2 ** 36 scores a head, here 256 GiB."""
    query = torch.empty(1, 1, 8, 2**18).zero_().transpose(2, 3)
    report = explain(attend, query, query, query, backend=kernel)
    assert report.sites[0].call.q_len == 2**18


def test_code_behind_a_graph_break_sees_zeros_of_the_right_kind():
    seen = []

    def step(query, key, value):
        output = attend(query, key, value)
        torch._dynamo.graph_break()
        seen.append(output)
        return output.sum()

    given = qkv(dtype=torch.bfloat16)
    step(*given)
    explain(step, *given, backend="native")
    real, zeros = seen
    assert (zeros.shape, zeros.stride(), zeros.dtype) == (real.shape, real.stride(), real.dtype)
    assert not zeros.any()


def test_random_numbers_are_not_drawn():
    given, state = qkv(), torch.get_rng_state()
    explain(lambda *given: attend(*given, dropout_p=0.5), *given, backend="native")
    assert torch.equal(torch.get_rng_state(), state)


# -- hardware that is not there


@pytest.mark.parametrize("kernel", ["_native_cudnn", "_native_flash"])
def test_meta_model_on_a_described_machine(kernel):
    with torch.device("meta"):
        model, x = Model().bfloat16(), hidden(5000, dtype=torch.bfloat16)
    with torch.no_grad():
        report = explain(model, x, backend=[kernel, "native"], machine=HOPPER)
    assert {(site.chosen, site.call.device, site.call.dtype) for site in report.sites} == {(kernel, "cuda", "bfloat16")}
    assert report.graphs[0].machine == HOPPER
    assert "sm_90, torch 2.11.0, cudnn 9.19.0" in str(report)


def reads_a_number(query):
    return attend(query, query, query) * int(query.sum())


def chooses_rows(query):
    return attend(query, query, query)[query[:, 0, 0, 0].nonzero()]


def makes_a_tensor_of_a_size(query):
    length = query[..., 0].new_tensor(query.shape[2])
    return attend(query, query, query) * torch.where(query[..., 0] > 0, query[..., 0], length).sum()


@pytest.mark.parametrize("model", [reads_a_number, chooses_rows])
def test_what_does_not_trace_on_meta_runs_on_a_cpu(model):
    query = qkv()[0]
    said = rf"^{model.__name__} does not trace on meta.*: run it on CPU with machine=.*\. PyTorch says: "
    with pytest.raises(RuntimeError, match=said) as raised:
        explain(model, query.to("meta"), backend="native", machine=HOPPER)
    assert len(str(raised.value)) < 600
    assert [site.chosen for site in explain(model, query, backend="native", machine=HOPPER).sites] == ["native"]


def test_a_tensor_made_of_a_size_on_meta():
    """Dynamo leaves it outside of its fake mode before 2.15, as in Qwen-Image with a padded prompt."""
    query = qkv()[0].to("meta")
    if satisfies(torch.__version__, ">=2.15"):
        assert len(explain(makes_a_tensor_of_a_size, query, backend="native").sites) == 1
        return
    said = r"does not trace on meta \(.*\.py:\d+\): run it on CPU with machine="
    with pytest.raises(RuntimeError, match=said) as raised:
        explain(makes_a_tensor_of_a_size, query, backend="native")
    assert len(str(raised.value)) < 600


def test_an_error_of_the_model_on_meta_stays_its_own():
    with pytest.raises(RuntimeError, match="Expected size"):
        explain(lambda query: attend(query, query, query) + query @ query, qkv()[0].to("meta"), backend="native")


def test_described_machine_refuses_what_it_cannot():
    with torch.device("meta"):
        model, x = Model(), hidden()
    older = Machine("cuda", capability=(7, 5), packages={"torch": "2.11.0"})
    report = explain(model, x, backend=["_native_flash", "_native_cudnn"], machine=older)
    codes = {name: refused.code for name, refused in report.sites[0].refusals}
    assert codes == {"_native_flash": Code.CAPABILITY, "_native_cudnn": Code.MISSING}
    report = explain(model, x, backend="_native_flash", machine=HOPPER)
    assert report.sites[0].refusals[0][1].code is Code.DTYPE


def cast(value):
    """On the meta device, floats as bfloat16."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("meta", torch.bfloat16 if value.is_floating_point() else value.dtype)


@pytest.mark.parametrize("kernel", ["_native_cudnn", "_native_flash"])
def test_flux_on_meta(kernel):
    model, inputs = MODELS["flux"]()
    model = model.to("meta", torch.bfloat16)
    inputs = {name: cast(value) for name, value in inputs.items()}
    with torch.no_grad():
        report = explain(model, **inputs, backend=[kernel, "native"], machine=HOPPER)
    assert names(report) == [
        *(f"transformer_blocks.{index}.attn" for index in range(2)),
        *(f"single_transformer_blocks.{index}.attn" for index in range(2)),
    ]
    assert {(site.chosen, site.call.dtype) for site in report.sites} == {(kernel, "bfloat16")}
    assert {site.call.q_len for site in report.sites} == {7 + 15}


# -- the model stays as it was


class Stateful(torch.nn.Module):
    """Counts its calls in a buffer, in place or by a new tensor, in a graph or behind a graph break."""

    def __init__(self, how):
        super().__init__()
        self.block, self.how = Block(), how
        self.norm = torch.nn.BatchNorm1d(7)
        self.register_buffer("calls", torch.full((3,), 5.0))

    def forward(self, x):
        x = self.block(self.norm(x))
        if self.how == "broken":
            torch._dynamo.graph_break()
        if self.how == "new":
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return x + self.calls.sum()


@pytest.mark.parametrize("how", ["in place", "broken", "new"])
def test_parameters_and_buffers_are_unchanged(how):
    model, x = Stateful(how), hidden()
    before, tensors = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    explain(model, x, backend="_native_math")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(tensors[name] is buffer for name, buffer in model.named_buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_are_unchanged():
    def step(query, key, value):
        return attend(query.mul_(2), key, value)

    query, key, value = qkv()
    before = query.clone()
    explain(step, query, key, value, backend="native")
    assert torch.equal(query, before)


def test_the_model_runs_as_before():
    model, x = Model(), hidden()
    expected = model(x)
    explain(model, x, backend="_native_math")
    assert torch.equal(model(x), expected)
    assert relative(torch.compile(model, backend="eager")(x).detach(), expected.detach()) < 1e-5


# -- PyTorch stays as it was


@torch._dynamo.config.patch(automatic_dynamic_shapes=False, fail_on_recompile_limit_hit=True, recompile_limit=4)
@pytest.mark.parametrize("kind", [Model, Broken])
def test_explaining_leaves_no_compiled_code(kind):
    model = kind()
    backend = with_backend("_native_flash", inner="eager")
    run = torch.compile(model, backend=backend)
    run(hidden(5))
    before = backend.report.to_json()
    for index in range(6):
        assert explain(run, hidden(5 + index), backend="_native_math").swapped == 3
    assert backend.report.to_json() == before
    with torch.compiler.set_stance("fail_on_recompile"):
        run(hidden(5))
    for length in range(6, 9):
        x = hidden(length)
        assert relative(run(x).detach(), model(x).detach()) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {"_native_flash"}
    assert {site.call.q_len for site in backend.report.sites} == set(range(5, 9))
    assert len(backend.report.sites) == 4 * 3


@torch._dynamo.config.patch(automatic_dynamic_shapes=False, fail_on_recompile_limit_hit=True, recompile_limit=4)
def test_explaining_before_compiling_leaves_no_compiled_code():
    model = Model()
    for length in range(5, 11):
        explain(model, hidden(length), backend="_native_math")
    backend = with_backend("_native_flash", inner="eager")
    run = torch.compile(model, backend=backend)
    for length in range(5, 9):
        run(hidden(length))
    assert len(backend.report.graphs) == 4


def test_explaining_with_an_equal_backend_compiles_nothing_for_it():
    model, x = Model(), hidden()
    backend = with_backend("_native_flash", inner="eager")
    explain(model, x, backend=backend)
    assert backend.report.graphs == []
    torch.compile(model, backend=backend)(x)
    assert backend.report.swapped == 3


def test_errors_of_the_model_pass_and_leave_nothing():
    def step(query):
        output = attend(query, query, query)
        torch._dynamo.graph_break()
        if not output.any():
            raise KeyError("of the model")
        return output

    query = qkv()[0]
    limit = torch._dynamo.config.recompile_limit
    with pytest.raises(KeyError, match="of the model"):
        explain(step, query, backend="native")
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._dynamo.convert_frame._bytecode_hooks == {}
    backend = with_backend("_native_flash", inner="eager")
    assert relative(torch.compile(step, backend=backend)(query), step(query)) < 1e-5
    assert backend.report.swapped == 1


# -- the report


@pytest.fixture
def report():
    """Three blocks that refuse two kernels, on a CPU."""
    mask = torch.rand(2, 1, 7, 7) > 0.5
    mask[..., 0] = True
    with torch.no_grad():
        return explain(Model(), hidden(), mask, backend=["_native_cudnn", "_native_flash"])


def test_a_site(report):
    site = report.sites[1]
    call = site.call
    assert (site.name, site.chosen) == ("blocks.1.attn", "_native_flash")
    assert (call.batch, call.heads, call.kv_heads, call.q_len, call.kv_len, call.head_dim) == (2, 4, 4, 7, 7, 8)
    assert (call.dtype, call.device, call.role, call.needs_grad) == ("float32", "cpu", "self", False)
    assert (call.mask.kind, call.mask.shape) == (MaskKind.BOOLEAN, (2, 1, 7, 7))
    assert [name for name, _ in site.decisions] == ["_native_cudnn", "_native_flash"]
    assert site.decisions[0][1].code is Code.DEVICE
    assert site.decisions[1][1] == attnrewrite.Accepted()


def test_text(report):
    text = str(report)
    assert "3 attention sites in 1 graph: 3 swapped, 0 native, 0 left as they were" in text
    (row,) = (line for line in text.splitlines() if line.startswith("blocks"))
    assert row.split("  ")[0] == "blocks.0-2.attn (3)"
    for part in ("(2, 4, 7, 8)", "4 x 7 x 8", "float32", "boolean (2, 1, 7, 7)", "_native_flash"):
        assert part in row
    refusal = "_native_cudnn refused: DEVICE: _native_cudnn runs on cuda, the call is on cpu. Move the model to cuda"
    assert text.count(refusal) == 1


def test_text_of_what_stays():
    text = str(explain(attend, *qkv(), backend="_native_cudnn"))
    assert "1 attention site in 1 graph: 0 swapped, 0 native, 1 left as they were" in text
    assert "(unchanged)" in text


def test_text_folds_only_what_is_alike():
    model = Model(5)
    backend = with_backend("native", rules={"*.2.attn": "_native_math"})
    rows = [line.split("  ")[0] for line in str(explain(model, hidden(), backend=backend)).splitlines()]
    assert [row for row in rows if row.startswith("blocks")] == ["blocks.0-1,3-4.attn (4)", "blocks.2.attn"]


def test_text_folds_across_graphs():
    text = str(explain(Broken(), hidden(), backend="native"))
    assert "3 attention sites in 3 graphs" in text
    assert "blocks.0-2.attn (3)" in text


def test_text_folds_paths_that_end_in_a_number():
    class Plain(Model):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Attention() for _ in range(3)])

    assert "blocks.0-2 (3)" in str(explain(Plain(), hidden(), backend="native"))


def test_text_cuts_long_lists_of_sites():
    model, inputs = MODELS["flux"]()
    with torch.no_grad():
        text = str(explain(model, **inputs, backend="_native_flash"))
    assert "transformer_blocks.0-1.attn, ... (4)" in text
    assert text.count("_native_flash") == 2  # the first line, and one row for all four


def test_json_round_trip():
    report = explain(Broken(), hidden(), backend=["_native_cudnn", "native"])
    back = Report.from_json(report.to_json())
    assert back == report
    assert str(back) == str(report)
    assert back.to_json() == report.to_json()


def test_json_round_trip_of_a_described_machine(report):
    assert Report.from_json(report.to_json()) == report
    with torch.device("meta"):
        model, x = Model(), hidden()
    planned = explain(model, x, backend=["_native_flash", "_native_math"], machine=HOPPER)
    assert Report.from_json(planned.to_json()) == planned


def test_json_round_trip_of_symbolic_sizes():
    backend = with_backend("_native_flash", rules={"cross": "native"}, inner="eager")
    with pytest.warns(UserWarning, match="matches none"):
        torch.compile(Model(), backend=backend, dynamic=True)(hidden())
    back = Report.from_json(backend.report.to_json())
    assert back == backend.report
    assert back.unmatched_rules == ["cross"]
