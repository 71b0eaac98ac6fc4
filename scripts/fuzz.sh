#!/usr/bin/env bash
# Builds the fuzz targets with clang and the sanitizers and lets each search from its seeds, one after the other. What
# fails is left in build-fuzz/findings/NAME; new inputs of interest in build-fuzz/corpus/NAME.
#
#   scripts/fuzz.sh SECONDS [NAME...]     NAME: json, tokenizer, ... (fuzz/NAME_fuzz.cc); all of them when none is given
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ! "${1:-}" =~ ^[0-9]+$ ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
seconds=$1
shift
. scripts/packages.sh
install_missing "${packages[@]}" "${test_packages[@]}" "${fuzz_packages[@]}"
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for source in fuzz/*_fuzz.cc; do
    name=${source#fuzz/}
    names+=("${name%_fuzz.cc}")
  done
fi

cmake -B build-fuzz -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1 -DCMAKE_C_COMPILER=clang \
  -DCMAKE_CXX_COMPILER=clang++ -DCIRCLET_FUZZ=ON -DCIRCLET_SANITIZE=ON -DCIRCLET_MPI=OFF >/dev/null
cmake --build build-fuzz --target "${names[@]/%/_fuzz}"
for name in "${names[@]}"; do
  mkdir -p build-fuzz/corpus/"$name" build-fuzz/findings/"$name"
  echo "=== $name"
  "build-fuzz/${name}_fuzz" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix=build-fuzz/findings/"$name"/ build-fuzz/corpus/"$name" fuzz/corpus/"$name"
done
