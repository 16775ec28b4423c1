#!/usr/bin/env bash
# Show kvoffload on this machine: a real vLLM server, long prompts, time to first token cold, on an HBM
# hit, reloaded from DRAM, and reloaded from NVMe after a restart. About 5 minutes on two cores after
# the downloads.
#
#   scripts/demo.sh [--prompts N] [--tokens N] [--system kvoffload|none] ...   (scripts/demo.py --help)
#
# Everything stays inside this folder: .venv, .cache (packages, model) and demo-out (store, logs, result). Only
# Debian packages that the build needs and that are missing are installed for all, and only for root (setup.sh).
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
OUT=$ROOT/demo-out
CHILD=
SHORT_TMP=

kill_server() { # the server has a process group of its own; its leader is written down by demo.py
    local group
    group=$(cat "$OUT/server.pid" 2>/dev/null) || return 0
    kill -KILL -- "-$group" 2>/dev/null
    rm -f "$OUT/server.pid"
}

cleanup() {
    trap - INT TERM HUP EXIT
    if [[ -n $CHILD ]] && kill -TERM -- "-$CHILD" 2>/dev/null; then
        echo "stopping ..." >&2
        wait "$CHILD" 2>/dev/null
        kill -KILL -- "-$CHILD" 2>/dev/null
    fi
    kill_server
    [[ -n $SHORT_TMP ]] && rm -rf "$SHORT_TMP"
    rm -rf "$OUT/tmp" "$OUT/home"
}
# Background + wait: bash runs a trap during `wait`, but only after a foreground command has ended.
# A session of its own, so that everything a step started can be stopped as one group.
step() {
    local rc
    setsid "$@" </dev/null 8>&- &
    CHILD=$!
    wait "$CHILD"
    rc=$?
    CHILD=
    return "$rc"
}

mkdir -p "$OUT" .cache || exit 1
exec 8>.cache/demo.lock
flock -n 8 || { echo "another demo runs in this folder" >&2; exit 1; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
# A server left over by an earlier run that got SIGKILL; its number may be somebody else's by now.
if grep -qs api_server "/proc/$(cat "$OUT/server.pid" 2>/dev/null)/cmdline"; then
    kill_server
fi
rm -f "$OUT/server.pid"
mkdir -p "$OUT/tmp" "$OUT/home" || exit 1
export PIP_CACHE_DIR=$ROOT/.cache/pip UV_CACHE_DIR=$ROOT/.cache/uv
export TMPDIR=$OUT/tmp
step bash scripts/setup.sh || exit 1
step .venv/bin/python scripts/fetch_demo_model.py >"$OUT/tmp/model" || exit 1
MODEL=$(<"$OUT/tmp/model")

# vLLM's unix sockets live in TMPDIR and a socket path has 107 characters at most.
if ((${#TMPDIR} > 60)); then
    SHORT_TMP=$(TMPDIR=/tmp mktemp -d -t kvo-demo.XXXXXX) || exit 1
    export TMPDIR=$SHORT_TMP
fi
export HOME=$OUT/home XDG_CACHE_HOME=$ROOT/.cache/xdg XDG_CONFIG_HOME=$OUT/home/config
export VLLM_CACHE_ROOT=$ROOT/.cache/vllm VLLM_CONFIG_ROOT=$OUT/home/vllm
export TORCHINDUCTOR_CACHE_DIR=$ROOT/.cache/inductor TRITON_CACHE_DIR=$ROOT/.cache/triton
export NUMBA_CACHE_DIR=$ROOT/.cache/numba HF_HOME=$ROOT/.cache/hf
export PYTHONDONTWRITEBYTECODE=1
step .venv/bin/python scripts/demo.py --out "$OUT" --model "$MODEL" "$@"
