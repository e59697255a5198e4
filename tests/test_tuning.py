"""Measurements select the algorithm, native MPI without them; tables are read, written, merged and fitted."""

from __future__ import annotations

import argparse
import json
import pickle
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.commands import predict as predict_command
from hpccomm.commands import tune as tune_command
from hpccomm.errors import ArgumentError
from hpccomm.layout import Link, fast_networks
from hpccomm.performance import cost, tuning, units
from hpccomm.performance.machine import Machine
from hpccomm.performance.tuning import (
    DEFAULT_TABLE,
    Choice,
    Row,
    Table,
    fit,
    interpolate,
    load,
    read,
    size_class,
    user_file,
    write,
)

MPI = "Open MPI 5.0.11"


def rows(algorithm: str, times: dict[int, float], nodes: int = 1, per_node: int = 4, **more: Any) -> list[Row]:
    return [
        Row(
            "allreduce",
            algorithm,
            nodes,
            per_node,
            nbytes,
            us,
            **{"mpi": MPI, "host": "n017", "when": "2026-01-02"} | more,
        )
        for nbytes, us in times.items()
    ]


NATIVE = rows("native", {8: 1.0, 1024: 4.0, 1 << 20: 500.0})
SHARED = rows("shared", {8: 3.0, 1024: 3.0, 1 << 20: 100.0})
TABLE = Table((*NATIVE, *SHARED))


def choose(table: Table, nbytes: int, nodes: int = 1, per_node: int = 4, **more: Any) -> Choice:
    return table.choose("allreduce", nodes, per_node, nbytes, **more)


# --- choices ---------------------------------------------------------------------------------------


def test_the_fastest_measured_algorithm_is_chosen_at_each_size() -> None:
    assert [choose(TABLE, n).algorithm for n in (8, 1024, 1 << 20)] == ["native", "shared", "shared"]


def test_between_sizes_times_are_interpolated_on_logarithmic_scales() -> None:
    points = [(10, 1.0), (1000, 100.0)]
    assert interpolate(points, 100) == pytest.approx(10.0)
    assert interpolate(points, 10) == 1.0
    assert interpolate(points, 1) == 1.0
    assert interpolate(points, 2000) == pytest.approx(200.0)
    assert interpolate(points, 0) == 1.0
    assert interpolate([(0, 1.0), (8, 2.0)], 8) == pytest.approx(2.0)


def test_the_choice_changes_where_the_interpolated_times_cross() -> None:
    """Native rises from 1 to 4, its checks add 1, shared stays at 3: they cross near the mean size."""
    assert choose(TABLE, 80).algorithm == "native"
    assert choose(TABLE, 130).algorithm == "shared"


def test_native_is_chosen_when_others_are_faster_within_the_noise() -> None:
    table = Table((*rows("native", {8: 100.0}), *rows("ring", {8: 96.0})))
    assert choose(table, 8).algorithm == "native"
    assert choose(Table((*rows("native", {8: 100.0}), *rows("ring", {8: 90.0}))), 8).algorithm == "ring"


def test_rows_of_native_lack_the_checks_on_one_node_and_include_them_on_several() -> None:
    for nodes, chosen in ((1, "ring"), (2, "native")):
        table = Table((*rows("native", {8: 10.0}, nodes), *rows("ring", {8: 10.2}, nodes)))
        assert table.choose("allreduce", nodes, 4, 8).algorithm == chosen


def test_on_one_node_without_rows_native_is_chosen_whatever_the_price() -> None:
    for nbytes in (8, 1 << 30):
        found = choose(Table(machine=Machine()), nbytes)
        assert found.algorithm == "native"
        assert "nothing was measured" in found.reason


def test_rows_without_native_beside_them_are_ignored() -> None:
    assert choose(Table(tuple(SHARED)), 1 << 20).algorithm == "native"


def test_only_candidates_are_chosen() -> None:
    assert choose(TABLE, 1 << 20, candidates=("native", "ring")).algorithm == "native"
    assert choose(TABLE, 1 << 20, candidates=("native", "shared")).algorithm == "shared"


def test_the_nearest_shape_decides_up_to_a_factor_of_four() -> None:
    near = rows("native", {8: 1.0}, per_node=2) + rows("ring", {8: 0.5}, per_node=2)
    far = rows("native", {8: 1.0}, per_node=16) + rows("shared", {8: 0.5}, per_node=16)
    table = Table((*near, *far))
    assert [choose(table, 8, per_node=k).algorithm for k in (2, 3, 16)] == ["ring"] * 2 + ["shared"]


