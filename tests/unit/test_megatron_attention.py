"""Masses and AGTO inside megatron-core's GPTModel, on 1 and 2 ranks, against full attention maps in transformers."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import megatron_ranks as tiny
import pytest
import torch

from verl_avar.attention import reference
from verl_avar.attention.mass import MASS_ROLES
from verl_avar.objective import agto_loss
from verl_avar.reward import token_scores
from verl_avar.roles import Role, query_mask

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core (setup.py, extra dev)")
OUTPUTS = ("visual_ratio", "visual_share", "visual_mass", "system_mass", "visual_vas")
RUNS = [(world, name) for world in (1, 2) for name in tiny.CASES if (world, name) != (1, "sequence parallel")]


@pytest.fixture(scope="module")
def oracle():
    """Loss, masses and gradients by full maps, with every layer or the last one in the objective."""
    model, batch = tiny.build_oracle(), tiny.build_batch()
    queries = query_mask(batch["roles"], "response")

    def response_loss(losses):
        answers = query_mask(batch["roles"], "response")
        return (losses * answers).sum() / (batch["roles"] == Role.RESPONSE).sum()

    def run(layers, language_loss=tiny.language_loss):
        model.zero_grad()
        output = model(batch["ids"], output_attentions=True)
        masses = (
            torch.stack([reference.role_mass(a, batch["roles"], MASS_ROLES) for a in output.attentions])
            * queries[None, :, None, :, None]
        )
        losses = torch.nn.functional.cross_entropy(output.logits.transpose(1, 2), batch["labels"], reduction="none")
        language = language_loss(losses)
        visual, system = masses[layers].unbind(-1)
        loss = language + agto_loss(visual, system, batch["roles"], tiny.ALPHA, tiny.BETA)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return SimpleNamespace(
            loss=loss.item(), language=language.item(), masses=masses[layers].detach(), gradients=gradients
        )

    both = list(range(tiny.SIZES["layers"]))
    return SimpleNamespace(
        state=model.state_dict(),
        batch=batch,
        every=run(both),
        last=run(both[-1:]),
        response=run(both, response_loss),
    )


@pytest.fixture(scope="module")
def results(oracle, tmp_path_factory):
    """What each rank computed: {world: [rank 0's cases, …]}."""
    folder = tmp_path_factory.mktemp("megatron")
    torch.save({"state": oracle.state, "batch": oracle.batch}, folder / "given.pt")
    script = Path(tiny.__file__)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    found = {}
    for world in (1, 2):
        ranks = [
            subprocess.Popen(
                [sys.executable, script, str(rank), str(world), str(folder)],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            errors = [process.communicate(timeout=120)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        for process, error in zip(ranks, errors, strict=True):
            assert process.returncode == 0, error[-3000:]
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def engines(results):
    """What the engine returned on each of two ranks."""
    return [rank["engine"] for rank in results[2]]


def expected(oracle, name):
    return oracle.last if name == "last layer" else oracle.every


@pytest.mark.parametrize(("world", "name"), RUNS)
def test_masses_are_those_of_the_full_maps(oracle, results, world, name):
    heads = [rank[name]["masses"] for rank in results[world]]
    wanted = expected(oracle, name).masses
    assert all(part.shape[2] == tiny.SIZES["heads"] // world for part in heads)
    torch.testing.assert_close(torch.cat(heads, dim=2), wanted, atol=1e-6, rtol=1e-4)
    assert wanted.std() > 0.01  # heads and queries differ


@pytest.mark.parametrize(("world", "name"), RUNS)
def test_loss_and_gradients_are_those_of_the_full_maps(oracle, results, world, name):
    wanted = expected(oracle, name)
    assert wanted.loss - wanted.language != pytest.approx(0, abs=0.1)
    for rank, cases in enumerate(results[world]):
        assert cases[name]["loss"] == pytest.approx(wanted.loss, abs=1e-5)
        gradients = tiny.shard(wanted.gradients, rank, world)
        assert gradients.keys() == cases[name]["gradients"].keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(cases[name]["gradients"][key], gradient, atol=2e-6, rtol=1e-4, msg=key)


def test_an_objective_on_one_layer_records_that_layer_alone(results):
    assert results[2][0]["last layer"]["layers"] == [tiny.SIZES["layers"] - 1]


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_engine_adds_the_objective_to_verls_loss(oracle, engines, rows):
    """Two micro-batches of one sample; verl's SFT loss is a mean over the response's tokens."""
    for rank, passes in enumerate(engines):
        got = passes[rows]
        assert got["loss"] == pytest.approx(oracle.response.loss, abs=1e-5)
        objective = oracle.response.loss - oracle.response.language
        assert got["metrics"]["agto/loss"] == pytest.approx(objective, abs=1e-5)
        for key, gradient in tiny.shard(oracle.response.gradients, rank, 2).items():
            torch.testing.assert_close(got["gradients"][key], gradient, atol=2e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_engines_scores_are_those_of_all_heads(oracle, engines, rows):
    wanted = token_scores(*oracle.every.masses.unbind(-1))
    for passes in engines:
        for name, score in zip(OUTPUTS, wanted, strict=True):
            for got, row, length in zip(passes[rows]["scores"][name], score, tiny.LENGTHS, strict=True):
                torch.testing.assert_close(got, row[:length], atol=1e-5, rtol=1e-4, msg=name)
        queries = query_mask(oracle.batch["roles"], "response")
        mean = passes[rows]["metrics"]["attention/visual_mass"]
        assert mean == pytest.approx(wanted[2][queries].mean().item(), rel=1e-4)
