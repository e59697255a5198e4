"""A trace shows the calls of all ranks on one clock, and who waited for whom; without it nothing is recorded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from hpccomm import Communicator
from hpccomm.__main__ import main
from hpccomm.cluster.nodes import Cluster, unavailable_reason
from hpccomm.errors import ArgumentError
from hpccomm.launcher import trace_into
from hpccomm.observe import report
from hpccomm.observe.flight_recorder import Event, Recorder, count_bytes
from hpccomm.observe.timeline import build, by_call, last_ranks, list_meetings
from hpccomm.performance.units import format_ranges
from hpccomm.testing.jobs import run_under_mpi

LATE = """
import time, numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm.observe.timeline import part

comm = hpccomm.Communicator(MPI.COMM_WORLD)
x = np.ones(100)
comm.Barrier()
for _ in range(5):
    with part("compute"):
        time.sleep(0.05 if comm.rank == 1 else 0)
    comm.Allreduce(MPI.IN_PLACE, x)
comm.Split(comm.rank % 2).Barrier()
comm.bcast({"a": 1})
"""


def run_traced(ranks: int, path: Path, *program: str) -> subprocess.CompletedProcess[str]:
    return run_under_mpi(ranks, *program, environ=os.environ | {"HPCCOMM_TIMELINE": str(path)}, timeout=120)


def check_format(trace: dict[str, Any]) -> None:
    """What Chrome's trace format demands of each event that is used."""
    assert isinstance(trace["traceEvents"], list)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for each in trace["traceEvents"]:
        assert isinstance(each["name"], str)
        assert isinstance(each["pid"], int)
        assert isinstance(each["tid"], int)
        if each["ph"] == "M":
            assert each["name"] in ("process_name", "thread_name")
            assert isinstance(each["args"]["name"], str)
        else:
            assert each["ph"] == "X"
            assert each["ts"] >= 0
            assert each["dur"] >= 0
            assert isinstance(each["cat"], str)
            assert isinstance(each["args"], dict)


