#!/usr/bin/env bash
# The test command: makes the environment, lints, then unit tests, then the real verl, Ray and vLLM on the CPU.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(bash "$root/recipes/bootstrap.sh" cpu)
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
if [ $# -gt 0 ]; then exec "$venv/bin/python" -m pytest --durations=10 "$@"; fi
status=0
# Unit tests side by side, a file in one process; the others use all of the machine.
"$venv/bin/python" -m pytest --durations=10 -n 2 --dist loadfile tests/unit || status=$?
"$venv/bin/python" -m pytest --durations=10 tests/integration tests/gpu || status=$?
exit $status
