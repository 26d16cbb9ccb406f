"""Libraries behind kernels: packages that are broken, and the kernels hub, through the real `kernels` library."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernels_hub import COMMITS, LocalHub
from parity import attend, doubled, qkv, relative
from stand_ins import (
    MODULES,
    RECORDS,
    REPOSITORIES,
    VARIANT,
    local_kernels,
    machine_for,
    name_of,
    repository,
)

import attnrewrite
from attnrewrite import AttentionCompiler, Code, Hub, Package, Report, make_policy, records_of
from attnrewrite.commands.support import info
from attnrewrite.kernels import sources
from attnrewrite.kernels.sources import SourceError, library, load
from attnrewrite.planning.usable import usable

HUB = [record for record in RECORDS if isinstance(record.source, Hub)]
TENSORS = {"q_len": 7, "kv_len": 64, "dim": 64, "dtype": torch.bfloat16}  # whole blocks of keys, for SageAttention


def run(backend):
    """The site of one attention, which must be right whoever computed it."""
    tensors = qkv(**TENSORS)
    with torch.no_grad():
        output = torch.compile(attend, backend=backend, fullgraph=True)(*tensors)
    assert relative(output, attend(*map(doubled, tensors))) < 1.2e-2
    (site,) = backend.report.sites
    return site


def choices(record, *others, **options):
    """A record first, then others, on the record's machine."""
    policy = make_policy([record, *others], numerics="quantised", **options)
    return AttentionCompiler(policy, "eager", machine_for(record))


def refusal(source, trust=False):
    with pytest.raises(SourceError) as caught:
        load(source, trust)
    return caught.value.refused


# -- packages


BROKEN = {
    "import error": (
        "raise ImportError('/x/_C.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')",
        "undefined symbol: _ZN3c10",
    ),
    "no library": ("import ctypes; ctypes.CDLL('libcudart.so.99')", "OSError: libcudart.so.99"),
    "anything": ("raise RuntimeError('built for CUDA 11\\nsee the docs')", "RuntimeError: built for CUDA 11"),
}


@pytest.fixture(params=BROKEN)
def broken(request, stand_ins, monkeypatch, tmp_path):
    """A flash-attn that is installed and does not import; the words of the import."""
    code, words = BROKEN[request.param]
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text(code)
    about = tmp_path / "flash_attn-2.8.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return words


def test_a_broken_package_is_a_refusal(broken):
    (record,) = records_of("flash")
    site = run(choices(record, "xformers"))
    ((name, refused),) = site.refusals
    assert (name, refused.code, site.chosen) == ("flash", Code.BROKEN, "xformers")
    assert refused.detail.startswith("flash-attn 2.8.3 does not import: ")
    assert broken in refused.detail
    assert "\n" not in refused.detail


@pytest.mark.parametrize(
    ("name", "flag"),
    [("sage", "SM90_ENABLED"), ("_sage_qk_int8_pv_fp8_cuda_sm90", "SM90_ENABLED"),
     ("_sage_qk_int8_pv_fp8_cuda", "SM89_ENABLED"), ("_sage_qk_int8_pv_fp16_cuda", "SM80_ENABLED"), ("sage_varlen", None)],
)  # fmt: skip
def test_a_build_without_this_kernel_is_a_refusal(stand_ins, monkeypatch, name, flag):
    """SageAttention imports what its build has, in silence, and asserts when it is called (seen on an H200)."""
    import sageattention

    record = records_of(name)[0]
    flags = dict.fromkeys(("SM80_ENABLED", "SM89_ENABLED", "SM90_ENABLED"), True)
    monkeypatch.setattr(sageattention, "core", SimpleNamespace(**flags), raising=False)
    assert run(choices(record)).chosen == name
    assert usable(name, replace(machine_for(record), here=True))[0] is None
    torch.compiler.reset()
    flags = {known: known != flag for known in flags} if flag else dict.fromkeys(flags, False)
    monkeypatch.setattr(sageattention, "core", SimpleNamespace(**flags))
    site = run(choices(record, "native"))
    if flag is None:  # a Triton kernel: needs no extension
        assert site.chosen == name
        return
    assert (site.chosen, site.refusals[0][1].code) == ("native", Code.BROKEN)
    assert f"its core.{flag} is False" in site.refusals[0][1].detail
    assert usable(name, replace(machine_for(record), here=True))[0] == site.refusals[0][1]


