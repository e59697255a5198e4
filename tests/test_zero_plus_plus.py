"""Quantised gathers and reductions, and secondary shards: bytes between nodes, what is exact, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpccomm import Communicator, context
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.checkpoints import load_shards, save_shards
from hpccomm.algorithms.sharded.groups import mics
from hpccomm.algorithms.sharded.units import ShardedModel, adamw, zero
from hpccomm.algorithms.transforms import scale
from hpccomm.arrays import narrow
from hpccomm.collectives.compressed.two_phase import CODES, decode_blocks, encode_blocks
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.testing.ranks import RankGroup, ThreadCommunicator, run_on_ranks, vector
from hpccomm.train import methods
from hpccomm.train.datasets import digits
from hpccomm.train.layered import LayeredNetwork, Linear, Tanh
from hpccomm.train.loop import Settings
from hpccomm.train.sharded import Training, train

TRIO: dict[str, Any] = {"weight_code": "int8", "gradient_code": "int4", "secondary_shard": True}
SIZES = {"embedding": 21, "one": 25, "gain": 1, "none": 0, "out": 700}
"""Units that no group divides, and one smaller than any group."""
F32 = np.float32


def weights_of(sizes: dict[str, int] = SIZES) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(3)
    return {name: {"w": rng.normal(size=size).astype("f4")} for name, size in sizes.items()}


def run_steps(states: ShardedModel, steps: int = 2, micro_steps: int = 2, first: int = 0) -> list[Any]:
    """The gathered units of every micro-step, and at the end the master weights by unit."""
    order, seen = list(states.units), []
    for step in range(first, first + steps):
        for micro in range(micro_steps):
            for at, unit in enumerate(walk := [*order, *reversed(order)]):
                whole = states.gather(unit, ahead=walk[at + 1] if at + 1 < len(walk) else None)["w"]
                seen.append(whole.copy())
                if at >= len(order):
                    rng = np.random.default_rng((order.index(unit), step, micro, states.groups.world.rank))
                    states.reduce_accumulate(unit, narrow(rng.normal(size=whole.size).astype("f4"), states.dtype))
                states.release(unit)
        states.boundary()
    return [*seen, *(tensors["w"] for _, tensors in states.consolidate())]


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))


# Bytes


class NodeCounter(ThreadCommunicator):
    """Counts the bytes that enter this rank's node on its behalf, each block once for a node where MPI can do so."""

    entered: Counter[str]

    def __init__(self, group: RankGroup, rank: int) -> None:
        super().__init__(group, rank)
        self.entered = group.__dict__.setdefault("entered", [Counter[str]() for _ in range(group.size)])[rank]

    def Split(self, color: int = 0, key: int = 0) -> Any:
        made = super().Split(color, key)
        child = NodeCounter(made.group, made.rank)
        child.entered = self.entered
        return child

    @property
    def away(self) -> int:
        """Ranks on other nodes."""
        nodes = self.group.nodes
        return sum(each != nodes[self.rank] for each in nodes)

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        self.entered["gather"] += vector(sendbuf).nbytes * self.away // Counter(self.group.nodes)[self.node]
        super().Allgather(sendbuf, recvbuf)

    def Alltoall(self, sendbuf: Any, recvbuf: Any) -> None:
        self.entered["reduce"] += vector(sendbuf).nbytes // self.size * self.away
        super().Alltoall(sendbuf, recvbuf)

    @property
    def node(self) -> int:
        return self.group.nodes[self.rank]


