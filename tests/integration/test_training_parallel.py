"""One mini-batch on two ranks (data parallel, and Ulysses sequence parallel over gloo) against one rank."""

import os

import pytest
import torch
from families import build
from torch import multiprocessing
from training_engines import assert_same, infer, new_engine, one_rank, train_step, transformers_kept, write_samples

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
AGTO = {"alpha": 0.3, "beta": 0.2, "queries": "user+response"}
HALVES = ([0, 2, 4], [1, 3, 5])  # sample 3 has no image
# name: (model, settings of the engine, how the mini-batch is cut); every rank of a Ulysses group has all samples
DATA_PARALLEL = {
    "accumulated": ("qwen2_5_vl", {"packed": True}, {"micro_batch_size": 1}),
    "dynamic": ("qwen2_5_vl", {"packed": True}, {"max_tokens": 150}),
    "checkpointed lora": ("qwen2_5_vl", {"checkpointing": True, "lora_rank": 4}, {"micro_batch_size": 3}),
}
SEQUENCE_PARALLEL = {
    "accumulated": ("qwen2_5_vl", {}, {"micro_batch_size": 1}),
    "dynamic": ("qwen2_5_vl", {}, {"max_tokens": 75}),
    "checkpointed": ("qwen2_5_vl", {"checkpointing": True}, {"micro_batch_size": 3}),
    "selected layers": ("qwen2_5_vl", {"layers": [1]}, {}),
    "nothing measured": ("qwen2_5_vl", {"alpha": 0.0, "beta": 0.0, "masses": "objective"}, {}),
    "qwen2_vl": ("qwen2_vl", {}, {"micro_batch_size": 2}),
    "qwen3_vl": ("qwen3_vl", {}, {"micro_batch_size": 2}),
}


def on_two_ranks(rank, port, folder, rows):
    """What each of the two processes runs; the results go to files."""
    from verl.utils.distributed import initialize_global_process_group

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    initialize_global_process_group()
    results = {}
    for name, (model, settings, cut) in DATA_PARALLEL.items():
        engine = new_engine(folder / model, **AGTO | settings)
        results["dp", name] = train_step(engine, rows, samples=HALVES[rank], **cut)
    for name, (model, settings, cut) in SEQUENCE_PARALLEL.items():
        engine = new_engine(folder / model, packed=True, sequence_parallel=2, **AGTO | settings)
        results["sp", name] = train_step(engine, rows, **cut)
        results["sp infer", name] = {key: value.values() for key, value in infer(engine, rows, **cut).items()}
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("data") / "sft.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from verl_avar.compat import torchvision_ops

    torchvision_ops.apply()
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        build(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder, rows):
    """Results of both ranks."""
    from verl_avar.training.environment import free_port

    multiprocessing.spawn(on_two_ranks, (str(free_port()), folder, rows), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder, rows):
    """Runs a case on one rank, each once."""
    done = {}

    def run(model, **settings):
        key = (model, *sorted(settings.items(), key=str))
        if str(key) not in done:
            engine = new_engine(folder / model, **AGTO | settings)
            scores = {name: value.values() for name, value in infer(engine, rows).items()}
            done[str(key)] = train_step(engine, rows), scores
        return done[str(key)]

    with one_rank(), transformers_kept():
        yield run


@pytest.mark.parametrize("case", DATA_PARALLEL)
def test_two_data_parallel_ranks_give_the_step_of_one(two_ranks, single, case):
    model, settings, _ = DATA_PARALLEL[case]
    settings = {name: value for name, value in settings.items() if name == "lora_rank"}
    first, second = (results["dp", case] for results in two_ranks)
    assert first[1] == second[1]
    assert_same(single(model, **settings)[0], ((first[0] + second[0]) / 2, *first[1:]), tolerance=1e-5)
    torch.testing.assert_close(second[2], first[2], atol=0, rtol=0)


@pytest.mark.parametrize("case", SEQUENCE_PARALLEL)
def test_two_ranks_with_half_of_the_sequence_each_give_the_step_of_one(two_ranks, single, case):
    model, settings, _ = SEQUENCE_PARALLEL[case]
    settings = {name: value for name, value in settings.items() if name != "checkpointing"}
    step, scores = single(model, packed=True, **settings)
    for results in two_ranks:
        assert_same(step, results["sp", case], tolerance=1e-5)
        for name, values in results["sp infer", case].items():
            torch.testing.assert_close(values, scores[name], atol=1e-5, rtol=1e-4)
