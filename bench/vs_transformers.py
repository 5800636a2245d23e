#!/usr/bin/env python3
"""Full prefill of one model by ifkv and by Hugging Face transformers, alternating in one run: same ids, float32, same threads.

Inside the window: from token ids to the logits of the last row; outside: model load, start-up, tokenisation.  Prints the minimum over
the repetitions, their ratio (above 1: ifkv is faster) and the largest difference of the logits of that very run.  Exits 1 if a ratio is
below --require or a difference above 2e-3.  Needs torch and transformers: the environment that
tests/reference/check_against_transformers.py makes has both, and this script moves into it by itself.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".cache", "venv-transformers", "bin", "python")


def load_transformers(model, threads):
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        if os.path.exists(VENV) and os.path.abspath(sys.executable) != VENV:
            os.execv(VENV, [VENV, *sys.argv])
        sys.exit("vs_transformers: torch and transformers are missing: run tests/reference/check_against_transformers.py once")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def run_ifkv(args, ids, directory):
    """-> (seconds to the first token, its logits)"""
    import h5py
    requests, out = os.path.join(directory, "requests.jsonl"), os.path.join(directory, "out")
    with open(requests, "w") as f:
        json.dump({"id": "r", "chunks": [ids[:-8]], "prompt": ids[-8:]}, f)
    subprocess.run([args.bin, "prefill", "--model", args.model, "--requests", requests, "--out", out, "--method", "full",
                    "--threads", str(args.threads), "--max-new", "1", "--save-logits", "--overwrite", "--quiet"], check=True)
    with open(os.path.join(out, "results.jsonl")) as f:
        result = json.loads(f.readline())
    with h5py.File(os.path.join(out, "r.h5")) as f:
        return result["ms"]["ttft"] / 1e3, f["first_logits"][:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, ".cache", "models", "SmolLM2-135M-Instruct"))
    parser.add_argument("--bin", default=os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv")))
    parser.add_argument("--lengths", default="2048,5000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--require", type=float, default=1.0, help="smallest ratio that passes")
    args = parser.parse_args()
    torch, model = load_transformers(args.model, args.threads)
    import numpy as np

    is_good = True
    print(f"# {args.model}, float32, {args.threads} threads, minimum of {args.repeat}; "
          f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"# {'tokens':>6} {'transformers s':>15} {'ifkv s':>8} {'ratio':>6} {'max logit diff':>15}")
    for length in [int(n) for n in args.lengths.split(",")]:
        ids = np.random.default_rng(length).integers(10, model.config.vocab_size - 1, length).tolist()
        theirs, ours, difference = [], [], 0.0
        with tempfile.TemporaryDirectory() as directory:
            for _ in range(args.repeat):
                begin = time.perf_counter()
                reference = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].numpy()
                theirs.append(time.perf_counter() - begin)
                seconds, logits = run_ifkv(args, ids, directory)
                ours.append(seconds)
                difference = max(difference, float(np.abs(logits - reference).max()))
        ratio = min(theirs) / min(ours)
        is_good = is_good and ratio >= args.require and difference <= 2e-3
        print(f"  {length:>6} {min(theirs):>15.2f} {min(ours):>8.2f} {ratio:>6.2f} {difference:>15.1e}", flush=True)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
