#!/usr/bin/env python3
"""Record what every operator of a Circle file computes in TICO's reference runtime (FAKE_QUANTIZE mode).

  record_trace.py UNIT.circle UNIT.safetensors OUT.safetensors

UNIT.safetensors holds the graph inputs as in.K. OUT.safetensors gets op.I.J, output J of operator I, as int16 codes.
Run it with the Python of the environment that scripts/check_with_tico.sh sets up; it made the *.trace.safetensors.xz of
tests/data/golden.
"""
import json
import os
import struct
import sys
import warnings

warnings.filterwarnings("ignore")
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import check_circle
from tico.circle.runtime import CircleReferenceRuntime, ExecutionMode


def codes(values, tensor):
    scale, zero_point = np.float32(tensor.quantization.scale[0]), tensor.quantization.zero_point[0]
    found = np.rint(values.astype(np.float64) / scale).astype(np.int64) + zero_point
    back = (found.astype(np.float32) - np.float32(zero_point)) * scale
    if not np.array_equal(back, values) or abs(found).max() > 32768:
        sys.exit(f"{tensor.name}: values off the tensor's grid, or not int16")
    return np.ascontiguousarray(found, np.int16)


def write_safetensors(path, arrays, metadata):
    header, offset = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "I16", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())


def main():
    circle, inputs, out = sys.argv[1:]
    runtime = CircleReferenceRuntime(open(circle, "rb").read())
    given = check_circle.st_read(inputs)
    result = runtime.run([given[f"in.{k}"] for k in range(len(runtime.input_tensors))],
                         mode=ExecutionMode.FAKE_QUANTIZE, trace=True)
    arrays = {}
    for i, operator in enumerate(runtime.program.operators):
        for j, tensor in enumerate(operator.outputs):
            arrays[f"op.{i}.{j}"] = codes(np.asarray(result.tensor_values[tensor]), runtime.program.tensor(tensor))
    write_safetensors(out, arrays, {"made_with": "tico 0.3.0, CircleReferenceRuntime, FAKE_QUANTIZE"})


main()
