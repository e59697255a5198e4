"""A parameter server: the golden timelines, BSP as allreduce to the last bit, staleness bounds, no push lost."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from thread_ranks import ThreadTransport, run_on_threads

from hpccomm import none, threshold, topk
from hpccomm.algorithms.exchange import synchronous_sgd
from hpccomm.algorithms.parameter_server import (
    HEADER,
    PUSH,
    REPLY,
    TAG,
    Ledger,
    ParameterServer,
    Push,
    ServerReport,
    pack_message,
    rules_of,
    timeline,
)
from hpccomm.algorithms.row_sparse import RowCode
from hpccomm.algorithms.transforms import Transform, chain, clip, momentum, scale
from hpccomm.buckets import Bucket
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.engine import bind, even_cuts
from hpccomm.errors import ArgumentError, HpccommError, MismatchError
from hpccomm.testing.ranks import run_on_ranks

Vector = Any
DESCENT = chain(momentum(0.5), scale(-0.25))
MODES: list[Any] = ["bsp", ("ssp", 0), ("ssp", 1), ("ssp", 3), "asp"]


# Timelines

UNEVEN = [[1, 1, 1, 6], [2, 2, 2, 2]]
CROSSED = [[1, 3, 1, 3], [3, 1, 3, 1]]


@pytest.mark.parametrize(
    ("durations", "mode", "makespan"),
    [
        (UNEVEN, "bsp", 12),
        (UNEVEN, ("ssp", 0), 12),
        (UNEVEN, ("ssp", 1), 10),
        (UNEVEN, ("ssp", 2), 9),
        (UNEVEN, "asp", 9),
        (CROSSED, "bsp", 12),
        (CROSSED, ("ssp", 1), 8),
        (CROSSED, ("ssp", 5), 8),
        (CROSSED, "asp", 8),
    ],
)
def test_golden_makespans(durations: Any, mode: Any, makespan: float) -> None:
    assert timeline(durations, mode)[-1].time == makespan


def test_golden_order_of_pushes() -> None:
    expected = [
        (1, 0, 1, 0),
        (2, 0, 2, 0),
        (2, 1, 1, 2),
        (3, 0, 3, 0),
        (4, 1, 2, 1),
        (6, 1, 3, 0),
        (8, 1, 4, 0),
        (10, 0, 4, 2),
    ]
    assert timeline(UNEVEN, ("ssp", 1)) == [Push(*row) for row in expected]


@pytest.mark.parametrize("slack", [0, 1, 2, 4])
def test_clocks_spread_by_the_slack_at_most(slack: int) -> None:
    """At most s apart when a step begins, s + 1 while it runs; each value is reached."""
    rng = np.random.default_rng(slack)
    durations = rng.integers(1, 9, (5, 40)).tolist()
    clocks, widest = [0] * 5, 0
    for push in timeline(durations, ("ssp", slack)):
        clocks[push.worker] += 1
        if max(clocks) < 40:
            widest = max(widest, max(clocks) - min(clocks))
            assert widest <= slack + 1
    assert widest == slack + 1


def test_no_worker_waits_for_one_that_has_left() -> None:
    rows = timeline([[1], [1, 1, 1], []], ("ssp", 1))
    assert [push.worker for push in rows].count(1) == 3
    assert rows[-1].time == 3


# The rules of a server


def pushes(rules: Any, script: list[tuple[int, float, int]], workers: int = 3) -> tuple[list[list[float]], Ledger]:
    """What is applied when workers push numbers that were computed at versions."""
    seen: list[list[float]] = []
    ledger = Ledger(workers, rules, lambda gradients: seen.append([float(each[0]) for each in gradients]))
    for worker, number, version in script:
        ledger.push(worker, np.array([number]), version)
    return seen, ledger


def test_bsp_applies_a_clock_in_rank_order_in_any_order_of_arrival() -> None:
    seen, ledger = pushes(rules_of("bsp"), [(2, 3, 0), (0, 1, 0), (1, 2, 0), (1, 5, 1), (2, 6, 1), (0, 4, 1)])
    assert seen == [[1, 2, 3], [4, 5, 6]]
    assert ledger.version == 2
    assert all(map(ledger.may_read, range(3)))


def test_bsp_lets_no_worker_read_an_incomplete_clock() -> None:
    _, ledger = pushes(rules_of("bsp"), [(0, 1, 0), (2, 3, 0)])
    assert [ledger.may_read(worker) for worker in range(3)] == [False, True, False]
    ledger.leave(1)
    assert [ledger.may_read(worker) for worker in (0, 2)] == [True, True]


def test_bsp_with_a_backup_worker_drops_late_pushes() -> None:
    seen, ledger = pushes(rules_of("bsp", backup=1), [(2, 3, 0), (0, 1, 0), (1, 2, 0), (1, 5, 1), (0, 4, 1)])
    assert seen == [[1, 3], [4, 5]]
    assert (ledger.dropped, ledger.version) == (1, 2)


def test_asp_damps_or_drops_stale_pushes_and_counts_them() -> None:
    script = [(0, 8, 0), (1, 8, 0), (2, 8, 0), (0, 8, 3)]
    seen, ledger = pushes(rules_of("asp", damp=lambda stale: 1 / (1 + stale)), script)
    assert seen == [[8], [4], [8 / 3], [8]]
    assert ledger.staleness == {0: 2, 1: 1, 2: 1}
    seen, ledger = pushes(rules_of("asp", limit=1), script[:3])
    assert seen == [[8], [8]]
    assert ledger.dropped == 1


# Over messages


def centres_of(workers: int, n: int = 37) -> Vector:
    return np.random.default_rng(workers).standard_normal((workers, n))


def train(
    comm: Any, steps: list[int], optimizer: Transform = DESCENT, dtype: str = "f8", n: int = 37, **options: Any
) -> Any:
    """½‖w − c‖²: a server's report, or a worker's final weights."""
    begin = np.linspace(-1, 1, n).astype(dtype) if comm.rank == 0 else np.zeros(n, dtype)
    ps = ParameterServer(comm, begin, optimizer, **options)
    if ps.serves:
        return ps.serve()
    worker = comm.rank - ps.servers
    centre = centres_of(ps.workers, n)[worker].astype(dtype)
    for _ in range(steps[worker]):
        ps.push(ps.pull() - centre)
    return ps.leave()


def dense(workers: int, steps: int, n: int = 37) -> Vector:
    """The same by allreduce, sums in rank order."""

    def body(comm: Any) -> Vector:
        weights = np.linspace(-1, 1, n)
        method = synchronous_sgd(comm, 0.25, momentum=0.5)
        state = method.init(weights)
        for _ in range(steps):
            step, state = method.update(weights - centres_of(workers, n)[comm.rank], state, weights)
            weights += step
        return weights

    return run_on_ranks(workers, body)[0]


@pytest.mark.parametrize(("servers", "workers"), [(1, 1), (1, 3), (2, 3), (3, 4), (5, 2)])
@pytest.mark.parametrize("mode", ["bsp", ("ssp", 0)])
def test_bsp_is_allreduce_to_the_last_bit(servers: int, workers: int, mode: Any) -> None:
    found = run_on_ranks(servers + workers, lambda comm: train(comm, [6] * workers, servers=servers, mode=mode))
    expected = dense(workers, 6)
    assert all(np.array_equal(each, expected) for each in found[servers:])
    assert np.array_equal(np.concatenate([each.weights for each in found[:servers]]), expected)
    assert all(each.version == 6 for each in found[:servers])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [[4, 4, 4], [0, 0, 0], [7, 1, 0], [2, 9, 5]])
def test_no_push_is_lost_and_all_end_with_the_same_model(mode: Any, steps: list[int]) -> None:
    """Without momentum a model is its start minus all pushes, in any order: whole numbers of eighths are exact."""

    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(5), scale(-0.125), servers=2, mode=mode, reduce="sum")
        if ps.serves:
            return ps.serve()
        for number in range(steps[comm.rank - 2]):
            ps.pull()
            ps.push(np.arange(5.0) + number)
        return ps.leave()

    found = run_on_ranks(5, body)
    total = -0.125 * sum((np.arange(5.0) + number for count in steps for number in range(count)), np.zeros(5))
    assert all(np.array_equal(each, total) for each in found[2:])
    for report in found[:2]:
        assert sum(report.staleness.values()) == sum(steps)
        assert report.version == (max(steps) if mode in ("bsp", ("ssp", 0)) else sum(steps))


def test_a_worker_sees_its_own_pushes_and_those_that_the_slack_demands() -> None:
    """SSP(1): a read with clock c sees all pushes of clocks up to c − 2 and its own; weights count pushes here."""

    def body(comm: Any) -> list[float] | ServerReport:
        ps = ParameterServer(comm, np.zeros(1), scale(-1), mode=("ssp", 1), reduce="sum")
        if ps.serves:
            return ps.serve()
        seen = []
        for _ in range(20):
            seen.append(float(ps.pull()[0]))
            ps.push(np.array([-1.0]))
        ps.leave()
        return seen

    for seen in run_on_ranks(4, body)[1:]:
        assert all(count >= clock + 2 * max(0, clock - 1) for clock, count in enumerate(seen))  # type: ignore[arg-type]
        assert all(count <= clock + 2 * (clock + 2) for clock, count in enumerate(seen))  # type: ignore[arg-type]


class Halves:
    """A codec for the tests: sends what is at least a half as whole halves, and keeps the rest."""

    def encode_feedback(self, backlog: Vector, gradient: Vector | None = None) -> Vector:
        backlog += 0 if gradient is None else gradient
        sent = np.trunc(backlog * 2).astype(np.int8)
        backlog -= sent / np.float32(2)
        return sent.view(np.uint8)

    def decode(self, message: Vector, out: Vector) -> None:
        out += message.view(np.int8) / np.float32(2)


def test_workers_push_messages_of_the_codec_and_keep_its_error() -> None:
    """Two pushes of ¼ and of ¾: nothing and a half, then a half and one."""

    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(4, "f4"), scale(-1), servers=2, codec=Halves(), reduce="sum")
        if ps.serves:
            return ps.serve()
        seen = []
        for _ in range(2):
            ps.push(np.array([0.25, 0.75, -0.25, -0.75], "f4"))
            seen.append((-ps.pull()).tolist())
        ps.leave()
        return seen, ps.backlog.tolist()

    for seen, backlog in run_on_ranks(4, body)[2:]:
        assert seen == [[0, 1, 0, -1], [1, 3, -1, -3]]
        assert backlog == [0, 0, 0, 0]


def test_compressors_write_pushes() -> None:
    """None changes anything; a threshold moves the model by whole thresholds and keeps the rest at the worker."""

    def body(comm: Any, codec: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(6, "f4"), scale(-1), servers=2, codec=codec, reduce="sum")
        if ps.serves:
            return ps.serve()
        for _ in range(3):
            ps.pull()
            ps.push(np.array([0, 0.25, -0.5, 1, -3, 0.75], "f4"))
        return ps.leave().tolist(), ps.backlog.tolist()

    dense = [0, -1.5, 3, -6, 18, -4.5]
    for codec, backlog in ((none(), [0.0] * 6), (threshold(0.5), [0, 0.25, 0, 1.5, -7.5, 0.75])):
        for final, kept in run_on_ranks(4, lambda comm, codec=codec: body(comm, codec))[2:]:
            assert kept == backlog
            assert [a - 2 * b for a, b in zip(final, kept, strict=True)] == dense


@pytest.mark.parametrize("n", [0, 1, 2])
def test_models_smaller_than_the_number_of_servers(n: int) -> None:
    found = run_on_ranks(5, lambda comm: train(comm, [3, 3], servers=3, n=n))
    assert np.array_equal(found[-1], dense(2, 3, n))


def test_servers_keep_state_of_their_slice() -> None:
    found = run_on_ranks(3, lambda comm: train(comm, [3], servers=2))
    assert [len(report.state[0]) for report in found[:2]] == [19, 18]


@pytest.mark.parametrize("codec", [None, threshold(0.5), topk(0.25)], ids=["dense", "threshold", "top k"])
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(codec: Any) -> None:
    """What servers and workers end with is where others go on: weights, momentum, and what was not sent."""

    def body(comm: Any, steps: int, begin: Any) -> Any:
        weights, kept = begin[comm.rank]
        ps = ParameterServer(comm, weights, DESCENT, servers=2, codec=codec)
        if ps.serves:
            return ps.serve(kept)
        if kept is not None:
            ps.backlog = kept
        centre = centres_of(2)[comm.rank - 2].astype("f4")
        for _ in range(steps):
            ps.push(ps.pull() - centre)
        return ps.leave(), ps.backlog

    first = [(np.linspace(-1, 1, 37).astype("f4"), None)] * 4
    whole = run_on_ranks(4, lambda comm: body(comm, 9, first))
    half = run_on_ranks(4, lambda comm: body(comm, 5, first))
    weights = half[-1][0]
    later = [(weights, report.state) for report in half[:2]] + [(weights, backlog) for _, backlog in half[2:]]
    found = run_on_ranks(4, lambda comm: body(comm, 4, later))
    assert not np.array_equal(found[-1][0], weights)
    assert all(
        np.array_equal(a, b)
        for one, two in zip(found[2:], whole[2:], strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert all(np.array_equal(one.state[0], two.state[0]) for one, two in zip(found[:2], whole[:2], strict=True))


# Workers that come and go


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_workers_pause_join_and_begin_late_and_no_push_is_lost(servers: int, mode: Any) -> None:
    """Worker 0 works throughout, 1 pauses twice, 2 begins late, 3 leaves early; eighths are exact in any order."""

    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(5), scale(-0.125), servers=servers, mode=mode, reduce="sum")
        if ps.serves:
            return ps.serve()
        worker, pushes = comm.rank - servers, 0
        if worker == 2:
            ps.pause()
            assert ps.join().shape == (5,)
        for step in range({3: 2}.get(worker, 9)):
            if worker == 1 and step in (3, 6):
                ps.pause()
                ps.join()
            ps.pull()
            ps.push(np.arange(5.0) + step)
            pushes += 1
        return ps.leave(), pushes

    found = run_on_ranks(servers + 4, body)
    steps = [range(count) for _, count in found[servers:]]
    total = -0.125 * sum(np.arange(5.0) + step for each in steps for step in each)
    assert all(np.array_equal(final, total) for final, _ in found[servers:])
    assert all((report.dropped, report.lost) == (0, ()) for report in found[:servers])


@pytest.mark.parametrize("mode", ["bsp", ("ssp", 1)])
def test_nobody_waits_for_a_worker_that_has_paused(mode: Any) -> None:
    """Worker 1 pauses until worker 0 has made ten pushes, and then takes part at worker 0's clock."""

    def body(comm: Any) -> Any:
        gate = comm.Split(0 if comm.rank else 1, comm.rank)
        ps = ParameterServer(comm, np.zeros(1), scale(-1.0), mode=mode, reduce="sum")
        if ps.serves:
            return ps.serve()
        if comm.rank == 2:
            ps.pause()
            gate.Barrier()
            seen = float(ps.join()[0])
            ps.push(np.ones(1))
            return seen, ps.clock, float(ps.leave()[0])
        for _ in range(10):
            ps.pull()
            ps.push(np.ones(1))
        gate.Barrier()
        return float(ps.leave()[0])

    report, final, (seen, clock, last) = run_on_ranks(3, body)
    assert (seen, final, last) == (-10, -11, -11)
    assert clock == 11
    assert report.version == 11


