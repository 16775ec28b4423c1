#!/usr/bin/env bash
# Builds and runs the native tests under sanitizers.
#   run.sh [address|thread|none] [build directory]     default: address (with undefined)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
kind="${1:-address}"
build="${2:-$(mktemp -d)}"
case "$kind" in
  address) flags="-fsanitize=address,undefined -fno-sanitize-recover=all" ;;
  thread) flags="-fsanitize=thread -Wno-tsan" ;;  # scatter has a stand-alone fence
  none) flags="" ;;
  *) echo "run.sh: unknown kind '$kind' (address, thread, none)" >&2; exit 2 ;;
esac
[ $# -ge 2 ] || trap 'rm -rf "$build"' EXIT
mkdir -p "$build"
# shellcheck disable=SC2086  # flags are words
"${CXX:-g++}" -std=c++20 -g -O1 -Wall -Wextra $flags -o "$build/native_test" "$here/native_test.cpp" \
  "$here"/../arena.cpp "$here"/../checksum.cpp "$here"/../isa_*.cpp "$here"/../copy*.cpp -pthread
TSAN_OPTIONS="halt_on_error=1" "$build/native_test"
