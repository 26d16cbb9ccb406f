"""Every kernel that another package brings, as its record declares it, on a GPU. CI has none: what this printed on an H200 is
in bench/results/."""

import importlib.util

import pytest
import torch
from parity import attend, check, compiled, doubled, qkv, recorded, relative, windowed
from stand_ins import local_kernels

import attnrewrite
from attnrewrite import Code, MaskKind
from attnrewrite.kernels.machines import installed
from attnrewrite.kernels.sources import Hub
from attnrewrite.planning import registry
from attnrewrite.planning.usable import usable

pytestmark = [
    pytest.mark.gpu,
    # What libraries and Triton say while they compile.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

NAMES = tuple(
    dict.fromkeys(
        record.name
        for record in registry.records()
        if "cuda" in record.devices
        and (record.source is not None or record.name == "_native_varlen")
        and record.numerics is not attnrewrite.Numerics.SPARSE  # test_sol.py
    )
)
# Hub repositories are made here of the package that the hub's build is made from.
BUILDS = {
    "kernels-community/flash-attn2": "flash_attn",
    "kernels-community/flash-attn3": "fa3_fwd_interface",
    "kernels-community/flash-attn4": "flash_attn.cute",
    "SageAttention/sage-attention": "sageattention",
}


@pytest.fixture(autouse=True, scope="session")
def local_hub(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", local_kernels(tmp_path_factory.mktemp("hub"), BUILDS))
        yield


@pytest.fixture(params=NAMES)
def record(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    refused, record = usable(request.param, attnrewrite.machine_of(torch.device("cuda", 0)))
    if refused is not None:
        pytest.skip(f"{request.param}: {refused}")
    if isinstance(record.source, Hub) and record.source.repository not in BUILDS:
        pytest.skip(f"{request.param}: {record.source} cannot be downloaded here")
    if isinstance(record.source, Hub):
        module = pytest.importorskip(BUILDS[record.source.repository], exc_type=ImportError)
        if not {"flash_attn_func", "sageattn"} & set(vars(module)):  # another package of that name: FlashAttention 4's
            pytest.skip(f"{request.param}: its repository is made from {module.__name__}, which is not here")
    if record.name == "sage_hub" and (installed("sageattention") or "0").startswith("1."):
        pytest.skip("sage_hub is made from SageAttention 2.x, here is 1.x")
    return record


def choice(record, inner="eager", **options):
    return attnrewrite.with_backend(record, numerics="quantised", inner=inner, **options)


def gpu(record=None, **sizes):
    dtype = torch.bfloat16 if record is None or "bfloat16" in record.dtypes else torch.float16
    kv_len = 192 if record is not None and is_sage_1(record) else 141  # whole blocks of 64
    return qkv(device="cuda", **{"q_len": 77, "kv_len": kv_len, "dim": 64, "dtype": dtype, **sizes})


def is_sage_1(record):
    return record.requires.get("sageattention") == ">=1.0.6,<2"


def is_built_without_float16(record):
    """FlashAttention 3, as the module that its setup.py writes says."""
    source = record.source
    module = BUILDS[source.repository] if isinstance(source, Hub) else getattr(source, "module", "")
    config = module.removesuffix("_interface") + "_config"
    if not module.endswith("_interface") or importlib.util.find_spec(config) is None:
        return False
    return bool(importlib.import_module(config).CONFIG["build_flags"].get("FLASHATTENTION_DISABLE_FP16"))


def right(record, *tensors, tolerance=None, **arguments):
    with torch.no_grad():
        return check(choice(record), *tensors, tolerance=tolerance or record.tolerance.error, **arguments)


def refused(record, code, *tensors, **arguments):
    run, backend = compiled(lambda *given: attend(*given, **arguments), choice(record))
    with torch.no_grad():
        output = run(*tensors)
    (site,) = backend.report.sites
    assert site.chosen is None
    assert site.refusals[0][1].code is code
    assert relative(output, attend(*map(doubled, tensors), **arguments)) < 1.2e-2


def test_dtypes(record):
    for name in sorted(record.dtypes):
        torch.compiler.reset()
        dtype = getattr(torch, name)
        if name == "float16" and is_built_without_float16(record):
            refused(record, Code.BROKEN, *gpu(record, dtype=dtype))
            continue
        right(record, *gpu(record, dtype=dtype), tolerance=2e-3 if dtype is torch.float32 else None)
    torch.compiler.reset()
    if "float32" not in record.dtypes:
        refused(record, Code.DTYPE, *gpu(record, dtype=torch.float32))


def test_head_dims(record):
    """The limits, one past them, and what real models have; FlashAttention 2 may be built for some widths alone."""
    largest = record.head_dim.max or 256
    for dim in sorted({20, 64, 72, 80, 96, 128, largest}):
        torch.compiler.reset()
        if dim <= largest and (record.head_dim.pad or dim % record.head_dim.multiple == 0):
            print("head_dim", dim)
            right(record, *gpu(record, dim=dim))
    if record.head_dim.max is not None:
        torch.compiler.reset()
        refused(record, Code.HEAD_DIM, *gpu(record, dim=largest + 8))


@pytest.mark.parametrize("lengths", [(1, 64), (128, 128), (1024, 4096), (1, 77), (77, 1), (1013, 1021), (3, 2)])
def test_lengths(record, lengths):
    tensors = gpu(record, q_len=lengths[0], kv_len=lengths[1])
    if (is_sage_1(record) and lengths[1] % 64) or (record.name == "_sage_qk_int8_pv_fp16_cuda" and lengths[1] < 64):
        refused(record, Code.LENGTH, *tensors)
    else:
        right(record, *tensors)


@pytest.mark.parametrize("lengths", [(192, 192), (128, 192), (192, 128), (1013, 1013)])
def test_causal(record, lengths):
    tensors = gpu(record, q_len=lengths[0], kv_len=lengths[1])
    square = lengths[0] == lengths[1]
    if not any(kind.value.startswith("causal") for kind in record.masks):
        refused(record, Code.MASK, *tensors, is_causal=True)
    elif is_sage_1(record) and lengths[1] % 64:
        refused(record, Code.LENGTH, *tensors, is_causal=True)
    elif square or (record.name == "xformers"):
        right(record, *tensors, is_causal=True)
    else:
        refused(record, Code.CAUSAL, *tensors, is_causal=True)


@pytest.mark.parametrize("scale", [0.3, 0.02])
def test_scale(record, scale):
    right(record, *gpu(record), scale=scale)


def test_grouped_heads(record):
    tensors = gpu(record, heads=8, kv_heads=2)
    if record.gqa:
        right(record, *tensors, enable_gqa=True)
    else:
        refused(record, Code.GQA, *tensors, enable_gqa=True)


# The pairs of head_dim and value_dim that FlashAttention 3 takes; in fp8 (64, 128) is wrong in silence.
PAIRS = ((192, 128), (64, 128), (40, 64), (160, 104), (128, 64), (256, 128), (64, 256))


@pytest.mark.parametrize("pair", PAIRS)
def test_value_dim(record, pair):
    dim, value_dim = pair
    tensors = gpu(record, dim=dim, value_dim=value_dim)
    taken = record.value_dim
    if "flash_3" in record.name or record.name.startswith("_flash_varlen_3"):
        taken = pair in ((192, 128), (160, 104)) or (dim <= 64 and record.name != "_flash_3_fp8")
    elif record.name.startswith("flash_4"):
        taken = value_dim <= 128
    if taken:
        right(record, *tensors)
    elif record.head_dim.max is None or dim <= record.head_dim.max:
        refused(record, Code.VALUE_DIM, *tensors)


@pytest.mark.parametrize("padded", [False, True])
def test_batches_above_the_limit_of_a_grid(record, padded):
    batch, kv_len = 65_536, 64 if is_sage_1(record) else 5
    if padded and MaskKind.KEY_PADDING not in record.masks:
        pytest.skip("takes no padding: tests/test_decisions.py")
    tensors = gpu(record, batch=batch, heads=2, q_len=3, kv_len=kv_len, dim=64)
    mask = [torch.arange(kv_len, device="cuda") < torch.randint(1, kv_len + 1, (batch, 1, 1, 1), device="cuda")]
    if record.max_batch is None:
        right(record, *tensors, *(mask if padded else []))
    else:
        refused(record, Code.BATCH, *tensors, *(mask if padded else []))


@pytest.mark.parametrize("window", [(100, 100), (100, 0), (0, 50), (None, 60), (60, None)])
def test_windows(record, window):
    tensors = gpu(record, q_len=500, kv_len=500)
    run, backend = compiled(windowed(*window), choice(record))
    with torch.no_grad():
        assert relative(run(*tensors), windowed(*window)(*map(doubled, tensors))) < record.tolerance.error
    (site,) = backend.report.sites
    if MaskKind.SLIDING_WINDOW in record.masks and site.chosen is None:
        assert "lacks sliding windows" in site.refusals[0][1].detail  # FlashAttention 3 from PyPI
    else:
        takes = {MaskKind.SLIDING_WINDOW, MaskKind.BOOLEAN} & record.masks
        assert site.chosen == (record.name if takes else None)


def test_gradients_of_windows(record):
    if not record.backward or MaskKind.SLIDING_WINDOW not in record.masks:
        pytest.skip("refused: tests/test_decisions.py")
    exact = [tensor.double().requires_grad_() for tensor in gpu(record, q_len=500, kv_len=500)]
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    run, backend = compiled(windowed(100, 3), choice(record))
    run(*tensors).square().sum().backward()
    windowed(100, 3)(*exact).square().sum().backward()
    assert backend.report.sites[0].chosen == record.name
    assert all(relative(one.grad, other.grad) < 3e-2 for one, other in zip(tensors, exact, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_of_zero_or_less(record, scale):
    """Most kernels give NaN: what is refused is computed by PyTorch, here in float64."""
    tensors = gpu(record)
    backend = attnrewrite.with_backend(record, "_native_math", numerics="quantised", inner="eager")
    run, _ = compiled(lambda *given: attend(*given, scale=scale), backend)
    with torch.no_grad():
        output = run(*tensors)
    assert relative(output, attend(*map(doubled, tensors), scale=scale)) < 1.2e-2
    assert backend.report.sites[0].refusals[0][1].code is Code.SCALE


def test_on_another_device(record):
    """Triton and CuTe launch on the current device, which need not be that of the tensors."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = [tensor.to("cuda:1") for tensor in gpu(record)]
    with torch.cuda.device(0):
        right(record, *tensors)


def layouts():
    def fused(batch, q_len, kv_len, heads, dim, dtype):
        return [
            x.transpose(1, 2) for x in torch.randn(batch, q_len, 3, heads, dim, dtype=dtype, device="cuda").unbind(2)
        ]

    def bhsd(batch, q_len, kv_len, heads, dim, dtype):
        return [torch.randn(batch, heads, size, dim, dtype=dtype, device="cuda") for size in (q_len, kv_len, kv_len)]

    def sliced(*sizes):
        *lead, dim, dtype = sizes
        return [tensor[..., :dim] for tensor in bhsd(*lead, dim + 8, dtype)]

    def sbhd(batch, q_len, kv_len, heads, dim, dtype):
        shapes = [(size, batch, heads, dim) for size in (q_len, kv_len, kv_len)]
        return [torch.randn(*shape, dtype=dtype, device="cuda").permute(1, 2, 0, 3) for shape in shapes]

    return {"fused qkv": fused, "heads first": bhsd, "cut out": sliced, "length first": sbhd}


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_layouts(record, layout, inner):
    tensors = layouts()[layout](2, 192, 192, 3, 64, gpu(record)[0].dtype)
    with torch.no_grad():
        check(choice(record, inner), *tensors, tolerance=record.tolerance.error)


def padding(batch, kv_len):
    """Keys anywhere: a hole, the left side cut off, and in the last batch none at all."""
    mask = torch.rand(batch, kv_len, device="cuda") > 0.3
    mask[0, :5] = False
    mask[-1] = False
    return mask[:, None, None]


@pytest.mark.parametrize("kv_len", [141, 1021])
def test_key_padding(record, kv_len):
    if not record.masks & {MaskKind.KEY_PADDING, MaskKind.BOOLEAN}:
        refused(record, Code.MASK, *gpu(record), torch.rand(2, 1, 1, gpu(record)[1].shape[2], device="cuda") > 0.3)
        return
    tensors = gpu(record, batch=3, kv_len=kv_len)
    mask = padding(3, kv_len)
    with torch.no_grad():
        run, backend = compiled(attend, choice(record))
        output = run(*tensors, mask)
    reference = attend(*(tensor.double().cpu() for tensor in tensors), mask.cpu()).cuda()
    assert backend.report.sites[0].chosen == record.name
    assert reference[-1].abs().max() == 0
    assert relative(output, reference) < record.tolerance.error


def test_key_padding_of_one_long_sequence(record):
    """Inductor's code for F.pad of a sum over 8,193 to 16,384 numbers is wrong (2.11): packing must not need it."""
    if not record.masks & {MaskKind.KEY_PADDING, MaskKind.BOOLEAN}:
        pytest.skip("takes no padding: tests/test_decisions.py")
    tensors = gpu(record, batch=1, heads=2, kv_len=16384)
    mask = (torch.arange(16384, device="cuda") < 15000)[None, None, None]
    run, backend = compiled(attend, choice(record, "inductor"))
    with torch.no_grad():
        output = run(*tensors, mask)
    assert backend.report.sites[0].chosen == record.name
    assert relative(output, attend(*map(doubled, tensors), mask)) < record.tolerance.error


@pytest.mark.parametrize("shape", [(2, 4, 77, 141), (2, 1, 77, 141), (77, 141)])
def test_dense_masks(record, shape):
    boolean = torch.rand(*shape, device="cuda") > 0.3
    bias = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    for kind, mask in ((MaskKind.BOOLEAN, boolean), (MaskKind.ADDITIVE, bias)):
        torch.compiler.reset()
        if kind in record.masks:
            right(record, *gpu(record), mask)
        else:
            refused(record, Code.MASK, *gpu(record, kv_len=141), mask)


@pytest.mark.parametrize("case", ["plain", "scale", "padded", "causal", "grouped", "key padding", "strided"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_gradients(record, case, inner):
    if not record.backward:
        pytest.skip(f"{record.name} has no backward: refused with GRAD, tests/test_decisions.py")
    if (case == "key padding" and not record.masks & {MaskKind.KEY_PADDING, MaskKind.BOOLEAN}) or (
        case == "grouped" and record.name == "xformers"
    ):
        pytest.skip("refused: tests/test_decisions.py")
    kv_heads, dim = 2 if case == "grouped" else 8, 60 if case == "padded" else 64
    tensors = gpu(record, q_len=128, kv_len=128, heads=8, kv_heads=kv_heads, dim=dim)
    if case == "strided":
        tensors = layouts()["fused qkv"](2, 128, 128, 4, 64, torch.bfloat16)
    mask = [torch.rand(2, 1, 1, 128, device="cuda") > 0.3] if case == "key padding" else []
    scale = 0.3 if case == "scale" else None
    arguments = {"is_causal": case == "causal", "enable_gqa": case == "grouped", "scale": scale}
    exact = [tensor.double().detach().requires_grad_() for tensor in tensors]
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    run, backend = compiled(lambda *given: attend(*given, **arguments), choice(record, inner))
    run(*tensors, *mask).square().sum().backward()
    attend(*exact, *mask, **arguments).square().sum().backward()
    assert backend.report.sites[0].chosen == record.name
    for one, other in zip(tensors, exact, strict=True):
        assert relative(one.grad, other.grad) < 3e-2


def test_compiled_is_eager_to_the_bit(record):
    """fullgraph under Inductor, against the same op called from the graph as it is."""
    tensors = gpu(record)
    with torch.no_grad():
        eager = compiled(attend, choice(record))[0](*tensors)
        torch.compiler.reset()
        inductor = compiled(attend, choice(record, "inductor"))[0](*tensors)
    if record.name == "_flash_3_fp8":  # Inductor fuses the casts to fp8: other roundings
        assert relative(inductor, eager) < record.tolerance.error
    else:
        assert torch.equal(inductor, eager)


def test_on_a_side_stream(record):
    """The current stream is kept waiting by a long product before, and whoever reads the output waits for it."""
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    given = gpu(record, q_len=1024, kv_len=1024)
    run, _ = compiled(attend, choice(record, "inductor"))
    with torch.no_grad():
        run(*given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        tensors = [torch.zeros_like(tensor) for tensor in given]
        for _ in range(20):
            big = big @ big.clamp(-0.01, 0.01)
        for tensor, true in zip(tensors, given, strict=True):
            tensor.copy_(true)
        output = run(*tensors).clone()
        for tensor in tensors:
            tensor.zero_()
    stream.synchronize()
    assert relative(output, attend(*map(doubled, given))) < record.tolerance.error


@pytest.mark.parametrize("padded", [False, True])
def test_cuda_graphs(record, padded):
    """mode="reduce-overhead" replays with new inputs and other keys in use; what cannot be captured is refused."""
    if padded and not record.masks & {MaskKind.KEY_PADDING, MaskKind.BOOLEAN}:
        pytest.skip("takes no padding: tests/test_decisions.py")
    layer = torch.nn.Linear(64, 64, device="cuda", dtype=gpu(record)[0].dtype)

    def step(query, key, value, *mask):
        return layer(attend(layer(query), key, value, *mask).unflatten(-1, (4, 64)))

    run, backend = compiled(step, choice(record, "inductor"), mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            tensors = gpu(record)
            mask = [torch.rand(2, 1, 1, tensors[1].shape[2], device="cuda") > 0.3] if padded else []
            output = run(*tensors, *mask).clone()
            reference = step(*tensors, *mask)
            assert relative(output, reference) < 2 * record.tolerance.error
    (site,) = backend.report.sites
    assert site.chosen == (record.name if record.capturable else None)
    assert record.capturable or site.refusals[0][1].code is Code.CAPTURE


def test_inputs_are_left_alone(record):
    tensors = gpu(record)
    copies = [tensor.clone() for tensor in tensors]
    right(record, *tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_capture_is_refused_where_it_would_be_wrong(record):
    """By hand, without Inductor's partitions: an error that says so, where the library would replay stale results."""
    if "sage" not in record.name or "triton" in record.name or is_sage_1(record):
        pytest.skip("can be captured: test_cuda_graphs")
    run, _ = compiled(attend, choice(record))
    tensors = gpu(record)
    with torch.no_grad():
        run(*tensors)
        with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            run(*tensors)
    torch.cuda.synchronize()


def test_dynamic_lengths(record):
    run = torch.compile(attend, backend=(backend := choice(record, "inductor")), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (96, 160, 224, 352):
            tensors = gpu(record, q_len=length, kv_len=length + 160)
            assert relative(run(*tensors), attend(*map(doubled, tensors))) < record.tolerance.error
    assert {site.chosen for site in backend.report.sites} == {record.name}
    assert len(backend.report.graphs) == 1


@pytest.mark.filterwarnings("ignore:.*test_.*:UserWarning")
def test_opcheck(record):
    """PyTorch's own checks of the op, on the real kernel: schema, fake, strides, autograd."""
    if record.source is None:
        pytest.skip("an aten operator")
    seen = []

    backend = choice(record, recorded(seen))
    for grad in (False, True) if record.backward else (False,):
        torch.compiler.reset()
        tensors = gpu(record, q_len=128, kv_len=128)
        if grad:
            tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.set_grad_enabled(grad):
            torch.compile(attend, backend=backend, fullgraph=True)(*tensors)
    assert len(seen) == (2 if record.backward else 1)
    for target, args, kwargs in seen:
        if args[0].dtype is torch.float8_e4m3fn:
            continue  # PyTorch's schema check multiplies tensors, which fp8 cannot
        torch.library.opcheck(target, args, kwargs, rtol=record.tolerance.error, atol=record.tolerance.error)
