#!/usr/bin/env bash
# The fault tests at length (some ten minutes): over 200 kills anywhere, also inside --force, --resume and the final
# rename, over 100 failing calls and 20 full disks (the last as root only). scripts/test.sh runs a few of each.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCIRCLET_TESTS=ON >/dev/null
cmake --build build --target fault_test
CIRCLET_FAULT_ROUNDS=${1:-11} build/fault_test
