"""The kernels of PyTorch that a GPU has. CI has none: what these printed on an H200 is in bench/results/."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from parity import TOLERANCE, attend, check, compiled, doubled, qkv, relative, windowed
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrewrite
from attnrewrite import AttentionCall, Code, Mask, MaskKind, decide, machine_of, records_of

pytestmark = [
    pytest.mark.gpu,
    # What can_use_*, Triton and libraries say while they compile.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FUSED = ("_native_flash", "_native_efficient", "_native_cudnn", "flex")
KERNELS = ("native", *FUSED, "_native_math")
MASKED = ("native", "_native_efficient", "_native_cudnn", "flex", "_native_math")


def gpu(dtype=torch.bfloat16, **sizes):
    return qkv(dtype=dtype, device="cuda", **{"q_len": 77, "kv_len": 141, "dim": 64, **sizes})


def boolean(*shape):
    return torch.rand(*shape, device="cuda") > 0.4


MASKS = {
    "dense boolean": lambda dtype: boolean(2, 4, 77, 141),
    "key padding": lambda dtype: boolean(2, 1, 1, 141),
    "one for all": lambda dtype: boolean(77, 141),
    "additive": lambda dtype: torch.randn(2, 4, 77, 141, device="cuda", dtype=dtype),
    "additive, per head": lambda dtype: torch.randn(1, 4, 77, 1, device="cuda", dtype=dtype),
    "additive, aligned": lambda dtype: torch.randn(2, 1, 77, 144, device="cuda", dtype=dtype),
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_plain(kernel, dtype, inner):
    if kernel in ("_native_flash", "_native_cudnn") and dtype is torch.float32:
        pytest.skip("half precision only")
    check(kernel, *gpu(dtype), inner=inner, tolerance=2e-3 if dtype is torch.float32 else None)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernel", MASKED)
def test_masks(kernel, mask, inner):
    tensors = gpu(kv_len=144 if mask == "additive, aligned" else 141)
    check(kernel, *tensors, MASKS[mask](torch.bfloat16), inner=inner)


@pytest.mark.parametrize("kernel", MASKED[1:])
def test_rows_without_a_key_are_zero(kernel):
    """As on the CPU and in PyTorch's math. (`native` is what PyTorch chooses: eager cuDNN gives other values there.)"""
    mask = boolean(2, 1, 77, 141)
    mask[0, :, 5] = False
    inner = "inductor" if kernel == "flex" else "eager"
    run, backend = compiled(attend, kernel, inner)
    query, key, value = gpu()
    output = run(query, key, value, mask)
    reference = attend(query.double(), key.double(), value.double(), mask)
    assert reference[0, 5].abs().max() == 0
    assert backend.report.sites[0].chosen == kernel
    assert relative(output, reference) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("lengths", [(141, 141), (77, 141), (141, 77)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_causal(kernel, lengths):
    query, key, value = gpu(q_len=lengths[0], kv_len=lengths[1])
    if kernel == "_native_flash" and lengths[0] != lengths[1]:
        run, backend = compiled(lambda *given: attend(*given, is_causal=True), kernel)
        run(query, key, value)
        assert backend.report.sites[0].refusals[0][1].code is attnrewrite.Code.CAUSAL
        return
    check(kernel, query, key, value, is_causal=True, inner="inductor" if kernel == "flex" else "eager")


@pytest.mark.parametrize("dim", [20, 40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dims(kernel, dim):
    check(kernel, *gpu(dim=dim), inner="inductor" if kernel == "flex" else "eager")


@pytest.mark.parametrize("kernel", ["native", "_native_efficient", "_native_cudnn", "flex", "_native_math"])
def test_value_dim(kernel):
    check(kernel, *gpu(value_dim=32), inner="inductor" if kernel == "flex" else "eager")


@pytest.mark.parametrize(("dim", "dtype"), [(288, torch.bfloat16), (512, torch.bfloat16), (160, torch.float32)])
def test_heads_too_wide_for_flex(dim, dtype):
    """Inductor finds no tiles for them: "out of resource: shared memory"."""
    run, backend = compiled(attend, "flex", "inductor")
    tensors = gpu(dtype, dim=dim)
    assert relative(run(*tensors), attend(*map(doubled, tensors))) < 1.2e-2
    assert backend.report.sites[0].refusals[0][1].code is Code.HEAD_DIM


# ptxas takes half a minute for head_dim 64, two minutes for 128 and three and a half for 256 (torch 2.11, triton 3.6).
@pytest.mark.parametrize("dim", (64, 128, 256) if os.environ.get("ATTNREWRITE_SLOW") else (64,))
def test_flex_in_float32(dim):
    check("flex", *gpu(torch.float32, dim=dim), inner="inductor", tolerance=2e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scales_of_zero_or_less(kernel, scale, is_causal):
    """cuDNN and FlashAttention give NaN, and so does SDPA where it chooses them: what is swapped is right."""
    choices = dict.fromkeys([kernel, "_native_math"])
    backend = attnrewrite.with_backend(*choices, inner="inductor" if kernel == "flex" else "eager")
    run, _ = compiled(lambda *given: hand_written(*given, scale, is_causal), backend)
    tensors = gpu(q_len=77, kv_len=77)
    with torch.no_grad():
        output = run(*tensors)
    assert relative(output, hand_written(*map(doubled, tensors), scale, is_causal)) < 1.2e-2
    wrong_there = {"native", "_native_flash", "_native_cudnn"}
    assert backend.report.sites[0].chosen == ("_native_math" if kernel in wrong_there else kernel)


def hand_written(query, key, value, scale, is_causal):
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("batch", [65_535, 65_536])
@pytest.mark.parametrize("kernel", [*KERNELS, "_native_varlen", "_native_folded"])
def test_large_batches(kernel, batch):
    """CUDA launches no grid that is wider: a record has the limit, or the kernel is right."""
    tensors = gpu(batch=batch, heads=2, q_len=3, kv_len=5, dim=16)
    run, backend = compiled(attend, kernel, "inductor" if kernel == "flex" else "eager")
    with torch.no_grad():
        assert relative(run(*tensors), attend(*map(doubled, tensors))) < 1.2e-2
    (site,) = backend.report.sites
    limited = (kernel in ("_native_flash", "_native_varlen") and batch > 65_535) or kernel == "flex"  # batch * heads
    limited |= kernel == "_native_folded" and batch == 65_535  # odd
    assert (site.chosen, [why.code for _, why in site.refusals]) == ((None, [Code.BATCH]) if limited else (kernel, []))


FRAMES = {
    "dense": lambda x: [part.contiguous() for part in x.permute(2, 0, 3, 1, 4)],
    "one projection": lambda x: [part.transpose(1, 2) for part in x.unbind(2)],
    "a part of a batch": lambda x: [part[6:].transpose(1, 2) for part in x.unbind(2)],
    "computed": lambda x: [2 * part.transpose(1, 2) + 1 for part in x.unbind(2)],
    "more queries, narrower values": lambda x: [
        part.transpose(1, 2)[..., :length, :width]
        for part, length, width in zip(x.unbind(2), (14, 9, 9), (40, 40, 24), strict=True)
    ],
    "long": lambda x: [part.unflatten(0, (-1, 2)).flatten(1, 2).transpose(1, 2) for part in x.unbind(2)],
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", FRAMES)
def test_frames(layout, dtype, inner):
    """Temporal attention: short sequences in a large batch, as a projection lays them out; causal; any scale."""

    def function(x):
        tensors = FRAMES[layout](x)
        plain = attend(*tensors).transpose(1, 2).flatten(2)
        return plain, attend(*tensors, scale=-0.3), attend(*tensors, is_causal=True)

    x = torch.randn(302, 14, 3, 5, 40, device="cuda", dtype=dtype)[:300]
    run, backend = compiled(function, "_native_folded", inner)
    with torch.no_grad():
        outputs, exact = run(x), function(x.double())
    folded = [(site.chosen, *map(str, site.steps)) for site in backend.report.sites]
    assert all(kernel == "_native_folded" and step.startswith("fold_batch: ") for kernel, step in folded)
    assert len(folded) == 3
    for output, right in zip(outputs, exact, strict=True):
        assert output.dtype == dtype
        assert relative(output, right) < (2e-3 if dtype is torch.float32 else TOLERANCE[dtype])


def test_gradients_of_frames():
    def function(x):
        return attend(*FRAMES["one projection"](x)).transpose(1, 2).flatten(2)

    exact = torch.randn(36, 14, 3, 5, 40, device="cuda", dtype=torch.float64, requires_grad=True)
    x = exact.detach().bfloat16().requires_grad_()
    run, backend = compiled(function, "_native_folded", "inductor")
    run(x).square().sum().backward()
    function(exact).square().sum().backward()
    assert backend.report.sites[0].chosen == "_native_folded"
    assert relative(x.grad, exact.grad) < 3e-2


def test_frames_of_any_batch():
    """The number of sequences in one is a guard: a batch that it does not divide is folded otherwise, or refused."""
    run, backend = compiled(attend, "_native_folded", "inductor")
    for batch in (300, 302, 4096, 77):
        tensors = gpu(batch=batch, q_len=14, kv_len=14, dim=40)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            assert relative(run(*tensors), attend(*map(doubled, tensors))) < 1.2e-2
    folds = [[step.after for step in site.steps] for site in backend.report.sites]
    assert folds == [[56], [28], []]  # 4,096 runs what was compiled for 300
    assert backend.report.sites[-1].refusals[0][1].code is Code.BATCH


SHORT_QUERIES = {
    "a part of a batch": lambda x: [part[4:].transpose(1, 2) for part in x.unflatten(-1, (3, 4, 64)).unbind(2)],
    "one projection": lambda x: [part.unflatten(-1, (4, 64)).transpose(1, 2) for part in x.chunk(3, -1)],
    "transposed": lambda x: [
        part.transpose(1, 2).unflatten(1, (4, 64)).transpose(-1, -2).contiguous().transpose(-1, -2).transpose(-1, -2)
        for part in x.chunk(3, -1)
    ],
    "scaled": lambda x: [2 * part.unflatten(-1, (4, 64)).transpose(1, 2) for part in x.chunk(3, -1)],
}


@pytest.mark.parametrize("layout", SHORT_QUERIES)
@pytest.mark.parametrize("length", [20, 100, 140])
def test_flex_with_short_queries_in_every_layout(layout, length):
    """Inductor's template for queries shorter than 128 loses the storage offset of the query."""

    def function(x):
        return attend(*SHORT_QUERIES[layout](x))

    x = torch.randn(6, length, 3 * 4 * 64, device="cuda", dtype=torch.bfloat16)
    run, backend = compiled(function, "flex", "inductor")
    with torch.no_grad():
        assert relative(run(x), function(x.double())) < 1.2e-2
    assert backend.report.sites[0].chosen == "flex"
    torch.compiler.reset()
    exact, x = x.double().requires_grad_(), x.clone().requires_grad_()
    compiled(function, "flex", "inductor")[0](x).square().sum().backward()
    function(exact).square().sum().backward()
    assert relative(x.grad, exact.grad) < 3e-2


@pytest.mark.parametrize("window", [(100, 100), (100, 0), (0, 50), (None, 60), (60, None)])
@pytest.mark.parametrize("kernel", ["flex", "_native_varlen"])
def test_windows(kernel, window):
    inner = "inductor" if kernel == "flex" else "eager"
    site = check(kernel, *gpu(q_len=500, kv_len=500), function=windowed(*window), inner=inner)
    assert (site.call.mask.kind, site.call.mask.window) == (MaskKind.SLIDING_WINDOW, window)


@pytest.mark.parametrize("kernel", ["flex", "_native_varlen"])
def test_gradients_of_windows(kernel):
    exact = [tensor.double().requires_grad_() for tensor in gpu(q_len=500, kv_len=500)]
    tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    run, backend = compiled(windowed(100, 3), kernel, "inductor" if kernel == "flex" else "eager")
    run(*tensors).square().sum().backward()
    windowed(100, 3)(*exact).square().sum().backward()
    assert backend.report.sites[0].chosen == kernel
    assert all(relative(one.grad, other.grad) < 3e-2 for one, other in zip(tensors, exact, strict=True))


@pytest.mark.parametrize("kernel", ["native", "_native_flash", "_native_cudnn", "flex", "_native_math"])
def test_grouped_heads(kernel):
    check(kernel, *gpu(heads=8, kv_heads=2), inner="inductor" if kernel == "flex" else "eager", enable_gqa=True)


@pytest.mark.parametrize("shape", [(2, 1, 1, 270), (2, 4, 300, 270), (300, 270)])
@pytest.mark.parametrize("kernel", MASKED)
def test_masks_of_several_blocks(kernel, shape):
    inner = "inductor" if kernel == "flex" else "eager"
    mask = boolean(*shape)
    mask[..., 128:256] = False  # a whole block of keys that nobody sees
    check(kernel, *gpu(q_len=300, kv_len=270), mask, inner=inner)


@pytest.mark.parametrize("lengths", [(1, 77), (77, 2), (1013, 1013)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_odd_lengths(kernel, lengths):
    check(kernel, *gpu(q_len=lengths[0], kv_len=lengths[1]), inner="inductor" if kernel == "flex" else "eager")


@pytest.mark.parametrize("kernel", KERNELS)
def test_dynamic_lengths_under_inductor(kernel):
    backend = attnrewrite.with_backend(kernel)
    run = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for length in (64, 96, 130, 300):
        tensors = gpu(q_len=length, kv_len=length + 32)
        mask = [] if kernel == "_native_flash" else [boolean(2, 1, 1, length + 32)]
        assert relative(run(*tensors, *mask), attend(*map(doubled, tensors), *mask)) < TOLERANCE[torch.bfloat16]
    assert {site.chosen for site in backend.report.sites} == {kernel}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel, inner):
    if (kernel, inner) == ("flex", "eager"):
        pytest.skip("unfused flex is PyTorch's debugging path")
    exact = [tensor.double().detach().requires_grad_() for tensor in gpu()]
    tensors = [tensor.bfloat16().detach().requires_grad_() for tensor in exact]
    run, backend = compiled(attend, kernel, inner)
    run(*tensors).square().sum().backward()
    attend(*exact).square().sum().backward()
    assert backend.report.sites[0].chosen == kernel
    for one, other in zip(tensors, exact, strict=True):
        assert relative(one.grad, other.grad) < 3e-2


@pytest.mark.parametrize(
    ("kernel", "choice"),
    [
        ("_native_flash", SDPBackend.FLASH_ATTENTION),
        ("_native_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("_native_cudnn", SDPBackend.CUDNN_ATTENTION),
        ("_native_math", SDPBackend.MATH),
    ],
)
def test_the_same_kernel_as_sdpa_chooses(kernel, choice):
    """The result equals eager SDPA under sdpa_kernel bit for bit, also with a boolean mask."""
    tensors = gpu()
    masks = [[]] if kernel == "_native_flash" else [[], [boolean(2, 1, 77, 141)]]
    for mask in masks:
        torch.compiler.reset()
        with sdpa_kernel(choice):
            expected = attend(*tensors, *mask)
        assert torch.equal(compiled(attend, kernel)[0](*tensors, *mask), expected)


@pytest.mark.parametrize(
    ("kernel", "choice"),
    [
        ("_native_flash", SDPBackend.FLASH_ATTENTION),
        ("_native_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("_native_cudnn", SDPBackend.CUDNN_ATTENTION),
    ],
)
def test_dropout(kernel, choice):
    """With the same seed, the same weights are dropped as by eager SDPA under sdpa_kernel, forward and backward."""

    def grads(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.manual_seed(3)
        output = function(*leaves)
        output.square().sum().backward()
        return [output, *(leaf.grad for leaf in leaves)]

    def dropped(*given):
        return attend(*given, dropout_p=0.25)

    tensors = gpu()
    with sdpa_kernel(choice):
        expected, undropped = grads(dropped), grads(attend)
    run, backend = compiled(dropped, kernel)
    found = grads(run)
    assert backend.report.sites[0].chosen == kernel
    assert relative(found[0], undropped[0]) > 0.1
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_graphs(kernel):
    """mode="reduce-overhead" replays with new inputs."""
    run, _ = compiled(attend, attnrewrite.with_backend(kernel), mode="reduce-overhead")
    for _ in range(4):
        tensors = gpu()
        with torch.no_grad():
            output = run(*tensors).clone()
        assert relative(output, attend(*map(doubled, tensors))) < TOLERANCE[torch.bfloat16]


CAN_USE = {
    "_native_flash": can_use_flash_attention,
    "_native_efficient": can_use_efficient_attention,
    "_native_cudnn": can_use_cudnn_attention,
}


@pytest.mark.parametrize("kernel", CAN_USE)
def test_limits_are_those_of_this_pytorch(kernel):
    """Where a record accepts, so does PyTorch's own check of that kernel; where it refuses and PyTorch accepts, the
    difference is one that is listed here."""
    machine = machine_of(torch.device("cuda", 0))
    record = records_of(kernel)[0]
    wrong = []
    options = itertools.product(
        [torch.bfloat16, torch.float16, torch.float32, torch.float64],
        [16, 64, 128, 136, 192, 256, 264],
        [64, None],
        [(8, 8), (8, 2)],
        ["none", "causal", "boolean"],
        [(64, 64), (64, 96), (1, 1), (7, 1)],
        [False, True],
    )
    for dtype, dim, value_dim, (heads, kv_heads), mask, (q_len, kv_len), grad in options:
        value_dim = value_dim or dim
        query = torch.empty(2, heads, q_len, dim, dtype=dtype, device="cuda", requires_grad=grad)
        key = torch.empty(2, kv_heads, kv_len, dim, dtype=dtype, device="cuda", requires_grad=grad)
        value = torch.empty(2, kv_heads, kv_len, value_dim, dtype=dtype, device="cuda", requires_grad=grad)
        bias = torch.ones(2, 1, q_len, kv_len, dtype=torch.bool, device="cuda") if mask == "boolean" else None
        params = SDPAParams(query, key, value, bias, 0.0, mask == "causal", kv_heads != heads)
        theirs = CAN_USE[kernel](params, False)
        words = {"none": MaskKind.NONE, "causal": MaskKind.CAUSAL_UPPER_LEFT, "boolean": MaskKind.BOOLEAN}
        call = AttentionCall(
            "", 2, heads, kv_heads, q_len, kv_len, dim, value_dim, str(dtype)[6:], "cuda", Mask(words[mask]), needs_grad=grad
        )  # fmt: skip
        decision = decide(record, call, machine)
        ours = isinstance(decision, attnrewrite.Accepted)
        if ours != theirs:
            wrong.append(
                (str(dtype), dim, value_dim, heads, kv_heads, mask, q_len, kv_len, grad, str(decision), theirs)
            )
    accepted_too_much = [row for row in wrong if not row[-1]]
    assert accepted_too_much == [], f"{len(accepted_too_much)}: {accepted_too_much[:12]}"
    refused_too_much = [row for row in wrong if row[-1]]
    print(kernel, "refused though PyTorch would take it:", len(refused_too_much), refused_too_much[:6])
    assert all(row[-2].startswith(("GQA", "HEAD_DIM")) for row in refused_too_much), refused_too_much[:12]


def test_each_gpu_has_its_own_machine():
    machine = machine_of(torch.device("cuda", 0))
    assert machine.capability == torch.cuda.get_device_capability(0)
    assert {"torch", "cuda", "cudnn"} <= set(machine.packages)


def test_float32_model_under_autocast():
    query, key, value = gpu(torch.float32)

    def step(q, k, v):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v)

    run, backend = compiled(step, "_native_cudnn", "inductor")
    assert run(query, key, value).dtype == torch.bfloat16
    assert backend.report.sites[0].chosen == "_native_cudnn"
