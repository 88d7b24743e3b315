"""A real Slurm cluster of several machines on this one: each has its own network, host name, processes, /etc/hosts and /dev/shm.

    python -m benchmarks.slurm_cluster bash          # a shell on its login machine: sinfo, sbatch, squeue, scancel

Needs root and Debian's slurm-wlm, munge and iproute2. Machines can be lost and switched on again. Everything ends with the
process that started it, however that ends; what a killed one leaves of its networks, the next one removes. Benchmarks and
tests share it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spattn_olmoe.errors import Parser, user_errors

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
PREFIX = "spattn"
CONFIG = """
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdTimeout=10
SlurmctldTimeout=20
KillWait=120
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-{nodes}] NodeAddr=10.77.0.1[1-{nodes}] CPUs=64 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=node[1-{nodes}] Default=YES MaxTime=2-0 DefMemPerCPU=10 PriorityTier=1 GraceTime=300 State=UP
PartitionName=high Nodes=node[1-{nodes}] MaxTime=2-0 DefMemPerCPU=10 PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if absent := [
        name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge, iproute2)"
    if os.geteuid() != 0:
        return "a cluster of machines on this one takes root"
    if subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "this kernel or container allows no network namespaces"
    return None


class SlurmCluster:
    """Machines node1 to nodeN and a login machine, running. Use it in a ``with``.

    Partition ``low`` (the default) is preempted by ``high``, with 300 seconds of grace. A machine has two GPUs by name:
    character devices, on which nothing computes.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # short, for the socket's name
        self._tag = f"{PREFIX}{os.getpid()}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._env["PATH"] += ":/usr/sbin:/sbin"

    def __enter__(self) -> SlurmCluster:
        try:
            _remove_networks_of_the_dead()
            self._write_config()
            self._make_network()
            self._start_munge()
            self._daemon("login", ["slurmctld", "-D"])
            for node in self.nodes:
                self.switch_on(node)
            self.wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "all machines idle", 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons.values():
            _kill(daemon)
        for name in _networks():
            if name.startswith(f"{self._tag}-"):
                subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what a user does on the login machine -----------------------------------------------------------------------

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, timeout: float = 60) -> str:
        """The output of a command on the login machine."""
        done = subprocess.run(
            [*self._inside("login"), *command], cwd=cwd, env=self._env, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + ("" if check else done.stderr)

    def commands(self, *names: str) -> Path:
        """A folder for a ``PATH``: Slurm's commands, as the login machine runs them, for processes that are not on it."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name in names:
            conf, inside = self.folder / "slurm.conf", shlex.join([*self._inside("login"), str(shutil.which(name))])
            (folder / name).write_text(f'#!/bin/bash\nexport SLURM_CONF={conf}\nexec {inside} "$@"\n')
            (folder / name).chmod(0o755)
        return folder

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job."""
        return dict(re.findall(r"(\w[\w/:]*)=(\S+)", self.run("scontrol", "show", "job", job)))

    def start_now(self, job: str) -> None:
        """Do not wait for the two minutes that Slurm holds a requeued job back, but until it has forgotten the last start:
        in the same second its machines would refuse the job, which then fails."""
        self.wait(lambda: self.job(job)["JobState"] == "PENDING", f"job {job} to be requeued")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def states(self) -> dict[str, str]:
        """The state of every machine."""
        out = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T", check=False)
        return dict(line.split() for line in out.splitlines() if len(line.split()) == 2)

    def shell(self, command: list[str]) -> int:
        """Run a command on the login machine with this process's own input and output; returns its exit status."""
        return subprocess.run([*self._inside("login"), *command], env=self._env).returncode

    def wait(self, true: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Wait until something is true."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
            time.sleep(0.4)  # asking takes a thirtieth of a second of a core

    # ---- what happens to machines ------------------------------------------------------------------------------------

    def configure(self, line: str) -> None:
        """Add a line to ``slurm.conf``, for the controller."""
        with (self.folder / "slurm.conf").open("a") as file:
            file.write(f"{line}\n")
        self.run("scontrol", "reconfigure")

    def lose(self, node: str) -> None:
        """End all processes of a machine at once."""
        _kill(self._daemons.pop(node))

    def switch_on(self, node: str) -> None:
        """Start a machine, with an empty /dev/shm of 64 MB."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        in_namespace = 'mount -t tmpfs -o size=64m tmpfs /dev/shm; exec slurmd -D -N "$0"'
        self._daemon(
            node, ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", in_namespace, node]
        )

    def on(self, node: str, command: str) -> None:
        """Run a shell command on a machine."""
        daemon = self._daemons[node].pid
        (child,) = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        subprocess.run(["nsenter", f"--target={child}", "--mount", "--pid", "sh", "-c", command], check=True)

    def processes(self, node: str, words: str) -> Iterator[int]:
        """The processes of jobs on a machine whose command line has certain words, as this machine numbers them."""
        marks = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder}/slurm.conf"}  # other clusters have a node1, too
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                if words not in (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    continue
                if marks <= set((proc / "environ").read_bytes().decode(errors="replace").split("\0")):
                    yield int(proc.name)
            except OSError:  # it has ended
                continue

    def ranks(self, node: str) -> list[int]:
        """The training processes on a machine, without their launcher and what they fork."""
        found = {
            pid
            for pid in self.processes(node, "scripts/train.py")
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
            and "torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_text()
        }
        return sorted(pid for pid in found if _parent(pid) not in found)

    # ---- how it is made ----------------------------------------------------------------------------------------------

    def _inside(self, machine: str) -> list[str]:
        """What runs a command in the network of a machine, under its name. ``ip netns exec`` would mount another /sys,
        without which slurmd ends."""
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        namespaces = ["nsenter", f"--net=/run/netns/{self._tag}-{machine}", "unshare", "--uts", "--mount"]
        return [*namespaces, "bash", "-c", script, machine, str(self.folder / "hosts")]

    def _daemon(self, name: str, command: list[str], inside: bool = True) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *(self._inside(name) if inside else []), *command],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _write_config(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        for i in range(2):
            os.mknod(self.folder / f"gpu{i}", 0o20666, os.makedev(1, 3))
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, nodes=len(self.nodes)))
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        hosts = [
            "127.0.0.1 localhost",
            "10.77.0.1 login",
            *(f"10.77.0.1{i} {node}" for i, node in enumerate(self.nodes, 1)),
        ]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _make_network(self) -> None:
        """A bridge on the login machine, and a cable from every node to it."""
        login = f"{self._tag}-login"
        _ip("netns", "add", login)
        _ip("-n", login, "link", "set", "lo", "up")
        _ip("-n", login, "link", "add", "br0", "type", "bridge")
        _ip("-n", login, "addr", "add", "10.77.0.1/24", "dev", "br0")
        _ip("-n", login, "link", "set", "br0", "up")
        for i, name in enumerate(self.nodes, 1):
            node = f"{self._tag}-{name}"
            _ip("netns", "add", node)
            _ip("-n", node, "link", "set", "lo", "up")
            _ip("-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{i}", "netns", login)
            _ip("-n", node, "addr", "add", f"10.77.0.1{i}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")
            _ip("-n", login, "link", "set", f"v{i}", "master", "br0")
            _ip("-n", login, "link", "set", f"v{i}", "up")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "seed", "pid")]
        socket = f"--socket={self.folder}/munge.socket"
        self._daemon("munge", ["munged", "--foreground", "--force", socket, *files], inside=False)
        self.wait((self.folder / "munge.socket").exists, "munge", 20)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _networks() -> list[str]:
    out = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in out.splitlines() if line.strip()]


def _remove_networks_of_the_dead() -> None:
    for name in _networks():
        owner = re.fullmatch(rf"{PREFIX}(\d+)-\w+", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _ip("netns", "del", name)


def _kill(daemon: subprocess.Popen[bytes]) -> None:
    """End a daemon and its children; a machine's are the processes of a namespace, which end with its first."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("command", nargs="+", help="put -- before one that has options of its own")
    args = parser.parse_args()
    with user_errors():
        if reason := missing():
            raise ValueError(f"no Slurm cluster here: {reason}")
        with SlurmCluster(args.nodes) as cluster:
            sys.exit(cluster.shell(args.command))


if __name__ == "__main__":
    main()
