"""The chunk store through the command line tool: --store, --store-size, `ifkv store`."""
import glob
import json
import os
import random
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from test_cli import BIN, CONFIG, N_VOCAB, Tool, request

import h5py
import numpy as np


def documents(n, length, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(3, N_VOCAB) for _ in range(length)] for _ in range(n)]


class Store(Tool):
    # in memory where there is such a place: thousands of entries are published here, each synced to its disk
    FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    DOCUMENTS = documents(6, 20)

    def items(self, *orders):
        return [request(id=str(i), chunks=[self.DOCUMENTS[j] for j in order]) for i, order in enumerate(orders)]

    def entries(self):
        return sorted(glob.glob(os.path.join(self.path("store"), "*.h5")))

    def fill(self, items, *args, **more):
        return self.prefill(items, "--store", self.path("store"), *args, **more)

    def kv(self, out, rank=0):
        """K and V by index, whatever rank holds them."""
        rows = {}
        for path in sorted(glob.glob(os.path.join(self.path(out), "0.kv*.h5"))):
            with h5py.File(path) as f:
                for layer in f["layers"]:
                    for name in "kv":
                        for index, row in zip(f["index"][:], f["layers"][layer][name][:]):
                            rows[layer, name, index] = row.tobytes()
        return rows

    def stores(self, out):
        return [line["store"] for line in self.results(out)]

    def entry_kinds(self):
        """An entry of the prefix rows and one of a chunk: the first has no ids behind its prefix."""
        kinds = {}
        for name in self.entries():
            with h5py.File(name) as f:
                kinds["chunk" if len(f["token_ids"]) else "prefix"] = name
        return kinds

    def test_cold_mixed_and_warm_runs_give_the_same_bits(self):
        items = self.items([0, 1, 2, 3])
        self.assert_answer(self.fill(items, "--save-kv", out="cold"), 0)
        store = {"hits": 0, "misses": 5, "tokens_hit": 0, "hit_fraction": 0}
        self.assertEqual(self.stores("cold"), [store])
        for i, more in enumerate([{}, {"ranks": 3}, {"mpi": 2}]):
            args = ["--comm", "thread", "--ranks", "3"] if "ranks" in more else []
            for is_mixed in [False, True]:
                out = f"warm{i}{is_mixed}"
                if is_mixed:
                    os.remove(self.entries()[0])
                    os.remove(self.entries()[1])
                with self.subTest(out=out):
                    self.assert_answer(self.fill(items, "--save-kv", *args, out=out, mpi=more.get("mpi", 0)), 0)
                    self.assertEqual(self.stores(out)[0]["hits"], 3 if is_mixed else 5)
                    self.assertEqual(self.results(out)[0]["answer_ids"], self.results("cold")[0]["answer_ids"])
                    self.assertEqual(self.results(out)[0]["selected_digest"],
                                     self.results("cold")[0]["selected_digest"])

    def test_rows_of_a_warm_run_on_any_ranks_are_the_same_bits(self):
        items = self.items([0, 1, 2, 3])
        self.assert_answer(self.fill(items, "--save-kv", "--method", "none", out="cold"), 0)
        for mpi in [0, 2, 3]:
            out = f"warm{mpi}"
            self.assert_answer(self.fill(items, "--save-kv", "--method", "none", out=out, mpi=mpi), 0)
            self.assertEqual(self.stores(out)[0]["hit_fraction"], 1)
            self.assertEqual(self.kv(out), self.kv("cold"))

    def test_rows_agree_with_a_run_without_a_store(self):
        items = self.items([0, 1, 2, 3])
        self.assert_answer(self.fill(items, "--save-kv", "--method", "none", out="cold"), 0)
        self.assert_answer(self.prefill(items, "--save-kv", "--method", "none", out="without"), 0)
        self.assertEqual(self.stores("without"), [None])
        with_store, without = self.kv("cold"), self.kv("without")
        self.assertEqual(with_store.keys(), without.keys())
        a, b = (np.frombuffer(b"".join(rows[key] for key in without), np.float32) for rows in (with_store, without))
        self.assertLess(np.linalg.norm(a - b) / np.linalg.norm(b), 2e-5)

    def test_a_document_is_found_at_any_place(self):
        self.assert_answer(self.fill(self.items([0, 1, 2], [2, 0, 3], [1, 3, 2, 0])), 0)
        self.assertEqual([s["misses"] for s in self.stores("out")], [4, 1, 0])
        with open(os.path.join(self.path("out"), "results.jsonl")) as f:
            n = [json.loads(line)["n_context"] for line in f]
        self.assertEqual(self.stores("out")[1]["tokens_hit"], n[1] - 20)

    def test_the_table_says_cold_warm_or_a_share(self):
        text = self.fill(self.items([0, 1], [0, 2], [0, 1])).stdout.decode()
        last = [line.split()[-1] for line in text.splitlines() if not line.startswith("#")]
        self.assertEqual((last[0], last[2]), ("cold", "warm"))
        self.assertRegex(last[1], r"^\d+\.\d%$")

    def test_another_model_seed_rotation_or_prefix_is_never_served(self):
        items = self.items([0, 1, 2])
        runs = [dict(), dict(seed="2"), dict(config={"rope_theta": 20000.0}), dict(config={"rms_norm_eps": 1e-6}),
                dict(prefix=[1, 4])]
        for i, run in enumerate(runs):
            self.write_config(dict(CONFIG, **run.get("config", {})))
            changed = [dict(item, prefix=run.get("prefix", item["prefix"])) for item in items]
            self.assert_answer(self.fill(changed, "--random-weights", run.get("seed", "1"), out=f"out{i}"), 0)
            self.assertEqual(self.stores(f"out{i}")[0]["hits"], 0)
        self.assertEqual(len(self.entries()), 4 * len(runs))

    def test_a_damaged_entry_is_one_warning_from_whatever_rank(self):
        items = self.items([0, 1, 2, 3])
        self.assert_answer(self.fill(items, out="cold"), 0)
        for name, mpi in zip(self.entries(), [0, 2, 3, 3, 0]):
            with open(name, "r+b") as f:
                f.seek(random.Random(name).randrange(os.path.getsize(name)))
                byte = f.read(1)
                f.seek(-1, os.SEEK_CUR)
                f.write(bytes([byte[0] ^ 4]))
            done = self.fill(items, "--overwrite", out="warm", mpi=mpi)
            self.assert_answer(done, 0)
            warnings = [line for line in done.stderr.decode().splitlines() if "warning: store" in line]
            self.assertEqual(len(warnings), 1, warnings)
            self.assertIn(os.path.basename(name), warnings[0])
            self.assertEqual(self.results("warm")[0]["answer_ids"], self.results("cold")[0]["answer_ids"])
            self.assertEqual(self.stores("warm")[0]["misses"], 1)
        self.assert_answer(self.run_tool("store", "verify", self.path("store")), 0)

    def test_after_fifty_kills_while_200_documents_fill_it_the_store_serves_nothing_wrong(self):
        items = [request(id=str(i), chunks=documents(4, 30, i)) for i in range(50)]
        self.assert_answer(self.prefill(items, out="without"), 0)
        draw = random.Random()
        n_partly = 0
        for _ in range(50):
            draw.shuffle(items)
            for name in draw.sample(self.entries(), len(self.entries()) // 2):
                os.remove(name)
            n_wanted = draw.randrange(len(self.entries()) + 1, 180)
            process = subprocess.Popen([BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                        self.write_requests(items), "--out", self.path("out"), "--overwrite",
                                        "--store", self.path("store"), "--max-new", "1", "--quiet"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(self.entries()) < n_wanted and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(0.002 * draw.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
            n_partly += n_wanted <= len(self.entries()) < 201
        self.assertGreater(n_partly, 40)  # killed while it was filled
        self.assert_answer(self.run_tool("store", "verify", self.path("store")), 0)
        kinds = self.entry_kinds()
        self.assertEqual(set(kinds), {"chunk", "prefix"})
        for name in kinds.values():  # a flipped byte in an entry of every kind
            with open(name, "r+b") as f:
                at = draw.randrange(os.path.getsize(name))
                byte = os.pread(f.fileno(), 1, at)
                os.pwrite(f.fileno(), bytes([byte[0] ^ 1 << draw.randrange(8)]), at)
        done = self.fill(items, "--overwrite")
        self.assert_answer(done, 0)
        self.assertEqual(done.stderr.decode().count("warning: store"), len(kinds), done.stderr)
        answers = {line["id"]: line["answer_ids"] for line in self.results("without")}
        self.assertEqual({line["id"]: line["answer_ids"] for line in self.results()}, answers)
        self.assertGreater(sum(s["hits"] for s in self.stores("out")), 50)
        self.assertEqual(len(self.entries()), 201)

    def test_two_jobs_may_fill_one_store(self):
        self.write_requests([request(id=str(i), chunks=documents(4, 30, i)) for i in range(12)])
        jobs = [subprocess.Popen([BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                  self.path("requests.jsonl"), "--out", self.path(out), "--store", self.path("store"),
                                  "--store-size", "2M", "--max-new", "2", "--threads", "1"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for out in ("a", "b")]
        for job in jobs:
            text = job.communicate(timeout=60)[1]
            self.assertEqual((job.returncode, b"store" in text), (0, False), text)
        self.assertEqual([r["answer_ids"] for r in self.results("a")], [r["answer_ids"] for r in self.results("b")])
        self.assert_answer(self.run_tool("store", "verify", self.path("store")), 0)
        self.assertLessEqual(sum(map(os.path.getsize, self.entries())), 2 << 20)

    def test_verify_holds_against_full_prefill(self):
        path = self.write_requests(self.items([0, 1, 2], [2, 1, 0]))
        for _ in range(2):
            done = self.run_tool("verify", "--model", self.model, "--random-weights", "1", "--requests", path,
                                 "--store", self.path("store"), "--comm", "thread", "--ranks", "2")
            self.assert_answer(done, 0)
        self.assertEqual(len(self.entries()), 4)

    def test_list_and_prune(self):
        self.assert_answer(self.fill(self.items([0, 1, 2])), 0)
        done = self.run_tool("store", "ls", self.path("store"))
        self.assert_answer(done, 0)
        lines = [line.split() for line in done.stdout.decode().splitlines() if not line.startswith("#")]
        self.assertEqual(sorted(line[1] for line in lines), ["2", "20", "20", "20"])
        done = self.run_tool("store", "prune", self.path("store"), "--store-size", "0")
        self.assert_answer(done, 0)
        self.assertEqual(self.entries(), [])

    def test_wrong_arguments(self):
        for value in ["-1", "1X", "x", "1KK", "99999999999999999999", "99999999T", "1.5G"]:
            with self.subTest(value=value):
                self.assert_answer(self.fill([request()], "--store-size", value), 2, "--store-size")
        self.assert_answer(self.run_tool("store", "prune", self.dir.name), 2, "--store-size")
        self.assert_answer(self.run_tool("store", "frobnicate", self.dir.name), 2, "frobnicate")
        self.assert_answer(self.run_tool("store", "ls"), 2)
        self.assert_answer(self.run_tool("store", "ls", self.path("none")), 66, "none")
        self.assert_answer(self.prefill([request()], "--store", "/dev/null/x"), 73, "/dev/null/x")
        self.assert_answer(self.prefill([request()], "--store", "/dev/null/x", mpi=3), 73, "/dev/null/x")


if __name__ == "__main__":
    unittest.main()
