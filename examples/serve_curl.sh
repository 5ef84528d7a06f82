#!/bin/sh
# One question about an image, asked of a running `avar serve` with curl, under a bias of attention to the image.
#
# sh examples/serve_curl.sh [URL]        the server: verl_avar/rollout/SERVING.md

url=${1:-http://127.0.0.1:8010}
image=$(base64 < "$(dirname "$0")/scene.png" | tr -d '\n')

curl --silent --show-error "$url/v1/chat/completions" -H 'Content-Type: application/json' -d @- <<JSON | python3 -m json.tool
{
  "model": "miniature",
  "messages": [
    {"role": "system", "content": "You are a careful assistant. Look at the image, think, then answer."},
    {"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,$image"}},
      {"type": "text", "text": "What colour is the triangle?"}
    ]}
  ],
  "max_tokens": 48,
  "temperature": 0,
  "vllm_xargs": {"visual_bias": 1.0}
}
JSON
