"""What diffusers' attention dispatcher (0.42.1) gets wrong or does not run, kernel by kernel: each case here equals SDPA.

The numbers in the names of the cases are those of a run of that dispatcher on exact stand-ins, float32, with the largest
difference that it showed.
"""

from dataclasses import dataclass, field

import pytest
import torch
from parity import TOLERANCE, attend, doubled, qkv, relative, skip_if_fenced
from stand_ins import compiler, fewest_keys

import attnrewrite
from attnrewrite import Code, Numerics, records_of
from attnrewrite.planning.usable import usable

VARLEN = ("_native_varlen", "flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "sage_varlen")


def interior_hole(kv_len):
    """text, padding, image: what Qwen-Image's joint mask looks like; the second sequence is padded on the left."""
    mask = torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
    mask[0, ..., 2:5] = False
    mask[1, ..., :3] = False
    return mask


def structure(q_len, kv_len):
    """Block-diagonal: every query sees some keys, and every key is seen by some query."""
    rows, columns = torch.arange(q_len)[:, None] * kv_len // q_len, torch.arange(kv_len)
    return (rows // 4 == columns // 4)[None, None].expand(2, 1, q_len, kv_len)


@dataclass(frozen=True)
class Case:
    kernels: tuple[str, ...]
    mask: object = None
    arguments: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)
    refused: Code | None = None  # the kernel does not take it; the peer computed something else


CASES = {
    "1 causal without a mask (full attention, 2.66)": Case(("flex",), None, {"is_causal": True}, {"q_len": 11, "kv_len": 11}),
    "1 causal, more keys than queries": Case(("flex",), None, {"is_causal": True}),
    "2 key padding (query rows masked, 1.43)": Case(("flex",), interior_hole(11)),
    "2 a mask of rank 2": Case(("flex",), torch.rand(7, 11) > 0.3),
    "3 boolean mask (added as 1 and 0, 0.60)": Case(("xformers", "_native_cudnn"), structure(7, 11)),
    "3 key padding": Case(("xformers", "_native_cudnn"), interior_hole(11)),
    "4 keys with holes (the first n taken, 1.95)": Case(VARLEN, interior_hole(11)),
    "5 structure (computed without a mask, 2.66)": Case(VARLEN, structure(7, 11), refused=Code.MASK),
    "6 causal (ignored)": Case(("_native_npu",), None, {"is_causal": True}),
    "7 bias (inverted, 2.35)": Case(("_native_npu",), torch.randn(2, 1, 7, 11)),
    "7 bias of a large negative": Case(("_native_npu",), torch.where(interior_hole(11), 0.0, -10000.0).expand(2, 4, 7, 11)),
    "8 scale (ignored, 1.18)": Case(("_native_xla",), None, {"scale": 0.7}),
    "8 scale with a bias": Case(("_native_xla",), torch.randn(2, 1, 7, 11), {"scale": 0.7}),
    "9 rank 3, as many heads as batches (1.71)": Case(
        ("native", "_native_math", "_native_flash", "flex", "xformers"), torch.rand(4, 7, 11) > 0.3, sizes={"batch": 4}
    ),
    "9 rank 2, as many queries as batches (3.2)": Case(
        ("native", "_native_math", "_native_flash", "flex", "xformers"), torch.rand(7, 11) > 0.3, sizes={"batch": 7}
    ),
}  # fmt: skip
PAIRS = [(case, kernel) for case in CASES for kernel in CASES[case].kernels]


def on_this_machine(kernel, device):
    """The backend object: the kernel itself where it runs, else its record on a stand-in."""
    refused, record = usable(kernel, attnrewrite.machine_of(torch.device(device)))
    if device == "cuda" and isinstance(record.source, attnrewrite.Hub):
        pytest.skip(f"{kernel}: the functions of the package, from elsewhere")
    if device == "cuda" and kernel == "_native_flash":
        pytest.skip("takes no mask on CUDA: refused with MASK")
    if refused is None and (record.source is None or device == "cuda"):
        return attnrewrite.with_backend(
            kernel, inner="inductor" if device == "cuda" and kernel == "flex" else "eager", numerics="quantised"
        )
    if device == "cuda" or record.source is None:
        pytest.skip(f"{kernel}: {refused}")
    return compiler(record)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("case", "kernel"), PAIRS)
