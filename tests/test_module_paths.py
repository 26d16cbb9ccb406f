"""A site has one name, whoever wraps the model: hooks, replaced forwards, compiled parts, graph breaks."""

import functools
import types
import warnings

import accelerate.hooks
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry, ModelHook
from parity import relative
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import attnrewrite
from attnrewrite.graphs.modules import module_path, paths_of

FLASH, MATH = "_native_flash", "_native_math"
NAMES = ["blocks.0.attn", "blocks.1.attn"]
RULES = {"blocks.1.*": MATH}  # the second block: code of the first must not serve it


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = torch.nn.Linear(24, 72)

    def forward(self, x):
        query, key, value = self.to_qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Model(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# -- who replaces a forward


def with_functools(module):
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *args: forward(*args))


def with_a_method(module):
    module._old_forward = module.forward
    module.forward = types.MethodType(lambda self, *args: self._old_forward(*args), module)


def with_a_partial(module):
    forward = module.forward
    module.forward = functools.update_wrapper(functools.partial(lambda self, *args: forward(*args), module), forward)


def with_diffusers(module):
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "nothing")


def with_diffusers_twice(module):
    with_diffusers(module)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "nothing else")


class Breaking(ModelHook):
    """As hooks of offloading and caches: its code is not compiled."""

    def pre_forward(self, module, *args, **kwargs):
        torch._dynamo.graph_break()
        return args, kwargs


def with_a_graph_break(module):
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Breaking(), "breaking")


def with_accelerate(module):
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())


def with_offloading(module):
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(module, hook)


def with_a_compiled_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")


WHERE = {
    "model": lambda model: [model],
    "blocks": lambda model: model.blocks,
    "attention": lambda model: [block.attn for block in model.blocks],
}


def chosen(backend):
    return {site.name: site.chosen for site in backend.report.sites}


