"""`set_attention_backend`: a model is compiled in place, put back by `reset_attention_backend`, and stays the same model."""

import copy
import pickle
import re
import warnings

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from model_zoo import MODELS, small_flux
from parity import relative
from test_context import FLASH, MATH, Counting, Layer

import attnrewrite
from attnrewrite import attention_backend, reset_attention_backend, schedule, set_attention_backend, with_backend


class Outer(Layer):
    pass


class Model(torch.nn.Module):
    """Attention before its repeated blocks, as a refiner of prompts, and in them."""

    _repeated_blocks = ("Layer",)

    def __init__(self):
        super().__init__()
        self.refiner = Outer()
        self.blocks = torch.nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x, timestep=None):
        x = self.refiner(x)
        for block in self.blocks:
            x = block(x)
        return x


class Scheduler:
    """Counts steps as diffusers' schedulers do: anew from `set_timesteps` on, one further at each `step`."""

    step_index = begin_index = None

    def set_timesteps(self, steps):
        self.timesteps, self.step_index = torch.arange(steps), None

    def step(self):
        self.step_index = (self.begin_index or 0) + 1 if self.step_index is None else self.step_index + 1


class Counted:
    """A scheduler without `step_index`."""

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps)

    def step(self):
        pass


class Pipeline:
    def __init__(self, scheduler=Scheduler, calls=1, **modules):
        self.scheduler, self.calls, self.modules = scheduler(), calls, modules or {"transformer": Model()}

    @property
    def components(self):
        return {**self.modules, "scheduler": self.scheduler, "tokenizer": None}

    def __call__(self, steps, start=0):
        self.scheduler.set_timesteps(steps)
        if start:
            self.scheduler.begin_index, self.num_timesteps = start, steps - start
        for step in self.scheduler.timesteps[start:]:
            for _ in range(self.calls):
                self.modules["transformer"](hidden(), timestep=step / 1000)
            self.scheduler.step()


def hidden(length=7):
    return torch.randn(2, length, 24)


def sites(backend):
    return {site.name: site.chosen for site in backend.report.sites}


# -- what is compiled


def test_a_model_as_a_whole():
    model, x, inner = Model(), hidden(), Counting()
    expected = model(x)
    backend = set_attention_backend(model, FLASH, regional=False, inner=inner)
    assert (inner.graphs, backend.report.graphs) == ([], [])
    assert relative(model(x), expected) < 1e-5
    assert sites(backend) == {"refiner": FLASH, **{f"blocks.{index}": FLASH for index in range(4)}}
    assert inner.graphs == ["flash"]


def test_repeated_blocks_share_a_compilation():
    model, x, inner = Model(), hidden(), Counting()
    expected = model(x)
    backend = set_attention_backend(model, FLASH, inner=inner, fullgraph=True)
    assert relative(model(x), expected) < 1e-5
    assert (inner.graphs, inner.ran) == (["flash"], ["flash"] * 4)
    assert sites(backend) == {"blocks.0": FLASH}
    (graph,) = backend.report.graphs
    assert graph.sharing == tuple(f"blocks.{index}" for index in range(4))
    assert "block blocks.0, shared by 4 blocks\n" in str(backend.report)
    assert str(attnrewrite.Report.from_json(backend.report.to_json())) == str(backend.report)


def test_each_kind_of_block_is_counted_in_the_report():
    """Kinds differ in their class, or in the rules for them."""

    class TwoKinds(Model):
        _repeated_blocks = ("Layer", "Outer")

        def __init__(self):
            super().__init__()
            self.single = torch.nn.ModuleList([Outer() for _ in range(3)])
            del self.refiner

        def forward(self, x, timestep=None):
            for block in [*self.blocks, *self.single]:
                x = block(x)
            return x

    pipe = Pipeline(transformer=TwoKinds())
    backend = set_attention_backend(pipe, FLASH, rules={"transformer.blocks.2": MATH}, inner="eager")
    pipe.modules["transformer"](hidden())
    pipe.modules["transformer"](hidden(9))  # a second graph of each kind
    pipe.modules["transformer"](hidden(10))
    assert len(backend.report.graphs) > 3
    assert [line for line in str(backend.report).splitlines() if line.startswith("block ")] == [
        "block transformer.blocks.0, shared by 3 blocks",
        "block transformer.blocks.2, by itself",
        "block transformer.single.0, shared by 3 blocks",
    ]
    backend = set_attention_backend(pipe, FLASH, regional=False, inner="eager")
    pipe.modules["transformer"](hidden())
    assert "shared by" not in str(backend.report)


