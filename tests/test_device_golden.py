#!/usr/bin/env python3
"""The ifkv tool on the emulated device against the float64 reference, on the tiny models of tests/reference: python3
tests/test_device_golden.py.  On 1, 2 and 4 ranks, as threads of one process and, under mpirun, over the stand-in for NCCL
(left out where the tool was built without MPI).

Environment: IFKV_BIN names the tool with the emulated device, IFKV_DEVICE_GOLDEN=all takes every model and case instead
of those of SOME.  Needs numpy and h5py.

Bound (algorithm 8).  Logits may be 1.5 times as far from float64 as those of the reference that rounds what it stores to
bfloat16 (narrow_reference.py), in relative L2 over all cases together: roundings are many, and so the two distances are
alike.  Scores err likewise, and the selection is what they say.  Against float64 a row may change places with the one at
the threshold only where the errors of both allow it, with the number of ranks only within a relative 1e-3.  Who moves the
bytes changes no bit.
"""
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

# Tiny products: BLAS threads would only spin, on a busy machine for minutes.  Set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import h5py  # noqa: E402
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "reference")]
import ifkv_reference as reference  # noqa: E402
import make_models  # noqa: E402
import narrow_reference  # noqa: E402
from ranks import has_mpi, mpirun  # noqa: E402

BINARY = os.environ.get("IFKV_BIN", os.path.join(os.path.dirname(HERE), "build", "ifkv-emu"))
BOUND = 1.5
RANKS_GAP = 1e-3
RUN_TIMEOUT_S = 300
# d_head 64 with K/V heads for three query heads each, and d_head 128 with one for one.
SOME = {"llama_g3_scaled_sharded": ("one_token_chunk",), "qwen3_g1_wide": ("no_prefix",)}
WAYS = (("self", 1), ("thread", 2), ("thread", 4)) + ((("nccl", 2), ("nccl", 4)) if has_mpi(BINARY) else ())


@dataclasses.dataclass
class Case:
    """One request and what float64 makes of it."""

    model: str  # a directory
    raw: dict  # the request as JSON
    ratio: str
    logits: dict  # by method: first logits
    selected: np.ndarray
    scores: np.ndarray

    @property
    def request(self):
        return reference.Request.from_json(self.raw)

    def wide_logits(self, method, selected):
        """What float64 gives for a selection."""
        if method != "infoflow" or np.array_equal(selected, self.selected):
            return self.logits[method]
        return self._rerun(reference.prefill, model_of(self.model), method, selected)

    def narrow_logits(self, method, selected):
        return self._rerun(narrow_reference.prefill, narrow_model_of(self.model), method, selected)

    def _rerun(self, prefill, model, method, selected):
        chosen = {"method": "random", "chosen": selected} if method == "infoflow" else {"method": method}
        return prefill(model, self.request, max_new=1, **chosen).first_logits

    @functools.cached_property
    def narrow_scores(self):
        return narrow_reference.prefill(narrow_model_of(self.model), self.request, "infoflow", self.ratio,
                                        score_layer_choice="published", max_new=1).scores


    def worst_score_error(self):
        """Of bfloat16, relative, over the rows that are selected or have half the score of the last of these."""
        if not len(self.selected):
            return 0.0
        near = self.scores >= self.scores[self.selected].min() / 2
        return float(np.max(np.abs(self.narrow_scores[near] / self.scores[near] - 1)))


@functools.lru_cache(maxsize=None)
def model_of(path):
    return reference.load_model(path)


@functools.lru_cache(maxsize=None)
def narrow_model_of(path):
    return narrow_reference.narrow_model(reference.load_model(path))


def golden_cases(models):
    """Those of SOME, or all, as a list; the models are written below the directory `models`."""
    cases, is_all = [], os.environ.get("IFKV_DEVICE_GOLDEN") == "all"
    for name in make_models.MODELS if is_all else SOME:
        base = os.path.join(HERE, "fixtures", "goldens", name)
        with open(base + ".json") as f:
            about = json.load(f)["cases"]
        with np.load(base + ".npz") as z:
            arrays = dict(z)
        path = make_models.make_model(models, name)
        for case in about if is_all else SOME[name]:
            cases.append(Case(path, about[case]["request"], about[case]["ratio"],
                              {m: arrays[f"{case}.{m}.logits"] for m in ("full", "none", "infoflow")},
                              arrays[f"{case}.infoflow.selected"], arrays[f"{case}.infoflow.scores"]))
    return cases


@dataclasses.dataclass
class Outcome:
    logits: np.ndarray
    selected: np.ndarray
    scores: np.ndarray  # or None


def run_tool(out, cases, method, way):
    """Run requests of one model and one ratio.  Returns their outcomes."""
    comm, ranks = way
    shutil.rmtree(out, ignore_errors=True)
    with open(out + ".jsonl", "w") as f:
        f.writelines(json.dumps(case.raw) + "\n" for case in cases)
    command = [BINARY, "prefill", "--model", cases[0].model, "--requests", out + ".jsonl", "--out", out, "--quiet",
               "--backend", "cuda", "--method", method, "--ratio", cases[0].ratio, "--max-new", "1", "--save-logits",
               "--comm", comm]
    command += ["--score-layers", "published", "--save-scores"] if method == "infoflow" else []
    command += ["--ranks", str(ranks)] if comm == "thread" else []
    command = [*mpirun(ranks if comm == "nccl" else 0, BINARY), *command]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, timeout=RUN_TIMEOUT_S, env=dict(os.environ, IFKV_EMU_DEVICES=str(ranks)))
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}")
    with open(os.path.join(out, "results.jsonl")) as f:
        for result in map(json.loads, f):
            assert (result["comm"], result["size"]) == way, f"{result['comm']} on {result['size']} ranks: {command}"
    with open(os.path.join(out, "manifest.jsonl")) as f:
        records = {m["id"]: m["record"] for m in map(json.loads, f)}
    outcomes = []
    for case in cases:
        with h5py.File(os.path.join(out, records[case.raw["id"]])) as f:
            outcomes.append(Outcome(f["first_logits"][:], f["selected"][:].astype(np.int64),
                                    f["scores"][:] if "scores" in f else None))
    return outcomes


