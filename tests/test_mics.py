"""Model states divided over ranks: the golden step, data parallelism for every group, bytes of each hop, mistakes."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from thread_ranks import Mailboxes, ThreadTransport

from hpccomm import Communicator, context
from hpccomm.algorithms.blockwise_filtering import bmuf
from hpccomm.algorithms.exchange import mean, synchronous_sgd
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.algorithms.loss_scaling import LossScale, scale_loss
from hpccomm.algorithms.onebit import onebit_adam
from hpccomm.algorithms.power_sgd import powersgd
from hpccomm.algorithms.sharded import units as units_module
from hpccomm.algorithms.sharded.groups import (
    check_placement,
    mics,
    partition_groups,
    ranks_per_node,
    smallest_partition,
)
from hpccomm.algorithms.sharded.units import ShardedModel, adamw, data_parallel, zero
from hpccomm.algorithms.threshold_compression import gtc
from hpccomm.algorithms.transforms import adam, apply_if_finite, chain, clip, every, momentum, scale, weight_decay
from hpccomm.algorithms.trust_ratio import add_decayed_weights, scale_by_global_norm, scale_by_trust_ratio
from hpccomm.buckets import Bucket
from hpccomm.collectives import ring
from hpccomm.collectives.engine import bind, even_cuts
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.testing.ranks import RankGroup, ThreadCommunicator, run_on_ranks, vector

GOLDEN = (
    ([1, 2, 3, 4, 5, 6, 7, 8], [3, 2, 1, 0, -1, -2, -3, -4]),
    ([1, 0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, -1, -1, -1, -1]),
    ([0, 4, 0, 4, 0, 4, 0, 4], [2, 2, 2, 2, 2, 2, 2, 2]),
    ([4, 0, 0, 0, 0, 0, 0, 4], [-2, -2, -2, -2, 6, 6, 6, 6]),
)
"""Gradients of four ranks in two micro-steps."""

LAYERS = {
    "embedding": {"table": (7, 3)},
    "one": {"w": (5, 4), "b": (5,)},
    "gain": {"scale": (1,)},
    "out": {"w": (3, 5), "b": (3,), "zeros": (2, 2)},
}
"""Units of 21, 25, 1 and 22 elements: no group divides them all, and the third is smaller than any."""


def first_weights(dtype: str = "f4") -> dict[str, dict[str, Any]]:
    """Distinct weights, a tensor of zeros among them."""
    rng = np.random.default_rng(5)
    draw = {
        unit: {name: rng.standard_normal(shape).astype(dtype) for name, shape in tensors.items()}
        for unit, tensors in LAYERS.items()
    }
    draw["out"]["zeros"][...] = 0
    return draw


def gradient(unit: str, step: int, micro: int, rank: int, dtype: Any = "f4") -> dict[str, Any]:
    """What a rank measures, at any weights: sixteenths, so that float32 adds them exactly in any order."""
    rng = np.random.default_rng((list(LAYERS).index(unit), step, micro, rank))
    return {name: (rng.integers(-32, 33, shape) / 16).astype(dtype) for name, shape in LAYERS[unit].items()}


def run_steps(states: ShardedModel, rank: int, micro_steps: int, steps: int = 3, dtype: Any = "f4") -> dict[str, Any]:
    """The weights by name after some steps; every unit goes forward and backward as in a network."""
    order = list(LAYERS)
    for step in range(steps):
        for micro in range(micro_steps):
            walk = [*order, *reversed(order)]
            for at, unit in enumerate(walk):
                states.gather(unit, ahead=walk[at + 1] if at + 1 < len(walk) else None)
                if at >= len(order):
                    states.reduce_accumulate(unit, gradient(unit, step, micro, rank, dtype))
                states.release(unit)
        states.boundary()
    weights = {f"{unit}.{name}": w.copy() for unit, tensors in states.consolidate() for name, w in tensors.items()}
    states.close()
    return weights


def nodes_of(ranks: int, partition: int) -> list[int]:
    """Nodes of as many ranks as a group has, so that none straddles."""
    return [rank // partition for rank in range(ranks)]


# The golden step


def run_golden(states: ShardedModel, rank: int) -> list[float]:
    """Two micro-steps and the boundary."""
    for micro in GOLDEN[rank]:
        states.reduce_accumulate("all", np.array(micro, "f4"))
    states.boundary()
    ((_, tensors),) = states.consolidate()
    return tensors["w"].tolist()


EIGHT = {"all": {"w": np.arange(1, 9, dtype="f4")}}


def test_golden_step() -> None:
    def accumulate(comm: Any) -> tuple[list[float], list[list[float]]]:
        states = mics(comm, EIGHT, scale(-0.5), 2)
        shards = []
        for micro in GOLDEN[comm.rank]:
            states.reduce_accumulate("all", np.array(micro, "f4"))
            shards.append((states.total / 2).tolist())
        states.boundary()
        return next(iter(states.consolidate()))[1]["w"].tolist(), shards

    found = run_on_ranks(4, accumulate, [0, 0, 1, 1])
    assert [weights for weights, _ in found] == [[0.375, 1.4375, 2.625, 3.4375, 4.25, 5.0625, 6.25, 6.8125]] * 4
    assert [shards for _, shards in found] == [
        [[1, 1, 2, 2], [3, 2.5, 3, 2.5]],
        [[3, 3, 4, 4], [2, 1.5, 2, 1.5]],
        [[2, 2, 0, 2], [2, 2, 0, 2]],
        [[0, 2, 0, 4], [4, 6, 4, 8]],
    ]


def test_a_second_hop_in_every_micro_step_gives_another_result() -> None:
    def wrong(comm: Any) -> list[float]:
        states = mics(comm, EIGHT, scale(-0.5), 2)
        for micro in GOLDEN[comm.rank]:
            states.reduce_accumulate("all", np.array(micro, "f4"))
            states._allreduce_shards(states.total)
        return (states.total / (2 * 2 * 2)).tolist()

    assert run_on_ranks(4, wrong, [0, 0, 1, 1])[0] == [2, 1.875, 1.25, 2.125]


def test_a_second_hop_of_the_newest_shards_only_gives_another_result() -> None:
    """Other copies' earlier micro-steps are lost."""

    def wrong(comm: Any) -> list[float]:
        states = mics(comm, EIGHT, scale(-0.5), 2)
        states.reduce_accumulate("all", np.array(GOLDEN[comm.rank][0], "f4"))
        earlier = states.total.copy()
        states.total[...] = 0
        states.reduce_accumulate("all", np.array(GOLDEN[comm.rank][1], "f4"))
        states._allreduce_shards(states.total)
        return ((earlier + states.total) / (2 * 2 * 2)).tolist()

    right = [[1.25, 1.125, 0.75, 1.125], [1.5, 1.875, 1.5, 2.375]]
    found = run_on_ranks(4, wrong, [0, 0, 1, 1])
    assert found[0] != right[0] != found[2]
    assert found[0] != found[2]


