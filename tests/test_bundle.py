"""`launch/bundle.sh`: ifkv builds against what it packs, and runs with it, wherever it is unpacked; nothing of the system helps."""
import glob
import os
import platform
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# the C library's and the compiler's, which the machine has
OF_THE_SYSTEM = re.compile(r"/(ld-linux-x86-64|lib(c|m|dl|rt|pthread|resolv|util|gcc_s|stdc\+\+|gomp))\.so")


def run(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **more)


@unittest.skipUnless(platform.machine() == "x86_64" and shutil.which("patchelf") and shutil.which("dpkg"),
                     "launch/setup.sh test has not been here")
class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory(prefix="a folder-")  # with a space
        cls.addClassCleanup(temporary.cleanup)
        cls.at = os.path.realpath(temporary.name)
        cls.bundle = os.path.join(cls.at, "ifkv-bundle")
        packed = os.path.join(cls.at, "b.tar.gz")
        done = run(os.path.join(ROOT, "launch", "bundle.sh"), packed)
        if done.returncode:
            raise AssertionError(done.stderr)
        shutil.unpack_archive(packed, cls.at, filter="fully_trusted")

    def assert_from_bundle(self, path):
        """Every library of the file is there, and but for those of the system here."""
        for line in run("ldd", path).stdout.splitlines():
            self.assertNotIn("not found", line, path)
            if "=> /" in line and not OF_THE_SYSTEM.search(line):
                self.assertIn(self.bundle + "/", line, path)

    def test_every_library_comes_from_the_bundle(self):
        found = [p for name in ("lib/**/*.so*", "libexec/*") for p in glob.glob(os.path.join(self.bundle, name), recursive=True)]
        self.assertGreater(len(found), 30)
        for path in found:
            self.assert_from_bundle(path)

    def test_ifkv_builds_against_it_and_starts_ranks(self):
        build = os.path.join(self.at, "build")
        done = run("cmake", "-C", os.path.join(self.bundle, "ifkv.cmake"), "-S", ROOT, "-B", build, "-DIFKV_TESTS=ON",
                   "-DIFKV_WITH_MPI=ON", "-DIFKV_WITH_CUDA=OFF", "-DIFKV_CUDA_EMU=OFF", "-DCMAKE_BUILD_TYPE=Debug")
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(os.path.join(build, "CMakeCache.txt")) as f:
            cache = f.read()
        for module in ("OPENBLAS", "HDF5", "JANSSON", "XXHASH", "CMOCKA"):
            for key in ("INCLUDE_DIRS", "LIBRARY_DIRS"):
                value = re.search(rf"^{module}_{key}:INTERNAL=(.*)$", cache, re.M)[1]
                self.assertTrue(os.path.realpath(value).startswith(self.bundle + "/"), f"{module}_{key}={value}")
        done = run("cmake", "--build", build, "-j", "2", "--target", "ifkv_cli")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        tool = os.path.join(build, "ifkv")
        self.assert_from_bundle(tool)
        done = run(os.path.join(self.bundle, "bin", "mpirun"), "-n", "3", tool, "bench", "comm", "--comm", "mpi", "--lengths", "1000")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("all_gather", done.stdout)


if __name__ == "__main__":
    unittest.main()
