"""The chunk store through the command line tool: --store, --store-size, --store-device, `ifkv store`."""
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
from test_cli import BIN, CONFIG, EMULATED, N_VOCAB, Tool, request

import h5py
import numpy as np


def documents(n, length, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(3, N_VOCAB) for _ in range(length)] for _ in range(n)]


class StoreTool(Tool):
    # in memory where there is such a place: thousands of entries are published here, each synced to its disk
    FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    DOCUMENTS = documents(6, 20)

    def items(self, *orders):
        return [request(id=str(i), chunks=[self.DOCUMENTS[j] for j in order]) for i, order in enumerate(orders)]

    def entries(self):
        return sorted(glob.glob(os.path.join(self.path("store"), "*.h5")))

    def fill(self, items, *args, **more):
        return self.prefill(items, "--store", self.path("store"), *args, **more)

    def kv(self, out, name="0"):
        """K and V by index, whatever rank holds them."""
        rows = {}
        for path in sorted(glob.glob(os.path.join(self.path(out), f"{name}.kv*.h5"))):
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


class Store(StoreTool):
    def test_cold_mixed_and_warm_runs_give_the_same_bits(self):
        items = self.items([0, 1, 2, 3])
        self.assert_answer(self.fill(items, "--save-kv", out="cold"), 0)
        store = {"hits": 0, "misses": 5, "tokens_hit": 0, "hit_fraction": 0, "tokens_disk": 0, "tokens_device": 0}
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
            for option in ["--store-size", "--store-device"]:
                with self.subTest(value=value, option=option):
                    self.assert_answer(self.fill([request()], option, value), 2, option)
        self.assert_answer(self.run_tool("store", "prune", self.dir.name), 2, "--store-size")
        self.assert_answer(self.run_tool("store", "frobnicate", self.dir.name), 2, "frobnicate")
        self.assert_answer(self.run_tool("store", "ls"), 2)
        self.assert_answer(self.run_tool("store", "ls", self.path("none")), 66, "none")
        self.assert_answer(self.prefill([request()], "--store", "/dev/null/x"), 73, "/dev/null/x")
        self.assert_answer(self.prefill([request()], "--store", "/dev/null/x", mpi=3), 73, "/dev/null/x")


