#!/usr/bin/env python3
"""First logits of prefills on the CUDA back end against those of the CPU: gpu_compare.py TOOL MODEL [--nccl LAUNCHER...].

MODEL is `llama` or `qwen3`, tiny shapes with weights drawn from a seed, or a model directory.  Exact methods run on 1, 2 and 4
ranks as threads, or with --nccl on the ranks that LAUNCHER starts.  Prints the distances, exits 1 beyond the bound.

Bound.  A rounding to bfloat16 errs by at most u = 2^-9, on average by u / sqrt 3.  Nine results a layer are rounded, and its
four weights; with what comes to the sums at most 16 roundings.  Independent, they add like their root: u sqrt(16 L / 3) for
L layers.  Three times that is allowed; a wrong head, place or mask errs by about 1.  What infoflow selects may differ in near
ties, and a map that few rows are fitted to carries their roundings on: these distances are printed, not judged (test_device judges them).
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile

import h5py
import numpy as np

COMMON = {"hidden_act": "silu", "num_hidden_layers": 4, "vocab_size": 301, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
          "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2}
TINY = {
    "llama": {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 192,
              "intermediate_size": 304, **COMMON},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 128, "hidden_size": 160,
              "intermediate_size": 208, **COMMON},
}
REFIT = ("--method", "random", "--refit")  # the same rows everywhere
LENGTHS = (70, 1, 33, 129)  # of the chunks: off every tile


def write_requests(path, n_vocab, scale):
    draw = random.Random(7)
    ids = lambda n: [draw.randrange(3, n_vocab) for _ in range(n)]
    with open(path, "w") as f:
        for name in "ab":
            chunks = [ids(n * scale) for n in LENGTHS]
            f.write(json.dumps({"id": name, "prefix": ids(3), "chunks": chunks, "prompt": ids(9)}) + "\n")


def first_logits(out):
    with open(os.path.join(out, "manifest.jsonl")) as f:
        records = {m["id"]: m["record"] for m in map(json.loads, f)}
    found = {}
    for name, record in records.items():
        with h5py.File(os.path.join(out, record)) as f:
            found[name] = f["first_logits"][:].astype(np.float64)
    return found


def distance(got, want):
    assert got.keys() == want.keys() and want
    return max(float(np.linalg.norm(got[i] - want[i]) / np.linalg.norm(want[i])) for i in want)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool")
    parser.add_argument("model")
    parser.add_argument("--nccl", nargs=argparse.REMAINDER, help="launcher of the ranks, for --comm nccl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ifkv-gpu-") as scratch:
        model = ["--model", args.model]
        if args.model in TINY:
            model = ["--model", scratch, "--random-weights", "11"]
            with open(os.path.join(scratch, "config.json"), "w") as f:
                json.dump(TINY[args.model], f)
        with open(os.path.join(model[1], "config.json")) as f:
            config = json.load(f)
        requests = os.path.join(scratch, "requests.jsonl")
        write_requests(requests, config["vocab_size"], 1 if args.model in TINY else 4)

        def run(name, *flags, launcher=()):
            out = os.path.join(scratch, name)
            subprocess.run([*launcher, args.tool, "prefill", *model, "--requests", requests, "--out", out, "--max-new", "1",
                            "--save-logits", "--quiet", *flags], check=True, stdin=subprocess.DEVNULL)
            return first_logits(out)

        full = run("cpu-full", "--backend", "cpu", "--method", "full")
        chosen = {}
        if args.nccl:
            ways = [(f"{method} nccl", method, ("--comm", "nccl"), args.nccl) for method in ("ring", "all")]
        else:
            chosen = {"infoflow": run("cpu-infoflow", "--backend", "cpu"), "refit": run("cpu-refit", "--backend", "cpu", *REFIT)}
            ways = [("full 1", "full", (), ())]
            for ranks in ("2", "4"):
                ways += [(f"{method} {ranks}", method, ("--comm", "thread", "--ranks", ranks), ()) for method in ("ring", "all")]
            for ranks in ("1", "4"):
                ways += [(f"{method} {ranks}", method, ("--comm", "thread", "--ranks", ranks), ()) for method in chosen]
        bound = 3 * 2**-9 * math.sqrt(16 * config["num_hidden_layers"] / 3)
        worst, told = 0.0, []
        for name, method, flags, launcher in ways:
            what = REFIT if method == "refit" else ("--method", method)
            got = run(name.replace(" ", "-"), "--backend", "cuda", *what, *flags, launcher=launcher)
            d = distance(got, chosen.get(method, full))
            told.append(f"{name} {d:.1e}")
            if method not in chosen:
                worst = max(worst, d) if d == d else math.inf
        print(f"bound {bound:.1e}: {', '.join(told)}")
        return f"error: beyond the bound {bound:.1e}: {worst:.1e}" if worst > bound else 0


if __name__ == "__main__":
    sys.exit(main())
