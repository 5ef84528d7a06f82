"""Boxes of visual tokens against the models themselves: which embeddings change when one place of the image does.

The attention of the vision tower is switched off (its output projections are zero), so that an embedding depends on its
own pixels only. Then exactly the tokens whose box has the changed place in it must change.
"""

import families
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PaliGemmaConfig

from verl_avar.families import cells

SQUARE = 8  # side of the changed place, in pixels of the image
ENDS = (".attn.proj", ".projection_layer", ".self_attn.out_proj", ".self_attn.o_proj")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """family -> (model whose vision tower mixes no tokens, processor)."""
    loaded = {}

    def load_family(family):
        if family not in loaded:
            folder = families.build(family, tmp_path_factory.mktemp(family))
            model = AutoModelForImageTextToText.from_pretrained(folder).eval()
            vision = [(n, m) for n, m in model.named_modules() if "vis" in n and n.endswith(ENDS)]
            assert len(vision) >= 2
            for _, module in vision:
                torch.nn.init.zeros_(module.weight)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            loaded[family] = model, AutoProcessor.from_pretrained(folder)
        return loaded[family]

    return load_family


def processed(processor, images):
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    return processor(text=[text], images=[images], return_tensors="pt")


def embeddings(model, inputs):
    """What the text model gets for each visual token [V, D]: embeddings, or vision states that become keys."""
    got = {}
    hook = model.model.get_decoder().register_forward_pre_hook(lambda *args: got.update(args[2]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    if got.get("cross_attention_states") is not None:
        return got["cross_attention_states"].flatten(0, 1)
    return got["inputs_embeds"][inputs["input_ids"] == model.config.image_token_id]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def changed_at(image, left, top):
    pixels = np.array(image)
    pixels[top : top + SQUARE, left : left + SQUARE] = 255 - pixels[top : top + SQUARE, left : left + SQUARE]
    return Image.fromarray(pixels)


def reach(boxes, size, left, top, further=None):
    """Which boxes have two pixels in common with the square at (left, top), or, with `further`, could be reached by it.

    A bicubic filter reaches two pixels of the larger of image and resized image; a token has 14 resized pixels or more.
    """
    found = np.ones(len(boxes), bool)
    for axis, at in ((0, left), (1, top)):
        low, high = boxes[:, axis] * size[axis], boxes[:, axis + 2] * size[axis]
        grow = -2.0 if further is None else np.maximum(2.5, 2.5 / 14 * (high - low)) + further
        found &= (low < at + SQUARE + grow) & (high > at - grow)
    return found  # False for nan


def assert_places(model, processor, images, which, steps):
    """Changes image `which` place by place, and compares the embeddings that change with the boxes."""
    inputs = processed(processor, images)
    boxes, index = cells(model.config, processor, inputs, images)
    plain = embeddings(model, inputs)
    assert boxes.shape == (len(plain), 4) and boxes.dtype == np.float32 and index.shape == (len(plain),)
    size = images[which].size
    # LLaVA-OneVision interpolates the features of a large image, which reaches half a token further; SmolVLM and
    # Idefics3 resize an image twice.
    family = model.config.model_type
    interpolated = family == "llava_onevision" and len(images) == 1 and min(size) > 180
    further = 14 if interpolated else 2 if family in ("smolvlm", "idefics3") else 0
    touched = np.zeros(len(boxes), bool)
    for left in {*range(2, size[0] - SQUARE, steps), size[0] - SQUARE}:
        for top in {*range(2, size[1] - SQUARE, steps), size[1] - SQUARE}:
            others = list(images)
            others[which] = changed_at(images[which], left, top)
            change = (embeddings(model, processed(processor, others)) - plain).abs().amax(-1)
            change = (change > 1e-5 * plain.abs().amax()).numpy()
            must = reach(boxes, size, left, top) & (index == which)
            may = reach(boxes, size, left, top, further) & (index == which)
            assert change[must].all(), (left, top, np.flatnonzero(must & ~change), np.flatnonzero(change))
            assert may[change].all(), (left, top, np.flatnonzero(change & ~may), np.flatnonzero(may))
            touched |= change
    placed = ~np.isnan(boxes[:, 0]) & (index == which)
    assert touched[placed].mean() > 0.3


# Sizes give several tiles in two arrangements where a family has tiles; the last is larger than what the model keeps.
SIZES = ((150, 70), (70, 150), (200, 190))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_embeddings_change_exactly_where_the_image_does(load, family, size):
    assert_places(*load(family), [noise(*size)], 0, steps=31)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_several_images_keep_their_own_boxes(load, family):
    for which in (0, 1):
        assert_places(*load(family), [noise(150, 70), noise(90, 120, seed=1)], which, steps=31)


def nan_at(load, family, images):
    model, processor = load(family)
    boxes, index = cells(model.config, processor, processed(processor, images), images)
    return np.isnan(boxes).all(axis=1), index


def test_line_ends_have_no_place(load):
    nan, _ = nan_at(load, "llava_onevision", [noise(120, 60)])
    # The whole image as 4 × 4 tokens, then two tiles side by side: 4 rows of 8 tokens and a line end.
    assert nan.tolist() == [False] * 16 + ([False] * 8 + [True]) * 4
    nan, index = nan_at(load, "llava_onevision", [noise(60, 60), noise(60, 60)])
    assert nan.tolist() == ([False] * 16 + [True]) * 2 and index.tolist() == [0] * 17 + [1] * 17


def test_class_tokens_and_padding_have_no_place(load):
    nan, _ = nan_at(load, "mllama", [noise(112, 56)])
    # Two of four tiles are used, each a class token and 4 × 4 patches.
    assert nan.tolist() == ([True] + [False] * 16) * 2 + [True] * 34


def test_boxes_of_a_grid_are_its_cells(load):
    model, processor = load("qwen2_5_vl")
    image = noise(84, 56)
    boxes, _ = cells(model.config, processor, processed(processor, [image]), [image])
    thirds, halves = (0, 1 / 3, 2 / 3, 1), (0, 0.5, 1)
    expected = [(thirds[c], halves[r], thirds[c + 1], halves[r + 1]) for r in range(2) for c in range(3)]
    np.testing.assert_allclose(boxes, expected, atol=1e-6)


def test_a_prompt_without_images_has_no_boxes(load):
    for family in ("qwen3_vl", "gemma3", "smolvlm"):
        model, processor = load(family)
        inputs = processor(text=["What is it?"], return_tensors="pt")
        boxes, index = cells(model.config, processor, inputs, [])
        assert boxes.shape == (0, 4) and index.shape == (0,)


def test_what_is_not_known_is_refused_by_name(load):
    model, processor = load("qwen2_5_vl")
    image = noise(84, 56)
    inputs = processed(processor, [image])
    with pytest.raises(ValueError, match="the place of paligemma's visual tokens is not known"):
        cells(PaliGemmaConfig(), processor, inputs, [image])
    with pytest.raises(ValueError, match="qwen2_5_vl: the sequence has a video"):
        cells(model.config, processor, inputs | {"pixel_values_videos": inputs["pixel_values"]}, [image])
    with pytest.raises(ValueError, match="internvl: 1 images should give 4 visual tokens, the sequence has 12"):
        model, processor = load("internvl")
        cells(model.config, processor, processed(processor, [noise(130, 60)]), [noise(56, 56)])


def test_pan_and_scan_is_refused(load):
    model, processor = load("gemma3")
    image = noise(150, 60)
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10}
    inputs = processor(text=["<start_of_image>What?"], images=[[image]], return_tensors="pt", **crops)
    assert len(inputs["pixel_values"]) > 1
    with pytest.raises(ValueError, match="gemma3: pan and scan"):
        cells(model.config, processor, inputs, [image])
