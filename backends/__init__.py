"""The kernels: one file for each family, with its `RECORDS`. A new file in this folder needs no further registration. Imports
`kernels`, `graphs` and the folders below them."""

from importlib import import_module
from pkgutil import iter_modules

from ..kernels.records import Backend

# The order of families in `names()`, in `info` and for ties in `tune`. Families that are not named here come last.
ORDER = (
    "native", "native_varlen", "native_folded", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sage",
    "comfy_kitchen", "sparge", "xformers", "aiter", "npu", "xla",
)  # fmt: skip

_FAMILIES = sorted(
    (module.name for module in iter_modules(__path__)),
    key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name),
)
RECORDS: tuple[Backend, ...] = tuple(
    record for family in _FAMILIES for record in import_module(f"{__name__}.{family}").RECORDS
)