def bytes_into_a_node(nodes: int, per_node: int, micro_steps: int, **how: Any) -> Counter[str]:
    """Of one step of ZeRO-3 in float16: gathers and reductions."""
    sizes = {"a": 40_000, "b": 9_000, "c": 64_123}

    def body(rank_comm: Any) -> Counter[str]:
        comm = NodeCounter(rank_comm.group, rank_comm.rank)
        states = zero(comm, weights_of(sizes), scale(-0.1), dtype="f2", **how)
        comm.entered.clear()
        order = [*sizes, *reversed(sizes)]
        for _ in range(micro_steps):
            for at, unit in enumerate(order):
                states.gather(unit)
                if at >= len(sizes):
                    states.reduce_accumulate(unit, np.ones(sizes[unit], "f2"))
                states.release(unit)
        assert np.isfinite(states.total).all()  # all reductions are complete
        found = Counter(comm.entered)
        states.boundary()
        return found

    placement = [rank // per_node for rank in range(nodes * per_node)]
    found = run_on_ranks(nodes * per_node, body, placement)
    total: Counter[str] = sum(found[:per_node], Counter())
    model = 2 * sum(sizes.values()) * (nodes - 1) / nodes
    return Counter({name: each / model for name, each in total.items()})  # type: ignore[misc]


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (3, 2), (2, 4), (4, 1)])
def test_between_nodes_a_quarter_of_zero_3_travels(nodes: int, per_node: int) -> None:
    """In multiples of (n-1)/n of the 16-bit model: 3 for ZeRO-3 (two gathers and a reduction), which two levels
    attain; with all of ZeRO++ at most 0.27 of it, and less with micro-steps, as later gathers stay in the node."""
    plain = bytes_into_a_node(nodes, per_node, 1)
    assert plain["gather"] == pytest.approx(2, rel=1e-3)
    found = bytes_into_a_node(nodes, per_node, 1, **TRIO)
    assert found["gather"] == pytest.approx(CODES["int8"].nbytes(1 << 16) / (1 << 17), rel=2e-3)
    assert found["reduce"] == pytest.approx(CODES["int4"].nbytes(1 << 16) / (1 << 17), rel=2e-3)
    assert found["gather"] + found["reduce"] <= 0.27 * 3
    more = bytes_into_a_node(nodes, per_node, 4, **TRIO)
    assert more["gather"] == found["gather"]
    assert more["gather"] + more["reduce"] <= 0.15 * 12


@pytest.mark.parametrize(
    ("how", "gathers", "reductions"),
    [
        ({"weight_code": "int8"}, 2 * 0.508, None),
        ({"secondary_shard": True}, 1.0, None),
        ({"gradient_code": "int4"}, 2.0, 0.266),
        ({"gradient_code": "int8"}, 2.0, 0.508),
    ],
)
def test_each_of_the_three_saves_its_own_bytes(how: dict[str, Any], gathers: float, reductions: float | None) -> None:
    found = bytes_into_a_node(2, 2, 1, **how)
    assert found["gather"] == pytest.approx(gathers, rel=5e-3)
    if reductions:
        assert found["reduce"] == pytest.approx(reductions, rel=5e-3)


# What is exact

