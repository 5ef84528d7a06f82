"""Options that commands share: devices, number formats, counts and lists of layers."""

import argparse
from pathlib import Path

import pytest
import torch

from verl_avar.evaluation.options import add_shared, count, layer_list, model_path, placement, positive, share


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_shared(parser, data="rows")
    return parser.parse_args(["--model", "a/b", "--data", "rows.parquet", *words])


def test_the_number_format_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement(parsed()) == ("cpu", "float32")
    assert placement(parsed("--dtype", "bfloat16")) == ("cpu", "bfloat16")
    with pytest.raises(ValueError, match="--device cuda:1: torch finds no GPU here"):
        placement(parsed("--device", "cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement(parsed()) == ("cuda", "auto")
    assert placement(parsed("--device", "cpu")) == ("cpu", "float32")


def test_a_folder_is_written_one_way_and_a_name_on_the_hub_stays(tmp_path):
    arguments = parsed()
    assert model_path(arguments) == "a/b"
    arguments.model = f"{tmp_path}/"
    assert Path(model_path(arguments)) == tmp_path and not model_path(arguments).endswith("/")
    for here in (".", "..", ""):
        arguments.model = here
        assert model_path(arguments) == str(Path(here).resolve())  # results are named after it


def test_layer_lists():
    assert layer_list("0,4,8-11") == [0, 4, 8, 9, 10, 11]
    for text in ("a-b", "", "4-", "-4", "5-3", "1,,2"):
        with pytest.raises(argparse.ArgumentTypeError, match="no list of layers"):
            layer_list(text)


def test_counts_and_shares():
    assert (positive("3"), count("0"), share("0.05")) == (3, 0, 0.05)
    for read, text in ((positive, "0"), (positive, "-1"), (count, "-1"), (count, "x"), (share, "1"), (share, "x")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(text)
