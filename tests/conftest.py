import pytest
import torch


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


pytest_plugins = ["stand_ins"]
