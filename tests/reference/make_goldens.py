#!/usr/bin/env python3
"""Write the golden figures of tests/test_golden.py: make_goldens.py --out tests/fixtures/goldens.

For each model of make_models.py and each case below: a request, and for the methods full, none and infoflow what the
float64 reference gives.  `all` has no figures of its own: it must equal full, which is checked here before writing.

<model>.json  the requests with their ratios; per method the answer; the gaps; a digest of the weights
<model>.npz   per case and method (<case>.<method>.): logits float32 [n_vocab]; selected int64; scores float32 [T];
              k and v: fingerprints float32 [n_layer, N_SKETCH]; k_norm and v_norm: L2 norms float32 [n_layer]

Token ids are drawn anew until every decision has room: a fixture decides by mathematics, not by rounding.
"""
import argparse
import hashlib
import json
import os
import tempfile

# Tiny products: BLAS threads would only spin, on a busy machine for minutes.  Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

import ifkv_reference as reference  # noqa: E402
import make_models  # noqa: E402
from portable_noise import integers, sketch  # noqa: E402

MAX_NEW = 8
METHODS = ("full", "none", "infoflow")
MIN_SCORE_GAP = 1e-3  # relative, at the selection threshold; float32 rounding moves a score by about 1e-6
MIN_LOGIT_GAP = 2e-3  # best against second logit over the whole answer, relative to the largest |logit|
FIRST_ID = 5  # the ids below are end marks and such; requests use none of them

# name: (prefix length, chunk lengths, prompt length, question length or None for the prompt itself, ratio)
CASES = {
    "one_token_chunk": (1, (70, 1, 129, 40), 7, 5, "0.15"),
    "no_prefix": (0, (9, 64, 31), 4, None, "0.3"),
    "single_chunk": (3, (57,), 5, 1, "0.15"),
    "chunks_shorter_than_prefix": (6, (1, 28, 3, 37), 6, 9, "1.0"),
    "select_nothing_and_stop": (2, (21, 30), 1, 4, "0.0"),
}


def draw_request(model_name, case, n_vocab, draw):
    n_prefix, n_chunks, n_prompt, n_question, _ = CASES[case]
    key = f"{model_name} {case} {draw}"
    ids = lambda part, n: integers(f"{key} {part}", n, FIRST_ID, n_vocab)
    request = {"id": f"{model_name}/{case}", "prefix": ids("prefix", n_prefix),
               "chunks": [ids(f"chunk {i}", n) for i, n in enumerate(n_chunks)], "prompt": ids("prompt", n_prompt)}
    if n_question is not None:
        request["question"] = ids("question", n_question)
    return request


def has_room(case, results):
    if min(r.logit_gap for r in results.values()) < MIN_LOGIT_GAP or results["infoflow"].gap < MIN_SCORE_GAP:
        return False
    # One case ends by an end mark, away from both ends of the answer; the others run to their length.
    if case == "select_nothing_and_stop":
        return results["none"].finish == "stop" and 2 <= len(results["none"].answer_ids) < MAX_NEW
    return all(r.finish == "length" for r in results.values())


def check_all_equals_full(model, request, full):
    everything = reference.prefill(model, request, "all", max_new=MAX_NEW)
    for a, b in zip(everything.cache.k + everything.cache.v, full.cache.k + full.cache.v):
        assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b), "recomputing every row is not full prefill"
    assert everything.answer_ids == full.answer_ids


def weights_digest(path):
    digest = hashlib.sha256()
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            with open(os.path.join(path, name), "rb") as f:
                digest.update(f.read())
    return digest.hexdigest()


def golden_case(model, model_name, case):
    """Returns (json object, arrays) of the first draw that has room."""
    ratio = CASES[case][-1]
    for draw in range(2000):
        raw = draw_request(model_name, case, model.config.n_vocab, draw)
        request = reference.Request.from_json(raw)
        results = {m: reference.prefill(model, request, m, ratio, score_layer_choice="published", max_new=MAX_NEW)
                   for m in METHODS}
        if has_room(case, results):
            break
    else:
        raise SystemExit(f"{model_name} {case}: no draw has room")
    check_all_equals_full(model, request, results["full"])
    infoflow = results["infoflow"]
    about = {
        "request": raw, "ratio": ratio, "draw": draw, "n_context": len(request.context),
        "score_gap": float(f"{infoflow.gap:.6g}") if np.isfinite(infoflow.gap) else None,
        "logit_gap": float(f"{min(r.logit_gap for r in results.values()):.6g}"),
        "answers": {m: {"answer_ids": r.answer_ids, "finish": r.finish} for m, r in results.items()},
    }
    arrays = {"infoflow.selected": infoflow.selected, "infoflow.scores": infoflow.scores.astype(np.float32)}
    for method, r in results.items():
        arrays[f"{method}.logits"] = r.first_logits.astype(np.float32)
        for name, layers in (("k", r.cache.k), ("v", r.cache.v)):
            arrays[f"{method}.{name}"] = np.array([sketch(x) for x in layers], np.float32)
            arrays[f"{method}.{name}_norm"] = np.array([np.linalg.norm(x) for x in layers], np.float32)
    return about, {f"{case}.{name}": a for name, a in arrays.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(make_models.MODELS), default=sorted(make_models.MODELS))
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    for name in args.only:
        with tempfile.TemporaryDirectory() as directory:
            path = make_models.make_model(directory, name)
            model, digest = reference.load_model(path), weights_digest(path)
        cases, arrays = {}, {}
        for case in CASES:
            cases[case], more = golden_case(model, name, case)
            arrays.update(more)
        with open(os.path.join(args.out, f"{name}.json"), "w") as f:
            json.dump({"model": name, "weights_sha256": digest, "max_new": MAX_NEW, "cases": cases}, f)
            f.write("\n")
        np.savez_compressed(os.path.join(args.out, f"{name}.npz"), **arrays)
        for case, golden in cases.items():
            print(name, case, *(f"{key} {golden[key]}" for key in ("draw", "n_context", "score_gap", "logit_gap")))


if __name__ == "__main__":
    main()
