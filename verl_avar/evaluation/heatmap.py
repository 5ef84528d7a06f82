"""Where a response looks in its image: attention to each visual token, by sentence of the response."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import torch

from verl_avar.attention.hf import set_attention
from verl_avar.evaluation.answer import Answers, answer
from verl_avar.evaluation.checkpoint import IMAGE_PLACEHOLDER, Checkpoint, open_images
from verl_avar.report import HeatmapSample
from verl_avar.roles import Role, query_mask


def heatmap_sample(checkpoint: Checkpoint, row: pd.Series, max_new_tokens: int, stage: str = "") -> HeatmapSample:
    """The greedy response to one row with a single image, cut into sentences, with each one's attention to the cells.

    Uses the full attention map of one sequence (eager attention): for pictures, not for measuring.
    """
    images = open_images(row["images"])
    answers = answer(checkpoint, [list(row["prompt"])], [images], max_new_tokens)
    cells = attention_to_cells(checkpoint, answers)
    written = answers.inputs["input_ids"][0, answers.prompt_length :]
    steps, position = [], 0
    for sentence in sentences([checkpoint.tokenizer.decode([i]) for i in written.tolist()][: len(cells)]):
        steps.append(("".join(sentence), cells[position : position + len(sentence)].mean(axis=0)))
        position += len(sentence)
    question = row["prompt"][-1]["content"].replace(IMAGE_PLACEHOLDER, "").strip()
    truth = row["reward_model"]["ground_truth"]
    return HeatmapSample(images[0], question, steps, stage=stage, truth=str(truth))


@torch.no_grad()
def attention_to_cells(checkpoint: Checkpoint, answers: Answers) -> np.ndarray:
    """Attention of each response query to each cell of the image, mean over layers and heads.

    answers: a batch of one with one image. Returns [n, rows, columns] in [0, 1]; a cell is one visual token.
    """
    (grid,) = answers.inputs["image_grid_thw"].tolist()
    merge = checkpoint.model.config.vision_config.spatial_merge_size
    set_attention(checkpoint.model, "avar_eager")
    try:
        maps = checkpoint.model(**answers.inputs, output_attentions=True).attentions
    finally:
        set_attention(checkpoint.model, "avar_sdpa")
    mean = torch.stack([layer[0].mean(dim=0) for layer in maps]).mean(dim=0)  # [T, T]
    to_image = mean[query_mask(answers.roles, "response")[0]][:, answers.roles[0] == Role.VISUAL]
    return to_image.reshape(-1, grid[1] // merge, grid[2] // merge).float().numpy()


def sentences(tokens: list[str]) -> list[list[str]]:
    """Tokens grouped into sentences and clauses; closing tags and the end marker stay with what they close."""
    groups: list[list[str]] = []
    open_group = False
    for token in tokens:
        closes = re.fullmatch(r"\s*(</\w+>|<\|\w+\|>)", token)
        if groups and (open_group or closes):
            groups[-1].append(token)
        else:
            groups.append([token])
        open_group = not (closes or re.search(r"[.!?,]$", token.strip()))
    return groups
