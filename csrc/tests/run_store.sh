#!/usr/bin/env bash
# Builds and runs the chunk store's native test under sanitizers.
#   run_store.sh [address|thread|none] [rounds of the hostile-file test]   default: address, 60
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
kind="${1:-address}"
case "$kind" in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS" ;;
  thread) flags="-fsanitize=thread -Wno-tsan" ;;
  none) flags="" ;;
  *) echo "run_store.sh: unknown kind '$kind' (address, thread, none)" >&2; exit 2 ;;
esac
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# As in setup.py: without liburing the io_uring engine is left out, and its tests say so.
cxx="${CXX:-g++}"
uring="-DKVO_NO_URING"
if printf '#include <liburing.h>\nint f = IORING_SETUP_DEFER_TASKRUN; int main() {}\n' |
  "$cxx" -x c++ -o "$work/probe" - -luring 2>/dev/null; then
  uring="-luring"
fi
# shellcheck disable=SC2086  # flags are words
"$cxx" -std=c++20 -g -O1 -Wall -Wextra $flags -o "$work/test_store" \
  "$here/test_store.cpp" "$here/test_store_engine.cpp" "$here/test_store_forged.cpp" \
  "$here/test_store_parts.cpp" "$here/test_key_index.cpp" "$here"/../store*.cpp "$here"/../key_index.cpp "$here"/../arena.cpp \
  "$here"/../checksum.cpp "$here"/../isa_*.cpp -pthread "$uring"
# liburing maps and unmaps its queues with system calls that TSan does not see: where a new ring gets the
# address of an old one, it takes the two for one memory. Only accesses inside liburing's own (inline)
# functions are left out; what goes through the queues is handed over under our locks.
echo 'race:io_uring_' >"$work/tsan"
TSAN_OPTIONS="halt_on_error=1 suppressions=$work/tsan" "$work/test_store" "$work/data" "${2:-60}"
