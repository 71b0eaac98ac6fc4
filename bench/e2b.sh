#!/usr/bin/env bash
# A full E2B on this machine: writes a random checkpoint of its shape (10 GB), quantizes it with 8 samples of 2048 tokens
# and 2 pictures, and verifies the files; prints times, matrix products and the peak of the process's own memory. Takes
# 25 GB of disk in DIR and half an hour on two cores. Further arguments go to `circlet quantize`.
#   bench/e2b.sh DIR [--compute bf16] [--random-samples 128x2048] ...
set -euo pipefail
dir=$1
shift
circlet=${CIRCLET:-$(dirname "$0")/../build/circlet}
mkdir -p "$dir"
[ -f "$dir/e2b/config.json" ] || "$circlet" make-checkpoint --preset e2b --seed 1 "$dir/e2b"

# Runs a command and prints the largest amount of memory of its own, without pages of mapped files.
watched() {
  "$@" &
  local pid=$! peak=0 own
  while kill -0 "$pid" 2>/dev/null; do
    own=$(awk '/^Anonymous:/ {print $2}' "/proc/$pid/smaps_rollup" 2>/dev/null || true)
    if [ "${own:-0}" -gt "$peak" ]; then peak=$own; fi
    sleep 0.2
  done
  wait "$pid"
  echo "peak of the process's own memory: $((peak / 1024)) MiB"
}

data=(--random-samples 8x2048 --random-images 2)
for argument in "$@"; do
  if [ "$argument" = --random-samples ] || [ "$argument" = --data ] || [ "$argument" = --samples ]; then data=(); fi
done
"$circlet" quantize "$dir/e2b" "${data[@]}" --output "$dir/out" --dry-run "$@" | tail -3
watched "$circlet" quantize "$dir/e2b" "${data[@]}" --output "$dir/out" --timings --force "$@"
du -sh "$dir/out"
time watched "$circlet" verify "$dir/out"
