#!/usr/bin/env python3
"""Time to first token of exact and selective prefill, same ids, same program, one run.

For every length: `full` on one rank with all threads, then for every number of ranks `ring`, `infoflow` from a cold start and
`infoflow` from a chunk store that a first run has filled, threads shared out over the ranks.  The context is real text if --text is
given (cut to length, in chunks of --chunk tokens), else seeded random ids.  Each cell is the minimum of --repeat runs.  `error` is the
relative L2 distance of the first logits from those of `full` in the same run: rounding for `ring`, the approximation for `infoflow`.
Inside the window: what formats call ttft (ids in memory to the first token id); outside: start-up, model load, filling the store.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_PROMPT = 32


def context_ids(args, length, n_vocab):
    if not args.text:
        return np.random.default_rng(length).integers(10, n_vocab, length).tolist()
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(args.model, "tokenizer.json"))
    ids = []
    for path in args.text:
        with open(path, encoding="utf-8", errors="replace") as f:
            ids += tokenizer.encode(f.read(), add_special_tokens=False).ids
    if len(ids) < length:
        sys.exit(f"ttft: the text has {len(ids)} tokens, {length} are needed")
    return ids[:length]


def write_request(args, length, n_vocab, path):
    ids = context_ids(args, length, n_vocab)
    context, prompt = ids[:length - N_PROMPT], ids[length - N_PROMPT:]
    chunks = [context[i:i + args.chunk] for i in range(0, len(context), args.chunk)]
    with open(path, "w") as f:
        json.dump({"id": "r", "prefix": [1], "chunks": chunks, "prompt": prompt}, f)


def prefill(args, directory, ranks, *flags):
    """-> (result object, first logits)"""
    out = os.path.join(directory, "out")
    threads = max(1, args.threads // ranks)
    command = [args.bin, "prefill", "--model", args.model, "--requests", os.path.join(directory, "r.jsonl"), "--out", out,
               "--threads", str(threads), "--max-new", "1", "--save-logits", "--overwrite", "--quiet", *flags]
    if ranks > 1:
        command = ["mpirun", "-n", str(ranks), *command]
    subprocess.run(command, check=True)
    with open(os.path.join(out, "results.jsonl")) as f:
        result = json.loads(f.readline())
    with h5py.File(os.path.join(out, "r.h5")) as f:
        return result, f["first_logits"][:].astype(np.float64)


def measure(args, directory, exact, label, ranks, *flags):
    """Print one row; -> its logits."""
    runs = [prefill(args, directory, ranks, *flags) for _ in range(args.repeat)]
    result, logits = min(runs, key=lambda run: run[0]["ms"]["ttft"])
    reference = logits if exact is None else exact
    error = float(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
    ms = result["ms"]
    row = {"method": label, "ranks": ranks, "tokens": result["n_context"] + result["n_prompt"], "selected": result["n_selected"],
           "exchange": result["exchange"], "ttft_ms": ms["ttft"], "ms": ms, "rode": result["rode"],
           "bytes": result["bytes"]["total"], "error": error}
    score, prompt = ["rode" if stage in result["rode"] else f"{ms[stage]:.0f}" for stage in ("score", "prompt")]
    print(f"  {row['tokens']:>6} {label:<14} {ranks:>5} {result['exchange']:>9} {ms['encode']:>9.0f} {score:>7} "
          f"{ms['recompute']:>9.0f} {prompt:>7} {ms['ttft']:>9.0f} {row['bytes'] / 1e6:>9.1f} {error:>9.1e}", flush=True)
    if args.json:
        with open(args.json, "a") as f:
            f.write(json.dumps(row) + "\n")
    return logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, ".cache", "models", "SmolLM2-135M-Instruct"))
    parser.add_argument("--bin", default=os.path.join(ROOT, "build", "ifkv"))
    parser.add_argument("--lengths", default="2048,4096,8000")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--text", nargs="*", help="text files instead of random ids")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    args = parser.parse_args()
    with open(os.path.join(args.model, "config.json")) as f:
        n_vocab = json.load(f)["vocab_size"]

    print(f"# {os.path.basename(args.model.rstrip('/'))}, {args.threads} threads in all, chunks of {args.chunk}, ratio 0.15, "
          f"minimum of {args.repeat}, {time.strftime('%Y-%m-%d')}; milliseconds, maximum over ranks")
    print(f"# {'tokens':>6} {'method':<14} {'ranks':>5} {'exchange':>9} {'encode':>9} {'score':>7} {'recompute':>9} {'prompt':>7} "
          f"{'ttft':>9} {'MB moved':>9} {'error':>9}")
    for length in [int(n) for n in args.lengths.split(",")]:
        with tempfile.TemporaryDirectory() as directory:
            write_request(args, length, n_vocab, os.path.join(directory, "r.jsonl"))
            exact = measure(args, directory, None, "full", 1, "--method", "full")
            store = os.path.join(directory, "store")
            for ranks in [int(n) for n in args.ranks.split(",")]:
                if ranks > 1:
                    measure(args, directory, exact, "ring", ranks, "--method", "ring")
                measure(args, directory, exact, "infoflow cold", ranks)
                prefill(args, directory, ranks, "--store", store)
                measure(args, directory, exact, "infoflow warm", ranks, "--store", store)


if __name__ == "__main__":
    main()
