#!/usr/bin/env bash
# Whether two builds write the same bytes:  scripts/same_bytes.sh BINARY_A BINARY_B [CASES]
# Every golden checkpoint, examples/tiny-gemma4 and a random e2b-short go through all built-in recipes in both dialects;
# all files are compared (times apart), and what evaluate and verify print. CASES is a regular expression that a case's
# name must match. One binary alone prints its sums; a file of such sums may stand for a binary.
# The e2b-short checkpoint (0.6 GB) is made once, in $E2B_SHORT or /tmp/circlet-e2b-short.
set -euo pipefail
export OMP_WAIT_POLICY=passive
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
cases=${3:-.}
short=${E2B_SHORT:-/tmp/circlet-e2b-short}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What one case of one binary wrote and said: "SUM  CASE/FILE", a line each.
run_case() {
  local name=$1 binary=$2 out=$work/out
  shift 2
  [[ $name =~ $cases ]] || return 0
  rm -rf "$out"
  mkdir "$out"
  # Paths and times differ from run to run and say nothing.
  local says="sed -E s/[0-9.]+[[:space:]]s//g;/written.to|matrix.products/d;s#$work##g"
  if [ "$1" = evaluate ]; then
    "$binary" "$@" --quiet 2>&1 | $says >"$out/says.txt" || echo "exit ${PIPESTATUS[0]}" >>"$out/says.txt"
  else
    "$binary" "$@" --quiet --output "$out/files" 2>&1 | $says >"$out/says.txt" ||
      echo "exit ${PIPESTATUS[0]}" >>"$out/says.txt"
    [ ! -d "$out/files" ] || "$binary" verify "$out/files" 2>&1 | tr '\r' '\n' | sed '/^verify:/d;s/verify: .*//' | $says >"$out/verify.txt" || true
  fi
  (cd "$out" && find . -type f ! -name timings.json | sort | xargs sha256sum | sed "s#  \./#  $name/#")
}

sums_of() {
  local binary=$1 model recipe dialect
  if [ ! -x "$binary" ]; then
    grep -E "  ($cases)|  [^ ]*($cases)[^ ]*/" "$binary"
    return
  fi
  binary=$(realpath "$binary")
  for model in seed_example tiny_e2b tiny_wide; do
    local golden=tests/data/golden/$model length
    length=$(sed -nE 's/^ "seq": ([0-9]+).*/\1/p' "$golden/spec.json")
    xz -dc "$golden/inputs.safetensors.xz" >"$work/$model.safetensors"
    local common=("$golden/model" --samples "$work/$model.safetensors" --max-seq-len "$length")
    for dialect in default tico; do
      for recipe in default w8a16 w4a16 w8a8 mixed8 smoke-u8; do
        run_case "$model-$recipe-$dialect" "$binary" quantize "${common[@]}" --recipe $recipe --dialect $dialect --save-stages
      done
      run_case "$model-text-$dialect" "$binary" quantize "${common[@]}" --recipe w4a16 --dialect $dialect --text-only
      run_case "$model-deployment-$dialect" "$binary" quantize "${common[@]}" --recipe w8a16 --dialect $dialect \
        --units deployment --set export.prefill_decode=false
      for granularity in layer both; do
        run_case "$model-$granularity-$dialect" "$binary" quantize "${common[@]}" --recipe w8a8 --dialect $dialect \
          --units deployment --set "export.vision.granularity=$granularity"
      done
    done
    for recipe in default w8a8 w4a16; do
      [ -e "$golden/$recipe.qparams.json.xz" ] || continue
      xz -dc "$golden/$recipe.qparams.json.xz" >"$work/$recipe.json"
      run_case "$model-$recipe-frozen" "$binary" quantize "${common[@]}" --recipe $recipe --dialect tico --qparams "$work/$recipe.json"
    done
  done
  local tiny=examples/tiny-gemma4
  local data=("$tiny" --data $tiny/eval/calib.jsonl)
  for dialect in default tico; do
    for recipe in default w8a16 w4a16 w8a8 mixed8 smoke-u8; do
      run_case "demo-$recipe-$dialect" "$binary" quantize "${data[@]}" --recipe $recipe --dialect $dialect
    done
    run_case "demo-measured-$dialect" "$binary" evaluate "${data[@]}" --recipe w4a16 --dialect $dialect \
      --eval-text $tiny/eval/heldout.txt --eval-windows 8 --eval-captions $tiny/eval/captions.jsonl
  done
  run_case demo-mx "$binary" evaluate "${data[@]}" --set "pipeline.0.linear_weight={kind: mx, elem_format: int8, axis: -1}"
  run_case demo-spilled "$binary" quantize "${data[@]}" --recipe w8a16 --memory-limit 90MB
  if grep -qm1 avx512_bf16 /proc/cpuinfo; then
    run_case demo-bf16 "$binary" quantize "${data[@]}" --recipe w8a16 --compute bf16
  fi
  if [[ short =~ $cases || short-w4a16 =~ $cases || short-default =~ $cases ]]; then
    [ -e "$short/config.json" ] || "$binary" make-checkpoint --preset e2b-short "$short" >/dev/null
    local random=("$short" --random-samples 2x96 --random-images 1)
    run_case short-w4a16 "$binary" quantize "${random[@]}" --recipe w4a16 --units all
    run_case short-default "$binary" quantize "${random[@]}" --recipe default --memory-limit 2100MB
    run_case short-tico "$binary" quantize "${random[@]}" --recipe w8a16 --dialect tico --memory-limit 2100MB
  fi
}

sums_of "$1" >"$work/a"
if [ $# -lt 2 ]; then
  cat "$work/a"
  exit
fi
sums_of "$2" >"$work/b"
if diff "$work/a" "$work/b"; then
  echo "$(wc -l <"$work/a") files of $(sed -E 's/.*  ([^/]+).*/\1/' "$work/a" | sort -u | wc -l) cases: the same bytes"
else
  echo "the two write different bytes"
  exit 1
fi
