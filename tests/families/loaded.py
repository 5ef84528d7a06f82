"""Each family loaded once a test run, with conversations for it and the reference for their masses."""

from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from families import build
from verl_avar.attention.hf import probe
from verl_avar.attention.reference import role_mass
from verl_avar.evaluation.answer import given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.roles import Role

ROLES = (Role.VISUAL, Role.SYSTEM, Role.USER, Role.RESPONSE)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def two_rows(checkpoint, rows=slice(None)):
    """Two rows of different lengths: one is padded on the left, the first also on the right."""
    prompts = [
        conversation("You are careful.", "<image>What colour is it?"),
        conversation("You look at the picture before you answer.", "Look at this: <image> How many circles are there?"),
    ]
    images = [[noise(150, 70)], [noise(60, 60)]]
    return given(checkpoint, prompts[rows], images[rows], ["Red.", "There are two of them."][rows])


def two_images(checkpoint):
    """One row with an image, words, and another image."""
    prompt = conversation("You are careful.", "<image>or <image>: which is larger?")
    return given(checkpoint, [prompt], [[noise(150, 70), noise(60, 60, seed=1)]], ["The second."])


def other_attention(folder, text):
    """The checkpoint by transformers' own loader, with another attention for its text."""
    kernels = {"": text, "text_config": text, "vision_config": "sdpa"}
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=kernels).eval()


class Loaded:
    """One family: ours, and transformers' own eager and sdpa. Passes are kept: read them, don't change them."""

    def __init__(self, family: str):
        with TemporaryDirectory() as folder:
            build(family, Path(folder))
            self.ours = load_checkpoint(folder)
            self.eager, self.sdpa = other_attention(folder, "eager"), other_attention(folder, "sdpa")
        self._passes = {}

    @torch.no_grad()
    def passes(self, case):
        """(answers, output under a probe, its record, eager maps [B, H, T, S] by layer, visual attention by layer)."""
        if case not in self._passes:
            answers, columns = case(self.ours), {}

            def keep(layer, b, rows, attention, mass):
                columns.setdefault((layer, b), []).append((rows, attention))

            with probe(answers.roles, of=ROLES, visual=keep) as record:
                output = self.ours.model(**answers.inputs)
            maps = self.eager(**answers.inputs, output_attentions=True).attentions
            self._passes[case] = answers, output, record, maps, columns
        return self._passes[case]


@cache
def load(family: str) -> Loaded:
    return Loaded(family)


def who(tokenizer, ids, roles):
    """Runs of one role: its text, or for VISUAL its number of tokens."""
    runs = [(Role(role), [i for i, _ in run]) for role, run in groupby(zip(ids, roles, strict=True), lambda x: x[1])]
    return [(role, len(ids) if role is Role.VISUAL else tokenizer.decode(ids)) for role, ids in runs]


def eager_masses(answers, maps):
    """[L, B, H, T, R] of the maps."""
    return torch.stack([role_mass(m, answers.roles, ROLES) for m in maps])
