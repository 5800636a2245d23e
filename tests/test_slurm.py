"""The batch scripts under a real Slurm: a private controller and four nodes on this machine, started and stopped here.

Skipped, with the reason, where Slurm's daemons are absent or this user may not start them.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from ranks import has_mpi

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.environ.get("IFKV_BIN", os.path.join(ROOT, "build", "ifkv"))
NODES = 4
CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 2,
}


def missing():
    """Why no cluster can be started here, or None."""
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "scontrol") if not shutil.which(name)]
    if absent:
        return "not installed: " + ", ".join(absent)
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root only"
    return None if has_mpi(BIN) else "built without MPI"


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """munged, slurmctld and a slurmd for each node, all of whose files lie below `dir`."""

    def __init__(self, directory):
        self.dir = directory
        # as a cluster's users have it: no settings for a single machine, but cores shared and root allowed
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_MCA_btl", "IFKV_"))}
        self.env.update(SLURM_CONF=os.path.join(directory, "slurm.conf"), OMPI_ALLOW_RUN_AS_ROOT="1",
                        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMPI_MCA_mpi_yield_when_idle="1")
        for name in ["munge", "state"] + [f"n{i}/{d}" for i in range(NODES) for d in ("tmp", "spool")]:
            os.makedirs(os.path.join(directory, name))
        self.write_files()
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def write_files(self):
        d, host, ports = self.dir, socket.gethostname().split(".")[0], free_ports(NODES + 1)
        key = os.path.join(d, "munge/key")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
            f.write(os.urandom(1024))
        nodes = "".join(f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=1 State=UNKNOWN\n"
                        for i in range(NODES))
        with open(self.env["SLURM_CONF"], "w") as f:
            # cred_expire: a requeued job is held until no credential of its first run is left
            f.write(f"""ClusterName=ifkv
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[NODES]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge/socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/%n/spool
TmpFS={d}/%n/tmp
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/%n.pid
SlurmctldLogFile={d}/slurmctld.log
SlurmdLogFile={d}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillOnBadExit=1
MpiDefault=pmix
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
{nodes}PartitionName=test Nodes=ALL Default=YES State=UP
""")

    def call(self, *args, timeout=60, **more):
        return subprocess.run(args, env=self.env, capture_output=True, text=True, timeout=timeout, check=True, **more).stdout

    def start(self):
        d = os.path.join(self.dir, "munge")
        self.call("munged", "--force", f"--key-file={d}/key", f"--socket={d}/socket", f"--pid-file={d}/pid",
                  f"--log-file={d}/log", f"--seed-file={d}/seed")
        self.call("slurmctld", "-c")
        for i in range(NODES):
            self.call("slurmd", "-N", f"n{i}")
        self.wait_until(lambda: self.call("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(NODES)], 20, "idle nodes")

    def stop(self):
        for name in [f"n{i}.pid" for i in range(NODES)] + ["slurmctld.pid", "munge/pid"]:
            try:
                with open(os.path.join(self.dir, name)) as f:
                    os.kill(int(f.read()), signal.SIGTERM)
            except (FileNotFoundError, ProcessLookupError, ValueError):
                pass

    def wait_until(self, is_true, seconds, what):
        until = time.time() + seconds
        while not is_true():
            if time.time() > until:
                raise AssertionError(f"no {what} within {seconds} s: {self.call('squeue', '-a')}{self.call('sinfo')}")
            time.sleep(0.1)

    def state(self, job):
        for word in self.call("scontrol", "-o", "show", "job", job).split():
            if word.startswith("JobState="):
                return word[9:]
        return "UNKNOWN"


@unittest.skipIf(missing(), missing())
class Slurm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # short: the path of a Unix socket lies below it
        cls.temporary = tempfile.TemporaryDirectory(prefix="ifkv-", dir="/tmp", ignore_cleanup_errors=True)
        cls.dir = cls.temporary.name
        cls.cluster = Cluster(os.path.join(cls.dir, "slurm"))
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.addClassCleanup(cls.cluster.stop)
        os.mkdir(cls.path("model"))
        with open(cls.path("model/config.json"), "w") as f:
            json.dump(CONFIG, f)

    @classmethod
    def path(cls, name):
        return os.path.join(cls.dir, name)

    def requests(self, n):
        name = self.path(f"requests-{n}.jsonl")
        with open(name, "w") as f:
            for i in range(n):
                item = {"id": str(i), "chunks": [[5 + (7 * i + j) % 80] * (40 + j) for j in range(8)], "prompt": [20, 21, 22]}
                f.write(json.dumps(item) + "\n")
        return ["--model", self.path("model"), "--random-weights", "1", "--requests", name, "--max-new", "4"]

    def results(self, out):
        try:
            with open(os.path.join(self.path(out), "results.jsonl")) as f:
                return [json.loads(line) for line in f if line.endswith("\n")]
        except FileNotFoundError:
            return []

    def here(self, options, out):
        """What one rank gives without Slurm."""
        subprocess.run([BIN, "prefill", *options, "--threads", "1", "--out", self.path(out)], check=True, capture_output=True)
        return [(r["id"], r["selected_digest"], r["answer_ids"]) for r in self.results(out)]

    def submit(self, script, *args, before=(), **env):
        environment = dict(self.cluster.env, IFKV_BIN=BIN, **env)
        out = subprocess.run(["sbatch", "--parsable", "--nodes", str(NODES), "--output", self.path("%j.out"), *before,
                              os.path.join("launch/slurm", script), *args],
                             cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
        return out.stdout.strip()

    def printed(self, job):
        with open(self.path(f"{job}.out")) as f:
            return f.read()

    def finished(self, job, seconds=90):
        ends = {"COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"}
        self.cluster.wait_until(lambda: self.cluster.state(job) in ends, seconds, "end of the job")
        self.assertEqual(self.cluster.state(job), "COMPLETED", self.printed(job))

    def test_four_nodes_select_and_answer_as_one_rank_does(self):
        options = self.requests(3)
        expected = self.here(options, "here")
        for launcher in ("srun", "mpirun"):
            with self.subTest(launcher=launcher):
                job = self.submit("smoke.sbatch", *options, "--out", self.path(launcher), IFKV_LAUNCHER=launcher)
                self.finished(job)
                results = self.results(launcher)
                self.assertEqual([r["size"] for r in results], [NODES] * 3)
                self.assertEqual([(r["id"], r["selected_digest"], r["answer_ids"]) for r in results], expected)
                self.assertNotIn("warning", self.printed(job))

    def test_requeued_job_resumes_after_what_is_finished(self):
        options = self.requests(40)
        job = self.submit("smoke.sbatch", *options, "--out", self.path("requeued"), "--json")
        self.cluster.wait_until(lambda: len(self.results("requeued")) >= 3, 60, "third result")
        self.cluster.call("scancel", "--batch", "--signal=USR1", job)
        self.cluster.wait_until(lambda: "back into the queue" in self.printed(job), 40, "requeue")
        kept = len(self.results("requeued"))
        self.assertLess(kept, 40)
        self.finished(job, 240)
        # every request was computed once: the second start printed only what the first had not
        text = self.printed(job)
        self.assertIn("stopped by a signal", text)
        self.assertEqual(len([line for line in text.splitlines() if line.startswith('{"id"')]), 40)
        self.assertEqual([(r["id"], r["selected_digest"], r["answer_ids"]) for r in self.results("requeued")],
                         self.here(options, "unbroken"))
        self.assertIn("Restarts=1", self.cluster.call("scontrol", "-o", "show", "job", job).split())

    def test_table_and_array_of_lengths_run(self):
        # GPUs of the scripts are not there: the options of the command line win over those of the file
        shape = ["--gpus-per-node=0", "--ntasks=2", "--cpus-per-task=1"]
        table = self.submit("table.sbatch", "configs/runs/paper-smoke.json", "--model", self.path("model"), "--lengths", "300",
                            "--out", self.path("table"), "--threads", "1", before=shape)
        self.finished(table)
        with open(self.path("table/bench.jsonl")) as f:
            self.assertEqual(len(f.readlines()), 7)
        array = self.submit("lengths.sbatch", "configs/runs/paper-smoke.json", "--model", self.path("model"), "--out",
                            self.path("lengths"), "--threads", "1", before=[*shape, "--array=0"])
        self.cluster.wait_until(lambda: os.path.exists(self.path(f"{array}.out")) and "8192" in self.printed(array), 60, "array job")

    def test_launcher_without_ranks_is_refused_with_a_hint(self):
        done = subprocess.run(["srun", "--mpi=none", "-n", "2", BIN, "prefill", *self.requests(1), "--out", self.path("copies")],
                              env=self.cluster.env, capture_output=True, text=True, timeout=60)
        # the first copy to end takes the others with it, which srun may then call terminated
        self.assertIn(done.returncode, (69, 128 + signal.SIGTERM), done.stderr)
        self.assertIn("told this one no rank [code E0803]", done.stderr)
        self.assertIn("--mpi=pmix", done.stderr)
        self.assertFalse(os.path.exists(self.path("copies")))


if __name__ == "__main__":
    unittest.main()
