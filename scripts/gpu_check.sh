#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network, in under nine minutes: build, device tests,
# copy rates, equality of outputs, time to first token, overhead, memory checker. See docs/gpu.md.
#
#   scripts/gpu_check.sh [--out DIR] [--dry-run] [--quick]
#
# --out DIR   folder of result.json, table.txt, gpu_check.log and plots (default: .cache/gpu-check)
# --dry-run   the same stages without a GPU: CPU copies, a tiny model, short prompts; under six minutes
# --quick     shorter prompts and fewer repeats
#
# PYTHON names the interpreter (default: python3 on PATH if that has vLLM, else that of .venv); vLLM and
# torch are taken from where it finds them, PYTHONPATH included. Nothing is installed or downloaded. Exit
# status 0: every stage passed.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 2
PY=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && ! python3 -c "import vllm" 2>/dev/null; then
    PY=.venv/bin/python # what setup.sh made
fi
command -v "$PY" >/dev/null || { echo "gpu_check: no $PY: set PYTHON=/path/to/python3" >&2; exit 2; }
export PYTHONUNBUFFERED=1
exec "$PY" scripts/gpu_check.py "$@"
