#!/usr/bin/env python3
"""Whole commands on examples/tiny-gemma4 and on random checkpoints: seconds, processor seconds and peak resident memory,
the minimum of some runs. Prints the table of README.md; --json FILE writes the figures, and --baseline FILE, the figures of
another build taken in the same hour, adds the ratio.

    bench/runs.py [--program build/circlet] [--rounds 3] [--json out.json] [--baseline other.json]
"""
import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = str(ROOT / "examples/tiny-gemma4")
DATA = ["--data", TINY + "/eval/calib.jsonl", "--quiet"]
TEXT = ["--eval-text", TINY + "/eval/heldout.txt"]
CAPTIONS = ["--eval-captions", TINY + "/eval/captions.jsonl"]


def commands(scratch):
    out = str(scratch / "out")
    return {
        "start of the program": ["--version"],
        "quantize with pictures, 20 windows, 39 files":
            ["quantize", TINY, *DATA, "--recipe", "w8a16", *TEXT, "--eval-windows", "20", "-o", out],
        "quantize --text-only, 20 windows, 26 files":
            ["quantize", TINY, *DATA, "--recipe", "w8a16", *TEXT, "--eval-windows", "20", "--text-only", "-o", out],
        "evaluate w4a16: 32 samples, 20 windows, 100 pictures":
            ["evaluate", TINY, *DATA, "--recipe", "w4a16", *TEXT, "--eval-windows", "20", *CAPTIONS],
        "the same with --compute bf16":
            ["evaluate", TINY, *DATA, "--recipe", "w4a16", *TEXT, "--eval-windows", "20", *CAPTIONS, "--compute", "bf16"],
        "evaluate --text-only, 115 windows": ["evaluate", TINY, *DATA, "--recipe", "w8a16", *TEXT, "--text-only"],
        "inspect --case all --export circle":
            ["inspect", "--mode", "wrapper-smoke", "--case", "all", "--export", "circle", "--no-plot", "--output-dir", out],
        "example model": ["example", "model", "--output-dir", out],
    }


def measure(program, arguments, scratch):
    shutil.rmtree(scratch / "out", ignore_errors=True)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.execv(program, [program, *arguments])
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{' '.join(arguments)}: exit code {os.waitstatus_to_exitcode(status)}")
    return {"seconds": seconds, "processor_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=str(ROOT / "build/circlet"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json")
    parser.add_argument("--baseline")
    options = parser.parse_args()
    baseline = json.loads(pathlib.Path(options.baseline).read_text()) if options.baseline else {}
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        for name, arguments in commands(scratch).items():
            runs = [measure(options.program, arguments, scratch) for _ in range(options.rounds)]
            results[name] = {key: min(run[key] for run in runs) for key in runs[0]}
    print("| | seconds | processor seconds | peak memory |" + (" ratio of seconds |" if baseline else ""))
    print("|---|---|---|---|" + ("---|" if baseline else ""))
    for name, row in results.items():
        ratio = f" {row['seconds'] / baseline[name]['seconds']:.2f} |" if name in baseline else " |" if baseline else ""
        print(f"| {name} | {row['seconds']:.2f} | {row['processor_seconds']:.2f} | {row['peak_mb']:.0f} MB |{ratio}")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
