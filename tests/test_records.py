"""The records of all ranks are checked, and every change that breaks them is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.check import Duty, check_algorithm, check_programs, columns
from hpccomm.collectives.hierarchical import HIERARCHICAL, MANY, MESSAGE_BYTES, channels_of, select_form
from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.records import Program
from hpccomm.collectives.schedule import Algorithm, NodeStep, without_node_steps
from hpccomm.collectives.verify import (
    BLOCK_IS_RANK,
    REDUCING_COLLECTIVES,
    ROOTED_COLLECTIVES,
    layouts,
    root_argument,
    tabulate,
    verify_algorithm,
)
from hpccomm.errors import ScheduleError
from hpccomm.kernels.interpreter.records import COPY, NODE, RECEIVE, REDUCE, SEND, WAIT
from hpccomm.layout import Link

EVERY = [(collective, name) for collective, names in ALGORITHMS.items() for name in names]
STEP_BY_STEP, LAGGING, WINDOW = Pipeline(), Pipeline(3, 1, MANY, 1), Pipeline(2, 0, 4, 1)
PIPELINES = (STEP_BY_STEP, LAGGING, WINDOW, Pipeline(4), Pipeline(1, 0, 1, 2))
LAYOUTS = {
    "block": lambda p, n: [r * n // p for r in range(p)],
    "cyclic": lambda p, n: [r % n for r in range(p)],
    "uneven": lambda p, n: [max(0, r - (p - n)) for r in range(p)],
    "random": lambda p, n: np.random.default_rng(p).permutation([r % n for r in range(p)]).tolist(),
}


def roots_of(collective: str, p: int) -> set[int]:
    return {0, p - 1} if collective in ROOTED_COLLECTIVES else {0}


def count_to_five_million() -> float:
    """Seconds of this process, which other processes on the same core and cache lengthen."""
    began, total = time.process_time(), 0
    for k in range(5_000_000):
        total += k
    return time.process_time() - began


# --- what runs is right ----------------------------------------------------------------------------


@pytest.mark.slow(0)
def test_the_records_of_every_schedule_of_1_to_64_ranks_are_right_within_20_seconds() -> None:
    """Of the time of this process, on a machine that counts to five million in 0.15 s; a busy one takes longer."""
    busy = max(1.0, count_to_five_million() / 0.15)
    began = time.process_time()
    for collective, name in EVERY:
        for p in range(1, 65):
            for root in roots_of(collective, p) if p < 17 else {p // 2 if collective in ROOTED_COLLECTIVES else 0}:
                assert (check_algorithm(name, collective, p, root) > 0) == (p > 1 or collective in REDUCING_COLLECTIVES)
    assert time.process_time() - began < 20 * max(busy, count_to_five_million() / 0.15)


@pytest.mark.parametrize("placement", LAYOUTS)
@pytest.mark.parametrize("collective", HIERARCHICAL)
def test_the_records_of_every_hierarchical_layout_are_right(collective: str, placement: str) -> None:
    for nodes_count in (2, 3, 4, 8):
        for p in (nodes_count, nodes_count + 1, 2 * nodes_count, 5 * nodes_count):
            nodes = LAYOUTS[placement](p, nodes_count)
            how = WINDOW if collective in BLOCK_IS_RANK else LAGGING
            for width, pipeline in ((None, how), (1, STEP_BY_STEP)):
                algorithm = HIERARCHICAL[collective](nodes, width=width)
                for root in roots_of(collective, p):
                    verify_algorithm(algorithm, collective, p, root)
                    check_algorithm(algorithm, collective, p, root, pipeline)
                    check_algorithm(algorithm, collective, p, root, STEP_BY_STEP, shared=False)


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
@pytest.mark.parametrize("collective", HIERARCHICAL)
def test_every_pipeline_runs_every_schedule(collective: str, pipeline: Pipeline) -> None:
    for p in (1, 2, 3, 5, 8):
        subjects: list[Any] = list(ALGORITHMS[collective].values())
        subjects += [HIERARCHICAL[collective](nodes, width=w) for nodes in layouts(p).values() for w in (None, 1)]
        for algorithm in subjects:
            for root in roots_of(collective, p):
                for length in (0, 1, 3, 11):
                    check_algorithm(algorithm, collective, p, root, pipeline, length=length)


@pytest.mark.parametrize("inter", ["ring", "butterfly", "doubling", "double_tree", "direct"])
def test_every_allreduce_runs_between_nodes(inter: str) -> None:
    for p in (2, 5, 12):
        for nodes in layouts(p).values():
            algorithm = hierarchical.build_allreduce(nodes, ALGORITHMS["allreduce"][inter])
            verify_algorithm(algorithm, "allreduce", p)
            check_algorithm(algorithm, "allreduce", p, 0, LAGGING)


@pytest.mark.parametrize("collective", HIERARCHICAL)
def test_messages_in_place_of_node_steps_do_the_same(collective: str) -> None:
    for p in (1, 2, 3, 7, 12):
        for nodes in layouts(p).values():
            algorithm = HIERARCHICAL[collective](nodes)

            def flat(r: Any, p: int, *root: int, algorithm: Algorithm = algorithm) -> Iterator[Any]:
                return without_node_steps(algorithm.steps(r, p, *root), r)

            for root in roots_of(collective, p):
                verify_algorithm(algorithm._replace(steps=flat, volume=None), collective, p, root)


def test_a_long_vector_is_cut_into_segments_and_messages_that_overlap() -> None:
    """16 MB between two nodes of two ranks: 16 segments; the next is reduced while one is between the nodes."""
    form = select_form("allreduce", [0, 0, 1, 1], 1 << 24, Link(25, 8e-3))
    layout = Layout(1 << 22, 4, form.algorithm.blocks(4))
    program = lower(form.algorithm.steps(0, 4), 0, layout, form.pipeline, from_source=True)
    kinds = program.records["kind"].tolist()
    sent = program.records["nbytes"][program.records["kind"] == SEND]
    assert kinds.count(NODE) == 32
    assert COPY not in kinds, "the first node step reads the operand where it is"
    assert sent.max() <= MESSAGE_BYTES
    assert sent.sum() == 1 << 23, "each of the two channels carries half of the vector"
    second = [k for k, kind in enumerate(kinds) if kind == NODE][1]
    assert kinds.index(SEND) < second < kinds.index(WAIT), "messages are pending while the next segment is reduced"
    assert program.requests <= 2 * (2 * 10 + 1)


def test_ranks_alone_on_their_nodes_copy_and_send_segment_by_segment() -> None:
    form = select_form("allreduce", [0, 1, 2, 3], 1 << 24, Link(25, 8e-3))
    program = lower(form.algorithm.steps(0, 4), 0, Layout(1 << 22, 4, 4), form.pipeline, from_source=True)
    copies = np.flatnonzero(program.records["kind"] == COPY)
    sends = np.flatnonzero(program.records["kind"] == SEND)
    assert len(copies) == 16
    assert all(((sends > a) & (sends < b)).any() for a, b in pairwise(copies.tolist()))
    assert NODE not in program.records["kind"]


@pytest.mark.parametrize("collective", HIERARCHICAL)
def test_the_forms_that_run_are_right_at_every_length(collective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths at which forms change are scaled down, so that vectors of a few elements take all of them."""
    for name, value in (("MESSAGE_BYTES", 7), ("SEGMENT_BYTES", 60), ("SHARED_BYTES", 40)):
        monkeypatch.setattr(hierarchical, name, value)
    monkeypatch.setattr(hierarchical, "SHORT_BYTES", dict.fromkeys(HIERARCHICAL, 20))
    forms = set()
    for nodes in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1], [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3]):
        p = len(nodes)
        for length in (5, 19, 21, 130, 401):
            form = select_form(collective, nodes, length, Link(25, 8e-3))
            forms.add(form.pipeline)
            each = length // p if collective in BLOCK_IS_RANK else length
            for root in roots_of(collective, p):
                check_algorithm(form.algorithm, collective, p, root, form.pipeline, length=each)
    assert len(forms) > 1