def test_a_norm_over_all_ranks_counts_every_copy() -> None:
    """Two copies: 2 too many under the root."""

    def norm(comm: Any, world: bool) -> float:
        states = mics(comm, EIGHT, scale(-0.5), 2)
        for micro in GOLDEN[comm.rank]:
            states.reduce_accumulate("all", np.array(micro, "f4"))
        if world:
            states._sum_over_partition = lambda table: sum(comm.allgather(table))  # type: ignore[method-assign]
        return states.boundary().norm

    right, wrong = (run_on_ranks(4, lambda comm, w=w: norm(comm, w), [0, 0, 1, 1])[0] for w in (False, True))
    assert wrong == pytest.approx(right * np.sqrt(2))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_trust_ratio_of_a_shard_gives_another_result(name: str) -> None:
    kinds = {"lamb": lamb, "lars": lars}

    def body(comm: Any, whole: bool) -> dict[str, Any]:
        right = OPTIMIZERS[name]
        flat = lambda bucket: Bucket({"flat": (bucket.size,)})  # noqa: E731
        wrong = lambda bucket, reduce: kinds[name](flat(bucket), 0.1, norm_reduce=np.copy)  # noqa: E731
        return run_steps(mics(comm, first_weights(), right if whole else wrong, 2), comm.rank, 1, 1)

    right, wrong = (run_on_ranks(4, lambda comm, w=w: body(comm, w), [0, 0, 1, 1])[0] for w in (True, False))
    assert not np.allclose(right["one.w"], wrong["one.w"], rtol=1e-3)


