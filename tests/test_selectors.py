#!/usr/bin/env python3
"""Selection methods of the ifkv binary against the float64 reference, both run here: python3 tests/test_selectors.py.

test_golden.py holds full, none and infoflow to figures from a file; here the other methods, and infoflow's geometries,
meet the reference itself, on tiny models and awkward requests, on one rank and on three.  Needs numpy and h5py; IFKV_BIN names the binary.
Tolerance as in test_golden.py.  Requests are drawn until the reference leaves room at the threshold, so that sets are
compared for identity.
"""
import dataclasses
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
import make_goldens  # noqa: E402
import make_models  # noqa: E402
from portable_noise import integers  # noqa: E402
from ranks import mpirun  # noqa: E402
from test_golden import BINARY, RUN_TIMEOUT_S, TOLERANCE, Record, relative_l2  # noqa: E402

MODELS = ("llama_g3_scaled_sharded", "qwen3_g5_sharded")
MIN_SCORE_GAP = make_goldens.MIN_SCORE_GAP
# name: (prefix length, chunk lengths, prompt length, question length)
CASES = {
    "one_token_chunk": (2, (37, 1, 60, 21), 5, 4),
    "no_prefix": (0, (9, 40, 3, 31), 1, 3),
    "single_chunk": (3, (29,), 4, 2),
    "long_prefix": (14, (9, 11, 8), 2, 2),  # counted as rows of the first chunk it would change orders
}


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to select: flags of the binary, and the same for the reference."""

    flags: tuple
    arguments: tuple  # (name, value) of reference.prefill
    has_scores: bool = False
    runs: tuple = (("self", 1), ("thread", 3))  # communicators and ranks
    is_local: bool = False  # the reference must know the number of ranks
    must_move: bool = False  # only draws whose chunks change places are of use

    def expected(self, ranks):
        return {**dict(self.arguments), **({"local_ranks": ranks} if self.is_local else {})}


WAYS = {
    "epic": Way(("--method", "epic"), (("method", "epic"),)),
    "epic_3": Way(("--method", "epic", "--epic-k", "3"), (("method", "epic"), ("epic_k", 3))),
    "epic_budget": Way(("--method", "epic_budget", "--ratio", "0.3"), (("method", "epic_budget"), ("ratio", "0.3"))),
    "cacheblend": Way(("--method", "cacheblend", "--ratio", "0.2"), (("method", "cacheblend"), ("ratio", "0.2")), True),
    "cacheblend_0": Way(("--method", "cacheblend", "--ratio", "0"), (("method", "cacheblend"), ("ratio", "0")), True),
    "refit": Way(("--ratio", "0.3", "--refit"), (("ratio", "0.3"), ("refit", True)), True),
    "refit_1": Way(("--ratio", "0.001", "--refit"), (("ratio", "0.001"), ("refit", True)), True),
    "refit_epic": Way(("--method", "epic", "--refit"), (("method", "epic"), ("refit", True))),
    **{"-".join(geometry): Way(
        ("--ratio", "0.3", "--score-layers", "wide", "--geometry", geometry[0], "--hp", geometry[1]),
        (("ratio", "0.3"), ("score_layer_choice", "wide"), ("geometry", geometry[0]), ("hp", geometry[1])), True)
       for geometry in (("global", "shared"), ("hl-tp", "shared"), ("hl-hp", "shared"), ("hl-hp", "per_chunk"),
                        ("tl-tp", "shared"))},
    **{"-".join(("local", geometry, sink)): Way(
        ("--ratio", "0.3", "--score-layers", "wide", "--geometry", geometry, "--hp", hp, "--placement", "zigzag",
         "--scoring", "local", *(("--local-sink",) if sink else ())),
        (("ratio", "0.3"), ("score_layer_choice", "wide"), ("geometry", geometry), ("hp", hp), ("has_sink", bool(sink))),
        True, (("self", 1), ("thread", 2), ("mpi", 4)), True)
       # per_chunk: the only geometry that moves the prefix
       for geometry, hp, sink in (("global", "shared", ""), ("global", "shared", "sink"), ("hl-hp", "per_chunk", "sink"))},
    **{"-".join(("reorder", exchange)): Way(
        ("--ratio", "0.3", "--score-layers", "wide", "--reorder", "--exchange", exchange),
        (("ratio", "0.3"), ("score_layer_choice", "wide"), ("reorder", True)), True,
        (("self", 1), ("thread", 2), ("mpi", 4)), must_move=True)
       for exchange in ("delta", "query")},
    "reorder-most": Way(
        ("--ratio", "0.8", "--reorder"), (("ratio", "0.8"), ("reorder", True)), True, (("thread", 3),), must_move=True),
    "reorder-local": Way(
        ("--ratio", "0.3", "--score-layers", "wide", "--reorder", "--placement", "zigzag", "--scoring", "local",
         "--local-sink"),
        (("ratio", "0.3"), ("score_layer_choice", "wide"), ("reorder", True), ("has_sink", True)), True,
        (("self", 1), ("thread", 3)), True, True),
}
_scratch = None


def setUpModule():
    global _scratch
    if not os.access(BINARY, os.X_OK):
        raise RuntimeError(f"{BINARY} is not there to be tested; build it or set IFKV_BIN")
    _scratch = tempfile.TemporaryDirectory(prefix="ifkv-selectors-")


def tearDownModule():
    _scratch.cleanup()


@functools.lru_cache(maxsize=None)
def model_of(name):
    """(path, model of the reference)."""
    path = make_models.make_model(os.path.join(_scratch.name, "models"), name)
    return path, reference.load_model(path)


@functools.lru_cache(maxsize=None)
def expected(name, way, case, ranks):
    """(JSON request, result of the reference) of the first draw whose threshold has room."""
    if ranks > 1 and not WAYS[way].is_local:
        return expected(name, way, case, 1)
    model = model_of(name)[1]
    n_prefix, n_chunks, n_prompt, n_question = CASES[case]
    for draw in range(200):
        ids = lambda part, n: integers(f"{name} {case} {draw} {part}", n, make_goldens.FIRST_ID, model.config.n_vocab)
        raw = {"id": case, "prefix": ids("prefix", n_prefix), "prompt": ids("prompt", n_prompt),
               "chunks": [ids(f"chunk {i}", n) for i, n in enumerate(n_chunks)],
               "question": ids("question", n_question)}
        request = reference.Request.from_json(raw)
        result = reference.prefill(model, request, max_new=1, **WAYS[way].expected(ranks))
        has_moved = not WAYS[way].must_move or len(n_chunks) == 1 or result.order != sorted(result.order)
        if result.gap >= MIN_SCORE_GAP and has_moved:
            return raw, result
    raise AssertionError(f"{name} {way} {case}: no draw has room")


def read_lines(path):
    with open(path) as f:
        return {x["id"]: x for x in map(json.loads, f)}


@functools.lru_cache(maxsize=None)
def records(name, way, comm, ranks):
    out = os.path.join(_scratch.name, f"{name}-{way}-{comm}-{ranks}")
    with open(out + ".jsonl", "w") as f:
        f.writelines(json.dumps(expected(name, way, case, ranks)[0]) + "\n" for case in CASES)
    command = [*mpirun(ranks if comm == "mpi" else 0, BINARY), BINARY, "prefill", "--model", model_of(name)[0], "--requests",
               out + ".jsonl", "--out", out, "--backend", "cpu", "--threads", "1", "--max-new", "1", "--save-logits", "--save-kv", "--save-scores",
               *WAYS[way].flags]
    command += ["--comm", comm, *(("--ranks", str(ranks)) if comm == "thread" else ())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}")
    results, manifest = (read_lines(os.path.join(out, file)) for file in ("results.jsonl", "manifest.jsonl"))
    return {case: Record(out, results[case], manifest[case]) for case in CASES}


def everywhere(check):
    """Turn a check of (record, expected result) into a test of every model, way, case and number of ranks."""

    @functools.wraps(check)
    def test(self):
        for name in MODELS:
            for way in WAYS:
                for case in CASES:
                    for comm, ranks in WAYS[way].runs:
                        with self.subTest(model=name, way=way, case=case, comm=comm, ranks=ranks):
                            record, (_, result) = records(name, way, comm, ranks)[case], expected(name, way, case, ranks)
                            check(self, record, result, WAYS[way])

    return test


class Selectors(unittest.TestCase):
    @everywhere
    def test_selected_rows_equal_the_reference(self, record, result, way):
        self.assertEqual(record.selected.tolist(), result.selected.tolist())

    @everywhere
    def test_chunks_are_in_the_order_of_the_reference(self, record, result, way):
        self.assertEqual(record.result["chunk_order"], result.order if "--reorder" in way.flags else None)

    @everywhere
    def test_saved_ids_follow_the_order(self, record, result, way):
        self.assertEqual(record.assembled("token_ids").tolist(), result.context)
        with h5py.File(record.kv_paths[0]) as f:
            self.assertEqual("chunk_order" in f, "--reorder" in way.flags)
            if "chunk_order" in f:
                self.assertEqual(f["chunk_order"][:].tolist(), result.order)

    @everywhere
    def test_scores_equal_the_reference(self, record, result, way):
        self.assertEqual(record.scores is not None, way.has_scores)
        if way.has_scores:
            # All may be 0: one chunk deviates nowhere.  Scores that are squared deviations of V are then the square of
            # two roundings, each within the tolerance of V; probabilities are never all 0.
            deviation = 2 * TOLERANCE * max(np.linalg.norm(v) for v in result.cache.v)
            bound = TOLERANCE * np.linalg.norm(result.scores) + (deviation**2 if "cacheblend" in way.flags else 0)
            self.assertLessEqual(np.linalg.norm(record.scores - result.scores), bound)

    @everywhere
    def test_caches_equal_the_reference(self, record, result, way):
        for l in range(len(result.cache.k)):
            for what in "kv":
                got, want = record.assembled(f"layers/{l}/{what}"), getattr(result.cache, what)[l]
                self.assertLessEqual(relative_l2(got, want), TOLERANCE, f"layer {l} {what}")

    @everywhere
    def test_first_logits_equal_the_reference(self, record, result, way):
        self.assertLessEqual(relative_l2(record.first_logits, result.first_logits), TOLERANCE)


if __name__ == "__main__":
    unittest.main()
