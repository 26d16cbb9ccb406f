"""The texts of `attnrewrite table` (the support matrix of all kernels) and `attnrewrite info` (the kernels usable here)."""

from __future__ import annotations

import torch

from ..kernels.calls import MaskKind
from ..kernels.decisions import Code, Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend
from ..kernels.sources import Hub
from ..planning.registry import names, records_of
from ..planning.this_machine import machine_of
from ..planning.usable import usable

HEADER = """# Attention backends

Generated from the records by `python -m attnrewrite table`; do not edit. A kernel refuses a call that it does not take with one
of the codes of `attnrewrite.Code`, and the next choice is tried.

* *causal*: SDPA's `is_causal`, aligned to the upper left.
* *causal lower-right*: FlashAttention's alignment. Kernels with this alignment only take `is_causal` where q_len == kv_len.
* *key padding*: a mask that is the same for every head and query: a boolean tensor of such a shape, or a boolean or additive
  mask that the graph computes that way. A kernel that takes key padding also takes padding of queries and keys.
* *boolean*, *additive*: any such tensor, also one that is known to be of another kind: the kernel gets the model's own tensor.
* *error*: the relative error that the parity tests of `tests/backends/` allow in half precision.
* *tested*: the machine on which these tests passed. "stand-in": a function with the library's signature that computes the
  reference, so that only the mapping of arguments is tested. "interpreter": the kernel itself, run on a CPU
  (docs/xla-and-npu.md). "as a package": the package that the hub's build is made from, served from a local folder, instead of
  the hub's build.

| backend | device | dtypes | head_dim | masks | GQA | value_dim | dropout | backward | numerics | error | needs | tested |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def matrix() -> str:
    """Returns the support matrix as Markdown, one row for each record."""
    rows = [_row(record) for name in names() for record in records_of(name)]
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows) + _options()


OPTIONS = """
## Options

Part of a kernel's name, in any order: `name[option=number,...]`, as a choice, in a rule, in a plan, as a candidate of `tune`.

| backend | option | without it | least | most | what it is | tried by `tune` |
|---|---|---|---|---|---|---|
"""


def _options() -> str:
    """The table of options; "" if no kernel has any."""
    rows: dict[str, None] = {}  # in order, each once
    for record in (record for name in names() for record in records_of(name)):
        tried = ", ".join(f"`{record.name}[{variant}]`" for variant in record.variants)
        for key, option in record.options.items():
            numbers = " | ".join((option.otherwise, repr(option.minimum), repr(option.maximum)))
            rows[f"| `{record.name}` | `{key}` | {numbers} | {option.summary} | {tried} |\n"] = None
    return OPTIONS + "".join(rows) if rows else ""


def _row(record: Backend) -> tuple[str, ...]:
    yes = {True: "yes", False: "no"}
    return (
        f"`{record.name}`",
        "any" if len(record.devices) > 3 else _device(record),
        "any" if len(record.dtypes) > 4 else ", ".join(sorted(record.dtypes)),
        _head_dim(record),
        ", ".join(kind.value for kind in MaskKind if kind in record.masks and kind is not MaskKind.NONE) or "none",
        yes[record.gqa],
        yes[record.value_dim],
        yes[record.dropout],
        yes[record.backward],
        record.numerics.word,
        f"{record.tolerance.error:g}",
        _needs(record),
        record.tested,
    )


def _needs(record: Backend) -> str:
    packages = [f"{package} {version}" for package, version in record.requires.items()]
    repository = [str(record.source)] if isinstance(record.source, Hub) else []
    return ", ".join(packages + repository) or "PyTorch"


def _device(record: Backend) -> str:
    text = ", ".join(sorted(record.devices))
    if record.capability:
        (first, last) = record.capability
        text += f" {first[0]}.{first[1]}" if first == last else f" {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return text


def _head_dim(record: Backend) -> str:
    rule = record.head_dim
    parts = [f"from {rule.minimum}"] if rule.minimum > 1 else []
    parts += [f"to {rule.max}"] if rule.max else []
    if rule.multiple > 1:
        parts.append("padded to multiples of" if rule.pad else "multiples of")
        parts[-1] += f" {rule.multiple}"
    return ", ".join(parts) or "any"


# For `info`: the devices of `Machine` in words.
DEVICES = {"cuda": "CUDA", "rocm": "an AMD GPU", "npu": "an Ascend NPU", "tpu": "a TPU", "xla": "XLA", "cpu": "a CPU"}


def info(version: str, machine: Machine | None = None) -> str:
    """Returns a line about this machine, and a line for each kernel: usable here, or the reason why not. Imports the
    packages of kernels that could run here; downloads nothing.

    machine: a described machine instead, for which nothing is imported.
    """
    if machine is None:
        machine = machine_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        f"attnrewrite {version} on {machine}" if machine.here else f"attnrewrite {version} for {machine}, as described"
    ]
    width = max(map(len, names()))
    for name in names():
        refused, record = usable(name, machine)
        said = record.summary
        said += "".join(f"; {key}={option}" for key, option in record.options.items())
        if refused is not None:
            said = f"{said}: {_why_not(name, refused, machine)}" if said else _why_not(name, refused, machine)
        elif isinstance(record.source, Hub):
            said += f" (loads {record.source} when a plan chooses it)"
        lines.append(f"{name:<{width}}  {'yes' if refused is None else 'no':<3}  {said}")
    return "\n".join(lines + conflicts(machine))


def conflicts(machine: Machine) -> list[str]:
    """What packages of the machine do to each other, with the remedy."""
    installed = machine.packages
    if {"flash-attn-4", "xformers"} <= set(installed) and "flash-attn" not in installed:
        return [
            "flash-attn-4 beside xformers: xformers looks for FlashAttention 2 in the package flash_attn, which is that of "
            "FlashAttention 4, and its import fails; so does that of every model class of diffusers, which imports xformers "
            "where it is installed (flash-attn-4 4.0.0b36, xformers 0.0.35, diffusers 0.42.1). pip uninstall one of the two"
        ]
    return []


def _why_not(name: str, refused: Refused, machine: Machine) -> str:
    if refused.code is not Code.DEVICE:
        return str(refused)
    devices = sorted({device for record in records_of(name) for device in record.devices})
    return (
        f"needs {' or '.join(DEVICES.get(each, each) for each in devices)}; none {'here' if machine.here else 'there'}"
    )
