"""Every schedule is proved for 1 to 64 ranks; every broken one is refused with rank and round."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from hpccomm.collectives import ALGORITHMS, hierarchical, ring, tree
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.collectives.schedule import NOBODY, Algorithm, Step, block_per_rank, one_block
from hpccomm.collectives.verify import ROOTED_COLLECTIVES, layouts, verify_algorithm
from hpccomm.commands import verify as command
from hpccomm.errors import ArgumentError, ScheduleError

EVERY = [(collective, name) for collective, names in ALGORITHMS.items() for name in names]
RING = ALGORITHMS["allreduce"]["ring"]
Edit = Callable[[list[Step]], list[Step]]


@pytest.mark.parametrize(("collective", "name"), EVERY)
def test_every_algorithm_is_right_for_1_to_64_ranks(collective: str, name: str) -> None:
    for p in range(1, 65):
        verify_algorithm(name, collective, p)


@pytest.mark.parametrize(("collective", "name"), [each for each in EVERY if each[0] in ROOTED_COLLECTIVES])
def test_every_root_is_right(collective: str, name: str) -> None:
    for p in range(1, 10):
        for root in range(p):
            verify_algorithm(name, collective, p, root)


@pytest.mark.parametrize("steps", [tree.scatter, tree.gather])
def test_scatter_and_gather_are_right_for_every_root(steps: Any) -> None:
    for p in range(1, 18):
        for root in range(p):
            verify_algorithm(Algorithm(steps, block_per_rank), steps.__name__, p, root)


@pytest.mark.parametrize("inter", ["ring", "butterfly", "doubling", "double_tree"])
def test_hierarchical_is_right_on_every_layout(inter: str) -> None:
    for p in (*range(1, 17), 33, 64):
        for nodes in layouts(p).values():
            algorithm = hierarchical.build_allreduce(nodes, ALGORITHMS["allreduce"][inter])
            assert (algorithm.volume is not None) == (inter == "ring")
            verify_algorithm(algorithm, "allreduce", p)


def test_proving_every_algorithm_takes_under_10_seconds() -> None:
    limit = 10
    began = time.process_time()
    for collective, name in EVERY:
        for p in range(1, 65):
            verify_algorithm(name, collective, p)
    for p in range(1, 65):
        verify_algorithm(hierarchical.build_allreduce(layouts(p)["block"]), "allreduce", p)
    assert time.process_time() - began < limit


@pytest.mark.parametrize(("collective", "name"), [each for each in EVERY if ALGORITHMS[each[0]][each[1]].volume])
@pytest.mark.parametrize("field", ["rounds", "busiest", "total"])
def test_a_false_declaration_of_rounds_or_bytes_is_refused(collective: str, name: str, field: str) -> None:
    algorithm = ALGORITHMS[collective][name]
    declared = getattr(algorithm.volume, field)
    wrong = algorithm.volume._replace(**{field: lambda p, root: declared(p, root) + 1})
    for p in (5, 8):
        with pytest.raises(ScheduleError, match=r", but .* declares"):
            verify_algorithm(algorithm._replace(volume=wrong), collective, p)


def test_an_algorithm_needs_no_declaration(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A generator and a row are an algorithm: the verifier and the command find it under its name."""
    monkeypatch.setitem(ALGORITHMS["allreduce"], "mine", Algorithm(ring.allreduce, block_per_rank))
    assert verify_algorithm("mine", "allreduce", 5).rounds == 8
    assert run_command(capsys, "mine", "--size", "1:5")[0] == 0


@pytest.mark.parametrize(("collective", "name"), EVERY)
def test_an_algorithm_is_marked_ordered_where_it_keeps_rank_order_for_all_sizes_and_roots(
    collective: str, name: str
) -> None:
    roots = [(p, root) for p in range(1, 10) for root in (range(p) if collective in ROOTED_COLLECTIVES else (0,))]
    in_order = all(verify_algorithm(name, collective, p, root).ordered for p, root in roots)
    assert ALGORITHMS[collective][name].ordered == in_order


def test_a_false_claim_of_order_is_refused() -> None:
    with pytest.raises(ScheduleError, match="claims to keep rank order, but does not"):
        verify_algorithm(RING._replace(ordered=True), "allreduce", 3)


