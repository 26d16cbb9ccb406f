"""The kernels: one file a family, one record a kernel. `RECORDS` is the one list of them; adding a kernel adds a line here."""

from ..records import Backend
from . import flex, native

RECORDS: tuple[Backend, ...] = (*native.RECORDS, *flex.RECORDS)
