"""`launch/gpu_check.sh` where no GPU is: its refusals, and its logic over parts on the host model of the device."""
import json
import os
import shutil
import subprocess
import tempfile
import time
import unittest

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


@unittest.skipUnless(os.path.exists(os.path.join(BUILD, "ifkv-emu")), "built without the host model")
class Emulated(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.out = temporary.name

    def run_parts(self, *parts, code, built=BUILD, **env):
        """Verdicts by part and step, of the file; the table must say the same, and come last."""
        done = check("--emulated", "--built", built, "--out", self.out, *parts, **env)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        with open(os.path.join(self.out, "gpu_check.json")) as f:
            found = json.load(f)
        self.assertTrue(found["emulated"])
        table = done.stdout.splitlines()
        self.assertIn("no time here means anything", table[1])
        self.assertEqual(len(table), len(found["rows"]) + 3, done.stdout)
        counts = [sum(row["verdict"] == v for row in found["rows"]) for v in ("pass", "fail", "absent")]
        self.assertTrue(table[-1].startswith("{} passed, {} failed, {} absent, ".format(*counts)), table[-1])
        for line, row in zip(table[2:], found["rows"]):
            self.assertTrue(line.startswith(row["part"]))
            self.assertIn(row["text"], line)
        return {(row["part"], row["step"]): (row["verdict"], row["text"]) for row in found["rows"]}

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
        self.assertEqual(rows["attention", "sm80 against float64"], ("absent", "the one-hot fetch failed"))
        self.assertEqual(rows["instructions", "host model"][0], "pass")
        self.assertEqual(rows["time", "all"], ("absent", "a check before it failed"))


if __name__ == "__main__":
    unittest.main()
