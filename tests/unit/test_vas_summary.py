"""vas.json's figures from records made by hand, as a run leaves them."""

import numpy as np
import pandas as pd
import pytest
import torch

from verl_avar.evaluation.vas_summary import RESAMPLES, summarise
from verl_avar.vas import Vas, sample_vas

LAYERS, HEADS = 3, 2


def record(number: int, visual: torch.Tensor, system: torch.Tensor, reach: torch.Tensor, scope="response", **more):
    """A record as measure.py makes it. visual, system: [L, H, n]; reach: bool [L, n]."""
    vas = sample_vas(visual, system, reach)
    masses = {"visual": visual, "system": system, "user": 0.1 * visual, "response": 0.2 * visual}
    return {
        "number": number,
        "scope": scope,
        "layers": list(range(LAYERS)),
        "heads": HEADS,
        "queries": vas.queries,
        "reached": vas.reached.tolist(),
        "vas": vas.ratio.flatten().tolist(),
        "head_mean": vas.head_mean.tolist(),
        "by_query": vas.by_query.tolist(),
        "positions": torch.stack(list(masses.values())).mean((1, 2)).tolist(),
        **{role: mass.mean(-1).flatten().tolist() for role, mass in masses.items()},
        **more,
    }


@pytest.fixture
def samples():
    """Masses and reach of eight samples; in the last layer only some first queries reach the system turn."""
    torch.manual_seed(0)
    made = []
    for n in (3, 5, 9, 4, 12, 7, 3, 6):
        reach = torch.ones(LAYERS, n, dtype=torch.bool)
        reach[-1, torch.randint(n, ()) :] = False
        made.append((0.5 * torch.rand(LAYERS, HEADS, n), 0.1 + 0.4 * torch.rand(LAYERS, HEADS, n), reach))
    return made


def scope_of(table: pd.DataFrame, seed=0) -> dict:
    return summarise(table, classes=False, sink_share=0.05, seed=seed)["scopes"]["response"]


def test_intervals_are_of_the_figure_itself_where_windows_end_early(samples):
    """Quantiles of what `Vas` says of samples drawn again, which weighs each layer by the queries that reach."""
    found = scope_of(pd.DataFrame([record(i, *sample) for i, sample in enumerate(samples)]), seed=3)
    rng, drawn = np.random.default_rng(3), []
    for _ in range(RESAMPLES):
        vas = Vas("response")
        for index in rng.integers(len(samples), size=len(samples)):
            vas.add_sample(sample_vas(*samples[index]))
        drawn.append([vas.summary()["paper"], vas.summary()["head_mean"]])
    expected = np.quantile(drawn, [0.025, 0.975], axis=0).T
    assert found["interval"] == pytest.approx(expected[0].tolist())
    assert found["head_mean_interval"] == pytest.approx(expected[1].tolist())
    whole = Vas("response")
    for sample in samples:
        whole.add_sample(sample_vas(*sample))
    assert found["vas"] == pytest.approx(whole.summary()["paper"])
    assert found["interval"][0] < found["vas"] < found["interval"][1]


def test_one_sample_has_no_interval(samples):
    found = scope_of(pd.DataFrame([record(0, *samples[0])]))
    assert found["interval"] is None and found["head_mean_interval"] is None and found["vas"] > 0


def test_a_sample_without_vas_counts_for_masses_only(samples):
    records = [record(i, *sample) for i, sample in enumerate(samples[:3])]
    records[1] |= {"vas": None, "head_mean": None, "by_query": None}
    found, without = scope_of(pd.DataFrame(records)), scope_of(pd.DataFrame([records[0], records[2]]))
    assert (found["samples"], found["skipped"]) == (2, 1)
    assert found["vas"] == pytest.approx(without["vas"]) and found["mass"]["visual"] != without["mass"]["visual"]
    queries, visual = (np.array([r[name] for r in records]) for name in ("queries", "visual"))
    assert found["mass"]["visual"] == pytest.approx(np.average(visual.mean(1), weights=queries))


def constant(number: int, course: list[float], **more) -> dict:
    """A sample whose visual mass runs along the response as given; the system's is 0.1."""
    visual = torch.tensor(course, dtype=torch.float64).expand(LAYERS, HEADS, -1)
    reach = torch.ones(LAYERS, len(course), dtype=torch.bool)
    return record(number, visual, torch.full_like(visual, 0.1), reach, **more)


def test_positions_are_means_over_the_samples_that_are_that_long():
    table = pd.DataFrame([constant(0, [0.2, 0.4]), constant(1, [0.4, 0.6, 0.8])])
    found = summarise(table, classes=False, sink_share=0.05)["positions"]
    assert found["position"] == [0, 1, 2] and found["n"] == [2, 2, 1]
    assert found["visual"] == pytest.approx([0.3, 0.5, 0.8]) and found["system"] == pytest.approx([0.1] * 3)
    assert found["head_mean"] == pytest.approx([3, 5, 8], rel=1e-4)


def test_decay_is_of_quarters_and_its_slope_of_long_responses():
    short = constant(0, [0.9] * 7)  # too short for quarters
    eight = constant(1, [0.8, 0.6] + [0.5] * 4 + [0.2, 0.4])
    long = constant(2, (0.5 - 0.002 * np.arange(100)).tolist())
    found = summarise(pd.DataFrame([short, eight]), classes=False, sink_share=0.05)["decay"]
    assert found == {"first": pytest.approx(0.7), "last": pytest.approx(0.3), "slope_per_100": None}
    found = summarise(pd.DataFrame([short, long]), classes=False, sink_share=0.05)["decay"]
    assert found["first"] == pytest.approx(0.5 - 0.002 * 12) and found["last"] == pytest.approx(0.5 - 0.002 * 87)
    assert found["slope_per_100"] == pytest.approx(-0.2)
    assert summarise(pd.DataFrame([short]), classes=False, sink_share=0.05)["decay"] is None


def test_sinks_are_means_by_queries_and_borders_over_the_samples_that_have_one():
    sinks = {"sink_tokens": 2, "sink_share": 0.5, "sink_free_vas": 1.0, "sink_free_head_mean": 2.0}
    borders = {"border_share": 0.2, "border_free_vas": 3.0, "border_free_head_mean": 4.0, "border_free_visual": 0.1}
    one = constant(0, [0.2] * 2, **sinks, sink_free_visual=0.1, **borders)
    other = constant(1, [0.2] * 6, **sinks | {"sink_tokens": 0, "sink_share": 0.1}, sink_free_visual=0.2)
    found = scope_of(pd.DataFrame([one, other]))["sinks"]
    assert found["tokens"] == pytest.approx(2 * 2 / 8) and found["mass_share"] == pytest.approx((2 * 0.5 + 6 * 0.1) / 8)
    assert found["border_share"] == pytest.approx(0.2) and found["no_border_vas"] == pytest.approx(3.0)
    assert (found["share"], found["vas"], found["visual"]) == (0.05, pytest.approx(1.0), pytest.approx(1.4 / 8))
