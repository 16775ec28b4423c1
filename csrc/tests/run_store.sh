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
# shellcheck disable=SC2086  # flags are words
"${CXX:-g++}" -std=c++20 -g -O1 -Wall -Wextra $flags -o "$work/test_store" "$here/test_store.cpp" \
  "$here"/../store*.cpp "$here"/../arena.cpp "$here"/../checksum.cpp "$here"/../isa_*.cpp -pthread
TSAN_OPTIONS="halt_on_error=1" "$work/test_store" "$work/data" "${2:-60}"
