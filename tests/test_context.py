"""`attention_backend`, `set_attention_backend` and `schedule`: switching kernels of models that are compiled once a choice."""

import asyncio
import contextlib
import contextvars
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from parity import TOLERANCE, attend, doubled, qkv, relative
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite import Code, attention_backend, make_policy, records_of, with_backend
from attnrewrite.entrances import contexts

MATH, FLASH = "_native_math", "_native_flash"


class Counting:
    """An inner compiler that runs graphs as they are, counts them, and notes which of them ran."""

    def __init__(self, backward=False):
        self.graphs, self.ran = [], []
        self.compile = torch._dynamo.lookup_backend("aot_eager") if backward else lambda graph, inputs: graph.forward

    def __call__(self, graph_module, example_inputs, **kwargs):
        marks = {"_attention_math": "math", "_flash_attention_for_cpu": "flash", "flex": "flex"}
        kernel = next((name for mark, name in marks.items() if mark in graph_module.code), "native")
        self.graphs.append(kernel)
        run = self.compile(graph_module, example_inputs)

        def call(*inputs):
            self.ran.append(kernel)
            return run(*inputs)

        return call


class Layer(torch.nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.projection = torch.nn.Linear(width, width).requires_grad_(False)

    def forward(self, x):
        query = self.projection(x).unflatten(-1, (3, -1)).transpose(1, 2)
        return attend(query, query, query)


def compiled(*choices, function=attend, backward=False, **options):
    inner = Counting(backward)
    backend = with_backend(*choices, inner=inner)
    return torch.compile(function, backend=backend, **options), inner, backend


# -- the choice that runs


def test_inside_and_outside():
    run, inner, backend = compiled(FLASH, fullgraph=True)
    given = qkv()
    for _ in range(10):
        for expected, context in ((FLASH, None), (MATH, MATH)):
            if context is None:
                output = run(*given)
            else:
                with attention_backend(context):
                    output = run(*given)
            assert inner.ran[-1] == expected.removeprefix("_native_")
            assert relative(output, attend(*map(doubled, given))) < TOLERANCE[torch.float32]
    assert inner.graphs == ["flash", "math"]
    assert [graph.context for graph in backend.report.graphs] == ["", MATH]
    assert [site.chosen for site in backend.report.sites] == [FLASH, MATH]
    assert f"in attention_backend({MATH}):" in str(backend.report)
    assert attnrewrite.Report.from_json(backend.report.to_json()).graphs == backend.report.graphs


def test_the_innermost_context_holds():
    run, inner, _ = compiled("native")
    given = qkv()
    with attention_backend(MATH):
        with attention_backend(FLASH):
            run(*given)
        run(*given)
        with attention_backend("native"):
            run(*given)
    run(*given)
    assert inner.ran == ["flash", "math", "native", "native"]
    assert inner.graphs == ["flash", "math", "native", "native"]  # native by choice is not native by default


def test_after_an_error_the_outer_choice_holds():
    run, inner, _ = compiled("native")
    with pytest.raises(ZeroDivisionError), attention_backend(MATH):
        raise ZeroDivisionError
    run(*qkv())
    assert inner.ran == ["native"]


def test_every_model_follows_by_whichever_name_it_was_compiled():
    class Other(Layer):
        pass

    models = {"object": Layer(), "name": Other()}
    inner, x = Counting(), torch.randn(2, 7, 24)
    runs = [
        torch.compile(models["object"], backend=with_backend(FLASH, inner=inner)),
        torch.compile(models["name"], backend="attnrewrite", options={"attention": FLASH, "inner": inner}),
    ]
    for run in runs:
        run(x)
    with attention_backend(MATH):
        for run in runs:
            run(x)
    assert inner.ran == ["flash", "flash", "math", "math"]


def test_parts_of_a_pipeline_with_different_choices():
    (encode, first, _), (denoise, second, _) = (
        compiled("native"),
        compiled("native", function=lambda *given: attend(*given)),
    )
    given = qkv()
    with attention_backend(MATH):
        encode(*given)
    for _ in range(3):
        with attention_backend(FLASH):
            denoise(*given)
    assert (first.ran, second.ran) == (["math"], ["flash"] * 3)


def test_as_a_decorator():
    run, inner, _ = compiled("native")

    @attention_backend(MATH)
    def step(given):
        """Documented."""
        return run(*given)

    @attention_backend(FLASH)
    async def later(given):
        await asyncio.sleep(0)
        return run(*given)

    step(qkv())
    step(qkv())
    asyncio.run(later(qkv()))
    assert inner.ran == ["math", "math", "flash"]
    assert (step.__name__, step.__doc__) == ("step", "Documented.")
    with pytest.raises(TypeError, match=r"decorates .*images, a generator"):

        @attention_backend(MATH)
        def images():
            yield 1


def test_no_cast_is_not_the_same_as_no_word_about_it():
    """A record that takes bfloat16 alone gets float32 tensors only if somebody lets them be cast."""
    halves = replace(records_of(MATH)[0], name="halves", dtypes=frozenset({"bfloat16"}))
    backend = with_backend(halves, "native", inner="eager", cast="bfloat16")
    run = torch.compile(attend, backend=backend)
    tensors = qkv()
    with torch.no_grad():
        run(*tensors)
        with attention_backend(halves, "native"):
            run(*tensors)
        with attention_backend(halves, "native", cast=None):
            run(*tensors)
    assert [site.chosen for site in backend.report.sites] == ["halves", "halves", "native"]
    assert backend.report.sites[2].refusals[0][1].code is Code.DTYPE


@pytest.mark.parametrize("name", ["strict", "trust_remote_code", "checks"])
@pytest.mark.parametrize("value", ["no", 0, "True"])
def test_a_flag_is_a_bool(name, value):
    """In every place that takes settings: where one comes from a configuration, "no" must not mean yes."""
    said = rf"^{name} is {value!r} \({type(value).__name__}\): give True or False$"
    doors = [
        with_backend,
        attention_backend,
        attnrewrite.inductor_pass,
        lambda *names, **more: make_policy(names, **more),
    ]
    doors.append(lambda *names, **more: attnrewrite.set_attention_backend(torch.nn.Linear(1, 1), *names, **more))
    for door in doors:
        with pytest.raises(TypeError, match=said):
            door("native", **{name: value})


def test_a_setting_that_there_is_not():
    with pytest.raises(TypeError, match="there is no argument 'numeric'; did you mean 'numerics'"):
        with_backend("native", numeric="exact")
    with pytest.raises(TypeError, match="there is no argument 'colour'; there are strict, numerics, cast"):
        attention_backend("native", colour="red")


def test_settings_come_from_the_model_unless_given():
    given = qkv()
    coarse = {"numerics": "quantised", "cast": "bfloat16"}
    own = with_backend(MATH, strict=True, rules={"self": FLASH}, **coarse).policy
    override = attention_backend("flex").override.over(own)
    assert (override.strict, override.numerics.name, override.cast) == (True, "QUANTISED", "bfloat16")
    assert (str(override), override.rules) == ("flex", ())
    override = attention_backend("flex", numerics="exact", strict=False, rules={"cross": MATH}).override.over(own)
    assert (override.strict, override.numerics.name, override.cast) == (False, "EXACT", "bfloat16")
    run, _, _ = compiled("native")
    with pytest.raises(RuntimeError, match="strict=True, and 1 of 1"), attention_backend("_native_cudnn", strict=True):
        run(*given)
    with attention_backend("native", rules={"self": MATH}):
        run(given[1], *given[1:])


# -- threads and tasks


def test_each_thread_has_its_own():
    run, inner, _ = compiled("native")
    given, seen, together = qkv(), {}, threading.Barrier(3)

    def work(name):
        with attention_backend(name) if name else contextlib.nullcontext():
            for _ in range(5):
                together.wait(60)
                seen.setdefault(name, set()).add(str(contexts.active()))
            run(*given)

    threads = [threading.Thread(target=work, args=(name,)) for name in (None, MATH, FLASH)]
    with attention_backend("flex"):
        threads.append(threading.Thread(target=contextvars.copy_context().run, args=(run, *given)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert seen == {None: {"None"}, MATH: {MATH}, FLASH: {FLASH}}
    assert sorted(inner.ran) == ["flash", "flex", "math", "native"]


def test_each_asyncio_task_has_its_own():
    run, inner, _ = compiled("native")
    given = qkv()

    async def work(name):
        with attention_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                run(*given)
                assert inner.ran[-1] == name.removeprefix("_native_")

    async def main():
        with attention_backend("native"):
            await asyncio.gather(work(MATH), work(FLASH), asyncio.create_task(asyncio.to_thread(run, *given)))

    asyncio.run(main())
    assert sorted(set(inner.graphs)) == ["flash", "math", "native"]
    assert len(inner.graphs) == 3


# -- compilations


@pytest.mark.parametrize("spelled", ["name", "record"])
def test_equal_choices_are_one(spelled):
    """However often they are spelled out, with rules or with records of one's own."""
    run, inner, _ = compiled("native")
    given = qkv()
    for _ in range(12):
        choice = MATH if spelled == "name" else attnrewrite.records_of(MATH)[0]
        with attention_backend(choice, rules={"cross": MATH}):
            run(*given)
    assert inner.graphs == ["math"]


def test_dynamic_shapes_compile_once_a_choice():
    run, inner, _ = compiled(FLASH, dynamic=True, fullgraph=True)
    for length in (5, 9, 30):
        given = qkv(q_len=length)
        run(*given)
        with attention_backend(MATH):
            assert relative(run(*given), attend(*map(doubled, given))) < 1e-5
    assert inner.graphs == ["flash", "math"]


def test_graphs_without_attention_do_not_switch():
    inner = Counting()
    run = torch.compile(lambda x: x.sin() + 1, backend=with_backend(FLASH, inner=inner))
    run(torch.ones(3))
    with pytest.warns(UserWarning, match="changed nothing"), attention_backend(MATH):
        run(torch.ones(3))
    assert len(inner.graphs) == 1


def test_nothing_recompiles_where_recompiling_is_an_error():
    run, _, _ = compiled(FLASH)
    given = qkv()
    run(*given)
    with attention_backend(MATH):
        run(*given)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            run(*given)
            with attention_backend(MATH):
                run(*given)
        with pytest.raises(RuntimeError, match="fail_on_recompile"), attention_backend("flex"):
            run(*given)


def test_guards_that_have_held_may_be_skipped():
    """The guard of the choice has failed once, so it is among those that PyTorch keeps."""
    run, inner, _ = compiled(FLASH)
    given = qkv()
    for _ in range(2):
        run(*given)
        with attention_backend(MATH):
            run(*given)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        run(*given)
        with attention_backend(MATH):
            run(*given)
    assert inner.ran == ["flash", "math"] * 3


def test_the_log_of_recompilations_names_the_choice(caplog):
    run, _, _ = compiled(FLASH)
    given = qkv()
    run(*given)
    torch._logging.set_logs(recompiles=True)
    try:
        with caplog.at_level("DEBUG"), attention_backend(MATH):
            run(*given)
    finally:
        torch._logging.set_logs()
    assert "no attnrewrite.attention_backend" in caplog.text


def test_training():
    """The backward belongs to the forward, whatever is active when it runs."""
    layer, x = Layer().requires_grad_(True), torch.randn(2, 7, 24)
    run, inner, backend = compiled(FLASH, function=layer, backward=True)

    def gradient(model):
        layer.zero_grad()
        with attention_backend(MATH) if model is run else contextlib.nullcontext():
            loss = model(x).square().sum()
        loss.backward()
        return layer.projection.weight.grad.clone()

    expected = gradient(layer)
    assert relative(gradient(run), expected) < 1e-5
    assert (inner.ran, [graph.context for graph in backend.report.graphs]) == (["math"], [MATH])


def test_checkpoint_runs_again_with_the_same_choice():
    layer, x = Layer(), torch.randn(2, 7, 24, requires_grad=True)
    run, inner, _ = compiled(FLASH, function=layer, backward=True)
    choice = attention_backend(MATH)
    with choice:
        output = checkpoint(run, x, use_reentrant=False, context_fn=lambda: (choice, choice))
    output.sum().backward()
    assert inner.ran == ["math", "math"]


class Broken(Layer):
    def forward(self, x):
        x = super().forward(x)
        torch._dynamo.graph_break()
        return super().forward(x)


def test_graph_breaks():
    run, inner, _ = compiled(FLASH, function=Broken())
    for _ in range(2):
        run(torch.randn(2, 7, 24))
        with attention_backend(MATH):
            run(torch.randn(2, 7, 24))
    assert inner.ran == ["flash", "flash", "math", "math"] * 2


@pytest.mark.parametrize("made", [False, True])
def test_a_context_inside_a_compiled_function_breaks_the_graph(made):
    layer, context = Layer(), attention_backend(MATH)

    def step(x):
        x = layer(x)
        with context if made else attention_backend(MATH):
            return layer(x)

    run, inner, _ = compiled(FLASH, function=step)
    x = torch.randn(2, 7, 24)
    assert relative(run(x).detach(), layer(layer(x)).detach()) < 1e-5
    assert inner.ran == ["flash", "math"]


def test_explain_asks_for_the_active_choice():
    given = qkv()
    with attention_backend(MATH):
        report = attnrewrite.explain(attend, *given, backend=FLASH)
    assert [site.chosen for site in report.sites] == [MATH]
    assert [site.chosen for site in attnrewrite.explain(attend, *given, backend=FLASH).sites] == [FLASH]


# -- what is said


def test_around_an_uncompiled_model():
    layer, said = Layer(), r"attention_backend\(_native_math\) changed nothing: no attention of a model"
    with pytest.warns(UserWarning, match=said), attention_backend(MATH):
        layer(torch.randn(2, 7, 24))


def test_around_a_model_of_another_compiler():
    run = torch.compile(attend, backend="eager")
    with pytest.warns(UserWarning, match="changed nothing"), attention_backend(MATH):
        run(*qkv())


def test_the_outer_of_two_contexts_is_not_blamed():
    run, _, _ = compiled(FLASH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attention_backend("flex"), attention_backend(MATH):
            run(*qkv())


def test_a_context_that_is_left_elsewhere():
    context = attention_backend(MATH)
    context.__enter__()
    with pytest.raises(RuntimeError, match="is left where another context is open"):
        attention_backend("flex").__exit__(None, None, None)
    with pytest.warns(UserWarning, match="changed nothing"):
        context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "said"),
    [
        (["_native_mth"], {}, ValueError, "no attention backend is called '_native_mth'; did you mean '_native_math'"),
        ([], {}, ValueError, "choices is empty"),
        ([["flex"]], {}, TypeError, r"choices holds a list: give its items one by one, \*\['flex'\]"),
        (["flex"], {"numerics": "fast"}, ValueError, "numerics is 'fast'"),
        (["flex"], {"rules": {"self": "flx"}}, ValueError, r"rules\['self'\]: no attention backend is called 'flx'"),
    ],
)
def test_bad_input(arguments, settings, error, said):
    with pytest.raises(error, match=said):
        attention_backend(*arguments, **settings)
