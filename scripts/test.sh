#!/usr/bin/env bash
# Everything that can be checked without a GPU: lint, types, layers, C++ sanitizers, all test suites, and
# the end-to-end tests on a real vLLM. Under 20 minutes on two cores.
#
#   scripts/test.sh [--quick] [--no-setup] [pytest arguments such as -k NAME, -x]
#
# --quick     leaves out the end-to-end tests and the packaging test
# --no-setup  uses .venv as it is
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
QUICK=0
SETUP=1
PYTEST_ARGS=()
for arg in "$@"; do
    case $arg in
        --quick) QUICK=1 ;;
        --no-setup) SETUP=0 ;;
        *) PYTEST_ARGS+=("$arg") ;;
    esac
done
BIN=$ROOT/.venv/bin
LOGS=$ROOT/.cache/test-logs
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
STARTED=$SECONDS
FAILED=()
SUMMARY=()
REASONS=()

step() { # step NAME COMMAND...: run it, show and keep its output, remember how it went
    local name=$1 begin=$SECONDS status word
    shift
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee "$LOGS/$name.log"
    status=${PIPESTATUS[0]}
    word=ok
    if [[ $status -ne 0 ]]; then
        word="FAILED ($status)"
        FAILED+=("$name")
        REASONS+=("$(why "$LOGS/$name.log")")
    fi
    SUMMARY+=("$(printf '%-14s %-12s %4d s  %s' "$name" "$word" $((SECONDS - begin)) "$(pytest_line "$LOGS/$name.log")")")
}

why() { # why LOG: the tests that failed, each in a line, or else the last lines of the step
    grep -E '^(FAILED|ERROR) ' "$1" || tail -n 20 "$1"
}

pytest_line() { sed -n 's/^=* *\([0-9]\+ .* in [0-9.]\+s.*\)$/\1/p' "$1" | tail -n 1 | tr -d '='; }

suite() { # suite NAME MARKERS PATHS...: one pytest run; "no tests" (5) is fine when -k chose none
    local name=$1 markers=$2 paths=() path
    shift 2
    for path in "$@"; do [[ -d $path ]] && paths+=("$path"); done
    [[ ${#paths[@]} -gt 0 ]] && step "$name" run_pytest "$markers" "${paths[@]}"
}

run_pytest() {
    local markers=$1 status
    shift
    "$BIN/python" -m pytest -m "$markers" --durations=10 --durations-min=5 "${PYTEST_ARGS[@]}" "$@"
    status=$?
    [[ $status -eq 5 ]] && status=0
    return "$status"
}

cpp_format() {
    find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' | sort \
        | xargs -r "$BIN/clang-format" --dry-run -Werror
}

if [[ $SETUP == 1 ]]; then
    bash scripts/setup.sh || exit 1
fi
mkdir -p "$LOGS"
step ruff "$BIN/ruff" check .
step ruff-format "$BIN/ruff" format --check .
step mypy "$BIN/mypy"
step layers "$BIN/python" scripts/check_layers.py
[[ -d csrc ]] && step clang-format cpp_format
for script in csrc/tests/run*.sh; do
    [[ -f $script ]] && step "cpp-$(basename "$script" .sh)" bash "$script"
done
ONE_AT_A_TIME=("${PYTEST_ARGS[@]}")
PYTEST_ARGS+=(-n 2)
suite unit "not e2e and not e2e_real and not gpu and not stress and not packaging" \
    tests/unit tests/model tests/fault tests/contract
PYTEST_ARGS=("${ONE_AT_A_TIME[@]}")
if [[ $QUICK == 0 ]]; then
    suite packaging packaging tests
    # Two engines at a time: most of an engine's start is one thread that imports. A module's tests stay
    # together, in order.
    PYTEST_ARGS+=(-n 2 --dist loadfile)
    suite e2e "(e2e or e2e_real) and not gpu and not stress" tests/e2e
fi

printf '\n== summary\n'
printf '%s\n' "${SUMMARY[@]}"
printf 'total %d s\n' $((SECONDS - STARTED))
if [[ ${#FAILED[@]} -gt 0 ]]; then
    printf '%s\n' "${REASONS[@]}"
    printf 'FAILED: %s\n' "${FAILED[*]}"
    exit 1
fi
echo "all passed"
