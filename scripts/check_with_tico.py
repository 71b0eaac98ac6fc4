#!/usr/bin/env python3
"""Run every Circle file of a directory through TICO: structure, verifier, reference runtime in FAKE_QUANTIZE mode.

  check_with_tico.py DIRECTORY [--codes FILE.safetensors] [--max-steps N] [--onert]

Prints one line a file: did the checks pass, did the runtime run it, and how far its outputs are from the recorded ones,
in codes of the output's grid (largest difference, share of values that differ).

Recorded inputs and outputs come from --codes or DIRECTORY/verify.safetensors (keys UNIT.in.K and UNIT.out.K; one that
equals another is named in the metadata), or from UNIT.safetensors beside the file (keys in.K and out.K). Files without
get seeded random inputs and are only run. A rank-2 RMS_NORM, which the runtime refuses, is run as rank 3.

Exit code 0: every check passed, every file ran, no output further than --max-steps (default: no limit). Where codes
are recorded, or --max-steps asks for them, at least one file must have been compared.
Needs what scripts/check_with_tico.sh installs.
"""
import argparse
import json
import os
import struct
import sys
import warnings

warnings.filterwarnings("ignore")
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import check_circle

COLUMNS = ("file", "structure", "verify", "fake-quantize", "max codes apart", "values apart", "note")
RANK2 = "tico and onert take 3 or 4"  # how check_circle.py words it


def unit_of(path):
    name = os.path.basename(path).removesuffix(".circle")
    return name.removesuffix(".q")


def recorded(path):
    """Arrays of a safetensors file, those named only in the metadata included."""
    arrays = check_circle.st_read(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    for name, same in header.get("__metadata__", {}).items():
        if same in arrays:
            arrays[name] = arrays[same]
    return arrays


def numbered(arrays, prefix, count):
    found = [arrays.get(f"{prefix}{k}") for k in range(count)]
    return None if any(x is None for x in found) else found


def accept_rank2_rms_norm():
    from tico.circle.runtime.kernels import nn
    kernel = nn._rms_norm

    class OneMoreAxis:
        def __init__(self, context):
            self.context = context

        def __getattr__(self, name):
            return getattr(self.context, name)

        def input(self, position):
            value = self.context.input(position)
            return value[None] if position == 0 else value

    def rms_norm(context):
        if context.input(0).ndim != 2:
            return kernel(context)
        return tuple(output[0] for output in kernel(OneMoreAxis(context)))

    nn._rms_norm = rms_norm


def codes(values, tensor):
    """Float values of a quantized tensor as codes; anything else as it is."""
    if not check_circle.isq(tensor) or values.dtype.kind != "f":
        return values
    return np.rint(values.astype(np.float64) / tensor.scale[0]) + tensor.zp[0]


def verify(path, model):
    """What check_circle.py's own checks and what TICO's verifier find wrong."""
    from tico.circle.document import CircleDocument
    errors, _ = check_circle.structure(model)
    report = CircleDocument.load(path).verify(raise_on_error=False)
    return [e for e in errors if RANK2 not in e], [e.format() for e in report.errors]


def compare(model, outputs, expected):
    """Largest difference, in codes where quantized, and the share of values that differ."""
    largest, different, total = 0.0, 0, 0
    if not len(outputs) == len(expected) == len(model.outputs):
        raise ValueError(f"{len(outputs)} outputs, {len(expected)} are recorded, the file has {len(model.outputs)}")
    for index, output, want in zip(model.outputs, outputs, expected):
        tensor = model.tensors[index]
        output, want = codes(output, tensor), codes(want, tensor)
        if output.size != want.size:
            raise ValueError(f"output {index} has shape {output.shape}, recorded is {want.shape}")
        distance = np.abs(output.reshape(-1).astype(np.float64) - want.reshape(-1).astype(np.float64))
        # A NaN is further away than anything, unless a NaN is recorded.
        both = np.isnan(output.reshape(-1).astype(np.float64)) & np.isnan(want.reshape(-1).astype(np.float64))
        distance = np.where(np.isnan(distance), np.where(both, 0, np.inf), distance)
        largest = max(largest, float(distance.max(initial=0)))
        different += int((distance > 0).sum())
        total += distance.size
    return largest, different / max(total, 1)


def check(path, shared, args):
    """One row of the table and whether it is good."""
    row = dict.fromkeys(COLUMNS, "-") | {"file": os.path.basename(path), "note": ""}
    model = check_circle.Model(open(path, "rb").read())
    structure, verifier = verify(path, model)
    row["structure"] = "pass" if not structure else "FAIL"
    row["verify"] = "pass" if not verifier else "FAIL"
    row["note"] = "; ".join((structure + verifier)[:1])
    good = not structure and not verifier
    unit = unit_of(path)
    arrays, prefix = shared, unit + "."
    beside = os.path.join(os.path.dirname(path), unit + ".safetensors")
    if unit + ".out.0" not in arrays and os.path.exists(beside):
        arrays, prefix = recorded(beside), ""
    inputs = numbered(arrays, prefix + "in.", len(model.inputs))
    expected = numbered(arrays, prefix + "out.", len(model.outputs)) if inputs is not None else None
    if inputs is None:
        inputs = check_circle.random_inputs(model, 0)
        row["note"] = "; ".join(filter(None, [row["note"], "random inputs"]))
    try:
        outputs = check_circle.run_tico(path, model, inputs, fake=True)
        row["fake-quantize"] = "pass"
        if args.onert:
            check_circle.run_onert(path, model, inputs)
    except Exception as error:
        row["fake-quantize"] = "FAIL"
        row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row, False
    if expected is None:
        row["note"] = "; ".join(filter(None, [row["note"], "not compared"]))
        return row, good
    largest, apart = compare(model, outputs, expected)
    row["max codes apart"], row["values apart"] = f"{largest:g}", f"{apart:.3%}"
    if args.max_steps is not None and largest > args.max_steps:
        row["note"] = f"more than {args.max_steps:g} codes apart"
        good = False
    return row, good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--codes", help="recorded inputs and outputs, keys UNIT.in.K and UNIT.out.K")
    parser.add_argument("--max-steps", type=float, help="largest accepted difference in codes")
    parser.add_argument("--onert", action="store_true", help="run each file in onert too (float files)")
    args = parser.parse_args()
    files = sorted(os.path.join(args.directory, f) for f in os.listdir(args.directory) if f.endswith(".circle"))
    if not files:
        sys.exit(f"{args.directory}: no .circle files")
    default = os.path.join(args.directory, "verify.safetensors")
    source = args.codes or (default if os.path.exists(default) else None)
    shared = recorded(source) if source else {}
    accept_rank2_rms_norm()
    width = max(len(os.path.basename(f)) for f in files)

    def show(row):
        cells = [f"{row['file']:{width}}"] + [f"{row[c]:>{len(c)}}" for c in COLUMNS[1:-1]] + [row["note"]]
        print("  ".join(cells).rstrip(), flush=True)

    show({c: c for c in COLUMNS})
    failed = compared = 0
    for path in files:
        try:
            row, good = check(path, shared, args)
        except Exception as error:
            row = dict.fromkeys(COLUMNS, "-") | {"file": os.path.basename(path), "structure": "FAIL",
                                                 "note": f"{type(error).__name__}: {error}"}
            good = False
        failed += not good
        compared += row["max codes apart"] != "-"
        show(row)
    print(f"{len(files) - failed} of {len(files)} files passed, {compared} compared")
    if compared == 0 and (source or args.max_steps is not None):
        print("nothing was compared: no recorded key fits a file", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
