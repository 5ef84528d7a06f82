#!/usr/bin/env bash
# AVAR end to end, in miniature, on two CPU cores: data, cold start without and with AGTO, GRPO with VARS, report.
#   bash recipes/avar_tiny_cpu.sh [--dry-run] [--stages data,coldstart,…] [--out DIR] [key=value …]
exec bash "$(dirname "${BASH_SOURCE[0]}")/start.sh" cpu avar_tiny_cpu "$@"
