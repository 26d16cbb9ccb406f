"""Switching beside what else people use with torch.compile: caches, other compilers, distributed wrappers, the peer."""

import contextlib
import json
import os
import shutil
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed
from model_zoo import small_flux
from parity import attend, doubled, qkv, relative
from test_context import FLASH, MATH, Counting, Layer
from torch.utils.checkpoint import checkpoint

import attnrewrite
from attnrewrite import attention_backend, set_attention_backend, with_backend
from attnrewrite.entrances import identity
from attnrewrite.kernels.machines import satisfies

ROOT = Path(__file__).resolve().parent.parent


# -- other compilers


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "aot_eager_decomp_partition", "cudagraphs"])
def test_inner_is_any_registered_backend(inner):
    given = qkv()
    backend = with_backend(FLASH, inner=inner)
    run = torch.compile(attend, backend=backend, fullgraph=True)
    for context in (contextlib.nullcontext(), attention_backend(MATH)) * 2:
        with context, torch.no_grad():
            assert relative(run(*given), attend(*map(doubled, given))) < 1e-5
    assert [site.chosen for site in backend.report.sites] == [FLASH, MATH]


def test_the_pass_of_inductor():
    swap = attnrewrite.inductor_pass(FLASH, rules={"cross": "native"})
    assert (swap, hash(swap)) == (same := attnrewrite.inductor_pass(FLASH, rules={"cross": "native"}), hash(same))
    assert swap != attnrewrite.inductor_pass(FLASH)
    with torch._inductor.utils.fresh_cache():
        run = torch.compile(attend, fullgraph=True, dynamic=True, options={"pre_grad_custom_pass": swap})
        with torch.no_grad():
            for length in (7, 12):
                given = qkv(q_len=length, kv_len=11)
                assert relative(run(*given), attend(*map(doubled, given))) < 1e-5
    assert [site.chosen for site in swap.report.sites] == ["native"]


@pytest.mark.parametrize("spelled_out", [False, True])
def test_the_pass_behind_a_backend_finds_what_is_swapped_already(spelled_out):
    def function(q, k, v):
        return (q @ k.mT * 0.25).softmax(-1) @ v if spelled_out else attend(q, k, v)

    backend, swap = attnrewrite.with_backend("native"), attnrewrite.inductor_pass("native")
    given = qkv()
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        run = torch.compile(function, backend=backend, options={"pre_grad_custom_pass": swap})
        assert relative(run(*given), function(*map(doubled, given))) < 1e-5
    assert [site.chosen for site in backend.report.sites] == ["native"]


def test_the_pass_refuses_bad_input():
    with pytest.raises(ValueError, match="no attention backend is called 'flsh'"):
        attnrewrite.inductor_pass("flsh")


# -- the key of PyTorch's caches


def other_op(query, key, value, prepared, *, call):
    return query


SCALE = 2.0


def op_of_a_setting(query, key, value, prepared, *, call):
    return query * SCALE


def identity_with(**changes):
    record = replace(attnrewrite.records_of(MATH)[0], **changes)
    return identity.identity_of(attnrewrite.make_policy([record]))


def test_identity_changes_with_what_matters(monkeypatch):
    base = identity_with()
    assert base == identity_with()
    factor = 2.0
    changed = {
        "limit": identity_with(head_dim=attnrewrite.HeadDim(max=64)),
        "op": identity_with(op=other_op),
        "closure": identity_with(op=lambda query, key, value, prepared, *, call: query * factor),
        "choice": identity.identity_of(attnrewrite.make_policy([FLASH])),
        "rule": identity.identity_of(attnrewrite.make_policy([MATH], {"self": FLASH})),
        "strict": identity.identity_of(attnrewrite.make_policy([MATH], strict=True)),
        "checks": identity.identity_of(attnrewrite.make_policy([MATH], checks=True)),
    }
    factor = 3.0
    changed["value in a closure"] = identity_with(op=lambda query, key, value, prepared, *, call: query * factor)
    changed["another op"] = identity_with(op=op_of_a_setting)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    changed["plain global"] = identity_with(op=op_of_a_setting)
    policy, here = attnrewrite.make_policy([attnrewrite.records_of(MATH)[0]]), identity.machines_here()
    assert identity.identity_of(policy, version=attnrewrite.__version__, machines=here) == base
    changed["version"] = identity.identity_of(policy, version="9.9")
    others = [replace(machine, packages={**machine.packages, "flash-attn": "9"}) for machine in here]
    changed["kernel's version"] = identity.identity_of(policy, machines=others)
    assert None not in changed.values()
    assert len({base, *changed.values()}) == len(changed) + 1, changed


