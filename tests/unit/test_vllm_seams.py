"""The contract with vLLM (tests/seams) holds for the vLLM that is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from seams import contract, derived
from seams.vllm_seams import SEAMS


@pytest.fixture(scope="module")
def source():
    return contract.beside_ours(Path(find_spec("vllm").origin).parent.parent)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_contract_holds_for_the_installed_vllm(source, check):
    assert check(source) == []


def test_the_contract_covers_what_our_code_takes_from_vllm(source):
    ours = {str(c).split(":")[1] for m in derived.modules(contract.PACKAGE) for c in derived.classes(source, m)}
    assert {"VisualAttentionConnector", "StepMarks", "RoleAttention", "RoleAttentionBackend"} <= ours
    imported = {module for m in derived.modules(contract.PACKAGE) for _, module, _ in derived.imports(source, m)}
    assert "vllm.v1.engine.input_processor" in imported  # imported inside a function
    assert len({seam.where for seam in SEAMS}) > 70


def test_a_folder_without_vllm_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        contract.beside_ours(tmp_path)
