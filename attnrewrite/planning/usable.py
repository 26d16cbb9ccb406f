"""Whether a kernel can run on a machine at all."""

from __future__ import annotations

from ..kernels.calls import AttentionCall, Mask, MaskKind
from ..kernels.decisions import Refused
from ..kernels.machines import Machine
from ..kernels.records import Backend, Numerics
from ..kernels.sources import Package, SourceError, load
from .planner import lacking
from .policies import Candidate
from .reasons import decide
from .registry import records_of


def usable(name: str, machine: Machine) -> tuple[Refused | None, Backend]:
    """Why the kernel cannot run a plain call on the machine, None if it can; and its record for the machine. Loads the kernel's
    package, but not for a machine that a user describes."""
    record = Candidate(name, records_of(name)).on(machine)
    call = probe_call(record, machine.device)
    decision = decide(record, call, machine, max(Numerics))
    if isinstance(decision, Refused):
        return decision, record
    if isinstance(record.source, Package) and machine.here:
        try:
            return lacking(record, load(record.source), call, machine), record
        except SourceError as error:
            return error.refused, record
    return None, record


def probe_call(record: Backend, device: str) -> AttentionCall:
    """A plain call that only the machine can rule out: the record takes its dtype, head_dim and mask."""
    usual = ("bfloat16", "float16", "float32", "float64")
    dtype = next((each for each in usual if each in record.dtypes), min(record.dtypes))
    rule = record.head_dim
    size = max(min(64, rule.max or 64), rule.minimum)
    size -= size % rule.multiple if size > rule.multiple else 0
    kind = next(kind for kind in MaskKind if kind in record.masks)
    mask = Mask(kind)
    if mask.is_tensor:
        mask = Mask(kind, dtype if kind is MaskKind.ADDITIVE else "bool", (1, 1, 1, 128))
    length = min(128, record.max_length or 128)
    return AttentionCall("", 2, 1, 1, length, length, size, size, dtype, device, mask)
