"""The contract with vLLM (tests/seams) holds for the first and the last release of the range that we accept.

Their wheels are downloaded (about 280 MB each) and read, not run: `verl_avar/rollout/README.md` says what was run.
"""

import pytest
from seams import contract
from seams.wheels import python_files

from verl_avar.rollout.plugin import TESTED


@pytest.fixture(scope="module", params=TESTED)
def source(request, tmp_path_factory):
    return contract.beside_ours(python_files(f"vllm=={request.param}", tmp_path_factory.mktemp("vllm")))


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_contract_holds_for_the_ends_of_the_range(source, check):
    assert check(source) == []


def test_a_release_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"vllm==0\.0\.99"):
        python_files("vllm==0.0.99", tmp_path)
