"""A virtual cluster: several nodes on one machine, made of Linux network namespaces.

*A node is a network namespace.  Its ranks see a host name of their own and one or several links, ``eth0`` …, each of a
given rate in either direction and connected to a switch that all nodes share.*  To MPI these are separate nodes: shared
memory inside, TCP between.  The switches are in a namespace too, so the machine's own network is neither changed nor
reached.

::

    with Cluster(nodes=4, rate="1gbit") as cluster:                    # calls up() and down()
        cluster.run(["train.py"], per_node=2)                          # a CompletedProcess

The state is written to a file before anything is created, so that ``down`` can remove a cluster whose process was ended
in any way, ``kill -9`` included.  Needs root, Linux, iproute2 and util-linux.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.errors import LaunchError
from hpccomm.files import write_text
from hpccomm.launcher import launch_command, library
from hpccomm.performance.units import format_count

FOLDER = Path("/run/hpccomm")
"""Holds a folder with the state of each cluster, named after it."""
HOSTS = Path("/etc/netns")
"""``ip netns exec`` replaces files of /etc inside a namespace by those in this folder."""
NETWORK = "10.77."
"""Prefix of the nodes' addresses, valid in their namespaces only; link and node follow."""
FIRST = 10
MOST_NODES, MOST_NICS = 200, 8
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
PLACEMENTS = ("block", "cyclic", "random")
BURST_SECONDS, LEAST_BURST = 1.5e-3, 16384
"""Burst size of a link: a smaller one halves the rate at 1 Gbit/s, a larger one lets short messages pass for free."""
END_SECONDS = 5.0

RATE_PATTERN = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit", re.IGNORECASE)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM inside; they are delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ClusterState(NamedTuple):
    """A cluster that exists, completely or in part."""

    name: str
    nodes: int
    rate: str
    nics: int = 1
    burst: int = 0
    processes: tuple[int, ...] = ()
    """Daemons, each the leader of its session."""