def test_a_window_bounds_the_messages_in_flight() -> None:
    form = select_form("allgather", [0, 0, 1, 1], 1 << 24, Link(25, 8e-3))
    layout = Layout(1 << 22, 4, 4, [k << 20 for k in range(5)])
    program = lower(form.algorithm.steps(0, 4), 0, layout, form.pipeline)
    assert program.requests == 2 * hierarchical.WINDOW
    gathers = [each for each in program.meetings if each.collective == "allgather"]
    assert len(gathers) == 2 * form.pipeline.segments


def test_channels_are_driven_by_as_many_ranks_as_the_smallest_node_has() -> None:
    channels = channels_of([0, 0, 0, 1, 1])
    assert channels.rank.tolist() == [[0, 2], [3, 4]]
    assert channels.drives.tolist() == [True, False, True, True, True]


# --- mutations -------------------------------------------------------------------------------------

SUBJECTS: list[tuple[str, Any, int, Pipeline]] = [
    ("allreduce", ALGORITHMS["allreduce"]["ring"], 5, STEP_BY_STEP),
    ("allreduce", ALGORITHMS["allreduce"]["butterfly"], 6, STEP_BY_STEP),
    ("bcast", ALGORITHMS["bcast"]["chain"], 4, Pipeline(3)),
    ("reduce_scatter", ALGORITHMS["reduce_scatter"]["direct"], 4, STEP_BY_STEP),
    ("allgather", ALGORITHMS["allgather"]["bruck"], 6, STEP_BY_STEP),
    ("allreduce", hierarchical.build_allreduce([0, 0, 1, 1, 2]), 5, LAGGING),
    ("allgather", hierarchical.build_allgather([0, 1, 0, 1, 2, 2]), 6, WINDOW),
    ("reduce_scatter", hierarchical.build_reduce_scatter([0, 0, 1, 1, 1]), 5, WINDOW),
    ("reduce", hierarchical.build_reduce([0, 0, 1, 1]), 4, LAGGING),
    ("bcast", hierarchical.build_bcast([0, 0, 1, 1, 2, 2]), 6, LAGGING),
]
Rows = list[tuple[int, ...]]
PEER, BUFFER, AT, NBYTES, REQUEST, OPERAND_AT, LOWER = 1, 2, 3, 4, 5, 7, 8