def slices_of(trace: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    return [each for each in trace["traceEvents"] if each["ph"] == "X" and each["tid"] == rank]


def end_of(each: dict[str, Any]) -> float:
    return float(each["ts"] + each["dur"])


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    done = run_traced(3, path, "-c", LATE)
    assert done.returncode == 0, done.stderr
    return path, json.loads(path.read_text())


def test_one_file_holds_all_ranks_in_chromes_format(traced: tuple[Path, dict[str, Any]]) -> None:
    path, trace = traced
    check_format(trace)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    for rank in range(3):
        names = [
            each["name"] for each in slices_of(trace, rank) if each["cat"] == "collective" and "call" in each["args"]
        ]
        assert names == ["Barrier", *["Allreduce"] * 5, "Barrier", "bcast"]
        assert [each["name"] for each in slices_of(trace, rank) if each["cat"] == "part"] == ["compute"] * 5


def test_the_wait_for_a_slow_rank_is_shown_on_the_others(traced: tuple[Path, dict[str, Any]]) -> None:
    trace = traced[1]
    for rank in (0, 2):
        waits = [each for each in slices_of(trace, rank) if each["name"] == "wait for rank 1"]
        assert len(waits) >= 5
        assert sum(each["dur"] for each in waits) > 5 * 25_000  # half of the time that rank 1 sleeps
    blamed = sum(each["dur"] for each in slices_of(trace, 1) if each["cat"] == "wait")
    assert blamed < sum(each["dur"] for each in slices_of(trace, 0) if each["cat"] == "wait")


def test_calls_of_sub_communicators_are_told_apart(traced: tuple[Path, dict[str, Any]]) -> None:
    labels = [{each["args"].get("communicator") for each in slices_of(traced[1], rank)} - {None} for rank in range(3)]
    assert labels == [{"ranks 0-2", "ranks 0,2"}, {"ranks 0-2", "ranks 1"}, {"ranks 0-2", "ranks 0,2"}]


def test_a_call_carries_its_bytes(traced: tuple[Path, dict[str, Any]]) -> None:
    found = {each["args"]["bytes"] for each in slices_of(traced[1], 0) if each["name"] == "Allreduce"}
    assert found == {800}


SLOWED = 3
SLOWED_TRAINING = f"""
import os, pathlib, sys, time
from hpccomm.__main__ import main
from hpccomm.observe.flight_recorder import open_ring
from hpccomm.observe.timeline import part
from hpccomm.train import networks
from mpi4py import MPI

rank, learn, steps, folder = MPI.COMM_WORLD.rank, networks.Perceptron.learn, [], pathlib.Path(sys.argv.pop(1))

def waits(other):
    file = folder / f"{{other}}-{{len(steps)}}"
    pid = file.read_text() if file.exists() else ""
    with open_ring(int(pid or 0)) as ring:
        return ring is not None and bool(ring.running())

def slowed(*args):
    loss = learn(*args)
    steps.append(loss)
    (folder / f"{{rank}}-{{len(steps)}}").write_text(str(os.getpid()))
    if rank == {SLOWED}:
        while not all(map(waits, range({SLOWED}))):
            time.sleep(0.001)
        with part("slowed"):
            time.sleep(0.05)
    return loss

networks.Perceptron.learn = slowed
sys.exit(main(sys.argv[1:]))
"""
"""``hpccomm train`` in which one rank finishes each gradient when all others are in the exchange."""


@pytest.mark.slow
@pytest.mark.skipif(bool(unavailable_reason()), reason=unavailable_reason() or "namespaces are available")
def test_a_trace_of_training_on_two_nodes_shows_the_wait_for_a_slowed_rank(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path, words = tmp_path / "trace.json", "train digits --method dgc --epochs 1 --samples 640"
    with Cluster(2, "", f"t{os.getpid() % 10**6}") as cluster:
        environ = {"HPCCOMM_TIMELINE": str(path)}
        program = ["-c", SLOWED_TRAINING, str(tmp_path), *words.split()]
        done = cluster.run(program, 2, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 0, done.stderr
    trace = json.loads(path.read_text())
    check_format(trace)
    assert {each["args"]["name"] for each in trace["traceEvents"] if each["name"] == "process_name"} == {
        "node n0",
        "node n1",
    }
    slowed = [each for each in slices_of(trace, SLOWED) if each["name"] == "slowed"]
    assert len(slowed) >= 5
    for rank in range(SLOWED):
        blamed: dict[str, float] = {}
        for each in slices_of(trace, rank):
            if each["cat"] == "wait":
                inside = sum(max(0.0, min(map(end_of, (each, it))) - max(each["ts"], it["ts"])) for it in slowed)
                blamed[each["name"]] = blamed.get(each["name"], 0.0) + inside
        assert max(blamed, key=blamed.__getitem__) == f"wait for rank {SLOWED}", blamed


def test_without_the_variable_nothing_is_kept_for_a_trace() -> None:
    code = (
        "from hpccomm import Communicator; from hpccomm.observe import flight_recorder, timeline\n"
        "with timeline.part('x'): pass\n"
        "print(hasattr(Communicator.Allreduce, '__wrapped__'), flight_recorder.recorder().ring.events())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "[]"]


def test_a_program_that_ends_with_an_error_keeps_its_error(tmp_path: Path) -> None:
    code = LATE + "\nif comm.rank == 1: raise ValueError('my own mistake')\ncomm.Barrier()"
    done = run_traced(2, tmp_path / "trace.json", "-c", code)
    assert done.returncode != 0
    assert "my own mistake" in done.stderr


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_ends_long_after_the_others_does_not_hang(tmp_path: Path, late: int) -> None:
    program = f"""
from pathlib import Path
from hpccomm.observe import timeline
timeline.AGREEMENT_SECONDS = 0.5
while comm.rank == {late} and len(list(Path({str(tmp_path)!r}).glob("t.json.rank*"))) < 2:
    time.sleep(0.01)
"""
    done = run_traced(3, tmp_path / "t.json", "-c", LATE + program)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"t.json.rank{rank}" for rank in range(3)]


def test_a_file_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    assert trace_into(None) == {}
    assert trace_into(tmp_path / "x.json") == {"HPCCOMM_TIMELINE": str(tmp_path / "x.json")}
    for path in (tmp_path / "no" / "x.json", tmp_path):
        with pytest.raises(ArgumentError, match="name a file in a folder that exists"):
            trace_into(path)


def test_a_file_in_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **named: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ArgumentError, match="Permission denied: name a file in a folder that exists"):
        trace_into(tmp_path / "x.json")


# --- without MPI -----------------------------------------------------------------------------------


def event(name: str, begin: int, end: int, call: int = 1) -> Event:
    return Event(f"{name}(sum, float32)", begin, end, 8, "ranks 0-1", 7, call)


def find_last(events: list[list[Event]]) -> dict[tuple[int, int], Any]:
    """By call the rank that began it last, and when."""
    return dict(by_call(last_ranks([list_meetings(one, rank) for rank, one in enumerate(events)])))


def test_clocks_are_aligned_before_ranks_are_compared() -> None:
    """Rank 1's clock is 1000 ns ahead: it began first, although its own number is larger."""
    events = [[event("Allreduce", 500, 900)], [event("Allreduce", 1100, 1900)]]
    trace = build(events, [0, -1000], ["a", "b"], [0, 1])
    check_format(trace)
    waits = [each for each in trace["traceEvents"] if each.get("cat") == "wait"]
    assert [(each["tid"], each["name"], each["dur"]) for each in waits] == [(1, "wait for rank 0", 0.4)]
    calls = [each["ts"] for each in trace["traceEvents"] if each.get("cat") == "collective"]
    assert calls == [0.4, 0.0]
    assert {each["pid"] for each in trace["traceEvents"]} == {0, 1}


def test_calls_that_do_not_meet_have_no_waiting() -> None:
    events = [[event("Bcast", 0, 9)], [event("Bcast", 50, 60)]]
    assert not [each for each in build(events, [0, 0], ["a", "a"], [0, 1])["traceEvents"] if each.get("cat") == "wait"]
    assert find_last(events) == {}


def test_inner_calls_are_not_matched() -> None:
    events = [[event("Allreduce", 5, 9, -1), event("Allreduce", 0, 10)], [event("Allreduce", 2, 10)]]
    assert find_last(events) == {(7, 1): (1, 2)}
    assert find_last([events[1], events[1]]) == {(7, 1): (0, 2)}  # at the same time: the lowest


def test_an_empty_trace_is_a_trace() -> None:
    check_format(build([[], []], [0, 5], ["a", "a"], [0, 1]))


@pytest.mark.parametrize(
    ("ranks", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 4], "0,2,4"), ([5, 6, 1], "5-6,1"), ([], "")]
)
def test_ranks_are_named_in_short(ranks: list[int], text: str) -> None:
    assert format_ranges(ranks) == text


