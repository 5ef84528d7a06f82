"""Where each visual token lies on its source image, by family: the boxes of overlays and heat maps.

The processors' own functions say how an image is resized, cut and padded; here it is turned back into fractions of the
source image. Windows and boxes are (left, top, right, bottom).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
NOWHERE = np.full((1, 4), np.nan, dtype=np.float32)  # a token that stands for no place


def cells(config, processor, inputs: dict, images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """The box of every visual token of one unpadded sequence on its source image.

    config: of the model; inputs: what `processor` made of the sequence's prompt and `images` (PIL, in their order).
    Returns boxes float32 [V, 4] = left, top, right, bottom as fractions of the image, and the index of each one's image
    [V]. V: the visual placeholders in their order; for Llama-3.2-Vision, whose images are no tokens of the sequence,
    its vision keys in their order: images × tiles × (class token and patches).
    A box is nan where its token stands for no place: LLaVA-OneVision's line ends, class tokens, padding.
    Raises ValueError, naming the family, where the geometry is not known: other families, video, and processing that
    does not give the number of tokens in the sequence.
    """
    family = config.model_type
    if family not in _FAMILIES:
        raise ValueError(f"cells: the place of {family}'s visual tokens is not known; known: {', '.join(_FAMILIES)}")
    if "pixel_values_videos" in inputs:
        raise ValueError(f"cells: {family}: the sequence has a video; only images have cells")
    boxes = [np.concatenate(parts).astype(np.float32) for parts in _FAMILIES[family](config, processor, inputs, images)]
    found = sum(map(len, boxes))
    wanted = _count(config, inputs)
    if len(boxes) != len(images) or found != wanted:
        raise ValueError(
            f"cells: {family}: {len(images)} images should give {found} visual tokens, the sequence has {wanted}; "
            "pass the images of this sequence, processed with the processor's own settings"
        )
    index = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
    return np.concatenate(boxes) if boxes else np.zeros((0, 4), np.float32), index


def _count(config, inputs: dict) -> int:
    """Visual tokens of the sequence."""
    if config.model_type == "mllama":
        _, images, tiles = inputs["aspect_ratio_mask"].shape
        return images * tiles * ((config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1)
    visual = [config.image_token_id, getattr(config, "video_token_id", None)]
    return int(np.isin(_array(inputs["input_ids"]), [i for i in visual if i is not None]).sum())


def _array(values) -> np.ndarray:
    """A tensor on any device, or a list, as an array."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def grid(rows: int, columns: int, window: Window = WHOLE) -> np.ndarray:
    """Boxes [rows · columns, 4] of a grid over a window, row by row."""
    left, top, right, bottom = window
    x = left + (right - left) * np.arange(columns + 1) / columns
    y = top + (bottom - top) * np.arange(rows + 1) / rows
    i, j = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x[j], y[i], x[j + 1], y[i + 1]], axis=1)


def tiles(rows: int, columns: int, side: int, window: Window = WHOLE, covered: float = 1.0) -> list[np.ndarray]:
    """Boxes of tiles that share out a window, tile by tile, each a grid of side × side.

    covered: how far the grid reaches into a tile; 384 px hold 27 patches of 14 px, the last 6 px are not seen.
    """
    return [
        grid(side, side, (left, top, left + covered * (right - left), top + covered * (bottom - top)))
        for left, top, right, bottom in grid(rows, columns, window)
    ]


def clipped(boxes: np.ndarray) -> np.ndarray:
    """Boxes cut to the image; nan where nothing is left."""
    boxes = boxes.clip(0.0, 1.0)
    empty = (boxes[:, 2] - boxes[:, 0] < 1e-6) | (boxes[:, 3] - boxes[:, 1] < 1e-6)
    return np.where(empty[:, None], np.nan, boxes)


def padded(size: tuple[float, float], canvas: tuple[float, float], corner: tuple[float, float]) -> Window:
    """The window of a whole canvas, in fractions of an image of `size` that lies on it at `corner`; (width, height)."""
    left, top = -corner[0] / size[0], -corner[1] / size[1]
    return left, top, left + canvas[0] / size[0], top + canvas[1] / size[1]


