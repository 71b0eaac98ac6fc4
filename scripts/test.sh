#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test; the readers' damage tests, the fuzz corpora and the kernels' tests
# also under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C.UTF-8  # tests look at frames, which another locale has in ASCII
. scripts/packages.sh
install_missing "${packages[@]}" "${test_packages[@]}"
jobs=$(nproc)

cmake -B build-asan -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DCIRCLET_SANITIZE=ON >/dev/null
cmake --build build-asan --target sanitized -- -j "$jobs"
ctest --test-dir build-asan -L sanitized --no-tests=error --output-on-failure -j "$jobs"

cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCIRCLET_TESTS=ON >/dev/null
cmake --build build -- -j "$jobs"
ctest --test-dir build --no-tests=error --output-on-failure -j "$jobs"
