"""The classes of numerics: who must ask for them, and what reports say of a kernel that does more than round."""

from dataclasses import replace

import pytest
import torch
from parity import attend, qkv

import attnrewrite
from attnrewrite import Code, Numerics, Tolerance, with_backend

FLASH = attnrewrite.records_of("_native_flash")[1]  # for the CPU
COARSE, POOLED = (
    replace(FLASH, name=name, numerics=numerics, tolerance=Tolerance(4e-2, "what its tests allow"))
    for name, numerics in (("coarse", Numerics.QUANTISED), ("pooled", Numerics.SPARSE))
)


@pytest.mark.parametrize(
    ("numerics", "expected"),
    [("exact", None), ("reordered", None), ("quantised", "coarse"), ("sparse", "pooled"), (Numerics.SPARSE, "pooled")],
)
def test_quantised_and_sparse_kernels_need_a_word(numerics, expected):
    backend = with_backend(POOLED, COARSE, numerics=numerics, inner="eager")
    torch.compile(attend, backend=backend)(*qkv())
    (site,) = backend.report.sites
    assert site.chosen == expected
    words = {"coarse": "quantised", "pooled": "sparse"}
    for name, refused in site.refusals:
        assert refused.code is Code.NUMERICS
        assert refused.fix == f'Pass numerics="{words[name]}" if that is acceptable'
    assert {name for name, _ in site.refusals} == words.keys() - (
        {"coarse", "pooled"} if expected == "pooled" else {expected}
    )


def test_a_word_allows_a_kernel_and_does_not_choose_it():
    backend = with_backend("auto", POOLED, numerics="sparse", inner="eager")
    torch.compile(attend, backend=backend)(*qkv())
    assert [site.chosen for site in backend.report.sites] == ["native"]


@pytest.mark.parametrize("record", [COARSE, POOLED], ids=str)
def test_reports_name_the_class_and_the_error_of_a_kernel_that_does_more_than_round(record):
    word = record.numerics.word
    backend = with_backend(record, numerics=word, inner="eager")
    torch.compile(attend, backend=backend)(*qkv())
    said = f"{record}: {word}, error 4.0e-02 stated, not measured"
    assert said in str(backend.report)
    assert said in str(attnrewrite.Report.from_json(backend.report.to_json()))
    plain = with_backend("_native_flash", numerics=word, inner="eager")
    torch.compile(attend, backend=plain)(*qkv())
    assert plain.report.sites[0].chosen == "_native_flash"
    assert "error" not in str(plain.report)


def test_the_entry_point_takes_the_word():
    run = torch.compile(
        attend, backend="attnrewrite", options={"attention": POOLED, "numerics": "sparse", "inner": "eager"}
    )
    run(*qkv())


def test_the_message_names_every_class():
    with pytest.raises(
        ValueError, match="numerics is 'fast': it is one of 'exact', 'reordered', 'quantised', 'sparse'"
    ):
        with_backend("native", numerics="fast")