def test_equals_sdpa(case, kernel, device, request):
    case = CASES[case]
    if device == "cpu":
        request.getfixturevalue("stand_ins")
    backend = on_this_machine(kernel, device)
    dtype = torch.bfloat16 if "bfloat16" in backend.policy.choices[0].records[0].dtypes else torch.float32
    tensors = qkv(dtype=dtype, dim=64, **case.sizes, device=device)
    mask = case.mask
    if mask is not None:
        mask = (mask if mask.dtype is torch.bool else mask.to(dtype)).to(device)
    given = [*tensors] if mask is None else [*tensors, mask]
    with torch.no_grad():
        output = torch.compile(lambda *x: attend(*x, **case.arguments), backend=backend, fullgraph=True, dynamic=False)(
            *given
        )
    (site,) = backend.report.sites
    skip_if_fenced(site)
    reference = attend(*(doubled(tensor).cpu() for tensor in given), **case.arguments).to(device)
    tolerance = max(TOLERANCE[dtype], *(record.tolerance.error for record in records_of(kernel)))
    assert relative(output, reference) < tolerance
    wanted = case.refused
    if device == "cuda" and kernel.startswith("sage"):
        record = backend.policy.choices[0].on(attnrewrite.machine_of(torch.device(device)))
        if site.call.mask.kind not in record.masks:
            wanted = Code.MASK  # SageAttention 1.x is installed, which takes no key padding
    if wanted is None:
        assert site.chosen == kernel, site.refusals
    else:
        assert (site.chosen, site.refusals[0][1].code) == (None, wanted)


@pytest.mark.parametrize(("case", "kernel"), PAIRS)
def test_the_cases_tell_the_fault_from_what_is_right(case, kernel):
    """Without its mask or its argument, each case has another result, by more than any tolerance here."""
    case = CASES[case]
    tensors = qkv(dim=64, **case.sizes)
    mask = None if case.mask is None else case.mask if case.mask.dtype is torch.bool else case.mask.float()
    right = attend(*tensors, mask, **case.arguments)
    assert relative(attend(*tensors), right) > 0.2


def test_10_a_choice_does_not_leak_into_another_model():
    """There, `reset_attention_backend()` leaves the choice of one model active in all others."""
    one, other = (attnrewrite.with_backend(name, inner="eager") for name in ("_native_math", "_native_flash"))
    tensors = qkv()
    torch.compile(attend, backend=one)(*tensors)
    torch.compile(lambda *given: attend(*given), backend=other)(*tensors)
    plain = attend(*tensors)
    assert [site.chosen for site in one.report.sites] == ["_native_math"]
    assert [site.chosen for site in other.report.sites] == ["_native_flash"]
    assert torch.equal(plain, attend(*tensors))


@pytest.mark.parametrize("kernel", ["_native_flash", "flash_varlen", "flash", "flash_4", "xformers"])
def test_11_the_log_sum_exp_is_there(kernel, stand_ins):
    """There, asking for it is an AttributeError; here it is saved for the backward, whose gradients need it."""
    backend = on_this_machine(kernel, "cpu")
    dtype = torch.float32 if kernel == "_native_flash" else torch.bfloat16
    tensors = [tensor.requires_grad_() for tensor in qkv(dtype=dtype, dim=64)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    torch.compile(attend, backend=backend, fullgraph=True)(*tensors).square().sum().backward()
    attend(*exact).square().sum().backward()
    assert backend.report.sites[0].chosen == kernel
    for one, reference in zip(tensors, exact, strict=True):
        assert relative(one.grad, reference.grad) < 3e-2


@pytest.mark.parametrize("kernel", attnrewrite.names())
def test_12_checks_and_fullgraph(kernel, stand_ins):
    """There, its checks break `fullgraph=True` for 21 of 27 kernels; here they are always on."""
    _, record = usable(kernel, attnrewrite.machine_of(torch.device("cpu")))
    on_cpu = {"native", "_native_math", "_native_flash", "flex"}
    if record.source is None and kernel not in on_cpu:
        pytest.skip("an aten operator of CUDA: tests/backends/test_kernels_gpu.py")
    backend = on_this_machine(kernel, "cpu")
    kv_len = max(11, fewest_keys(record))
    q_len = kv_len if record.numerics is Numerics.SPARSE else 7  # those that there are take self attention alone
    tensors = qkv(q_len=q_len, kv_len=kv_len, dtype=torch.bfloat16, dim=64)
    with torch.no_grad():
        output = torch.compile(attend, backend=backend, fullgraph=True)(*tensors)
    assert backend.report.sites[0].chosen == kernel
    tolerance = (
        record.tolerance.error if kernel == "_flash_3_fp8" else TOLERANCE[torch.bfloat16]
    )  # its casts are real ones
    assert relative(output, attend(*map(doubled, tensors))) < tolerance
