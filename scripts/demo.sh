#!/usr/bin/env bash
# Installs what is missing, builds build/circlet, quantizes the bundled trained checkpoint and checks the files it wrote.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/packages.sh
install_missing "${packages[@]}"
cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCIRCLET_TESTS=OFF >/dev/null
cmake --build build --target circlet_cli
out=$(mktemp -d)/tiny-gemma4-w8a16
build/circlet quantize examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16 \
  --eval-text examples/tiny-gemma4/eval/heldout.txt --eval-windows 20 --output "$out"
build/circlet verify "$out"
