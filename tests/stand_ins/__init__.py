"""Modules with the signatures, the checks and the memory order of real libraries that compute the reference: what CI runs a
kernel of another package on. A wrong mapping of arguments fails; what the real kernel does is tested on a GPU."""

import json
import sys
from pathlib import Path

import pytest
from decision_specs import PACKAGES

import attnrewrite
from attnrewrite import AttentionCompiler, Machine, make_policy
from attnrewrite.kernels import sources
from attnrewrite.planning import registry, this_machine

HERE = Path(__file__).parent
MODULES = (
    "flash_attn",
    "flash_attn_interface",
    "fa3_fwd_interface",
    "sageattention",
    "xformers",
    "torch_npu",
    "torch_xla",
    "comfy_kitchen",
    "spas_sage_attn",
    "reference_attention",
    "cutlass",
)
# What a repository of the kernels hub is made from.
REPOSITORIES = {
    "kernels-community/flash-attn2": "flash_attn",
    "kernels-community/flash-attn3": "flash_attn_interface",
    "kernels-community/flash-attn4": "flash_attn.cute",
    "kernels-community/aiter-flash-attn-ck": "flash_attn",
    "SageAttention/sage-attention": "sageattention",
    "SageAttention/sage-blackwell": "sageattention",
}

# Sparse kernels have a test of their own: they take self attention alone, and are wrong on data without structure.
RECORDS = [
    record
    for record in registry.records()
    if record.source is not None and record.numerics is not attnrewrite.Numerics.SPARSE
]
# One record for each function that lands in a graph: hub and other builds of a library share theirs.
KERNELS = list({record.op: record for record in reversed(RECORDS)}.values())[::-1]


def name_of(record):
    return (
        f"{record.name} of {next(iter(record.requires.items()))}"
        if len(registry.records_of(record.name)) > 1
        else record.name
    )


def is_sage_1(record):
    return record.requires.get("sageattention") == ">=1.0.6,<2"


def fewest_keys(record):
    """SageAttention 1.x takes whole blocks of 64 keys, its CUDA kernel with float16 values one at least, SpargeAttn 128."""
    if record.name.startswith("sparge"):
        return 128
    return 64 if is_sage_1(record) or record.name == "_sage_qk_int8_pv_fp16_cuda" else 1


def machine_for(record):
    """A machine that has everything the record needs, and no other record of its name."""
    others = {package for other in registry.records_of(record.name) for package in other.requires} - set(
        record.requires
    )
    packages = {name: version for name, version in PACKAGES.items() if name not in others}
    if is_sage_1(record):
        packages["sageattention"] = "1.0.6"
    if "cuda" not in record.devices:
        return Machine(min(record.devices), packages=packages)
    return Machine("cuda", record.capability[1] if record.name == "sage_blackwell_hub" else (9, 0), packages)


def compiler(record, inner="eager", **options):
    """The torch.compile backend for a record, as on its machine: it runs on CPU tensors."""
    options = {"numerics": "sparse", **options}
    return AttentionCompiler(make_policy([record], **options), inner, machine_for(record))


VARIANT = "torch-universal"  # a build that is Python alone, for any PyTorch


def repository(folder, name, module):
    """A kernel repository of one variant that holds the names of an importable module."""
    variant = folder / "build" / VARIANT
    variant.mkdir(parents=True)
    ident = name.rpartition("/")[2].replace("-", "_") + "_local"
    about = {"id": ident, "name": ident.replace("_", "-"), "version": 1, "license": "BSD-3-Clause",
             "python-depends": [], "backend": {"type": "cpu"}}  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(about))
    (variant / "__init__.py").write_text(
        f"import {module} as _module\nglobals().update({{k: getattr(_module, k) for k in dir(_module) if k[:2] != '__'}})\n"
    )


def local_kernels(folder, repositories=REPOSITORIES):
    """Writes repositories into a folder; the value of LOCAL_KERNELS that names them."""
    for name, module in repositories.items():
        repository(folder / name.rpartition("/")[2], name, module)
    return ":".join(f"{name}={folder / name.rpartition('/')[2]}" for name in repositories)


def forget():
    """As in a process that has loaded none of these libraries."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sources._LIBRARIES.clear()
    sources._TEXTS.clear()
    this_machine._read.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Puts all stand-ins where Python and the kernels library find them; `stand_ins(record)` puts those for a record."""
    forget()
    monkeypatch.syspath_prepend(HERE / "site")
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels(tmp_path))

    def install(record):
        if is_sage_1(record):
            monkeypatch.syspath_prepend(HERE / "sage_1")
        return record

    yield install
    forget()