def _qwen(config, processor, inputs, images):
    """The image is stretched to a grid of patches; a token is merge × merge of them."""
    merge = config.vision_config.spatial_merge_size
    for frames, rows, columns in _array(inputs.get("image_grid_thw", ())).tolist():
        yield [grid(rows // merge, columns // merge)] * frames


def _internvl(config, processor, inputs, images):
    """Tiles of the image stretched to their grid, then, where there are several, the whole image once more."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    side, settings = math.isqrt(processor.image_seq_length), processor.image_processor
    tile = (settings.size["height"], settings.size["width"])
    for image in images:
        columns, rows = get_optimal_tiled_canvas(
            (image.height, image.width), tile, settings.min_patches, settings.max_patches
        )
        whole = [grid(side, side)] if rows * columns > 1 else []
        yield tiles(rows, columns, side) + whole


def _idefics(config, processor, inputs, images):
    """As InternVL; an image that fits one tile has no tiles, only its whole view."""
    side, vision = math.isqrt(processor.image_seq_len), config.vision_config
    covered = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
    if not images:
        return
    found = processor.image_processor([list(images)], return_row_col_info=True)
    for rows, columns in zip(found["rows"][0], found["cols"][0], strict=True):
        yield tiles(rows, columns, side, covered=covered) + tiles(1, 1, side, covered=covered)


def _llava(config, processor, inputs, images):
    """The image's middle: its shorter side resized, then a crop."""
    from transformers.image_transforms import get_resize_output_image_size

    settings, vision = processor.image_processor, config.vision_config
    if vision.model_type != "clip_vision_model" or getattr(settings, "do_pad", None):
        raise ValueError(f"cells: llava: known for a CLIP vision tower without padding, not for {vision.model_type}")
    height, width = settings.crop_size["height"], settings.crop_size["width"]
    first = [] if config.vision_feature_select_strategy == "default" else [NOWHERE]
    for image in images:
        new_height, new_width = get_resize_output_image_size(
            _pixels(image), settings.size["shortest_edge"], default_to_square=False, input_data_format="channels_first"
        )
        left, top = int((new_width - width) / 2), int((new_height - height) / 2)
        window = padded((new_width, new_height), (width, height), (-left, -top))
        yield [*first, clipped(grid(height // vision.patch_size, width // vision.patch_size, window))]


def _gemma3(config, processor, inputs, images):
    """The image stretched to a square, its patches pooled."""
    if len(inputs.get("pixel_values", ())) != len(images):
        raise ValueError("cells: gemma3: pan and scan cuts further crops out of an image; their place is not known")
    side = math.isqrt(config.mm_tokens_per_image)
    for _ in images:
        yield [grid(side, side)]


def _llava_onevision(config, processor, inputs, images):
    """A sequence's only image: the whole image stretched to a square, then the rows of a finer grid on a canvas of
    tiles, its padding cut off, a line end after each. One of several: padded to a square, one line end after it all.
    """
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

    vision = config.vision_config
    tile, patch = vision.image_size, vision.patch_size
    side = tile // patch
    limit = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    counts = _array(inputs.get("batch_num_images", [1] * len(images))).tolist()
    if sum(counts) != len(images):
        raise ValueError(f"cells: llava_onevision: batch_num_images {counts} for {len(images)} images of one sequence")
    for image, is_alone in zip(images, [n == 1 for n in counts for _ in range(n)], strict=True):
        size = (image.width, image.height)
        if not is_alone:
            square = max(size)
            corner = ((square - image.width) // 2, (square - image.height) // 2)
            window = padded(size, (square, square), corner)
            yield [clipped(part) for part in tiles(1, 1, side, window, side * patch / tile)] + [NOWHERE]
            continue
        height, width = select_best_resolution((image.height, image.width), config.image_grid_pinpoints)
        new_height, new_width = get_patch_output_size(_pixels(image), (height, width), "channels_first")
        rows, columns = height // tile * side, width // tile * side
        cut_rows, cut_columns = _cut(image, rows, columns)
        out_rows, out_columns = rows - 2 * cut_rows, columns - 2 * cut_columns
        ratio = math.sqrt(out_rows * out_columns / (limit * side**2))
        if ratio > 1.1:  # more than the limit: features are interpolated to fewer rows and columns
            out_rows, out_columns = int(out_rows // ratio), int(out_columns // ratio)
        top, bottom = _edges(np.linspace(cut_rows, rows - cut_rows, out_rows + 1), side, tile, patch)
        left, right = _edges(np.linspace(cut_columns, columns - cut_columns, out_columns + 1), side, tile, patch)
        left, right = ((edges - (width - new_width) // 2) / new_width for edges in (left, right))
        top, bottom = ((edges - (height - new_height) // 2) / new_height for edges in (top, bottom))
        lines = [
            part
            for row in range(out_rows)
            for part in (
                clipped(np.stack([left, 0 * left + top[row], right, 0 * right + bottom[row]], axis=1)),
                NOWHERE,
            )
        ]
        yield tiles(1, 1, side, covered=side * patch / tile) + lines


def _edges(borders: np.ndarray, side: int, tile: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel of tokens between `borders`, in patches along a row of tiles of `side` patches each."""
    start, stop = borders[:-1] // side, np.ceil(borders[1:] / side) - 1
    return start * tile + (borders[:-1] - start * side) * patch, stop * tile + (borders[1:] - stop * side) * patch


def _cut(image: Image.Image, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of padding that LLaVA-OneVision cuts off on either side of a canvas of rows × columns."""
    if image.width / image.height > columns / rows:
        return (rows - int(round(image.height * columns / image.width, 7))) // 2, 0
    return 0, (columns - int(round(image.width * rows / image.height, 7))) // 2


def _pixels(image: Image.Image) -> np.ndarray:
    """An array of an image's shape [3, height, width] and any values, for functions that read the size off one."""
    return np.empty((3, image.height, image.width), np.uint8)


def _mllama(config, processor, inputs, images):
    """Tiles of a canvas with the image in its upper left corner; each a class token and its patches; padding tiles."""
    from transformers.models.mllama.image_processing_mllama import (
        get_image_size_fit_to_canvas,
        get_optimal_tiled_canvas,
    )

    vision, most = config.vision_config, inputs["aspect_ratio_mask"].shape[-1]
    tile, side = vision.image_size, vision.image_size // vision.patch_size
    for image in images:
        size = {"image_height": image.height, "image_width": image.width, "tile_size": tile}
        height, width = get_optimal_tiled_canvas(max_image_tiles=processor.image_processor.max_image_tiles, **size)
        new_height, new_width = get_image_size_fit_to_canvas(canvas_height=height, canvas_width=width, **size)
        window = padded((new_width, new_height), (width, height), (0, 0))
        used = tiles(height // tile, width // tile, side, window)
        boxes = [part for patches in used for part in (NOWHERE, clipped(patches))]
        yield [*boxes, np.repeat(NOWHERE, (most - len(used)) * (side**2 + 1), axis=0)]


_FAMILIES: dict[str, Callable[[Any, Any, dict, Sequence[Image.Image]], Any]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "qwen3_5": _qwen,
    "qwen3_5_moe": _qwen,
    "internvl": _internvl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "smolvlm": _idefics,
    "idefics3": _idefics,
    "mllama": _mllama,
}
