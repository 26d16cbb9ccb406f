"""`with_backend` behaves as a backend of torch.compile in every way that people compile."""

import copy
import logging
import pickle
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from functorch.compile import aot_module_simplified, make_boxed_func
from parity import attend, qkv, relative

import attnrewrite
from attnrewrite import AttentionCompiler, AttentionRefusedError, Code, Machine, Report, with_backend
from attnrewrite.kernels.machines import satisfies

# PyTorch's own, of a graph break in training: Dynamo looks whether the tensors in between have a gradient.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

FLASH_CPU = attnrewrite.records_of("_native_flash")[1]


class Block(torch.nn.Module):
    """Attention of a sequence to itself or to a memory, with its own projection."""

    def __init__(self, width=32):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x, memory=None):
        query, key = (
            self.inner(source).unflatten(-1, (4, -1)).transpose(1, 2) for source in (x, x if memory is None else memory)
        )
        return self.outer(attend(query, key, key))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.cross = Block()

    def forward(self, x, memory):
        for block in self.blocks:
            x = block(x)
        return self.cross(x, memory)


def hidden(length=7):
    return torch.randn(2, length, 32)


def chosen(backend):
    return [site.chosen for site in backend.report.sites]


class Recorder:
    """An inner compiler that runs the graph as it is and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, graph_module, example_inputs, **kwargs):
        self.calls.append(kwargs)
        return graph_module.forward


# -- as torch.compile's backend


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}, {"dynamic": False}])
def test_ways_to_compile(options):
    model, x, memory = Model(), hidden(), hidden(11)
    backend = with_backend("_native_flash", inner="aot_eager")
    with torch.no_grad():
        assert relative(torch.compile(model, backend=backend, **options)(x, memory), model(x, memory)) < 1e-5
    assert chosen(backend) == ["_native_flash"] * 3
    assert isinstance(backend.report.sites[0].call.q_len, str if options.get("dynamic") else int)


def test_dynamic_shapes_compile_once():
    backend = with_backend("_native_flash", inner="eager")
    run = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for length in (5, 9, 30):
        given = qkv(q_len=length)
        assert relative(run(*given), attend(*given)) < 1e-5
    assert len(backend.report.graphs) == 1


def test_static_shapes_compile_once_a_length():
    backend = with_backend("_native_flash", inner="eager")
    run = torch.compile(attend, backend=backend, dynamic=False)
    for length in (5, 9, 5):
        run(*qkv(q_len=length))
    assert [site.call.q_len for site in backend.report.sites] == [5, 9]
    assert len({graph.name for graph in backend.report.graphs}) == 2


def test_graph_breaks_share_one_report():
    first, second = Block(), Block()

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model, x = Broken(), hidden()
    backend = with_backend("_native_math", inner="eager")
    assert relative(torch.compile(model, backend=backend)(x).detach(), model(x).detach()) < 1e-5
    assert [site.name for site in backend.report.sites] == ["first", "second"]
    assert [graph.plan.swapped for graph in backend.report.graphs] == [1, 1]
    assert backend.report.swapped == 2


def test_model_compile_in_place():
    model, x, memory = Model(), hidden(), hidden(11)
    expected = model(x, memory)
    backend = with_backend("_native_flash", inner="eager")
    model.compile(backend=backend)
    assert relative(model(x, memory).detach(), expected.detach()) < 1e-5
    assert [site.name for site in backend.report.sites] == ["blocks.0", "blocks.1", "cross"]


def test_regional_compile_reuses_one_graph():
    model, x, memory = Model().requires_grad_(False), hidden(), hidden(11)
    expected = model(x, memory)
    backend = with_backend("_native_flash", inner="eager")
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    assert relative(model(x, memory), expected) < 1e-5
    assert len(backend.report.graphs) == 1
    assert chosen(backend) == ["_native_flash"]


def test_every_bucket_of_ddp_is_reported(tmp_path):
    """DistributedDataParallel cuts one graph into several and compiles each under the same id."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(600) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Wide(), bucket_cap_mb=1)
        backend = with_backend("_native_flash", inner="eager")
        torch.compile(model, backend=backend)(torch.randn(1, 5, 600)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert [site.name for site in backend.report.sites] == ["blocks.0", "blocks.1", "blocks.2"]


# -- the inner compiler


@pytest.mark.parametrize("options", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": False}}])
def test_mode_and_options_reach_the_inner_compiler(options):
    inner = Recorder()
    backend = with_backend("_native_flash", inner=inner)
    torch.compile(attend, backend=backend, **options)(*qkv())
    assert inner.calls == [options]
    assert chosen(backend) == ["_native_flash"]


def test_nothing_is_passed_where_nothing_is_given():
    inner = Recorder()
    torch.compile(attend, backend=with_backend("_native_flash", inner=inner))(*qkv())
    assert inner.calls == [{}]


def test_inductor_takes_its_options():
    given = qkv()
    backend = with_backend("_native_flash")
    run = torch.compile(attend, backend=backend, fullgraph=True, options={"epilogue_fusion": True})
    assert relative(run(*given), attend(*given)) < 1e-5
    assert chosen(backend) == ["_native_flash"]


def test_inductor_refuses_options_it_does_not_know():
    run = torch.compile(attend, backend=with_backend("_native_flash"), options={"bogus": 1})
    with pytest.raises(RuntimeError, match="bogus"):
        run(*qkv())


@pytest.mark.parametrize("inner", ["eager", "aot_eager", Recorder()])
def test_inner_by_name_or_callable(inner):
    given = qkv()
    backend = with_backend("_native_math", inner=inner)
    assert relative(torch.compile(attend, backend=backend)(*given), attend(*given)) < 1e-5
    assert chosen(backend) == ["_native_math"]


def gradients(function, parameters, *given):
    for parameter in parameters:
        parameter.grad = None
    function(*given).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def forward_only(graph_module, example_inputs):
    """A compiler that knows no backward: AOTAutograd gives it the graphs of both directions."""

    def forward(graph, _):
        return make_boxed_func(graph.forward)

    return aot_module_simplified(graph_module, example_inputs, fw_compiler=forward)


@pytest.mark.parametrize("kernel", ["_native_flash", "_native_math"])
def test_training_through_a_forward_only_compiler(kernel):
    model, x, memory = Model(), hidden(), hidden(11)
    backend = with_backend(kernel, inner=forward_only)
    parameters = list(model.parameters())
    expected = gradients(model, parameters, x, memory)
    assert relative(gradients(torch.compile(model, backend=backend), parameters, x, memory), expected) < 1e-5
    assert chosen(backend) == [kernel] * 3
    assert all(site.call.needs_grad for site in backend.report.sites)


def test_training_through_inductor():
    block, x = Block(), hidden()
    backend = with_backend("_native_flash")
    parameters = list(block.parameters())
    expected = gradients(block, parameters, x)
    assert relative(gradients(torch.compile(block, backend=backend), parameters, x), expected) < 1e-5
    assert chosen(backend) == ["_native_flash"]


# -- several in one process


def test_models_with_different_backends():
    models = {kernel: Model() for kernel in ("_native_flash", "_native_math", "native")}
    backends = {kernel: with_backend(kernel, inner="eager") for kernel in models}
    runs = {kernel: torch.compile(model, backend=backends[kernel]) for kernel, model in models.items()}
    for length in (7, 12):
        x, memory = hidden(length), hidden(11)
        for kernel, model in models.items():
            assert relative(runs[kernel](x, memory).detach(), model(x, memory).detach()) < 1e-5
    for kernel, backend in backends.items():
        assert set(chosen(backend)) == {kernel}


def test_one_function_under_different_backends():
    """Code compiled by one backend is not run for another."""
    given = qkv()
    for kernel in ("_native_flash", "_native_math"):
        backend = with_backend(kernel, inner="eager")
        assert relative(torch.compile(attend, backend=backend)(*given), attend(*given)) < 1e-5
        assert chosen(backend) == [kernel]


def test_equal_backends_share_compiled_code():
    given = qkv()
    first, second = (with_backend("_native_flash", inner="eager") for _ in range(2))
    for backend in (first, second):
        torch.compile(attend, backend=backend)(*given)
    assert chosen(first) == ["_native_flash"]
    assert second.report.graphs == []
    assert "the report of the one that compiled it" in str(second.report)


@pytest.mark.skipif(
    not satisfies(torch.__version__, ">=2.13"),
    reason="before torch 2.13 threads that compile disturb each other: docs/pytorch-quirks.md",
)
def test_two_threads_with_different_backends():
    backends = {kernel: with_backend(kernel, inner="aot_eager") for kernel in ("_native_flash", "_native_math")}
    together = threading.Barrier(2)
    errors = {kernel: [] for kernel in backends}

    def work(kernel):
        model = Model()
        run = torch.compile(model, backend=backends[kernel], dynamic=False)
        together.wait(30)
        with torch.no_grad():
            for length in (5, 6, 8, 5, 6):
                x, memory = hidden(length), hidden(11)
                errors[kernel].append(relative(run(x, memory), model(x, memory)))

    threads = [threading.Thread(target=work, args=(kernel,)) for kernel in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for kernel, backend in backends.items():
        assert len(errors[kernel]) == 5
        assert max(errors[kernel]) < 1e-5
        assert chosen(backend) == [kernel] * 9
        assert sorted({site.call.q_len for site in backend.report.sites}) == [5, 6, 8]


# -- identity


CONFIGURATIONS = {
    "choices": lambda: with_backend("_native_flash", "flex"),
    "order": lambda: with_backend("flex", "_native_flash"),
    "record": lambda: with_backend(FLASH_CPU, "flex"),
    "rules": lambda: with_backend("_native_flash", "flex", rules={"self": "native"}),
    "other rule": lambda: with_backend("_native_flash", "flex", rules={"cross": "native"}),
    "inner": lambda: with_backend("_native_flash", "flex", inner="eager"),
    "callable": lambda: with_backend("_native_flash", "flex", inner=forward_only),
    "strict": lambda: with_backend("_native_flash", "flex", strict=True),
    "numerics": lambda: with_backend("_native_flash", "flex", numerics="exact"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equality_is_that_of_the_configuration(name):
    backend, same = CONFIGURATIONS[name](), CONFIGURATIONS[name]()
    assert backend == same
    assert hash(backend) == hash(same)
    for other in CONFIGURATIONS.keys() - {name}:
        assert backend != CONFIGURATIONS[other]()
    assert backend != "attnrewrite"


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


@pytest.mark.parametrize("how", COPIES)
def test_a_backend_and_a_compiled_model_are_copied(how):
    """Records hold functions that no pickle takes, and a report a lock."""
    pinned = "_flash_3_hub@main"
    backend = with_backend("sage", pinned, "flex", "native", rules={"cross": ["auto", FLASH_CPU]}, inner="eager")
    compiled = torch.compile(Model().eval(), backend=backend)
    x, memory = hidden(), hidden(5)
    with torch.no_grad():
        expected = compiled(x, memory)
        copied, model = COPIES[how](backend), COPIES[how](compiled)
        torch.testing.assert_close(model(x, memory), expected)
    assert copied == backend
    assert hash(copied) == hash(backend)
    assert copied.report == backend.report
    with torch.no_grad():
        torch.compile(lambda q: attend(q, q, q), backend=copied)(qkv(1, 2, 11, 8)[0])
    assert (len(copied.report.sites), len(backend.report.sites)) == (4, 3)  # each has a report of its own
    assert chosen(copied)[:3] == chosen(backend)


@pytest.mark.parametrize("how", COPIES)
def test_a_record_of_ones_own_is_copied(how):
    record = replace(FLASH_CPU, name="mine")
    backend = with_backend(record, "tune")
    assert COPIES[how](backend) == backend


def test_a_backend_is_shown_with_its_choices():
    backend = with_backend("flex", "native", rules={"cross": "_native_math"}, inner="eager")
    assert repr(backend) == "attnrewrite.with_backend(flex, native; cross: _native_math, inner='eager')"


def test_model_moves_to_another_dtype_after_compiling():
    """The name of a registered backend makes Dynamo release the tracing state, which holds the parameters."""
    backend = with_backend("_native_flash", inner="aot_eager")
    assert backend.__name__ == "attnrewrite"
    model, x, memory = Model(), hidden(), hidden(11)
    plain = Model()
    torch.compile(plain, backend="aot_eager")(x, memory)
    run = torch.compile(model, backend=backend)
    run(x, memory)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        try:
            plain.to(torch.float64)
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} moves no compiled model this way: {error}")
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert run(x.double(), memory.double()).dtype == torch.float64
    assert {site.call.dtype for site in backend.report.sites} == {"float32", "float64"}


# -- rules


def kernels(backend, length=7, memory_length=11):
    """Compiles the model through a backend; site name -> (kernel, rule)."""
    torch.compile(Model(), backend=backend)(hidden(length), hidden(memory_length))
    return {site.name: (site.chosen, site.rule) for site in backend.report.sites}


MATH, FLASH = "_native_math", "_native_flash"
RULES = {
    "glob": ({"blocks.*": MATH}, {"blocks.0": "blocks.*", "blocks.1": "blocks.*"}),
    "one": ({"*.1": MATH}, {"blocks.1": "*.1"}),
    "self": ({"self": MATH}, {"blocks.0": "self", "blocks.1": "self"}),
    "cross": ({"cross": MATH}, {"cross": "cross"}),
    "first match": ({"*.0": MATH, "blocks.*": FLASH}, {"blocks.0": "*.0"}),
    "sequence": ({"blocks.0": ["_native_cudnn", MATH]}, {"blocks.0": "blocks.0"}),
    "record": ({"blocks.0": attnrewrite.records_of(MATH)[0]}, {"blocks.0": "blocks.0"}),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    rules, expected = RULES[name]
    backend = with_backend(FLASH, rules=rules, inner="eager")
    found = kernels(backend)
    assert {site: rule for site, (kernel, rule) in found.items() if kernel == MATH} == expected
    assert all(kernel == FLASH for site, (kernel, _) in found.items() if site not in expected)
    assert backend.report.unmatched_rules == []


def test_the_first_rule_holds_even_if_it_refuses():
    backend = with_backend(FLASH, rules={"*.0": "_native_cudnn", "blocks.*": MATH}, inner="eager")
    assert kernels(backend)["blocks.0"] == (None, "*.0")


def test_a_rule_that_matches_nothing_warns_once():
    backend = with_backend(FLASH, rules={"blocks.9": MATH, "self": MATH}, inner="eager")
    run = torch.compile(Model(), backend=backend, dynamic=False)
    with pytest.warns(UserWarning, match=r"rules: 'blocks\.9' matches none of the 3 attention sites.*'blocks\.\d'"):
        run(hidden(), hidden(11))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(hidden(9), hidden(11))
    assert len(backend.report.graphs) == 2
    assert backend.report.unmatched_rules == ["blocks.9"]
    assert "rule 'blocks.9' matched none of these sites" in str(backend.report)


def test_a_rule_that_a_later_graph_matches_is_no_longer_reported():
    backend = with_backend(FLASH, rules={"cross": MATH}, inner="eager")
    with pytest.warns(UserWarning, match="'cross' matches none"):
        torch.compile(Block(), backend=backend)(hidden())
    torch.compile(Model(), backend=backend)(hidden(), hidden(11))
    assert backend.report.unmatched_rules == []


# -- preference, strictness, numerics


def test_the_next_choice_takes_what_the_first_refuses():
    backend = with_backend("_native_cudnn", FLASH, MATH, inner="eager")
    torch.compile(attend, backend=backend)(*qkv())
    (site,) = backend.report.sites
    assert site.chosen == FLASH
    (first, refused), (second, accepted) = site.decisions
    assert (first, refused.code, second) == ("_native_cudnn", Code.DEVICE, FLASH)
    assert accepted == attnrewrite.Accepted()
    assert site.refusals == ((first, refused),)


def test_what_nobody_takes_stays():
    given = qkv()
    backend = with_backend("_native_cudnn", "_native_efficient", inner="eager")
    assert torch.equal(torch.compile(attend, backend=backend)(*given), attend(*given))
    (site,) = backend.report.sites
    assert (site.chosen, backend.report.swapped, backend.report.graphs[0].unchanged) == (None, 0, 1)
    assert [name for name, _ in site.refusals] == ["_native_cudnn", "_native_efficient"]


def test_strict_tells_the_user_the_site_and_the_reason():
    model = Model()
    backend = with_backend("_native_cudnn", FLASH, rules={"cross": "_native_cudnn"}, strict=True, inner="eager")
    with pytest.raises(AttentionRefusedError, match="1 of 3 attention sites") as raised:
        torch.compile(model, backend=backend)(hidden(), hidden(11))
    assert "cross: _native_cudnn: DEVICE: _native_cudnn runs on cuda, the call is on cpu" in str(raised.value)
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (type(copied), str(copied)) == (AttentionRefusedError, str(raised.value))


def test_the_registered_name_and_an_object_share_no_compiled_code():
    """Dynamo takes the objects for a registered backend; it must not take them for equal to the one of the name."""
    given = qkv()
    torch.compile(attend, backend="attnrewrite")(*given)
    backend = with_backend(MATH, inner="eager")
    torch.compile(attend, backend=backend)(*given)
    assert [site.chosen for site in backend.report.sites] == [MATH]
    with pytest.raises(ValueError, match="is no backend of torch"):
        with_backend(MATH, inner="attnrewrite objects")


def test_strict_is_silent_where_all_are_taken():
    backend = with_backend("_native_cudnn", FLASH, strict=True, inner="eager")
    assert {kernel for kernel, _ in kernels(backend).values()} == {FLASH}


def test_exact_numerics_leave_native_alone():
    backend = with_backend(FLASH, MATH, "flex", "native", numerics="exact", inner="eager")
    torch.compile(attend, backend=backend)(*qkv())
    (site,) = backend.report.sites
    assert site.chosen == "native"
    assert {decision.code for _, decision in site.refusals} == {Code.NUMERICS}
    assert len(site.refusals) == 3


def test_quantised_kernels_need_a_word():
    record = replace(FLASH_CPU, name="coarse", numerics=attnrewrite.Numerics.QUANTISED)
    for numerics, expected in (("reordered", None), ("quantised", "coarse")):
        backend = with_backend(record, numerics=numerics, inner="eager")
        torch.compile(attend, backend=backend)(*qkv())
        assert chosen(backend) == [expected]


# -- the log, restarts, the entry point


def test_logging(caplog):
    backend = with_backend("_native_cudnn", FLASH, inner="eager")
    with caplog.at_level(logging.DEBUG, logger="attnrewrite"):
        torch.compile(Model(), backend=backend, fullgraph=True)(hidden(), hidden(11))
    own = [record for record in caplog.records if record.name == "attnrewrite"]
    (line,) = (record.getMessage() for record in own if record.levelno == logging.INFO)
    assert "3 attention sites: 3 swapped, 0 native, 0 left as they were" in line
    details = [record.getMessage() for record in own if record.levelno == logging.DEBUG]
    assert [line.split(": ")[1] for line in details] == ["blocks.0", "blocks.1", "cross"]
    assert all(": _native_flash; _native_cudnn refused: DEVICE: " in line for line in details)


def test_logging_is_quiet_below_warnings(caplog):
    with caplog.at_level(logging.WARNING, logger="attnrewrite"):
        torch.compile(attend, backend=with_backend(FLASH, inner="eager"))(*qkv())
    assert [record for record in caplog.records if record.name == "attnrewrite"] == []


class Counting(AttentionCompiler):
    rewrites = 0

    def rewrite(self, *given, **options):
        self.rewrites += 1
        return super().rewrite(*given, **options)


def test_restarts_of_the_tracer_do_not_repeat_graphs():
    """AOTAutograd finds that the float must be a constant, and Dynamo starts again with the same id."""

    def step(query, low):
        query = query.clamp(min=low)
        return attend(query, query, query)

    backend = Counting(attnrewrite.make_policy([FLASH]), "aot_eager")
    query = qkv()[0]
    output = torch.compile(step, backend=backend, dynamic=True)(query, 0.3)
    assert relative(output, step(query, 0.3)) < 1e-5
    assert backend.rewrites == 2
    assert len(backend.report.graphs) == 1
    assert chosen(backend) == [FLASH]


def test_registered_name(caplog):
    """The entry point has no object to ask: the log says what it did."""
    given = qkv()
    run = torch.compile(attend, backend="attnrewrite", options={"attention": MATH, "inner": "eager"})
    with caplog.at_level(logging.DEBUG, logger="attnrewrite"):
        assert relative(run(*given), attend(*given)) < 1e-5
    assert any("attend: _native_math" in record.getMessage() for record in caplog.records)


def test_registered_name_with_all_options(caplog):
    options = {"attention": ["_native_cudnn", MATH], "rules": {"cross": FLASH}, "strict": True, "numerics": "reordered"}
    run = torch.compile(Model(), backend="attnrewrite", options={**options, "inner": "aot_eager"})
    with caplog.at_level(logging.DEBUG, logger="attnrewrite"):
        run(hidden(), hidden(11))
    text = caplog.text
    assert "blocks.0: _native_math; _native_cudnn refused" in text
    assert "cross: _native_flash" in text


def test_registered_name_without_options_leaves_attention_alone():
    given = qkv()
    assert relative(torch.compile(attend, backend="attnrewrite")(*given), attend(*given)) < 1e-5


def test_registered_name_passes_other_options_on():
    run = torch.compile(attend, backend="attnrewrite", options={"attention": MATH, "bogus": 1})
    with pytest.raises(RuntimeError, match="bogus"):
        run(*qkv())


def test_registered_name_with_mode_checks_and_inductors_options():
    inner = Recorder()
    own = {"attention": FLASH_CPU, "cast": None, "trust_remote_code": False, "checks": True, "inner": inner}
    options = {**own, "mode": "max-autotune-no-cudagraphs", "epilogue_fusion": True}
    given = qkv()
    given[0][1, 2, 3, 4] = float("nan")
    with pytest.raises(attnrewrite.AttentionCheckError, match="batch 1, head 2, position 3, channel 4"):
        torch.compile(attend, backend="attnrewrite", options=options)(*given)
    assert inner.calls == [{"mode": "max-autotune-no-cudagraphs", "options": {"epilogue_fusion": True}}]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"attnetion": MATH},
            "options has 'attnetion', which is no option of attnrewrite or Inductor; did you mean 'attention'?",
        ),
        ({"max_autotun": True}, "did you mean 'max_autotune'?"),
        (
            {"zzzzz": 1},
            "attnrewrite's are attention, rules, inner, context_parallel, strict, numerics, cast, trust_remote_code, checks, "
            "mode; torch",
        ),
        (
            {"numeric": "exact", "inner": "eager"},
            "options has 'numeric', which is no option of attnrewrite; did you mean 'numerics'?",
        ),
        ({"attention": "flsh"}, "no attention backend is called 'flsh'; did you mean 'flash'"),
        ({"numerics": "fast"}, "numerics is 'fast'"),
        ({"mode": "fast"}, "fast"),
    ],
)
def test_registered_name_with_bad_options(options, said):
    with pytest.raises(RuntimeError) as raised:
        torch.compile(attend, backend="attnrewrite", options=options)(*qkv())
    assert said in str(raised.value)


def test_registered_name_leaves_other_compilers_their_options():
    inner = Recorder()
    torch.compile(attend, backend="attnrewrite", options={"attention": MATH, "inner": inner, "workspace": 4})(*qkv())
    assert inner.calls == [{"options": {"workspace": 4}}]


# -- bad input


KNOWN = ", ".join(attnrewrite.names())
BAD = {
    "misspelt": (
        lambda: with_backend("_native_flsh"),
        ValueError,
        "no attention backend is called '_native_flsh'; did you mean '_native_flash'",
    ),
    "unknown": (
        lambda: with_backend("zzz"),
        ValueError,
        f"no attention backend is called 'zzz'; known: {KNOWN} (`python -m attnrewrite info` lists them)",
    ),
    "no choice": (
        lambda: with_backend(),
        ValueError,
        "choices is empty: name at least one attention backend, as 'native'",
    ),
    "twice": (
        lambda: with_backend("flex", "native", "flex"),
        ValueError,
        "choices names 'flex' twice: each is tried once, in the order given",
    ),
    "record and its name": (
        lambda: with_backend(FLASH_CPU, "_native_flash"),
        ValueError,
        "choices names '_native_flash' twice: each is tried once, in the order given",
    ),
    "empty rule": (
        lambda: with_backend("native", rules={"*.attn2": []}),
        ValueError,
        "rules['*.attn2'] is empty: name at least one attention backend, as 'native'",
    ),
    "misspelt in a rule": (
        lambda: with_backend("native", rules={"self": "flx"}),
        ValueError,
        "rules['self']: no attention backend is called 'flx'; did you mean 'flex'",
    ),
    "twice in a rule": (
        lambda: with_backend("native", rules={"self": ["flex", "flex"]}),
        ValueError,
        "rules['self'] names 'flex' twice: each is tried once, in the order given",
    ),
    "misspelt inner": (
        lambda: with_backend("native", inner="inducter"),
        ValueError,
        "inner is 'inducter', which is no backend of torch.compile; did you mean 'inductor'",
    ),
    "unknown inner": (
        lambda: with_backend("native", inner="QQQ"),
        ValueError,
        "inner is 'QQQ', which is no backend of torch.compile; known: ",
    ),
    "itself as inner": (
        lambda: with_backend("native", inner="attnrewrite"),
        ValueError,
        "inner is 'attnrewrite', which is no backend of torch.compile",
    ),
    "no inner": (
        lambda: with_backend("native", inner=None),
        ValueError,
        "inner is None, which is no backend of torch.compile",
    ),
    "numerics": (
        lambda: with_backend("native", numerics="fast"),
        ValueError,
        "numerics is 'fast': it is one of 'exact', 'reordered', 'quantised'",
    ),
    "a number": (
        lambda: with_backend(3),
        TypeError,
        "choices holds 3 (int): give names or Backend records",
    ),
    "a list": (
        lambda: with_backend(["flex", "native"]),
        TypeError,
        "choices holds a list: give its items one by one, *['flex', 'native']",
    ),
    "a tuple of records in a rule": (
        lambda: with_backend("native", rules={"self": [(FLASH_CPU, "native")]}),
        TypeError,
        "rules['self'] holds a tuple: give its items one by one, *['_native_flash', 'native']",
    ),
    "names in one text": (
        lambda: with_backend("_native_flash, native"),
        ValueError,
        "choices has '_native_flash, native', which is one text: give separate names, '_native_flash', 'native'",
    ),
    "a file of a plan": (
        lambda: with_backend("plans/plan.json"),
        ValueError,
        "choices has 'plans/plan.json': a plan is read from its file first, attnrewrite.Plan.load('plans/plan.json')",
    ),
    "a path in a rule": (
        lambda: with_backend("native", rules={"self": Path("plan.json")}),
        TypeError,
        "rules['self'] holds PosixPath('plan.json'): a plan is read from its file first, attnrewrite.Plan.load('plan.json')",
    ),
    "a path": (
        lambda: with_backend(Path("plan.json"), "native"),
        TypeError,
        "choices holds PosixPath('plan.json'): a plan is read from its file first, attnrewrite.Plan.load('plan.json')",
    ),
    "a number in a rule": (
        lambda: with_backend("native", rules={"self": [None]}),
        TypeError,
        "rules['self'] holds None (NoneType): give names or Backend records",
    ),
    "a number as a rule": (
        lambda: with_backend("native", rules={"self": 3}),
        TypeError,
        "rules['self'] ",
    ),
    "a GPU without capability": (
        lambda: Machine("cuda"),
        ValueError,
        "Machine('cuda') needs capability=(major, minor), as (9, 0) for an H200: kernels are chosen by it",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value).startswith(message)


VERSION_1 = "this is not an attnrewrite report of version 1: write it with report.to_json()"


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"version": 2, "graphs": []}'])
def test_other_json_is_no_report(text):
    with pytest.raises(ValueError, match="this is not an attnrewrite report") as raised:
        Report.from_json(text)
    assert str(raised.value) == VERSION_1


@pytest.mark.parametrize("text", ["", "junk", '{"version": 1}', '{"version": 1, "graphs": [{}]}'])
def test_junk_is_no_report(text):
    with pytest.raises(ValueError, match=r".") as raised:
        Report.from_json(text)
    assert str(raised.value).startswith(VERSION_1)
