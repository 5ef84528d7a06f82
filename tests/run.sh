#!/usr/bin/env bash
# The test command: makes the environment, lints, then unit tests, then the real verl, Ray and vLLM on the CPU.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$root/recipes/bootstrap.sh" cpu)
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
[ $# -gt 0 ] || set -- tests/unit tests/integration tests/gpu
exec "$venv/bin/python" -m pytest --durations=10 "$@"