def test_the_report_counts_rounds_messages_and_blocks() -> None:
    report = verify_algorithm("ring", "allreduce", 64)
    assert (report.rounds, report.messages, report.blocks) == (126, 126 * 64, 64)
    assert Fraction(report.blocks_sent_max, report.blocks) == Fraction(2 * 63, 64)
    assert report.ordered is False
    assert verify_algorithm("bruck", "allgather", 5).ordered is None


def test_schedules_of_more_than_64_ranks_are_proved() -> None:
    for p in (64, 65, 130):
        verify_algorithm("ring", "allreduce", p)
        verify_algorithm("butterfly", "allreduce", p)
        verify_algorithm("bruck", "allgather", p)


# --- broken schedules ------------------------------------------------------------------------------


def edit_steps(algorithm: Algorithm, edit: Edit) -> Algorithm:
    """The algorithm with the list of its steps edited, for one rank as for all."""

    def steps(r: Any, p: int, *root: int) -> Any:
        whole_rounds = edit(list(algorithm.steps(np.arange(p), p, *root)))
        return iter([column(step, r) for step in whole_rounds])

    return algorithm._replace(steps=steps)


def column(step: Step, r: Any) -> Step:
    """The part of a round that belongs to r."""

    def of(x: Any) -> Any:
        return np.broadcast_to(x, 64)[r] if np.ndim(x) == 0 else x[r]

    return Step(of(step.to), (of(step.send[0]), of(step.send[1])), of(step.source),
                (of(step.recv[0]), of(step.recv[1])), step.reduce)  # fmt: skip


def edit_round(k: int, change: Callable[[Step], Step]) -> Edit:
    """Change round k."""
    return lambda steps: [change(step) if i == k else step for i, step in enumerate(steps)]


def put(values: Any, rank: int, value: int) -> Any:
    """A copy with one entry changed."""
    changed = np.array(values)
    changed[rank] = value
    return changed


def refusal(algorithm: Algorithm, collective: str = "allreduce", p: int = 5) -> str:
    """The error of the verifier."""
    with pytest.raises(ScheduleError) as caught:
        verify_algorithm(algorithm, collective, p)
    return str(caught.value)


def test_a_wrong_peer_is_refused() -> None:
    error = refusal(edit_steps(RING, edit_round(2, lambda step: step._replace(to=put(step.to, 1, 3)))))
    assert "round 2, rank 1, block 3: is sent to rank 3, which receives from rank 2 in this round" in error
    assert "would wait for ever" in error


def test_a_peer_that_does_not_exist_is_refused() -> None:
    error = refusal(edit_steps(RING, edit_round(2, lambda step: step._replace(to=put(step.to, 1, 9)))))
    assert "round 2, rank 1, block 3: sends to rank 9" in error


def test_a_message_to_oneself_is_refused() -> None:
    error = refusal(edit_steps(RING, edit_round(0, lambda step: step._replace(source=put(step.source, 4, 4)))))
    assert "round 0, rank 4" in error
    assert "receives from rank 4" in error


def test_a_receive_without_a_send_is_refused() -> None:
    def edit(step: Step) -> Step:
        return step._replace(to=put(step.to, 1, NOBODY))

    error = refusal(edit_steps(RING, edit_round(2, edit)))
    assert "round 2, rank 2, block 3: is awaited from rank 1, which sends to nobody in this round" in error


def test_different_blocks_at_the_two_ends_are_refused() -> None:
    def edit(step: Step) -> Step:
        return step._replace(recv=(put(step.recv[0], 3, 2), put(step.recv[1], 3, 3)))

    error = refusal(edit_steps(RING, edit_round(1, edit)))
    assert "round 1, rank 3, block 2: expects blocks [2, 3) from rank 2, which sends [0, 1)" in error


def test_a_wrong_block_at_both_ends_is_refused() -> None:
    """In round 1 every rank sends the next block: messages match, contents do not."""

    def edit(step: Step) -> Step:
        return step._replace(send=(step.send[0] + 1, step.send[1] + 1), recv=(step.recv[0] + 1, step.recv[1] + 1))

    error = refusal(edit_steps(RING, edit_round(1, edit)))
    assert "round 1, rank 1, block 4: counts the contribution of rank 0 twice" in error


