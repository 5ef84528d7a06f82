#!/usr/bin/env bash
# What every recipe's script does: find or make the environment, then the runner with the recipe's yaml.
#   bash recipes/start.sh cpu|gpu|megatron NAME [arguments of run.py]
# A dry run takes whatever environment is there: it needs no GPU, so the CPU one will do.
set -euo pipefail
mode=$1 name=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VERL_AVAR_VENV:-$here/../.venv}
case " $* " in
*" --dry-run "*) [ -x "$venv/bin/python" ] || venv=$(bash "$here/bootstrap.sh" cpu) ;;
*) venv=$(bash "$here/bootstrap.sh" "$mode") ;;
esac
exec "$venv/bin/python" "$here/run.py" "$here/$name.yaml" "$@"