def test_a_model_without_blocks_is_compiled_as_a_whole():
    layer = Layer()
    backend = set_attention_backend(layer, FLASH, inner="eager")
    layer(hidden())
    assert list(sites(backend).values()) == [FLASH]


@pytest.mark.parametrize("regional", [False, True])
def test_rules_name_paths_of_the_whole_model(regional):
    model, inner = Model(), Counting()
    rules = {"blocks.2": MATH, "*.3": "native"}
    backend = set_attention_backend(model, FLASH, regional=regional, rules=rules, inner=inner)
    model(hidden())
    found = sites(backend)
    assert (found["blocks.0"], found["blocks.2"], found["blocks.3"]) == (FLASH, MATH, "native")
    if regional:
        assert inner.ran == ["flash", "flash", "math", "native"]
        assert inner.graphs == ["flash", "math", "native"]


@pytest.mark.parametrize(
    ("make", "pattern", "remedy"),
    [
        (lambda: Pipeline(), "blocks.0", "in a pipeline: 'transformer.blocks.0'"),
        (lambda: Pipeline(), "blocks.*#1", "in a pipeline: 'transformer.blocks.*#1'"),
        (
            lambda: Pipeline(transformer=Model(), transformer_2=Model()),
            "blocks.3",
            "in a pipeline: 'transformer.blocks.3' or 'transformer_2.blocks.3'",
        ),
        (
            lambda: Pipeline(unet=Vae()),
            "projection",
            "in a pipeline: 'unet.decoder.projection' or 'unet.encoder.projection'",
        ),
        (lambda: Pipeline(unet=Vae()), "encoder", "in a pipeline: 'unet.encoder'"),
        (lambda: Model(), "transformer.blocks.*", r"paths begin at the model that is set: 'blocks.*'"),
        (lambda: Model(), "blocks.9", "the nearest is 'blocks."),
        (lambda: Model(), "slef", "the nearest is 'self'"),
    ],
)
def test_a_rule_that_matches_no_module(make, pattern, remedy):
    model, rules = make(), {pattern: MATH, "*": FLASH}
    said = re.escape(f"rules: {pattern!r} matches no module of this model; {remedy}")
    with pytest.warns(UserWarning, match=said):
        backend = set_attention_backend(model, FLASH, rules=rules, inner="eager")
    assert backend.report.unmatched_rules == [pattern]
    assert f"rule {pattern!r} matched none" in str(backend.report)
    with pytest.warns(UserWarning, match=said):  # a backend object is told the same
        set_attention_backend(model, backend)
    reset_attention_backend(model)
    with pytest.raises(ValueError, match=said):
        set_attention_backend(model, FLASH, rules=rules, inner="eager", strict=True)
    parts = model.modules() if isinstance(model, torch.nn.Module) else model.modules.values()
    assert all(part._compiled_call_impl is None for part in parts)


@pytest.mark.parametrize("kind", ["self", "cross", "masked", "unmasked"])
def test_a_rule_for_a_kind_of_attention_matches_no_path_and_needs_none(kind):
    model = Model()
    backend = set_attention_backend(model, "native", rules={kind: MATH}, inner="eager")
    model(hidden())
    expected = MATH if kind in ("self", "unmasked") else "native"
    assert set(sites(backend).values()) == {expected}


@pytest.mark.parametrize("beside", [{"rules": {"self": MATH}}, {"inner": "eager"}, {"strict": True}])
def test_settings_beside_a_backend_object_are_refused(beside):
    model = Model()
    with pytest.raises(TypeError, match="give them to with_backend"):
        set_attention_backend(model, attnrewrite.with_backend(FLASH), **beside)
    assert model._compiled_call_impl is None


