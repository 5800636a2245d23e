#!/usr/bin/env python3
"""The ifkv binary against the float64 reference, on tiny models made here: python3 tests/test_golden.py.

Environment: IFKV_BIN names the binary (default build/ifkv in the checkout), IFKV_GOLDEN_ARGS adds flags to every run.
Needs numpy and h5py.  Reads tests/fixtures/goldens, writes only below a temporary directory.  It never asks the
binary what the right answer is; the reference runs again only to say where a cache went wrong.

Tolerance.  Every figure is held to a relative L2 distance of 2e-5 from float64, the bound of the specification for
the fp32 CPU path.  Weights are stored as F32, F16 or BF16, so float32 holds them exactly and only arithmetic differs.
Why 2e-5 is enough for the deepest model: a product over n terms rounds to about u sqrt(n), u = 2^-24; n <= 160 here;
2 L such steps add up like sqrt(2 L), L = 28: 2^-24 * sqrt(160) * sqrt(56) = 5.6e-6, and a factor 3.5 is left for
softmax, norms and orders of summation.  NumPy float32 stays below 3e-6 on all of these models.  Fixtures keep score
gaps above 1e-3 and logit gaps above 2e-3, so sets and answers are compared for identity.
"""
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import unittest

# Tiny products: BLAS threads would only spin, on a busy machine for minutes.  Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import h5py  # noqa: E402
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "reference"))
import hf_model  # noqa: E402
import ifkv_reference as reference  # noqa: E402
import make_goldens  # noqa: E402
import make_models  # noqa: E402
from portable_noise import sketch, sketch_distance  # noqa: E402

BINARY = os.environ.get("IFKV_BIN", os.path.join(os.path.dirname(HERE), "build", "ifkv"))
TOLERANCE = 2e-5
MODELS = sorted(make_models.MODELS)
RUN_TIMEOUT_S = 300
_scratch = None
_told = {}  # messages of failed runs that were printed


def setUpModule():
    global _scratch
    if not os.access(BINARY, os.X_OK):
        raise RuntimeError(f"{BINARY} is not there to be tested; build it or set IFKV_BIN")
    _scratch = tempfile.TemporaryDirectory(prefix="ifkv-golden-")


def tearDownModule():
    _scratch.cleanup()


@functools.lru_cache(maxsize=None)
def model_path(name):
    return make_models.make_model(os.path.join(_scratch.name, "models"), name)


@functools.lru_cache(maxsize=None)
def goldens(name):
    """(json object, arrays) of one model."""
    base = os.path.join(HERE, "fixtures", "goldens", name)
    with open(base + ".json") as f:
        about = json.load(f)
    with np.load(base + ".npz") as z:
        return about, dict(z)


