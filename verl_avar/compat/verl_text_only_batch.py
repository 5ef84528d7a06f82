"""Text-only micro-batches of Qwen2-VL and Qwen2.5-VL.

Why: without an image verl runs the vision tower on zeros, so that its parameters take part in the step, and calls
`.mean()` on what the tower returns; since transformers 5 that is an output object, not a tensor.
Where: verl/models/transformers/qwen2_vl.py:363.
Versions: verl 0.9.1 with transformers 5.5 to 5.10.
Can go: when that line goes through `unpack_visual_output`, as the two branches above it do.
"""

from __future__ import annotations

from contextlib import contextmanager

from verl_avar.compat.on_import import on_import


def apply() -> None:
    """Patch verl's Qwen2-VL module when it is imported."""
    on_import("verl.models.transformers.qwen2_vl", patch)


@contextmanager
def patch(module):
    yield
    stock = module._get_input_embeds
    if getattr(stock, "text_only", False):
        return

    def _get_input_embeds(model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *grids):
        if pixel_values is not None or pixel_values_videos is not None:
            return stock(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *grids)
        embeds = model.get_input_embeddings()(input_ids)
        return embeds + 0.0 * _blank_image(model, embeds, module.unpack_visual_output).mean(), attention_mask

    _get_input_embeds.text_only = True
    module._get_input_embeds = _get_input_embeds


def _blank_image(model, like, unpack):
    """Features of an image of 4 x 4 zero patches."""
    import torch

    vision = model.config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, 4, 4]], device=like.device)
    return unpack(model.visual(like.new_zeros(16, patch), grid_thw=grid))[0]