def test_above_every_measured_number_of_local_ranks_native_is_chosen_until_a_first_use() -> None:
    found = choose(TABLE, 1 << 20, per_node=5)
    assert (found.algorithm, found.candidate) == ("native", "shared")
    assert "not measured with 5 ranks on a node" in found.reason
    assert choose(TABLE, 8, per_node=5).candidate == ""  # native is faster where it was measured, too
    assert choose(TABLE, 1 << 20, per_node=17).candidate == ""


def test_rows_of_another_processor_count_once_a_first_use_has_compared() -> None:
    table = replace(TABLE, rows=tuple(row._replace(cpu="A") for row in TABLE.rows))
    assert choose(table, 1 << 20).algorithm == "shared"
    assert choose(replace(table, cpu="A"), 1 << 20).algorithm == "shared"
    other = replace(table, cpu="B")
    found = choose(other, 1 << 20)
    assert (found.algorithm, found.candidate) == ("native", "shared")
    assert "measured on A only" in found.reason
    for us, chosen in ((50.0, "shared"), (98.0, "native"), (200.0, "native")):
        compared = other.add_first_use([first_use("native", 100.0), first_use("shared", us)])
        for nbytes in (1 << 20, (1 << 21) - 1):
            found = choose(compared, nbytes)
            assert (found.algorithm, found.candidate) == (chosen, "")
            assert "measured on here" in found.reason
        for nbytes in (1 << 19, 1 << 21):
            assert choose(compared, nbytes).candidate == "shared"
        assert choose(compared, 1 << 20, per_node=2).candidate == "shared"


def first_use(algorithm: str, us: float, **more: Any) -> Row:
    """What a first use has measured."""
    return Row("allreduce", algorithm, 1, 4, 1 << 20, us, mpi=MPI, host="here", when="today", **more)


@pytest.mark.parametrize("collective", ["allgather", "alltoall", "reduce_scatter"])
def test_blocks_of_one_length_are_one_size_class_for_any_number_of_ranks(collective: str) -> None:
    for p in (2, 3, 5):
        assert {size_class(collective, p, p * block) for block in (64, 65, 127)} == {7}
        assert size_class(collective, p, p * 128) == 8
    assert size_class("allreduce", 3, 64) == 7


def test_a_frozen_table_decides_the_same_anywhere_and_compares_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    table = replace(TABLE, rows=tuple(row._replace(cpu="A") for row in TABLE.rows), cpu="B")
    table = table.add_first_use([first_use("native", 100.0), first_use("shared", 10.0)])
    write(table.freeze(), tmp_path / "frozen.json")
    monkeypatch.setenv("HPCCOMM_TUNING", str(tmp_path / "frozen.json"))
    for cpu in ("", "A", "B", "C"):
        frozen = load(MPI, "anywhere", cpu=cpu)
        assert frozen.frozen
        for nbytes in (8, 1000, 1 << 20, 1 << 21, 1 << 25):
            for ranks in (2, 4, 5):
                found = choose(frozen, nbytes, per_node=ranks)
                assert found.algorithm == choose(table, nbytes, per_node=ranks).algorithm
                assert found.candidate == ""


def test_of_equally_distant_shapes_the_one_with_the_smaller_total_distance_decides() -> None:
    shapes = ((4, 1, "ring"), (4, 2, "hierarchical"), (16, 4, "butterfly"))
    table = Table(
        tuple(
            row
            for nodes, per_node, name in shapes
            for row in (*rows("native", {8: 10.0}, nodes, per_node), *rows(name, {8: 1.0}, nodes, per_node))
        )
    )
    assert table.choose("allreduce", 8, 2, 8).algorithm == "hierarchical"


def test_rows_of_one_node_do_not_decide_for_several() -> None:
    assert choose(TABLE, 1 << 20, nodes=2).algorithm == "native"
    between = Table((*rows("native", {8: 9.0}, 4, 2), *rows("hierarchical", {8: 3.0}, 4, 2)))
    assert choose(between, 8, 2, 2).algorithm == "hierarchical"
    assert choose(between, 8, 1, 2).algorithm == "native"


def test_datatypes_without_rows_use_those_of_f4_but_memories_do_not() -> None:
    half = Table((*TABLE.rows, *rows("native", {8: 9.0}, dtype="f2"), *rows("ring", {8: 1.0}, dtype="f2")))
    assert choose(half, 8, dtype="f8").algorithm == "native"
    assert choose(half, 8, dtype="f2").algorithm == "ring"
    assert choose(half, 1 << 20, memory="cuda").algorithm == "native"


