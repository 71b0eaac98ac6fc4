#!/bin/sh
# Measures the figures that BoundsOf is made of: every case of the given profiles in every built-in recipe. Replaces
# their rows in src/smoke/measured.inc. To be run after a change that is meant to move them, and looked at before it is
# committed. On two cores tiny takes seconds, e2b_dims two minutes and e2b_static_runtime half an hour.
#
#   scripts/smoke_bounds.sh build/circlet tiny [e2b_dims] [e2b_static_runtime]
set -eu
circlet=$1
shift
list=$(dirname "$0")/../src/smoke/measured.inc
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
for profile in "$@"; do
  for recipe in default w8a16 w4a16 w8a8 smoke-u8 mixed8; do
    # Exit code 1: a figure is outside its old bounds.
    "$circlet" smoke --case all --profile "$profile" --recipe "$recipe" --report-json "$directory/report.json" \
      > "$directory/log" || [ $? -eq 1 ]
    jq -r '.cases[] | select(.metrics.mean_abs_diff != null) |
      "{\"\(.case)\", \"\(.profile)\", \"\(.recipe)\", \(.metrics.mean_abs_diff), \(.metrics.peir)},"' \
      "$directory/report.json" >> "$directory/$profile"
  done
done
for profile in tiny e2b_dims e2b_static_runtime; do
  if [ -f "$directory/$profile" ]; then
    cat "$directory/$profile"
  else
    grep "\"$profile\"" "$list" || true
  fi
done > "$directory/measured.inc"
mv "$directory/measured.inc" "$list"
