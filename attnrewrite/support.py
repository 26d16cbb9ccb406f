"""The support matrix, generated from the records: `python -m attnrewrite kernels` prints docs/kernels.md."""

from __future__ import annotations

from .calls import MaskKind
from .records import Backend
from .registry import names, records_of

HEADER = """# Kernels

Generated from the records by `python -m attnrewrite kernels`; do not edit. A call that a kernel does not take is refused
with one of the codes of `attnrewrite.Code`, and the next choice is asked.

| kernel | device | dtypes | head_dim | masks | GQA | value_dim | dropout | backward | numerics | needs |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def matrix() -> str:
    """The table as Markdown, a row for each record."""
    rows = [_row(record) for name in names() for record in records_of(name)]
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
        record.numerics.name.lower(),
        ", ".join(f"{package} {version}" for package, version in record.requires.items()) or "PyTorch",
    )


def _device(record: Backend) -> str:
    text = ", ".join(sorted(record.devices))
    if record.capability:
        (first, last) = record.capability
        text += f" {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return text


def _head_dim(record: Backend) -> str:
    rule = record.head_dim
    parts = [f"from {rule.minimum}"] if rule.minimum > 1 else []
    parts += [f"to {rule.max}"] if rule.max else []
    if rule.multiple > 1:
        parts.append("padded to multiples of" if rule.pad else "multiples of")
        parts[-1] += f" {rule.multiple}"
    return ", ".join(parts) or "any"
