#!/usr/bin/env bash
# AVAR on Qwen2.5-VL-7B on Megatron, one or two nodes of 8 GPUs; settings and what it needs: avar_qwen25vl_7b_megatron.yaml.
#   bash recipes/avar_qwen25vl_7b_megatron.sh [--dry-run] [--stages data,coldstart_agto,…] [--out DIR] [nodes=2] [key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" megatron avar_qwen25vl_7b_megatron "$@"
