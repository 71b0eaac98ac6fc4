#!/bin/sh
# Judges Circle files with tools that circlet shares no code with: TICO's verifier and its reference runtime.
#
#   scripts/check_with_tico.sh DIRECTORY [--codes FILE.safetensors] [--max-steps N] [--onert]
#
# The first run sets up a Python environment of about 6 GB from the package index (TICO depends on PyTorch) in
# CIRCLET_TICO_ENV, by default .tico-env in the temporary directory. PIP_ARGS is handed to pip, for instance to name an
# index with CPU-only packages.
set -eu

if [ $# -lt 1 ] || [ ! -d "$1" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

scripts=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
environment=${CIRCLET_TICO_ENV:-${TMPDIR:-/tmp}/.tico-env}

# The marker comes last, so that an interrupted installation is taken up again.
if [ ! -e "$environment/complete" ]; then
  echo "setting up $environment (once)" >&2
  python3 -m venv "$environment"
  # shellcheck disable=SC2086
  "$environment/bin/pip" install --quiet ${PIP_ARGS:-} tico==0.3.0 circle-schema==0.10.1 onert==0.1.0 numpy
  touch "$environment/complete"
fi
exec "$environment/bin/python" "$scripts/check_with_tico.py" "$@"