def run_with_a_failure(mode: Any, servers: int, fail: Any, **options: Any) -> list[Any]:
    """Three workers of six steps; the last one ends by ``fail(ps)`` in its third; no rank hangs."""

    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(6), scale(-1.0), servers=servers, mode=mode, reduce="sum", **options)
        if ps.serves:
            return ps.serve()
        try:
            with ps:
                for step in range(6):
                    weights = ps.pull()
                    if step == 2 and comm.rank == comm.size - 1:
                        return fail(ps, weights)
                    ps.push(np.ones(6))
                return ps.leave()
        except RuntimeError as error:
            return str(error)

    return run_on_ranks(servers + 3, body, patience=20)


def raise_mid_push(ps: ParameterServer, weights: Any) -> None:
    """The first server has received the push, the others never will."""
    ps._send(0, PUSH, ps._encode(np.full(6, 1024.0), 0), ps.version[0])
    raise RuntimeError("out of memory")


def die_mid_push(ps: ParameterServer, weights: Any) -> str:
    """Without a word to anybody."""
    ps._send(0, PUSH, ps._encode(np.full(6, 1024.0), 0), ps.version[0])
    ps.closed = True
    return "dead"


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_that_fails_mid_push_is_left_behind(servers: int, mode: Any) -> None:
    """The others make all their pushes; of the torn one nothing counts where the mode lets servers hold it back."""
    found = run_with_a_failure(mode, servers, raise_mid_push)
    assert found[-1] == "out of memory"
    whole = -(6 + 6 + 2)
    for final in found[servers:-1]:
        rest = final[3 if servers == 2 else 6 :]
        assert (rest == whole).all()
        assert set(final[: 3 if servers == 2 else 6] - whole) <= {0.0, -1024.0}
    assert all(report.lost == (servers + 2,) for report in found[:servers])