LAYOUTS = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 2], [0, 0, 0], [0]]
DTYPES = [np.dtype("f4"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("nodes", "dtype"), list(zip(LAYOUTS, [*DTYPES, *DTYPES, DTYPES[1]], strict=True)), ids=str)
def test_secondary_shards_change_no_bit(nodes: list[int], dtype: Any) -> None:
    """Of weights or of gathered units, whatever the placement; later gathers of a step are inside the node."""

    def body(comm: Any, secondary_shard: bool) -> list[Any]:
        return run_steps(zero(comm, weights_of(), adamw(0.1), dtype=dtype, secondary_shard=secondary_shard))

    wanted = run_on_ranks(len(nodes), lambda comm: body(comm, False), nodes)[0]
    assert all(same(found, wanted) for found in run_on_ranks(len(nodes), lambda comm: body(comm, True), nodes))


@pytest.mark.parametrize(("nodes", "code"), list(zip(LAYOUTS, [*CODES, "int8", "int4"], strict=True)), ids=str)
def test_gathered_units_are_the_coded_shards_of_the_exact_masters(nodes: list[int], code: str) -> None:
    p = len(nodes)

    def body(comm: Any) -> Any:
        states = zero(comm, weights_of(), scale(-1.0), dtype="f2", weight_code=code)
        return {name: states.gather(name)["w"].copy() for name in list(SIZES)[-1:]}, dict(states.consolidate())

    for gathered, masters in run_on_ranks(p, body, nodes):
        for name, found in gathered.items():
            whole, each = weights_of()[name]["w"], -(-SIZES[name] // p)
            shards = np.concatenate([whole, np.zeros(p * each - whole.size, F32)]).astype("f2").reshape(p, each)
            coded = [decode_blocks(encode_blocks(row.astype(F32), CODES[code]), each, CODES[code]) for row in shards]
            expected = np.concatenate(coded)[: whole.size] if p > 1 else whole
            assert found.tobytes() == expected.astype("f2").tobytes()
            assert masters[name]["w"].tobytes() == whole.tobytes()


def add_codes(rows: list[Any], code: str) -> Any:
    total = np.zeros(rows[0].size, F32)
    for row in rows:
        total += decode_blocks(encode_blocks(row, CODES[code]), row.size, CODES[code])
    return total


@pytest.mark.parametrize("nodes", LAYOUTS[:-1], ids=str)
@pytest.mark.parametrize(("code", "stage"), [("int8", 1), ("mx", 2), ("int4", 3)])
def test_reductions_are_coded_sums_in_nodes_and_then_between_them(nodes: list[int], code: str, stage: int) -> None:
    p, n = len(nodes), 700
    each = -(-n // p)
    gradients = [np.random.default_rng(rank).normal(size=n).astype(F32) for rank in range(p)]
    rows = [np.concatenate([g, np.zeros(p * each - n, F32)]).reshape(p, each) for g in gradients]
    homes = {node: [rank for rank in range(p) if nodes[rank] == node] for node in nodes}
    two_hops = len(homes) > 1 and {len(home) for home in homes.values()} == {2}

    def sum_of(rank: int) -> Any:
        if not two_hops:
            return add_codes([row[rank] for row in rows], code)
        place = homes[nodes[rank]].index(rank)
        peers = sorted(home[place] for home in homes.values())
        inside = [add_codes([rows[other][peers].reshape(-1) for other in homes[nodes[peer]]], code) for peer in peers]
        return add_codes([part.reshape(-1, each)[peers.index(rank)] for part in inside], code)

    def body(comm: Any) -> Any:
        states = zero(comm, {"a": {"w": np.zeros(n, F32)}}, scale(-1.0), stage=stage, gradient_code=code)
        states.reduce_accumulate("a", gradients[comm.rank])
        states.boundary()
        return states.master

    whole = np.concatenate([sum_of(rank) for rank in range(p)])[:n] / F32(p)
    for rank, found in enumerate(run_on_ranks(p, body, nodes)):
        assert np.array_equal(found, -whole[rank * each : (rank + 1) * each])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("culprit", "bad"), [(0, np.nan), (3, np.inf)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(code: str, culprit: int, bad: float) -> None:
    def body(comm: Any) -> Any:
        states = zero(
            comm, weights_of(), scale(-1.0), dtype="f2", loss_scale=LossScale(8.0, 9), **{**TRIO, "gradient_code": code}
        )
        for name, size in SIZES.items():
            gradient = np.ones(size, "f2")
            if name == "out" and comm.rank == culprit:
                gradient[699] = bad
            states.reduce_accumulate(name, gradient)
        return states.boundary()[1:], dict(states.consolidate())["out"]["w"]

    for outcome, weights in run_on_ranks(4, body, [0, 0, 1, 1]):
        assert outcome == (True, 4.0)
        assert weights.tobytes() == weights_of()["out"]["w"].tobytes()


def test_a_saved_run_continues_with_the_same_bits_and_on_other_ranks_from_the_same_weights(tmp_path: Path) -> None:
    def whole(comm: Any) -> list[Any]:
        states = zero(comm, weights_of(), adamw(0.1), dtype="f2", **TRIO)
        run_steps(states)
        save_shards(tmp_path, "run", states)
        return run_steps(states, first=2)

    def resume(comm: Any) -> list[Any]:
        states = zero(comm, weights_of(), adamw(0.1), dtype="f2", **TRIO)
        run_steps(states, 1, first=9)  # gathered shards of other weights lie in the nodes
        load_shards(tmp_path, "run", states)
        return run_steps(states, first=2)

    wanted = run_on_ranks(4, whole, [0, 0, 1, 1])
    assert all(same(found, wanted[0]) for found in wanted)
    assert all(same(found, wanted[0]) for found in run_on_ranks(4, resume, [0, 0, 1, 1]))

    def masters(comm: Any) -> list[Any]:
        states = zero(comm, weights_of(), adamw(0.1), dtype="f2", **TRIO)
        load_shards(tmp_path, "run", states)
        return [tensors["w"] for _, tensors in states.consolidate()]

    kept = run_on_ranks(4, masters, [0, 0, 1, 1])[0]
    for nodes in ([0], [0, 1], [0, 0, 1], [0, 0, 1, 1, 2, 2]):
        assert all(same(found, kept) for found in run_on_ranks(len(nodes), masters, nodes))


@pytest.mark.mpi(sizes=(3, 4))
def test_processes_take_the_steps_of_threads(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(channel.rank // 2, channel.rank))
    nodes = Communicator(comm.Dup())
    states = zero(nodes, weights_of(), adamw(0.1), dtype="f2", **TRIO)
    found = run_steps(states)
    states.close()
    if comm.rank == 0:
        make = lambda each: zero(each, weights_of(), adamw(0.1), dtype="f2", **TRIO)  # noqa: E731
        placement = [rank // 2 for rank in range(comm.size)]
        assert same(found, run_on_ranks(comm.size, lambda each: run_steps(make(each)), placement)[0])
    assert same(found, comm.bcast(found))
    nodes.Free()


# Training


@pytest.mark.slow
def test_digits_are_learnt_as_well() -> None:
    """Accuracy over three seeds: the mean of ZeRO++ lies within the spread of the seeds."""
    data = digits(640)
    network = LayeredNetwork({"first": Tanh(64, 64), "scores": Linear(64, 10)})

    def accuracy(seed: int, **how: Any) -> float:
        def body(comm: Any) -> float:
            made = mics(comm, network.initial_weights(seed), adamw(1e-2), 4, dtype="f2", **how)
            return train(Training(comm, data, network, made, Settings(6, 64, seed), 1))[-1].accuracy

        return run_on_ranks(4, body, [0, 0, 1, 1])[0]

    plain = [accuracy(seed) for seed in range(3)]
    coded = [accuracy(seed, **TRIO) for seed in range(3)]
    assert np.mean(coded) > np.mean(plain) - max(np.ptp(plain), 0.01)
    assert min(coded) > 0.9


# What is refused


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"weight_code": "int3"}, "zero: weight_code is 'int3': pass one of None, 'int8'"),
        ({"gradient_code": "fp8"}, "zero: gradient_code is 'fp8': pass one of"),
        ({"weight_code": "int8", "stage": 2}, "weight_code at stage 2, .*: pass stage=3"),
        ({**TRIO, "stage": 1}, "weight_code and secondary_shard at stage 1"),
        ({"gradient_code": "int8", "units": {"a": {"w": np.zeros(3)}}}, "float64 travels: pass dtype float32"),
    ],
)
def test_codes_that_do_not_fit_are_refused(how: dict[str, Any], why: str) -> None:
    given = {"units": weights_of(), **how}

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            zero(comm, optimizer=scale(-1.0), **given)

    run_on_ranks(2, body)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weight_code", ("int8", None)),
        ("gradient_code", ("int8", "int4")),
        ("secondary_shard", (False, True)),
        ("dtype", ("f4", "f2")),
        ("stage", (3, 2)),
    ],
)
def test_ranks_that_disagree_are_told_on_all_ranks(name: str, values: tuple[Any, Any]) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(MismatchError, match=f"{name} is .* on rank 0, .* on rank 2: pass the same"):
            zero(comm, weights_of(), scale(-1.0), **{name: values[comm.rank == 2]})

    run_on_ranks(3, body)


def test_the_flags_of_the_command_line_offer_the_codes() -> None:
    assert set(methods.CODES) == set(CODES)
    users = {flag: methods.find_users(flag) for flag in ("weight_code", "gradient_code", "secondary_shard")}
    assert users["gradient_code"] == ["mics", "zero1", "zero2", "zero3"]
    assert users["weight_code"] == users["secondary_shard"] == ["mics", "zero3"]