class DeviceTier(StoreTool):
    """--store-device: chunks that stay in the memory of the back end while a job lasts."""
    ORDERS = [[0, 1, 2], [2, 0, 3], [1, 3, 2, 0], [0, 1, 2]]
    MISSES = [4, 1, 0, 0]  # the prefix rows are an entry too

    def job(self, *args, out, orders=ORDERS, **more):
        done = self.prefill(self.items(*orders), "--save-kv", *args, out=out, **more)
        self.assert_answer(done, 0)
        return done

    def assert_same_results(self, a, b):
        for x, y in zip(self.results(a), self.results(b), strict=True):
            for key in ("answer_ids", "selected_digest", "n_selected"):
                self.assertEqual(x[key], y[key])

    def test_requests_of_a_job_share_documents(self):
        self.job("--store", self.path("store"), "--method", "none", out="disk")
        for i, more in enumerate([{}, {"ranks": 3}, {"mpi": 2}]):
            args = ["--comm", "thread", "--ranks", "3"] if "ranks" in more else []
            out = f"device{i}"
            with self.subTest(**more):
                self.job("--store-device", "1M", "--method", "none", *args, out=out, mpi=more.get("mpi", 0))
                for name in "0123":
                    self.assertEqual(self.kv(out, name), self.kv("disk", name))
                stores = self.stores(out)
                if not more:
                    self.assertEqual([s["misses"] for s in stores], self.MISSES)
                # the last request has the documents and the places of the first
                self.assertEqual((stores[3]["misses"], stores[3]["hit_fraction"]), (0, 1))
                for s in stores:
                    self.assertEqual((s["tokens_disk"], s["tokens_device"]), (0, s["tokens_hit"]))
        self.assertEqual(len(self.entries()), 5)

    def test_selection_and_answers_are_those_of_a_store(self):
        self.job("--store", self.path("store"), out="disk")
        for size in ["1", "20K", "1M"]:  # nothing fits, some, all
            self.job("--store-device", size, out="device" + size)
            self.assert_same_results("device" + size, "disk")
        self.assertEqual([s["hits"] for s in self.stores("device1")], [0] * 4)
        some, all_of_them = ([s["tokens_device"] for s in self.stores("device" + size)] for size in ("20K", "1M"))
        self.assertTrue(0 < sum(some) < sum(all_of_them), (some, all_of_them))

    def test_it_stands_in_front_of_a_store(self):
        args = ["--store", self.path("store"), "--store-device", "1M"]
        cold = self.stores_of(self.job(*args, out="cold"), "cold")
        self.assertEqual([s["misses"] for s in cold], self.MISSES)
        self.assertEqual([s["tokens_disk"] for s in cold], [0] * 4)
        self.assertEqual(len(self.entries()), 5)
        warm = self.stores_of(self.job(*args, out="warm"), "warm")
        self.assertEqual([s["misses"] for s in warm], [0] * 4)
        n = [line["n_context"] for line in self.results("warm")]
        self.assertEqual([s["tokens_disk"] for s in warm], [n[0], 20, 0, 0])
        self.assertEqual([s["tokens_device"] for s in warm], [0, n[1] - 20, n[2], n[3]])
        self.assert_same_results("warm", "cold")
        for name in "0123":
            self.assertEqual(self.kv("warm", name), self.kv("cold", name))

    def stores_of(self, done, out):
        """The records, after a look at what the table says of the same tokens."""
        lines = [line.split() for line in done.stdout.decode().splitlines()]
        self.assertEqual(lines[1][-3:], ["disk", "device", "store"])
        stores = self.stores(out)
        for line, s in zip(lines[2:], stores, strict=True):
            self.assertEqual(line[-3:-1], [str(s["tokens_disk"]), str(s["tokens_device"])])
        for name, s in zip("0123", stores):
            with h5py.File(os.path.join(self.path(out), name + ".h5")) as f:
                self.assertEqual((f.attrs["store_tokens_disk"], f.attrs["store_tokens_device"]),
                                 (s["tokens_disk"], s["tokens_device"]))
        return stores

    def test_the_table_has_the_tiers_that_are_used(self):
        text = self.job("--store-device", "1M", out="out").stdout.decode().splitlines()
        self.assertEqual(text[1].split()[-3:], ["moved", "device", "store"])
        self.assertEqual([line.split()[-1] for line in text[2:]][0::3], ["cold", "warm"])
        self.assertRegex(text[3].split()[-1], r"^\d+\.\d%$")

    def test_it_may_be_set_like_any_option(self):
        with open(self.path("run.json"), "w") as f:
            json.dump({"store-device": 1 << 20}, f)
        for out, args, env in (("a", [], {"IFKV_STORE_DEVICE": "1024K"}), ("b", ["--run", self.path("run.json")], {})):
            self.job(*args, out=out, env=env)
            self.assertEqual([s["misses"] for s in self.stores(out)], self.MISSES)

    def test_a_run_may_be_resumed_in_another_tier(self):
        self.job("--store", self.path("store"), out="out")
        self.job("--store-device", "1M", "--resume", out="out")
        self.assertEqual(len(self.results()), 4)

    def test_check_counts_it_and_refuses_what_does_not_fit(self):
        args = ["--model", self.model, "--random-weights", "1", "--requests", self.write_requests(self.items([0, 1]))]
        done = self.run_tool("check", *args, "--store-device", "1M")
        self.assert_answer(done, 0)
        row = 3 * 2 * 16 * 4  # layers, K and V, elements, bytes
        self.assertIn(f"+ 1.0 MB for {(1 << 20) // row} tokens of chunks it keeps +", done.stdout.decode())
        self.assert_answer(self.run_tool("check", *args, "--store-device", "1000T"), 69, "memory of a rank", "chunks it keeps")
        self.assert_answer(self.prefill(self.items([0]), "--store-device", "1000T", mpi=2), 69, "memory of a rank")
        self.assertNotIn("keeps", self.run_tool("check", *args).stdout.decode())

    def test_verify_holds_against_full_prefill(self):
        path = self.write_requests(self.items([0, 1, 2], [2, 1, 0]))
        self.assert_answer(self.run_tool("verify", "--model", self.model, "--random-weights", "1", "--requests", path,
                                         "--store-device", "1M", "--comm", "thread", "--ranks", "2"), 0)

    @unittest.skipUnless(EMULATED, "IFKV_EMU_BIN is not set: the CUDA half is not built for the emulated device")
    def test_on_a_device_it_gives_the_bits_of_a_store(self):
        more = dict(tool=EMULATED, timeout=300)
        args = ["--backend", "cuda", "--method", "none"]
        self.job("--store", self.path("store"), *args, out="disk", **more)
        for out, ranks in (("one", []), ("two", ["--ranks", "2"])):
            self.job("--store-device", "1M", *args, *ranks, out=out, **more)
            self.assertEqual(self.stores(out)[3]["tokens_device"], self.results(out)[3]["n_context"])
            for name in "0123":
                self.assertEqual(self.kv(out, name), self.kv("disk", name))


if __name__ == "__main__":
    unittest.main()
