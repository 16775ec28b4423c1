#!/usr/bin/env bash
# Builds the fuzzer of the chunk store's files under ASan and UBSan and runs it, every second case with
# io_uring where that is there.
#   run_fuzz.sh [cases] [first case] [seconds per case]     default: 2000, 0, 5
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Small directories, thousands of times: in memory where files can be.
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
"$cxx" -std=c++20 -g -O1 -Wall -Wextra \
  -fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS \
  -o "$work/fuzz_store" "$here/fuzz_store.cpp" "$here/fuzz_mutations.cpp" "$here"/../store*.cpp \
  "$here"/../key_index.cpp "$here"/../arena.cpp "$here"/../checksum.cpp "$here"/../isa_*.cpp -pthread "$uring"
ASAN_OPTIONS="allocator_may_return_null=0" "$work/fuzz_store" "$work/data" "${@:-2000}"
