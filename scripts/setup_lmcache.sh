#!/usr/bin/env bash
# Build the benchmark-only environment that holds LMCache beside the project's own vLLM.
#
# LMCache's pins clash with vLLM's (numpy, protobuf, ...), so it gets a venv of its own: its packages
# are installed there without their dependencies, and a .pth file lends it everything else from the
# project's venv. Nothing is installed into the project's venv.
#
#   scripts/setup_lmcache.sh [--force]
#
# Environment: KVOFFLOAD_VENV (default .venv) and KVOFFLOAD_LMCACHE_VENV (default .venv-lmcache).
set -euo pipefail
cd "$(dirname "$0")/.."

main="${KVOFFLOAD_VENV:-.venv}"
venv="${KVOFFLOAD_LMCACHE_VENV:-.venv-lmcache}"

if [[ ! -x "$main/bin/python" ]]; then
    echo "setup_lmcache: no Python in $main; run scripts/setup.sh first" >&2
    exit 1
fi
if [[ "${1:-}" == "--force" ]]; then
    rm -rf "$venv"
fi
if [[ ! -x "$venv/bin/python" ]]; then
    "$main/bin/python" -m venv --without-pip "$venv"
fi

site="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
lent="$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
# addsitedir, not a bare path: .pth files of the lent venv (editable installs) must count as well.
echo "import site; site.addsitedir('$lent')" > "$site/kvoffload_main_venv.pth"

"$main/bin/python" -m pip --python "$venv/bin/python" install --quiet --no-deps \
    --disable-pip-version-check -r requirements/lmcache.txt

LMCACHE_TRACK_USAGE=false "$venv/bin/python" - <<'PY'
import importlib.metadata as metadata

import lmcache  # noqa: F401  (the import itself is the check)
import vllm

print(f"lmcache {metadata.version('lmcache')} beside vllm {vllm.__version__}")
PY
