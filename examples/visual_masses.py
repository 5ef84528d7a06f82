"""Does a response look at its image? Masses, VARS score and VAS of one answer, in a few lines.

python examples/visual_masses.py [CHECKPOINT IMAGE QUESTION]      without arguments: the miniature and one of its scenes
"""

import random
import sys

from PIL import Image

from verl_avar import families
from verl_avar.evaluation.answer import answer, answer_masses
from verl_avar.evaluation.checkpoint import load_checkpoint
from verl_avar.miniature import base_path
from verl_avar.miniature.tasks import SYSTEM, draw_sample
from verl_avar.reward import visual_scores
from verl_avar.roles import Role
from verl_avar.vas import Vas

if len(sys.argv) == 4:
    path, image, question = sys.argv[1], Image.open(sys.argv[2]), sys.argv[3]
else:
    sample = draw_sample("colour", "eval", random.Random(0))
    path, image, question = base_path(), sample.image, sample.question

checkpoint = load_checkpoint(path)
prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"<image>{question}"}]
answers = answer(checkpoint, [prompt], [[image]], max_new_tokens=64)
record = answer_masses(checkpoint, answers)
visual, system = record.mass(Role.VISUAL), record.mass(Role.SYSTEM)  # [layers, batch, heads, tokens]

print(question)
print(answers.texts[0])
print("VARS score:", visual_scores(visual, system, answers.roles)[0])
masses, layers = families.masses(checkpoint.model, record)  # those above, but for models of cross-attention
reach = families.reach(checkpoint.model, answers.roles, layers)
for scope in ("user", "response"):
    vas = Vas(scope)
    vas.add(*masses.unbind(-1), answers.roles, reach)
    print(f"VAS ({scope}):", {name: round(vas.summary()[name], 3) for name in ("paper", "head_mean", "median")})
