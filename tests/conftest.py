"""Shared by all tests: the environment of a machine without a GPU and without network, and the GPU marker."""

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


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
