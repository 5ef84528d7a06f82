"""What `avar vas` costs beside a plain forward pass of the same model on the same samples.

    python tests/benchmarks/avar_vas.py [--cells 16 32 56] [--layers 8] [--hidden 512]

Both sides open the images, run the processor and the model (a Qwen2.5-VL with random weights) on given responses, and
keep no cache and only the last token's logits. `avar vas` adds: roles, masses of four roles for every layer and head,
sinks and borders, a picture's data, and the files on disk. The order of the two alternates; the least of the repeats
counts, in processor time of all threads: what other processes do at the same time shows in it much less than in elapsed
time.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else waiting threads count as work; before torch is imported

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from verl_avar.evaluation.answer import attention_only, given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.images import open_images
from verl_avar.evaluation.rows import Row
from verl_avar.evaluation.vas_run import Settings, measure_rows
from verl_avar.miniature.model import build_config, build_processor, save
from verl_avar.miniature.tokenizer import build_tokenizer

SYSTEM = "Look at the image and answer the question. " * 2
QUESTION = "<image>What colour is the circle? Describe the red circle and count the squares."
RESPONSE = "I look at the image. The circle is red. Let me check the image again. " * 8


def build(folder: Path, hidden: int, layers: int, cells: int) -> None:
    """A Qwen2.5-VL of the given size, with heads of 64 and room for images of cells × cells visual tokens."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = build_tokenizer(samples=200)
    config = build_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 4 * hidden, layers
    text.num_attention_heads, text.num_key_value_heads = hidden // 64, hidden // 128
    text.layer_types = ["full_attention"] * layers
    text.max_position_embeddings = 16384
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision.out_hidden_size = hidden
    torch.manual_seed(0)
    processor = build_processor(tokenizer)
    side = 28 * cells
    processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": side * side}
    save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def compare(folder: Path, cells: int, samples: int, repeats: int) -> dict:
    """Seconds of both sides for `samples` rows, and the tokens of one."""
    checkpoint = load_checkpoint(folder)
    images = [Image.effect_noise((28 * cells, 28 * cells), 60).convert("RGB") for _ in range(samples)]
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION.removeprefix("<image>")}]}
    rows = [Row(str(i), [system, user], [image], response=RESPONSE) for i, image in enumerate(images)]

    def plain() -> int:
        for row in rows:
            answers = given(checkpoint, [row.messages], [open_images(row.images)], [row.response])
            with torch.no_grad():
                checkpoint.model(**answers.inputs, **attention_only(checkpoint.model))
        return answers.inputs["input_ids"].shape[1]

    def measured() -> None:
        with tempfile.TemporaryDirectory() as out:
            outcome = measure_rows(checkpoint, rows, Settings(), Path(out), pictures=1)
            assert not outcome.failed, outcome.failed

    times: dict = {plain: [], measured: []}
    tokens = plain()
    for repeat in range(repeats):
        for side in (plain, measured) if repeat % 2 == 0 else (measured, plain):
            start = time.process_time()
            side()
            times[side].append(time.process_time() - start)
    return {"tokens": tokens, "plain": min(times[plain]), "avar vas": min(times[measured])}


def main(argv=None) -> list[dict]:
    """Runs the comparison for each image size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[16, 32, 60], help="visual tokens along a side")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="multiple of 128")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    table = Table(title=f"avar vas beside a plain forward pass ({torch.get_num_threads()} threads, CPU)")
    for head in ("tokens", "plain s", "avar vas s", "ratio"):
        table.add_column(head, justify="right")
    results = []
    for cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), arguments.hidden, arguments.layers, cells)
            result = compare(Path(folder), cells, arguments.samples, arguments.repeats)
        ratio = result["avar vas"] / result["plain"]
        results.append(result | {"ratio": ratio})
        table.add_row(str(result["tokens"]), f"{result['plain']:.2f}", f"{result['avar vas']:.2f}", f"{ratio:.2f}")
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
