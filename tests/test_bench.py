"""`ifkv bench` and `ifkv plan` from outside: what their rows promise, and the plots."""
import json
import os
import subprocess
import sys
import tempfile
import unittest

import h5py

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ranks import mpirun

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv"))
EMU_BIN = os.environ.get("IFKV_EMU_BIN", "")
CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2,
}


class ModelFolder(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = self.temporary.name
        with open(os.path.join(self.dir, "config.json"), "w") as f:
            json.dump(CONFIG, f)


class Bench(ModelFolder):
    def bench(self, *args, mpi=0, code=0):
        command = [BIN, "bench", "prefill", "--model", self.dir, "--random-weights", "1", "--threads", "1", "--chunk", "64", *args]
        done = subprocess.run([*mpirun(mpi, BIN), *command], capture_output=True, text=True, timeout=120)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def rows(self, *args, **more):
        return [json.loads(line) for line in self.bench("--json", *args, **more).stdout.splitlines()]

    def test_exact_methods_differ_from_full_by_rounding_alone(self):
        methods = "full,ring,allgather,infoflow/delta,infoflow/query,infoflow/warm"
        for more, ranks in ((dict(mpi=3), []), (dict(), ["--ranks", "4"])):
            with self.subTest(ranks=ranks, **more):
                rows = self.rows("--lengths", "300,471", "--methods", methods, "--repeat", "2", *ranks, **more)
                self.assertEqual([(r["tokens"], r["label"]) for r in rows], [(n, m) for n in (300, 471) for m in methods.split(",")])
                for row in rows:
                    self.assertEqual(row["time"], "measured")
                    self.assertEqual(len(row["runs_ms"]), 2)
                    self.assertIn(row["ttft_ms"], row["runs_ms"])
                    self.assertTrue(0 < row["min_ms"] <= row["ttft_ms"] <= row["max_ms"])
                    if row["method"] in ("ring", "allgather"):
                        self.assertLess(row["error"], 2e-5, row)
                        self.assertGreater(row["error"], 0, "another order of sums must show")
                    if row["method"] == "infoflow":
                        self.assertGreater(row["error"], 1e-3, "15 % of random rows are not all rows")
                        self.assertEqual(row["selected"], int(0.15 * (row["tokens"] - 32)))

    def device(self, matmul, attention):
        path = os.path.join(self.dir, "device.json")
        with open(path, "w") as f:
            json.dump({"matmul_tflops": [matmul, matmul / 2], "attention_tflops": [attention, attention / 2],
                       "memory_gbytes_per_s": 1e9, "passes_gbytes_per_s": 1, "memory_gbytes": 1}, f)
        return path

    def flop(self, tokens, ranks, ratio=None, loaded=False):
        """Products and attention from the definition: 64-token chunks, every one but the first behind a copy of the prefix row;
        of the context's last layer only K and V are computed, of S as much as all layers but one; the question is scored in layer 1."""
        c, prompt = CONFIG, 32
        context, layers = tokens - prompt, c["num_hidden_layers"]
        q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        qkv = c["hidden_size"] * (q + 2 * kv)
        layer = qkv + c["hidden_size"] * (q + 3 * c["intermediate_size"])
        causal = [n * (n + 1) / 2 for n in range(tokens + 1)]
        products, pairs = 0, 0  # of rows and parameters; of queries and keys, in all layers
        if ratio is None:
            products += context * ((layers - 1) * layer + c["hidden_size"] * 2 * kv)
            pairs += causal[context] * (layers - 1)
        else:
            lengths = [min(64, context - 1 - begin) + 1 for begin in range(0, context - 1, 64)]
            selected = int(ratio * context)
            if not loaded:
                products += sum(lengths) * ((layers - 1) * layer + c["hidden_size"] * 2 * kv)
                pairs += sum(causal[n] for n in lengths) * (layers - 1)
            products += ranks * prompt * (layer + qkv)  # scoring, through layer 1: the same rows on every rank
            pairs += 2 * (prompt * context + ranks * causal[prompt])
            products += selected * (layers - 1) * layer
            pairs += selected * (context + lengths[0] + 1) / 2 * (layers - 1)  # evenly over the rows behind the first chunk
        products += prompt * layers * layer + c["vocab_size"] * c["hidden_size"]
        pairs += (prompt * context + causal[prompt]) * layers
        return 2 * products, 4 * q * pairs

    def test_work_and_floor_are_those_of_the_definition(self):
        methods = ["full", "ring", "infoflow/delta", "infoflow/delta/warm", "infoflow/delta/warm-device"]
        matmul, attention = 3e-3, 5e-3
        common = ["--lengths", "471", "--methods", ",".join(methods), "--repeat", "1", "--score-layers", "1", "--device",
                  self.device(matmul, attention)]
        for n_rank, *more in ((1,), (3,), (3, "--project")):
            ranks = ["--ranks", str(n_rank), *more]
            exact, cold, warm = self.flop(471, n_rank), self.flop(471, n_rank, 0.15), self.flop(471, n_rank, 0.15, True)
            works = dict(zip(methods, (exact, exact, cold, warm, warm)))
            rows = self.rows(*common, *ranks)
            for row in rows:
                with self.subTest(ranks=ranks, label=row["label"]):
                    linear, attended = works[row["label"]]
                    self.assertAlmostEqual(row["tflops"] * row["ttft_ms"] * 1e9, linear + attended, delta=1e-6 * linear)
                    self.assertEqual(row["rates"]["source"], common[-1])
                    floor = 1e3 * (linear / matmul + attended / attention) / 1e12  # ms on one device, which ranks share
                    share = row["floor_share"] * row["ttft_ms"] / floor
                    if "--project" in ranks and row["label"] != "full":  # a device each: a third, and what is not dealt evenly
                        self.assertTrue(1 / 3 <= share < 0.6, share)
                    else:
                        self.assertAlmostEqual(share, 1, delta=1e-6)

    def test_measured_rates_are_named_and_make_a_floor(self):
        for more in ([], ["--ranks", "2"]):
            for row in self.rows("--lengths", "300", "--methods", "full,infoflow", "--repeat", "1", *more):
                rates = row["rates"]
                self.assertEqual(rates["source"], "measured")
                for alone, shared in (rates["matmul_tflops"], rates["attention_tflops"], rates["memory_gbytes_per_s"]):
                    self.assertTrue(0 < shared <= alone, rates)
                self.assertTrue(0 < row["floor_share"] < 1, "element-wise passes alone take longer in a model this narrow")
        self.assertIn("of floor: share of the time that these rates would need, measured", self.bench("--lengths", "300").stdout)

    def test_ratio_one_has_no_error_and_warm_is_cold(self):
        cold, warm = self.rows("--lengths", "300", "--methods", "full,infoflow,infoflow/warm", "--ratio", "1", "--repeat", "1")[1:]
        self.assertLess(cold["error"], 2e-5)
        self.assertLess(warm["error"], 2e-5)
        cold, warm = self.rows("--lengths", "300", "--methods", "full,infoflow,infoflow/warm", "--repeat", "1", "--warm-up", "0")[1:]
        self.assertAlmostEqual(cold["error"], warm["error"], delta=2e-5)
        self.assertLess(warm["ms"]["encode"], cold["ms"]["encode"])

    def test_both_tiers_are_warm_and_of_the_same_bits(self):
        methods = "full,infoflow,infoflow/warm,infoflow/warm-device,epic/query/warm-device"
        # longest first and last: what a length leaves in the pool makes room for the next one
        for more in ([], ["--ranks", "3"], ["--ranks", "3", "--project"], ["--warm-up", "0"]):
            rows = self.rows("--methods", methods, "--lengths", "471,300,471", "--repeat", "1", *more)
            for i in range(0, len(rows), 5):
                full, cold, host, device, epic = rows[i:i + 5]
                with self.subTest(more=more, tokens=full["tokens"]):
                    self.assertEqual([row["tier"] for row in rows[i:i + 5]], [None, None, "host", "device", "device"])
                    self.assertEqual([row["warm"] for row in rows[i:i + 5]], [False, False, True, True, True])
                    self.assertEqual(host["error"], device["error"])
                    self.assertAlmostEqual(cold["error"], device["error"], delta=2e-5)
                    self.assertEqual(epic["exchange"], "query")
        self.assertEqual(len(rows), 15)

    def test_the_device_tier_is_sized_for_requests_too(self):
        items = [{"id": str(n), "prefix": [1], "chunks": [list(range(3, 3 + n)), list(range(5, 45))], "prompt": [7]} for n in (60, 20, 90)]
        command = [BIN, "bench", "prefill", "--model", self.dir, "--random-weights", "1", "--json", "--repeat", "1",
                   "--methods", "full,none/warm-device", "--requests", "-"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True,
                              input="".join(json.dumps(item) + "\n" for item in items))
        self.assertEqual([json.loads(line)["tier"] for line in done.stdout.splitlines()], [None, "device"] * 3)

    def test_on_the_cpu_the_device_tier_is_the_hosts_and_no_default(self):
        self.assertEqual([row["label"] for row in self.rows("--lengths", "200", "--repeat", "1")],
                         ["full", "infoflow", "infoflow/warm"])

    def test_projection_says_so_and_slower_links_take_longer(self):
        links = os.path.join(self.dir, "links.json")
        with open(links, "w") as f:
            json.dump({"links": [{"name": "fast", "alpha_us": 0, "gbytes_per_s": 1e6, "control_us": 0},
                                 {"name": "slow", "alpha_us": 1e4, "gbytes_per_s": 1, "control_us": 0}]}, f)
        rows = self.rows("--lengths", "300", "--methods", "full,ring,infoflow/delta", "--ranks", "3", "--project", "--links", links,
                         "--repeat", "1")
        self.assertEqual({row["time"] for row in rows}, {"projected"})
        by = {(row["link"]["name"], row["label"]): row for row in rows}
        for label in ("ring", "infoflow/delta"):
            fast, slow = by["fast", label], by["slow", label]
            # one record, two compositions: the same work, and 10 ms for each of at least two movements
            self.assertEqual(fast["link"]["compute_ms"], slow["link"]["compute_ms"])
            self.assertGreater(slow["ttft_ms"], fast["ttft_ms"] + 20)
            self.assertAlmostEqual(sum(fast["ms"].values()), fast["ttft_ms"], delta=1e-6 * fast["ttft_ms"])
            self.assertTrue(fast["link"]["compute_ms"] / 3 <= fast["ttft_ms"] <= fast["link"]["compute_ms"])
        text = self.bench("--lengths", "300", "--methods", "full", "--ranks", "2", "--project", "--links", links).stdout
        self.assertIn("PROJECTED", text)
        self.assertNotIn("measured  ", text)

    def test_requests_keep_their_chunks_or_are_cut(self):
        path = os.path.join(self.dir, "requests.jsonl")
        with open(path, "w") as f:
            json.dump({"id": "r", "prefix": [1], "chunks": [list(range(3, 43)), list(range(5, 95))], "prompt": [7, 8]}, f)
        command = [BIN, "bench", "prefill", "--model", self.dir, "--random-weights", "1", "--json", "--methods", "full,none", "--requests", path]
        seen = []
        for chunk in ([], ["--chunk", "64"], ["--chunk", "500"]):
            done = subprocess.run([*command, *chunk], capture_output=True, text=True, timeout=120, check=True)
            full, none = map(json.loads, done.stdout.splitlines())
            seen.append((full["tokens"], none["chunk"], none["error"]))
        self.assertEqual([s[:2] for s in seen], [(133, None), (133, 64), (133, 500)])
        self.assertNotAlmostEqual(seen[0][2], seen[1][2], places=4)
        self.assertLess(seen[2][2], 2e-5)  # one chunk behind the prefix is exact prefill

    def test_files_hold_the_rows_and_plots_are_drawn(self):
        out = os.path.join(self.dir, "out")
        self.bench("--lengths", "200,300", "--out", out)
        with open(os.path.join(out, "bench.jsonl")) as f:
            rows = [json.loads(line) for line in f]
        with h5py.File(os.path.join(out, "bench.h5")) as f:
            self.assertEqual(f["tokens"][:].tolist(), [row["tokens"] for row in rows])
            self.assertEqual(len(f.attrs["rows"].splitlines()), len(rows))
            for stored, row in zip(f["ttft_ms"][:], rows):
                for a, b in zip(stored, row["runs_ms"]):
                    self.assertAlmostEqual(a, b, delta=1e-5 * b)
            for name in ("tflops", "floor_share"):
                for stored, row in zip(f[name][:], rows):
                    self.assertAlmostEqual(stored, row[name], delta=1e-5 * row[name])
        self.assertIn("--overwrite", self.bench("--lengths", "200", "--out", out, code=73).stderr)
        python = os.path.join(ROOT, ".cache/venv/bin/python")
        subprocess.run([python, os.path.join(ROOT, "bench/plot.py"), out], check=True, timeout=120)
        for name in ("ttft", "stages", "bytes", "share"):
            self.assertGreater(os.path.getsize(os.path.join(out, name + ".png")), 5000)

    def test_nonsense_is_refused_once(self):
        for args in (["--methods", "ring"], ["--methods", "full,,ring"], ["--lengths", "12x"], ["--lengths", "20"], ["--repeat", "0"],
                     ["--project"], ["--methods", "full,ring/kv/"], ["--methods", "full,infoflow/warm-device/warm"],
                     ["--methods", "full,infoflow/warm-devic"]):
            with self.subTest(args=args):
                errors = [line for line in self.bench(*args, mpi=2, code=2).stderr.splitlines() if "ifkv: error:" in line]
                self.assertEqual(len(errors), 1, errors)

    def test_published_times_stand_beside_the_published_shape_only(self):
        self.assertNotIn("published", self.bench("--lengths", "300", "--methods", "full").stdout)


class Operations(ModelFolder):
    """attention, gemm, elementwise and comm, on the CPU and on the emulated device."""

    @classmethod
    def setUpClass(cls):
        if not EMU_BIN:
            print("SKIP: the emulated device's half of these tests, IFKV_EMU_BIN is not set")

    def bench(self, kind, *args, program=BIN, mpi=0, code=0, **environment):
        command = [*mpirun(mpi, program), program, "bench", kind, *args]
        if kind in ("attention", "gemm", "elementwise"):
            command += ["--model", self.dir]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def rows(self, *args, **more):
        rows = [json.loads(line) for line in self.bench(*args, "--json", **more).stdout.splitlines()]
        for row in rows:
            self.assertEqual(row["wrong"], 0, row)
            self.assertGreater(row["checked"], 0, row)
        return rows

    def places(self):
        """What to run it on: arguments, and what is expected of every row."""
        yield ["--backend", "cpu", "--threads", "1"], {}, "measured"
        yield ["--backend", "cpu", "--ranks", "2", "--threads", "1"], {}, "measured"
        if EMU_BIN:
            yield ["--backend", "cuda"], {"program": EMU_BIN}, "emulated"

    def assert_times(self, row, time):
        self.assertEqual(row["time"], time)
        if time == "emulated":
            self.assertEqual((row["time_ms"], row["min_ms"], row["tflops"]), (None, None, None))
            # bfloat16 results: half a unit in the last place of the largest, in root mean squares
            self.assertTrue(1e-4 < row["error"] < 5 * 2**-8, row)
        else:
            self.assertTrue(0 < row["min_ms"] <= row["time_ms"], row)
            self.assertAlmostEqual(row["tflops"] * row["time_ms"] * 1e9, row["flop"], delta=1e-6 * row["flop"])
            self.assertTrue(0 < row["error"] < 2e-5, row)

    def test_gemm_has_the_products_of_the_model(self):
        c, lengths = CONFIG, (1, 37, 130)
        q, kv, d = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"], c["hidden_size"]
        shapes = [("qkv", q + 2 * kv, d), ("o", d, q), ("gate-up", 2 * c["intermediate_size"], d), ("down", d, c["intermediate_size"])]
        want = [(n, *shape) for n in lengths for shape in shapes] + [(1, "logits", c["vocab_size"], d)]
        for args, more, time in self.places():
            rows = self.rows("gemm", *args, "--lengths", ",".join(map(str, lengths)), **more)
            self.assertEqual([(r["tokens"], r["label"], r["n_out"], r["n_in"]) for r in rows], want)
            for row in rows:
                with self.subTest(args=args, row=row):
                    self.assertEqual(row["flop"], 2 * row["tokens"] * row["n_out"] * row["n_in"])
                    if row["label"] != "logits":  # which are float32
                        self.assert_times(row, time)

    def test_attention_has_the_spans_of_a_prefill(self):
        q, n, chunk = CONFIG["num_attention_heads"] * CONFIG["head_dim"], 157, 64
        causal = n * (n + 1) / 2
        pairs = {"causal": causal, "full": n * n, "chunk 64": sum(m * (m + 1) / 2 for m in (64, 64, 29))}
        for args, more, time in self.places():
            rows = self.rows("attention", *args, "--lengths", str(n), "--chunk", str(chunk), **more)
            self.assertEqual([(r["label"], r["rows"]) for r in rows],
                             [("causal", n), ("full", n), ("chunk 64", n), ("selected 0.15", int(0.15 * n))])
            for row in rows:
                with self.subTest(args=args, row=row):
                    self.assert_times(row, time)
                    if row["label"] in pairs:
                        self.assertEqual(row["flop"], 4 * q * pairs[row["label"]])
                    else:  # a row in each of 23 equal parts
                        self.assertAlmostEqual(row["flop"], 4 * q * 0.15 * causal, delta=4 * q * n)

    def test_elementwise_counts_every_byte_once(self):
        lengths = (1, 37)
        largest = {"rms_norm": 5, "rope": 7, "swiglu": 18, "merge": 6}  # of what is computed, in root mean squares
        for family in ("llama", "qwen3"):  # without and with a norm of heads
            c = {**CONFIG, "model_type": family}
            with open(os.path.join(self.dir, "config.json"), "w") as f:
                json.dump(c, f)
            model, width, ff = c["hidden_size"], c["head_dim"], c["intermediate_size"]
            heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
            for args, more, time in self.places():
                element = 2 if time == "emulated" else 4
                rows = self.rows("elementwise", *args, "--lengths", ",".join(map(str, lengths)), **more)
                norms = 2 * width * element if family == "qwen3" else 0
                listed = lambda n: n * (2 * kv_heads * width * element + 8)
                want = {"copy": lambda n: 2 * n * model * element,
                        "rms_norm": lambda n: (2 * n + 1) * model * element,
                        "rope": lambda n: 2 * n * (heads + kv_heads) * width * element + 2 * n * width * 4 + norms,
                        "swiglu": lambda n: 3 * n * ff * element,
                        "gather": listed,
                        "scatter": listed,
                        "merge": lambda n: n * heads * (width * (4 + 4 + element) + 3 * 4)}
                self.assertEqual([(r["tokens"], r["label"], r["bytes"]) for r in rows],
                                 [(n, label, bytes_of(n)) for n in lengths for label, bytes_of in want.items()])
                for i, row in enumerate(rows):
                    with self.subTest(family=family, args=args, row=row):
                        self.assertEqual(row["time"], time)
                        # what rounding to the result's type leaves; in float32 a sum, an exponential of 14 and its terms, too
                        most = largest.get(row["label"], 0) * (2**-8 if time == "emulated" else 30 * 2**-23)
                        self.assertTrue(0 < row["error"] < most if most else row["error"] == 0)
                        if time == "emulated":
                            self.assertEqual([row[key] for key in ("time_ms", "min_ms", "gb_per_s", "copy_share")], [None] * 4)
                            continue
                        self.assertTrue(0 < row["min_ms"] <= row["time_ms"])
                        self.assertAlmostEqual(row["gb_per_s"] * row["time_ms"] * 1e6, row["bytes"], delta=1e-6 * row["bytes"])
                        copy = rows[i // len(want) * len(want)]
                        self.assertAlmostEqual(row["copy_share"], row["gb_per_s"] / copy["gb_per_s"], delta=1e-6 * row["copy_share"])

    def test_movements_bring_every_byte(self):
        sizes, operations = (1, 1000, 70001), ("bcast", "all_gather", "all_to_all", "shift")
        cases = [(["--ranks", "1"], {}, 1), (["--ranks", "3"], {}, 3), ([], {"mpi": 2}, 2)]
        if EMU_BIN:
            cases += [(["--backend", "cuda", "--ranks", "3"], {"program": EMU_BIN}, 3),
                      (["--backend", "cuda", "--comm", "nccl"], {"program": EMU_BIN, "mpi": 3, "IFKV_EMU_DEVICES": "3"}, 3)]
        for args, more, ranks in cases:
            rows = self.rows("comm", *args, "--lengths", ",".join(map(str, sizes)), **more)
            self.assertEqual([(r["bytes"], r["label"]) for r in rows], [(size, name) for size in sizes for name in operations])
            for row in rows:
                with self.subTest(args=args, row=row):
                    self.assertEqual((row["ranks"], row["checked"]), (ranks, ranks * row["bytes"]))
                    self.assertEqual(row["movement"], "nccl" if "nccl" in args else "mpi" if more.get("mpi") else "thread")
                    if "cuda" in args:
                        self.assertEqual((row["time"], row["time_us"], row["busbw_gbytes_per_s"]), ("emulated", None, None))
                        continue
                    self.assertAlmostEqual(row["algbw_gbytes_per_s"] * row["time_us"], 1e-3 * row["bytes"], delta=1e-6 * row["bytes"])
                    kept = 1 / ranks if row["label"].startswith("all") else 0
                    self.assertAlmostEqual(row["busbw_gbytes_per_s"], (1 - kept) * row["algbw_gbytes_per_s"],
                                           delta=1e-6 * row["algbw_gbytes_per_s"])

    def test_prefill_on_the_emulated_device_has_errors_and_no_times(self):
        if not EMU_BIN:
            self.skipTest("no emulated device: IFKV_EMU_BIN is not set")
        out = os.path.join(self.dir, "out")
        args = ["--model", self.dir, "--random-weights", "1", "--backend", "cuda", "--lengths", "100", "--chunk", "32", "--repeat", "1"]
        more = {"program": EMU_BIN}
        text = self.bench("prefill", *args, "--methods", "full,ring,infoflow", "--ranks", "2", "--out", out, **more).stdout
        self.assertIn("EMULATED", text)
        self.assertNotIn("of floor: share", text)
        with open(os.path.join(out, "bench.jsonl")) as f:
            full, ring, infoflow = map(json.loads, f)
        for row in full, ring, infoflow:
            self.assertEqual(row["time"], "emulated")
            for key in ("ttft_ms", "min_ms", "max_ms", "speedup", "tflops", "floor_share"):
                self.assertIsNone(row[key], key)
            self.assertEqual({*row["ms"].values(), *row["runs_ms"]}, {None})
        self.assertTrue(0 == full["error"] < ring["error"] < 0.1 < infoflow["error"])
        with h5py.File(os.path.join(out, "bench.h5")) as f:
            self.assertEqual(f.attrs["time"].decode(), "emulated")
            self.assertTrue((f["ttft_ms"][:] != f["ttft_ms"][:]).all(), "NaN")
        self.assertIn("emulated", self.bench("prefill", *args, "--ranks", "2", "--project", code=2, **more).stderr)
        host, device = [json.loads(line) for line in self.bench("prefill", *args, "--json", **more).stdout.splitlines()][-2:]
        self.assertEqual([(row["label"], row["tier"]) for row in (host, device)],
                         [("infoflow/warm", "host"), ("infoflow/warm-device", "device")])
        self.assertEqual(host["error"], device["error"])
        python = os.path.join(ROOT, ".cache/venv/bin/python")
        done = subprocess.run([python, os.path.join(ROOT, "bench/plot.py"), out], capture_output=True, text=True, timeout=120)
        self.assertIn("emulated", done.stderr)
        self.assertEqual(done.returncode, 1)

    def test_operands_follow_the_seed(self):
        errors = [[row["error"] for row in self.rows("gemm", "--lengths", "37", "--threads", "1", "--warm-up", "0", "--seed", seed)]
                  for seed in ("1", "1", "2")]
        self.assertEqual(errors[0], errors[1])
        self.assertNotEqual(errors[0], errors[2])

    def test_files_hold_the_rows(self):
        for kind, column in (("gemm", "tflops"), ("attention", "time_ms"), ("elementwise", "copy_share"), ("comm", "busbw_gbytes_per_s")):
            out = os.path.join(self.dir, kind)
            self.bench(kind, "--lengths", "40", "--out", out)
            with open(os.path.join(out, "bench.jsonl")) as f:
                rows = [json.loads(line) for line in f]
            with h5py.File(os.path.join(out, "bench.h5")) as f:
                self.assertEqual(f.attrs["kind"].decode(), kind)
                self.assertEqual(f.attrs["rows"].decode().splitlines(), [row["label"] for row in rows])
                self.assertEqual(f["wrong"][:].tolist(), [0] * len(rows))
                for stored, row in zip(f[column][:], rows):
                    self.assertAlmostEqual(stored, row[column], delta=1e-5 * abs(row[column]))

    def test_a_rate_above_the_peak_is_refused(self):
        path = os.path.join(self.dir, "device.json")
        device = {"matmul_tflops": 1, "attention_tflops": 1, "memory_gbytes_per_s": 1, "passes_gbytes_per_s": 1, "memory_gbytes": 1}
        for peak, code in ((1e-9, 80), (1e6, 0)):
            with open(path, "w") as f:
                json.dump({**device, "peak_tflops": peak}, f)
            for kind in ("gemm", "attention"):
                done = self.bench(kind, "--lengths", "40", "--device", path, "--json", "--ranks", "2", code=code)
                self.assertEqual(done.stderr.count("expected at most the peak"), int(code == 80))
                for row in map(json.loads, done.stdout.splitlines()):
                    self.assertAlmostEqual(row["peak_share"], row["tflops"] / peak, delta=1e-6 * row["peak_share"])

    def test_nonsense_is_refused_once(self):
        for kind, *args in (["gem"], ["gemm", "--lengths", "0"], ["attention", "--ratio", "2"], ["elementwise", "--lengths", "8,"],
                            ["comm", "--repeat", "0"]):
            with self.subTest(args=args):
                errors = [line for line in self.bench(kind, *args, mpi=2, code=2).stderr.splitlines() if "ifkv: error:" in line]
                self.assertEqual(len(errors), 1, errors)


class Plan(unittest.TestCase):
    def plan(self, *args):
        done = subprocess.run([BIN, "plan", "--model", "configs/models/Qwen3-14B", *args], cwd=ROOT, capture_output=True, text=True,
                              timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def rows(self, *args):
        found = {}
        for line in self.plan("--json", *args).splitlines():
            row = json.loads(line)
            found[row["tokens"], row["way"]] = row
        return found

    def test_floors_are_those_of_the_published_analysis(self):
        # algorithm 9.2, P = 4, ratio 0.15, chunks of 2048, ms: (fast, slow) rates, rounded up there
        want = {
            8192: [(352, 388), (88, 97), (96, 108), (94, 102), (19, 21)],
            16384: [(788, 886), (197, 222), (229, 263), (191, 208), (36, 40)],
            32768: [(1914, 2212), (479, 553), (606, 718), (394, 432), (79, 91)],
            131072: [(15774, 19403), (3944, 4851), (5974, 7490), (1878, 2123), (603, 741)],
        }
        ways = ["full, one rank", "ring", "allgather", "infoflow/delta", "infoflow/delta/warm"]
        rows = self.rows("--ranks", "4")
        for tokens, floors in want.items():
            for way, (fast, slow) in zip(ways, floors):
                row = rows[tokens, way]
                self.assertTrue(fast - 1.5 <= row["floor_fast_ms"] <= fast + 1, (tokens, way, row))
                self.assertTrue(slow - 1.5 <= row["floor_slow_ms"] <= slow + 1, (tokens, way, row))

    def test_bytes_and_memory_are_those_of_the_formulas(self):
        row = 2 * 8 * 128 * 2  # K and V of a token and layer, bf16
        for tokens, ranks in ((32768, 4), (1 << 20, 128)):
            rows = self.rows("--lengths", str(tokens), "--ranks", str(ranks))
            share = (ranks - 1) / ranks
            self.assertAlmostEqual(rows[tokens, "ring"]["mb_per_rank_and_layer"], share * tokens * row / 1e6, places=2)
            selected = int(0.15 * tokens)
            self.assertAlmostEqual(rows[tokens, "infoflow/delta"]["mb_per_rank_and_layer"], share * selected * row / 1e6,
                                   delta=row / 1e6 * ranks)
            memory = rows[tokens, "infoflow/delta"]["memory"]
            self.assertEqual(memory["copy"], tokens * row * 40)
            self.assertEqual(memory["fits"], tokens == 32768)
            self.assertTrue(rows[tokens, "infoflow/query"]["memory"]["fits"])

    def test_choice_follows_length(self):
        text = self.plan("--lengths", "8192,131072", "--ranks", "4")
        self.assertIn("8192 tokens: --method auto takes ring (infoflow/delta ", text)
        self.assertIn("131072 tokens: --method auto takes infoflow (infoflow/delta ", text)
        self.assertRegex(text, r"from about 1\d\d\d\d tokens on")


if __name__ == "__main__":
    unittest.main()