def test_bsp_passes_over_a_clock_at_which_nobody_was_here_and_no_push_replaces_another() -> None:
    seen, ledger = pushes(rules_of("bsp"), [(0, 1, 0), (1, 2, 0), (2, 4, 0), (0, 8, 1)])
    for worker in range(3):
        ledger.leave(worker)
    assert (seen, ledger.version) == ([[1, 2, 4], [8]], 2)
    assert not ledger.join(0, 1)
    assert ledger.join(1, 5)
    assert ledger.version == 5
    assert ledger.may_read(1)
    ledger.push(1, np.array([16.0]), 5)
    seen, ledger = pushes(rules_of("bsp"), [(0, 1, 0)])
    ledger.leave(0)
    assert ledger.pace(0) == 1  # clock 0 waits for the others, with a push of this worker
    assert not ledger.join(0, 0)


def test_a_push_that_bsp_still_holds_back_is_dropped_when_its_worker_fails() -> None:
    _, ledger = pushes(rules_of("bsp"), [(2, 1024, 0)])
    ledger.leave(2, pushed=0)
    assert (ledger.dropped, ledger.pending_pushes) == (1, {})
    seen, ledger = pushes(rules_of("bsp"), [(2, 4, 0), (0, 1, 0)])
    ledger.leave(2, pushed=1)  # a whole one counts
    ledger.push(1, np.array([2.0]), 0)
    assert seen == [[1, 2, 4]]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(("servers", "mode"), [(1, "asp"), (2, "bsp"), (2, ("ssp", 1))])
