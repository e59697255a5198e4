"""The flight recorder keeps the last calls of every rank, and a stall gives one report of all ranks."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from late_rank import LATE_RANK
from mpi4py import MPI

import hpccomm
from hpccomm import ArgumentError, Communicator, context
from hpccomm.__main__ import main
from hpccomm.calls import watchdog
from hpccomm.cluster.nodes import Cluster, unavailable_reason
from hpccomm.commands.stacks import find_ranks
from hpccomm.communicator import NATIVE_CALLS
from hpccomm.kernels.entry.records import MOST_ARGUMENTS
from hpccomm.observe.flight_recorder import TEXTS, Call, Comm, Recorder, recorder
from hpccomm.testing.jobs import run_under_mpi, start, stop

SETUP = (
    """
import os, sys, time
import numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm import context
def two_nodes():
    context.ranks_of_this_node = lambda comm: comm.Split(comm.rank // 2, comm.rank)
"""
    + LATE_RANK
)
STUCK = """
comm = hpccomm.Communicator(MPI.COMM_WORLD)
x = np.ones(8, "f4")
for _ in range(5):
    comm.Allreduce(MPI.IN_PLACE, x)
os.environ["HPCCOMM_STALL_SECONDS"] = "1"  # the first calls may take long on a loaded machine
def read_data():
    sleep_until_asked()  # here it is stuck
if comm.rank == 1:
    read_data()
comm.Allreduce(MPI.IN_PLACE, x)
"""


def run_job(ranks: int, body: str, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a job."""
    done = run_under_mpi(ranks, "-c", SETUP + textwrap.dedent(body), timeout=90, environ=os.environ | (environ or {}))
    return done.returncode, done.stdout + done.stderr


def reports_in(said: str) -> list[str]:
    """The reports of stalls: each is a sentence and a line for the ranks of each state."""
    return re.findall(r"^\[hpccomm\] .*call 6 .* not complete after .*\n(?:  .*\n)*", said, re.MULTILINE)


def check_report(report: str) -> None:
    """That a report of ``STUCK`` names the rank, its call and its Python line."""
    first, *_ = report.splitlines()
    assert "rank 0: Allreduce(sum, float32)" in first
    assert "missing: rank 1" in first
    assert re.search(
        r"rank 1: in no call since Allreduce.*call 5 of ranks 0-.*:\d+ in read_data < .* in <module>", report
    )
    assert re.search(r"ranks? .*3: in Allreduce.*call 6 of.*in <module>", report)


@pytest.mark.slow(keep=2)
@pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason() or "namespaces are available")
def test_one_report_of_a_two_node_job_names_the_stuck_rank_its_call_and_its_line(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SETUP + STUCK)
    with Cluster(2, "", f"r{os.getpid() % 10**6}") as cluster:
        done = cluster.run([str(program)], 2, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    found = reports_in(done.stderr)
    check_report(found[0])
    assert len(found) <= 3, done.stderr


@pytest.mark.slow(keep=2)
def test_a_stall_is_reported_once_by_all_ranks_together_and_again_later() -> None:
    status, said = run_job(4, "two_nodes()\n" + STUCK)
    assert status == 0, said
    found = reports_in(said)
    assert 1 <= len(found) <= 3, said
    check_report(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("made", ["Split(0, comm.rank)", "Dup()", "Create_cart([3])", "Create(comm.Get_group())"])
def test_the_rank_that_is_missing_when_others_make_a_communicator_is_named(made: str) -> None:
    wait = "comm = hpccomm.Communicator(MPI.COMM_WORLD)\nif comm.rank == 0: sleep_until_asked()\n"
    status, said = run_job(3, f"{wait}comm.{made}", {"HPCCOMM_STALL_SECONDS": "1"})
    assert status == 0, said
    assert re.search(rf"rank [12]: {made.split('(', maxsplit=1)[0]} not complete after .* s; missing: rank 0", said), (
        said
    )


@pytest.mark.slow
def test_the_rank_that_is_missing_when_others_make_their_first_communicator_is_named() -> None:
    program = "if MPI.COMM_WORLD.rank != 1: hpccomm.Communicator(MPI.COMM_WORLD)"
    status, said = run_job(3, program, {"HPCCOMM_STALL_SECONDS": "1", "HPCCOMM_STALL_ACTION": "abort"})
    assert status != 0, said
    assert re.search(r"rank [02]: Communicator not complete after .* s; missing, or on another node: rank 1\n", said), (
        said
    )
    assert "rank 1: in no communicator of hpccomm yet, or on another node" in said


@pytest.mark.slow
def test_the_rank_that_makes_no_communicator_from_another_one_says_where_it_is() -> None:
    status, said = run_job(
        3,
        """
        comm, other = hpccomm.Communicator(MPI.COMM_WORLD), MPI.COMM_WORLD.Split(0, -MPI.COMM_WORLD.rank)
        os.environ["HPCCOMM_STALL_SECONDS"] = "1"
        if comm.rank == 0: sleep_until_asked()
        hpccomm.Communicator(other).Barrier()
        """,
    )
    assert status == 0, said
    assert re.search(r"rank [01]: Communicator not complete after .* s; missing: rank 2\n", said), said
    assert re.search(r"rank 2: has made no call yet: .* in sleep_until_asked", said), said


def test_the_watchdog_goes_on_after_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, looks = watchdog.Watchdog(), []

    def look(launchers: Any) -> bool:
        looks.append(launchers)
        if len(looks) == 3:
            raise SystemExit
        raise KeyError("lost")

    monkeypatch.setattr(made, "_look", look)
    monkeypatch.setattr(watchdog, "PERIOD", 0.01)
    with pytest.raises(SystemExit):
        made.run_watchdog()
    assert capfd.readouterr().err.count("KeyError: 'lost'") == 1


LEVELS = {
    "inter_node": ("comm.inter_node", "inter-node ranks 1,3 of ranks 0-3", 1),
    "intra_node": ("comm.intra_node", "intra-node ranks 2-3 of ranks 0-3", 1),
    "a level of a level": ("comm.intra_node.intra_node", "intra-node ranks 0-1 of intra-node ranks 2-3 of", 1),
    "Split": ("comm.Split(comm.rank % 2, comm.rank)", "ranks 1,3", 1),
    "Dup": ("comm.Dup()", "ranks 0-3 #2", 3),
    "Create_cart": ("comm.Create_cart([4])", "ranks 0-3 #3", 3),
}
"""Communicators made from one of two nodes: label and rank where rank 3 of the world is."""


@pytest.mark.slow
def test_stalls_of_levels_and_derived_communicators_are_reported() -> None:
    makers = [maker for maker, _, _ in LEVELS.values()]
    status, said = run_job(
        4,
        f"""
        two_nodes()
        comm, x = hpccomm.Communicator(MPI.COMM_WORLD), np.ones(8)
        made = [make(comm) for make in ({"".join(f"lambda comm: {each}," for each in makers)})]
        for each in made: each.Allreduce(MPI.IN_PLACE, x)
        os.environ["HPCCOMM_STALL_SECONDS"] = "0.5"
        for each in made:
            comm.Barrier()
            if comm.rank == 3: sleep_until_asked(1.0)
            each.Allreduce(MPI.IN_PLACE, x)
        """,
    )
    assert status == 0, said
    for name, (_, label, rank) in LEVELS.items():
        found = re.search(rf"call 2 of {re.escape(label)}.*not complete after .*; missing: rank {rank}\n.*\n", said)
        assert found, (name, said)
        assert f"rank {rank}: in no call since Allreduce" in found[0]
        assert "in <module>" in found[0]


def test_ranks_that_share_no_communicator_with_the_late_one_say_for_whom_they_wait() -> None:
    """Rank 0 waits between the groups for rank 2, which waits inside its group for rank 3."""
    status, said = run_job(
        4,
        """
        comm, weights = hpccomm.Communicator(MPI.COMM_WORLD), np.zeros(8, "f4")
        inner = hpccomm.scale(-0.1)
        method = hpccomm.hybrid(comm, lambda group: hpccomm.mean(group), inner, 2, period=50)
        state = method.init(weights)
        for turn in range(2):
            step, state = method.update(np.ones(8, "f4"), state, weights)
        pair = comm.Split(comm.rank % 2, comm.rank)
        pair.Allreduce(np.ones(8), np.empty(8))
        os.environ["HPCCOMM_STALL_SECONDS"] = "0.5"
        def read_data():
            sleep_until_asked()
        if comm.rank == 3:
            read_data()
        if comm.rank >= 2:
            method.update(np.ones(8, "f4"), state, weights)
        pair.Allreduce(np.ones(8), np.empty(8))
        if comm.rank < 2:
            method.update(np.ones(8, "f4"), state, weights)
        """,
    )
    assert status == 0, said
    missing = r"not complete after .*; missing: rank 1\n"
    assert re.search(rf"of ranks 0,2\b.*{missing}(.*\n)+?.*rank 1: in .* of ranks 2-3", said), said
    assert re.search(rf"of ranks 2-3\b.*{missing}.*in no call since .*in read_data", said), said


@pytest.mark.slow
def test_the_missing_ranks_of_a_call_in_several_parts_are_named() -> None:
    status, said = run_job(
        2,
        """
        comm, x = hpccomm.Communicator(MPI.COMM_WORLD), np.ones(8)
        comm.Allreduce(x, x.copy(), reproducible=True)
        os.environ["HPCCOMM_STALL_SECONDS"] = "0.5"
        if comm.rank: sleep_until_asked()
        comm.Allreduce(x, x.copy(), reproducible=True)
        """,
    )
    assert status == 0, said
    assert "missing: rank 1" in said
    assert "no rank is missing" not in said


def test_a_communicator_is_freed_after_the_check_of_the_watchdog_that_reads_its_memory() -> None:
    inside, may_end, checks = threading.Event(), threading.Event(), []

    class Table:
        active_seq = awaited = 0

        def explain_awaited(self) -> None:
            return None

        def write_wanted_texts(self) -> None:
            inside.set()
            assert may_end.wait(30)
            checks.append("ended")

        def take_refusal(self) -> str:
            return ""

    group = watchdog.Group(Comm(recorder(), 1 << 50, "ranks 0"), 0, [(0,)], Table())
    threading.Thread(target=group.check_calls).start()
    assert inside.wait(30)
    closing = threading.Thread(target=lambda: (group.close(), checks.append("closed")))
    closing.start()
    closing.join(0.2)
    may_end.set()
    closing.join()
    group.check_calls()
    assert checks == ["ended", "closed"]


@pytest.mark.slow(keep=2)
def test_a_stopped_rank_is_named_and_goes_on() -> None:
    status, said = run_job(
        3,
        """
        import signal
        from hpccomm.calls import watchdog
        comm, x = hpccomm.Communicator(MPI.COMM_WORLD), np.ones(8)
        pids, log = comm.allgather(os.getpid()), watchdog.log_line
        def log_and_continue(sentence):
            log(sentence)
            if "(is stopped)" in sentence:
                os.kill(pids[1], signal.SIGCONT)
        watchdog.log_line = log_and_continue
        comm.Allreduce(MPI.IN_PLACE, x)
        os.environ["HPCCOMM_STALL_SECONDS"] = "1"
        if comm.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        comm.Allreduce(MPI.IN_PLACE, x)
        """,
    )
    assert status == 0, said
    assert "missing: rank 1" in said
    assert re.search(r"rank 1: in no call since Allreduce.*\(is stopped\)", said), said


@pytest.mark.slow(keep=2)
def test_a_stall_can_end_the_job() -> None:
    began = time.monotonic()
    status, said = run_job(2, STUCK.replace("sleep_until_asked()", "time.sleep(80)"), {"HPCCOMM_STALL_ACTION": "abort"})
    assert status != 0
    assert time.monotonic() - began < 70
    assert "missing: rank 1" in said
    assert "HPCCOMM_STALL_ACTION=abort" in said


@pytest.mark.slow(keep=2)
def test_an_uncaught_exception_says_where_the_others_wait() -> None:
    fail = "sleep_until_others_wait(comm); hpccomm.communicator.WAITING_SECONDS = 30; raise ValueError('no data')"
    status, said = run_job(3, STUCK.replace("sleep_until_asked()", fail))
    assert status != 0
    assert "ValueError: no data" in said
    assert re.search(r"ranks 0, 2: in Allreduce.*in <module>", said), said


NO_DESCRIPTOR = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
comm, x = hpccomm.Communicator(MPI.COMM_WORLD), np.ones(8)
comm.Allreduce(MPI.IN_PLACE, x)
"""


@pytest.mark.slow(keep=2)
def test_a_rank_without_a_free_file_descriptor_goes_on() -> None:
    status, said = run_job(
        2,
        NO_DESCRIPTOR
        + """
if comm.rank == 1:
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        time.sleep(1)
    for each in held:
        os.close(each)
comm.Allreduce(MPI.IN_PLACE, x)
""",
    )
    assert status == 0, said


@pytest.mark.slow(keep=2)
def test_a_rank_that_fails_without_a_free_file_descriptor_ends_the_others() -> None:
    status, said = run_job(
        2,
        NO_DESCRIPTOR
        + """
held = []
while comm.rank == 1:
    held.append(os.dup(0))
comm.Allreduce(MPI.IN_PLACE, x)
""",
    )
    assert status != 0
    assert "rank 1 aborts all ranks: uncaught exception" in said
    assert "Error in sys.excepthook" not in said


def test_messages_of_the_watchdog_never_reach_the_next_communicator() -> None:
    status, said = run_job(
        2,
        """
        from hpccomm.calls import watchdog
        context.ranks_of_this_node = lambda comm: comm.Split(comm.rank, 0)
        watchdog.PERIOD = 100
        for length in (10, 1 << 21):
            comm = hpccomm.Communicator(MPI.COMM_WORLD.Dup())
            group = comm.context._group
            if group.wire is not None and comm.rank == 0:
                group.ask(1, 1, 0)
                group.send(1, group.wire.ANSWER, (7, "x" * length))
            MPI.COMM_WORLD.Barrier()
            comm.Free()
            made = [MPI.COMM_WORLD.Split(0, 0) for k in range(40)]
            MPI.COMM_WORLD.Barrier()
            time.sleep(0.2)
            assert not any(each.Iprobe() for each in made)
        """,
    )
    assert status == 0, said


def test_a_rank_that_frees_a_communicator_alone_does_not_hang() -> None:
    status, said = run_job(
        2,
        """
        from hpccomm.calls import watchdog
        context.ranks_of_this_node = lambda comm: comm.Split(comm.rank, 0)
        watchdog.FREE_SECONDS = 0.5
        comm = hpccomm.Communicator(MPI.COMM_WORLD.Dup())
        if comm.rank == 1:
            comm.context._group.close()
        MPI.COMM_WORLD.Barrier()
        """,
    )
    assert status == 0, said


@pytest.mark.slow(keep=2)
def test_a_node_without_memory_for_its_table_keeps_no_other_from_starting() -> None:
    status, said = run_job(
        3,
        """
        two_nodes()
        def refuse(*arguments):
            raise hpccomm.TransportError("no memory")
        if MPI.COMM_WORLD.rank < 2:
            context.SharedSegment = refuse
        comm = hpccomm.Communicator(MPI.COMM_WORLD)
        for k in range(70):
            comm.Allreduce(np.full(3, k), total := np.empty(3, int))
            assert total.tolist() == [3 * k] * 3
        """,
    )
    assert status == 0, said
    assert "rank 0: no consistency table" in said


def test_stacks_shows_all_ranks_of_a_running_job(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = "sleep_until_others_wait(comm); print('ready', flush=True); time.sleep(60)"
    program = SETUP + STUCK.replace("sleep_until_asked()", stuck)
    with start(2, ["-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        process.stdout.readline()
        assert main(["stacks", str(process.pid)]) == 0
        said = capsys.readouterr().out
        ranks, size = find_ranks(process.pid)
        assert (sorted(ranks), size) == ([0, 1], 2)
        assert find_ranks(ranks[1]) == (ranks, size)
        stop(process)
    assert re.search(r"rank 0 \(process \d+\): in Allreduce\(sum, float32\)", said), said
    assert re.search(r"rank 1 \(process \d+\): in no call since Allreduce", said), said
    assert "in read_data" in said
    assert said.count("call   Allreduce(sum, float32)") == 10


def test_stacks_refuses_a_process_of_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert main(["stacks", str(process.pid)]) == 2
        process.send_signal(signal.SIGKILL)
    assert "pass that of a rank" in capsys.readouterr().err


@pytest.mark.slow(keep=2)
def test_ranks_of_other_nodes_are_asked_by_their_own_nodes() -> None:
    status, said = run_job(
        4,
        """
        from hpccomm.observe.flight_recorder import INQUIRED, recorder
        two_nodes()
        comm = hpccomm.Communicator(MPI.COMM_WORLD)
        comm.Barrier()
        if comm.rank == 1:
            ring = recorder().ring
            ring.words[INQUIRED] += 1
            until = time.monotonic() + 20
            while ring.report(1) is None and time.monotonic() < until:
                time.sleep(0.05)
            found = ring.report(1)
            print([(each.rank, each.text.split(" since ")[0], bool(each.stacks)) for each in found], flush=True)
            comm.Send(np.zeros(1), 3)
        if comm.rank == 3: comm.Recv(np.zeros(1), 1)
        comm.Barrier()
        """,
    )
    assert status == 0, said
    assert "(3, 'in no call', True)" in said
    assert re.search(r"\(2, 'in Barrier.*', True\)", said), said


# --- one process -----------------------------------------------------------------------------------


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_every_call_is_recorded_whoever_takes_it(comm: Communicator) -> None:
    comm = comm.Dup()  # whose texts no other test has displaced
    comm.Barrier()
    x, y, big = np.ones(6, "f8"), np.empty(6, "f8"), np.empty(6 * comm.size, "f8")
    calls: dict[str, tuple[Any, int]] = {
        "Allreduce": (lambda: comm.Allreduce(x, y), 48),
        "Allgather": (lambda: comm.Allgather(x, big), 48),
        "Alltoall": (lambda: comm.Alltoall(big + 1, big), 48 * comm.size),
        "Bcast": (lambda: comm.Bcast(x), 48),
        "Gather": (lambda: comm.Gather(x, big), 48),
        "Barrier": (comm.Barrier, 0),
        "allreduce": (lambda: comm.allreduce(x), 48),
        "allgather": (lambda: comm.allgather(1), 0),
        "sparse_allgather": (lambda: comm.sparse_allgather(np.zeros(1, "u4"), np.ones(1, "f4"), 9), 4),
    }
    before = comm.context.recorded.counts[0]
    for call, _ in calls.values():
        for _ in range(4):
            call()
    number = comm.context.recorded.number
    found = [each for each in recorder().ring.events() if each.comm == number and each.call > before]
    assert [each.name for each in found] == [name for name in calls for _ in range(4)]
    assert [each.call - before for each in found] == list(range(1, 1 + 4 * len(calls)))
    assert [each.nbytes for each in found] == [nbytes for _, nbytes in calls.values() for _ in range(4)]
    assert all(0 < each.begin <= each.end for each in found)
    assert not [each for each in recorder().ring.running() if each.comm == number]


@pytest.mark.mpi(sizes=(2, 3))
def test_non_blocking_calls_are_recorded_with_their_bytes(comm: Communicator) -> None:
    comm = comm.Dup()
    x, y, big = np.ones(6), np.empty(6), np.empty(6 * comm.size)
    calls: list[tuple[str, Any, int]] = [
        ("Iallreduce", lambda: comm.Iallreduce(x, y).Wait(), 48),
        ("Iallreduce", lambda: comm.Iallreduce(MPI.IN_PLACE, [y, MPI.DOUBLE]).Wait(), 48),
        ("Iallgather", lambda: comm.Iallgather(x, big).Wait(), 48),
        ("Ibcast", lambda: comm.Ibcast(big).Wait(), 48 * comm.size),
        ("Ibarrier", lambda: comm.Ibarrier().Wait(), 0),
        ("allreduce", lambda: hpccomm.allreduce(x, comm=comm, wait=False).wait(), 48),
    ]
    for _, call, _ in calls:
        call()
    issued = -comm.context.recorded.number
    found = [(each.name, each.nbytes) for each in recorder().ring.events() if each.comm == issued]
    assert found == [(name, nbytes) for name, _, nbytes in calls]
    comm.Free()


@pytest.mark.mpi(sizes=(2,))
def test_a_refused_call_is_not_counted(comm: Communicator) -> None:
    comm.Barrier()
    before = comm.context.recorded.counts[0]
    if comm.rank == 0:
        with pytest.raises(ArgumentError):
            comm.Allreduce(np.ones(3), np.ones(4))
        with pytest.raises(ArgumentError):
            comm.Bcast("text")
    comm.Barrier()
    assert comm.context.recorded.counts.tolist() == [before + 1, 0]


@pytest.mark.mpi(sizes=(2, 3))
def test_a_communicator_has_one_number_on_all_ranks(comm: Communicator) -> None:
    made = [comm.context.recorded.number, comm.Dup().context.recorded.number]
    assert len({tuple(each) for each in comm.allgather(made)}) == 1
    assert len(set(made)) == 2


class SlowWords:
    """The words of a ring, of which every reader is interrupted by another thread."""

    def __init__(self, words: Any) -> None:
        self._words = words

    def __getitem__(self, at: int) -> int:
        found = self._words[at]
        time.sleep(1e-4)
        return int(found)

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value


def test_threads_never_get_the_same_number() -> None:
    made, numbers = Recorder(length=128), list[int]()
    made.ring.words = SlowWords(made.ring.words)  # type: ignore[assignment]
    begin = [threading.Thread(target=lambda: numbers.append(made.begin(0, 0, 0, 0, -1)[0])) for _ in range(64)]
    for each in begin:
        each.start()
    for each in begin:
        each.join()
    assert sorted(numbers) == list(range(1, 65))
    made.ring.words = made.ring.words._words  # type: ignore[attr-defined]


def test_a_call_that_later_ones_have_overwritten_ends_without_harm() -> None:
    made = Recorder(length=4)
    comm = Comm(made, 5, "ranks 0-1")
    with Call(comm, "Barrier"):
        for k in range(6):
            with Call(comm, f"part{k}"):
                pass
    assert [(each.text, each.call, bool(each.end)) for each in made.ring.events()] == [
        (f"part{k}", -1, True) for k in range(2, 6)
    ]


def test_old_texts_make_room_for_new_ones() -> None:
    made = Recorder(length=8)
    first = made.intern("first")
    for k in range(2 * TEXTS):
        made.intern(f"text {k}")
    assert made.ring.read_text(first) == "?"
    assert made.ring.read_text(made.intern("first")) == "first"
    for k in range(TEXTS - 1):
        made.intern(f"other {k}")
    number = made.intern("first")
    for k in range(TEXTS // 2):
        made.intern(f"third {k}")
    assert made.ring.read_text(number) == "first", "a text that is used again holds as long as a new one"
    assert made.ring.read_text(made.intern("ä" * 500)).startswith("ä" * 40)


@pytest.mark.mpi(sizes=(2,))
def test_calls_with_many_different_counts_are_of_one_kind(comm: Communicator) -> None:
    """Each text of its own would soon take the place of those that name communicators and other calls."""
    x = np.ones(999)
    made = recorder()._last
    for k in range(1, 40):
        counts = [k, 2 * k]
        comm.Allgatherv(x[: counts[comm.rank]], [np.empty(3 * k), counts])
        comm.Iallgatherv(x[: counts[comm.rank]], [np.empty(3 * k), counts]).Wait()
    assert recorder()._last - made < 20


OWN_RING = """
import os
from hpccomm.observe.flight_recorder import open_ring, recorder
recorder().ring.head["rank"] = 0
with open_ring(os.getpid()) as ring:
    number = ring.request()
    before = ring.answer(number)
    recorder().answer_request()
    print(before, ring.answer(number))
with open_ring(1 << 22) as ring:
    print(ring)
"""


def test_a_process_reads_its_own_ring_by_its_number() -> None:
    done = subprocess.run([sys.executable, "-c", OWN_RING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "[]", "None"]  # the only thread is the one that asks


@pytest.mark.parametrize("value", ["stop", "1"])
def test_an_unknown_action_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpccomm.settings import check_environment

    with pytest.raises(ArgumentError, match="use warn or abort"):
        check_environment({"HPCCOMM_STALL_ACTION": value})


def test_a_call_that_mpi_refuses_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    comm, x = Communicator(MPI.COMM_SELF.Dup()), np.ones(3)
    for _ in range(3):
        comm.Allreduce(x, np.empty(3))

    def refuse(*arguments: Any) -> int:
        if arguments and arguments[0] is comm:  # mpi4py's method, where nothing is compiled
            raise MPI.Exception(MPI.ERR_OTHER)
        return MPI.ERR_OTHER

    function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * MOST_ARGUMENTS)(refuse)
    monkeypatch.setitem(NATIVE_CALLS, "Allreduce", refuse)
    if comm.plans.entry is not None:
        rows = comm.plans.entry._rows
        rows["function"][rows["function"] != 0] = ctypes.cast(function, ctypes.c_void_p).value
    with pytest.raises(MPI.Exception):
        comm.Allreduce(x, np.empty(3))
    if comm.plans.entry is not None:
        comm.plans.entry.clear()
    assert comm.context.recorded.number not in [each.comm for each in recorder().ring.running()]


def test_ranks_that_were_started_apart_give_communicators_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for world in (0, 1, 1023):
        monkeypatch.setattr(context, "WORLD", world)
        monkeypatch.setattr(context, "numbers", iter([1]))
        found.add(context.name_of(MPI.COMM_SELF)[0])
    assert len(found) == 3
    assert max(found) < 1 << 60, "the numbers of levels are from here on"
