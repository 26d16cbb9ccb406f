"""The kernels: one file a family, one record a kernel. `RECORDS` is the one list of them; adding a family adds a line here.
Imports `kernels`, `graphs` and what is below them."""

from ..kernels.records import Backend
from . import (
    aiter,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    flex,
    native,
    native_varlen,
    npu,
    sage,
    xformers,
    xla,
)

RECORDS: tuple[Backend, ...] = (
    *native.RECORDS,
    *native_varlen.RECORDS,
    *flex.RECORDS,
    *flash_attention_2.RECORDS,
    *flash_attention_3.RECORDS,
    *flash_attention_4.RECORDS,
    *sage.RECORDS,
    *xformers.RECORDS,
    *aiter.RECORDS,
    *npu.RECORDS,
    *xla.RECORDS,
)
