#!/usr/bin/env bash
# AVAR on Qwen3-VL-8B, one or two nodes of 8 GPUs; settings and what it needs: avar_qwen3vl_8b.yaml, README.md.
#   bash recipes/avar_qwen3vl_8b.sh [--dry-run] [--stages data,coldstart_agto,…] [--out DIR] [nodes=2] [key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" gpu avar_qwen3vl_8b "$@"