@pytest.mark.parametrize(
    ("way", "where"),
    [
        (with_functools, "model"), (with_a_partial, "model"), (with_diffusers, "model"), (with_diffusers_twice, "model"),
        (with_accelerate, "model"), (with_a_graph_break, "model"),
        (with_functools, "blocks"), (with_a_method, "blocks"), (with_diffusers_twice, "blocks"), (with_offloading, "blocks"),
        (with_a_compiled_forward, "blocks"),
        (with_offloading, "attention"), (with_a_graph_break, "attention"),
    ],
)  # fmt: skip
def test_rules_hold_behind_a_replaced_forward(way, where):
    model, x = Model().eval(), torch.randn(2, 7, 24)
    expected = model(x)
    for module in WHERE[where](model):
        way(module)
    backend = attnrewrite.with_backend(FLASH, rules=RULES, inner="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="rules: ")
        assert relative(torch.compile(model, backend=backend)(x), expected) < 1e-5
    assert chosen(backend) == dict(zip(NAMES, (FLASH, MATH), strict=True))


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("way", [with_offloading, with_a_graph_break])
def test_a_model_that_is_set_in_place(way, regional):
    model, x = Model().eval(), torch.randn(2, 7, 24)
    for module in WHERE["attention"](model):
        way(module)
    backend = attnrewrite.set_attention_backend(model, FLASH, rules=RULES, regional=regional, inner="eager")
    with torch.no_grad():
        model(x)
    assert chosen(backend) == dict(zip(NAMES, (FLASH, MATH), strict=True))


def test_parts_that_the_rules_treat_alike_share_code():
    """The attentions are compiled by themselves, behind their hooks. The rule treats the two alike."""
    model, x = Model().eval(), torch.randn(2, 7, 24)
    for module in WHERE["attention"](model):
        with_offloading(module)
    backend = attnrewrite.with_backend(FLASH, rules={"blocks.*.attn": MATH}, inner="eager")
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    assert chosen(backend) == {NAMES[0]: MATH}


def test_two_blocks_that_are_set_share_code_of_their_parts():
    """Regional compilation, and a part of each block that is compiled by itself: the guard knows it in every block."""
    model, x = Model().eval(), torch.randn(2, 7, 24)
    for module in WHERE["attention"](model):
        with_offloading(module)
    backend = attnrewrite.set_attention_backend(model, FLASH, rules={"blocks.*.attn": MATH}, inner="eager")
    with torch.no_grad():
        model(x)
    assert chosen(backend) == {NAMES[0]: MATH}


def test_explain_names_parts_alike():
    model, x = Model().eval(), torch.randn(2, 7, 24)
    for module in WHERE["attention"](model):
        with_a_graph_break(module)
    backend = attnrewrite.with_backend(FLASH, rules=RULES, inner="eager")
    with torch.no_grad():
        report = attnrewrite.explain(model, x, backend=backend)
    assert [(site.name, site.chosen) for site in report.sites] == list(zip(NAMES, (FLASH, MATH), strict=True))


def test_a_pass_of_inductor_tells_parts_apart_by_rules():
    """Both parts give one graph, and PyTorch's cache of compiled graphs must not serve the second with the first."""
    model, x = Model().eval(), torch.randn(2, 7, 24)
    for module in WHERE["attention"](model):
        with_a_graph_break(module)
    swap, keys = attnrewrite.inductor_pass(FLASH, rules=RULES), {}

    def inner(graph_module, example_inputs):
        before, key = len(swap.report.sites), swap.uuid()
        swap(graph_module.graph)
        keys.update({site.name: key for site in swap.report.sites[before:]})
        return graph_module

    with torch.no_grad():
        torch.compile(model, backend=inner)(x)
    assert chosen(swap) == dict(zip(NAMES, (FLASH, MATH), strict=True))
    assert keys[NAMES[0]] != keys[NAMES[1]]


# -- who wraps a module


def compiled_by_itself(module):
    return torch.compile(module, backend="eager")


class FullySharded(torch.nn.Module):
    """The one attribute of FullyShardedDataParallel that a path has."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args):
        return self._fsdp_wrapped_module(*args)


@pytest.mark.parametrize("wrap", [compiled_by_itself, checkpoint_wrapper, FullySharded])
@pytest.mark.parametrize("set_in_place", [False, True])
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
def test_wrappers_are_no_part_of_a_name(wrap, set_in_place):
    model, x = Model().eval(), torch.randn(2, 7, 24)
    expected = model(x)
    for index, block in enumerate(model.blocks):
        block.attn = wrap(block.attn)
        model.blocks[index] = wrap(block)
    if set_in_place:
        backend = attnrewrite.set_attention_backend(model, FLASH, rules=RULES, inner="eager")
        run = model
    else:
        backend = attnrewrite.with_backend(FLASH, rules=RULES, inner="eager")
        run = torch.compile(model, backend=backend)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="rules: ")
        assert relative(run(x), expected) < 1e-5
    assert chosen(backend) == dict(zip(NAMES, (FLASH, MATH), strict=True))


def test_a_module_called_module_is_a_part_of_a_name():
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Model()

    assert "module.blocks.1.attn" in dict(paths_of(Holder()))
    assert "blocks.1.attn" in dict(paths_of(torch.nn.DataParallel(Model(), device_ids=[])))


def test_a_module_at_two_places_has_the_name_by_which_it_is_called():
    model = Model().eval()
    model.other = model.blocks[1]

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.other(x)

    backend = attnrewrite.with_backend(FLASH, inner="eager")
    with torch.no_grad():
        torch.compile(Other(), backend=backend)(torch.randn(2, 7, 24))
    assert list(chosen(backend)) == ["model.other.attn"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", [with_functools, with_a_method, with_diffusers])
def test_exported_programs(way, strict):
    model = Model().eval()
    for block in model.blocks:
        way(block)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 7, 24),), strict=strict)
    program = attnrewrite.rewrite(program, FLASH, rules=RULES)
    assert [(site.name, site.chosen) for site in attnrewrite.report_of(program).sites] == [
        (NAMES[0], FLASH),
        (NAMES[1], MATH),
    ]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self']", ""),
        ("L['self'].__dict__['_modules']['blocks']._modules['0']._orig_mod.attn", "blocks.0.attn"),
        ("L['pipe'].transformer._fsdp_wrapped_module.blocks.0", "transformer.blocks.0"),
        ("L['old'].__self__.blocks.0", "blocks.0"),
        ("L['function_reference'].forward.__self__.blocks.0", "blocks.0"),
        ("L['function_reference'].forward.args[0].blocks.0", "blocks.0"),
        ("G['pipe'].transformer.forward.func.__closure__[0].cell_contents.forward.__self__.a", "transformer.a"),
        ("blocks.0._old_forward.__self__.attn", "blocks.0.attn"),
        # look-alikes: modules of these names
        ("L['self'].forward.0.attn", "forward.0.attn"),
        ("L['self'].args.0.attn", "args.0.attn"),
        ("L['self'].forward_blocks.func.attn", "forward_blocks.func.attn"),
    ],
)
def test_expressions_of_dynamo(source, path):
    assert module_path(source) == path