def test_a_worker_that_dies_silently_is_given_up_after_a_while(
    servers: int, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = run_with_a_failure(mode, servers, die_mid_push, patience=2.0)
    whole = -(6 + 6 + 2)
    for final in found[servers:-1]:
        assert set(final - whole) <= {0.0, -1024.0}
    assert all(report.lost == (servers + 2,) for report in found[:servers])
    assert f"rank {servers + 2} has been silent for 2 s, the others go on without it" in caplog.text


@pytest.mark.parametrize("servers", [1, 2])
def test_a_slow_worker_that_was_given_up_joins_again_with_its_next_read(servers: int) -> None:
    """Its late push is dropped, the one after counts."""

    def body(comm: Any) -> Any:
        meet = comm.Split(int(comm.rank >= servers), comm.rank)
        ps = ParameterServer(comm, np.zeros(2), scale(-1.0), servers=servers, reduce="sum", patience=1.0)
        if ps.serves:
            return ps.serve()
        for step in range(3):
            ps.pull()
            if comm.rank == servers + 1 and step == 1:
                meet.Barrier()  # the other one has made its step without this worker
            ps.push(np.ones(2))
            if comm.rank == servers and step == 1:
                ps.pull()
                meet.Barrier()
        return ps.leave()

    found = run_on_ranks(servers + 2, body)
    for report in found[:servers]:
        assert (report.lost, report.dropped) == ((), 1)
    assert all((final == -5).all() for final in found[servers:])


def test_a_slow_worker_that_comes_back_too_late_is_told() -> None:
    def body(comm: Any) -> Any:
        meet = comm.Split(int(comm.rank < 2), comm.rank)
        done = comm.Split(0, comm.rank)
        ps = ParameterServer(comm, np.zeros(2), scale(-1.0), reduce="sum", patience=0.5)
        if ps.serves:
            report = ps.serve()
            done.Barrier()
            return report.lost
        ps.pull()
        if comm.rank == 1:
            ps.push(np.ones(2))
            final = ps.leave().tolist()
            done.Barrier()
            return final
        done.Barrier()
        with pytest.raises(HpccommError, match=r"rank 2: this worker was silent for longer than the patience of 0.5 s"):
            ps.push(np.ones(2))
        return meet.rank

    assert run_on_ranks(3, body) == [(2,), [-1.0, -1.0], 0]


def test_calls_that_a_worker_cannot_make_are_refused() -> None:
    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(1), scale(-1.0))
        if ps.serves:
            with pytest.raises(ArgumentError, match=r"rank 0: .*pull: this rank is a server: call serve\(\)"):
                ps.pull()
            return ps.serve()
        with pytest.raises(ArgumentError, match=r"join: this worker takes part: pause\(\) first"):
            ps.join()
        ps.pause()
        for call in (ps.pull, ps.pause, lambda: ps.push(np.zeros(1))):
            with pytest.raises(ArgumentError, match=r"this worker has paused: join\(\) first"):
                call()
        ps.leave()
        with pytest.raises(ArgumentError, match="leave: this worker has left"):
            ps.leave()
        return None

    run_on_ranks(2, body)


