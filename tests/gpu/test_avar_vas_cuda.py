"""`avar vas` on a GPU: the figures of the CPU, and those of bfloat16 near them. Skipped without a CUDA device."""

import json

import pytest

from verl_avar.cli import main
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval

pytestmark = pytest.mark.gpu


def user_scope(out, data, *options) -> dict:
    command = ["vas", "--model", str(base_path()), "--data", str(data), "--scope", "user", "--out", str(out), *options]
    assert main(command) == 0
    return json.loads((out / "vas.json").read_text(encoding="utf-8"))["scopes"]["user"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_figures_are_those_of_the_cpu(tmp_path, dtype, tolerance):
    data = write_eval(tmp_path / "eval.parquet", 2, seed=0)
    cpu = user_scope(tmp_path / "cpu", data, "--device", "cpu")
    gpu = user_scope(tmp_path / "gpu", data, "--device", "cuda", "--dtype", dtype, "--batch-size", "3")
    assert gpu["head_mean"] == pytest.approx(cpu["head_mean"], rel=tolerance)
    assert gpu["mass"] == pytest.approx(cpu["mass"], rel=tolerance)
    assert gpu["sinks"]["tokens"] == cpu["sinks"]["tokens"]