def test_between_nodes_a_much_lower_price_decides() -> None:
    slow_wire = Machine(Link(1, 1e-5), Link(1000, 1e-3), 0)
    table = Table(machine=slow_wire)
    odd = choose(table, 1 << 24, 7, 6)
    prices = {
        name: cost.prediction(name, "allreduce", 7, 6, 1 << 24, slow_wire).us
        for name in ("hierarchical", "ring", "butterfly", "doubling")
    }
    flat = min(us for name, us in prices.items() if name != "hierarchical")
    assert prices["hierarchical"] < tuning.TRUST * flat
    assert odd.algorithm == "hierarchical"
    assert "predict" in odd.reason
    assert choose(table, 1 << 24, 7, 6, candidates=("native", "ring")).algorithm == "native"
    assert choose(Table(), 1 << 24, 7, 6).algorithm == "native"


@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter"])
def test_hierarchical_gathers_are_chosen_on_few_nodes_with_a_shared_link(collective: str) -> None:
    """On two nodes of two ranks a flat ring sends half as much again: 3/4 of the vector, not 1/2."""
    table = Table(machine=Machine(Link(1, 1e-5), Link(50, 8e-3), 0))
    for nbytes in (1 << 14, 1 << 24):
        assert table.choose(collective, 2, 2, nbytes).algorithm == "hierarchical"
    assert table.choose(collective, 64, 2, 1 << 24).algorithm == "native"
    assert table.choose(collective, 4, 1, 1 << 24).algorithm == "native"


def test_one_rank_uses_native() -> None:
    assert choose(TABLE, 1 << 20, 1, 1).algorithm == "native"


def test_the_reason_names_host_date_and_mpi_of_the_measurement() -> None:
    reason = choose(TABLE, 1 << 20).reason
    for word in ("n017", MPI, "2026-01-02", "1 x 4 ranks", "100 us", "501 us"):
        assert word in reason


def test_the_segment_length_is_that_of_the_row() -> None:
    table = Table((*rows("native", {8: 9.0, 1 << 20: 9.0}), *rows("chain", {8: 1.0}, segment_bytes=4096)))
    assert choose(table, 8).segment_bytes == 4096
    assert choose(TABLE, 1 << 20).segment_bytes is None


def test_choosing_is_fast_and_repeatable() -> None:
    calls, limit = 1000, 0.2e-3
    assert choose(TABLE, 5000) == choose(TABLE, 5000)
    began = time.process_time()
    for _ in range(calls):
        choose(TABLE, 5000)
    assert (time.process_time() - began) / calls < limit


def test_explain_lists_the_ranges_of_equal_choices() -> None:
    assert TABLE.explain("allreduce", 1, 4) == [
        "allreduce 4 to 64 bytes: native",
        "allreduce 128 to 1073741824 bytes: shared",
    ]


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HPCCOMM_TUNING", raising=False)


def test_a_written_table_is_read_back_unchanged(tmp_path: Path) -> None:
    table = Table(TABLE.rows, Machine(Link(1, 2), Link(3, 4), 5, "test"))
    write(table, tmp_path / "deep" / "t.json")
    back = read(tmp_path / "deep" / "t.json")
    assert (back.rows, back.machine) == (table.rows, table.machine)
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "t.json"]


def test_rows_that_differ_in_bytes_and_times_only_are_one_line(tmp_path: Path) -> None:
    mixed = [row for pair in zip(NATIVE, SHARED, strict=True) for row in pair]
    write(Table(tuple(mixed)), tmp_path / "t.json")
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert sum(line.startswith('{"collective"') for line in lines) == 2
    assert sorted(read(tmp_path / "t.json").rows) == sorted(mixed)


def test_a_table_can_be_pickled() -> None:
    rows, machine = TABLE.rows, load(MPI, "anywhere").machine
    for table in (TABLE, Table(rows[:2], machine, "a source", "a processor", rows[2:], frozen=True)):
        assert pickle.loads(pickle.dumps(table)) == table


def test_the_package_has_a_default_table() -> None:
    table = load(MPI, "anywhere")
    assert table.source == "the default table of hpccomm"
    assert table.machine is not None
    assert all(row.mpi and row.host and row.when for row in table.rows)


