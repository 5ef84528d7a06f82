#!/usr/bin/env bash
# The ablation ladder of AVAR on Qwen2.5-VL-7B as one sweep: avar_ablation.yaml.
#   bash recipes/avar_ablation.sh [--dry-run] [--out DIR] [nodes=2] [key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" gpu avar_ablation "$@"
