"""One question about an image, asked of a running `avar serve` without and with a bias of attention to the image.

python examples/serve_openai_client.py [URL]        the server: verl_avar/rollout/SERVING.md

AVAR §2.3 (bias) and §3.3 (score), arXiv:2603.03825. Needs `pip install openai`.
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8010"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
image = base64.b64encode(Path(__file__).with_name("scene.png").read_bytes()).decode()
messages = [
    {"role": "system", "content": "You are a careful assistant. Look at the image, think, then answer."},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": "What colour is the triangle?"},
        ],
    },
]

for beta in (0.0, 1.0):
    response = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages,
        max_tokens=48,
        temperature=0,
        extra_body={"vllm_xargs": {"visual_bias": beta, "attention_scores": "tokens"}},
    )
    score = response.kv_transfer_params["visual_attention"]
    print(f"β = {beta}: {response.choices[0].message.content}")
    print(f"    VARS {score['ratio']:.3f}, VAS {score['vas']:.3f}", end=", ")
    print(f"attention to the image {score['visual_mass']:.1%}, to the system prompt {score['system_mass']:.1%}")
    print("    visual / system of each token:", *(f"{ratio:.2f}" for ratio in score["tokens"]))
