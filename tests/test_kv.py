#!/usr/bin/env python3
"""Exchange `kv` of the ifkv binary against float64, over threads and over MPI: python3 tests/test_kv.py.

A row sees the rows of its own rank, the prefix, and the selected rows before it; which of these come as K/V and which
as answers to its queries must not show.  The reference here knows only who owns which row, read from the K/V files.
Requests leave the last rank few selected rows, so that it asks.  Needs numpy and h5py; IFKV_BIN names the binary.
Tolerance as in test_golden.py.
"""
import functools
import json
import os
import subprocess
import sys
import tempfile
import unittest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import h5py  # noqa: E402
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "reference")]
import ifkv_reference as reference  # noqa: E402
import make_models  # noqa: E402
from ranks import mpirun  # noqa: E402
from test_golden import BINARY, RUN_TIMEOUT_S, TOLERANCE, Record, relative_l2  # noqa: E402

MODELS = ("llama_g1_tied", "llama_g3_scaled_sharded", "qwen3_g5_sharded")
RANKS = (2, 3, 4, 7)
EPIC_K = 3
CHUNKS = (4,) * 15 + (29, 37)  # 3 selected rows each, placed in this order: many on the first ranks, few on the last


def setUpModule():
    global scratch
    if not os.access(BINARY, os.X_OK):
        raise RuntimeError(f"{BINARY} is not there to be tested; build it or set IFKV_BIN")
    scratch = tempfile.TemporaryDirectory(prefix="ifkv-kv-")


def tearDownModule():
    scratch.cleanup()


@functools.lru_cache(maxsize=None)
def model_of(name):
    return make_models.make_model(os.path.join(scratch.name, "models"), name)


def request_of(name):
    vocab = make_models.MODELS[name][0]["vocab_size"]
    ids = iter(np.random.default_rng(11).integers(3, vocab, 2 + sum(CHUNKS) + 4).tolist())
    take = lambda n: [next(ids) for _ in range(n)]
    return {"id": "r", "prefix": take(2), "chunks": [take(n) for n in CHUNKS], "prompt": take(4)}


@functools.lru_cache(maxsize=None)
def run(name, ranks, comm):
    out = os.path.join(scratch.name, f"{name}-{ranks}-{comm}")
    with open(out + ".jsonl", "w") as f:
        f.write(json.dumps(request_of(name)) + "\n")
    command = [BINARY, "prefill", "--model", model_of(name), "--requests", out + ".jsonl", "--out", out, "--method",
               "epic", "--epic-k", str(EPIC_K), "--exchange", "kv", "--placement", "contiguous", "--backend", "cpu",
               "--threads", "1", "--max-new", "1", "--ride", "none", "--save-logits", "--save-kv", "--comm", comm]
    command = [*mpirun(ranks, BINARY), *command] if comm == "mpi" else command + ["--ranks", str(ranks)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}")
    with open(os.path.join(out, "results.jsonl")) as f, open(os.path.join(out, "manifest.jsonl")) as g:
        return Record(out, json.loads(f.readline()), json.loads(g.readline()))


def owners(record):
    """The rank that stores each context row."""
    owner = np.full(record.result["n_context"], -1)
    for rank, path in enumerate(record.kv_paths):
        with h5py.File(path) as f:
            owner[f["index"][:]] = rank
    return owner


def recompute(model, cache, context, selected, owner, n_prefix):
    """Replace K/V of the selected rows by rows that see their rank's rows, the prefix and selected rows, up to their own."""
    index = np.arange(len(context))
    sees = (owner[selected][:, None] == owner) | (index < n_prefix) | np.isin(index, selected)
    sees &= index <= selected[:, None]
    h = model.embedding[np.asarray(context)[selected]]
    for l in range(model.config.n_layer):
        x = reference.rms_norm(h, model.layers[l]["input_layernorm"], model.config.norm_eps)
        if l > 0:
            k, v = reference.project_kv(model, l, x)
            cache.k[l][selected] = reference.rotate(k, selected, model.frequencies)
            cache.v[l][selected] = v
        s = reference.similarities(reference.project_q(model, l, x, selected), cache.k[l])  # [Hq, R, T]
        e = np.exp(np.where(sees, s - np.where(sees, s, -np.inf).max(axis=-1, keepdims=True), -np.inf))
        v = np.repeat(cache.v[l], s.shape[0] // cache.v[l].shape[1], axis=1).transpose(1, 0, 2)
        h = reference.finish_layer(model, l, h, np.matmul(e / e.sum(axis=-1, keepdims=True), v).transpose(1, 0, 2))


class Kv(unittest.TestCase):
    def each(self, check):
        for name in MODELS:
            for ranks in RANKS:
                with self.subTest(model=name, ranks=ranks):
                    check(name, ranks, run(name, ranks, "thread"))

    def test_caches_and_logits_equal_the_reference(self):
        def check(name, ranks, record):
            model, request = reference.load_model(model_of(name)), reference.Request.from_json(request_of(name))
            cache = reference.encode_chunks(model, request)
            recompute(model, cache, request.context, record.selected, owners(record), len(request.prefix))
            for l in range(model.config.n_layer):
                for what in "kv":
                    got, want = record.assembled(f"layers/{l}/{what}"), getattr(cache, what)[l]
                    self.assertLessEqual(relative_l2(got, want), TOLERANCE, f"layer {l} {what}")
            first = reference.prompt_and_decode(model, cache, request.prompt, 0)[0]
            self.assertLessEqual(relative_l2(record.first_logits, first), TOLERANCE)

        self.each(check)

    def test_ranks_of_few_rows_ask_and_the_busiest_receives_less(self):
        def check(name, ranks, record):
            shape, owner = make_models.MODELS[name][0], owners(record)[record.selected]
            n_layer, n_head, received = (shape["num_hidden_layers"], shape["num_attention_heads"],
                                         record.result["bytes"]["recompute"])
            row = 2 * shape["num_key_value_heads"] * shape["head_dim"] * 4
            below = [np.count_nonzero(owner[: np.flatnonzero(owner == r)[-1]] != r) for r in set(owner)]
            self.assertLess(received, (n_layer - 1) * max(below) * row)  # if all pulled
            if ranks == 2:  # the rows of rank 1 are the last: it asks with each, and nothing else moves
                answer = n_head * (shape["head_dim"] + 1) * 4
                self.assertEqual(received, (n_layer - 1) * np.count_nonzero(owner) * answer)

        self.each(check)

    def test_mpi_gives_the_bits_and_bytes_of_threads(self):
        for ranks in (2, 3, 4):
            with self.subTest(ranks=ranks):
                thread, mpi = run(MODELS[1], ranks, "thread"), run(MODELS[1], ranks, "mpi")
                self.assertEqual(mpi.result["size"], ranks)
                self.assertEqual(mpi.result["bytes"], thread.result["bytes"])
                np.testing.assert_array_equal(mpi.first_logits, thread.first_logits)
                for l in range(make_models.MODELS[MODELS[1]][0]["num_hidden_layers"]):
                    for dataset in (f"layers/{l}/k", f"layers/{l}/v"):
                        np.testing.assert_array_equal(mpi.assembled(dataset), thread.assembled(dataset))


if __name__ == "__main__":
    unittest.main()
