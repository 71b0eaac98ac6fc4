#!/bin/sh
# Measures the figures that BoundsOf is made of and writes src/smoke/measured.inc: every case of the given profiles in
# every built-in recipe. To be run after a change that is meant to move them, and looked at before it is committed.
#
#   scripts/smoke_bounds.sh build/circlet tiny [e2b_dims ...]
set -eu
circlet=$1
shift
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
for profile in "$@"; do
  for recipe in default w8a16 w4a16 w8a8 smoke-u8 mixed8; do
    "$circlet" inspect --case all --profile "$profile" --recipe "$recipe" --report-json "$directory/report.json" \
      > /dev/null || true
    jq -r '.cases[] | select(.metrics.mean_abs_diff != null) |
      "{\"\(.case)\", \"\(.profile)\", \"\(.recipe)\", \(.metrics.mean_abs_diff), \(.metrics.peir)},"' \
      "$directory/report.json"
  done
done > "$directory/measured.inc"
mv "$directory/measured.inc" "$(dirname "$0")/../src/smoke/measured.inc"