def test_reducing_instead_of_replacing_is_refused() -> None:
    error = refusal(edit_steps(RING, edit_round(4, lambda step: step._replace(reduce=True))))
    assert "round 4, rank 1, block 0: counts the contribution of rank 1 twice" in error


def test_replacing_instead_of_reducing_is_refused() -> None:
    error = refusal(edit_steps(RING, edit_round(2, lambda step: step._replace(reduce=False))))
    assert "round 2, rank 1, block 2: is replaced and loses the contribution of rank 1" in error


@pytest.mark.parametrize("dropped", range(8))
def test_a_dropped_round_is_refused(dropped: int) -> None:
    error = refusal(edit_steps(RING, lambda steps: steps[:dropped] + steps[dropped + 1 :]))
    assert all(word in error for word in ("round", "rank", "block"))


def test_without_its_last_round_the_error_names_the_missing_contributions() -> None:
    error = refusal(edit_steps(ALGORITHMS["allreduce"]["doubling"], lambda steps: steps[:-1]), p=4)
    assert "round 0, rank 0, block 0: in the end misses the contributions of ranks [2, 3]" in error


def test_a_rank_counted_twice_is_refused() -> None:
    error = refusal(edit_steps(ALGORITHMS["allreduce"]["doubling"], lambda steps: [*steps, steps[-1]]), p=4)
    assert "round 2, rank 2, block 0: counts the contribution of rank 0 twice" in error


def test_sending_an_uninitialised_block_is_refused() -> None:
    reverse = edit_steps(ALGORITHMS["bcast"]["chain"], lambda steps: steps[::-1])
    assert "round 0, rank 3, block 0: is sent before it is initialised" in refusal(reverse, "bcast")


def test_summing_into_an_uninitialised_block_is_refused() -> None:
    added = edit_steps(ALGORITHMS["bcast"]["chain"], edit_round(0, lambda step: step._replace(reduce=True)))
    assert "round 0, rank 1, block 0: is summed into before it is initialised" in refusal(added, "bcast")


def test_a_broadcast_from_another_root_is_refused() -> None:
    """The schedule is verified for root 0, but its steps are those of root 1."""

    def steps(r: Any, p: int, root: int = 0) -> Any:
        return tree.broadcast(r, p, root + 1)

    assert "is sent before it is initialised" in refusal(Algorithm(steps, one_block), "bcast")


def test_receiving_into_a_block_that_is_being_sent_is_refused() -> None:
    def steps(r: Any, p: int) -> Any:
        yield Step(1 - r, (0, 1), 1 - r, (0, 1), reduce=False)

    error = refusal(Algorithm(steps, one_block), "allreduce", p=2)
    assert "round 0, rank 0, block 0: is sent and replaced in the same round" in error


def test_a_send_that_matches_a_receive_of_another_round_is_refused_even_without_a_deadlock() -> None:
    """Rank 0 sends in round 0; rank 1 receives in round 1."""

    def steps(r: Any, p: int, root: int = 0) -> Any:
        here = np.asarray(r)
        nobody = np.full(here.shape, NOBODY)
        yield Step(np.where(here == 0, 1, NOBODY), (0, 1), nobody, (0, 1), reduce=False)
        yield Step(nobody, (0, 1), np.where(here == 1, 0, NOBODY), (0, 1), reduce=False)

    assert "a send would match a receive of another round" in refusal(Algorithm(steps, one_block), "bcast", p=2)


def test_steps_generated_for_one_rank_must_be_those_of_the_whole_round() -> None:
    def steps(r: Any, p: int) -> Any:
        rounds = list(ring.allreduce(r, p))
        return iter(rounds if np.ndim(r) else rounds[::-1])

    assert "generated alone, the rank takes another step than with all ranks" in refusal(
        Algorithm(steps, block_per_rank)
    )


def test_too_few_blocks_are_refused() -> None:
    error = refusal(Algorithm(ring.reduce_scatter, one_block), "reduce_scatter")
    assert "cuts the vector into 1 blocks; reduce_scatter needs one a rank" in error


