"""Rows of `avar vas` that fail and come again, and rows without a response."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from verl_avar.evaluation import vas_run
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.rows import read_rows
from verl_avar.evaluation.vas_run import Settings, measure_rows, measured
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval


@pytest.fixture
def rows(tmp_path):
    return read_rows(write_eval(tmp_path / "eval.parquet", 1, seed=0))


def test_a_row_that_failed_and_comes_again_takes_no_other_out_of_the_results(tmp_path, rows, monkeypatch):
    broken = {rows[0].id, rows[2].id}

    def batch(checkpoint, rows, settings, follow):
        if any(row.id in broken for row in rows):
            raise RuntimeError("out of memory")
        yield from ([{"id": row.id, "scope": "user"}] for row in rows)

    monkeypatch.setattr(vas_run, "_batch", batch)
    checkpoint = SimpleNamespace(model=torch.nn.Module())
    outcome = measure_rows(checkpoint, rows, Settings(), tmp_path / "parts", batch_size=2)
    assert [failed["row"] for failed in outcome.failed] == [rows[0].id, rows[2].id]
    assert measured(tmp_path / "parts") == {1, 3}
    broken.clear()
    assert not measure_rows(checkpoint, rows, Settings(), tmp_path / "parts", batch_size=2).failed
    assert measured(tmp_path / "parts") == {0, 1, 2, 3}


def test_a_row_with_an_empty_response_is_measured_in_the_user_scope(tmp_path, rows):
    rows[0].response = ""
    checkpoint = load_checkpoint(base_path())
    outcome = measure_rows(checkpoint, rows[:1], Settings(), tmp_path / "parts", pictures=1)
    assert not outcome.failed
    (part,) = (tmp_path / "parts").iterdir()
    table = pd.read_parquet(part)
    assert table["scope"].tolist() == ["user"] and table["response_tokens"].tolist() == [0] and "steps" not in table