def programs_of(collective: str, algorithm: Algorithm, p: int, how: Pipeline) -> tuple[list[Program], Duty]:
    """The programs of all ranks, and what they promise, with blocks of two or three elements."""
    if collective in BLOCK_IS_RANK:
        sizes = [2 * how.segments + b % 2 for b in range(p)]
        layout = Layout(sum(sizes), 1, p, [0, *np.cumsum(sizes).tolist()])
    else:
        layout = Layout(2 * algorithm.blocks(p) * how.segments + 1, 1, algorithm.blocks(p))
    table = tabulate(algorithm.steps(np.arange(p), p, *root_argument(collective, 0)), p)
    own = np.arange(p) if algorithm.own_blocks is None else algorithm.own_blocks(p)
    duty = Duty(collective, layout, 0, own.tolist())
    reduces = collective in REDUCING_COLLECTIVES
    return [lower(each, r, layout, how, reduces, duty.due(r)) for r, each in enumerate(columns(table))], duty


def change(
    field: int, kinds: tuple[int, ...], by: Callable[[int, int], int]
) -> Callable[[Rows, int, int], Rows | None]:
    """A change of one field of a record."""

    def mutate(rows: Rows, k: int, draw: int) -> Rows | None:
        if rows[k][0] not in kinds:
            return None
        row = list(rows[k])
        row[field] = by(row[field], draw)
        return None if row[field] == rows[k][field] else [*rows[:k], tuple(row), *rows[k + 1 :]]

    return mutate


def drop(kinds: tuple[int, ...]) -> Callable[[Rows, int, int], Rows | None]:
    """A record that is missing."""
    return lambda rows, k, draw: rows[:k] + rows[k + 1 :] if rows[k][0] in kinds else None


def wait_too_late(rows: Rows, k: int, draw: int) -> Rows | None:
    """A wait for a receive after the reduction that needs it."""
    if rows[k][0] != WAIT or rows[k][PEER] < 0:
        return None
    later = next((j for j in range(k + 1, len(rows)) if rows[j][0] == REDUCE), None)
    return None if later is None else [*rows[:k], *rows[k + 1 : later + 1], rows[k], *rows[later + 1 :]]


def swap_messages(rows: Rows, k: int, draw: int) -> Rows | None:
    """Two messages to one rank in the other order, with different contents."""
    if rows[k][0] != SEND:
        return None
    for j in range(k + 1, len(rows)):
        if rows[j][0] == WAIT:
            return None
        if rows[j][0] == SEND and rows[j][PEER] == rows[k][PEER] and rows[j][AT] != rows[k][AT]:
            return [*rows[:k], rows[j], *rows[k + 1 : j], rows[k], *rows[j + 1 :]]
    return None