def test_the_table_is_found_by_variable_then_home_then_package(tmp_path: Path, monkeypatch: Any) -> None:
    write(TABLE, user_file(MPI, "n018.cluster"))
    assert load(MPI, "n099").rows[: len(TABLE.rows)] == TABLE.rows
    assert load("MPICH 5.0.2", "n099").source == "the default table of hpccomm"
    assert load(MPI, "login").source == "the default table of hpccomm"
    write(Table(tuple(SHARED)), tmp_path / "mine.json")
    monkeypatch.setenv("HPCCOMM_TUNING", str(tmp_path / "mine.json"))
    assert load(MPI, "n099").rows[: len(SHARED)] == tuple(SHARED)


def test_off_means_native_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_TUNING", "off")
    table = load(MPI, "n017")
    assert {choose(table, 1 << 20, nodes, 8).algorithm for nodes in (1, 7)} == {"native"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema": 1, "rows"', '{"schema": 99, "machine": null, "rows": []}', '{"schema": 1}']
    + [json.dumps({"schema": 1, "machine": None, "rows": [row]}) for row in (
        {"collective": "allreduce"},
        {**NATIVE[0]._asdict(), "us": "fast"},
        {**NATIVE[0]._asdict(), "us": 0},
        {**NATIVE[0]._asdict(), "speed": 1},
        {**NATIVE[0]._asdict(), "nodes": float("nan")},
        {**NATIVE[0]._asdict(), "bytes": 10**400},
        {**NATIVE[0]._asdict(), "bytes": [8, 64], "us": [1.0]},
        {**NATIVE[0]._asdict(), "bytes": [8, 64], "us": 1.0},
        {**NATIVE[0]._asdict(), "bytes": [8, 64], "us": [1.0, float("nan")]},
        {**NATIVE[0]._asdict(), "bytes": [8, 64], "us": [[1.0], 1.0]},
        {**NATIVE[0]._asdict(), "bytes": [], "us": []},
        7,
    )],
)  # fmt: skip
def test_a_broken_file_is_named_in_one_warning_with_a_remedy(content: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    monkeypatch.setenv("HPCCOMM_TUNING", str(path))
    with pytest.warns(
        RuntimeWarning, match=r"broken.json is no tuning table .*hpccomm tune.*HPCCOMM_TUNING=off"
    ) as caught:
        table = load(MPI, "n017")
    assert len(caught) == 1
    assert table.source == "the default table of hpccomm"


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_TUNING", str(tmp_path / "nowhere.json"))
    with pytest.warns(RuntimeWarning, match=r"nowhere.json"):
        load(MPI, "n017")


def test_rows_of_the_same_mpi_are_preferred_and_others_fill_the_gaps() -> None:
    other = [row._replace(mpi="MPICH 5.0.2", us=row.us / 2) for row in NATIVE]
    bcast = [row._replace(mpi="MPICH 5.0.2", collective="bcast") for row in NATIVE]
    assert Table((*NATIVE, *other, *bcast)).select_mpi("Open MPI 4.1").rows == (*NATIVE, *bcast)


def test_unmeasured_collectives_are_filled_from_the_default_table() -> None:
    bcast = tuple(row._replace(collective="bcast") for row in NATIVE)
    other = tuple(row._replace(us=7) for row in NATIVE)
    assert Table(tuple(NATIVE)).fill_from(Table((*other, *bcast), Machine())).rows == (*NATIVE, *bcast)


def test_hosts_of_a_cluster_share_a_file(tmp_path: Path) -> None:
    assert user_file(MPI, "n017.cluster.org") == tmp_path / "config" / "hpccomm" / "n-open-mpi-5.0.11.json"
    assert user_file(MPI, "n017") == user_file(MPI, "n3")
    assert user_file(MPI, "10").name == "10-open-mpi-5.0.11.json"


# --- fitting ---------------------------------------------------------------------------------------

TRUE = Machine(Link(2.5, 3e-4), Link(31.0, 2e-3), 7e-5, "fitted")


def simulate_rows(nodes: int, per_node: int, names: list[tuple[str, str]]) -> list[Row]:
    home = np.repeat(np.arange(nodes), per_node)
    found = []
    for collective, name in names:
        algorithm = hierarchical.build_allreduce(home) if name == "hierarchical" else ALGORITHMS[collective][name]
        for nbytes in (64, 1 << 14, 1 << 22):
            us = cost.price(algorithm, home, nbytes, TRUE).us
            found.append(Row(collective, name, nodes, per_node, nbytes, us))
    return found


FLAT = [("allreduce", "ring"), ("allreduce", "doubling"), ("allgather", "bruck"), ("allgather", "ring")]


def test_fitting_recovers_the_machine_of_exact_measurements() -> None:
    rows = simulate_rows(1, 8, FLAT) + simulate_rows(8, 1, FLAT) + simulate_rows(4, 1, FLAT)
    found = fit(rows)
    assert found.intra == pytest.approx(TRUE.intra, rel=1e-6)
    assert found.inter == pytest.approx(TRUE.inter, rel=1e-6)
    assert found.gamma == pytest.approx(TRUE.gamma, rel=1e-6)


def test_fitting_with_hierarchical_rows_is_near() -> None:
    found = fit(simulate_rows(4, 4, [*FLAT, ("allreduce", "hierarchical")]) + simulate_rows(1, 4, FLAT))
    assert found.inter.beta == pytest.approx(TRUE.inter.beta, rel=0.1)
    assert found.inter.alpha == pytest.approx(TRUE.inter.alpha, rel=0.2)


def test_parameters_that_were_not_measured_keep_their_defaults() -> None:
    found = fit(simulate_rows(1, 8, [("allgather", "ring")]) + rows("native", {8: 1.0}))
    assert found.inter == Machine().inter
    assert found.gamma == Machine().gamma
    assert fit([])[:3] == Machine()[:3]


def test_no_fitted_parameter_is_negative() -> None:
    random = np.random.default_rng(7)
    noisy = [
        row._replace(us=row.us * random.uniform(0.2, 5))
        for row in simulate_rows(1, 8, FLAT) + simulate_rows(4, 2, FLAT)
    ]
    found = fit(noisy)
    assert min(*found.intra, *found.inter, found.gamma) >= 0


# --- predict ---------------------------------------------------------------------------------------


def run_predict(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    predict_command.add_arguments(parser)
    assert predict_command.run(parser.parse_args(words)) == 0
    return capsys.readouterr().out.splitlines()


def test_predict_prints_every_algorithm_the_fastest_first(capsys: pytest.CaptureFixture[str]) -> None:
    out = run_predict(capsys, "allreduce", "--nodes", "8", "--per-node", "2", "--bytes", "16M", "--rate", "1gbit")
    assert "allreduce of 16,000,000 bytes on 8 nodes with 2 ranks each" in out[0]
    assert "0.125 GB/s shared" in out[1]
    names = [line.split()[0] for line in out if not line.startswith("#")][1:]
    assert sorted(names) == sorted([*ALGORITHMS["allreduce"], "hierarchical"])
    order = [each.algorithm for each in cost.predict("allreduce", 8, 2, 16e6, Machine(inter=Link(25, 8e-3)))]
    assert names == order


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4", 4), ("100M", 1e8), ("64Ki", 65536), ("1.5k", 1500), ("2 GiB", 2**31), ("1MB", 1e6)],
)
def test_sizes_are_parsed(text: str, nbytes: float) -> None:
    assert units.size_of(text) == nbytes


@pytest.mark.parametrize(("text", "beta"), [("100gbit", 8e-5), ("12.5GB", 8e-5), ("1gbit/s", 8e-3), ("1Gbps", 1e-3)])
def test_rates_are_parsed(text: str, beta: float) -> None:
    assert units.beta_of(text) == pytest.approx(beta)


@pytest.mark.parametrize("words", [["--bytes", "many"], ["--rate", "fast"], ["--nodes", "0"], ["--rate", "0gbit"]])
def test_wrong_arguments_of_predict_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match=words[1]):
        run_predict(capsys, "allreduce", *words)