def test_info_survives_a_broken_package(broken):
    (record,) = records_of("flash")
    refused, _ = usable("flash", replace(machine_for(record), here=True))
    assert (refused.code, broken in refused.detail) == (Code.BROKEN, True)


def test_a_broken_package_under_strict(broken):
    (record,) = records_of("flash")
    with pytest.raises(Exception, match=r"BROKEN: flash-attn 2\.8\.3 does not import"):
        run(choices(record, strict=True))


def test_a_broken_kernels_library_is_a_refusal(stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # `import kernels` raises
    (record,) = records_of("_flash_3_hub")
    site = run(choices(record, "native"))
    assert site.refusals[0][1].code is Code.BROKEN
    assert "kernels 0.17" in site.refusals[0][1].detail


def test_nothing_is_loaded_before_a_plan_chooses_it(stand_ins):
    """Not by naming it, nor by `explain`, nor by `info` where it could not run."""
    before = set(sys.modules)
    for record in RECORDS:
        attnrewrite.with_backend(record.name, numerics="quantised")
        with torch.no_grad():
            report = attnrewrite.explain(attend, *qkv(**TENSORS), backend=choices(record), machine=machine_for(record))
        (site,) = report.sites
        assert site.chosen == record.name
        assert site.source is None
    info("0")
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not loaded & set(MODULES)
    assert sources._LIBRARIES == {}


def test_another_version_than_a_program_was_made_with(stand_ins):
    assert load(Package("flash-attn", "flash_attn")) == "flash-attn 2.8.3"
    with pytest.raises(SourceError) as caught:
        library("flash-attn 2.7.0")
    refused = caught.value.refused
    assert (refused.code, refused.detail) == (
        Code.VERSION, "this program was made with flash-attn 2.7.0, this machine has flash-attn 2.8.3",
    )  # fmt: skip
    with pytest.raises(SourceError, match="no registered kernel comes from flash-attention-9"):
        library("flash-attention-9 1.0")


# -- the kernels hub


@pytest.fixture
def hub(monkeypatch, tmp_path, stand_ins):
    """A hub on this machine with the repositories of all records, and an empty cache. No local folder is named."""
    import huggingface_hub.utils._http as http
    import kernels.importer
    from huggingface_hub import constants

    for record in HUB:
        name = record.source.repository
        if not (tmp_path / "hub" / name).exists():
            repository(tmp_path / "hub" / name, name, REPOSITORIES[name])
    monkeypatch.delenv("LOCAL_KERNELS")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # between tries
    monkeypatch.setattr(kernels.importer, "_loaded_kernels", {})
    with LocalHub(tmp_path / "hub") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        served.cache = tmp_path / "cache"
        served.offline = lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield served


FLASH_3 = Hub("kernels-community/flash-attn3", version=1)
RECORD = records_of("_flash_3_hub")[0]


def cached(hub):
    """What the hub's cache holds of FlashAttention 3."""
    folder = hub.cache / "kernels--kernels-community--flash-attn3"
    return sorted(path.relative_to(hub.cache).as_posix() for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("record", HUB, ids=name_of)
def test_a_trusted_publisher(hub, record):
    """Downloaded when the plan chooses it, at the version that the record names; its commit is in the plan and the report."""
    hub.trusted.add(record.source.repository.split("/")[0])
    backend = choices(record)
    site = run(backend)
    assert (site.chosen, site.source) == (record.name, f"{record.source.repository}@{COMMITS[record.source.version]}")
    assert f"{record.name}: from {site.source}" in " ".join(str(backend.report).split())
    assert Report.from_json(backend.report.to_json()).sites[0].source == site.source


def test_the_publisher_is_asked_about_first(hub):
    """One that the hub does not vouch for: nothing is downloaded, the next choice takes the site."""
    site = run(choices(RECORD, "xformers"))
    ((_, refused),) = site.refusals
    assert (site.chosen, refused.code) == ("xformers", Code.UNTRUSTED)
    assert "not from a trusted publisher" in refused.detail
    assert "trust_remote_code=True" in refused.fix
    assert "ATTNREWRITE_TRUST_REMOTE_CODE=1" in refused.fix
    assert cached(hub) == []
    assert not any("resolve" in request for request in hub.asked)


@pytest.mark.parametrize("value", ["1", "true", "0", ""])
def test_trust_by_environment(hub, monkeypatch, value):
    monkeypatch.setenv("ATTNREWRITE_TRUST_REMOTE_CODE", value)
    assert run(choices(RECORD, "native")).chosen == ("_flash_3_hub" if value in ("1", "true") else "native")


def test_trust_by_argument(hub):
    assert run(choices(RECORD, trust_remote_code=True)).chosen == "_flash_3_hub"
    assert not any("organizations" in request for request in hub.asked)


def test_a_pinned_revision(hub):
    (record,) = records_of(f"_flash_3_hub@{COMMITS[3]}")
    site = run(choices(record, trust_remote_code=True))
    assert site.source == f"kernels-community/flash-attn3@{COMMITS[3]}"


def test_a_lock_file(hub, monkeypatch, tmp_path):
    from kernels._rust import KernelDependency, KernelLock, KernelLocks, KernelVersion

    locks = KernelLocks(locks={KernelDependency(FLASH_3.repository, KernelVersion.Version(1)): KernelLock(COMMITS[2])})
    (tmp_path / "kernels.lock").write_text(locks.to_json())
    monkeypatch.setenv("ATTNREWRITE_KERNELS_LOCK", str(tmp_path / "kernels.lock"))
    assert load(FLASH_3, trust=True) == f"kernels-community/flash-attn3@{COMMITS[2]}"
    refused = refusal(Hub("kernels-community/flash-attn2", 3), trust=True)
    assert "is not locked" in refused.detail


def test_a_version_that_does_not_exist(hub):
    refused = refusal(Hub("kernels-community/flash-attn3", 9), trust=True)
    assert (refused.code, "Version 9 not found" in refused.detail) == (Code.MISSING, True)


def test_a_download_that_breaks_off_falls_to_the_next_choice(hub):
    """And a second try, once the network is back, completes it."""
    hub.broken.add("__init__.py")
    site = run(choices(RECORD, "xformers", trust_remote_code=True))
    assert site.chosen == "xformers"
    assert site.refusals[0][1].code is Code.MISSING
    assert "kernels-community/flash-attn3@v1 does not load" in site.refusals[0][1].detail
    hub.broken.clear()
    torch.compiler.reset()
    assert run(choices(RECORD, "xformers", trust_remote_code=True)).chosen == "_flash_3_hub"


def test_a_part_of_a_download_is_not_taken_for_the_whole_offline(hub):
    hub.broken.add("__init__.py")
    refusal(FLASH_3, trust=True)
    hub.offline()
    for source in (FLASH_3, replace(FLASH_3, revision=COMMITS[1])):
        assert refusal(source, trust=True).code is Code.MISSING


@pytest.mark.parametrize("repository", [FLASH_3.repository, "someone/else"])
def test_a_load_that_fails_deletes_nothing(hub, monkeypatch, repository):
    """The cache is every program's: another one, of this repository too, may be downloading at the same time."""
    import kernels

    folder = hub.cache / f"kernels--{repository.replace('/', '--')}" / "snapshots" / COMMITS[2]

    def fails(*_, **__):
        folder.mkdir(parents=True)
        (folder / "kernel.so").write_text("what another program has just downloaded")
        raise ConnectionError("connection reset")

    monkeypatch.setattr(kernels, "get_kernel", fails)
    assert "connection reset" in refusal(FLASH_3, trust=True).detail
    assert (folder / "kernel.so").exists()


def test_offline(hub):
    """Not in the cache: what to download, and how. In the cache: loaded, and nobody is asked."""
    hub.offline()
    refused = refusal(FLASH_3)
    assert refused.code is Code.MISSING
    assert "kernels-community/flash-attn3@v1 does not load" in refused.detail
    assert "kernels.install_kernel('kernels-community/flash-attn3', revision='v1')" in refused.fix
    assert "LOCAL_KERNELS=kernels-community/flash-attn3=<folder>" in refused.fix
    assert hub.asked == []


def test_offline_from_the_cache(hub):
    """What the remedy says works: downloaded once, then loaded without asking anybody."""
    command = refusal(Hub("kernels-community/flash-attn3", 9), trust=True).fix.split('"')[1].replace("v9", "v1")
    exec(command.replace("')", "', trust_remote_code=True)"))
    hub.offline()
    hub.asked.clear()
    assert load(FLASH_3) == f"kernels-community/flash-attn3@{COMMITS[1]}"
    assert hub.asked == []


def test_no_network(hub, monkeypatch):
    """The hub does not answer, and nobody said that it would not: as offline, whether or not the publisher is trusted."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    for trust in (False, True):
        refused = refusal(FLASH_3, trust)
        assert refused.code is Code.MISSING
        assert "install_kernel('kernels-community/flash-attn3', revision='v1')" in refused.fix
        assert "HF_HUB_OFFLINE=1" in refused.fix


def test_a_local_folder(hub, monkeypatch, tmp_path):
    """Needs neither trust nor a network."""
    hub.offline()
    names = {"kernels-community/flash-attn3": "flash_attn_interface"}
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels(tmp_path / "local", names))
    site = run(choices(RECORD))
    assert (site.chosen, site.source) == ("_flash_3_hub", "kernels-community/flash-attn3@local:flash_attn3_local")


def test_a_kernel_that_does_not_import(hub):
    path = hub.folder / FLASH_3.repository / f"build/{VARIANT}/__init__.py"
    for code, words in (
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "division by zero"),
    ):
        path.write_text(code)
        refused = refusal(FLASH_3, trust=True)
        assert (refused.code, words in refused.detail) == (Code.BROKEN, True)
        shutil.rmtree(hub.cache)  # the download was whole, and stayed


def test_no_build_for_this_machine(hub):
    folder = hub.folder / FLASH_3.repository / "build"
    (folder / VARIANT).rename(folder / "torch210-cxx11-cu128-x86_64-linux")
    refused = refusal(FLASH_3, trust=True)
    assert (refused.code, "Cannot find a build variant" in refused.detail) == (Code.VERSION, True)


def test_a_saved_program_gets_the_revision_it_was_made_with(hub, monkeypatch, tmp_path):
    """In a process that has loaded nothing, the op loads that very commit; any other is refused."""
    monkeypatch.setenv("ATTNREWRITE_TRUST_REMOTE_CODE", "1")
    text = f"kernels-community/flash-attn3@{COMMITS[3]}"
    assert COMMITS[3] in library(text).__file__
    sources._LIBRARIES.clear()
    sources._TEXTS.clear()
    names = {"kernels-community/flash-attn3": "flash_attn_interface"}
    monkeypatch.setenv("LOCAL_KERNELS", local_kernels(tmp_path / "local", names))
    with pytest.raises(SourceError) as caught:
        library(text)
    refused = caught.value.refused
    assert refused.code is Code.VERSION
    assert refused.detail == (
        f"this program was made with {text}, this machine has kernels-community/flash-attn3@local:flash_attn3_local"
    )


def test_the_hub_is_asked_once_a_process(hub):
    """Another graph, and another backend object, run what is loaded; one that trusts nobody asks for itself."""
    assert run(choices(RECORD, trust_remote_code=True)).chosen == "_flash_3_hub"
    hub.asked.clear()
    torch.compiler.reset()
    assert run(choices(RECORD, trust_remote_code=True)).chosen == "_flash_3_hub"
    assert hub.asked == []
    torch.compiler.reset()
    assert run(choices(RECORD, "native")).chosen == "native"


def test_plan_and_program_agree_on_the_revision(hub):
    """The text in the plan is the argument of the op in the graph."""
    seen = []

    def inner(graph_module, example_inputs):
        seen.extend(node.kwargs.get("source") for node in graph_module.graph.nodes if "attnrewrite" in str(node.target))
        return graph_module.forward

    policy = make_policy([RECORD], trust_remote_code=True)
    site = run(AttentionCompiler(policy, inner, machine_for(RECORD)))
    assert seen == [site.source] == [f"kernels-community/flash-attn3@{COMMITS[1]}"]