def wait_first(rows: Rows, k: int, draw: int) -> Rows | None:
    """A wait before the message has started."""
    if rows[k][0] not in (SEND, RECEIVE):
        return None
    j = next(j for j in range(k + 1, len(rows)) if rows[j][0] == WAIT and rows[j][REQUEST] == rows[k][REQUEST])
    return [*rows[:k], rows[j], *rows[k:j], *rows[j + 1 :]]


MESSAGES, ALL = (SEND, RECEIVE), (SEND, RECEIVE, WAIT, REDUCE, COPY, NODE)
MUTATIONS = {
    "peer": change(PEER, MESSAGES, lambda old, draw: draw % 7),
    "length": change(NBYTES, (*MESSAGES, WAIT, REDUCE, COPY), lambda old, draw: old + (1, -1)[draw % 2]),
    "place": change(AT, (*MESSAGES, REDUCE, COPY), lambda old, draw: old + (1, -1)[draw % 2]),
    "operand": change(OPERAND_AT, (REDUCE, COPY), lambda old, draw: old + 1),
    "buffer": change(BUFFER, (*MESSAGES, REDUCE, COPY), lambda old, draw: draw % 4),
    "side": change(LOWER, (REDUCE,), lambda old, draw: 1 - old),
    "request": change(REQUEST, (*MESSAGES, WAIT, NODE), lambda old, draw: old + 1 + draw % 3),
    "kind": change(0, ALL, lambda old, draw: draw % 8),
    "missing wait": drop((WAIT,)),
    "missing record": drop(ALL),
    "late wait": wait_too_late,
    "early wait": wait_first,
    "order": swap_messages,
}


def survive(what: str, records: int) -> None:
    """Fail with the mutation that was not found."""
    pytest.fail(f"{what} survives among {records} records")


def test_none_of_1000_random_mutations_of_records_survives() -> None:
    """What a mutation may change without harm is left out: a copy to where nothing is read, an equal record."""
    random = np.random.default_rng(7)
    counts: dict[str, int] = {}
    made = [(subject, *programs_of(*subject)) for subject in SUBJECTS]
    for (collective, _, p, _), programs, duty in made:
        assert check_programs(programs, duty, f"{collective}, p={p}") > 0
    while sum(counts.values()) < 1000:
        subject, programs, duty = made[random.integers(len(made))]
        name = list(MUTATIONS)[random.integers(len(MUTATIONS))]
        r = int(random.integers(len(programs)))
        rows = programs[r].records.tolist()
        k = int(random.integers(len(rows)))
        mutated = MUTATIONS[name](rows, k, int(random.integers(1000)))
        if mutated is None:
            continue
        counts[name] = counts.get(name, 0) + 1
        wrong = programs[r]._replace(records=np.array(mutated, programs[r].records.dtype))
        what = f"{name} of record {k} of rank {r} of {subject[0]}, p={subject[2]}: {rows[k]}"
        with pytest.raises(ScheduleError, match=r"rank \d+, "):
            survive(what, check_programs([*programs[:r], wrong, *programs[r + 1 :]], duty, "mutated"))
    assert counts.keys() == MUTATIONS.keys(), "every kind of mutation was tried"


def test_a_part_of_a_node_that_is_changed_on_one_rank_is_refused() -> None:
    programs, duty = programs_of(*SUBJECTS[5])
    meeting = programs[0].meetings[0]
    for wrong in (
        meeting._replace(collective="allgather"),
        meeting._replace(nbytes=(meeting.nbytes[0] + 1, *meeting.nbytes[1:])),
        meeting._replace(only=1),
        meeting._replace(members=(0, 2)),
        meeting._replace(operand=0),
    ):
        changed = programs[0]._replace(meetings=(wrong, *programs[0].meetings[1:]))
        with pytest.raises(ScheduleError):
            check_programs([changed, *programs[1:]], duty, "mutated")


def test_parts_of_a_node_step_must_be_disjoint_intervals() -> None:
    nodes = np.zeros(3, dtype=np.int64)
    for first, end in (([0, 0, 1], [1, 1, 3]), ([0, 1, 2], [1, 2, 4]), ([0, 2, 1], [1, 1, 3])):
        step = NodeStep("reduce_scatter", nodes, np.array(first), np.array(end))
        algorithm = Algorithm(lambda r, p, step=step: iter([step]), lambda p: 3)
        with pytest.raises(ScheduleError, match="inside a node"):
            verify_algorithm(algorithm, "allreduce", 3)
