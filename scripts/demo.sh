#!/usr/bin/env bash
# Installs what is missing, builds build/circlet, quantizes the bundled trained checkpoint into out/demo and checks the
# files that were written.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8  # the report as README shows it, whatever the locale
. scripts/packages.sh
install_missing "${packages[@]}"
# A build directory that also makes the tests keeps doing so.
[ -e build/CMakeCache.txt ] || cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCIRCLET_TESTS=OFF >/dev/null
cmake --build build --target circlet_cli
set -x
build/circlet quantize examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16 \
  --eval-text examples/tiny-gemma4/eval/heldout.txt --eval-windows 20 --output out/demo --force
build/circlet verify out/demo
