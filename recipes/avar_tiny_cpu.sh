#!/usr/bin/env bash
# AVAR end to end, in miniature, on two CPU cores: data, cold start without and with AGTO, GRPO with VARS, report.
#   bash recipes/avar_tiny_cpu.sh [--stages data,coldstart,…] [--out DIR] [key=value …]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(bash "$here/bootstrap.sh" cpu)
exec "$venv/bin/python" "$here/run.py" "$here/avar_tiny_cpu.yaml" "$@"