@pytest.mark.parametrize("partition", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_golden_step_for_every_group_and_stage(partition: int, stage: int) -> None:
    made = run_on_ranks(
        4,
        lambda comm: run_golden(mics(comm, EIGHT, scale(-0.5), partition, stage=stage), comm.rank),
        nodes_of(4, partition),
    )
    assert made == [[0.375, 1.4375, 2.625, 3.4375, 4.25, 5.0625, 6.25, 6.8125]] * 4


# Identities

OPTIMIZERS: dict[str, Any] = {
    "sgd": scale(-0.1),
    "momentum": chain(momentum(0.9), scale(-0.1)),
    "adam": chain(adam(eps=0.1), scale(-0.1)),
    "adamw": adamw(0.1, eps=0.1, weight_decay=0.01),
    "lars": lambda bucket, reduce: lars(bucket, 0.1, trust=0.02, weight_decay=0.01, norm_reduce=reduce),
    "lamb": lambda bucket, reduce: lamb(bucket, 0.1, eps=0.1, norm_reduce=reduce, adapt="flags"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro_steps", [1, 2, 4])
def test_every_group_takes_the_steps_of_data_parallelism(name: str, micro_steps: int) -> None:
    """fp32, rtol 1e-6 (the sums are exact; norms are summed in another order); the same bits on all ranks."""

    def run(ranks: int, make: Callable[[Any], ShardedModel], nodes: list[int] | None = None) -> dict[str, Any]:
        found = run_on_ranks(ranks, lambda comm: run_steps(make(comm), comm.rank, micro_steps), nodes)
        for other in found[1:]:
            assert all(other[tensor].tobytes() == found[0][tensor].tobytes() for tensor in other)
        return found[0]

    optimizer = OPTIMIZERS[name]
    for ranks, partitions in ((3, [1, 3]), (4, [1, 2, 4])) if micro_steps < 4 else ((4, [2]),):
        wanted = run(ranks, lambda comm: data_parallel(comm, first_weights(), optimizer))
        made = [lambda comm, p=p: mics(comm, first_weights(), optimizer, p) for p in partitions]
        stages = (1, 2, 3) if ranks == 4 else (3,)
        made += [lambda comm, stage=stage: zero(comm, first_weights(), optimizer, stage=stage) for stage in stages]
        for number, make in enumerate(made):
            found = run(ranks, make, nodes_of(ranks, partitions[number]) if number < len(partitions) else None)
            for tensor, values in wanted.items():
                assert np.allclose(found[tensor], values, rtol=1e-6, atol=1e-7), (name, ranks, number, tensor)


DESCENT = scale(-0.1)
WHOLE = "needs the whole model, each of . ranks holds a shard: "


def alone(comm: Any) -> Any:
    """A communicator of this rank only: threads may not share ``COMM_SELF``."""
    return comm.Split(comm.rank)


ON_SHARDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "max_norm": (lambda comm: DESCENT, {"max_norm": 0.5}, ""),
    "clip": (lambda comm: chain(clip(0.5), DESCENT), {}, f"clip in .* {WHOLE}leave it out, and pass max_norm="),
    "clip inside": (lambda comm: every(2, apply_if_finite(chain(adam(), clip(0.5), DESCENT))), {}, "pass max_norm="),
    "clip of a function": (lambda comm: lambda bucket, reduce: chain(clip(0.5), DESCENT), {}, "pass max_norm="),
    "global norm": (lambda comm: chain(scale_by_global_norm("clip", 0.5), DESCENT), {}, "pass lambda bucket, reduce"),
    "global norm, reduced": (
        lambda comm: lambda bucket, reduce: chain(scale_by_global_norm("normalise", 1.0, reduce), DESCENT),
        {},
        "",
    ),
    "no norm": (lambda comm: chain(scale_by_global_norm("none"), DESCENT), {}, ""),
    "lamb": (lambda comm: lambda bucket, reduce: lamb(bucket, 0.1, norm_reduce=reduce), {}, ""),
    "lamb, not reduced": (
        lambda comm: lambda bucket, reduce: lamb(bucket, 0.1),
        {},
        "scale_by_trust_ratio in .*reduce",
    ),
    "lars, not reduced": (
        lambda comm: lambda bucket, reduce: lars(bucket, 0.1),
        {},
        "scale_by_trust_ratio in .*reduce",
    ),
    "lamb that adapts nothing": (lambda comm: lambda bucket, reduce: lamb(bucket, 0.1, adapt=()), {}, ""),
    "decay of matrices": (
        lambda comm: lambda bucket, reduce: chain(weight_decay(0.1, bucket.mask("decay")), DESCENT),
        {},
        "",
    ),
    "a mask of the whole": (
        lambda comm: chain(weight_decay(0.1, np.ones(69, bool)), DESCENT),
        {},
        r"weight_decay: the mask has shape \(69,\), the weights .* lambda bucket, reduce",
    ),
    "loss scale": (lambda comm: DESCENT, {"loss_scale": LossScale(8.0, 2)}, ""),
    "scale_loss": (lambda comm: scale_loss(alone(comm), DESCENT), {}, "scale_loss in .* pass loss_scale="),
    "scale_loss after clip": (
        lambda comm: chain(clip(9.0), scale_loss(alone(comm), DESCENT, LossScale(1.0))),
        {},
        "(scale_loss|clip) in .* pass (loss_scale|max_norm)=",
    ),
    "a trust ratio of clip": (
        lambda comm: (
            lambda bucket, reduce: chain(
                scale_by_trust_ratio(
                    bucket, chain(add_decayed_weights(0.1, bucket), clip(0.5), momentum(0.9)), norm_reduce=reduce
                ),
                DESCENT,
            )
        ),
        {},
        f"clip in .* {WHOLE}leave it out, and pass max_norm=",
    ),
    "gtc alone": (lambda comm: chain(gtc(alone(comm)), DESCENT), {}, "threshold.* leave it out"),
    "onebit_adam": (lambda comm: onebit_adam(alone(comm), 0.1, 1), {}, "onebit_adam in .* leave it out"),
    "powersgd": (
        lambda comm: lambda bucket, reduce: chain(powersgd(alone(comm), bucket), DESCENT),
        {},
        "powersgd in .* leave it out",
    ),
    "every": (lambda comm: every(2, chain(momentum(0.9), DESCENT)), {}, ""),
    "local": (lambda comm: synchronous_sgd(alone(comm), 0.1, momentum=0.9), {}, ""),
}
"""An optimizer, arguments beside it, and why it is refused where ranks hold shards."""


@pytest.mark.parametrize("name", ON_SHARDS)
def test_an_optimizer_takes_the_same_steps_on_shards_of_any_size_or_is_refused(name: str) -> None:
    """float32, rtol 1e-6: norms are summed in another order."""
    make, arguments, why = ON_SHARDS[name]

    def body(comm: Any, partition: int) -> dict[str, Any] | None:
        def states() -> ShardedModel:
            return mics(comm, first_weights(), make(comm), partition, **arguments)

        if why and (partition > 1 or "scale_loss" in name):
            with pytest.raises(ArgumentError, match=why):
                states()
            return None
        return run_steps(states(), comm.rank, 1)

    whole, *shards = (run_on_ranks(4, lambda comm, p=p: body(comm, p), nodes_of(4, p))[0] for p in (1, 2, 4))
    assert bool(whole) == ("scale_loss" not in name), "the overflows that halve its factor never reach it"
    for found in shards:
        assert bool(why) == (found is None)
        assert all(np.allclose(found[tensor], (whole or {})[tensor], rtol=1e-6, atol=1e-7) for tensor in found or ())


@pytest.mark.parametrize("name", ["partition_size", "hierarchical"])
def test_ranks_that_pass_mics_other_arguments_are_told_on_all_ranks(name: str) -> None:
    """One with another partition size would wait in a group that the others do not share."""

    def body(comm: Any) -> None:
        values = {"partition_size": (2, 1), "hierarchical": (True, False)}[name]
        with pytest.raises(MismatchError, match=f"mics: {name} is .* on rank 0, .* on rank 3: pass the same"):
            mics(comm, first_weights(), DESCENT, **{"partition_size": 2, name: values[comm.rank == 3]})

    run_on_ranks(4, body)


REFUSED_BY_SOME: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "lars, no tensor adapts on rank 1": (
        {"w": np.ones((2, 2), "f4"), "b": np.ones(4, "f4")},
        lambda comm: lambda bucket, reduce: lars(bucket, 0.1),
        f"scale_by_trust_ratio in .* {WHOLE}pass lambda bucket, reduce",
    ),
    "lars, no tensor adapts on rank 0": (
        {"b": np.ones(4, "f4"), "w": np.ones((2, 2), "f4")},
        lambda comm: lambda bucket, reduce: lars(bucket, 0.1),
        f"scale_by_trust_ratio in .* {WHOLE}pass lambda bucket, reduce",
    ),
    "lamb, an empty shard": (
        {"w": np.ones(1, "f4")},
        lambda comm: lambda bucket, reduce: lamb(bucket, 0.1),
        f"scale_by_trust_ratio in .* {WHOLE}pass lambda bucket, reduce",
    ),
    "a mask that fits one shard": (
        {"w": np.ones(3, "f4")},
        lambda comm: chain(weight_decay(0.1, np.ones(2, bool)), DESCENT),
        r"zero: rank 1: weight_decay: the mask has shape \(2,\), the weights \(1,\)",
    ),
    "a function that fails on one rank": (
        {"w": np.ones(3, "f4")},
        lambda comm: lambda bucket, reduce: [DESCENT][comm.rank],
        "zero: rank 1: list index out of range",
    ),
    "scale_loss of all ranks": (
        {"w": np.ones(4, "f4")},
        lambda comm: scale_loss(comm, DESCENT),
        f"scale_loss in .* {WHOLE}leave it out, and pass loss_scale=",
    ),
    "clip after an exchange": (
        {"w": np.ones(4, "f4")},
        lambda comm: chain(mean(comm), clip(0.5), DESCENT),
        f"clip in .* {WHOLE}leave it out, and pass max_norm=",
    ),
}
"""A unit, an optimizer that the shards of one rank or of both refuse, and what both ranks hear."""


@pytest.mark.parametrize("name", REFUSED_BY_SOME)
def test_an_optimizer_that_one_rank_refuses_is_refused_on_all(name: str) -> None:
    unit, make, why = REFUSED_BY_SOME[name]
    check_refused(lambda comm: mics(comm, {"unit": unit}, make(comm), 2), why)


def test_a_loss_scale_of_all_ranks_is_refused_beside_a_whole_model() -> None:
    """The boundary would skip the steps that halve its factor."""
    check_refused(
        lambda comm: data_parallel(comm, first_weights(), scale_loss(comm, DESCENT)),
        "in place of scale_loss pass loss_scale= beside the optimizer",
    )


@pytest.mark.parametrize("partition", [1, 2])
@pytest.mark.parametrize("exchange", [mean, gtc, lambda comm: bmuf(comm, DESCENT, 2)])
def test_an_optimizer_that_exchanges_gradients_itself_is_refused(exchange: Any, partition: int) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(
            ArgumentError, match=r"the optimizer exchanges gradients itself, .*: leave the exchange out"
        ):
            mics(comm, first_weights(), chain(exchange(comm), DESCENT), partition)

    run_on_ranks(2, body)


def test_data_parallelism_takes_the_steps_of_one_rank_with_all_gradients() -> None:
    """An oracle without groups: the mean gradient, written out."""
    ranks, micro_steps, steps = 3, 2, 2
    weights = {f"{unit}.{name}": w for unit, tensors in first_weights().items() for name, w in tensors.items()}
    for step in range(steps):
        for unit, tensors in LAYERS.items():
            parts = [gradient(unit, step, micro, rank) for micro in range(micro_steps) for rank in range(ranks)]
            for name in tensors:
                total = sum(part[name] for part in parts)
                weights[f"{unit}.{name}"] = weights[f"{unit}.{name}"] - np.float32(0.5) * (total / np.float32(6))
    for partition in (1, 3):
        found = run_on_ranks(
            ranks,
            lambda comm, p=partition: run_steps(mics(comm, first_weights(), scale(-0.5), p), comm.rank, 2, steps),
            nodes_of(3, partition),
        )
        assert all(found[0][tensor].tobytes() == weights[tensor].tobytes() for tensor in weights)


# Overlap

OVERLAPS: dict[str, dict[str, Any]] = {"MiCS": {"partition": 2}, "ZeRO-3": {"partition": 4}, "DDP": {"partition": 1},
                                       "ZeRO-1": {"partition": 4, "stage": 1}, "ZeRO-2": {"partition": 2, "stage": 2},
                                       "16 bits": {"partition": 2, "dtype": "f2"}}  # fmt: skip


def run_overlapped(comm: Any, partition: int, last: bool, prefetch: int = 1, overlap: bool = True, **how: Any) -> Any:
    """The weights after three steps of two micro-steps."""
    states = mics(comm, first_weights(), OPTIMIZERS["lamb"], partition, prefetch=prefetch, overlap=overlap, **how)
    order, dtype = list(LAYERS), how.get("dtype", "f4")
    for step in range(3):
        for micro in range(2):
            walk = [*order, *reversed(order)]
            for at, unit in enumerate(walk):
                states.gather(unit, ahead=walk[at + 1 : at + 1 + prefetch])
                states.release(unit)
                if at >= len(order):
                    given = gradient(unit, step, micro, comm.rank, dtype)
                    room = states.gradient(unit) if (at + step) % 2 else given
                    for name, each in given.items():
                        room[name][...] = each
                    states.reduce_accumulate(unit, room, last=last and micro == 1)
        states.boundary()
    weights = {f"{unit}.{name}": w.tobytes() for unit, tensors in states.consolidate() for name, w in tensors.items()}
    hops = states.hops
    states.close()
    return weights, [(each.exchanges, each.wire_bytes) for each in hops]


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("limit", [100, 1 << 20])
def test_overlapped_hops_give_the_bits_of_hops_in_turn(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of units ahead, and whether second hops begin early; in one message or in several."""
    monkeypatch.setattr(units_module, "BUCKET_BYTES", limit)
    how = OVERLAPS[name]
    nodes = nodes_of(4, how["partition"])
    wanted = run_on_ranks(4, lambda comm: run_overlapped(comm, last=False, overlap=False, **how), nodes)
    for last, prefetch in ((False, 1), (True, 1), (True, 3), (True, 0)):
        found = run_on_ranks(4, lambda comm, a=last, b=prefetch: run_overlapped(comm, last=a, prefetch=b, **how), nodes)
        assert found == wanted, (last, prefetch)


@pytest.mark.mpi(sizes=(4,))
def test_processes_with_overlapped_hops_take_the_steps_of_threads(comm: Communicator) -> None:
    for how in ({"partition": 2}, {"partition": 4, "dtype": "bfloat16"}):
        how["dtype"] = np.dtype(getattr(ml_dtypes, str(how.get("dtype")), "f4"))
        wanted = run_on_ranks(4, lambda each, h=how: run_overlapped(each, last=False, overlap=False, **h))
        assert run_overlapped(comm, last=True, prefetch=2, **how) == wanted[comm.rank]


def test_second_hops_begin_before_the_boundary_from_the_last_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit without its last gradient holds those before it back: all ranks send in one order."""
    monkeypatch.setattr(units_module, "BUCKET_BYTES", 1)

    def body(comm: Any) -> None:
        states = data_parallel(comm, first_weights(), scale(-1.0))
        begun = []
        for unit in ("gain", "out", "one", "embedding"):
            states.reduce_accumulate(unit, gradient(unit, 0, 0, comm.rank), last=True)
            begun.append(len(states._second))
        assert begun == [0, 2, 3, 4]
        with pytest.raises(ArgumentError, match="'out' had its last gradient: call boundary first"):
            states.reduce_accumulate("out", gradient("out", 0, 0, comm.rank))
        states.boundary()
        states.reduce_accumulate("out", gradient("out", 0, 0, comm.rank))
        assert not states._second
        states.close()

    run_on_ranks(3, body)


def test_units_ahead_fill_the_buffers_and_those_in_vain_give_way() -> None:
    def body(comm: Any) -> None:
        states = zero(comm, first_weights(), scale(-1.0), prefetch=2)
        states.gather("embedding", ahead=["one", "gain", "out"])
        assert [each.unit.name for each in states.buffers] == ["embedding", "one", "gain"]
        states.release("embedding")
        assert {each.unit.name for each in states.buffers} == {"out", "one", "gain"}
        assert states.gather("embedding")["table"].tolist() == first_weights()["embedding"]["table"].tolist()
        assert states.gather("gain")["scale"].tolist() == first_weights()["gain"]["scale"].tolist()
        for unit in ("embedding", "gain"):
            states.release(unit)
        states.close()

    run_on_ranks(2, body)
    with pytest.raises(ArgumentError, match="prefetch is -1"):
        run_on_ranks(2, lambda comm: zero(comm, first_weights(), scale(-1.0), prefetch=-1))


# Tied weights

TIED_SHAPES = {
    "embedding": {"table": (7, 3), "norm": (3,)},
    "middle": {"w": (3, 3), "same": (3, 3)},
    "empty": {"table": (7, 3)},
    "out": {"b": (7,), "table": (7, 3), "w": (3, 3)},
}


def tied_weights() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(6)
    made = {
        unit: {name: rng.standard_normal(shape).astype("f4") for name, shape in tensors.items()}
        for unit, tensors in TIED_SHAPES.items()
    }
    made["middle"]["same"] = made["middle"]["w"]
    made["empty"]["table"] = made["out"]["table"] = made["embedding"]["table"]
    made["out"]["w"] = made["middle"]["w"]
    return made


def tied_gradient(unit: str, step: int, micro: int, rank: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng((list(TIED_SHAPES).index(unit), step, micro, rank))
    return {name: (rng.integers(-32, 33, shape) / 16).astype(dtype) for name, shape in TIED_SHAPES[unit].items()}


def run_tied(comm: Any, partition: int, overlap: bool, dtype: Any = "f4", **how: Any) -> dict[str, Any]:
    """The weights after three steps of two micro-steps; every gathered tensor is that of the master weights."""
    kind = np.dtype(dtype)
    states = mics(comm, tied_weights(), OPTIMIZERS["momentum"], partition, dtype=kind, overlap=overlap, **how)
    assert sum(unit.size for unit in states.units.values()) == 21 + 3 + 9 + 7
    order = list(TIED_SHAPES)
    for step in range(3):
        known = {name: {each: w.copy() for each, w in tensors.items()} for name, tensors in states.consolidate()}
        for micro in range(2):
            walk = order if (step + micro) % 2 else order[::-1]
            for at, unit in enumerate(walk):
                gathered = states.gather(unit, ahead=walk[at + 1 :])
                assert gathered.keys() == known[unit].keys()
                assert all((w == known[unit][name].astype(kind)).all() for name, w in gathered.items())
                states.release(unit)
                room, given = states.gradient(unit), tied_gradient(unit, step, micro, comm.rank, kind)
                for name, each in given.items():
                    room[name][...] = each
                states.reduce_accumulate(unit, room if step else given, last=micro == 1)
        states.boundary()
    weights = {f"{unit}.{name}": w.copy() for unit, tensors in states.consolidate() for name, w in tensors.items()}
    states.close()
    return weights


def run_tied_by_hand(ranks: int) -> dict[str, Any]:
    """The mean of the summed gradients, written out."""
    weights = {f"{unit}.{name}": w.copy() for unit, tensors in tied_weights().items() for name, w in tensors.items()}
    same = {"embedding.table": ["empty.table", "out.table"], "middle.w": ["middle.same", "out.w"],
            "embedding.norm": [], "out.b": []}  # fmt: skip
    for first, others in same.items():
        velocity = np.zeros_like(weights[first])
        for step in range(3):
            total = np.zeros_like(velocity)
            for each in (first, *others):
                unit, name = each.split(".")
                total += sum(tied_gradient(unit, step, m, rank, "f4")[name] for m in range(2) for rank in range(ranks))
            velocity = 0.9 * velocity + total / np.float32(2 * ranks)
            weights[first] = weights[first] + velocity * -0.1
        weights |= dict.fromkeys(others, weights[first])
    return weights


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("partition", [1, 2, 4])
def test_tied_weights_are_kept_once_and_get_the_sum_of_their_gradients(partition: int, stage: int) -> None:
    wanted = run_tied_by_hand(4)
    nodes = nodes_of(4, partition)
    for overlap, prefetch in ((False, 0), (True, 1), (True, 3)):
        run = lambda comm, o=overlap, k=prefetch: run_tied(comm, partition, o, stage=stage, prefetch=k)  # noqa: E731
        for found in run_on_ranks(4, run, nodes):
            assert found.keys() == wanted.keys()
            assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted), (overlap, prefetch)


def test_tied_weights_in_16_bits_and_in_processes_give_the_bits_of_threads() -> None:
    one, two = (run_on_ranks(2, lambda comm, o=o: run_tied(comm, 2, o, "f2")) for o in (False, True))
    assert all(one[rank][name].tobytes() == two[rank][name].tobytes() for rank in range(2) for name in one[0])


@pytest.mark.mpi(sizes=(2,))
def test_processes_train_tied_weights(comm: Communicator) -> None:
    wanted = run_tied_by_hand(2)
    found = run_tied(comm, 2, True, prefetch=2)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_mistakes_with_tied_weights_are_named_and_memory_that_is_used_again_ties_nothing() -> None:
    def stream() -> Any:
        for name in "abcdef":
            yield name, {"w": np.full(1000, ord(name), "f4")}  # as a rule in the place of the last one

    def body(comm: Any) -> None:
        streamed = zero(comm, stream(), scale(-1.0))
        assert [unit.size for unit in streamed.units.values()] == [1000] * 6
        assert [tensors["w"][0] for _, tensors in streamed.consolidate()] == list(map(ord, "abcdef"))
        streamed.close()
        states = zero(comm, tied_weights(), scale(-1.0))
        given = tied_gradient("out", 0, 0, 0, "f4")
        for wrong in (
            {"b": given["b"], "w": given["w"]},
            given | {"table": given["w"]},
            given | {"table": given["table"].astype("f8")},
            given["b"],
        ):
            with pytest.raises(
                ArgumentError, match=r"the gradient of unit 'out' is wrong at (table|table, w), tied weig"
            ):
                states.reduce_accumulate("out", wrong)
        for unit in TIED_SHAPES:
            if unit != "empty":
                states.reduce_accumulate(unit, tied_gradient(unit, 0, 0, 0, "f4"))
        with pytest.raises(ArgumentError, match="unit 'empty' has seen 0 gradients"):
            states.boundary()
        states.close()

    run_on_ranks(2, body)


# Bytes, memory, and what is called how often


class RingComm(ThreadCommunicator):
    """Collectives by rings over mailboxes that count bytes."""

    def __init__(self, meeting: RankGroup, rank: int) -> None:
        super().__init__(meeting, rank)
        mail = meeting.__dict__.setdefault("mail_of_rings", Mailboxes(meeting.size))
        self.transport, self.sent_bytes, self.calls = ThreadTransport(mail, rank), Counter[str](), Counter[str]()

    def Split(self, color: int = 0, key: int = 0) -> Any:
        """As counted."""
        made = super().Split(color, key)
        return RingComm(made.group, made.rank)

    def ring(self, name: str, steps: Any, whole: Any) -> None:
        """Run a ring on a vector."""
        before = self.transport.mail.bytes_sent[self.rank]
        cuts = even_cuts(whole.size, self.size)
        bind(steps(self.rank, self.size), whole, cuts, self.transport, lambda low, up, out: np.add(low, up, out=out))()
        self.sent_bytes[name] += self.transport.mail.bytes_sent[self.rank] - before
        self.calls[name] += 1

    def own_block(self, whole: Any) -> Any:
        """This rank's block."""
        return whole.reshape(self.size, -1)[self.rank]

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        """By a ring."""
        whole = vector(recvbuf)
        self.own_block(whole)[...] = vector(sendbuf)
        self.ring("Allgather", ring.allgather, whole)

    def Reduce_scatter_block(self, sendbuf: Any, recvbuf: Any, op: Any = None, algorithm: str | None = None) -> None:
        """By a ring."""
        whole = vector(sendbuf).copy()
        self.ring("Reduce_scatter", ring.reduce_scatter, whole)
        recvbuf[...] = self.own_block(whole)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any = None, algorithm: str | None = None) -> None:
        """By a ring."""
        self.ring("Allreduce", ring.allreduce, vector(recvbuf))


def run_on_rings(ranks: int, body: Callable[[Any], Any]) -> list[Any]:
    """``body`` on ranks that count."""
    meeting, found = RankGroup(ranks, [0] * ranks, 60.0), [None] * ranks

    def one(rank: int) -> None:
        try:
            found[rank] = body(RingComm(meeting, rank))
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("ranks", "partition", "micro_steps"), [(4, 2, 1), (4, 2, 4), (6, 3, 2), (6, 2, 2), (4, 4, 3)])
def test_bytes_of_each_hop_are_those_of_the_formulas(ranks: int, partition: int, micro_steps: int) -> None:
    """2(p-1)/p, s(p-1)/p and 2(R-1)/(R p) of the model, which all groups here divide."""
    model = {name: {"w": np.ones((size,), "f4")} for name, size in (("a", 240), ("b", 48), ("c", 960))}
    nbytes, copies = 4 * (240 + 48 + 960), ranks // partition

    def body(comm: Any) -> Any:
        states = ShardedModel(partition_groups(comm, partition), model, scale(-0.5))
        reducing, copies = states._reduce.partition, states._replication
        made = Counter(states._collect.comm.sent_bytes), Counter(reducing.sent_bytes)
        for _ in range(micro_steps):
            for unit in ("a", "b", "c", "c", "b", "a"):
                states.gather(unit)
                states.release(unit)
            for unit in ("c", "b", "a"):
                states.reduce_accumulate(unit, np.ones(model[unit]["w"].size, "f4"))
        assert "Allreduce" not in copies.sent_bytes
        states.boundary()
        sent = (
            states._collect.comm.sent_bytes["Allgather"] - made[0]["Allgather"],
            reducing.sent_bytes["Reduce_scatter"] - made[1]["Reduce_scatter"],
            copies.sent_bytes["Allreduce"],
        )
        calls = copies.calls["Allreduce"]
        return sent, calls, tuple(hop.wire_bytes for hop in states.hops)

    for sent, calls, told in run_on_rings(ranks, body):
        assert sent == told
        assert sent[0] == 2 * micro_steps * nbytes * (partition - 1) // partition
        assert sent[1] == micro_steps * nbytes * (partition - 1) // partition
        assert sent[2] == 2 * (copies - 1) * nbytes // (copies * partition)
        assert calls == (copies > 1)