class Cluster:
    """A virtual cluster whose nodes have ``nics`` links each.

    ``rate`` is that of a link in tc's notation (``1gbit``, ``100mbit``), or ``""`` for links without limit.  ``burst``
    are the bytes that a link may send at once after a rest, by default what it carries in 1.5 ms.
    """

    def __init__(self, nodes: int = 4, rate: str = "1gbit", name: str = "hpc", nics: int = 1, burst: int = 0) -> None:
        self.state = ClusterState(name, nodes, rate, nics, burst)

    @classmethod
    def find(cls, name: str = "hpc") -> Cluster:
        """The cluster of that name; raises LaunchError if there is none."""
        try:
            found = json.loads((FOLDER / name / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise LaunchError(
                f"no cluster {name!r} is up: start it with scripts/cluster up --nodes 4 --rate 1gbit"
            ) from None
        cluster = cls()
        cluster.state = ClusterState(**{**found, "processes": tuple(found["processes"])})
        return cluster

    def __enter__(self) -> Cluster:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, exit_on_signal)
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self.down()
        if signal.getsignal(signal.SIGTERM) == exit_on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @property
    def folder(self) -> Path:
        """The folder of this cluster's files."""
        return FOLDER / self.state.name

    @property
    def hosts(self) -> list[str]:
        """The nodes' host names."""
        return [f"n{k}" for k in range(self.state.nodes)]

    def namespace(self, host: str) -> str:
        """The namespace of a host."""
        return f"{self.state.name}-{host}"

    @property
    def devices(self) -> list[str]:
        """The names of a node's links."""
        return [f"eth{link}" for link in range(self.state.nics)]

    def address(self, host: str, link: int = 0) -> str:
        """The address of a host's link, inside the namespaces."""
        return f"{NETWORK}{link}.{FIRST + self.hosts.index(host)}"

    @property
    def namespaces(self) -> list[str]:
        """All namespaces, the switch's included."""
        return [self.namespace(host) for host in (*self.hosts, "switch")]

    def up(self) -> None:
        """Create the nodes, unless the same cluster is up already."""
        reason = unavailable_reason()
        if reason:
            raise LaunchError(reason)
        rate_of(self.state.rate)
        if not 1 <= self.state.nics <= MOST_NICS:
            raise LaunchError(f"--nics {self.state.nics}: use 1 to {MOST_NICS} links a node")
        if not 1 <= self.state.nodes <= MOST_NODES or not re.fullmatch(r"[a-z][a-z0-9]{0,7}", self.state.name):
            raise LaunchError(
                f"--nodes {self.state.nodes} --name {self.state.name}: use 1 to {MOST_NODES} nodes, and a name "
                "of up to eight lower-case letters and digits"
            )
        with hold_lock():
            if (self.folder / "state.json").exists():
                self.compare(Cluster.find(self.state.name).state)
                return
            others = [each for each in self.namespaces if each in list_namespaces()]
            if others:
                raise LaunchError(f"namespaces {', '.join(others)} exist and belong to others: use another --name")
            try:
                self.save_state()
                self.build()
            except BaseException:
                self.clear()
                raise

    def compare(self, existing: ClusterState) -> None:
        """Raise if the cluster that is up under this name is a different one."""
        if existing[:5] != self.state[:5]:
            rate = (existing.rate or "unlimited rate") + (f" x {existing.nics}" if existing.nics > 1 else "")
            rate += f" with bursts of {existing.burst} bytes" if existing.burst else ""
            raise LaunchError(
                f"cluster {existing.name!r} is up with {format_count(existing.nodes, 'node')} at {rate}: run "
                f"scripts/cluster down --name {existing.name} first, or use another --name"
            )
        self.state = existing

    def save_state(self) -> None:
        """Write the state file, before or after a change."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "state.json", json.dumps(self.state._asdict()))

    def build(self) -> None:
        """Create namespaces, links and host names."""
        switch = self.namespace("switch")
        lines = [f"netns add {each}" for each in self.namespaces]
        batch(lines)
        batch(["link set lo up"], switch)
        for link in range(self.state.nics):
            batch([f"link add br{link} type bridge", f"link set br{link} up"], switch)
        table = "".join(f"{self.address(host)} {host}\n" for host in self.hosts)
        for k, host in enumerate(self.hosts):
            inside = self.namespace(host)
            batch(["link set lo up"], inside)
            for link, device in enumerate(self.devices):
                self.connect(host, device, f"v{k}" if link == 0 else f"v{k}.{link}", link)
            (HOSTS / inside).mkdir(parents=True)
            (HOSTS / inside / "hosts").write_text(f"127.0.0.1 localhost\n{table}", encoding="utf-8")
        agent = self.folder / "agent"
        agent.write_text(AGENT.format(name=self.state.name, private=PRIVATE), encoding="utf-8")
        agent.chmod(0o755)

    def connect(self, host: str, device: str, port: str, link: int) -> None:
        """Create one link of a host and limit its rate in both directions."""
        inside, switch = self.namespace(host), self.namespace("switch")
        made = [f"link add {port} type veth peer name {device} netns {inside}", f"link set {port} master br{link} up"]
        batch(made, switch)
        batch([f"addr add {self.address(host, link)}/24 dev {device}", f"link set {device} up"], inside)
        for namespace, end in ((inside, device), (switch, port)):
            shape(namespace, end, self.state.rate, self.state.burst)

    def down(self) -> None:
        """End the cluster's processes and remove it; does nothing if it is not up."""
        if self.folder.exists():
            with hold_lock():
                self.clear()

    @defer_signals()
    def clear(self) -> None:
        """End the processes, then remove namespaces and files; signals are delivered when that is done."""
        for process in self.state.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGTERM)
        there = list_namespaces()
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [pid for each in self.namespaces if each in there for pid in pids(each)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            wait_until(lambda: not any(pids(each) for each in self.namespaces if each in there), END_SECONDS)
        for each in self.namespaces:
            if each in there:
                ip(["netns", "del", each])
            shutil.rmtree(HOSTS / each, ignore_errors=True)
        with contextlib.suppress(OSError):
            HOSTS.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            FOLDER.rmdir()

    @property
    def open_mpi_settings(self) -> dict[str, str]:
        """Settings for TCP over all links between the nodes, with session folders in the cluster's folder."""
        more = {"OMPI_MCA_btl_tcp_if_include": ",".join(self.devices), "PRTE_MCA_prte_tmpdir_base": str(self.folder)}
        return OPEN_MPI_SETTINGS | more

    def start(self, host: str, command: Sequence[str], log: Path) -> None:
        """Start a daemon on a host; ``down`` ends it."""
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.host_command(host, command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.state = self.state._replace(processes=(*self.state.processes, process.pid))
        self.save_state()

    def run_on(self, host: str, command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command on one host; if Slurm is up, its commands work there."""
        if host not in self.hosts:
            raise LaunchError(f"there is no host {host}: use one of {', '.join(self.hosts)}")
        env = {**os.environ, **self.open_mpi_settings, **MPICH_SETTINGS, **more.pop("env", {})}
        if (self.folder / "slurm.conf").exists():
            env["SLURM_CONF"] = str(self.folder / "slurm.conf")
        return subprocess.run(self.host_command(host, command), env=env, stdin=subprocess.DEVNULL, check=False, **more)

    def command(
        self, program: Sequence[str], per_node: Sequence[int] | int = 1, placement: str = "block", seed: int = 0
    ) -> tuple[list[str], dict[str, str]]:
        """The command that starts ``program`` on all nodes, and its environment.

        ``per_node`` is the number of ranks on every node, or a list with one number for each.  ``placement`` is the
        order of placement: node after node (``block``), round-robin (``cyclic``), or shuffled by ``seed`` (``random``).
        """
        counts = [per_node] * self.state.nodes if isinstance(per_node, int) else list(per_node)
        if len(counts) != self.state.nodes or min(counts) < 0 or not sum(counts):
            given = ",".join(map(str, counts))
            raise LaunchError(f"--per-node {given}: give one number for all {self.state.nodes} nodes, or one for each")
        order = place_ranks(counts, placement, seed)
        family = library().family.name
        settings: dict[str, str] = {}
        file = self.folder / f"hosts.{os.getpid()}"
        file.write_text("".join(f"{self.hosts[k]}\n" for k in order), encoding="utf-8")
        agent = str(self.folder / "agent")
        if family == "Open MPI":
            more = ["--hostfile", str(file), "--map-by", "seq", "--bind-to", "none"]
            settings = self.open_mpi_settings | {"PRTE_MCA_plm_ssh_agent": agent}
        elif family == "MPICH":
            more = ["-f", str(file), "-launcher", "ssh", "-launcher-exec", agent, "-iface", "eth0"]
            settings = MPICH_SETTINGS
        else:
            raise LaunchError(f"a virtual cluster cannot start {family}: use an environment with Open MPI or MPICH")
        command, env = launch_command(len(order), program, more)
        return self.host_command(self.hosts[order[0]], command), env | settings

    def host_command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a host."""
        words = f"hostname {host}; {PRIVATE}; exec {shlex.join(command)}"
        return ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "bash", "-c", words]

    def run(
        self,
        program: Sequence[str],
        per_node: Sequence[int] | int = 1,
        placement: str = "block",
        seed: int = 0,
        **more: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on all nodes, see :meth:`command`; ``more`` goes to ``subprocess.run``."""
        command, env = self.command(program, per_node, placement, seed)
        try:
            return subprocess.run(command, env=env | more.pop("env", {}), stdin=subprocess.DEVNULL, check=False, **more)
        finally:
            (self.folder / f"hosts.{os.getpid()}").unlink(missing_ok=True)


AGENT = """#!/bin/bash
# Called in place of ssh: [options] HOST COMMAND...
while [ "${{1:0:1}}" = - ]; do shift; done
host=$1; shift
exec ip netns exec {name}-$host unshare --uts bash -c "hostname $host; {private}; $*"
"""
PRIVATE = "mount -t tmpfs hpccomm /dev/shm"
"""Runs in the mount namespace that ``ip netns exec`` creates: files that a job leaves vanish with its processes."""

OPEN_MPI_SETTINGS = {
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_prte_if_include": "eth0",
}
MPICH_SETTINGS = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "FI_TCP_IFACE": "eth0"}
"""MPICH's other network module, ucx, would bypass the links."""


def exit_on_signal(*_: object) -> None:
    """Exit by an exception at SIGTERM, so that the cluster is removed."""
    sys.exit(128 + signal.SIGTERM)


def unavailable_reason() -> str:
    """Why there can be no virtual cluster on this machine; empty if there can."""
    if sys.platform != "linux":
        return f"a virtual cluster needs Linux namespaces, and this is {sys.platform}"
    if os.geteuid():
        return "a virtual cluster needs root: use sudo scripts/cluster …, or a container with NET_ADMIN and SYS_ADMIN"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"a virtual cluster needs {' and '.join(missing)}: run apt-get install {' '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"this machine does not allow new namespaces ({tried.stderr.strip()})" if tried.returncode else ""


def rate_of(rate: str) -> float:
    """Bits per second of a rate in tc's notation; 0 for no limit."""
    found = RATE_PATTERN.fullmatch(rate)
    if rate and not found:
        raise LaunchError(f"--rate {rate}: use tc's notation: 1gbit, 100mbit, 2.5gbit, or '' for no limit")
    return float(found[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()] if found else 0.0


def default_burst(rate: str) -> int:
    """The bytes that a link of this rate may send at once."""
    return max(LEAST_BURST, int(rate_of(rate) / 8 * BURST_SECONDS))


def shape(namespace: str, device: str, rate: str, burst: int = 0) -> None:
    """Limit the rate at which a device sends, and the bytes that it sends at once."""
    if rate_of(rate):
        burst = burst or default_burst(rate)
        words = f"qdisc add dev {device} root tbf rate {rate} burst {burst} latency 50ms"
        run_command(["tc", "-n", namespace, *words.split()])


def place_ranks(counts: Sequence[int], placement: str, seed: int = 0) -> list[int]:
    """The node of each rank."""
    if placement not in PLACEMENTS:
        raise LaunchError(f"--placement {placement}: use one of {', '.join(PLACEMENTS)}")
    block = [node for node, count in enumerate(counts) for _ in range(count)]
    if placement == "cyclic":
        return [node for turn in range(max(counts)) for node, count in enumerate(counts) if turn < count]
    if placement == "random":
        random.Random(seed).shuffle(block)
    return block


def run_command(command: Sequence[str], words: str | None = None) -> str:
    """Run a system command; returns its output, raises LaunchError with its message."""
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def ip(words: Sequence[str]) -> str:
    """``ip`` with these words."""
    return run_command(["ip", *words])


def batch(lines: Sequence[str], namespace: str | None = None) -> None:
    """Run several lines of ``ip`` in one process."""
    run_command(["ip", *(["-n", namespace] if namespace else []), "-batch", "-"], "\n".join(lines) + "\n")


def list_namespaces() -> set[str]:
    """The named namespaces of this machine."""
    return {line.split()[0] for line in ip(["netns", "list"]).splitlines() if line}


def pids(namespace: str) -> list[int]:
    """The processes in a namespace."""
    return [int(word) for word in ip(["netns", "pids", namespace]).split()]


def wait_until(condition: Any, seconds: float) -> bool:
    """Wait for a condition; whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def hold_lock() -> Iterator[None]:
    """Let one process at a time create or remove clusters: by the parent folder, which none of them removes."""
    folder = os.open(FOLDER.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
