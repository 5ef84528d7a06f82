"""VAS of a checkpoint over image questions (AVAR §2.2, arXiv:2603.03825), in ten lines.

python examples/vas_in_ten_lines.py [CHECKPOINT ROWS]        without arguments: the miniature on a few of its questions
"""

import sys
import tempfile

from verl_avar import families
from verl_avar.evaluation.answer import answer_masses, given
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.evaluation.rows import read_rows
from verl_avar.miniature import base_path
from verl_avar.miniature.data import write_eval
from verl_avar.vas import Vas, vas_class

path, data = sys.argv[1:] or (base_path(), write_eval(f"{tempfile.mkdtemp()}/eval.parquet", 5, seed=0))

checkpoint = load_checkpoint(path)
vas = Vas("user")  # the attention of the user's tokens after the image
for row in read_rows(data):
    conversation = given(checkpoint, [row.messages], [row.images], [""])  # the prompt alone, no response
    record = answer_masses(checkpoint, conversation, "user")
    masses, layers = families.masses(checkpoint.model, record)  # [layers, 1, heads, tokens, image and system turn]
    vas.add(*masses.unbind(-1), conversation.roles, families.reach(checkpoint.model, conversation.roles, layers))
summary = vas.summary()
print(f"VAS {summary['paper']:.2f} ({vas_class(summary['paper'])}), heads averaged first {summary['head_mean']:.3f}")
print(f"visual mass {summary['mass']['visual']:.1%}, system mass {summary['mass']['system']:.1%}")
