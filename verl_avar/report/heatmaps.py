"""Where a response looks, over its image: veils for the page, and one sheet of all steps for the folder of figures."""

import functools
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from verl_avar.report.drawing import TEXT
from verl_avar.report.results import digits, percent

if TYPE_CHECKING:
    from verl_avar.report.report import HeatmapSample

VEIL = (128, 128, 128)  # grey, to be told from white and from black backgrounds alike
OPACITY = 0.85  # of the veil over a cell without attention
SIDE, LARGEST, SHORTEST, CELL = 336, 1008, 64, 8  # pixels: usual longer side, its limit, shorter side, side of a cell
PEAK = 0.99  # quantile of a sample's weights that lifts the veil: a sink or two must not hide where the rest goes
SHEET, GAP, LINE = 9.3, 0.15, 0.185  # inches: width of a sheet, space between pictures, height of a line of words
WORDS = 7  # lines of words above a picture of a sheet
MISSING = "□"
# matplotlib takes each glyph from the first of these that is installed and has it.
FALLBACKS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Arial Unicode MS",
)


def attention_heatmap(image: Image.Image, weights: np.ndarray | None = None, top: float | None = None) -> Image.Image:
    """The image behind a grey veil that is the thinner, the more attention a cell gets; without `weights`, no veil.

    A veil keeps the image's own colours where the response looks, which a colour map laid over it would hide.

    Args:
        weights: [rows, columns], attention to each cell of the image's token grid, not negative.
        top: the weight that lifts the veil, by default the largest; give one value to make several pictures comparable.
    """
    grid = None if weights is None else np.shape(weights)
    size = picture_size(image, grid)
    # Small images are enlarged as they are: smoothing would hide the pixels that the model saw.
    enlarged = size[0] > image.width
    picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    if weights is None:
        return picture
    over = veil(weights, top).resize(size, Image.Resampling.NEAREST)
    return Image.alpha_composite(picture.convert("RGBA"), over).convert("RGB")


def veil(weights: np.ndarray, top: float | None = None) -> Image.Image:
    """The veil alone, one pixel a cell: clear where the weight is at least `top`, by default the largest."""
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or not weights.size or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights must be a finite, non-negative [rows, columns] array, got shape {weights.shape}")
    lifted = np.clip(weights / (top or weights.max() or 1.0), 0, 1)
    pixels = np.empty((*weights.shape, 4), dtype=np.uint8)
    pixels[..., :3] = VEIL
    pixels[..., 3] = np.rint(255 * OPACITY * (1 - lifted))
    return Image.fromarray(pixels)


def picture_size(image: Image.Image, grid: tuple[int, ...] | None = None) -> tuple[int, int]:
    """Width and height of a picture of the image: fine grids [rows, columns] and long, thin images get more pixels."""
    longer, shorter = max(image.size), min(image.size)
    side = max(SIDE, CELL * max(grid or (0,)), SHORTEST * longer / shorter)
    scale = min(side, LARGEST) / longer
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def brightest(sample: "HeatmapSample") -> float:
    """The weight that lifts the veil in all of a sample's pictures: the largest, or with hundreds of weights their
    99 % quantile, rounded up to one of them. 0 without steps."""
    if not sample.steps:
        return 0.0
    weights = np.concatenate([np.ravel(weights) for _, weights in sample.steps])
    return float(np.quantile(weights, PEAK, method="higher") or weights.max())


def heatmap_sheet(sample: "HeatmapSample") -> Figure:
    """The image and every step's heat map on one sheet, with the step's words above its picture."""
    top, columns = brightest(sample), sheet_columns(sample)
    grid = np.shape(sample.steps[0][1]) if sample.steps else None
    width = (SHEET - GAP) / columns - GAP
    lines = int(11 * width)  # characters of a line
    first = attention_heatmap(sample.image.resize(picture_size(sample.image, grid)))
    pictures = [(wrap(sample.question, lines), first)]
    for text, weights in sample.steps:
        words = [*wrap(text, lines), f"→ image: {percent(float(np.sum(weights)))} % of attention"]
        pictures.append((words, attention_heatmap(sample.image, weights, top)))
    note = [f"no veil: {digits(100 * top)} % or more of a token's attention on that cell"]
    if any(MISSING in line for words, _ in pictures for line in words):
        note.append(f"{MISSING}: no installed font has this character")

    height = min(width * first.height / first.width, 2.2 * width)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heads = [LINE * max(len(words) for words, _ in row) + 0.1 for row in rows]
    total = sum(heads) + len(rows) * (height + GAP) + 0.4
    figure = Figure(figsize=(SHEET, total), dpi=120)
    top_edge = total
    for row, head in zip(rows, heads, strict=True):
        top_edge -= head + height
        for column, (words, picture) in enumerate(row):
            left = GAP + column * (width + GAP)
            axes = figure.add_axes((left / SHEET, top_edge / total, width / SHEET, height / total))
            axes.imshow(picture)
            axes.set_anchor("NW")
            axes.axis("off")
            at = (left / SHEET, (top_edge + height + 0.05) / total)
            _write(figure, at, "\n".join(words), verticalalignment="bottom")
        top_edge -= GAP
    _write(figure, (GAP / SHEET, 0.12 / total), "; ".join(note))
    return figure


def sheet_columns(sample: "HeatmapSample") -> int:
    """Pictures side by side on a sheet: fewer where cells are fine or the image is wide."""
    across = np.shape(sample.steps[0][1])[1] if sample.steps else 1
    aspect = sample.image.width / sample.image.height
    if aspect > 3 or across > 72:
        return 1
    return 2 if aspect > 1.8 or across > 28 else 4 if aspect < 0.5 else 3


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns and at most WORDS of them; wide (East Asian) characters count twice.

    Breaks at spaces where there are any; characters that no installed font has become MISSING.
    """
    lines, line, used = [], "", 0
    for word in _words(_drawable(" ".join(text.split()))):
        needed = _columns(word)
        if used and used + needed > width:
            lines.append(line)
            line, used = "", 0
        while len(word) > width:  # no space to break at
            lines.append(word[:width])
            word = word[width:]
        line, used = line + word, used + _columns(word)
    lines = [line.strip() for line in [*lines, line] if line.strip()]
    return lines if len(lines) <= WORDS else [*lines[: WORDS - 1], lines[WORDS - 1] + " …"]


def _words(text: str) -> list[str]:
    """Pieces that a line may break after: words with their space, and each wide character."""
    pieces, piece = [], ""
    for character in text:
        piece += character
        if character == " " or _wide(character):
            pieces.append(piece)
            piece = ""
    return [*pieces, piece]


def _columns(text: str) -> int:
    return sum(2 if _wide(character) else 1 for character in text.rstrip(" "))


def _wide(character: str) -> bool:
    return character == MISSING or unicodedata.east_asian_width(character) in "WF"


def _write(figure: Figure, at: tuple[float, float], text: str, **how) -> None:
    figure.text(*at, text, fontsize=TEXT - 2, fontfamily=list(_families()), parse_math=False, linespacing=1.25, **how)


@functools.cache
def _families() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(family for family in FALLBACKS if family in installed))


@functools.cache
def _has_glyph(character: str) -> bool:
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in _families()]
    return any(font.get_char_index(ord(character)) for font in fonts)


def _drawable(text: str) -> str:
    seen = (character for character in text if unicodedata.category(character)[0] != "C")
    return "".join(character if _has_glyph(character) else MISSING for character in seen)