def test_of_a_pipeline_the_denoiser():
    pipe = Pipeline(transformer=Model(), transformer_2=Model(), text_encoder=Layer())
    backend = set_attention_backend(pipe, FLASH, inner="eager")
    for module in pipe.modules.values():
        module(hidden())
    assert sites(backend) == {"transformer.blocks.0": FLASH, "transformer_2.blocks.0": FLASH}
    assert "_compiled_call_impl" not in pipe.modules["text_encoder"].__dict__


class Vae(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Layer(), Layer()

    def encode(self, x):
        return self.encoder(x)

    def decode(self, x):
        return self.decoder(x)


def test_other_components_by_name():
    pipe = Pipeline(transformer=Model(), text_encoder=Outer(), vae=Vae())
    backend = set_attention_backend(pipe, FLASH, components=["text_encoder", "vae"], inner="eager")
    pipe.modules["text_encoder"](hidden())
    pipe.modules["vae"].decode(hidden())
    assert sites(backend) == {"text_encoder": FLASH, "vae.decoder": FLASH}
    set_attention_backend(pipe, MATH, inner="eager")  # the denoiser besides
    pipe.modules["vae"].encode(hidden())
    assert sites(backend)["vae.encoder"] == FLASH
    reset_attention_backend(pipe)
    assert not any(
        "_compiled_call_impl" in part.__dict__ for module in pipe.modules.values() for part in module.modules()
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, of a pipeline without text encoder
def test_a_real_pipeline_and_its_denoiser():
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    ).requires_grad_(False)  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    given = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 12))
    expected = unet(*given).sample
    backend = set_attention_backend(pipe, MATH, rules={"*.attn2": FLASH}, inner="eager")
    assert relative(unet(*given).sample, expected) < 1e-5
    chosen = {(name.split(".")[-1], kernel) for name, kernel in sites(backend).items()}
    assert chosen == {("attn1", MATH), ("attn2", FLASH)}
    assert all(name.startswith("unet.") for name in sites(backend))


# -- it stays the same model


@pytest.mark.parametrize("regional", [False, True])
def test_reset_restores_the_very_same_callables(regional):
    model, x = Model(), hidden()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected = model(x)
    set_attention_backend(model, FLASH, regional=regional, inner="eager")
    model(x)
    set_attention_backend(model, MATH, regional=not regional, inner="eager")
    model(x)
    reset_attention_backend(model)
    for name, module in model.named_modules():
        assert list(module.__dict__) == list(before[name])
        assert all(value is before[name][key] for key, value in module.__dict__.items())
    assert torch.equal(model(x), expected)
    reset_attention_backend(model)  # once more changes nothing


def test_what_somebody_else_compiled_comes_back():
    model, x = Model(), hidden()
    model.compile(backend="eager")
    model.blocks[1].compile(backend="aot_eager")
    own = [module.__dict__["_compiled_call_impl"] for module in (model, model.blocks[1])]
    backend = set_attention_backend(model, FLASH, regional=False, inner="eager")
    model(x)
    assert len(sites(backend)) == 5
    model.blocks[2].compile(backend="eager")  # after us: it is not ours to take away
    late = model.blocks[2].__dict__["_compiled_call_impl"]
    reset_attention_backend(model)
    assert [module.__dict__["_compiled_call_impl"] for module in (model, model.blocks[1])] == own
    assert model.blocks[2].__dict__["_compiled_call_impl"] is late


class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x):
        return self.second(self.first(x))


class Staged(torch.nn.Module):
    _repeated_blocks = ("Layer",)

    def __init__(self):
        super().__init__()
        self.refiner, self.stage = Outer(), Stage()

    def forward(self, x):
        return self.stage(self.refiner(x))


