import logging
import sys

import pytest
import torch
import torch._dynamo.guards

from attnrewrite.planning import registry

# pytest >= 9.1 gives its handler to every logger that does not propagate, torch.__trace among them. PyTorch then prints each
# graph and guard of each compilation for that handler, which takes longer than most tests.
logging.getLogger("torch.__trace").propagate = True
# After each compilation Dynamo empties the CPU's caches and runs the guards once, to log their latency: a tenth of a second.
torch._dynamo.guards.profile_guard_manager = lambda *arguments: 0.0


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: recorded results are in bench/results/"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test may live on what another has compiled."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture
def one_rank(tmp_path):
    """A mesh of one process, over gloo."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def plug_in(monkeypatch, tmp_path):
    """Installs a package of one module by hand: a plug-in, which the registry then finds."""

    def install(name, code, target="RECORDS"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[attnrewrite.backends]\n{name} = {name}:{target}\n")

    monkeypatch.syspath_prepend(tmp_path)
    registry.records.cache_clear()
    yield install
    registry.records.cache_clear()


pytest_plugins = ["stand_ins"]
