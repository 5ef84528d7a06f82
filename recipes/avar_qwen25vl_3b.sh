#!/usr/bin/env bash
# AVAR on Qwen2.5-VL-3B, 4 GPUs; settings and what it needs: avar_qwen25vl_3b.yaml, README.md.
#   bash recipes/avar_qwen25vl_3b.sh [--dry-run] [--stages data,coldstart_agto,…] [--out DIR] [key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" gpu avar_qwen25vl_3b "$@"
