"""Where a response looks in its images: attention to each visual token, by sentence of the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from PIL import Image

from verl_avar import families
from verl_avar.evaluation.answer import Answers, answer, given
from verl_avar.evaluation.checkpoint import Checkpoint, conversation
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.measure import measure
from verl_avar.report import HeatmapSample
from verl_avar.roles import Role

WIDEST = 4096  # pixels of several images side by side
FINEST = 64  # cells along a side of a picture's grid, at most


@dataclass(frozen=True)
class Places:
    """Where the visual tokens of a sequence lie: boxes [V, 4] (left, top, right, bottom as fractions of the image; NaN
    for a token without a place) and the image [V] of each. `boxes` is None where the family's geometry is not known.
    """

    boxes: np.ndarray | None
    image: np.ndarray | None
    problem: str | None = None

    @property
    def known(self) -> bool:
        return self.boxes is not None


def places(checkpoint: Checkpoint, answers: Answers, b: int, images: Sequence[Sequence[Image.Image]]) -> Places:
    """Places of the visual tokens of one row of a batch. images: of every row, opened."""
    first = sum(len(row) for row in images[:b])
    own = {"input_ids": answers.inputs["input_ids"][b : b + 1].cpu()}
    for name, value in answers.inputs.items():
        if name in ("image_grid_thw", "pixel_values"):  # one for each image, of all rows
            own[name] = value[first : first + len(images[b])].cpu()
        elif name in ("batch_num_images", "aspect_ratio_mask"):
            own[name] = value[b : b + 1].cpu()
    try:
        boxes, image = families.cells(checkpoint.model.config, checkpoint.processor, own, images[b])
    except ValueError as error:
        return Places(None, None, str(error))
    return Places(np.asarray(boxes, dtype=float), np.asarray(image))


def border(place: Places) -> np.ndarray | None:
    """Visual tokens on the border of their image: bool [V], those with a side within half their own size of it.

    The views of an image (tiles, and the whole once more) need not reach equally far, so equal sides are not asked for.
    None where places are not known, or where the border is most of the image (grids of less than about 7 × 7).
    """
    if not place.known:
        return None
    edge = np.zeros(len(place.boxes), dtype=bool)
    for image in np.unique(place.image):
        boxes = place.boxes[place.image == image]
        half = np.tile((boxes[:, 2:] - boxes[:, :2]) / 2, 2)
        low, high = np.nanmin(boxes, axis=0), np.nanmax(boxes, axis=0)
        gaps = np.concatenate([boxes[:, :2] - low[:2], high[2:] - boxes[:, 2:]], axis=1)
        edge[place.image == image] = (gaps < half).any(axis=1)  # NaN, a token without a place, is not below
    return edge if 2 * edge.sum() <= len(edge) else None


def heatmap(
    images: Sequence[Image.Image],
    question: str,
    pieces: Sequence[str],
    attention: np.ndarray,
    place: Places,
    stage: str = "",
    truth: str = "",
) -> HeatmapSample:
    """A sample's pictures: pieces of the response [S], each with its attention [S, V] to the visual tokens.

    Several images stand side by side in one picture. A token without a place is not drawn.
    """
    picture, edges = side_by_side(images)
    boxes = place.boxes.copy()
    span = np.diff(edges)[place.image]
    boxes[:, [0, 2]] = edges[place.image][:, None] + boxes[:, [0, 2]] * span[:, None]
    placed = np.isfinite(boxes).all(1)
    grids = rasterise(boxes[placed], attention[:, placed])
    return HeatmapSample(picture, question, list(zip(pieces, grids, strict=True)), stage=stage, truth=truth)


def side_by_side(images: Sequence[Image.Image]) -> tuple[Image.Image, np.ndarray]:
    """One picture of one or more images, and the edges between them as fractions of its width [images + 1]."""
    height = max(image.height for image in images)
    narrower = min(1.0, WIDEST / sum(image.width * height / image.height for image in images))
    height = max(1, round(height * narrower))
    widths = [max(1, round(image.width * height / image.height)) for image in images]
    edges = np.cumsum([0, *widths]) / sum(widths)
    if len(images) == 1:
        return images[0], edges
    picture = Image.new("RGB", (sum(widths), height))
    for image, width, left in zip(images, widths, edges, strict=False):
        picture.paste(image.resize((width, height)), (round(left * sum(widths)), 0))
    return picture, edges


def rasterise(boxes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each token's weight spread evenly over its box: boxes [V, 4], weights [S, V] -> [S, rows, columns], same sums."""

    def overlap(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        cells = min(FINEST, int(np.ceil(1 / (high - low).min() - 1e-6)))
        edges = np.linspace(0, 1, cells + 1)
        shared = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
        shared = shared.clip(min=0)
        return shared / shared.sum(1, keepdims=True)

    across, down = overlap(boxes[:, 0], boxes[:, 2]), overlap(boxes[:, 1], boxes[:, 3])
    return np.einsum("sv,vr,vc->src", weights, down, across)


def heatmap_sample(checkpoint: Checkpoint, row: pd.Series, max_new_tokens: int, stage: str = "") -> HeatmapSample:
    """The greedy response to one row in verl's format, cut into sentences, with each one's attention to the image."""
    images = open_images(row["images"])
    answers = answer(checkpoint, [list(row["prompt"])], [images], max_new_tokens)
    return _followed(
        checkpoint, answers, list(row["prompt"]), images, None, stage, str(row["reward_model"]["ground_truth"])
    )


def stored_heatmap(
    checkpoint: Checkpoint, prompt: Sequence[dict], images: Sequence, response: str, most: int | None = None
) -> HeatmapSample:
    """The same of a response that is known: the model reads it behind its prompt, and nothing is generated.

    prompt: messages with `<image>` where one of the images goes. response: its text, read as `answer.given` does: cut
    into tokens anew, which may be others than were sampled, and with an end marker even where the model wrote none.
    most: pieces at most; of more sentences neighbours are one piece. Raises ValueError where the places of the visual
    tokens are not known, for an empty response, and as `given` does.
    """
    images = open_images(images)
    answers = given(checkpoint, [list(prompt)], [images], [response])
    if not (answers.roles == Role.RESPONSE).any():
        raise ValueError("the response is empty")
    return _followed(checkpoint, answers, prompt, images, most)


def _followed(
    checkpoint: Checkpoint, answers: Answers, prompt: Sequence[dict], images: Sequence[Image.Image],
    most: int | None = None, stage: str = "", truth: str = "",
) -> HeatmapSample:  # fmt: skip
    """Pictures of the only row of a batch."""
    place = places(checkpoint, answers, 0, [images])
    if not place.known:
        raise ValueError(place.problem)
    (result,) = measure(checkpoint, answers, "response", follow=[0])
    if result.steps is None:
        raise ValueError(result.problem)
    written = answers.inputs["input_ids"][0][answers.roles[0] == Role.RESPONSE].tolist()
    pieces = fewer(sentences([checkpoint.tokenizer.decode([i]) for i in written]), most)
    attention = by_piece(result.steps, pieces)
    texts = worded(checkpoint.tokenizer, written, pieces)
    user = conversation(prompt)[-1]
    question = "".join(part.get("text", "") for part in user["content"]).strip()
    return heatmap(images, question, texts, attention, place, stage, truth)


def fewer(pieces: Sequence[list[str]], most: int | None) -> list[list[str]]:
    """At most so many pieces, neighbours put together as evenly as they come; None: as many as there are."""
    if most is None or len(pieces) <= most:
        return list(pieces)
    cuts = [len(pieces) * number // most for number in range(most + 1)]
    return [[token for piece in pieces[low:high] for token in piece] for low, high in pairwise(cuts)]


def worded(tokenizer, ids: Sequence[int], pieces: Sequence[Sequence[str]]) -> list[str]:
    """The text of each piece of the response `ids`: tokens by themselves may hold parts of characters, or no spaces."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return [tokenizer.decode(ids[end - len(piece) : end]) for piece, end in zip(pieces, ends, strict=True)]


def by_piece(steps: np.ndarray, pieces: Sequence[Sequence[str]]) -> np.ndarray:
    """Means of the response tokens' rows [n, V] over each piece: [S, V]."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.stack([steps[end - len(piece) : end].mean(axis=0) for piece, end in zip(pieces, ends, strict=True)])


def sentences(tokens: list[str]) -> list[list[str]]:
    """Tokens grouped into sentences and clauses; closing tags and the end marker stay with what they close."""
    groups: list[list[str]] = []
    open_group = False
    for token in tokens:
        closes = re.fullmatch(r"\s*(</\w+>|<\|\w+\|>|<end_of_\w+>)", token)
        if groups and (open_group or closes):
            groups[-1].append(token)
        else:
            groups.append([token])
        open_group = not (closes or re.search(r"[.!?,。！？，]$", token.strip()))
    return groups