def test_what_somebody_else_compiled_around_blocks_and_beside_them():
    model, theirs, inner = Staged(), Counting(), Counting()
    model.stage.compile(backend=theirs)
    model.refiner.compile(backend=theirs)
    before = [module.__dict__["_compiled_call_impl"] for module in (model.stage, model.refiner)]
    set_attention_backend(model, FLASH, inner=inner)
    model(hidden())
    assert (inner.ran, theirs.ran) == (["flash"] * 2, ["native"])
    reset_attention_backend(model)
    assert [module.__dict__["_compiled_call_impl"] for module in (model.stage, model.refiner)] == before
    model(hidden())
    assert (inner.ran, theirs.ran) == (["flash"] * 2, ["native"] * 3)


def test_a_block_that_was_set_after_its_model():
    """In a model whose blocks are compiled, the block's choice holds, and each comes back by its own reset."""
    model, x, inner = Model(), hidden(), Counting()
    set_attention_backend(model, FLASH, inner=inner)
    set_attention_backend(model.blocks[1], MATH, inner=inner)
    model(x)
    assert inner.ran == ["flash", "math", "flash", "flash"]
    reset_attention_backend(model.blocks[1])
    model(x)
    assert inner.ran[4:] == ["flash"] * 4
    set_attention_backend(model.blocks[1], MATH, inner=inner)
    reset_attention_backend(model)
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())


def test_the_reset_of_one_block_leaves_its_model_set():
    model, inner = Model(), Counting()
    set_attention_backend(model, FLASH, inner=inner)
    reset_attention_backend(model.blocks[1])
    model(hidden())
    assert inner.ran == ["flash"] * 4


@pytest.mark.parametrize("progress", [False, True])
def test_a_part_of_what_is_compiled_as_one_is_refused(progress):
    model = Model()
    choices = schedule(edge=MATH, middle=FLASH, steps=9) if progress else FLASH
    set_attention_backend(model, choices, regional=False, inner="eager")
    with pytest.raises(ValueError, match=r"model is 'blocks\.1' of a Model that .* ignored\. Set the Model with rules"):
        set_attention_backend(model.blocks[1], MATH, inner="eager")
    set_attention_backend(model, choices, regional=True, inner="eager")
    with pytest.raises(ValueError, match=r"model is 'projection' of a Layer that"):
        set_attention_backend(model.blocks[1].projection, MATH, inner="eager")
    set_attention_backend(model.blocks[1], MATH, inner="eager")
    set_attention_backend(model.refiner, MATH, inner="eager")  # beside the blocks
    reset_attention_backend(model.blocks[1])  # so the block has its model's choice again
    with pytest.raises(ValueError, match=r"model is 'projection' of a Layer that"):
        set_attention_backend(model.blocks[1].projection, MATH, inner="eager")
    reset_attention_backend(model)
    set_attention_backend(model.blocks[1].projection, MATH, inner="eager")


def test_a_model_whose_blocks_are_compiled_has_no_mark_itself():
    """peft's `enable_lora_hotswap` raises for one that has. One that was compiled by others is uncompiled as before."""
    model = Model()
    set_attention_backend(model, FLASH, inner="eager")
    assert "_compiled_call_impl" not in model.__dict__
    reset_attention_backend(model)
    model.compile(backend="eager")
    own = model.__dict__["_compiled_call_impl"]
    set_attention_backend(model, FLASH, inner="eager")
    assert model._compiled_call_impl is None
    reset_attention_backend(model)
    assert model.__dict__["_compiled_call_impl"] is own


@torch.no_grad()
def test_a_first_lora_after_the_blocks_were_compiled(tmp_path):
    peft = pytest.importorskip("peft")
    model, given = small_flux()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    adapted = copy.deepcopy(model)
    adapted.add_adapter(config, adapter_name="default")
    expected = adapted(**given).sample
    adapted.save_lora_adapter(tmp_path, adapter_name="default")
    backend = set_attention_backend(model, FLASH, inner="eager")
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path, adapter_name="default", prefix=None, use_safetensors=True)
    assert relative(model(**given).sample, expected) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {FLASH}