def test_a_header_is_32_bytes() -> None:
    assert HEADER.size == 32
    assert len(pack_message(PUSH, 1, 2, np.zeros(5, np.uint8))) == 37


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"servers": 0}, "0 servers of 2 ranks: leave at least one server and one worker"),
        ({"servers": 2}, "2 servers of 2 ranks"),
        ({"mode": "sync"}, "mode is 'sync': pass 'bsp', 'asp', or"),
        ({"mode": ("ssp", -1)}, "mode is .'ssp', -1."),
        ({"mode": "asp", "backup": 1}, "only 'bsp' has backup workers"),
        ({"reduce": "max"}, "reduce is 'max'"),
        ({"patience": 0}, "patience is 0: pass a positive number of seconds"),
        ({"patience": "1"}, "patience is '1': pass a positive number of seconds"),
        ({"codec": Halves()}, "the weights are float64, a codec writes float32"),
    ],
)
def test_impossible_arguments_are_refused_on_every_rank(options: dict[str, Any], message: str) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=message):
            ParameterServer(comm, np.zeros(3), DESCENT, **options)

    run_on_ranks(2, body)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda comm: chain(clip(1.0), DESCENT), "clip in the optimizer needs the whole model, each of 2 servers"),
        (lambda comm: synchronous_sgd(comm, 0.1), r"exchanges gradients itself, .* MPI.COMM_SELF"),
    ],
)
def test_an_optimizer_that_is_wrong_on_a_slice_or_waits_for_workers_is_refused(make: Any, message: str) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=message):
            ParameterServer(comm, np.zeros(3), make(comm), servers=2)

    run_on_ranks(3, body)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [(np.array([1.0, np.nan, 0]), "is not finite: push zeros"), (np.zeros(2), "make them alike")],
)
def test_a_gradient_that_cannot_be_pushed_is_refused_before_any_message(gradient: Vector, message: str) -> None:
    def body(comm: Any) -> Any:
        ps = ParameterServer(comm, np.zeros(3), DESCENT)
        if ps.serves:
            return ps.serve()
        with pytest.raises(ArgumentError, match=message):
            ps.push(gradient)
        return ps.leave()

    report, final = run_on_ranks(2, body)
    assert (report.version, final.tolist()) == (0, [0, 0, 0])