def test_wrong_bytes_are_refused() -> None:
    doubling = ALGORITHMS["allreduce"]["doubling"]
    wrong = doubling._replace(volume=doubling.volume._replace(busiest=lambda p, _: Fraction(2)))
    with pytest.raises(ScheduleError, match=r"3 vectors sent by the busiest rank, but n lg s.* declares 2"):
        verify_algorithm(wrong, "allreduce", 8)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match="take one of ring, butterfly"):
        verify_algorithm("rnig", "allreduce", 4)
    with pytest.raises(ArgumentError, match="take one of allreduce"):
        verify_algorithm("ring", "allreduced", 4)


# --- independent oracle: every rank runs its own steps --------------------------------------------


@pytest.mark.parametrize(("collective", "name"), [each for each in EVERY if each[0] == "allreduce"])
@pytest.mark.parametrize("p", [1, 2, 5, 8, 11])
def test_ranks_that_run_their_own_steps_in_any_order_finish_with_the_sum(collective: str, name: str, p: int) -> None:
    algorithm = ALGORITHMS[collective][name]
    for seed in range(3):
        cells = rendezvous(algorithm, p, random.Random(seed))
        assert all(sorted(cell) == list(range(p)) for rank in cells for cell in rank)


def rendezvous(algorithm: Algorithm, p: int, choose: random.Random) -> list[list[list[int]]]:
    """Each rank runs its own steps; a message moves when both ends have reached it; ``choose`` selects the next one."""
    blocks = algorithm.blocks(p)
    cells = [[[r] for _ in range(blocks)] for r in range(p)]
    todo = [[step for step in algorithm.steps(r, p) if step.to >= 0 or step.source >= 0] for r in range(p)]
    posted: list[list[Any]] = [[] for _ in range(p)]
    arrived: list[list[Any]] = [[] for _ in range(p)]
    waits = [ends(todo[r][0]) if todo[r] else set() for r in range(p)]
    for r in range(p):
        posted[r] = contents(todo[r][0], cells[r]) if todo[r] else []
    while any(todo):
        able = [s for s in range(p) if "send" in waits[s] and "recv" in waits[int(todo[s][0].to)]
                and int(todo[int(todo[s][0].to)][0].source) == s]  # fmt: skip
        assert able, "deadlock"
        s = choose.choice(able)
        d = int(todo[s][0].to)
        arrived[d] = posted[s]
        waits[s].discard("send")
        waits[d].discard("recv")
        for r in {s, d}:
            if not waits[r]:
                finish(todo[r].pop(0), cells[r], arrived[r])
                if todo[r]:
                    waits[r], posted[r] = ends(todo[r][0]), contents(todo[r][0], cells[r])
    return cells


def ends(step: Step) -> set[str]:
    return {end for end, peer in (("send", step.to), ("recv", step.source)) if peer >= 0}


def contents(step: Step, cells: list[list[int]]) -> list[list[int]]:
    lo, hi = (int(x) for x in step.send)
    return [list(cells[b % len(cells)]) for b in range(lo, hi)] if step.to >= 0 else []


def finish(step: Step, cells: list[list[int]], new: list[list[int]]) -> None:
    if step.source >= 0:
        for b, each in zip(range(int(step.recv[0]), int(step.recv[1])), new, strict=True):
            cells[b % len(cells)] = cells[b % len(cells)] + each if step.reduce else each


# --- command --------------------------------------------------------------------------------------


def run_command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words)), capsys.readouterr().out


def test_the_command_prints_a_line_an_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_command(capsys, "all", "--size", "1:5")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(EVERY) + len(HIERARCHICAL)
    code, out = run_command(capsys, "ring", "--size", "7", "--collective", "allreduce")
    assert code == 0
    assert out.splitlines()[1].split() == ["allreduce", "ring", "7", "12", "no", "2(p-1)/p", "n"]


def test_the_command_fails_with_the_reason(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    wrong = edit_steps(RING, edit_round(2, lambda step: step._replace(reduce=False)))
    monkeypatch.setitem(ALGORITHMS["allreduce"], "ring", wrong)
    code, out = run_command(capsys, "ring", "--size", "5", "--collective", "allreduce")
    assert code == 1
    assert "round 2, rank 1, block 2" in out


def test_the_command_refuses_unknown_algorithms_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match=r"use one of all, bruck, .*did you mean ring"):
        run_command(capsys, "rnig")
    with pytest.raises(ArgumentError, match="give numbers of ranks from 1 to 4,096 as 7, 1:64 or 1,2,7"):
        run_command(capsys, "ring", "--size", "0:3")