def relative_l2(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if a.shape == b.shape else np.inf


class Record:
    """What one run left of one request."""

    def __init__(self, out, result, manifest):
        self.result = result
        with h5py.File(os.path.join(out, manifest["record"])) as f:
            self.selected = f["selected"][:].astype(np.int64)
            self.first_logits = f["first_logits"][:]
            self.scores = f["scores"][:] if "scores" in f else None
        names = manifest["kv"]
        self.kv_paths = [os.path.join(out, n) for n in (names.values() if isinstance(names, dict) else names)]

    def assembled(self, dataset):
        """One dataset of the ranks' K/V files, its rows put in the order of their indices."""
        parts, index = [], []
        for path in self.kv_paths:
            with h5py.File(path) as f:
                parts.append(f[dataset][:])
                index.append(f["index"][:])
        return np.concatenate(parts)[np.argsort(np.concatenate(index), kind="stable")]


@functools.lru_cache(maxsize=None)
def run_outcome(name, method, ratio, cases, ranks):
    """Run the binary once; a failure is remembered too.  Returns ({case: Record}, None) or (None, why it failed)."""
    out = os.path.join(_scratch.name, f"{name}-{method}-{ratio}-{ranks}-{len(cases)}")
    with open(out + ".jsonl", "w") as f:
        f.writelines(json.dumps(goldens(name)[0]["cases"][case]["request"]) + "\n" for case in cases)
    command = [BINARY, "prefill", "--model", model_path(name), "--requests", out + ".jsonl", "--out", out,
               "--method", method, "--ratio", ratio, "--backend", "cpu", "--threads", "1",
               "--max-new", str(make_goldens.MAX_NEW), "--save-logits", "--save-kv"]
    command += ["--comm", "self"] if ranks == 1 else ["--comm", "thread", "--ranks", str(ranks)]
    command += ["--score-layers", "published", "--save-scores"] if method == "infoflow" else []
    command += os.environ.get("IFKV_GOLDEN_ARGS", "").split()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no end within {RUN_TIMEOUT_S} s: {' '.join(command)}"
    if done.returncode:
        return None, f"exit {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}"
    with open(os.path.join(out, "results.jsonl")) as f:
        results = {r["id"]: r for r in map(json.loads, f)}
    with open(os.path.join(out, "manifest.jsonl")) as f:
        manifest = {m["id"]: m for m in map(json.loads, f)}
    return {case: Record(out, results[f"{name}/{case}"], manifest[f"{name}/{case}"]) for case in cases}, None


def records(name, method, ratio, cases, ranks):
    found, why = run_outcome(name, method, ratio, tuple(cases), ranks)
    if why:
        # One run serves many claims; its message is worth printing once.
        short = f"the run failed as said above: {why[:40]} ..."
        raise AssertionError(short if why in _told else _told.setdefault(why, why))
    return found


@dataclasses.dataclass
class Item:
    """One request of one run, with what it should have given."""

    name: str  # of the model
    case: str
    method: str
    golden: dict
    record: Record

    def expected(self, figure, method=None):
        return goldens(self.name)[1][f"{self.case}.{method or self.method}.{figure}"]

    @property
    def request(self):
        return reference.Request.from_json(self.golden["request"])


def item_of(name, case, method, ranks):
    """Run if need be.  One run serves all cases of a model, but infoflow takes each at the ratio of its golden."""
    about = goldens(name)[0]["cases"]
    ratio = about[case]["ratio"] if method == "infoflow" else "0.15"
    cases = [c for c in about if method != "infoflow" or about[c]["ratio"] == ratio]
    return Item(name, case, method, about[case], records(name, method, ratio, cases, ranks)[case])


def over(*methods):
    """Turn a check of one Item into a test of every model, case and method ("own": those with goldens)."""

    def decorate(check):
        @functools.wraps(check)
        def test(self):
            for method in [m for entry in methods for m in (self.methods if entry == "own" else (entry,))]:
                for name in MODELS:
                    for case in goldens(name)[0]["cases"]:
                        with self.subTest(model=name, case=case, method=method):
                            check(self, item_of(name, case, method, self.ranks))

        return test

    return decorate


def locate(item):
    """Name the first layer and the worst row of a wrong cache, from a fresh run of the reference."""
    model, request = reference.load_model(model_path(item.name)), item.request
    expected = reference.prefill(model, request, item.method, item.golden["ratio"], max_new=0)
    for l in range(model.config.n_layer):
        for what, x in (("k", expected.cache.k[l]), ("v", expected.cache.v[l])):
            got = item.record.assembled(f"layers/{l}/{what}").astype(np.float64)
            if got.shape != x.shape:
                return f"layer {l} {what} is {got.shape}, expected {x.shape}"
            if relative_l2(got, x) <= TOLERANCE:
                continue
            error = np.linalg.norm((got - x).reshape(len(x), -1), axis=1) * np.sqrt(len(x)) / np.linalg.norm(x)
            wrong = ~(error <= TOLERANCE)  # NaN counts as wrong
            row = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
            chunk = int(np.searchsorted(request.offsets, row, side="right")) - 1
            return (f"first at layer {l} {what}: {int(wrong.sum())} of {len(x)} rows, worst row {row} of chunk {chunk},"
                    f" {'selected' if row in expected.selected else 'not selected'}")
    return "every layer is within the tolerance when compared in full"


class Fixtures(unittest.TestCase):
    def test_models_are_those_the_goldens_were_made_from(self):
        for name in MODELS:
            with self.subTest(model=name):
                self.assertEqual(make_goldens.weights_digest(model_path(name)), goldens(name)[0]["weights_sha256"])


class Claims:
    """The claims, for a number of ranks that the subclasses fix."""

    ranks = None
    methods = ()  # those that have goldens of their own

    def compare_cache(self, item, like):
        for l in range(make_models.MODELS[item.name][0]["num_hidden_layers"]):
            for what in "kv":
                got = sketch(item.record.assembled(f"layers/{l}/{what}"))
                norm = item.expected(what + "_norm", like)[l]
                error = sketch_distance(got, item.expected(what, like)[l], norm)
                if not error <= TOLERANCE:
                    self.fail(f"layer {l} {what}: relative L2 about {error:.1e} > {TOLERANCE:g}; {locate(item)}")

    @over("own")
    def test_first_logits_equal_the_reference(self, item):
        self.assertLessEqual(relative_l2(item.record.first_logits, item.expected("logits")), TOLERANCE)

    @over("own")
    def test_caches_equal_the_reference(self, item):
        self.compare_cache(item, like=item.method)

    @over("own")
    def test_answers_equal_the_reference(self, item):
        expected, result = item.golden["answers"][item.method], item.record.result
        self.assertEqual(result["finish"], expected["finish"])
        # Whether an answer keeps the end mark that stopped it is for other tests to say.
        ends = hf_model.parse_eos(make_models.MODELS[item.name][0])
        strip = lambda ids: ids[:-1] if ids and ids[-1] in ends else ids
        self.assertEqual(strip(result["answer_ids"]), strip(expected["answer_ids"]))

    @over("infoflow")
    def test_scores_equal_the_reference(self, item):
        self.assertLessEqual(relative_l2(item.record.scores, item.expected("scores")), TOLERANCE)

    @over("infoflow")
    def test_selected_rows_equal_the_reference(self, item):
        self.assertEqual(item.record.selected.tolist(), item.expected("selected").tolist())

    @over("none")
    def test_none_selects_nothing(self, item):
        self.assertEqual(item.record.selected.tolist(), [])

    @over("all")
    def test_all_selects_every_row_behind_the_first_chunk(self, item):
        first = item.request.offsets[1]
        self.assertEqual(item.record.selected.tolist(), list(range(first, item.golden["n_context"])))

    @over("all")
    def test_logits_of_all_equal_full_prefill(self, item):
        self.assertLessEqual(relative_l2(item.record.first_logits, item.expected("logits", "full")), TOLERANCE)

    @over("all")
    def test_caches_of_all_equal_full_prefill(self, item):
        self.compare_cache(item, like="full")

    @over("infoflow")
    def test_cache_of_an_empty_selection_is_that_of_none_bitwise(self, item):
        if len(item.expected("selected")):
            return
        none = item_of(item.name, item.case, "none", self.ranks).record
        for l in range(make_models.MODELS[item.name][0]["num_hidden_layers"]):
            for dataset in (f"layers/{l}/k", f"layers/{l}/v"):
                same = item.record.assembled(dataset).tobytes() == none.assembled(dataset).tobytes()
                self.assertTrue(same, dataset)

    @over("own", "all")
    def test_every_context_row_is_saved_once(self, item):
        self.assertEqual(item.record.assembled("index").tolist(), list(range(item.golden["n_context"])))

    @over("own", "all")
    def test_saved_positions_equal_indices(self, item):
        self.assertEqual(item.record.assembled("positions").tolist(), list(range(item.golden["n_context"])))

    @over("own", "all")
    def test_saved_token_ids_equal_the_context(self, item):
        self.assertEqual(item.record.assembled("token_ids").tolist(), item.request.context)

    @over("none", "infoflow", "all")
    def test_saved_recomputed_flags_mark_the_selected_rows(self, item):
        flags = item.record.assembled("recomputed").astype(bool)
        self.assertEqual(np.flatnonzero(flags).tolist(), item.record.selected.tolist())

    @over("own", "all")
    def test_result_counts_what_the_request_holds(self, item):
        request, result = item.request, item.record.result
        self.assertEqual([result[key] for key in ("n_context", "n_chunk", "n_prompt", "n_selected", "size")],
                         [len(request.context), len(request.chunks), len(request.prompt), len(item.record.selected),
                          self.ranks])


class OneRank(Claims, unittest.TestCase):
    ranks = 1
    methods = ("full", "none", "infoflow")


class ThreeRanks(Claims, unittest.TestCase):
    ranks = 3
    methods = ("none", "infoflow")  # full is a one-rank method


class RankCounts(unittest.TestCase):
    """More ranks than chunks, and counts that divide nothing."""

    counts = (1, 2, 3, 5, 8)

    def compare(self, read):
        for name in MODELS:
            cases = list(goldens(name)[0]["cases"])
            for p in self.counts[1:]:
                for case in cases:
                    with self.subTest(model=name, case=case, ranks=p):
                        one, many = (records(name, "infoflow", "0.15", cases, ranks)[case].result for ranks in (1, p))
                        self.assertEqual(read(many), read(one))

    def test_selection_digest_does_not_depend_on_the_number_of_ranks(self):
        self.compare(lambda result: result["selected_digest"])

    def test_answer_does_not_depend_on_the_number_of_ranks(self):
        self.compare(lambda result: result["answer_ids"])


if __name__ == "__main__":
    unittest.main()