def run_all(directory, cases, method, way):
    """The outcomes of cases of any models and ratios, in their order."""
    groups, outcomes = {}, {}
    for i, case in enumerate(cases):
        groups.setdefault((case.model, case.ratio if method == "infoflow" else ""), []).append(i)
    for group in groups.values():
        found = run_tool(os.path.join(directory, "out"), [cases[i] for i in group], method, way)
        outcomes.update(zip(group, found))
    return [outcomes[i] for i in range(len(cases))]


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def pooled(errors):
    return float(np.sqrt(np.mean(np.square(errors))))


def logit_errors(cases, method, outcomes):
    """Relative errors (of the device, of bfloat16) of the first logits, over all cases together."""
    wide = [case.wide_logits(method, o.selected) for case, o in zip(cases, outcomes)]
    narrow = [case.narrow_logits(method, o.selected) for case, o in zip(cases, outcomes)]
    return (pooled([relative(o.logits, w) for o, w in zip(outcomes, wide)]),
            pooled([relative(n, w) for n, w in zip(narrow, wide)]))


def swaps(selected, other, scores):
    """The rows that one of two selections holds, and how far the farthest is from the threshold of the first, relative."""
    rows = np.setxor1d(selected, other)
    threshold = scores[selected].min() if len(selected) else 0
    return rows, float(np.max(np.abs(scores[rows] / threshold - 1), initial=0)) if len(rows) else 0.0


class DeviceGolden(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory(prefix="ifkv-device-golden-")
        cls.cases = golden_cases(cls.scratch.name)
        cls.found = {}

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def outcomes(self, method, way):
        if (method, way) not in self.found:
            self.found[method, way] = run_all(self.scratch.name, self.cases, method, way)
        return self.found[method, way]

    def assert_bounded(self, method, way):
        device, bfloat16 = logit_errors(self.cases, method, self.outcomes(method, way))
        print(f"{method} {way[0]} {way[1]}: error of logits {device:.2e}, of bfloat16 {bfloat16:.2e}", file=sys.stderr)
        self.assertGreater(bfloat16, 1e-4)  # or nothing was rounded
        self.assertLessEqual(device, BOUND * bfloat16)

    def test_logits_of_exact_prefill_err_as_bfloat16(self):
        self.assert_bounded("full", ("self", 1))

    def test_logits_without_recompute_err_as_bfloat16(self):
        for way in WAYS:
            with self.subTest(way=way):
                self.assert_bounded("none", way)

    def test_logits_err_as_bfloat16(self):
        for way in WAYS:
            with self.subTest(way=way):
                self.assert_bounded("infoflow", way)

    def test_scores_err_as_bfloat16(self):
        narrow = pooled([relative(case.narrow_scores, case.scores) for case in self.cases])
        for way in WAYS:
            with self.subTest(way=way):
                found = self.outcomes("infoflow", way)
                device = pooled([relative(o.scores, case.scores) for case, o in zip(self.cases, found)])
                self.assertLessEqual(device, BOUND * narrow)

    def test_the_rows_with_the_best_scores_are_selected(self):
        for way in WAYS:
            for case, outcome in zip(self.cases, self.outcomes("infoflow", way)):
                with self.subTest(way=way, case=case.raw["id"]):
                    best, _ = reference.select_best(outcome.scores, case.request.offsets[1], case.ratio)
                    self.assertEqual(outcome.selected.tolist(), best.tolist())

    def test_selections_differ_only_where_scores_are_close(self):
        for way in WAYS:
            for case, outcome in zip(self.cases, self.outcomes("infoflow", way)):
                with self.subTest(way=way, case=case.raw["id"]):
                    self.assertEqual(len(outcome.selected), len(case.selected))
                    _, distance = swaps(case.selected, outcome.selected, case.scores)
                    self.assertLessEqual(distance, 2 * BOUND * case.worst_score_error())

    def test_selections_do_not_depend_on_the_number_of_ranks(self):
        for way in WAYS[1:]:
            for case, one, many in zip(self.cases, self.outcomes("infoflow", WAYS[0]), self.outcomes("infoflow", way)):
                with self.subTest(way=way, case=case.raw["id"]):
                    self.assertEqual(len(many.selected), len(one.selected))
                    self.assertLessEqual(swaps(one.selected, many.selected, one.scores)[1], RANKS_GAP)

    def test_nccl_moves_the_bits_that_threads_move(self):
        for method in ("none", "infoflow"):
            for ranks in (2, 4):
                threads, nccl = (self.outcomes(method, (comm, ranks)) for comm in ("thread", "nccl"))
                for case, a, b in zip(self.cases, threads, nccl):
                    with self.subTest(method=method, ranks=ranks, case=case.raw["id"]):
                        self.assertEqual(a.selected.tolist(), b.selected.tolist())
                        self.assertEqual(a.logits.tobytes(), b.logits.tobytes())


if __name__ == "__main__":
    unittest.main()
