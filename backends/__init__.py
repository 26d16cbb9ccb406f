"""The kernels: one file a family, which holds its `RECORDS`. A new file is found by being here. Imports `kernels`, `graphs` and
what is below them."""

from importlib import import_module
from pkgutil import iter_modules

from ..kernels.records import Backend

# The order of the families: that in which `names()` and `info` list them, and in which `tune` breaks ties. Others come behind.
ORDER = (
    "native", "native_varlen", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sage", "xformers",
    "aiter", "npu", "xla",
)  # fmt: skip

_FAMILIES = sorted(
    (module.name for module in iter_modules(__path__)),
    key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name),
)
RECORDS: tuple[Backend, ...] = tuple(
    record for family in _FAMILIES for record in import_module(f"{__name__}.{family}").RECORDS
)
