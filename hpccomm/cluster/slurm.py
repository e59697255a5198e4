"""Slurm on the nodes of a virtual cluster: a controller on the first node and a daemon on every node.

Keys, sockets, logs and spools are in the cluster's folder; the machine's own Slurm and munge are not touched.
On Debian: ``apt-get install slurm-wlm munge``.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from hpccomm.cluster.nodes import Cluster, wait_until
from hpccomm.errors import LaunchError

TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge"}
IDLE_SECONDS = 30.0

CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUPS = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint={folder}/cgroup
CgroupAutomount=yes
"""


def unavailable_reason() -> str:
    """Why Slurm cannot be started on this machine; empty if it can."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    return f"Slurm needs {' and '.join(missing)}: run apt-get install {' '.join(missing)}" if missing else ""


def start(cluster: Cluster, cpus: int = 8) -> None:
    """Start the daemons, unless they run, and wait until all nodes are idle."""
    reason = unavailable_reason()
    if reason:
        raise LaunchError(reason)
    folder = cluster.folder
    if (folder / "slurm.conf").exists() and is_idle(cluster):
        return
    configure(cluster, cpus)
    start_munge(cluster)
    cluster.start(cluster.hosts[0], ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"], folder / "slurmctld.log")
    for host in cluster.hosts:
        daemon = ["slurmd", "-D", "-N", host, "-f", f"{folder}/slurm.conf"]
        cluster.start(host, daemon, folder / f"slurmd.{host}.log")
    if not wait_until(lambda: is_idle(cluster), IDLE_SECONDS):
        last = {file.name: file.read_text(errors="replace").splitlines()[-3:] for file in folder.glob("slurm*.log")}
        raise LaunchError(f"Slurm: not all nodes are idle after {IDLE_SECONDS:.0f} s; last lines of the logs: {last}")


def configure(cluster: Cluster, cpus: int) -> None:
    """Write Slurm's configuration."""
    folder = cluster.folder
    addresses = {host: cluster.address(host) for host in cluster.hosts}
    nodes = "\n".join(f"NodeName={host} NodeAddr={ip} CPUs={cpus} State=UNKNOWN" for host, ip in addresses.items())
    first = cluster.hosts[0]
    words = {"name": cluster.state.name, "first": first, "address": addresses[first], "folder": folder, "nodes": nodes}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**words), encoding="utf-8")
    (folder / "cgroup.conf").write_text(CGROUPS.format(folder=folder), encoding="utf-8")
    for each in ("state", "cgroup", *(f"spool.{host}" for host in cluster.hosts)):
        (folder / each).mkdir(exist_ok=True)


def start_munge(cluster: Cluster) -> None:
    """Start a munge daemon with a new key; Slurm wants it not as root, in a folder that others cannot write."""
    folder, key = cluster.folder, cluster.folder / "munge.key"
    socket = folder / "munge.socket"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    words = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "log-file", "seed-file")
    ]
    cluster.start(
        cluster.hosts[0], ["munged", "--foreground", "--force", f"--socket={socket}", *words], folder / "munged.out"
    )
    if not wait_until(socket.exists, IDLE_SECONDS):
        raise LaunchError(f"munged did not start: {Path(folder / 'munged.out').read_text(errors='replace').strip()}")


def is_idle(cluster: Cluster) -> bool:
    """Whether every node is idle."""
    done = cluster.run_on(cluster.hosts[0], ["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True)
    return done.stdout.split() == ["idle"] * len(cluster.hosts)
