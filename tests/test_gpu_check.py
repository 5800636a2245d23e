"""`launch/gpu_check.sh` where no GPU is: its refusals, and its logic over parts on the host model of the device."""
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import unittest

import h5py

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "launch", "gpu_check.sh")
BUILD = os.path.dirname(os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv")))


def check(*args, **env):
    return subprocess.run([SCRIPT, *args], capture_output=True, text=True, timeout=100, env={**os.environ, **env})


class Refusals(unittest.TestCase):
    @unittest.skipIf(shutil.which("nvidia-smi"), "there may be a GPU")
    def test_without_a_gpu_there_is_one_line(self):
        done = check()
        self.assertEqual((done.returncode, done.stdout), (69, ""))
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn("no GPU", done.stderr)

    def test_unknown_parts_are_refused(self):
        done = check("--emulated", "spelling")
        self.assertEqual(done.returncode, 2)
        self.assertIn('got "spelling", expected one of: build', done.stderr)


class Parts(unittest.TestCase):
    DEVICE = "--emulated",

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = temporary.name

    def run_parts(self, *parts, code, built=BUILD, **env):
        """Verdicts by part and step, of the file; the table must say the same, and come last."""
        done = check(*self.DEVICE, "--built", built, "--out", self.out, *parts, **env)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        with open(os.path.join(self.out, "gpu_check.json")) as f:
            found = json.load(f)
        self.assertEqual(found["emulated"], bool(self.DEVICE))
        table = done.stdout.splitlines()
        self.assertEqual("no time here means anything" in table[1], bool(self.DEVICE))
        self.assertEqual(len(table), len(found["rows"]) + 3, done.stdout)
        counts = [sum(row["verdict"] == v for row in found["rows"]) for v in ("pass", "fail", "absent")]
        self.assertTrue(table[-1].startswith("{} passed, {} failed, {} absent, ".format(*counts)), table[-1])
        for line, row in zip(table[2:], found["rows"]):
            self.assertTrue(line.startswith(row["part"]))
            self.assertIn(row["text"], line)
        return {(row["part"], row["step"]): (row["verdict"], row["text"]) for row in found["rows"]}

    def timed_rows(self):
        with open(os.path.join(self.out, "bench.jsonl")) as f:
            return [json.loads(line) for line in f]


@unittest.skipUnless(os.path.exists(os.path.join(BUILD, "ifkv-emu")), "built without the host model")
class Emulated(Parts):
    def test_what_can_run_passes_and_the_rest_says_why_not(self):
        rows = self.run_parts("instructions", "sanitizer", code=0)
        self.assertEqual(rows["instructions", "host model"][0], "pass")
        self.assertRegex(rows["instructions", "host model"][1], "^[1-9][0-9]* claims held, 0 did not$")
        self.assertEqual(rows["instructions", "device"], ("absent", "needs a GPU"))
        self.assertEqual(rows["sanitizer", "all"], ("absent", "needs a GPU"))
        with open(os.path.join(self.out, "gpu_check.log")) as f:
            self.assertIn("claims held", f.read())

    def test_a_part_that_cannot_run_is_no_success(self):
        self.run_parts("sanitizer", code=1)

    def run_fake(self, text, *parts):
        """The verdicts where the checks of the model are this shell text."""
        with tempfile.TemporaryDirectory() as built:
            program = os.path.join(built, "test_emu")
            with open(program, "w") as f:
                f.write(f"#!/bin/sh\n{text}\n")
            os.chmod(program, 0o755)
            return self.run_parts(*parts, code=1, built=built)

    def test_a_program_that_checked_nothing_does_not_pass(self):
        rows = self.run_fake("echo 0 claims held, 0 did not", "instructions")
        self.assertEqual(rows["instructions", "host model"][0], "fail")

    def test_a_program_that_hangs_ends_at_the_limit(self):
        begin = time.monotonic()
        rows = self.run_fake("sleep 300", "--limit", "6", "instructions", "attention")
        self.assertLess(time.monotonic() - begin, 60)
        self.assertEqual(rows["instructions", "host model"][0], "fail")
        self.assertIn("no end within", rows["instructions", "host model"][1])
        self.assertEqual(rows["attention", "sm80 64, one-hot"], ("absent", "no time left of 6 s"))

    def test_one_failure_spoils_neither_the_next_part_nor_hides(self):
        rows = self.run_parts("attention", "instructions", "time", code=1, IFKV_EMU_FAIL="cudaMalloc:2+=2")
        self.assertEqual(rows["attention", "sm80 64, one-hot"][0], "fail")
        self.assertIn("exit 1", rows["attention", "sm80 64, one-hot"][1])
        self.assertEqual(rows["attention", "sm80 against float64"], ("absent", "the one-hot fetch did not pass"))
        self.assertEqual(rows["instructions", "host model"][0], "pass")
        self.assertEqual(rows["time", "all"], ("absent", "a check before it failed"))


    def test_every_bench_runs_and_leaves_its_rows(self):
        verdicts = self.run_parts("time", code=0)
        steps = [f"{what}, {name}" for name in ("Qwen3-14B", "Llama-3.1-8B") for what in ("products", "attention", "element-wise", "prefill")]
        self.assertEqual([step for _, step in verdicts], [*steps, "attention, SmolLM2-135M", "movement of 2 ranks as threads", "torch"])
        self.assertEqual(verdicts.pop(("time", "torch")), ("absent", "needs a GPU"))
        for step, (verdict, text) in verdicts.items():
            self.assertEqual(verdict, "pass", step)
            self.assertRegex(text, "^[1-9][0-9]* rows, whose times mean nothing; (error at most|0 wrong)", step)
        rows = self.timed_rows()
        for row in rows:
            self.assertEqual(row["time"], "emulated")
            self.assertEqual({row[key] for key in ("time_ms", "time_us", "ttft_ms", "tflops", "gb_per_s", "copy_share", "busbw_gbytes_per_s") if key in row}, {None})
            self.assertEqual(row.get("wrong", 0), 0)
        # what is computed in bfloat16 errs; a prefill of several chunks that is not recomputed whole does
        for kind, least in (("gemm", 1e-4), ("attention", 1e-4), ("elementwise", 1e-4), ("prefill", 1e-3)):
            errors = [row["error"] for row in rows if row["kind"] == kind and row["label"] != "full"]
            self.assertGreater(max(errors), least, kind)
        self.assertEqual(len(rows), self.rows_of_archive())

    def rows_of_archive(self):
        """How many rows the HDF5 files in it hold, as many as the JSON beside each."""
        n = 0
        with tempfile.TemporaryDirectory() as at, tarfile.open(os.path.join(self.out, "bench.tar.gz")) as tar:
            tar.extractall(at, filter="data")
            folders = [base for base, _, files in os.walk(at) if files]
            self.assertEqual(len(folders), 10)
            for base in folders:
                with h5py.File(os.path.join(base, "bench.h5")) as f, open(os.path.join(base, "bench.jsonl")) as g:
                    labels = f.attrs["rows"].decode().splitlines()
                    self.assertEqual({len(labels)}, {len(g.readlines()), *(len(column) for column in f.values())})
                n += len(labels)
        return n


class Faked(Parts):
    """A device and benches that are shell scripts: the logic that the host model, which has no times, does not reach."""

    DEVICE = ()

    def setUp(self):
        super().setUp()
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.built = temporary.name
        self.write("nvidia-smi", 'case $1 in -L) echo "GPU 0: none" ;; --query-gpu=compute_cap) echo 9.0 ;; *) echo none, 0, 0, 0 ;; esac')
        self.write("nvcc", "echo no release")
        with open(os.path.join(self.built, "torch.py"), "w") as f:
            f.write("raise ImportError\n")

    def write(self, name, text):
        path = os.path.join(self.built, name)
        with open(path, "w") as f:
            f.write(f"#!/bin/sh\n{text}\n")
        os.chmod(path, 0o755)

    def run_faked(self, tool, *args, code):
        self.write("ifkv", f'[ "$1" = bench ] || exit 0\n{tool}')
        return self.run_parts(*args, code=code, built=self.built, PATH=self.built + ":" + os.environ["PATH"], PYTHONPATH=self.built)

    @staticmethod
    def rows(*rows):
        return "".join(f"echo '{json.dumps(row)}'\n" for row in rows)

    def test_the_table_has_the_best_row_of_each_label_every_prefill_and_the_worst_error(self):
        products = self.rows({"label": "qkv", "tokens": 512, "tflops": 300.2, "error": 3e-3, "wrong": 0},
                             {"label": "qkv", "tokens": 2048, "tflops": 612.7, "error": 1e-3, "wrong": 0},
                             {"label": "o", "tokens": 512, "tflops": 200.0, "error": 2e-3, "wrong": 0})
        prefills = self.rows({"label": "full", "tokens": 2048, "ttft_ms": 97.25, "tflops": 600.0, "error": 0.0},
                             {"label": "full", "tokens": 8192, "ttft_ms": 419.0, "tflops": 500.0, "error": 0.0})
        passes = self.rows(*({"label": label, "tokens": tokens, "gb_per_s": rate, "copy_share": rate / copy, "error": 0.0, "wrong": 0}
                             for tokens, copy in ((8192, 2700.0), (32768, 2800.0)) for label, rate in (("copy", copy), ("rope", 0.9 * copy),
                                                                                                      ("merge", 2408.0 if copy == 2800 else 2000.0))))
        moves = self.rows({"label": "shift", "bytes": 1024, "busbw_gbytes_per_s": 1.0, "wrong": 0},
                          {"label": "shift", "bytes": 4096, "busbw_gbytes_per_s": 40.0, "wrong": 0})
        found = self.run_faked(f"case $2 in gemm) {products} ;; attention) exit 3 ;; elementwise) {passes} ;; prefill) {prefills} ;; comm) {moves} ;; esac", "time", code=1)
        self.assertEqual(found["time", "products, Qwen3-14B"],
                         ("pass", "qkv 2048 613 TFLOP/s; o 512 200 TFLOP/s; error at most 3.0e-03; 0 wrong"))
        self.assertEqual(found["time", "element-wise, Qwen3-14B"],
                         ("pass", "copy 32768 2800 GB/s; rope 32768 2520 GB/s 90 % of copy; merge 32768 2408 GB/s 86 % of copy; "
                                  "at least 86 % of copy (merge); error at most 0.0e+00; 0 wrong"))
        self.assertEqual(found["time", "prefill, Llama-3.1-8B"], ("pass", "full 2048 97.2 ms; full 8192 419.0 ms; error at most 0.0e+00"))
        self.assertEqual(found["time", "movement of 2 ranks as threads"], ("pass", "shift 4096 40 GB/s; 0 wrong"))
        self.assertEqual(found["time", "attention, Qwen3-14B"][0], "fail")
        self.assertEqual(found["time", "torch"], ("absent", "python3 has no torch"))
        self.assertEqual(len(self.timed_rows()), 2 * (3 + 6 + 2) + 2)

    def test_what_a_limit_cut_off_keeps_its_whole_rows(self):
        row = {"label": "qkv", "tokens": 512, "tflops": 300.2, "error": 3e-3, "wrong": 0}
        found = self.run_faked(f"{self.rows(row)} printf '{{\"label\": \"qkv\", \"tok'\nsleep 60", "--limit", "4", "time", code=1)
        self.assertEqual(found["time", "products, Qwen3-14B"],
                         ("fail", "no end within its limit; qkv 512 300 TFLOP/s; error at most 3.0e-03; 0 wrong"))
        self.assertEqual({found["time", step] for _, step in found if step not in ("products, Qwen3-14B", "torch")},
                         {("absent", "no time left of 4 s")})
        self.assertEqual(self.timed_rows(), [row])

    def test_rows_of_a_bench_that_failed_are_no_measurement(self):
        row = {"label": "qkv", "tokens": 512, "tflops": 300.2, "error": 3.0, "wrong": 7}
        found = self.run_faked(f"{self.rows(row)} echo error: 7 wrong; exit 1", "time", code=1)
        self.assertEqual(found["time", "products, Qwen3-14B"][0], "fail")
        self.assertEqual(self.timed_rows(), [])


    def test_a_program_that_was_not_built_is_absent(self):
        found = self.run_faked("exit 1", "attention", "instructions", code=1)
        self.assertEqual(found["attention", "sm80 64, one-hot"], ("absent", "not built: test_attention_cuda"))
        self.assertEqual(found["instructions", "device, sm_90a"], ("absent", "not built: test_instructions_sm90"))
        self.assertEqual({verdict for verdict, _ in found.values()}, {"absent"})

    def test_a_sanitizer_that_refuses_the_device_is_absent(self):
        self.write("test_instructions_sm90", "exit 0")
        self.write("compute-sanitizer", 'echo "========= Error: Device not supported. See the documentation"; exit 1')
        self.assertEqual(self.run_faked("exit 1", "sanitizer", code=1),
                         {("sanitizer", "all"): ("absent", "compute-sanitizer: Device not supported")})
        self.write("compute-sanitizer", 'echo "========= Invalid __global__ write of size 4"; exit 9')
        self.assertEqual(self.run_faked("exit 1", "sanitizer", code=1)["sanitizer", "memcheck, instructions"][0], "fail")

    def rows_at_the_kill(self, *parts):
        """What the file says of the steps before one that touches `started` and hangs."""
        started = os.path.join(self.built, "started")
        with subprocess.Popen([SCRIPT, "--built", self.built, "--out", self.out, *parts], stderr=subprocess.DEVNULL, start_new_session=True,
                              stdout=subprocess.DEVNULL, env={**os.environ, "PATH": self.built + ":" + os.environ["PATH"]}) as script:
            while script.poll() is None and not os.path.exists(started):
                time.sleep(0.05)
            os.killpg(script.pid, signal.SIGKILL)
        with open(os.path.join(self.out, "gpu_check.json")) as f:
            return [(row["step"], row["text"]) for row in json.load(f)["rows"]]

    def test_what_is_killed_leaves_the_steps_so_far(self):
        self.write("test_backend", "echo '[  PASSED  ] 3 test(s).'")
        self.write("test_backend_refit", f"touch {self.built}/started; exec sleep 20")
        self.assertEqual(self.rows_at_the_kill("conformance"), [("back end", "3 tests")])

    def test_what_is_killed_leaves_the_times_so_far(self):
        row = {"label": "qkv", "tokens": 512, "tflops": 300.2, "error": 3e-3, "wrong": 0}
        self.write("ifkv", f"[ $2 = gemm ] || {{ touch {self.built}/started; exec sleep 20; }}\n{self.rows(row)}")
        self.assertEqual(self.rows_at_the_kill("time"), [("products, Qwen3-14B", "qkv 512 300 TFLOP/s; error at most 3.0e-03; 0 wrong")])
        self.assertEqual(self.timed_rows(), [row])
        self.assertTrue(tarfile.is_tarfile(os.path.join(self.out, "bench.tar.gz")))


class Building(unittest.TestCase):
    """A copy of the script between compilers and packages that are shell scripts: what it asks of them, and what comes of their answers."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = os.path.realpath(temporary.name)
        for name in ("gpu_check.sh", "env.sh"):
            os.makedirs(self.at("launch"), exist_ok=True)
            shutil.copy(os.path.join(ROOT, "launch", name), self.at("launch", name))
        self.build, self.asked = self.at("build-gpu"), self.at("asked")
        self.write("toolkit/bin/nvcc", "echo release 13")
        self.write("bin/nvidia-smi", 'case $1 in -L) echo "GPU 0: none" ;; --query-gpu=compute_cap) echo 9.0 ;; *) echo none ;; esac')
        self.write("bin/pkg-config", "exit 1")
        self.write("bin/python3", f'case $* in *import\\ glob*) echo {self.at("python")}/$3/include ;; *) exit 1 ;; esac')
        self.fake_cmake(compiling="exit 0")
        os.makedirs(self.at("ifkv-bundle"))
        with open(self.at("ifkv-bundle", "ifkv.cmake"), "w") as f:
            f.write("# nothing\n")
        with tarfile.open(self.at("bundle.tar.gz"), "w:gz") as tar:
            tar.add(self.at("ifkv-bundle"), "ifkv-bundle")

    def at(self, *names):
        return os.path.join(self.root, *names)

    def write(self, name, text):
        os.makedirs(os.path.dirname(self.at(name)), exist_ok=True)
        with open(self.at(name), "w") as f:
            f.write(f"#!/bin/sh\n{text}\n")
        os.chmod(self.at(name), 0o755)

    def fake_cmake(self, compiling, configuring="echo -- ifkv: MPI 0"):
        self.write("bin/cmake", f'echo "CPATH=$CPATH $*" >>{self.asked}\n'
                                f'case $1 in --build) echo building; {compiling} ;; *) echo >>{self.build}/CMakeCache.txt; {configuring} ;; esac')

    def check(self, *parts, code):
        """Verdicts by part and step."""
        path = ":".join((self.at("bin"), self.at("toolkit", "bin"), os.environ["PATH"]))
        done = subprocess.run([self.at("launch", "gpu_check.sh"), "--out", self.at("out"), "--bundle", self.at("bundle.tar.gz"), *parts],
                              capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path, "CC": "cc"})
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        with open(self.at("out", "gpu_check.json")) as f:
            return {(row["part"], row["step"]): (row["verdict"], row["text"]) for row in json.load(f)["rows"]}

    def commands(self):
        with open(self.asked) as f:
            return f.read().splitlines()

    def test_without_packages_and_bundle_it_says_what_is_missing(self):
        os.remove(self.at("bundle.tar.gz"))
        found = self.check("build", "attention", code=1)
        verdict, text = found["build", "packages"]
        self.assertEqual(verdict, "fail")
        self.assertIn("openblas is not here, and no " + self.at("bundle.tar.gz"), text)
        self.assertEqual(found["attention", "all"], ("absent", "the build failed"))
        self.assertFalse(os.path.exists(self.asked))

    def test_a_second_call_unpacks_and_configures_nothing_anew(self):
        first = self.check("build", code=0)
        self.assertEqual(list(first), [("build", "bundle"), ("build", "configure"), ("build", "compile")])
        with open(self.at("build-gpu", "ifkv-bundle", "mark"), "w"):
            pass
        self.assertEqual(list(self.check("build", code=0)), [("build", "configure"), ("build", "compile")])
        self.assertTrue(os.path.exists(self.at("build-gpu", "ifkv-bundle", "mark")))

    def test_what_compiled_runs_when_something_else_did_not(self):
        self.write("build-gpu/test_attention_cuda", "echo '[  PASSED  ] 3 test(s).'")
        self.fake_cmake(compiling="echo error: no such instruction; exit 1")
        found = self.check("attention", "conformance", "time", code=1)
        self.assertEqual(found["build", "compile"][0], "fail")
        self.assertEqual(found["attention", "sm90 128, one-hot"], ("pass", "3 tests"))
        self.assertEqual(found["conformance", "back end"], ("absent", "not built: test_backend"))
        self.assertEqual(found["time", "all"], ("absent", "a check before it failed"))

    def test_the_first_thing_that_was_not_found_is_named_and_looked_for_again(self):
        self.fake_cmake(compiling="exit 0", configuring="echo 'CMake Error at a.cmake:230 (message):'; echo '  Could NOT find HDF5'; exit 1")
        self.assertIn("Could NOT find HDF5", self.check("build", code=1)["build", "configure"][1])
        self.assertFalse(os.path.exists(os.path.join(self.build, "CMakeCache.txt")))

    def test_of_the_python_packages_only_what_the_toolkit_lacks_is_taken(self):
        for name in ("cublasLt", "nccl"):
            folder = self.at("python", name + ".h")
            os.makedirs(os.path.join(folder, "include"))
            os.makedirs(os.path.join(folder, "lib"))
            for file in (f"include/{name}.h", "include/cuda_runtime.h", f"lib/lib{name}.so.13"):
                open(os.path.join(folder, file), "w").close()
        self.write("bin/cc", 'case $* in *-include\\ nccl.h*) ;; *) exit 1 ;; esac')
        self.check("build", code=0)
        links = os.path.join(self.build, "python-cuda")
        self.assertEqual(os.listdir(os.path.join(links, "include")), ["cublasLt.h"])
        self.assertEqual(sorted(os.listdir(links)), ["include", "libcublasLt.so", "libcublasLt.so.13"])
        configure, compiling = self.commands()
        for command in (configure, compiling):
            self.assertIn(f"CPATH={links}/include ", command)
        self.assertIn(f"-DCUDA_cublasLt_LIBRARY={links}/libcublasLt.so", configure)
        self.assertNotIn("NCCL", configure)


if __name__ == "__main__":
    unittest.main()
