"""Ranks that are threads give MPI's results, sum in rank order, and stop waiting after an error on any rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.errors import MismatchError
from hpccomm.testing.ranks import run_on_ranks

SIZES = [1, 2, 3, 5, 7]


@pytest.mark.parametrize("size", SIZES)
def test_collectives_give_what_mpi_defines(size: int) -> None:
    def body(comm: Any) -> None:
        mine, total = np.arange(3.0) + 10 * comm.rank, np.empty(3)
        comm.Allreduce(mine, total)
        assert total.tolist() == [size * i + 10 * size * (size - 1) / 2 for i in range(3)]
        comm.Allreduce(MPI.IN_PLACE, mine, op=MPI.MAX)
        assert mine.tolist() == [10.0 * (size - 1) + i for i in range(3)]
        gathered = np.empty(size, "i8")
        comm.Allgather(np.array([comm.rank]), gathered)
        assert gathered.tolist() == list(range(size))
        counts = [rank % 2 for rank in range(size)]
        some = np.empty(sum(counts), "i8")
        comm.Allgatherv(np.full(counts[comm.rank], comm.rank), [some, counts])
        assert some.tolist() == [rank for rank in range(size) if rank % 2]
        part = np.empty(counts[comm.rank])
        comm.Reduce_scatter(np.arange(float(sum(counts))), part, counts)
        assert part.tolist() == [size * float(sum(counts[: comm.rank]))] * counts[comm.rank]
        buffer = np.full(2, comm.rank)
        comm.Bcast(buffer, size - 1)
        assert buffer.tolist() == [size - 1] * 2

    run_on_ranks(size, body)


def test_sums_are_in_rank_order() -> None:
    def body(comm: Any) -> float:
        total = np.empty(1)
        comm.Allreduce(np.array([[1e16, 1.0, -1e16][comm.rank]]), total)
        return float(total[0])

    assert run_on_ranks(3, body) == [(1e16 + 1.0) + -1e16] * 3


def test_split_follows_color_and_key_and_nodes_define_intra_and_inter_node() -> None:
    def body(comm: Any) -> tuple[Any, ...]:
        part = comm.Split(comm.rank % 2, -comm.rank)
        alone = comm.Split(0 if comm.rank == 1 else MPI.UNDEFINED)
        assert (alone == MPI.COMM_NULL) == (comm.rank != 1)
        return part.size, part.rank, comm.intra_node.size, comm.inter_node.size, comm.layout.per_node

    expected = [(3, 2, 2, 3), (2, 1, 2, 2), (3, 1, 2, 3), (2, 0, 2, 2), (3, 0, 1, 3)]
    assert run_on_ranks(5, body, nodes=[0, 0, 1, 1, 2]) == [(*each, (2, 2, 1)) for each in expected]


def test_messages_arrive_in_order_and_match_by_source_and_tag() -> None:
    def body(comm: Any) -> list[int] | None:
        if comm.rank:
            for number in range(3):
                comm.Send(np.array([10 * comm.rank + number]), 0, tag=number)
            return None
        found, status = np.empty(1, "i8"), MPI.Status()
        comm.Recv(found, 2, 1, status)
        order = [int(found[0]), status.source, status.tag]
        for source in (1, 1, 1, 2, 2):
            comm.Recv(found, source)
            order.append(int(found[0]))
        assert not comm.Iprobe()
        return order

    assert run_on_ranks(3, body)[0] == [21, 2, 1, 10, 11, 12, 20, 22]


def test_mismatched_calls_raise_on_all_ranks() -> None:
    with pytest.raises(MismatchError, match=r"rank 2 called Allreduce\(4 float64, sum\), rank 0 Allreduce\(3 float64"):
        run_on_ranks(3, lambda comm: comm.Allreduce(np.ones(3 + comm.rank // 2), np.ones(3 + comm.rank // 2)))


def test_no_rank_waits_for_a_rank_that_has_failed() -> None:
    def body(comm: Any) -> None:
        part = comm.Split(0, comm.rank)
        if comm.rank == 1:
            raise ZeroDivisionError
        part.Barrier()

    with pytest.raises(ZeroDivisionError):
        run_on_ranks(3, body)
