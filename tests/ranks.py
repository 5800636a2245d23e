"""Several processes of the tool under test, where it was built with MPI."""
import functools
import subprocess
import unittest


@functools.lru_cache(maxsize=None)
def has_mpi(tool):
    about = subprocess.run([tool, "version"], capture_output=True, text=True, timeout=60).stdout
    return any("communicators:" in line and " mpi" in line for line in about.splitlines())


def mpirun(ranks, tool):
    """What starts so many; none: nothing.  Skips the test, with the reason, where the tool has no MPI."""
    if not ranks:
        return []
    if not has_mpi(tool):
        raise unittest.SkipTest("built without MPI")
    return ["mpirun", "-n", str(ranks)]