TABLE = Bucket({"w": (2,), "table": (4, 2)})
FEW_ROWS = RowCode(TABLE, ["table"], slice(0, 10))
UNREADABLE: dict[str, tuple[Vector, bool, str]] = {
    "a short header": (np.zeros(5, "u1"), False, "a message of 5 bytes from rank 1 is no message of a parameter"),
    "an unknown request": (pack_message(77, 0, 0, np.zeros(0, "u1")), False, "32 bytes from rank 1 is no message"),
    "a reply to a server": (pack_message(REPLY, 0, 0, np.zeros(0, "u1")), False, "32 bytes from rank 1 is no message"),
    "other weights": (
        pack_message(PUSH, 0, 0, np.zeros(5, "u1")),
        False,
        "rank 0: .*push of rank 1 cannot be read: 5 bytes for 10 elements of float64: pass the same weights",
    ),
    **{
        name: (pack_message(PUSH, 0, 0, message), True, f"push of rank 1 cannot be read: .*{why}.*pass the same bucket")
        for name, message, why in (
            ("no count", np.zeros(3, "u1"), "3 bytes is too short for the rows of 1 tensor in 10 elements"),
            ("too many rows", np.int64([5]).view("u1"), "has 5 rows of 4"),
            ("a negative count", np.int64([-2]).view("u1"), "has -2 rows of 4"),
            ("a row outside", np.concatenate([np.int64([1]).view("u1"), np.uint32([4]).view("u1")]), "not below 4"),
            (
                "rows out of order",
                np.concatenate([np.int64([2]).view("u1"), np.uint32([2, 1]).view("u1")]),
                "rows out of order",
            ),
            ("cut", FEW_ROWS.encode(np.ones(10))[:-1], "is too short"),
            ("more", np.concatenate([FEW_ROWS.encode(np.ones(10)), np.zeros(8, "u1")]), "is too long"),
        )
    },
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_message_that_cannot_be_read_is_named_with_its_rank(name: str) -> None:
    message, by_rows, why = UNREADABLE[name]

    def body(comm: Any) -> None:
        ps = ParameterServer(comm, np.zeros(10), DESCENT, rows=(TABLE, ["table"]) if by_rows else None)
        if not ps.serves:
            return ps.comm.Send(message, 0, TAG)
        with pytest.raises(MismatchError, match=why):
            ps.serve()
        return None

    run_on_ranks(2, body)


def test_a_reply_of_other_weights_is_named_with_its_rank() -> None:
    def body(comm: Any) -> None:
        ps = ParameterServer(comm, np.zeros(10), DESCENT)
        if ps.serves:
            return ps.comm.Send(pack_message(REPLY, 0, 0, np.zeros(7, "u1")), 1, TAG)
        with pytest.raises(MismatchError, match=r"rank 1: .*reply of rank 0 cannot be read: 7 bytes for 10 elements"):
            ps.pull()
        return None

    run_on_ranks(2, body)


# Without servers: the tree and the butterfly on four ranks


def sums_after(name: str, rounds: int) -> list[Vector]:
    """What four ranks hold of x_r[i] = 10(r+1) + i, n = 8, after so many rounds of an allreduce."""
    algorithm = ALGORITHMS["allreduce"][name]

    def body(transport: ThreadTransport) -> Vector:
        vector = 10.0 * (transport.rank + 1) + np.arange(8)
        steps = list(algorithm.steps(transport.rank, 4))[:rounds]
        bind(steps, vector, even_cuts(8, algorithm.blocks(4)), transport, np.add)()
        return vector

    return run_on_threads(4, body)


def test_golden_sums_of_tree_and_butterfly() -> None:
    total = [100.0 + 4 * i for i in range(8)]
    quarters = [sums_after("butterfly", 2)[rank][2 * part : 2 * part + 2] for part, rank in enumerate([0, 2, 1, 3])]
    assert [each.tolist() for each in quarters] == [total[2 * part : 2 * part + 2] for part in range(4)]
    assert sums_after("butterfly", 1)[0][:4].tolist() == [30, 32, 34, 36]
    assert [each.tolist() for each in sums_after("butterfly", 4)] == [total] * 4
    first, _, third, _ = sums_after("tree", 1)
    assert (first[0], third[0]) == (30, 70)
    root, second, third, fourth = sums_after("tree", 2)
    assert (root.tolist(), second[0], third[0], fourth[0]) == (total, 20, 70, 40)
    assert [each.tolist() for each in sums_after("tree", 4)] == [total] * 4


# On MPI


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["bsp", ("ssp", 1), "asp"])
def test_servers_over_mpi(comm: MPI.Intracomm, mode: Any) -> None:
    """Vectors of 300 kB, beyond what is sent without waiting."""
    servers = 1 if comm.size < 4 else 2
    steps = [3 + worker % 2 for worker in range(comm.size - servers)]
    found = train(comm, steps, n=37_000, servers=servers, mode=mode)
    mine = np.concatenate([found.weights if comm.rank < servers else np.zeros(0)])
    everything = comm.allgather(mine if comm.rank < servers else found)
    model = np.concatenate(everything[:servers])
    assert np.isfinite(model).all()
    assert all(np.array_equal(each, model) for each in everything[servers:])


@pytest.mark.mpi(sizes=(3, 4))
def test_workers_pause_and_fail_over_mpi(comm: MPI.Intracomm) -> None:
    """The first worker pauses and joins, the last one fails; vectors of 300 kB."""
    ps = ParameterServer(comm, np.zeros(37_000), scale(-1.0), reduce="sum")
    if ps.serves:
        assert ps.serve().lost == (comm.size - 1,)
        return
    with contextlib.suppress(RuntimeError), ps:
        for step in range(4):
            if comm.rank == 1 and step == 2:
                ps.pause()
                ps.join()
            ps.pull()
            ps.push(np.ones(37_000))
            if comm.rank == comm.size - 1 and step == 1:
                raise RuntimeError
        assert (ps.leave() == -(4 * (comm.size - 2) + 2)).all()
