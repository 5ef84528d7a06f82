"""Shared by all tests: the environment of a machine without a GPU and without network, the GPU marker, one server for
several modules."""

import os
import sys
from pathlib import Path

# Before torch, Ray, verl or vLLM are imported by any test module.
from verl_avar.training.environment import prepare

prepare(cpu=True)
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "recipes"))  # the runner's modules are files beside the recipes, not a package


@pytest.fixture(scope="session")
def miniature_server(tmp_path_factory):
    """`avar serve` of the shipped miniature, for the modules that ask it. A test that ends it starts it again."""
    from servers import AvarServer

    from verl_avar.miniature import base_path

    flags = ["--kv-cache-memory-bytes", "64M", "--limit-mm-per-prompt", '{"image": 3, "video": 0}']
    with AvarServer(base_path(), tmp_path_factory.mktemp("miniature_server"), *flags) as started:
        yield started.wait()
        assert started.stop() == 0
        assert not started.left_files()


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Those of the shared server one after another, at the end: it is not to run beside tests that measure.
    items.sort(key=lambda item: "miniature_server" in item.fixturenames)
