"""Sums over single visual tokens against naive means over the whole map; borders of images."""

import numpy as np
import pytest
import torch

from verl_avar.evaluation.heatmap import Places, border
from verl_avar.evaluation.visual_tokens import VisualTokens
from verl_avar.families.cells import grid, tiles
from verl_avar.roles import Role, query_mask
from verl_avar.vas import EPS

LAYERS, HEADS, VISUAL, SYSTEM = 3, 2, 40, 1  # SYSTEM: the column of its mass
SINK, LARGE = 7, 20  # take 30 % and 8 % of the visual mass; an even part is 2.5 %


@pytest.fixture
def batch():
    """Roles [B, T], attention [L, B, H, T, V], masses [L, B, H, T, 2] and reach [L, B, T] of two padded rows."""
    torch.manual_seed(0)
    row = [Role.SYSTEM] * 4 + [Role.VISUAL] * VISUAL + [Role.USER] * 5 + [Role.OTHER] * 2 + [Role.RESPONSE] * 9
    roles = torch.zeros(2, len(row) + 3, dtype=torch.uint8)
    roles[0, 3:] = torch.tensor(row, dtype=torch.uint8)
    roles[1, 5:] = torch.tensor(row[:-2], dtype=torch.uint8)
    attention = torch.rand(LAYERS, 2, HEADS, roles.shape[1], VISUAL)
    attention[..., [SINK, LARGE]] = 0.0
    attention *= 0.62 / attention.sum(-1, keepdim=True)
    attention[..., SINK], attention[..., LARGE] = 0.3, 0.08
    attention *= 0.5 * torch.rand(LAYERS, 2, HEADS, roles.shape[1], 1)
    mass = torch.stack([attention.sum(-1), 0.01 + 0.5 * torch.rand(attention.shape[:-1])], dim=-1)
    reach = torch.rand(LAYERS, 2, roles.shape[1]) < 0.7
    reach[2, 1] = False  # a layer without a VAS
    return roles, attention, mass, reach


def summed(batch, blocks: int, **options) -> VisualTokens:
    """The callback fed as a probe does: layer by layer, row by row, in blocks of the asked queries."""
    roles, attention, mass, reach = batch
    tokens = VisualTokens(roles, ("user", "response"), SYSTEM, lambda layer: reach[layer], **options)
    asked = query_mask(roles, "user+response")
    for layer in range(LAYERS):
        for b in range(2):
            for rows in asked[b].nonzero().flatten().split(blocks):
                tokens(layer, b, rows, attention[layer, b][:, rows], mass[layer, b][:, rows])
    return tokens


@pytest.mark.parametrize("blocks", [100, 4])
@pytest.mark.parametrize("scope", ["user", "response"])
@pytest.mark.parametrize("b", [0, 1])
def test_shares_are_means_over_the_whole_map(batch, blocks, scope, b):
    roles, attention, mass, reach = batch
    asked = query_mask(roles, scope)[b]
    weights, system = attention[:, b][:, :, asked].double(), mass[:, b][:, :, asked, SYSTEM].double()
    seen = reach[:, b][:, asked]
    ratio = weights / (system[..., None] + EPS)
    averaged = weights.mean(1) / (system.mean(1)[..., None] + EPS)
    found = summed(batch, blocks).shares(b, scope)
    layers = [layer for layer in range(LAYERS) if seen[layer].any()]
    assert len(layers) == (2 if b else 3)
    expected = {
        "mass": weights.mean((0, 1, 2)),
        "vas": torch.stack([ratio[layer][:, seen[layer]].mean((0, 1)) for layer in layers]).mean(0),
        "head_mean": torch.stack([averaged[layer][seen[layer]].mean(0) for layer in layers]).mean(0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-5, atol=1e-8)
    dropped = np.arange(VISUAL) < 10
    assert found.without(dropped)["visual"] == pytest.approx(float(expected["mass"][10:].sum()), rel=1e-5)


def test_a_sink_takes_more_than_its_share_and_than_five_even_parts(batch):
    tokens = summed(batch, 100)
    for b in (0, 1):
        assert np.flatnonzero(tokens.sinks(b, 0.05)).tolist() == [SINK]  # five even parts are 12.5 %
        assert np.flatnonzero(tokens.sinks(b, 0.29)).tolist() == [SINK]
        assert not tokens.sinks(b, 0.31).any()


@pytest.mark.parametrize("blocks", [100, 4])
def test_steps_follow_the_response_token_by_token(batch, blocks):
    roles, attention, *_ = batch
    tokens = summed(batch, blocks, follow=[1])
    asked = query_mask(roles, "response")[1]
    expected = attention[:, 1][:, :, asked].mean((0, 1))
    assert expected.shape == (7, VISUAL)
    np.testing.assert_allclose(tokens.steps(1), expected.numpy(), rtol=1e-5)


def on_border(boxes: list[np.ndarray], images=None) -> np.ndarray | None:
    boxes = np.concatenate(boxes)
    return border(Places(boxes, np.zeros(len(boxes), int) if images is None else images))


def frame(rows: int, columns: int) -> np.ndarray:
    found = np.ones((rows, columns), dtype=bool)
    found[1:-1, 1:-1] = False
    return found.ravel()


def test_the_border_is_the_outer_cells_of_every_view():
    """SmolVLM's tiles and whole view: 27 patches of 14 px see 378 of 384 px, so the views end at different places."""
    covered = 378 / 384
    found = on_border(tiles(2, 2, 9, covered=covered) + tiles(1, 1, 9, covered=covered))
    whole = frame(9, 9)
    tiled = frame(18, 18).reshape(2, 9, 2, 9).transpose(0, 2, 1, 3).ravel()
    assert found.tolist() == [*tiled, *whole]


def test_every_image_has_its_border_and_a_token_without_a_place_has_none():
    nowhere = np.full((1, 4), np.nan)
    images = np.repeat([0, 1, 1], [80, 120, 1])
    found = on_border([grid(8, 10), grid(12, 10), nowhere], images)
    assert found.tolist() == [*frame(8, 10), *frame(12, 10), False]


def test_a_border_that_is_most_of_the_image_is_none():
    assert on_border([grid(6, 6)]) is None and on_border([grid(7, 7)]) is not None
    assert border(Places(None, None, "not known")) is None