# --- tune ------------------------------------------------------------------------------------------

SITE = tune_command.Site(1, 4, MPI, "n017", "2026-01-02")


class OneRank:
    """The part of a communicator that tuning needs."""

    rank = 0

    def bcast(self, value: Any) -> Any:
        return value


def parse_arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    return parser.parse_args(words)


def test_tuning_covers_the_requested_collectives_and_sizes() -> None:
    tasks = tune_command.tasks(parse_arguments("--collective", "allreduce,bcast", "--sizes", "4,1Ki"))
    assert tasks == [("allreduce", 4), ("allreduce", 1024), ("bcast", 4), ("bcast", 1024)]
    assert {task.collective for task in tune_command.tasks(parse_arguments())} == {*ALGORITHMS, "alltoall"}
    assert len(tune_command.tasks(parse_arguments("--quick"))) < len(tune_command.tasks(parse_arguments()))
    with pytest.raises(ArgumentError, match="use one or several of allreduce"):
        tune_command.tasks(parse_arguments("--collective", "allred"))


def test_interrupted_tuning_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, ran = tmp_path / "t.partial", []

    def measure_one(comm: Any, site: Any, task: Any, wanted: Any) -> Any:
        ran.append(task)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return [Row(task.collective, name, *site[:2], task.bytes, 1.0, mpi=MPI) for name in ("native", "ring")]

    monkeypatch.setattr(tune_command, "measure_one", measure_one)
    todo = [tune_command.Task("allreduce", nbytes) for nbytes in (4, 64, 1024, 4096)]
    with pytest.raises(KeyboardInterrupt):
        tune_command.measure_tasks(OneRank(), SITE, todo, partial)
    found = tune_command.measure_tasks(OneRank(), SITE, todo, partial)
    assert [task.bytes for task in ran] == [4, 64, 1024, 1024, 4096]
    assert sorted(row.bytes for row in found) == [4, 4, 64, 64, 1024, 1024, 4096, 4096]
    assert not partial.exists()


