"""Virtual nodes look like nodes to MPI, and nothing is left of them afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import harness
from hpccomm.cluster import nodes as clusters
from hpccomm.cluster.nodes import Cluster, place_ranks, rate_of, unavailable_reason
from hpccomm.errors import LaunchError
from hpccomm.launcher import library
from hpccomm.layout import ethernets

COMMAND = [sys.executable, "-m", "hpccomm.cluster"]
needs_namespaces = pytest.mark.skipif(
    bool(unavailable_reason()), reason=unavailable_reason() or "namespaces are available"
)

REPORT = """
import json, sys
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
right = []
for algorithm in ("auto", "native", "hierarchical", "ring"):
    for n in (5, 100_003):
        a = np.arange(n, dtype="f4") % 61 + comm.rank
        comm.Allreduce(MPI.IN_PLACE, a, algorithm=algorithm)
        right.append(bool((a == np.arange(n) % 61 * comm.size + sum(range(comm.size))).all()))
everybody = comm.allgather(all(right))
if comm.rank == 0:
    print(json.dumps([comm.layout.nodes.tolist(), comm.layout.names, everybody]))
"""


def find_leftovers(name: str) -> list[str]:
    """Namespaces, files and links that still bear a cluster's name."""
    folders = [folder / each for folder, each in ((clusters.FOLDER, name),)]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return [
        *(each for each in clusters.list_namespaces() if each.startswith(f"{name}-")),
        *(str(each) for each in [*folders, *clusters.HOSTS.glob(f"{name}-*")] if each.exists()),
        *(line for line in links.splitlines() if "br0" in line or ": v0@" in line),
        *(each for each in hosts_files() if each not in BEFORE),
    ]


def hosts_files() -> list[str]:
    """Files named after a node in /dev/shm and /tmp."""
    return [str(each) for folder in ("/dev/shm", "/tmp") for each in Path(folder).glob("*[.]n[0-9].*")]


BEFORE = frozenset(hosts_files())
"""Files that were there before these tests."""


@pytest.fixture
def name() -> Iterator[str]:
    """A cluster's name; the cluster is removed even if the test fails."""
    made = f"t{os.getpid() % 10**7}"
    yield made
    subprocess.run([*COMMAND, "down", "--name", made], check=True)


def test_ranks_are_placed_one_node_after_the_other_in_turn_or_shuffled() -> None:
    assert place_ranks([1, 3], "block") == [0, 1, 1, 1]
    assert place_ranks([1, 3], "cyclic") == [0, 1, 1, 1]
    assert place_ranks([2, 2, 1], "cyclic") == [0, 1, 2, 0, 1]
    shuffled = place_ranks([4, 4], "random", 1)
    assert sorted(shuffled) == place_ranks([4, 4], "block") != shuffled == place_ranks([4, 4], "random", 1)


@pytest.mark.parametrize(
    ("rate", "bits"), [("1gbit", 1e9), ("100mbit", 1e8), ("2.5gbit", 2.5e9), ("64kbit", 64e3), ("", 0)]
)
def test_rates_are_in_the_notation_of_tc(rate: str, bits: float) -> None:
    assert rate_of(rate) == bits


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["up", "--rate", "fast"], "1gbit, 100mbit"),
        (["up", "--nodes", "0"], "use 1 to 200 nodes"),
        (["up", "--name", "No"], "lower-case letters"),
        (["run", "--name", "nosuch", "--", "true"], "scripts/cluster up"),
    ],
)
@needs_namespaces
def test_an_error_names_its_remedy(words: list[str], remedy: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr


def test_a_user_without_root_rights_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LaunchError, match="needs root"):
        Cluster().up()