def test_torch_compile_may_be_disabled(monkeypatch):
    """`TORCHDYNAMO_DISABLE=1`: torch.compile returns what it got, here a bound method."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    model, x = Model(), hidden()
    expected = model(x)
    set_attention_backend(model, FLASH, regional=False)
    assert torch.equal(model(x), expected)
    reset_attention_backend(model)
    assert not any("_compiled_call_impl" in module.__dict__ for module in model.modules())


def test_state_dict_hooks_and_moves():
    model, x = Model(), hidden()
    keys, seen = list(model.state_dict()), []
    handle = model.register_forward_hook(lambda module, given, output: seen.append("model"))
    model.blocks[1].register_forward_pre_hook(lambda module, given: seen.append("block"))
    model(x)
    set_attention_backend(model, FLASH, inner="eager")
    model(x)
    assert seen == ["block", "model"] * 2
    assert list(model.state_dict()) == keys
    model.load_state_dict({name: value * 0 for name, value in model.state_dict().items()})
    assert model(x).abs().max() == 0
    handle.remove()
    model.to(torch.float64)
    assert model(x.double()).dtype == torch.float64
    assert seen == ["block", "model"] * 3 + ["block"]


@pytest.mark.parametrize("regional", [False, True])
def test_copies_and_pickles_are_plain(regional):
    model, x = Model(), hidden()
    expected = model(x)
    set_attention_backend(model, FLASH, regional=regional, inner="eager")
    model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("_compiled_call_impl" in module.__dict__ for module in made.modules())
        assert torch.equal(made(x), expected)
        reset_attention_backend(made)
        backend = set_attention_backend(made, MATH, regional=regional, inner="eager")
        assert relative(made(x), expected) < 1e-5
        assert set(sites(backend).values()) <= {MATH}
    assert any("_compiled_call_impl" in module.__dict__ for module in model.modules())


class Adapter(torch.nn.Module):
    """As LoRA wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False).requires_grad_(False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_layers_that_are_wrapped_and_unwrapped():
    model, x, inner = Model(), hidden(), Counting()
    expected = model(x)
    set_attention_backend(model, FLASH, inner=inner)
    model(x)
    for block in model.blocks:
        block.projection = Adapter(block.projection)
    adapted = model(x)
    assert relative(adapted, expected) > 1e-3
    reset_attention_backend(model)
    assert relative(model(x), adapted) < 1e-5
    set_attention_backend(model, FLASH, inner=inner)
    for block in model.blocks:
        block.projection = block.projection.base
    assert relative(model(x), expected) < 1e-5
    assert set(inner.ran) == {"flash"}


def hooks_of(kind, model):
    if kind == "offloading":
        pytest.importorskip("accelerate", reason="diffusers' group offloading needs accelerate")
        apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level")
    elif kind == "accelerate":
        hooks = pytest.importorskip("accelerate.hooks")
        for block in model.transformer_blocks:
            hooks.add_hook_to_module(block, hooks.AlignDevicesHook("cpu", io_same_device=True))
    elif kind == "layerwise casting":
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        model.enable_cache(FirstBlockCacheConfig(threshold=-1.0))


@pytest.mark.parametrize("kind", ["offloading", "accelerate", "layerwise casting", "first block cache"])
@pytest.mark.filterwarnings("ignore")
def test_hooks_of_diffusers(kind):
    model, given = small_flux()
    hooks_of(kind, model)
    with model.cache_context("cond"):
        expected = model(**given).sample
        backend = set_attention_backend(model, FLASH, inner="eager")
        assert relative(model(**given).sample, expected) < 1e-5
        assert backend.report.swapped == 2
        assert {site.chosen for site in backend.report.sites} == {FLASH}
        reset_attention_backend(model)
        assert torch.equal(model(**given).sample, expected)


@pytest.mark.filterwarnings("ignore")
def test_perturbed_attention_guidance():
    """Its processors give the values themselves for one part of the batch, and call SDPA for the other."""
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    model, given = MODELS["sdxl_unet"]()
    plain = model(**given)[0]
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            module.processor = PAGIdentitySelfAttnProcessor2_0()
    expected = model(**given)[0]
    assert relative(expected, plain) > 1e-2
    backend = set_attention_backend(model, FLASH, inner="eager")
    assert relative(model(**given)[0], expected) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {FLASH}


@pytest.mark.filterwarnings("ignore")
def test_smoothed_energy_guidance():
    """Its hook blurs the queries of a layer."""
    from diffusers.hooks import smoothed_energy_guidance_utils as seg

    model, given = MODELS["wan"]()
    plain = model(**given)[0]
    layers = seg.SmoothedEnergyGuidanceConfig(indices=[0], fqn="blocks")
    seg._apply_smoothed_energy_guidance_hook(model, layers, blur_sigma=2.0)
    expected = model(**given)[0]
    assert relative(expected, plain) > 1e-3
    backend = set_attention_backend(model, FLASH, inner="eager")
    assert relative(model(**given)[0], expected) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {FLASH}


def test_a_context_holds_for_a_set_model_too():
    model, inner = Model(), Counting()
    set_attention_backend(model, FLASH, inner=inner)
    with attention_backend(MATH):
        model(hidden())
    assert inner.ran == ["math"] * 4


# -- schedules


def steps_of(inner, calls=4):
    return inner.ran[::calls]


EDGE, MIDDLE = "math", "flash"


@pytest.mark.parametrize("scheduler", [Scheduler, Counted])
@pytest.mark.parametrize("regional", [False, True])
def test_first_and_last_steps(scheduler, regional):
    pipe, inner = Pipeline(scheduler), Counting()
    backend = set_attention_backend(
        pipe, schedule(first=2, last=1, edge=MATH, middle=FLASH), regional=regional, inner=inner
    )
    ran = 4 if regional else 1
    for steps in (5, 7):  # several images in a row
        inner.ran.clear()
        pipe(steps)
        assert steps_of(inner, ran) == [EDGE] * 2 + [MIDDLE] * (steps - 3) + [EDGE]
    assert inner.graphs == [EDGE, MIDDLE]
    assert {graph.context for graph in backend.report.graphs} == {"", MATH}


def test_several_calls_a_step():
    for scheduler, calls in ((Scheduler, None), (Counted, 2)):
        pipe, inner = Pipeline(scheduler, calls=2), Counting()
        set_attention_backend(pipe, schedule(first=1, last=2, edge=MATH, middle=FLASH, calls=calls), inner=inner)
        for _ in range(2):
            inner.ran.clear()
            pipe(5)
            assert steps_of(inner, 8) == [EDGE, MIDDLE, MIDDLE, EDGE, EDGE]
        torch.compiler.reset()


def test_a_pipeline_that_starts_in_the_midst_of_its_timesteps():
    pipe, inner = Pipeline(), Counting()
    set_attention_backend(pipe, schedule(first=1, last=1, edge=MATH, middle=FLASH), inner=inner)
    pipe(8, start=4)
    assert steps_of(inner) == [EDGE, MIDDLE, MIDDLE, EDGE]


def test_a_call_that_broke_off_is_forgotten():
    pipe, inner = Pipeline(Counted), Counting()
    set_attention_backend(pipe, schedule(first=1, last=1, edge=MATH, middle=FLASH), inner=inner)
    pipe.scheduler.set_timesteps(9)
    pipe.modules["transformer"](hidden())
    inner.ran.clear()
    pipe(4)
    assert steps_of(inner) == [EDGE, MIDDLE, MIDDLE, EDGE]


def test_two_denoisers_take_turns():
    pipe, inner = Pipeline(Counted, transformer=Model(), transformer_2=Model()), Counting()
    set_attention_backend(pipe, schedule(first=1, last=1, edge=MATH, middle=FLASH), inner=inner)
    pipe.scheduler.set_timesteps(4)
    for name in ("transformer", "transformer", "transformer_2", "transformer_2"):
        pipe.modules[name](hidden())
    assert steps_of(inner) == [EDGE, MIDDLE, MIDDLE, EDGE]


def test_a_model_alone_is_told_the_number():
    model, inner = Model(), Counting()
    set_attention_backend(model, schedule(first=1, last=1, edge=MATH, middle=FLASH, steps=3), inner=inner)
    for _ in range(6):
        model(hidden())
    assert steps_of(inner) == [EDGE, MIDDLE, EDGE] * 2


def test_in_a_loop_of_ones_own():
    plan, model, inner = schedule(first=1, last=1, edge=MATH, middle=FLASH), Layer(), Counting()
    run = torch.compile(model, backend=with_backend(FLASH, inner=inner))
    for step in range(4):
        with plan.at(step, 4):
            run(hidden())
    assert inner.ran == [EDGE, MIDDLE, MIDDLE, EDGE]


def test_a_context_holds_for_all_steps():
    pipe, inner = Pipeline(), Counting()
    set_attention_backend(pipe, schedule(edge=MATH, middle=FLASH, steps=9), inner=inner)
    with attention_backend("native"):
        pipe(6)
    assert set(inner.ran) == {"native"}


# -- bad input: nothing is changed


class Stranger:
    @property
    def components(self):
        return {"vae": Vae()}


BAD = {
    "no model": (
        lambda: set_attention_backend(3, FLASH),
        TypeError,
        "model is int: give a torch.nn.Module or a diffusers pipeline",
    ),
    "a class": (
        lambda: set_attention_backend(Layer, FLASH),
        TypeError,
        r"model is the class Layer: give an object of it",
    ),
    "regional is no flag": (
        lambda: set_attention_backend(Model(), FLASH, regional="no"),
        TypeError,
        r"regional is 'no' \(str\): give True or False",
    ),
    "fullgraph is no flag": (lambda: set_attention_backend(Layer(), FLASH, fullgraph=1), TypeError, "fullgraph is 1"),
    "reset of no model": (lambda: reset_attention_backend("flux"), TypeError, "model is str"),
    "compiled": (
        lambda: set_attention_backend(torch.compile(Layer()), FLASH),
        TypeError,
        r"the result of torch\.compile\(\.\.\.\)",
    ),
    "component": (
        lambda: set_attention_backend(Pipeline(), FLASH, components=["vea"]),
        ValueError,
        "components has 'vea', which is no module of this pipeline; it has transformer",
    ),
    "components of a module": (
        lambda: set_attention_backend(Layer(), FLASH, components=["vae"]),
        ValueError,
        "model is a module",
    ),
    "no denoiser": (
        lambda: set_attention_backend(Stranger(), FLASH),
        ValueError,
        "name its parts by components=, of vae",
    ),
    "no blocks": (
        lambda: set_attention_backend(Layer(), FLASH, regional=True),
        ValueError,
        "regional=True, and Layer has none",
    ),
    "mode and options": (
        lambda: set_attention_backend(Layer(), FLASH, mode="max-autotune", options={"max_autotune": True}),
        RuntimeError,
        "mode or options",
    ),
    "kernel": (lambda: set_attention_backend(Layer(), "flsh"), ValueError, "did you mean 'flash'"),
    "middle": (lambda: schedule(middle="flsh"), ValueError, "no attention backend is called 'flsh'"),
    "first": (lambda: schedule(first=-1, middle=FLASH), ValueError, "first is -1: give a number of steps from 0"),
    "calls": (lambda: schedule(calls=0, middle=FLASH), ValueError, "calls is 0: give a number of calls from 1"),
    "too many": (
        lambda: schedule(first=2, last=2, steps=3, middle=FLASH),
        ValueError,
        "nothing is left for the middle",
    ),
    "no number": (
        lambda: set_attention_backend(Layer(), schedule(middle=FLASH)),
        ValueError,
        r"Give steps=, or set the pipeline",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, said = BAD[name]
    with pytest.raises(error, match=said):
        call()


def test_an_error_leaves_what_was_set():
    model = Model()
    set_attention_backend(model, FLASH, inner="eager")
    before = {module: module.__dict__.get("_compiled_call_impl") for module in model.modules()}
    for settings in ({"numerics": "fast"}, {"mode": "max-autotune", "options": {}}, {"components": ["vae"]}):
        with warnings.catch_warnings(), pytest.raises((ValueError, RuntimeError)):
            set_attention_backend(model, MATH, **settings)
    assert {module: module.__dict__.get("_compiled_call_impl") for module in model.modules()} == before
