"""Round types are read from schedules, measured costs are found for them, and a price is their sum."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpccomm import Communicator, context
from hpccomm.bench import rounds as bench_rounds
from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.commands import predict as predict_command
from hpccomm.commands import tune as tune_command
from hpccomm.errors import LaunchError
from hpccomm.launcher import FAMILIES, Library
from hpccomm.layout import Link
from hpccomm.performance import cost, tuning
from hpccomm.performance.cost import MEASURED, MODEL
from hpccomm.performance.machine import Machine
from hpccomm.performance.measured import CONCURRENT, CostCurve, Point, RoundCosts, RoundType, costs_for_shape, rounds

ALLREDUCE = ALGORITHMS["allreduce"]


def linear_curve(
    kind: RoundType, alpha: float, beta: float, shape: tuple[int, int] = (4, 2), start: float = 0.0
) -> CostCurve:
    """A round type with linear costs; a cold round takes ``start`` longer."""
    lengths = (4, 64, 1024, 1 << 14, 1 << 18, 1 << 22)
    return CostCurve(*shape, kind, tuple(Point(n, start + alpha + n * beta, alpha + n * beta) for n in lengths))


def kinds(name: str, nodes: list[int], nbytes: float) -> list[tuple[Any, ...]]:
    return [(*each.kind[1:], each.bytes) for each in rounds(ALLREDUCE[name], nodes, nbytes)]


# --- rounds ----------------------------------------------------------------------------------------


def test_a_ring_crosses_once_a_node_and_reduces_in_its_first_half() -> None:
    found = kinds("ring", [0, 0, 1, 1, 2, 2], 6 * 400)
    assert found == [(1, 1, 6, False, True, 400.0)] * 5 + [(1, 1, 6, False, False, 400.0)] * 5


def test_a_ring_of_two_is_an_exchange() -> None:
    assert kinds("ring", [0, 1], 80) == [(1, 0, 2, True, True, 40.0), (1, 0, 2, True, False, 40.0)]
    assert kinds("doubling", [0, 1], 80) == [(1, 0, 2, True, True, 80.0)]


def test_doubling_exchanges_inside_the_nodes_first() -> None:
    inside, across = (0, 2, 4, True, True, 400.0), (2, 0, 4, True, True, 400.0)
    assert kinds("doubling", [0, 0, 1, 1], 400) == [inside, across]


@pytest.mark.parametrize("p", [3, 5, 7])
def test_folded_ranks_send_once_and_receive_once(p: int) -> None:
    found, pairs = kinds("doubling", list(range(p)), 400), p - (1 << (p.bit_length() - 1))
    assert found[0] == (1, 0, pairs, False, True, 400.0)
    assert found[-1] == (1, 0, pairs, False, False, 400.0)
    assert {each[2] for each in found[1:-1]} == {1 << (p.bit_length() - 1)}


def test_empty_blocks_need_no_messages() -> None:
    found = kinds("ring", list(range(8)), 8)
    assert [each[2] for each in found] == [2] * 14
    assert {each[-1] for each in found} == {4.0}
    assert kinds("ring", [0], 8) == []


@pytest.mark.parametrize("name", ["ring", "butterfly", "doubling", "direct"])
@pytest.mark.parametrize("p", [2, 3, 4, 7, 8])
def test_rounds_carry_the_bytes_of_the_steps(name: str, p: int) -> None:
    """The oracle computes the bytes of each message rank by rank from the engine's cuts."""
    count, algorithm = 13, ALLREDUCE[name]
    blocks = algorithm.blocks(p)
    sizes = [count // blocks + (k < count % blocks) for k in range(blocks)]
    wanted = []
    for steps in zip(*(algorithm.steps(r, p) for r in range(p)), strict=True):
        sent = [sum(sizes[b % blocks] for b in range(int(s.recv[0]), int(s.recv[1]))) for s in steps if s.source >= 0]
        if any(sent):
            wanted.append((sum(size > 0 for size in sent), 4.0 * max(sent)))
    assert [(each.kind.messages, each.bytes) for each in rounds(algorithm, range(p), 4 * count)] == wanted


# --- prices ----------------------------------------------------------------------------------------


def test_the_price_is_the_sum_over_the_rounds() -> None:
    summed = linear_curve(RoundType("round", 1, 1, 8, False, True), 30.0, 0.01)
    moved = linear_curve(RoundType("round", 1, 1, 8, False, False), 20.0, 0.01)
    known = RoundCosts([summed, moved], 4, 2)
    home, nbytes = np.repeat(np.arange(4), 2), 8 << 18
    found = known.price(ALLREDUCE["ring"], home, nbytes, 0.0)
    assert found == pytest.approx(7 * (30 + 20 + 2 * (1 << 18) * 0.01), rel=1e-9)


def test_the_start_of_a_call_is_paid_once() -> None:
    exchange = linear_curve(RoundType("round", 1, 0, 4, True, True), 30.0, 0.01, (4, 1), start=7.0)
    call = CostCurve(4, 1, RoundType("call"), (Point(0, 3.0, 1.0),))
    copy = linear_curve(RoundType("copy"), 1.0, 1e-4, (4, 1))
    known = RoundCosts([exchange, call, copy], 4, 1)
    found = known.price(ALLREDUCE["doubling"], range(4), 1024, 1024)
    assert found == pytest.approx(7 + 3 + 1 + 1024e-4 + 2 * (30 + 10.24), rel=1e-9)


def test_the_first_round_that_leaves_a_node_is_cold() -> None:
    inside = linear_curve(RoundType("round", 0, 2, 8, True, True), 3.0, 0.0, start=100.0)
    across = linear_curve(RoundType("round", 2, 0, 8, True, True), 30.0, 0.0, start=-10.0)
    found = RoundCosts([inside, across], 4, 2).price(ALLREDUCE["doubling"], np.repeat(np.arange(4), 2), 1024, 0)
    assert found == pytest.approx(3 + 30 - 10 + 30, rel=1e-9)


def test_an_unmeasured_round_type_costs_as_the_most_similar_one() -> None:
    crossing = linear_curve(RoundType("round", 2, 0, 8, True, True), 30.0, 0.01)
    inside = linear_curve(RoundType("round", 0, 2, 8, True, True), 3.0, 0.001)
    moved = linear_curve(RoundType("round", 2, 0, 8, True, False), 20.0, 0.01)
    known = RoundCosts([crossing, inside, moved], 4, 2)
    assert known.find_curve(RoundType("round", 4, 0, 16, True, True)) is crossing
    assert known.find_curve(RoundType("round", 0, 4, 16, False, True)) is inside
    assert known.find_curve(RoundType("round", 1, 1, 8, False, False)) is moved
    assert known.find_curve(RoundType(CONCURRENT, 2, 0, 8, True, True)) is None
    assert known.price(ALLREDUCE["ring"], range(8), 1e6, 0.0) is not None
    assert RoundCosts([], 4, 2).price(ALLREDUCE["ring"], range(8), 1e6, 0.0) is None


# --- two levels ------------------------------------------------------------------------------------


def levels(nodes: int, channels: int, **times: float) -> RoundCosts:
    shape = nodes, channels
    made = [linear_curve(RoundType(what), times.get(what, 1e-6), 0.0, shape) for what in ("scatter", "gather")]
    for reduce in (False, True):
        pair, ring = nodes == 2, nodes * channels
        made.append(
            linear_curve(RoundType(CONCURRENT, channels, 0, ring, pair, reduce), times["alpha"], times["beta"], shape)
        )
        short = Point(2048, times["alpha"] + times.get("meeting", 0.0), times["alpha"])
        made.append(CostCurve(*shape, RoundType("short", 1, 0, nodes, True, reduce), (short,)))
    return RoundCosts(made, nodes, channels)


def price(known: RoundCosts, nodes: int, channels: int, nbytes: int) -> float | None:
    home = np.repeat(np.arange(nodes), channels)
    return known.price_form(hierarchical.select_form("allreduce", home, nbytes, Link(25, 1e-3)), home, nbytes)


def test_a_short_vector_is_reduced_inside_and_exchanged_by_the_leaders() -> None:
    known = levels(8, 2, meeting=11.0, alpha=30.0, beta=0.01)
    assert price(known, 8, 2, 64) == pytest.approx(11 + 3 * 30, rel=1e-6)


def test_one_segment_is_reduced_exchanged_and_gathered() -> None:
    known = levels(2, 2, scatter=100.0, gather=50.0, alpha=30.0, beta=0.01)
    # on logarithmic scales a line between points is not straight: the error is 2e-5 here
    assert price(known, 2, 2, 1 << 19) == pytest.approx(100 + 30 + (1 << 18) * 0.01 + 50, rel=1e-4)


def test_segments_overlap_so_that_the_link_determines_the_time() -> None:
    """16 segments between 4 nodes: the time of the link, and work inside for the first and the last segment."""
    known = levels(4, 1, scatter=10.0, gather=10.0, alpha=1e-3, beta=0.01)
    wire = 2 * 3 / 4 * (1 << 24) * 0.01
    found = price(known, 4, 1, 1 << 24)
    assert found is not None
    assert wire <= found <= 1.05 * wire


def test_the_hierarchical_allreduce_has_no_price_without_measurements() -> None:
    assert price(RoundCosts([], 4, 2), 4, 2, 64) is None
    assert price(RoundCosts([], 4, 2), 4, 2, 1 << 20) is None


# --- predictions -----------------------------------------------------------------------------------


def machine(shape: tuple[int, int] = (4, 2)) -> Machine:
    ring = [linear_curve(RoundType("round", 1, 1, 8, False, reduce), 30.0, 0.01, shape) for reduce in (False, True)]
    return Machine(curves=tuple(ring))


def test_measured_rounds_are_used_near_their_shape_and_without_segments_only() -> None:
    def source(name: str, nodes: int, per_node: int, known: Machine) -> str:
        return cost.prediction(name, "allreduce", nodes, per_node, 1e5, known).source

    assert source("ring", 4, 2, machine()) == MEASURED
    assert source("ring", 16, 2, machine()) == MEASURED
    assert source("ring", 17, 2, machine()) == MODEL
    assert source("ring", 1, 2, machine()) == MODEL
    assert source("double_tree", 4, 2, machine()) == MODEL
    assert source("hierarchical", 4, 2, machine()) == MODEL
    assert source("ring", 4, 2, Machine()) == MODEL
    assert costs_for_shape((), (4, 2)) is None


def test_segmented_algorithms_are_priced_by_the_model() -> None:
    with_curves = cost.prediction("double_tree", "allreduce", 4, 2, 1e5, machine())
    assert with_curves == cost.prediction("double_tree", "allreduce", 4, 2, 1e5, Machine())


def test_written_round_costs_are_read_back_unchanged(tmp_path: Path) -> None:
    tuning.write(tuning.Table(machine=machine()), tmp_path / "t.json")
    assert tuning.read(tmp_path / "t.json").machine == machine()
    data = json.loads((tmp_path / "t.json").read_text())
    assert [curve["kind"]["what"] for curve in data["machine"]["curves"]] == ["round", "round"]
    del data["machine"]["curves"]
    (tmp_path / "t.json").write_text(json.dumps(data))
    assert tuning.read(tmp_path / "t.json").machine == Machine()


@pytest.mark.parametrize("points", [[], [[4, 0, 1]], [[4, 1, -1]]])
def test_round_costs_without_times_are_refused(points: list[list[float]], tmp_path: Path) -> None:
    tuning.write(tuning.Table(machine=machine()), tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text())
    data["machine"]["curves"][0]["points"] = points
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no points, or one that takes no time"):
        tuning.read(tmp_path / "t.json")


@pytest.mark.parametrize(("words", "source"), [((), MEASURED), (("--rate", "1gbit"), MODEL)])
def test_predict_names_the_source_of_each_price(
    words: tuple[str, ...], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tuning.write(tuning.Table(machine=machine()), tmp_path / "t.json")
    monkeypatch.setenv("HPCCOMM_TUNING", str(tmp_path / "t.json"))
    parser = argparse.ArgumentParser()
    predict_command.add_arguments(parser)
    predict_command.run(parser.parse_args(["allreduce", "--nodes", "4", "--per-node", "2", *words]))
    out = capsys.readouterr().out.splitlines()
    ends = {line.split()[0]: line for line in out if not line.startswith("#")}
    assert ends["ring"].endswith(source)
    assert ends["chain"].endswith(MODEL)
    assert any("rounds measured on 4 x 2 ranks" in line for line in out) == (source == MEASURED)


def test_predict_uses_the_table_of_the_installed_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"Open MPI": "Open MPI v5.0.11, package: Open MPI", "MPICH": "MPICH Version:      5.0.2"}
    names = {"Open MPI": "Open MPI 5.0.11", "MPICH": "MPICH 5.0.2"}
    for family in FAMILIES:
        if family.library in texts:
            found = Library(family, texts[family.library], "")
            monkeypatch.setattr(predict_command, "library", lambda found=found: found)
            assert predict_command.this_mpi() == names[family.library]

    def none() -> Library:
        raise LaunchError("no MPI")

    monkeypatch.setattr(predict_command, "library", none)
    assert predict_command.this_mpi() == ""


# --- hpccomm tune ----------------------------------------------------------------------------------

SITE = tune_command.Site(4, 2, "Open MPI 5.0.11", "n0", "2026-01-02")


def row(algorithm: str, nbytes: int, us: float) -> tuning.Row:
    return tuning.Row("allreduce", algorithm, *SITE[:2], nbytes, us, mpi=SITE.mpi)


def test_tuning_prints_predictions_with_measurements_and_keeps_round_costs_of_other_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = cost.prediction("ring", "allreduce", 4, 2, 1 << 20, machine()).us
    measured = [row("native", 1 << 20, 1.0), row("ring", 1 << 20, expected), row("ring", 1 << 22, expected)]
    tune_command.finish(measured, SITE, tmp_path / "t.json", machine().curves)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "# 1 of 2 predictions are within 15% of the measurement"
    assert "1.00  measured rounds" in lines[-3]
    other = tuple(each._replace(nodes=2) for each in machine().curves)
    tune_command.finish(measured, SITE._replace(nodes=2), tmp_path / "t.json", other)
    kept = tuning.read(tmp_path / "t.json").machine
    assert kept is not None
    assert kept.curves == (*machine().curves, *other)
    tune_command.finish(measured, SITE._replace(nodes=2), tmp_path / "t.json", other)
    again = tuning.read(tmp_path / "t.json").machine
    assert again is not None
    assert again.curves == kept.curves


def test_single_rounds_of_the_algorithms_are_measured() -> None:
    nodes = np.repeat(np.arange(4), 2)
    tasks = list(bench_rounds.cost_tasks(nodes, ["native", "ring", "doubling", "hierarchical", "chain"], 1 << 20, True))
    found = {task.kind for task in tasks}
    assert RoundType("round", 1, 1, 8, False, True) in found
    assert RoundType("round", 2, 0, 8, True, True) in found
    assert RoundType(CONCURRENT, 2, 0, 8, False, True) in found
    assert RoundType("short", 1, 0, 4, True, True) in found
    assert max(max(task.lengths) for task in tasks if task.kind.what == "round") == 1 << 20
    assert {task.kind.what for task in bench_rounds.cost_tasks(nodes, ["ring"], 1 << 20, True)} == {
        "call", "copy", "round",
    }  # fmt: skip


def test_rounds_are_measured_with_successive_peers() -> None:
    nodes = np.repeat(np.arange(4), 2)
    tasks = list(bench_rounds.cost_tasks(nodes, ["doubling"], 1 << 20, True))
    [across] = [task for task in tasks if task.kind.crossing]
    assert [each.to.tolist() for each in across.turns] == [[2, 3, 0, 1, 6, 7, 4, 5], [4, 5, 6, 7, 0, 1, 2, 3]]
    tasks = list(bench_rounds.cost_tasks(np.arange(3), ["ring"], 8, True))
    ends = [task for task in tasks if task.kind.messages == 2 and task.kind.reduce]
    assert [each.to.tolist() for task in ends for each in task.turns] == [[-1, 2, 0], [1, -1, 0]]


def test_every_round_type_of_a_price_is_measured() -> None:
    nodes, names = np.repeat(np.arange(4), 2), ["ring", "doubling", "butterfly", "hierarchical"]
    tasks = bench_rounds.cost_tasks(nodes, names, 1 << 24, True)
    known = {task.kind: CostCurve(4, 2, task.kind, tuple(Point(n, 9.0, 9.0) for n in task.lengths)) for task in tasks}
    measured = Machine(curves=tuple(known.values()))
    for name in names:
        for nbytes in (8, 64, 1 << 12, 1 << 15, 1 << 24):
            assert cost.prediction(name, "allreduce", 4, 2, nbytes, measured).source == MEASURED
            if name != "hierarchical":
                assert {each.kind for each in rounds(ALLREDUCE[name], nodes, nbytes)} <= known.keys()


def test_lengths_end_at_the_first_one_that_is_long_enough() -> None:
    assert bench_rounds.lengths_up_to((4, 64, 1024), 100) == (4, 64, 1024)
    assert bench_rounds.lengths_up_to((4, 64, 1024), 64) == (4, 64)
    assert bench_rounds.lengths_up_to((4, 64, 1024), 5000) == (4, 64, 1024)


def test_between_nodes_short_vectors_take_doubling_and_long_ones_a_ring() -> None:
    link = Link(25.0, 8.4e-3)
    assert hierarchical.select_inter_node(8, 64, 2, link) is ALLREDUCE["doubling"]
    assert hierarchical.select_inter_node(8, 1 << 20, 2, link) is ALLREDUCE["ring"]
    assert hierarchical.select_inter_node(2, 1 << 24, 1, link) is ALLREDUCE["doubling"]
    assert [hierarchical.segment_count(n) for n in (1, 1 << 20, (1 << 20) + 1, 1 << 30)] == [1, 1, 2, 16]


# --- measuring -------------------------------------------------------------------------------------


@pytest.mark.mpi(sizes=(2, 4))
def test_rounds_are_measured_and_leave_the_communicator_as_it_was(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On simulated nodes."""
    for name, value in {"SECONDS": 1e-4, "REPETITIONS": 2, "MOST": 2}.items():
        monkeypatch.setattr(bench_rounds, name, value)
    here = 2 * comm.rank // comm.size
    monkeypatch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(here, channel.rank))
    nodes, names = Communicator(comm.Dup()), ("ring", "butterfly", "hierarchical")
    found = bench_rounds.measure_round_costs(nodes, names, 1 << 17)
    assert len(set(comm.allgather(found))) == 1
    shared = nodes.context.schedules.memory is not None
    tasks = list(bench_rounds.cost_tasks(nodes.layout.nodes, names, 1 << 17, shared))
    assert [(each.kind, tuple(point.bytes for point in each.points)) for each in found] == [
        (task.kind, task.lengths) for task in tasks
    ]
    assert {(each.nodes, each.per_node) for each in found} == {(2, comm.size // 2)}
    assert min(min(point.cold, point.warm) for each in found for point in each.points) > 0
    for name in names:
        assert cost.prediction(name, "allreduce", 2, comm.size // 2, 1e5, Machine(curves=found)).source == MEASURED
    total = np.empty(1000, "f4")
    nodes.Allreduce(np.full(1000, comm.rank + 1, "f4"), total, algorithm="hierarchical")
    assert (total == comm.size * (comm.size + 1) / 2).all()
    nodes.Free()


@pytest.mark.mpi(sizes=(2,))
def test_no_rounds_are_measured_on_one_node(comm: Communicator) -> None:
    assert comm.layout.count == 1
    assert bench_rounds.measure_round_costs(comm, ("ring",), 1 << 10) == ()
