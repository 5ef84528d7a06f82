"""The training-free intervention: more attention to the image while a model answers (AVAR §2.3, arXiv:2603.03825).

python examples/intervention.py [CHECKPOINT IMAGE QUESTION]      without arguments: the miniature and one of its scenes

Where `generate` is called by other code, an option does the same as the context manager below:
model.generate(…, custom_generate=generate_with_bias(visual=0.14)), from verl_avar.attention.hf.
"""

import random
import sys

from PIL import Image

from verl_avar.attention.bias import bias_of
from verl_avar.attention.hf import role_bias
from verl_avar.evaluation.checkpoint import load_checkpoint, prompt_inputs, prompt_roles
from verl_avar.miniature import base_path
from verl_avar.miniature.tasks import SYSTEM, draw_sample

if len(sys.argv) == 4:
    path, image, question = sys.argv[1], Image.open(sys.argv[2]), sys.argv[3]
else:
    sample = draw_sample("where", "eval", random.Random(1))
    path, image, question = base_path(), sample.image, sample.question

checkpoint = load_checkpoint(path)
messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"<image>{question}"}]
inputs = prompt_inputs(checkpoint, [messages], [[image]])
roles = prompt_roles(checkpoint, [messages], inputs)

print(question)
for alpha_img, alpha_sys in ((0.0, 0.0), (0.15, 0.0), (0.15, 0.4), (2.0, 0.4)):
    visual, system = bias_of(alpha_img, alpha_sys)
    with role_bias(checkpoint.model, visual=visual, system=system, roles=roles, queries="all"):
        ids = checkpoint.model.generate(**inputs, max_new_tokens=48, do_sample=False)
    text = checkpoint.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"α_img {alpha_img:4.2f}  α_sys {alpha_sys:3.1f}  {text}")
