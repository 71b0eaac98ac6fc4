#!/usr/bin/env python3
"""Greedy generation from what `circlet quantize` wrote, with NumPy alone and `circlet run` for each unit: how a host runs
the files (docs/runtime.md).

    generate.py CIRCLET OUT COUNT ID...      # ids of the prompt, from `circlet tokenize OUT --text ...`

Prints the id of each of COUNT new tokens and a hash of the logits' codes that it was chosen by."""
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TYPES = {"F32": np.float32, "I64": np.int64, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
NAMES = {np.dtype(numpy): name for name, numpy in TYPES.items()}


def read_safetensors(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()))


class Model:
    def __init__(self, circlet, out):
        self.circlet, self.out = circlet, Path(out)
        self.pipeline = json.loads((self.out / "pipeline.json").read_text())
        self.units = {unit["name"]: unit for unit in self.pipeline["units"]}
        self.tables = read_safetensors(self.out / self.pipeline["tables"])
        self.caches = {}  # by key: [1, KV, slots, h] codes

    def run(self, name, inputs):
        """The outputs of a unit as codes; masks and tables may come as float32."""
        with tempfile.TemporaryDirectory() as work:
            write_safetensors(f"{work}/in", {f"in.{k}": np.ascontiguousarray(x) for k, x in enumerate(inputs)})
            unit = self.out / self.units[name]["file"]
            subprocess.run([self.circlet, "run", unit, "--inputs", f"{work}/in", "--outputs", f"{work}/out", "--codes"],
                           check=True, stdout=subprocess.DEVNULL)
            results = read_safetensors(f"{work}/out")
        return [results[f"out.{k}"] for k in range(len(results))]

    def step(self, phase, ids, first, count):
        """Runs positions first .. first + len(ids) - 1, of which `count` are no padding; logits of the last of those."""
        values = {}
        context, mask = self.pipeline["context"], self.pipeline["mask"]
        *names, head = self.pipeline["phases"][phase]
        for name in names:
            unit = self.units[name]
            if any(end["name"] == "visual" for end in unit["inputs"]):
                continue  # the fusion: this prompt has no picture
            layer, inputs = unit.get("layer"), []
            for end in unit["inputs"]:
                role, key = end["name"], end["key"]
                if role == "ids":
                    inputs.append(np.array([ids], np.int64))
                elif role == "mask":
                    query = np.arange(first, first + len(ids))[:, None]
                    place = np.arange(context)[None, :]
                    if phase == "decode":  # the newest key lies in the last slot
                        place = np.where(place == context - 1, first, np.where(place < first, place, context))
                    seen = (place <= query) & (place < first + count)
                    if layer["window"]:
                        seen &= place > query - layer["window"]
                    values_of = np.where(seen, mask["seen"], mask["unseen"]).astype(np.float32)
                    inputs.append(values_of[None] if phase == "decode" else values_of[None, None])
                elif role in ("cos", "sin"):
                    table = self.tables[f"{role}.{layer['attention']}"]
                    inputs.append(table[:, first : first + len(ids)])
                elif role.startswith("past_"):
                    inputs.append(self.caches[key][:, :, :-1])
                elif role.startswith("shared_") and phase == "decode":
                    inputs.append(self.caches[key])
                elif role == "per_layer_input":
                    inputs.append(values[key][:, :, layer["index"]])
                else:
                    inputs.append(values[key])
            for end, value in zip(unit["outputs"], self.run(name, inputs)):
                values[end["key"]] = value
                if end["name"] in ("new_key", "new_value"):
                    self.keep(end, value, phase, count)
        if phase == "decode":
            for cache in self.caches.values():
                cache[:, :, first] = cache[:, :, context - 1]
        hidden = values[self.units[head]["inputs"][0]["key"]]
        return self.run(head, [hidden[:, count - 1 : count]])[0].ravel()

    def keep(self, end, value, phase, count):
        if end["key"] not in self.caches:
            shape = (*value.shape[:2], self.pipeline["context"], value.shape[3])
            self.caches[end["key"]] = np.full(shape, end["zero_point"], value.dtype)
        slots = slice(-1, None) if phase == "decode" else slice(0, count)
        self.caches[end["key"]][:, :, slots] = value[:, :, :count]


def main():
    circlet, out, count, *ids = sys.argv[1:]
    model, ids = Model(circlet, out), [int(i) for i in ids]
    padding = [model.pipeline["pad_token_id"]] * (model.pipeline["context"] - len(ids))
    logits = model.step("prefill", ids + padding, 0, len(ids))
    for made in range(int(count)):
        if made > 0:
            logits = model.step("decode", ids[-1:], len(ids) - 1, 1)
        ids.append(int(logits.argmax()))
        code = 0
        for value in logits.tolist():
            code = (code * 31 + value) % 2**32
        print(ids[-1], code)


main()
