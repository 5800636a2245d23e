#!/usr/bin/env python3
"""Compare ifkv (method full) and the NumPy reference with Hugging Face transformers in float32.

usage: check_against_transformers.py [--model DIR] [--text FILE ...] [--binary PATH | --no-binary]

Not a part of CI: it installs torch and transformers (several GB) into .cache/venv-transformers on first use.  Models:
two of make_models.py on seeded random ids, and the one given with --model on three stretches of real text.  Logits are
compared at two rows of each text, the middle and the last; ifkv is made to show a row by ending the request there.
Prints the largest absolute logit error of each and exits 1 if one exceeds 2e-3.  That is ten times what float32 leaves
of logits of size 30 behind 30 layers, and far below what a wrong rotation, norm or head order does.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
VENV = os.path.join(ROOT, ".cache", "venv-transformers")
PACKAGES = ["torch", "transformers", "tokenizers", "numpy", "h5py"]
TINY = ("llama_g3_scaled_sharded", "qwen3_g5_sharded")
N_TEXT = 3
N_PROMPT = 8  # tokens that the request carries as its prompt
BOUND = 2e-3


def enter_venv():
    """Go on in the virtual environment; make it first where there is none."""
    ready = os.path.join(VENV, "ready")
    if not os.path.exists(ready):
        print(f"installing {', '.join(PACKAGES)} into {VENV}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([os.path.join(VENV, "bin", "pip"), "install", "-q", "--no-cache-dir", *PACKAGES], check=True)
        open(ready, "w").close()
    if os.path.realpath(sys.prefix) != os.path.realpath(VENV):
        os.execv(os.path.join(VENV, "bin", "python"), [os.path.join(VENV, "bin", "python"), *sys.argv])


def default_texts():
    """Documents that the checkout carries."""
    docs = os.path.join(ROOT, "launch", "docs")
    found = sorted(os.path.join(d, f) for d, _, files in os.walk(docs) for f in files)
    return found + [p for p in (os.path.join(ROOT, n) for n in ("README.md", "LICENSE")) if os.path.exists(p)]


def text_windows(model_path, paths, n_token):
    """N_TEXT token lists of n_token each: the files end to end, begun at another file each time."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.path.join(model_path, "tokenizer.json"))
    files = []
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as f:
            files.append(tokenizer.encode(f.read(400000), add_special_tokens=False).ids)
    if sum(map(len, files)) < n_token or len(files) < N_TEXT:
        raise SystemExit(f"{len(files)} texts hold {sum(map(len, files))} tokens; {N_TEXT} texts and {n_token} tokens "
                         "are needed: see --text")
    windows = []
    for i in range(N_TEXT):
        first = i * len(files) // N_TEXT
        ids = [t for tokens in files[first:] + files[:first] for t in tokens]
        windows.append((f"from {os.path.basename(paths[first])}", ids[:n_token]))
    return windows


def random_windows(n_vocab, n_token):
    from portable_noise import integers

    return [(f"random {i}", integers(f"transformers {i}", n_token, 5, n_vocab)) for i in range(N_TEXT)]


def transformers_logits(path, windows, rows):
    """[window][row] logits, float32 throughout."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, rows].double().numpy() for _, ids in windows]


def reference_logits(path, windows, rows):
    import ifkv_reference as reference

    model = reference.load_model(path)
    return [reference.logits(model, reference.full_prefill(model, ids)[1][rows]) for _, ids in windows]


def ifkv_logits(binary, path, windows, rows, threads):
    """One request per window and row: what stands up to the row, its last tokens as the prompt."""
    import h5py
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="ifkv-transformers-") as scratch:
        requests, out = os.path.join(scratch, "requests.jsonl"), os.path.join(scratch, "out")
        with open(requests, "w") as f:
            for i, (_, ids) in enumerate(windows):
                for row in rows:
                    cut = row + 1 - N_PROMPT
                    request = {"id": f"{i}/{row}", "chunks": [ids[: cut // 3], ids[cut // 3 : cut]],
                               "prompt": ids[cut : row + 1]}
                    f.write(json.dumps(request) + "\n")
        subprocess.run([binary, "prefill", "--model", path, "--requests", requests, "--out", out, "--method", "full",
                        "--backend", "cpu", "--threads", str(threads), "--max-new", "1", "--save-logits"],
                       check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with open(os.path.join(out, "manifest.jsonl")) as f:
            records = {m["id"]: os.path.join(out, m["record"]) for m in map(json.loads, f)}
        logits = []
        for i in range(len(windows)):
            at_rows = []
            for row in rows:
                with h5py.File(records[f"{i}/{row}"]) as f:
                    at_rows.append(f["first_logits"][:].astype(np.float64))
            logits.append(np.array(at_rows))
        return logits


def compare(label, path, windows, args):
    """Print one line per text and implementation.  Returns whether all are within the bound."""
    import numpy as np

    n_token = len(windows[0][1])
    rows = [n_token // 2, n_token - 1]
    want = transformers_logits(path, windows, rows)
    got = {"reference": reference_logits(path, windows, rows)}
    if not args.no_binary:
        got["ifkv"] = ifkv_logits(args.binary, path, windows, rows, args.threads)
    is_good = True
    for who, logits in got.items():
        for (text, _), a, b in zip(windows, logits, want):
            error, size = float(np.abs(a - b).max()), float(np.abs(b).max())
            is_close = error <= BOUND  # false for NaN
            is_good &= is_close
            print(f"{label:24} {who:10} {text:28} {n_token} tokens  max abs logit error {error:.2e}  "
                  f"(max |logit| {size:.1f}){'' if is_close else '  TOO LARGE'}", flush=True)
    return is_good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.join(ROOT, ".cache", "models", "SmolLM2-135M-Instruct"))
    parser.add_argument("--text", nargs="+", help="text files (default: launch/docs, README.md, LICENSE)")
    parser.add_argument("--tokens", type=int, default=1024, help="length of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--binary", default=os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv")))
    parser.add_argument("--no-binary", action="store_true", help="compare the NumPy reference only")
    args = parser.parse_args()
    enter_venv()
    sys.path.insert(0, HERE)
    import torch
    from transformers.utils import logging

    import make_models

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    is_good = True
    with tempfile.TemporaryDirectory(prefix="ifkv-transformers-") as scratch:
        for name in TINY:
            windows = random_windows(make_models.MODELS[name][0]["vocab_size"], args.tokens)
            is_good &= compare(name, make_models.make_model(scratch, name), windows, args)
    windows = text_windows(args.model, args.text or default_texts(), args.tokens)
    is_good &= compare(os.path.basename(os.path.normpath(args.model)), args.model, windows, args)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
