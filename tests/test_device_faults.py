"""Faults of devices and of NCCL from outside: the tool on the emulated device, on which planned calls fail.

Each case is one row of group J of faults: the exit code on every rank, one line that names the cause, an end in time, no
result.  What fails is planned by IFKV_EMU_FAIL (tests/emu/standin.h).
"""
import os
import subprocess
import time
import unittest

from tests import test_cli

LIMIT_S = 3  # of a collective


class Faults(test_cli.Tool):
    def run_case(self, fail, *args, mpi=2, **env):
        """One request, on `mpi` ranks with a device each unless env says otherwise; checks what holds for every fault."""
        begin = time.monotonic()
        env = {"IFKV_EMU_DEVICES": "2", "IFKV_EMU_FAIL": fail, **env}
        done = self.prefill([test_cli.request()], "--backend", "cuda", "--quiet", "--collective-timeout", str(LIMIT_S),
                            *args, mpi=mpi, env=env, timeout=100)
        self.assertLess(time.monotonic() - begin, 60, done.stderr)  # far from the 300 s nobody asked for
        left = subprocess.run(["pgrep", "-f", self.dir.name], capture_output=True).stdout.decode()
        self.assertEqual(left, "", "processes are left")
        if done.returncode:
            finished = os.path.join(self.path("out"), "results.jsonl")
            self.assertFalse(os.path.exists(finished) and os.path.getsize(finished), "a result of a failed run")
        return done

    def assert_says(self, done, code, *parts):
        """Exit `code`, and a line that holds every part; several ranks may meet a limit at the same moment."""
        text = done.stderr.decode("utf8", "replace")
        self.assertNotIn(done.returncode, test_cli.CRASHES, text)
        self.assertEqual(done.returncode, code, text)
        errors = [line for line in text.splitlines() if "ifkv: error:" in line]
        self.assertTrue(errors, text)
        for part in parts:
            self.assertIn(part, errors[0])
        return errors

    def test_without_a_fault_there_is_a_result(self):
        self.assert_answer(self.run_case(""), 0)
        self.assertEqual(self.results()[0]["comm"], "nccl")

    def test_ranks_that_share_a_device_move_by_mpi(self):
        self.assert_answer(self.run_case("", IFKV_EMU_DEVICES="1"), 0)
        self.assertEqual(self.results()[0]["comm"], "mpi")

    def test_nccl_by_name_refuses_a_shared_device(self):
        self.assert_answer(self.run_case("", "--comm", "nccl", IFKV_EMU_DEVICES="1"), 69, "nccl", "Duplicate GPU")

    def test_nccl_needs_a_device(self):
        done = self.prefill([test_cli.request()], "--backend", "cpu", "--comm", "nccl", mpi=2)
        self.assert_answer(done, 2, "nccl", "cpu")

    def test_more_ranks_than_devices(self):
        self.assert_says(self.run_case("", mpi=3), 69, "got 2 devices")

    def test_no_device_on_one_rank(self):
        self.assert_answer(self.run_case("cudaGetDeviceCount:1+=100@1"), 69, "no device is visible", "rank 1")

    def test_a_driver_that_is_too_old(self):
        self.assert_answer(self.run_case("cudaGetDeviceCount:1+=35,cudaDriverVersion:1+=12040"), 69, "driver is for CUDA 12.4")

    def test_every_allocation_may_fail(self):
        for n in range(1, 40):
            with self.subTest(n=n):
                done = self.run_case(f"cudaMalloc:{n}", "--store-device", "1M", "--overwrite", mpi=0)
                if done.returncode == 0:
                    break
                self.assert_answer(done, 69, "memory")
        self.assertGreater(n, 3)
        self.assertEqual(done.returncode, 0)

    def test_no_pinned_memory(self):
        self.assert_answer(self.run_case("cudaMallocHost:1@1"), 69, "memory", "rank 1")

    def test_no_memory_for_what_nccl_moves(self):
        self.assert_answer(self.run_case("ncclMemAlloc:1@1"), 69, "no memory for", "rank 1")

    def test_a_device_too_small_for_the_plan(self):
        self.assert_answer(self.run_case("", IFKV_EMU_MEMORY=str(4 << 20)), 69)

    def test_a_fault_in_a_kernel_at_any_time(self):
        for n in [1, 7, 60, 200]:
            with self.subTest(n=n):
                self.assert_says(self.run_case(f"kernel:{n}=700@1", "--overwrite"), 70, "illegal memory access", "rank 1")

    def test_hardware_errors_are_no_fault_of_the_program(self):
        for code, words in [(214, "ECC"), (702, "timed out")]:
            with self.subTest(code=code):
                self.assert_says(self.run_case(f"kernel:60={code}@0", "--overwrite"), 69, words, "rank 0")

    def test_an_initialisation_that_never_ends(self):
        done = self.run_case("ncclInitHang:1@1")
        self.assert_says(done, 81, "ncclCommInitRankConfig", f"within {LIMIT_S} s")
        self.assertIn(b"hint: NCCL_SOCKET_IFNAME", done.stderr)

    def test_an_error_of_the_network(self):
        self.assert_says(self.run_case("ncclAsync:3=6@1"), 81, "remote process exited", "rank 1")

    def test_a_movement_that_never_ends(self):
        for method in ["infoflow", "ring", "allgather"]:
            with self.subTest(method=method):
                self.assert_says(self.run_case("ncclHang:3@1", "--method", method, "--overwrite"), 81,
                                 f"did not end within {LIMIT_S} s")

    def test_an_abort_that_never_ends(self):
        self.assert_says(self.run_case("ncclHang:2@1,ncclAbortHang:1@0,ncclAbortHang:1@1"), 81, "did not end within")

    def test_versions_of_nccl_that_do_not_fit(self):
        self.assert_answer(self.run_case("ncclVersion:1+=22703@1"), 69, "got NCCL 22703", "rank 1")
        self.assert_answer(self.run_case("ncclVersion:1+=23001@1"), 69, "got NCCL 22809 on one rank and 23001 on another")

    def test_a_product_that_fails(self):
        self.assert_says(self.run_case("cublasLtMatmul:9@1"), 70, "CUBLAS", "rank 1")


if __name__ == "__main__":
    unittest.main()
