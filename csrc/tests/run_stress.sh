#!/usr/bin/env bash
# Builds the chunk store's stress test under TSan and runs it on both I/O engines.
#   run_stress.sh [thread|address|none] [seconds]     default: thread, 12
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
kind="${1:-thread}"
case "$kind" in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS" ;;
  thread) flags="-fsanitize=thread -Wno-tsan" ;;
  none) flags="" ;;
  *) echo "run_stress.sh: unknown kind '$kind' (thread, address, none)" >&2; exit 2 ;;
esac
# In memory where files can be: more happens at once.
base="${TMPDIR:-}"
[[ -z $base && -w /dev/shm ]] && base=/dev/shm
work="$(mktemp -d ${base:+-p "$base"})"
trap 'rm -rf "$work"' EXIT
cxx="${CXX:-g++}"
uring="-DKVO_NO_URING"
if printf '#include <liburing.h>\nint f = IORING_SETUP_DEFER_TASKRUN; int main() {}\n' |
  "$cxx" -x c++ -o "$work/probe" - -luring 2>/dev/null; then
  uring="-luring"
fi
# shellcheck disable=SC2086  # flags are words
printf '%s\n' "$here/stress_store.cpp" "$here"/../store*.cpp "$here"/../key_index.cpp \
  "$here"/../arena.cpp "$here"/../checksum.cpp "$here"/../isa_*.cpp |
  xargs -P 2 -I{} sh -c 'o="$0/$(basename "$1" .cpp).o"; shift; exec "$@" -o "$o"' \
    "$work" {} "$cxx" -std=c++20 -g -O1 -Wall -Wextra $flags "${uring/-luring/-pthread}" -c {}
# shellcheck disable=SC2086
"$cxx" $flags -o "$work/stress_store" "$work"/*.o -pthread "${uring/-DKVO_NO_URING/-pthread}"
# See run_store.sh.
echo 'race:io_uring_' >"$work/tsan"
TSAN_OPTIONS="halt_on_error=1 suppressions=$work/tsan" timeout 120 \
  "$work/stress_store" "$work/data" "${2:-12}"