@pytest.mark.parametrize(("stage", "hops"), [(1, (1, 1)), (2, (1, 3)), (3, (6, 3))])
def test_bytes_of_the_stages(stage: int, hops: tuple[int, int]) -> None:
    """Three micro-steps: so many times 3/4 of the model in gathers, and in reduce-scatters."""

    def body(comm: Any) -> Any:
        states = zero(comm, {"a": {"w": np.ones((64,), "f4")}}, scale(-0.5), stage=stage)
        for _ in range(3):
            for _ in range(2):
                states.gather("a")
                states.release("a")
            states.reduce_accumulate("a", np.ones(64, "f4"))
        states.boundary()
        return states._reduce.partition.sent_bytes["Reduce_scatter"], [hop.wire_bytes for hop in states.hops]

    for reduced, told in run_on_rings(4, body):
        assert reduced == told[1]
        assert told == [hops[0] * 64 * 4 * 3 // 4, hops[1] * 64 * 4 * 3 // 4, 0]


@pytest.mark.parametrize("dtype", ["f4", "f2", "bfloat16"])
@pytest.mark.parametrize("partition", [1, 2, 4])
def test_states_take_16_bytes_a_parameter_of_the_partition(dtype: str, partition: int) -> None:
    """Weights, gradients and Adam's moments, within 5 %; gathered parameters lie in room for two units."""
    model = {f"layer{n}": {"w": np.ones((100, 101), "f4"), "b": np.ones((101,), "f4")} for n in range(5)}
    parameters, unit = 5 * 101 * 101, 101 * 101
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def body(comm: Any) -> Any:
        states = mics(comm, model, adamw(0.1), partition, dtype=kind)
        states.close()
        return states.memory

    for memory in run_on_ranks(4, body, nodes_of(4, partition)):
        assert memory.states == pytest.approx(16 * parameters / partition, rel=0.05)
        if partition > 1:
            assert memory.parameters == pytest.approx(2 * unit * kind.itemsize, rel=0.01)


@pytest.mark.mpi(sizes=(4,))
def test_steps_allocate_no_vectors(comm: Any) -> None:
    """A step of AdamW takes less new memory than a fifth of the smallest vector, 50,000 float32."""
    model = {name: {"w": np.ones((200, 500), "f4")} for name in "abcd"}
    states = mics(comm, model, adamw(0.1), 2, overlap=False)

    def step() -> None:
        for name in model:
            states.gather(name)
            states.gradient(name)["w"][...] = 1
            states.reduce_accumulate(name, states.gradient(name))
            states.release(name)
        states.boundary()

    step()
    step()
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    states.close()
    assert peak < 40_000


@pytest.mark.mpi(sizes=(3, 4))
def test_processes_take_the_steps_of_threads(comm: Any) -> None:
    """Bit for bit: all sums are exact, and elements are treated alike."""
    for partition in {1, comm.size}:
        for dtype in ("f4", "f2", ml_dtypes.bfloat16):
            groups = partition_groups(comm, partition)
            states = ShardedModel(groups, first_weights(), OPTIMIZERS["adamw"], dtype=dtype)
            found = run_steps(states, comm.rank, 2, dtype=dtype)
            if comm.rank == 0:
                wanted = run_on_ranks(
                    comm.size,
                    lambda ranks, p=partition, dtype=dtype: run_steps(
                        ShardedModel(partition_groups(ranks, p), first_weights(), OPTIMIZERS["adamw"], dtype=dtype),
                        ranks.rank,
                        2,
                        dtype=dtype,
                    ),
                )[0]
                assert all(found[tensor].tobytes() == wanted[tensor].tobytes() for tensor in wanted)
            assert len(set(comm.allgather(b"".join(found[tensor].tobytes() for tensor in found)))) == 1


# Where groups lie


@pytest.mark.parametrize(
    ("nodes", "size", "nodes_of_group"),
    [
        ([0, 0, 0, 0], 2, 1),
        ([0, 0, 1, 1], 1, 1),
        ([0, 0, 1, 1], 4, 2),
        ([0, 1, 2, 3], 2, 2),
        ([0] * 3 + [1] * 3, 3, 1),
        ([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3, 6, 2),
        ([0] * 2 + [1] * 4, 2, 1),
    ],
)
def test_groups_inside_nodes_or_of_whole_nodes_are_accepted(nodes: list[int], size: int, nodes_of_group: int) -> None:
    assert check_placement("rank 0", nodes, size) == nodes_of_group


@pytest.mark.parametrize(
    ("nodes", "size", "why"),
    [
        ([0, 0, 1, 1], 3, "partition size 3 does not divide 4 ranks: pass one of 1, 2, 4"),
        ([0, 0, 1, 1], 0, "partition size 0 does not divide 4 ranks"),
        (
            [0] * 3 + [1] * 3,
            2,
            "ranks 2 to 3, .* nodes 0, 1, .*: pass a divisor of the 3 ranks of a node, or a multiple",
        ),
        ([0] * 4 + [1] * 4 + [2] * 4, 6, "ranks 0 to 5, .* pass a divisor of the 4 ranks"),
        ([0, 1, 0, 1], 2, "ranks 0 to 1, .* start consecutive ranks on one node"),
        ([0, 0, 0, 1], 2, "ranks 2 to 3, .* start the same number of ranks on every node, here 1 to 3"),
    ],
)
def test_groups_that_straddle_nodes_are_refused(nodes: list[int], size: int, why: str) -> None:
    def body(comm: Any) -> str:
        with pytest.raises(ArgumentError, match=why) as caught:
            mics(comm, first_weights(), scale(-1.0), size)
        return str(caught.value)

    told = run_on_ranks(len(nodes), body, nodes)
    assert [text.split(":")[0] for text in told] == [f"rank {rank}" for rank in range(len(nodes))]


def test_the_group_is_the_node_by_default() -> None:
    sizes = run_on_ranks(6, lambda comm: mics(comm, first_weights(), scale(-1.0)).ranks, [0, 0, 0, 1, 1, 1])
    assert sizes == [3] * 6
    with pytest.raises(ArgumentError, match="nodes of 1 to 2 ranks: pass partition_size"):
        ranks_per_node(0, np.array([0, 0, 1]))


def test_the_smallest_partition_that_fits() -> None:
    """The example of ZeRO: 7.5 billion parameters take 120 GB of states."""
    assert smallest_partition(120e9, 32e9, 64, 8) == 4
    assert smallest_partition(120e9, 32e9, 64, 8, working=24e9) == 16
    assert smallest_partition(120e9, 200e9, 64, 8) == 1
    assert smallest_partition(120e9, 32e9, 12, 6) == 6
    with pytest.raises(ArgumentError, match="use more ranks or a smaller model"):
        smallest_partition(120e9, 32e9, 64, 8, working=31e9)


# Groups of whole nodes


@pytest.mark.parametrize(("ranks", "size", "each"), [(4, 4, 2), (6, 6, 3), (6, 6, 2), (8, 4, 2), (8, 8, 4)])
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_groups_of_whole_nodes_take_the_steps_of_flat_ones(ranks: int, size: int, each: int, dtype: str) -> None:
    """Bit for bit: sums are exact, and units of 21, 25, 1 and 22 elements are no multiples of the group."""

    def body(comm: Any, **how: Any) -> Any:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], size, dtype=dtype, **how)
        return (
            run_steps(states, comm.rank, 2, 2, dtype),
            states._collect.kwargs,
            tuple(hop.wire_bytes for hop in states.hops),
        )

    nodes = [rank // each for rank in range(ranks)]
    two, flat = (run_on_ranks(ranks, lambda comm, h=h: body(comm, hierarchical=h), nodes) for h in (True, False))
    assert all(how == {"algorithm": "hierarchical"} for _, how, _ in two)
    assert all(how == {} for _, how, _ in flat)
    for (weights, _, sent), (wanted, _, sent_flat) in zip(two, flat, strict=True):
        assert all(weights[name].tobytes() == wanted[name].tobytes() for name in wanted)
        assert sent[0] == sent_flat[0]
        assert sent[1] == sent_flat[1] * (2 if dtype == "f2" else 1)  # what adds on the way does so in 32 bits


@pytest.mark.mpi(sizes=(4,))
def test_processes_on_two_nodes_take_the_steps_of_threads(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(channel.rank // 2, channel.rank))
    nodes = Communicator(comm.Dup())
    for dtype in ("f4", "f2"):
        states = mics(nodes, first_weights(), OPTIMIZERS["adamw"], 4, dtype=dtype)
        found = run_steps(states, comm.rank, 2, dtype=dtype)
        make = lambda each, d=dtype: mics(each, first_weights(), OPTIMIZERS["adamw"], 4, dtype=d)  # noqa: E731
        wanted = run_on_ranks(4, lambda each, m=make, d=dtype: run_steps(m(each), each.rank, 2, dtype=d), [0, 0, 1, 1])
        assert all(found[name].tobytes() == wanted[0][name].tobytes() for name in found)
    nodes.Free()


@pytest.mark.parametrize(("size", "each"), [(2, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("stage", [2, 3])
def test_only_groups_of_several_nodes_of_several_ranks_take_two_levels(size: int, each: int, stage: int) -> None:
    def body(comm: Any) -> Any:
        states = mics(comm, first_weights(), scale(-1.0), size, stage=stage)
        states.close()
        return states._reduce

    for reduce in run_on_ranks(4, body, [rank // each for rank in range(4)]):
        assert reduce.kwargs == ({"algorithm": "hierarchical"} if size > each > 1 else {})


# Precision


@pytest.mark.parametrize("dtype", ["f2", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_16_bits_are_added_in_float32(dtype: str, stage: int) -> None:
    """2048 + 1 + 1 is 2048 in float16: every addition would lose one."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def body(comm: Any) -> list[float]:
        states = zero(comm, {"a": {"w": np.zeros((5,), "f4")}}, scale(-1.0), stage=stage, dtype=kind)
        for _ in range(2):
            w = states.gather("a")["w"]
            assert w.dtype == kind
            states.reduce_accumulate("a", np.full(5, 2048 if comm.rank == 0 else 1, kind))
            states.release("a")
        states.boundary()
        return next(iter(states.consolidate()))[1]["w"].tolist()

    assert run_on_ranks(3, body) == [(np.full(5, -4100, "f4") / np.float32(6)).tolist()] * 3


def test_gathered_parameters_are_the_masters_rounded_once() -> None:
    model = {"a": {"w": np.array([1 + 2**-11, 1 + 3 * 2**-11, 1e6, -(2**-24), 5], "f4")}}

    def body(comm: Any) -> Any:
        states = mics(comm, model, scale(-1.0), 2, dtype="f2")
        return states.gather("a")["w"].copy(), next(iter(states.consolidate()))[1]["w"]

    for gathered, kept in run_on_ranks(4, body):
        with np.errstate(over="ignore"):
            assert gathered.tobytes() == model["a"]["w"].astype("f2").tobytes()
        assert kept.tobytes() == model["a"]["w"].tobytes()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("culprit", range(4))
def test_an_overflow_on_one_rank_skips_the_step_on_all_ranks(bad: float, culprit: int) -> None:
    """The scale halves on all ranks, and doubles after so many good steps."""

    def body(comm: Any) -> Any:
        states = mics(comm, EIGHT, adamw(0.1), 2, loss_scale=LossScale(1024.0, interval=2), dtype="f2")
        found = []
        for step in range(4):
            given = np.full(8, states.loss_scale.value, "f2")
            if step == 1 and comm.rank == culprit:
                given[6] = bad
            states.reduce_accumulate("all", given)
            found.append((*states.boundary()[1:], states.steps, states.state.updates))
        return found, next(iter(states.consolidate()))[1]["w"].tobytes()

    results = run_on_ranks(4, body, [0, 0, 1, 1])
    assert len({weights for _, weights in results}) == 1
    for found, _ in results:
        assert found == [(False, 1024, 1, 1), (True, 512, 1, 1), (False, 512, 2, 2), (False, 1024, 3, 3)]


def test_the_loss_scale_divides_out_exactly() -> None:
    def body(comm: Any, value: float) -> bytes:
        states = mics(comm, EIGHT, chain(momentum(0.5), scale(-0.5)), 2, loss_scale=LossScale(value))
        for micro in GOLDEN[comm.rank]:
            states.reduce_accumulate("all", np.array(micro, "f4") * np.float32(value))
        states.boundary()
        return next(iter(states.consolidate()))[1]["w"].tobytes()

    one, many = (run_on_ranks(4, lambda comm, v=v: body(comm, v), [0, 0, 1, 1]) for v in (1.0, 4096.0))
    assert one == many


@pytest.mark.parametrize("partition", [1, 2, 4])
def test_the_norm_is_that_of_the_mean_gradient_and_clips_it(partition: int) -> None:
    mean = np.array([1.25, 1.125, 0.75, 1.125, 1.5, 1.875, 1.5, 2.375])
    norm = np.sqrt((mean**2).sum())

    def body(comm: Any) -> Any:
        states = mics(comm, EIGHT, scale(-1.0), partition, max_norm=1.0)
        for micro in GOLDEN[comm.rank]:
            states.reduce_accumulate("all", np.array(micro, "f4"))
        return states.boundary().norm, next(iter(states.consolidate()))[1]["w"]

    for found, weights in run_on_ranks(4, body, nodes_of(4, partition)):
        assert found == pytest.approx(norm, rel=1e-12)  # sums of eight squares in float64, in another order
        assert np.allclose(weights, np.arange(1, 9) - mean / norm, rtol=1e-6)


# Mistakes


def check_refused(body: Callable[[Any], Any], why: str, kind: type[Exception] = ArgumentError, ranks: int = 2) -> None:
    """All ranks hear of it."""
    found = []

    def run_once(comm: Any) -> None:
        with pytest.raises(kind, match=why):
            body(comm)
        found.append(comm.rank)

    run_on_ranks(ranks, run_once)
    assert len(found) == ranks


def test_ranks_that_gather_in_different_orders_raise_and_keep_their_weights() -> None:
    """Of one size: only the step's end can know.  Of different sizes: at once."""
    model = {name: {"w": np.full((size,), size, "f4")} for name, size in (("a", 4), ("b", 4), ("c", 6))}

    def body(comm: Any, order: str) -> None:
        states = zero(comm, model, scale(-1.0))
        try:
            for unit in order if comm.rank == 1 else "abc":
                states.gather(unit)
                states.release(unit)
                states.reduce_accumulate(unit, np.ones(model[unit]["w"].size, "f4"))
            states.boundary()
        finally:
            assert states.master.tolist() == [4, 4, 4, 4, 6, 6, 6] or states.master.size == 7
            assert set(states.master.tolist()) == {4, 6}
            states.close()

    check_refused(
        lambda comm: body(comm, "bac"),
        "call 1 of this step was 'gather b' on place 1 of the partition group, 'gather a' on place 0",
        MismatchError,
    )
    check_refused(
        lambda comm: body(comm, "cba"), "gathers unit '[ac]' as call 1 of this step: .*same order", MismatchError
    )


@pytest.mark.mpi(sizes=(4,))
def test_processes_that_gather_in_different_orders_raise(comm: Any) -> None:
    """Ranks of two groups; nobody hangs."""
    model = {name: {"w": np.full((4,), 1, "f4")} for name in "ab"}
    states = ShardedModel(partition_groups(comm, 2), model, scale(-1.0))
    for unit in "ba" if comm.rank % 2 else "ab":
        states.gather(unit)
        states.release(unit)
        states.reduce_accumulate(unit, np.ones(4, "f4"))
    with pytest.raises(MismatchError, match="call 1 of this step was 'gather b' on place 1 of the partition group"):
        states.boundary()
    assert states.master.tolist() == [1, 1, 1, 1]
    states.close()


def test_a_wrong_call_is_named() -> None:
    def states_of(comm: Any) -> ShardedModel:
        return zero(comm, first_weights(), scale(-1.0), overlap=False)

    def twice(comm: Any) -> None:
        states = states_of(comm)
        states.gather("one")
        states.gather("one")

    def three(comm: Any) -> None:
        states = states_of(comm)
        for unit in ("one", "out", "gain"):
            states.gather(unit)

    def run_with_gathered_unit(comm: Any) -> None:
        states = states_of(comm)
        states.gather("one")
        states.boundary()

    def early(comm: Any) -> None:
        states = states_of(comm)
        states.reduce_accumulate("one", gradient("one", 0, 0, 0))
        states.boundary()

    def wide_gradient(comm: Any) -> None:
        states_of(comm).reduce_accumulate("one", gradient("one", 0, 0, 0, "f8"))

    def short(comm: Any) -> None:
        states_of(comm).reduce_accumulate("one", np.zeros(3, "f4"))

    def partial(comm: Any) -> None:
        states_of(comm).reduce_accumulate("one", {"w": np.zeros((5, 4), "f4"), "v": np.zeros(5, "f4")})

    for body, why in (
        (lambda comm: states_of(comm).gather("two"), "gather: no unit is called 'two': use one of embedding, one"),
        (lambda comm: states_of(comm).release("one"), "release: 'one' is not gathered"),
        (twice, "gather: 'one' is gathered: release it first"),
        (three, "gather: 'one' and 'out' are gathered: release one first, or pass a larger prefetch"),
        (run_with_gathered_unit, r"boundary: \['one'\] are gathered, or on their way"),
        (early, "unit 'embedding' has seen 0 gradients, 'one' 1: reduce_accumulate every unit"),
        (lambda comm: states_of(comm).boundary(), "has seen 0 gradients"),
        (wide_gradient, "the gradient of unit 'one' is wrong at w, b: .* in float32"),
        (short, r"float32 of shape \(3,\): pass float32 of shape \(25,\)"),
        (partial, "wrong at b, v: pass every tensor, once"),
        (lambda comm: zero(comm, first_weights(), scale(-1.0), stage=4), "stage is 4: pass 1, 2 or 3"),
        (lambda comm: zero(comm, first_weights("f2"), scale(-1.0)), "the weights are float16: pass float32"),
        (lambda comm: zero(comm, first_weights(), scale(-1.0), dtype="i4"), "dtype is int32"),
        (lambda comm: zero(comm, first_weights(), scale(-1.0), max_norm=0.0), "max_norm is 0.0"),
        (lambda comm: zero(comm, {}, scale(-1.0)), "a model has one unit or more"),
        (lambda comm: zero(comm, {"a": {}}, scale(-1.0)), "unit 'a' has no tensors"),
        (lambda comm: zero(comm, [("a", EIGHT["all"])] * 2, scale(-1.0)), "two units are called 'a'"),
    ):
        check_refused(body, why)


def test_a_unit_smaller_than_the_group_leaves_some_ranks_without_elements() -> None:
    """And one without elements leaves all with nothing; both go through every hop."""
    model = {"small": {"w": np.array([1, 2], "f4")}, "none": {"w": np.zeros((0, 3), "f4")}}

    def body(comm: Any) -> Any:
        states = mics(comm, model, adamw(0.5), 5, dtype="f4")
        sizes = states.master.size
        for unit in model:
            states.gather(unit)
            states.release(unit)
            states.reduce_accumulate(unit, np.full(model[unit]["w"].size, comm.rank, "f4"))
        states.boundary()
        return sizes, [tensors["w"].tolist() for _, tensors in states.consolidate()]

    found = run_on_ranks(10, body, [rank // 5 for rank in range(10)])
    assert [size for size, _ in found] == [1, 1, 0, 0, 0] * 2
    assert all(weights == [[0.5, 1.5], []] for _, weights in found)


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_with_different_numbers_of_micro_steps_are_named(comm: Communicator) -> None:
    states = data_parallel(comm, {"a": {"w": np.ones(4)}}, scale(-0.1))
    for _ in range(2 + comm.rank):
        states.reduce_accumulate("a", {"w": np.ones(4)})
    with pytest.raises(MismatchError, match="rank 1 has made 3 micro-steps, rank 0 2"):
        states.boundary()
    assert (states.master == 1).all()