@pytest.mark.slow
@needs_namespaces
def test_mpi_sees_separate_nodes_and_nothing_is_left_of_them(name: str) -> None:
    with Cluster(3, "1gbit", name) as cluster:
        Cluster(3, "1gbit", name).up()
        with pytest.raises(LaunchError, match="is up with 3 nodes at 1gbit"):
            Cluster(2, "1gbit", name).up()
        found = {}
        for placement, counts in (("block", [1, 2, 1]), ("cyclic", [2, 2, 2])):
            done = cluster.run(["-c", REPORT], counts, placement, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            found[placement] = json.loads(done.stdout)
        assert found["block"] == [[0, 1, 1, 2], ["n0", "n1", "n2"], [True] * 4]
        assert found["cyclic"] == [[0, 1, 2, 0, 1, 2], ["n0", "n1", "n2"], [True] * 6]
    assert find_leftovers(name) == []


@needs_namespaces
def test_nodes_with_several_links_use_all_of_them(name: str) -> None:
    program = f"{REPORT}\nfrom hpccomm.layout import ethernets\nassert ethernets() == ['eth0', 'eth1']\n"
    with Cluster(2, "1gbit", name, nics=2) as cluster:
        with pytest.raises(LaunchError, match="is up with 2 nodes at 1gbit x 2"):
            Cluster(2, "1gbit", name).up()
        before = switch_bytes(name)
        done = cluster.run(["-c", program], 2, capture_output=True, text=True, timeout=120)
        assert json.loads(done.stdout) == [[0, 0, 1, 1], ["n0", "n1"], [True] * 4], done.stderr
        carried = [after - first for first, after in zip(before, switch_bytes(name), strict=True)]
    assert len(carried) == 4
    assert library().family.name != "Open MPI" or min(carried) > 200_000
    with pytest.raises(LaunchError, match="use 1 to 8 links"):
        Cluster(2, "", name, nics=9).up()
    assert find_leftovers(name) == []


def switch_bytes(name: str) -> list[int]:
    """Bytes that each port of the switch has sent to a node."""
    words = ["ip", "-n", f"{name}-switch", "-s", "-j", "link", "show", "type", "veth"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return [each["stats64"]["tx"]["bytes"] for each in found]


def test_only_ethernet_links_that_are_up_are_listed(tmp_path: Path) -> None:
    for link, kind, state in (("eth0", 1, "up"), ("eth1", 1, "down"), ("lo", 772, "unknown"), ("eth2", 1, "up")):
        (tmp_path / link).mkdir()
        (tmp_path / link / "type").write_text(f"{kind}\n")
        (tmp_path / link / "operstate").write_text(f"{state}\n")
    (tmp_path / "bonding_masters").touch()
    assert ethernets(tmp_path) == ["eth0", "eth2"]


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_leaves_nothing(name: str, number: int) -> None:
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests may run with it ignored
        f"from hpccomm.cluster.nodes import *\nwith Cluster(2, '', {name!r}) as c:\n c.run(['sleep', '60'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        assert clusters.wait_until((clusters.FOLDER / name / "agent").exists, 20)
        time.sleep(0.3)
        process.send_signal(number)
        process.wait(20)
    assert find_leftovers(name) == []


def test_shapes_of_the_benchmark_are_written_in_one_word() -> None:
    shape = harness.shape_of("3x2+1+3,100mbit,cyclic")
    assert shape == (3, (2, 1, 3), "cyclic", "100mbit")
    assert shape.title == "3 x 2+1+3, cyclic, 100mbit"


def test_clusters_come_and_go_under_one_lock(tmp_path: Path) -> None:
    """Every process creates the folder, counts and removes the folder under the lock: no count is lost."""
    program = (
        "import pathlib, sys; from hpccomm.cluster import nodes\n"
        "nodes.FOLDER, total = pathlib.Path(sys.argv[1]) / 'run', pathlib.Path(sys.argv[1]) / 'total'\n"
        "for _ in range(200):\n"
        " with nodes.hold_lock():\n"
        "  nodes.FOLDER.mkdir()\n"
        "  total.write_text(str(int(total.read_text()) + 1))\n"
        "  nodes.FOLDER.rmdir()"
    )
    (tmp_path / "total").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "total").read_text() == "600"


@needs_namespaces
def test_a_signal_is_delivered_after_the_nodes_are_removed(name: str) -> None:
    program = (
        "import os, signal; from hpccomm.cluster import nodes as cluster\n"
        "found = cluster.pids\n"
        "def pids(space):\n os.kill(os.getpid(), signal.SIGTERM)\n return found(space)\n"
        f"with cluster.Cluster(2, '', {name!r}):\n cluster.pids = pids"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert find_leftovers(name) == []


@needs_namespaces
def test_a_cluster_can_be_removed_after_its_process_was_killed(name: str) -> None:
    subprocess.run([*COMMAND, "up", "--nodes", "2", "--name", name], check=True, stdout=subprocess.DEVNULL)
    running = [*COMMAND, "run", "--name", name, "--", "sleep", "60"]
    with subprocess.Popen(running, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        inside = f"{name}-n1"
        assert clusters.wait_until(lambda: any("sleep" in words_of(pid) for pid in clusters.pids(inside)), 30)
        process.kill()
        process.wait(5)
    assert clusters.pids(inside)
    subprocess.run([*COMMAND, "down", "--name", name], check=True)
    assert find_leftovers(name) == []


def words_of(pid: int) -> str:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


@needs_namespaces
def test_namespaces_of_others_are_left_alone(name: str) -> None:
    subprocess.run(["ip", "netns", "add", f"{name}-n1"], check=True)
    try:
        with pytest.raises(LaunchError, match=f"namespaces {name}-n1 exist and belong to others"):
            Cluster(2, "", name).up()
        Cluster(2, "", name).down()
        assert clusters.list_namespaces() & {f"{name}-n0", f"{name}-n1"} == {f"{name}-n1"}
    finally:
        subprocess.run(["ip", "netns", "del", f"{name}-n1"], check=True)