DIGESTS = """
import sys
from attnrewrite.entrances.identity import package_digest

digests = [package_digest()]
for file in ["", *sys.argv[1:]]:
    if file:
        with open(file, "a") as opened:
            opened.write("# a change\\n")
    package_digest.cache_clear()
    digests.append(package_digest())
print(*digests)
"""


def test_identity_changes_with_every_file_of_the_package(tmp_path):
    """In a checkout too, where passes and backends stand behind links."""
    for folder in ("attnrewrite", "passes", "backends"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    files = ["passes/swap_kernels.py", "backends/native.py", "attnrewrite/planning/reasons.py"]
    done = forked.python("-c", DIGESTS, *files, cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    before, again, *changed = done.stdout.split()
    assert before == again
    assert len({before, *changed}) == 1 + len(files)


def test_a_commit_of_the_hub_is_a_part_of_the_identity():
    record = replace(
        attnrewrite.records_of(MATH)[0],
        source=attnrewrite.Hub("org/kernel", 1),
        requires={},
        devices=frozenset({"cpu"}),
    )
    policy = attnrewrite.make_policy([record])
    a, same, b = (
        identity.identity_of(policy, load=lambda source, trust, commit=commit: f"{source.repository}@{commit}")
        for commit in ("a", "a", "b")
    )
    assert None not in (a, b)
    assert a == same != b


def test_no_identity_for_what_cannot_be_described():
    class Strange:
        pass

    strange = Strange()
    assert identity_with(op=lambda query, key, value, prepared, *, call: (strange, query)[1]) is None


KERNEL = """
FACTOR = {factor}

def helper(query):
    return query * FACTOR

def scaled(query, key, value, prepared, *, call):
    return helper(query)
"""

PROCESS = """
import sys
sys.dont_write_bytecode = True  # the source of `mine` changes within a second
import json, torch, attnrewrite, mine
from dataclasses import replace
from functools import partial
from torch._dynamo.utils import counters
from attnrewrite.entrances.graph_pass import AttentionPass
from attnrewrite.entrances.identity import identity_of

base = attnrewrite.records_of("_native_math")[0]
ours = replace(base, name="ours", op=mine.scaled)
theirs = replace(base, name="theirs", op=lambda query, key, value, prepared, *, call: query * 5.0)
x = torch.ones(1, 2, 7, 8)

def attend(query):
    return torch.nn.functional.scaled_dot_product_attention(query, query, query) + 0.0

def case(choice, how, context=None, version=None):
    torch._dynamo.reset()
    counters.clear()
    if how == "pass":
        swap = attnrewrite.inductor_pass(choice)
        if version:
            swap = AttentionPass(swap.compiler, partial(identity_of, version=version))
        run = torch.compile(attend, options={"pre_grad_custom_pass": swap})
    else:
        swap = attnrewrite.with_backend(choice)
        run = torch.compile(attend, backend=swap)
    if context:  # after a call outside: what a warm start found must not be found again
        with torch.no_grad():
            run(x)
    with torch.no_grad(), (attnrewrite.attention_backend(context) if context else torch.no_grad()):
        value = run(x).mean().item()
    hit = counters["aot_autograd"]["autograd_cache_hit"]
    return [value, hit, len(swap.report.sites)]

version, load, save = sys.argv[1:]
if load:  # PyTorch's mega-cache: what another process has put into one file
    with open(load, "rb") as artifacts:
        torch.compiler.load_cache_artifacts(artifacts.read())
found = {}
found["pass ours"] = case(ours, "pass")
found["pass context"] = case(ours, "pass", theirs)
found["backend ours"] = case(ours, "backend")
found["pass version"] = case(ours, "pass", version=version)
if save:
    with open(save, "wb") as artifacts:
        artifacts.write(torch.compiler.save_cache_artifacts()[0])
print(json.dumps(found))
"""


def test_processes_that_share_a_cache(tmp_path):
    """Nothing changes between two processes, or a record's helper and this package's version do. The output has the helper's
    factor, which tells whose code ran."""
    (tmp_path / "script.py").write_text(textwrap.dedent(PROCESS))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

    def process(factor, version, cache="cache", load="", save=""):
        (tmp_path / "mine.py").write_text(KERNEL.format(factor=factor))
        environment = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        done = forked.python("script.py", version, load, save, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    factor = {"ours": 2.0, "context": 5.0, "version": 2.0}
    cold, warm = process(2.0, "1", save="mega"), process(2.0, "1")
    mega = process(2.0, "1", cache="second", load="mega") if os.environ.get("ATTNREWRITE_SLOW") else warm
    changed = process(3.0, "2", load="mega")
    for name, (value, _, _) in cold.items():
        assert value == factor[name.split()[1]]
    for found in (warm, mega):
        for name, (value, hit, _) in found.items():
            assert (value, hit) == (factor[name.split()[1]], 2 if "context" in name else 1), name
        assert found["backend ours"][2] == 1  # the report of a warm start
    for name, (value, hit, _) in changed.items():
        kind = name.split()[1]
        assert value == (5.0 if kind == "context" else 3.0), name
        if kind in ("ours", "version"):
            assert hit == 0, name


# -- what changes how a compiled model is called


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_stances(stance):
    inner = Counting()
    run = torch.compile(attend, backend=with_backend(FLASH, inner=inner))
    given = qkv()
    run(*given)
    with torch.compiler.set_stance(stance), pytest.warns(UserWarning, match="changed nothing"), attention_backend(MATH):
        assert relative(run(*given), attend(*given)) < 1e-6
    assert inner.graphs == ["flash"]
    with attention_backend(MATH):
        run(*given)
    assert inner.graphs == ["flash", "math"]


@pytest.mark.skipif(
    not satisfies(torch.__version__, ">=2.13"),
    reason="PyTorch serialises the functions of no backend but its own there",
)
def test_ahead_of_time_compiled_functions_keep_their_choice():
    """PyTorch gives them guards of its own, without ours."""
    given = qkv()
    with attention_backend(MATH), torch._dynamo.config.patch(enable_aot_compile=True):
        run = torch.compile(attend, backend=with_backend(FLASH), fullgraph=True).aot_compile((given, {}))
    with pytest.warns(UserWarning, match="changed nothing"), attention_backend(FLASH):
        assert relative(run(*given), attend(*map(doubled, given))) < 1e-5


def test_past_the_limit_of_recompilations_the_context_says_so():
    run = torch.compile(attend, backend=with_backend(FLASH, inner="eager"))
    given = qkv()
    with torch._dynamo.config.patch(recompile_limit=2):
        for choice in (FLASH, MATH):
            with attention_backend(choice):
                run(*given)
        with pytest.warns(UserWarning, match="changed nothing"), attention_backend("flex"):
            run(*given)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_inside(use_reentrant):
    layer, x = Layer().requires_grad_(True), torch.randn(2, 7, 24, requires_grad=True)
    backend = with_backend(FLASH, inner="aot_eager")

    def step(x):
        return checkpoint(layer, x, use_reentrant=use_reentrant).sum()

    run = torch.compile(step, backend=backend)
    step(x).backward()
    expected, x.grad = x.grad, None
    with attention_backend(MATH):
        run(x).backward()
    assert relative(x.grad, expected) < 1e-5
    assert [site.chosen for site in backend.report.sites] == [MATH]


def test_autocast():
    run = torch.compile(attend, backend=(backend := with_backend(FLASH, inner="eager")))
    given = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        for context in (contextlib.nullcontext(), attention_backend(MATH)):
            with context:
                output = run(*given)
            assert output.dtype == torch.bfloat16
            assert relative(output, attend(*map(doubled, given))) < 1.2e-2
    with attention_backend(MATH):
        assert run(*given).dtype == torch.float32
    assert [(site.call.dtype, site.chosen) for site in backend.report.sites] == [
        ("bfloat16", FLASH), ("bfloat16", MATH), ("float32", MATH),
    ]  # fmt: skip


# -- the peer's own switch


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("theirs", ["native", "_native_math"])
def test_diffusers_set_attention_backend(theirs):
    """Its choice stands in the graph as calls that set PyTorch's own; ours holds, and it is not disturbed."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model, given = small_flux()
    expected = model(**given).sample
    try:
        model.set_attention_backend(theirs)
        backend = set_attention_backend(model, FLASH, regional=False, inner="eager", fullgraph=True)
        assert relative(model(**given).sample, expected) < 1e-5
        with attention_backend("native", MATH):
            assert relative(model(**given).sample, expected) < 1e-5
        assert [graph.plan.sites[0].chosen for graph in backend.report.graphs] == [FLASH, "native"]
        attnrewrite.reset_attention_backend(model)
        assert {module.processor._attention_backend for module in model.modules() if hasattr(module, "processor")} == {
            AttentionBackendName(theirs)
        }
    finally:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


# -- distributed


def test_ddp(one_rank):
    model, inner, x = Layer().requires_grad_(True), Counting(backward=True), torch.randn(2, 7, 24)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    expected = model(x).detach()
    run = torch.compile(wrapped, backend=with_backend(FLASH, inner=inner))
    for context in (contextlib.nullcontext(), attention_backend(MATH)):
        with context:
            output = run(x)
        output.sum().backward()
        assert relative(output.detach(), expected) < 1e-5
    assert inner.graphs == ["flash", "math"]


def test_fsdp2(one_rank):
    from torch.distributed.fsdp import fully_shard

    model, x = Layer(), torch.randn(2, 7, 24)
    expected = model(x)
    fully_shard(model, mesh=one_rank)
    backend = set_attention_backend(model, FLASH, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative(model(x), expected) < 1e-5
        with attention_backend(MATH):
            assert relative(model(x), expected) < 1e-5
    assert [site.chosen for site in backend.report.sites] == [FLASH, MATH]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch and NCCL about devices
@pytest.mark.gpu  # test_dtensors.py has more, on the CPU
def test_dtensors_on_a_gpu(tmp_path):
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (1,))
        given = [distribute_tensor(tensor.half().contiguous().cuda(), mesh, [Replicate()]) for tensor in qkv(kv_len=7)]
        backend = with_backend("_native_efficient", inner="eager")
        expected = attend(*given).full_tensor()
        assert relative(torch.compile(attend, backend=backend)(*given).full_tensor(), expected) < 5e-3
        assert [site.chosen for site in backend.report.sites] == ["_native_efficient"]
    finally:
        torch.distributed.destroy_process_group()


# -- what is not installed everywhere


@pytest.mark.parametrize("regional", [True, False])
def test_lora(regional):
    """An adapter that comes and goes after the model was set: no stale code, and the same output as before at the end."""
    peft = pytest.importorskip("peft", reason="LoRA of diffusers needs peft")
    model, given = small_flux()
    eager, _ = small_flux()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.no_grad():
        backend = set_attention_backend(model, FLASH, inner="eager", regional=regional)
        before = model(**given).sample
        for each in (model, eager):
            torch.manual_seed(1)
            each.add_adapter(config)
        adapted = model(**given).sample
        assert relative(adapted, before) > 1e-2
        assert relative(adapted, eager(**given).sample) < 1e-5
        model.delete_adapters("default")
        assert relative(model(**given).sample, before) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {FLASH}


def quantised_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def quantised_by_bitsandbytes(model):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    for module, name, linear in linears(model):
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
        made.weight, made.bias = (
            bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4"),
            linear.bias,
        )
        setattr(module, name, made.to("cpu"))  # quantises


def quantised_by_gguf(model):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for module, name, linear in linears(model):
        made = GGUFLinear(linear.in_features, linear.out_features, compute_dtype=torch.float32)
        data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        made.weight, made.bias = GGUFParameter(data, quant_type=kind), linear.bias
        setattr(module, name, made)


def linears(model):
    """The linear layers of attentions, with the module and the name that hold each. Blocks of 32 weights are quantised."""
    found = [(module, *each) for module in model.modules() for each in module.named_children()]
    return [each for each in found if isinstance(each[2], torch.nn.Linear) and each[2].in_features % 32 == 0]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("quantised", [quantised_by_torchao, quantised_by_bitsandbytes, quantised_by_gguf])
def test_quantised_weights(quantised):
    pytest.importorskip("diffusers")
    model, x = Layer(96), torch.randn(2, 7, 96)
    with torch.no_grad():
        exact = model(x)
        quantised(model)
        expected = model(x)
        assert 1e-4 < relative(expected, exact) < 0.3
        backend = set_attention_backend(model, FLASH, inner="eager")
        assert relative(model(x), expected) < 1e-5
    assert [site.chosen for site in backend.report.sites] == [FLASH]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["cache", "kernel"])
def test_cache_dit(first):
    """It replaces the blocks by its own that skip some, before the model is set or after it."""
    cache_dit = pytest.importorskip("cache_dit", reason="needs cache-dit")
    model, given = small_flux()
    blocks = [model.transformer_blocks, model.single_transformer_blocks]
    adapter = cache_dit.BlockAdapter(
        transformer=model, blocks=blocks, forward_pattern=[cache_dit.ForwardPattern.Pattern_1] * 2,
        check_forward_pattern=False, auto=False,
    )  # fmt: skip
    settings = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=4)
    with torch.no_grad():
        expected = model(**given).sample
        if first == "cache":
            cache_dit.enable_cache(adapter, cache_config=settings)
        backend = set_attention_backend(model, FLASH, inner="eager")
        if first == "kernel":
            cache_dit.enable_cache(adapter, cache_config=settings)
        assert relative(model(**given).sample, expected) < 1e-5
    assert {site.chosen for site in backend.report.sites} == {FLASH}


# -- CUDA graphs and autotuning, on a GPU


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch about its own CUDA graphs
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("checks", [False, True])
def test_modes_of_inductor(mode, checks):
    layer = Layer(96).cuda().bfloat16()
    inputs = [torch.randn(2, 64, 96, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [layer.double()(x.double()) for x in inputs]
    layer.bfloat16()
    backend = with_backend("_native_flash", checks=checks)
    with torch.no_grad():
        run = torch.compile(layer, backend=backend, mode=mode)
        for _ in range(3):
            for x, reference in zip(inputs, expected, strict=True):
                assert relative(run(x).clone(), reference) < 2e-2
                with attention_backend("_native_efficient"):
                    assert relative(run(x).clone(), reference) < 2e-2
    assert [site.chosen for site in backend.report.sites] == ["_native_flash", "_native_efficient"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch about its own CUDA graphs
@pytest.mark.gpu
@pytest.mark.parametrize("spelling", ["entry point", "pass"])
def test_cuda_graphs_by_other_ways_in(spelling):
    layer = Layer(96).cuda().half()
    x = torch.randn(2, 64, 96, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        expected = layer(x)
        if spelling == "pass":
            options = {
                "triton.cudagraphs": True,
                "pre_grad_custom_pass": attnrewrite.inductor_pass("_native_efficient"),
            }
            run = torch.compile(layer, options=options)
        else:
            run = torch.compile(
                layer, backend="attnrewrite", options={"attention": "_native_efficient", "mode": "reduce-overhead"}
            )
        for _ in range(4):
            assert relative(run(x).clone(), expected) < 5e-3
