"""Two checkpoints on the same questions, side by side: does the second look at the image more?

python examples/compare_checkpoints.py [BEFORE AFTER ROWS]       without arguments: the miniature, whole and with its
                                                                last layer's queries silenced
The command line does the same: avar vas --model AFTER --data ROWS --compare runs/vas/BEFORE
"""

import sys
import tempfile
from pathlib import Path

import torch

from verl_avar.cli import main
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval

folder = Path(tempfile.mkdtemp())
if len(sys.argv) == 4:
    before, after, rows = sys.argv[1:]
else:
    before, after, rows = base_path(), folder / "silenced", write_eval(folder / "eval.parquet", 5, seed=0)
    checkpoint = load_checkpoint(before)
    with torch.no_grad():
        checkpoint.model.model.language_model.layers[-1].self_attn.q_proj.weight.zero_()
    checkpoint.model.save_pretrained(after)
    checkpoint.processor.save_pretrained(after)

common = ["--data", str(rows), "--max-new-tokens", "48"]
main(["vas", "--model", str(before), "--out", str(folder / "before"), *common])
main(["vas", "--model", str(after), "--out", str(folder / "after"), "--compare", str(folder / "before"), *common])
