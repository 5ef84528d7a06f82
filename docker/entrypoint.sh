#!/usr/bin/env bash
# What a container of the images runs:
#   IMAGE [doctor [arguments]]         is everything there and the plugin active?
#   IMAGE recipe NAME [arguments]      recipes/NAME.sh, which has a recipes/NAME.yaml beside it
#   IMAGE shell [arguments]            bash
#   IMAGE avar COMMAND [arguments]     the command line: vas, intervene, correlate, serve, report
#   IMAGE ray COMMAND [arguments]      a node of a Ray cluster
# Each replaces this script, so that a signal reaches the program itself.
set -euo pipefail
recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")/../recipes" && pwd)

fail() { printf 'entrypoint: %s\n' "$1" >&2; exit 2; }

names() {
    local path
    for path in "$recipes"/*.yaml; do
        path=${path%.yaml}
        [ ! -f "$path.sh" ] || printf ' %s' "${path##*/}"
    done
}

word=${1:-doctor}
[ $# -eq 0 ] || shift
case $word in
doctor) exec avar doctor "$@" ;;
recipe)
    [ $# -gt 0 ] || fail "recipe needs a name; there are:$(names)"
    name=$1
    shift
    [[ $name =~ ^[A-Za-z0-9_-]+$ && -f $recipes/$name.sh && -f $recipes/$name.yaml ]] ||
        fail "no recipe '$name'; there are:$(names)"
    exec bash "$recipes/$name.sh" "$@"
    ;;
shell) exec bash "$@" ;;
avar | ray) exec "$word" "$@" ;;
*) fail "unknown word '$word'; use doctor, recipe NAME, shell, avar COMMAND or ray COMMAND" ;;
esac