def test_partial_results_of_another_shape_are_not_used(tmp_path: Path) -> None:
    write(TABLE, tmp_path / "t.partial")
    assert tune_command.read_partial(SITE, tmp_path / "t.partial") == list(TABLE.rows)
    assert tune_command.read_partial(SITE._replace(per_node=8), tmp_path / "t.partial") == []
    (tmp_path / "t.partial").write_text("{")
    assert tune_command.read_partial(SITE, tmp_path / "t.partial") == []


def test_tuning_replaces_the_rows_that_it_measured_and_keeps_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    other = rows("native", {8: 3.0}, nodes=2)
    write(Table((*NATIVE, *other)), out)
    again = [row._replace(us=row.us * 10, when="2026-02-03") for row in NATIVE]
    tune_command.finish([*again, *SHARED], SITE, out)
    assert read(out).rows == (*other, *again, *SHARED)
    out_lines = capsys.readouterr().out.splitlines()
    assert out_lines[0] == f"# 6 measurements on 1 node with 4 ranks, {MPI}, written to {out}"
    assert out_lines[1:] == ["allreduce 4 to 1073741824 bytes: shared"]


def test_unknown_algorithms_cannot_be_tuned(tmp_path: Path) -> None:
    comm = SimpleNamespace(algorithms=lambda collective: ("auto", "native", "shared", "ring"))
    todo = [tune_command.Task("allreduce", 4)]
    with pytest.raises(ArgumentError, match="--algorithm rign: use one or several of auto, native, ring, shared"):
        tune_command.measure_tasks(comm, SITE, todo, tmp_path / "t.partial", ["ring", "rign"])


def test_the_default_table_chooses_shared_memory_for_every_allreduce_on_one_node() -> None:
    """Registered arrays gain most there, and no other row may be extrapolated to sizes at which it was not measured."""
    default = read(DEFAULT_TABLE)
    for mpi, per_node in {(row.mpi, row.per_node) for row in default.rows if row.nodes == 1}:
        table = default.select_mpi(mpi)
        for nbytes in (4, 1000, 1 << 16, 1 << 20, 1 << 24, 1 << 28, 1 << 31):
            chosen = table.choose(
                "allreduce", 1, per_node, nbytes, candidates=("native", "shared", "ring", "butterfly")
            )
            assert chosen.algorithm == "shared", (mpi, per_node, nbytes, chosen)


def test_rows_of_several_nodes_in_the_default_table_are_used_over_tcp_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HPCCOMM_TUNING", raising=False)
    assert {row.nodes > 1 for row in load(MPI, "anywhere").rows} == {True, False}
    assert {row.nodes > 1 for row in load(MPI, "anywhere", ethernet=False).rows} == {False}


def test_rows_of_one_node_do_not_replace_rows_of_several() -> None:
    default = Table((*rows("native", {8: 3.0}, nodes=2), *rows("native", {8: 9.0})))
    assert Table(tuple(NATIVE)).fill_from(default).rows == (*NATIVE, *rows("native", {8: 3.0}, nodes=2))


def test_networks_other_than_tcp_are_detected(tmp_path: Path) -> None:
    assert fast_networks(tmp_path) == []
    for name in ("infiniband/mlx5_1", "infiniband/mlx5_0", "cxi/cxi0", "net/eth0"):
        (tmp_path / name).mkdir(parents=True)
    assert fast_networks(tmp_path) == ["cxi0", "mlx5_0", "mlx5_1"]
