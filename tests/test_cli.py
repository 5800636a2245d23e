"""The command line tool from outside: arguments, requests, output directory, ranks.

Each case is one bad or odd input and its promised answer: exit code, one line that names the thing, no result.
"""
import glob
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import h5py
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ranks import has_mpi, mpirun

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv"))
EMULATED = os.environ.get("IFKV_EMU_BIN")
N_VOCAB = 97
CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": N_VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2,
}
# Codes that would mean a crash or a hang, never an answer.
CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGKILL, 134, 135, 136, 137, 139}


def request(**changes):
    base = {"id": "r", "prefix": [1, 3], "chunks": [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]],
            "prompt": [20, 21, 22], "question": [21]}
    base.update(changes)
    return {key: value for key, value in base.items() if value is not None}


def is_running(pid):
    """Neither gone nor a zombie that only waits for its parent."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Tool(unittest.TestCase):
    FOLDER = None  # of temporary files; None: the system's

    def setUp(self):
        self.dir = tempfile.TemporaryDirectory(dir=self.FOLDER)
        self.addCleanup(self.dir.cleanup)
        self.model = self.path("model")
        os.mkdir(self.model)
        self.write_config(CONFIG)

    def path(self, name):
        return os.path.join(self.dir.name, name)

    def write_config(self, config):
        with open(os.path.join(self.model, "config.json"), "w") as f:
            json.dump(config, f)

    def write_requests(self, requests):
        with open(self.path("requests.jsonl"), "w") as f:
            for item in requests:
                f.write(json.dumps(item) + "\n")
        return self.path("requests.jsonl")

    def run_tool(self, *args, mpi=0, timeout=60, stdin=None, env=None, tool=None, **more):
        command = [tool or BIN, *args]
        return subprocess.run([*mpirun(mpi, command[0]), *command], capture_output=True, timeout=timeout, input=stdin,
                              env=dict(os.environ, **(env or {})), **more)

    def prefill(self, requests, *args, out="out", **more):
        return self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests",
                             self.write_requests(requests), "--out", self.path(out), "--max-new", "4", *args, **more)

    def results(self, out="out"):
        with open(os.path.join(self.path(out), "results.jsonl")) as f:
            return [json.loads(line) for line in f]

    def assert_answer(self, done, code, *parts):
        """Exit `code`; for an error exactly one line that holds every part."""
        text = done.stderr.decode("utf8", "replace")
        self.assertNotIn(done.returncode, CRASHES, text)
        self.assertEqual(done.returncode, code, text)
        errors = [line for line in text.splitlines() if "ifkv: error:" in line]
        self.assertEqual(len(errors), 0 if code == 0 else 1, text)
        for part in parts:
            self.assertIn(part, errors[0])
        if code:
            self.assertRegex(errors[0], r"\[code E\d{4}\]$")


class Arguments(Tool):
    # output of one buffer, and of many
    SHORT_AND_LONG = (["version"], ["bench", "comm", "--comm", "thread", "--ranks", "2", "--lengths", ",".join(map(str, range(1, 40)))])

    def test_a_reader_that_has_gone_is_no_error(self):
        for args in self.SHORT_AND_LONG:
            reader, writer = os.pipe()
            os.close(reader)
            done = subprocess.run([BIN, *args], stdout=writer, stderr=subprocess.PIPE, timeout=60)
            os.close(writer)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertNotIn(b"error", done.stderr)

    def test_a_full_disk_is_an_error(self):
        for args in self.SHORT_AND_LONG:
            with open("/dev/full", "wb") as full:
                done = subprocess.run([BIN, *args], stdout=full, stderr=subprocess.PIPE, timeout=60)
            self.assert_answer(done, 74, "standard output")
            self.assertNotIn(b"Success", done.stderr)

    def test_unknown_option_names_the_nearest(self):
        self.assert_answer(self.prefill([request()], "--metod", "full"), 2, "--metod", "--method")

    def test_unknown_command_names_the_nearest(self):
        self.assert_answer(self.run_tool("prefil"), 2, "prefil", "prefill")

    def test_missing_value(self):
        self.assert_answer(self.run_tool("prefill", "--model"), 2, "--model")

    def test_ratio_must_be_a_decimal_from_0_to_1(self):
        for value in ["1.5", "-1", "nan", "1e999", "0x10", "12abc", "", "1.", ".5", "inf", " 0.5"]:
            with self.subTest(value=value):
                self.assert_answer(self.prefill([request()], "--ratio", value), 2, "ratio")

    def test_counts_must_be_whole_numbers(self):
        for flag in ["--max-new", "--chunk", "--threads", "--ranks", "--seed"]:
            for value in ["-1", "1.5", "x", "99999999999999999999", ""]:
                with self.subTest(flag=flag, value=value):
                    self.assert_answer(self.prefill([request()], flag, value), 2, flag)

    def test_names_must_be_known(self):
        for flag in ["--method", "--exchange", "--score", "--score-rows", "--score-layers", "--geometry", "--hp", "--backend",
                     "--comm", "--placement", "--ride", "--scoring"]:
            with self.subTest(flag=flag):
                self.assert_answer(self.prefill([request()], flag, "frobnicate"), 2, "frobnicate")

    def test_cuda_says_what_is_missing(self):
        done = self.prefill([request()], "--backend", "cuda")
        if b"without CUDA" in done.stderr:
            self.assert_answer(done, 78, "back end cuda")
        elif done.returncode != 0:  # no machine of the tests has a device
            self.assert_answer(done, 69, "back end cuda")
            self.assertRegex(done.stderr.decode(), "no NVIDIA driver|the NVIDIA driver is for|no device is visible")

    @unittest.skipUnless(EMULATED, "IFKV_EMU_BIN is not set: the CUDA half is not built for the emulated device")
    def test_an_emulated_device_is_called_that(self):
        for backend, device in [("cuda", "cuda on emulated device"), ("auto", "cpu on cpu")]:
            done = self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                 self.write_requests([request()]), "--out", self.path(backend), "--backend", backend,
                                 tool=EMULATED)
            self.assert_answer(done, 0)
            self.assertIn(f"backend {device}", done.stdout.decode())

    @unittest.skipUnless(EMULATED, "IFKV_EMU_BIN is not set: the CUDA half is not built for the emulated device")
    def test_devices_too_old_too_few_or_too_small_are_named(self):
        for setting, value, part in [("IFKV_EMU_ARCH", "7.5", "compute capability 7.5, expected 8.0"),
                                     ("IFKV_EMU_DEVICES", "0", "no device is visible"),
                                     ("IFKV_EMU_MEMORY", "1000000", "no memory")]:
            with self.subTest(setting=setting):
                done = self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                     self.write_requests([request()]), "--out", self.path("out"), "--backend", "cuda",
                                     tool=EMULATED, env={setting: value})
                self.assert_answer(done, 69, "back end cuda", part)

    def test_conflicting_options_are_both_named(self):
        self.assert_answer(self.prefill([request()], "--resume", "--overwrite"), 2, "--resume", "--overwrite")

    def test_reorder_is_refused_for_a_context_that_was_cut_unless_forced(self):
        items = [request(id="cut", chunks=None, context=list(range(3, 40)))]
        self.assert_answer(self.prefill(items, "--reorder"), 2, "reorder", "2048")
        self.assert_answer(self.prefill([request()], "--reorder", "--chunk", "9"), 2, "reorder", "9")
        self.assert_answer(self.prefill(items, "--reorder-force", "--chunk", "9"), 0)
        self.assertEqual(sorted(self.results()[0]["chunk_order"]), [0, 1, 2, 3, 4])

    def test_reorder_goes_with_methods_that_score_by_the_question(self):
        for method in ["random", "cacheblend", "full", "ring"]:
            with self.subTest(method=method):
                self.assert_answer(self.prefill([request()], "--reorder", "--method", method), 2, "reorder", method)

    def test_auto_tells_rates_estimates_and_choice_and_runs_it(self):
        for ranks, exact in [(1, "full"), (3, "ring")]:
            with self.subTest(ranks=ranks):
                args = ["--method", "auto", "--exchange", "auto", "--comm", "thread", "--ranks", str(ranks)]
                done = self.prefill([request(chunks=[[5, 6, 7], [8, 9] * 40])], *args, "--overwrite")
                self.assertEqual(done.returncode, 0, done.stderr)
                lines = [line for line in done.stderr.decode().splitlines() if "warning" not in line]
                result = self.results()[0]
                choice = result["auto"]
                self.assertEqual(choice["exact"], exact)
                faster = choice["infoflow_ms"] <= 0.97 * choice["exact_ms"]
                self.assertEqual(result["method"], "infoflow" if faster else exact)
                self.assertIn("rates of a rank: matmul", lines[0])
                self.assertEqual("us a message" in lines[0], ranks > 1)
                self.assertIn(f"method auto: {result['method']}: estimates: {exact} ", lines[1])
                self.assertEqual(len(lines), 3 if faster else 2)
                if faster:
                    self.assertIn("exchange auto: delta", lines[2])
        quiet = self.prefill([request()], "--method", "auto", "--quiet", "--overwrite")
        self.assertEqual((quiet.returncode, quiet.stderr), (0, b""))

    def test_a_choice_of_exchange_is_told_where_it_was_asked_for(self):
        told = self.prefill([request()], "--exchange", "auto")
        self.assertIn("exchange auto: delta: delta needs", told.stderr.decode())
        silent = self.prefill([request()], "--overwrite")
        self.assertEqual(silent.returncode, 0)
        self.assertNotIn(b"exchange auto", silent.stderr)
        self.assertIsNone(self.results()[0]["auto"])

    def test_a_lent_prefix_goes_with_local_scoring(self):
        self.assert_answer(self.prefill([request()], "--local-sink"), 2, "local-sink")

    def test_required_option_is_named(self):
        self.assert_answer(self.run_tool("prefill", "--model", self.model), 2, "--requests")

    def test_unknown_variable_warns_and_names_the_nearest(self):
        done = self.prefill([request()], env={"IFKV_RATOI": "0.5"})
        self.assert_answer(done, 0)
        self.assertIn("IFKV_RATIO", done.stderr.decode())

    @unittest.skipUnless(EMULATED, "IFKV_EMU_BIN is not set: the CUDA half is not built for the emulated device")
    def test_variables_of_the_host_model_are_known_to_its_tool_alone(self):
        read = set()
        for path in glob.glob(os.path.join(ROOT, "tests", "emu", "*.cpp")):
            with open(path) as f:
                read.update(re.findall(r'(?:getenv|env_number)\("(IFKV_EMU_\w+)"', f.read()))
        self.assertIn("IFKV_EMU_DEVICES", read)
        model = dict.fromkeys(read, "1")
        for tool, env, warned in [(EMULATED, model, set()), (EMULATED, {"IFKV_EMU_DEVICE": "1"}, {"IFKV_EMU_DEVICE"}), (BIN, model, read)]:
            done = self.run_tool("version", tool=tool, env=env)
            self.assert_answer(done, 0)
            found = re.findall(r"warning: (IFKV_EMU_\w+) is not a variable", done.stderr.decode())
            self.assertEqual(set(found) - {"IFKV_EMU_BIN"}, warned)  # which is the tests' own

    def test_bad_variable_is_named(self):
        self.assert_answer(self.prefill([request()], env={"IFKV_CHUNK": "x"}), 2, "IFKV_CHUNK")

    def test_flag_wins_over_environment_wins_over_run_file(self):
        with open(self.path("run.json"), "w") as f:
            json.dump({"ratio": "0.2", "method": "random", "score": "l1"}, f)
        self.assert_answer(self.prefill([request()], "--run", self.path("run.json"), "--ratio", "1",
                                        env={"IFKV_METHOD": "infoflow", "IFKV_RATIO": "0.5"}), 0)
        result = self.results()[0]
        self.assertEqual((result["method"], result["n_selected"]), ("infoflow", 8))

    def test_run_file_with_an_unknown_key_is_refused(self):
        with open(self.path("run.json"), "w") as f:
            json.dump({"ratoi": "0.2"}, f)
        self.assert_answer(self.prefill([request()], "--run", self.path("run.json")), 2, "ratoi", "ratio")

    def test_odd_paths_work_or_are_escaped(self):
        out = 'a "b"\n\u00fc'
        self.assert_answer(self.prefill([request()], out=out), 0)
        self.assertEqual(len(self.results(out)), 1)
        self.assert_answer(self.run_tool("prefill", "--model", b"/no\xff\n", "--requests", "x", "--out", "y"), 66, "\\xff\\x0a")
        self.assert_answer(self.run_tool("prefill", "--model", "/" + "x" * 5000, "--requests", "x", "--out", "y"), 66)

    def test_locale_changes_nothing(self):
        a = self.prefill([request()], out="a")
        b = self.prefill([request()], out="b", env={"LC_ALL": "de_DE.UTF-8"})
        self.assertEqual((a.returncode, b.returncode), (0, 0))
        self.assertEqual(self.results("a")[0]["answer_ids"], self.results("b")[0]["answer_ids"])

    def test_closed_standard_streams_do_not_end_up_in_data_files(self):
        self.write_requests([request()])
        code = subprocess.run(["sh", "-c", f'"{BIN}" prefill --model "{self.model}" --random-weights 1 --requests '
                               f'"{self.path("requests.jsonl")}" --out "{self.path("out")}" --max-new 2 <&- >&- 2>&-'],
                              timeout=60).returncode
        self.assertEqual(code, 0)
        self.assertEqual(len(self.results()), 1)

    def test_closed_pipe_is_not_a_crash(self):
        self.write_requests([request(id=str(i)) for i in range(20)])
        done = subprocess.run(["bash", "-c", f'set -o pipefail; "{BIN}" prefill --model "{self.model}" --random-weights 1 '
                               f'--requests "{self.path("requests.jsonl")}" --out "{self.path("out")}" --max-new 2 '
                               f'--json | head -1 >/dev/null; exit "${{PIPESTATUS[0]}}"'], timeout=60)
        self.assertIn(done.returncode, {0, 74})
        self.assertEqual(len(self.results()), 20)

    def test_few_descriptors_suffice_or_are_named(self):
        done = self.prefill([request()], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))
        self.assertNotIn(done.returncode, CRASHES)

    def test_help_goes_to_standard_output(self):
        for args in [["--help"], ["prefill", "--help"], ["verify", "-h"], []]:
            done = self.run_tool(*args)
            self.assertEqual(done.returncode, 0)
            self.assertIn(b"usage: ifkv", done.stdout)
            self.assertEqual(done.stderr, b"")


class Requests(Tool):
    def test_fewer_chunks_than_ranks_work(self):
        self.assert_answer(self.prefill([request(chunks=[[5]])], "--ranks", "5"), 0)
        self.assertEqual(self.results()[0]["n_selected"], 0)

    def test_sequence_longer_than_the_positions_is_refused_before_the_weights(self):
        for count, code in [(2048 - 2 - 3 - 4, 0), (2048 - 2 - 3 - 4 + 1, 65)]:
            with self.subTest(count=count):
                self.assert_answer(self.prefill([request(chunks=[[5] * count])], "--overwrite"), code,
                                   *(["max_position_embeddings", ":1"] if code else []))

    def test_selection_is_clamped_and_recorded(self):
        for ratio, count in [("0", 0), ("0.0001", 1), ("1", 8), ("0.999", 8)]:
            with self.subTest(ratio=ratio):
                self.assert_answer(self.prefill([request()], "--ratio", ratio, "--overwrite"), 0)
                self.assertEqual(self.results()[0]["n_selected"], count)

    def test_standard_input_is_read(self):
        done = self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests", "-", "--out",
                             self.path("out"), stdin=json.dumps(request()).encode())
        self.assert_answer(done, 0)

    def test_duplicate_id_is_refused(self):
        self.assert_answer(self.prefill([request(), request()]), 65, ":2", "id")

    def test_id_never_becomes_a_path(self):
        ids = ["../../etc/x", "a/b", ".", "..", "x" * 5000, "\u00e4\u4e2d", "A", "a", " "]
        self.assert_answer(self.prefill([request(id=i) for i in ids]), 0)
        self.assertEqual([r["id"] for r in self.results()], ids)
        for base, _, files in os.walk(self.dir.name):
            for name in files:
                self.assertTrue(base == self.dir.name or base.startswith((self.path("out"), self.model)), (base, name))

    def test_context_is_cut_every_chunk_tokens(self):
        flat = request(chunks=None, context=[5, 6, 7, 8, 9, 10, 11])
        cut = request(chunks=[[5, 6, 7], [8, 9, 10], [11]])
        self.assert_answer(self.prefill([flat], "--chunk", "3", out="a"), 0)
        self.assert_answer(self.prefill([cut], out="b"), 0)
        a, b = self.results("a")[0], self.results("b")[0]
        for key in ["n_chunk", "selected_digest", "answer_ids"]:
            self.assertEqual(a[key], b[key])

    def test_max_new_of_a_request_wins(self):
        self.assert_answer(self.prefill([request(max_new=0), request(id="s", max_new=2)]), 0)
        self.assertEqual([len(r["answer_ids"]) <= n for r, n in zip(self.results(), (0, 2))], [True, True])

    def test_hdf5_requests_mean_the_same_as_jsonl(self):
        item = request(answers=["a", "b"], meta={"n": 1})
        self.assert_answer(self.prefill([item], out="a"), 0)
        with h5py.File(self.path("requests.h5"), "w") as f:
            f.attrs["format"] = "ifkv-requests"
            group = f.create_group("requests/000000")
            group.attrs["id"] = item["id"]
            group.attrs["answers"] = json.dumps(item["answers"])
            group.attrs["meta"] = json.dumps(item["meta"])
            for name in ["prefix", "prompt", "question"]:
                group[name] = np.array(item[name], dtype=np.int32)
            group["chunk_tokens"] = np.array(sum(item["chunks"], []), dtype=np.int64)
            group["chunk_offsets"] = np.cumsum([0] + [len(c) for c in item["chunks"]])
        for mpi in [0, 3]:
            done = self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                 self.path("requests.h5"), "--out", self.path("b"), "--max-new", "4", "--overwrite", mpi=mpi)
            self.assert_answer(done, 0)
            a, b = self.results("a")[0], self.results("b")[0]
            for key in ["id", "answers", "meta", "answer_ids", "selected_digest", "n_context"]:
                self.assertEqual(a[key], b[key])

    def test_damaged_hdf5_requests_are_refused_on_all_ranks(self):
        with h5py.File(self.path("requests.h5"), "w") as f:
            f.attrs["format"] = "ifkv-requests"
            f.create_group("requests/000000").attrs["id"] = "x"
        with open(self.path("requests.h5"), "rb") as f:
            whole = f.read()
        for data, part in [(whole, "/requests/000000"), (whole[:600], "requests.h5"), (whole[:8], "requests.h5")]:
            with open(self.path("requests.h5"), "wb") as f:
                f.write(data)
            for mpi in [0, 2]:
                with self.subTest(size=len(data), mpi=mpi):
                    done = self.run_tool("prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                         self.path("requests.h5"), "--out", self.path("out"), mpi=mpi)
                    self.assert_answer(done, 65, part)

    def test_model_larger_than_the_machine_is_refused_with_the_plan(self):
        with open(os.path.join(ROOT, "configs", "models", "Qwen3-14B", "config.json")) as f:
            config = dict(json.load(f), num_hidden_layers=4000)
        self.write_config(config)
        # float32; four threads share one copy, and each counts a quarter
        layer = 5120 * (2 + 2 * 40 * 128 + 2 * 8 * 128 + 3 * 17408) + 2 * 128
        weights = f"{(4000 * layer + 2 * 151936 * 5120 + 5120) * 4 / 4 / 1e6:.1f} MB weights"
        for command in [["check"], ["prefill", "--out", self.path("out")]]:
            with self.subTest(command=command):
                self.assert_answer(self.run_tool(*command, "--model", self.model, "--random-weights", "1", "--requests",
                                                 self.write_requests([request()]), "--comm", "thread", "--ranks", "4"),
                                   69, "memory of a rank", weights)

    def test_million_tokens_are_read_and_measured_against_the_positions(self):
        self.assert_answer(self.prefill([request(chunks=[[5] * 1000000])]), 65, "1000009")


class Output(Tool):
    def test_unusable_output_is_refused_before_the_weights(self):
        open(self.path("file"), "w").close()
        for out in ["file", "file/x", "no/such/parent"]:
            with self.subTest(out=out):
                self.assert_answer(self.prefill([request()], out=out), 73)

    def test_results_are_not_overwritten_unasked(self):
        self.assert_answer(self.prefill([request()]), 0)
        self.assert_answer(self.prefill([request()]), 65, self.path("out"), "--resume", "--overwrite")
        self.assert_answer(self.prefill([request()], "--overwrite"), 0)

    def test_resume_skips_what_is_done_and_keeps_the_order(self):
        items = [request(id=str(i), prompt=[20 + i]) for i in range(4)]
        self.assert_answer(self.prefill(items, out="whole"), 0)
        self.assert_answer(self.prefill([items[2]]), 0)
        done = self.prefill(items, "--resume", "--json")
        self.assert_answer(done, 0)
        self.assertEqual(len(done.stdout.splitlines()), 3)
        answers = [(r["id"], r["answer_ids"]) for r in self.results()]
        self.assertEqual(answers, [(r["id"], r["answer_ids"]) for r in self.results("whole")])

    def test_resume_under_other_options_names_the_first_difference(self):
        self.assert_answer(self.prefill([request()]), 0)
        self.assert_answer(self.prefill([request()], "--resume", "--ratio", "0.5"), 65, "ratio", "0.5")

    def test_killed_run_resumes_to_the_results_of_an_unbroken_one(self):
        items = [request(id=str(i), prompt=[20 + i % 60], chunks=[[5 + i % 50] * 300, [7] * 200]) for i in range(40)]
        self.assert_answer(self.prefill(items, "--save-kv", out="whole"), 0)
        self.write_requests(items)
        args = [BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests",
                self.path("requests.jsonl"), "--out", self.path("out"), "--max-new", "4", "--save-kv", "--resume"]
        for delay in [0.02, 0.05, 0.1, 0.15]:
            process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(delay)
            process.kill()
            process.wait()
            if os.path.exists(os.path.join(self.path("out"), "manifest.jsonl")):
                self.assert_answer(self.run_tool("verify", self.path("out")), 0)
        self.assert_answer(self.run_tool(*args[1:]), 0)
        self.assert_answer(self.run_tool("verify", self.path("out")), 0)
        strip = [(r["id"], r["answer_ids"], r["selected_digest"]) for r in self.results()]
        self.assertEqual(strip, [(r["id"], r["answer_ids"], r["selected_digest"]) for r in self.results("whole")])
        self.assertEqual([n for n in os.listdir(self.path("out")) if n.endswith(".tmp") and
                          os.listdir(os.path.join(self.path("out"), n))], [])

    def stopped_run(self, number, ranks, only_one=False):
        """Start 60 requests, send the signal once two are published, and return what the tool answered."""
        items = [request(id=str(i), chunks=[[5 + i % 50] * 300, [7] * 200]) for i in range(60)]
        args = [BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests", self.write_requests(items),
                "--out", self.path("out"), "--max-new", "4", "--resume", *(["--ranks", str(ranks)] if ranks > 0 else [])]
        process = subprocess.Popen([*mpirun(max(-ranks, 0), BIN), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until = time.time() + 30
        while time.time() < until:
            try:
                if len(self.results()) >= 2:
                    break
            except FileNotFoundError:
                time.sleep(0.01)
        target = process.pid
        if only_one:
            names = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            target = int(names[-1])
        os.kill(target, number)
        out, err = process.communicate(timeout=30)
        return items, args, subprocess.CompletedProcess(args, process.returncode, out, err)

    def test_stop_signal_ends_with_75_and_resume_goes_on(self):
        for number, ranks in [(signal.SIGUSR1, 0), (signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGUSR1, -2)]:
            with self.subTest(signal=number, ranks=ranks):
                items, args, done = self.stopped_run(number, ranks)
                self.assert_answer(done, 75, "stopped by a signal", "--resume", "E0106")
                kept = len(self.results())
                self.assertTrue(2 <= kept < len(items), kept)
                self.assert_answer(self.run_tool("verify", self.path("out")), 0)
                self.assert_answer(subprocess.run(args, capture_output=True, timeout=60), 0)
                self.assertEqual([r["id"] for r in self.results()], [i["id"] for i in items])
                shutil.rmtree(self.path("out"))

    def test_stop_signal_to_one_rank_stops_all(self):
        _, _, done = self.stopped_run(signal.SIGUSR1, -2, only_one=True)
        self.assert_answer(done, 75, "stopped by a signal")

    def test_second_stop_signal_ends_at_once(self):
        self.write_config(dict(CONFIG, max_position_embeddings=200000, eos_token_id=None))
        process = subprocess.Popen([BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                    self.write_requests([request()]), "--out", self.path("out"), "--max-new", "100000"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(1)  # in the middle of a decode of many seconds, which one signal waits for
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=2)
        self.assertEqual(process.returncode, 75)

    def test_full_disk_is_an_answer_and_leaves_nothing_half_written(self):
        done = self.prefill([request(chunks=[[5] * 900, [6] * 900])], "--save-kv",
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)))
        self.assert_answer(done, 74)
        names = os.listdir(self.path("out"))
        self.assertFalse([n for n in names if n.endswith(".h5")], names)

    def test_flipped_byte_is_found_by_verify(self):
        self.assert_answer(self.prefill([request()], "--save-kv"), 0)
        name = next(n for n in os.listdir(self.path("out")) if ".kv" in n)
        with open(os.path.join(self.path("out"), name), "r+b") as f:
            f.seek(-40, os.SEEK_END)
            byte = f.read(1)
            f.seek(-40, os.SEEK_END)
            f.write(bytes([byte[0] ^ 1]))
        self.assert_answer(self.run_tool("verify", self.path("out")), 80, name)

    def test_ratio_one_verifies_against_full_prefill(self):
        done = self.run_tool("verify", "--model", self.model, "--random-weights", "1", "--requests",
                             self.write_requests([request(chunks=[[5 + i] * 40 for i in range(6)])]), "--ranks", "3")
        self.assert_answer(done, 0)
        self.assertIn(b"ok", done.stdout)

    def test_exact_methods_verify_against_full_prefill(self):
        for method in ["ring", "allgather"]:
            done = self.run_tool("verify", "--model", self.model, "--random-weights", "1", "--method", method, "--ranks",
                                 "5", "--requests", self.write_requests([request(chunks=[[5 + i] * 9 for i in range(4)])]))
            self.assert_answer(done, 0)
            self.assertIn(f"method {method}".encode(), done.stdout)

    def test_records_are_read_by_h5py(self):
        self.assert_answer(self.prefill([request()], "--save-kv", "--save-logits", "--save-scores", "--ranks", "2"), 0)
        out = self.path("out")
        with open(os.path.join(out, "manifest.jsonl")) as f:
            line = json.loads(f.readline())
        with h5py.File(os.path.join(out, line["record"])) as f:
            self.assertEqual(f["first_logits"].shape, (N_VOCAB,))
            self.assertEqual(f["scores"].shape, (14,))
            self.assertEqual(f["selected"].dtype, np.int64)
            self.assertEqual(f.attrs["n_context"], 14)
            self.assertEqual(f.attrs["rode"], b"score,prompt")
        index = []
        for name in line["kv"]:
            with h5py.File(os.path.join(out, name)) as f:
                self.assertEqual(f["layers/2/k"].shape, (len(f["index"]), 1, 16))
                self.assertEqual(f["recomputed"].dtype, bool)
                index += f["index"][:].tolist()
        self.assertEqual(sorted(index), list(range(14)))

    def test_inspect_tells_what_it_sees(self):
        self.assert_answer(self.prefill([request()], "--save-kv"), 0)
        record = next(n for n in os.listdir(self.path("out")) if n.endswith(".kv0.h5"))
        for path, part in [(self.path("requests.jsonl"), b"1 requests"), (os.path.join(self.path("out"), record), b"ifkv-kv")]:
            done = self.run_tool("inspect", path)
            self.assert_answer(done, 0)
            self.assertIn(part, done.stdout)
        self.assert_answer(self.run_tool("inspect", self.path("nothing")), 66, "nothing")

    def test_planned_memory_is_the_memory_used(self):
        big = dict(CONFIG, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
                   num_key_value_heads=8, head_dim=64, vocab_size=30000)
        self.write_config(big)
        self.assert_answer(self.prefill([request(chunks=[[5] * 700, [6] * 700])], "--threads", "1"), 0)
        memory = self.results()[0]["memory"]
        self.assertAlmostEqual(memory["peak"] / memory["planned"], 1, delta=0.1)


class Ranks(Tool):
    ITEMS = [request(chunks=[[5 + i, 9 + i, 40 - i] * 7 for i in range(6)])]

    def test_mpi_thread_and_self_agree(self):
        seen = set()
        for mpi, args in [(0, []), (0, ["--ranks", "3"]), (1, []), (2, []), (3, []), (5, [])]:
            self.assert_answer(self.prefill(self.ITEMS, *args, "--overwrite", "--ratio", "0.3", mpi=mpi), 0)
            result = self.results()[0]
            self.assertEqual(result["size"], mpi or (3 if args else 1))
            seen.add((result["selected_digest"], tuple(result["answer_ids"])))
        self.assertEqual(len(seen), 1)

    def test_riding_changes_no_bit_over_mpi(self):
        few = request(prefix=[], chunks=[[5], [6, 7]])  # fewer tokens than ranks
        items = [{**item, "id": f"r{i}"} for i, item in enumerate([*self.ITEMS, few])]
        for ranks in [2, 4, 7]:
            found = {}
            for ride, rode in [("none", []), ("score", ["score"]), ("prompt", ["prompt"]), ("both", ["score", "prompt"])]:
                with self.subTest(ranks=ranks, ride=ride):
                    done = self.prefill(items, "--ratio", "0.4", "--ride", ride, "--save-logits", "--save-scores", "--overwrite", mpi=ranks)
                    self.assert_answer(done, 0)
                    self.assertEqual(done.stdout.split().count(b"rode"), len(rode) * len(items))
                    found[ride] = [self.what_rode(result, rode) for result in self.results()]
                    for (size, arrays), (want_size, want) in zip(found[ride], found["none"], strict=True):
                        self.assertEqual(size, want_size)
                        for one, other in zip(arrays, want, strict=True):
                            np.testing.assert_array_equal(one, other)

    def what_rode(self, result, rode):
        """Bytes and arrays of a result in which these stages rode."""
        self.assertEqual(result["rode"], rode)
        for stage in ["score", "prompt"]:
            self.assertEqual(result["ms"][stage] == 0, stage in rode)
        with h5py.File(self.path(f"out/{result['id']}.h5")) as f:
            return result["bytes"], [f[name][:] for name in ["first_logits", "scores", "selected", "answer_ids"]]

    def prefilled_exactly(self, item, *args, out, mpi=0):
        """Result, first logits, K and V [layer, 2, row, column] in order of the index."""
        self.assert_answer(self.prefill([item], "--save-kv", "--save-logits", *args, out=out, mpi=mpi), 0)
        self.assert_answer(self.run_tool("verify", self.path(out)), 0)
        with open(os.path.join(self.path(out), "manifest.jsonl")) as f:
            line = json.loads(f.readline())
        with h5py.File(os.path.join(self.path(out), line["record"])) as f:
            logits = f["first_logits"][:]
        result = self.results(out)[0]
        rows = np.full((CONFIG["num_hidden_layers"], 2, result["n_context"], 16), np.nan, np.float32)
        for name in line["kv"]:
            with h5py.File(os.path.join(self.path(out), name)) as f:
                index = f["index"][:]
                self.assertEqual(sorted(index), list(index))
                for layer in range(len(rows)):
                    for i, what in enumerate("kv"):
                        rows[layer, i, index] = f[f"layers/{layer}/{what}"][:, 0]
        return result, logits, rows

    def test_exact_methods_equal_full_prefill_over_mpi(self):
        item = request(chunks=[[5 + i, 9 + i, 40 - i] * 7 for i in range(5)] + [[3, 4, 5, 6]])
        n_context = 2 + 5 * 21 + 4  # odd: slices differ in length
        full, logits, rows = self.prefilled_exactly(item, "--method", "full", out="full")
        for method in ["ring", "allgather"]:
            for ranks in [2, 4]:
                with self.subTest(method=method, ranks=ranks):
                    out = f"{method}{ranks}"
                    got = self.prefilled_exactly(item, "--method", method, out=out, mpi=ranks)
                    again = self.prefilled_exactly(item, "--method", method, out=out + "again", mpi=ranks)
                    result = got[0]
                    for name in ["answer_ids", "n_chunk", "n_selected"]:
                        self.assertEqual(result[name], full[name])
                    self.assertEqual((result["method"], result["exchange"], result["size"]), (method, method, ranks))
                    self.assertLess(np.linalg.norm(got[1] - logits) / np.linalg.norm(logits), 2e-5)
                    for layer in range(len(rows)):
                        for i in range(2):
                            error = np.linalg.norm(got[2][layer, i] - rows[layer, i])
                            self.assertLess(error / np.linalg.norm(rows[layer, i]), 2e-5)
                    np.testing.assert_array_equal(got[1], again[1])
                    np.testing.assert_array_equal(got[2], again[2])
                    # K and V of the rows of the others in all layers but the last, on the rank with the fewest own
                    self.assertEqual(result["bytes"]["encode"], 2 * (n_context - n_context // ranks) * 2 * 16 * 4)

    def test_error_is_printed_once_and_every_rank_exits_alike(self):
        self.assert_answer(self.prefill([request(prompt=[5, N_VOCAB])], mpi=4), 65, "/prompt/1", str(N_VOCAB))
        self.assert_answer(self.prefill([request()], "--frobnicate", mpi=3), 2, "--frobnicate")
        self.assert_answer(self.prefill([request()], out="/dev/null/x", mpi=3), 73)

    def test_validation_error_ends_within_5_seconds(self):
        begin = time.monotonic()
        self.assert_answer(self.prefill([request(chunks=[[-1]])], mpi=4), 65, "/chunks/0/0")
        self.assertLess(time.monotonic() - begin, 5 + 3)  # and mpirun's own start

    def test_killed_rank_ends_the_job_within_10_seconds(self):
        items = [request(id=str(i), chunks=[[5 + i % 50] * 400 for _ in range(4)]) for i in range(2000)]
        self.write_requests(items)
        process = subprocess.Popen([*mpirun(3, BIN), BIN, "prefill", "--model", self.model, "--random-weights", "1",
                                    "--requests", self.path("requests.jsonl"), "--out", self.path("out"), "--quiet"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            results = os.path.join(self.path("out"), "results.jsonl")
            deadline = time.monotonic() + 40
            while not (os.path.exists(results) and os.path.getsize(results)) and time.monotonic() < deadline:
                time.sleep(0.05)
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            self.assertEqual(len(ranks), 3)
            begin = time.monotonic()
            os.kill(int(ranks[1]), signal.SIGKILL)
            self.assertNotEqual(process.wait(timeout=15), 0)
            while any(map(is_running, ranks)) and time.monotonic() < begin + 10:
                time.sleep(0.05)  # mpirun does not wait for ranks that it has told to end
            self.assertLess(time.monotonic() - begin, 10)
            self.assertEqual([pid for pid in ranks if is_running(pid)], [])
        finally:
            process.kill()
            process.wait()
        self.assert_answer(self.run_tool("verify", self.path("out")), 0)

    def test_copies_of_one_rank_are_refused(self):
        done = self.prefill([request()], env={"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": ""})
        self.assert_answer(done, 69 if has_mpi(BIN) else 78, "mpi")

    def test_ranks_that_were_started_differently_are_refused(self):
        self.write_requests([request()])
        common = ["prefill", "--model", self.model, "--random-weights", "1", "--requests", self.path("requests.jsonl"),
                  "--out", self.path("out")]
        done = subprocess.run([*mpirun(1, BIN), BIN, *common, ":", "-n", "1", BIN, *common, "--ratio", "0.5"],
                              capture_output=True, timeout=60)
        self.assert_answer(done, 70, "rank 1")

    def test_busy_output_directory_is_named(self):
        items = [request(id=str(i), chunks=[[5] * 400 for _ in range(4)]) for i in range(500)]
        self.write_requests(items)
        first = subprocess.Popen([BIN, "prefill", "--model", self.model, "--random-weights", "1", "--requests",
                                  self.path("requests.jsonl"), "--out", self.path("out")],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while not os.path.exists(os.path.join(self.path("out"), "results.jsonl")) and time.monotonic() < deadline:
                time.sleep(0.02)
            self.assert_answer(self.prefill(items, "--overwrite"), 75)
        finally:
            first.kill()
            first.wait()


if __name__ == "__main__":
    unittest.main()