def test_bytes_are_those_of_the_first_array() -> None:
    import numpy as np

    x = np.zeros(3, "f4")
    assert count_bytes([x, np.zeros(9)]) == 12
    assert count_bytes([-1, x]) == 12
    assert count_bytes([[x, 2, None]]) == 12
    assert count_bytes([(x, None)]) == 12
    assert count_bytes([None, [], {}]) == 0
    assert count_bytes([]) == 0


class Claim:
    """An object that claims to have so many bytes, or raises, as a sparse tensor does."""

    def __init__(self, claimed: Any) -> None:
        self._claimed = claimed

    @property
    def nbytes(self) -> Any:
        if self._claimed is None:
            raise RuntimeError("nbytes is not defined for sparse tensors")
        return self._claimed


@pytest.mark.parametrize("claimed", [None, 1 << 70, "many"])
def test_an_object_without_a_number_of_bytes_travels(claimed: Any) -> None:
    comm = Communicator(MPI.COMM_SELF)
    sent = Claim(claimed)
    assert comm.bcast(sent)._claimed == comm.allgather(sent)[0]._claimed == claimed


def test_only_the_last_calls_are_kept() -> None:
    recorder = Recorder(length=4)
    for k in range(10):
        with recorder.part(f"part {k}"):
            pass
    assert [each.name for each in recorder.ring.events()] == [f"part {k}" for k in range(6, 10)]


# --- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags are closed, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_page_that_says_who_was_waited_for(
    traced: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(traced[0]), "--out", str(out)]) == 0
    text = out.read_text()
    page = Page()
    page.feed(text)
    assert not page.open
    assert not page.links
    assert "http" not in text
    assert "Rank 1 was waited for the longest" in text
    assert "<td>Allreduce</td><td>15</td>" in text
    assert "3 ranks" in text


def test_names_in_a_trace_cannot_break_the_page() -> None:
    each = report.Slice(0, "<script>x</script>", "collective", 0.0, 1.0, 0, -1)
    page = Page()
    page.feed(report.render([each], "<b>title"))
    assert not page.open
    assert "<script>" not in report.render([each], "<b>title")


@pytest.mark.parametrize("slices", [[], [report.Slice(0, "part", "part", 0.0, 0.0, 0, -1)]])
def test_a_trace_without_calls_has_a_page(slices: list[report.Slice]) -> None:
    assert "No rank waited" in report.render(slices, "empty")


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": 3}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ArgumentError, match="no trace: write one with hpccomm-run --timeline"):
            report.read(str(tmp_path / "x.json"))


def test_sizes_are_grouped_and_zero_is_its_own_group() -> None:
    sizes = (0, 1, 4, 15, 16)
    calls = [report.Slice(0, "Allreduce", "collective", float(k), 0.5, n, -1) for k, n in enumerate(sizes)]
    text = report.size_table(calls)
    assert [
        text.count(f"<td>{each}</td>")
        for each in ("not known: objects, or no data", "from 1 B", "from 4 B", "from 16 B")
    ] == [1] * 4
