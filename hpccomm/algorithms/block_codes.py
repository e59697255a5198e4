"""The dense mean in 8 bits: blocks of int8, 8-bit floats or MX, in two phases, with or without error feedback.

*p ranks, n elements; e what this rank's coding lost, s what coding the mean of its shard lost.*  A rank sends
2(p-1)/p · n · (1 + 4/256) bytes with ``int8``, a quarter of float32's; on several nodes of as many ranks each these add
theirs in float32 first, and a node sends so much (p: nodes)::

    message = code(g + e);   e ← g + e − decode(message);   step = code(mean of the messages + s)

(:mod:`hpccomm.collectives.compressed.two_phase`; Dettmers et al., *8-bit approximations*, ICLR 2016; the ZeRO++ paper,
Wang et al., ICLR 2024, quantises by blocks in this way.)  Steps and errors add up to all gradients.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.compression.format import check_flat, check_writable
from hpccomm.algorithms.error_feedback import LARGEST_SUM, all_ranks_true
from hpccomm.algorithms.exchange import allreduce_bytes, exchange_unsent
from hpccomm.algorithms.reports import ExchangeReport, MessageReport, norm_of
from hpccomm.algorithms.states import GroupSize, ShardedVector, Unsent
from hpccomm.algorithms.transforms import ResidualTransform, Transform, Vector, check_choice, check_shape
from hpccomm.collectives.compressed.two_phase import CODES, mean_by_nodes
from hpccomm.collectives.schedule import even_cuts
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels

if TYPE_CHECKING:
    from mpi4py import MPI


class BlockMeanState(NamedTuple):
    """The state of one rank; both errors are empty without feedback."""

    residual: Unsent
    """e: what this rank's messages lost."""
    server: ShardedVector
    """s: what coding the mean of this rank's shard lost."""
    steps: int
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    ranks: GroupSize
    """How many ranks exchange."""

    def messages(self) -> MessageReport:
        """The residual, and the bytes of a step."""
        nbytes = self.report.wire_bytes // max(1, self.steps)
        path = "two phases" if self.steps else ""
        return MessageReport(nbytes, 0, 0.0, norm_of(self.residual), self.skipped, path)


def block_mean(
    comm: MPI.Intracomm, code: Literal["int8", "e4m3", "e5m2", "mx", "int4"] = "int8", *, feedback: bool = True
) -> Transform:
    """The mean of gradients of shape (n,), float32, of all ranks, in about 8 bits an element each way.

    ``code``: ``"int8"``, the 8-bit floats ``"e4m3"`` and ``"e5m2"``, each with a float32 scale for 256 elements,
    ``"mx"``, e4m3 with a power of two for 32, or ``"int4"``, half the bytes, a float32 scale for 128.  With
    ``feedback`` what rounding loses is added to the next gradient.  If the gradient of any rank, or its sum with what
    was lost, is not finite, or the sum over the ranks might not be, no rank steps.

    >>> from mpi4py import MPI
    >>> method, weights = block_mean(MPI.COMM_SELF), np.zeros(3, "f4")
    >>> step, state = method.update(np.float32([127, 1, -63.75]), method.init(weights), weights)
    >>> step.tolist(), state.residual.tolist()
    ([127.0, 1.0, -64.0], [0.0, 0.0, 0.25])
    """
    comm = as_communicator("block_mean", comm)
    check_choice("block_mean: code", code, tuple(CODES))

    def length_of_shard(n: int) -> int:
        cuts = even_cuts(n, comm.size)
        return int(cuts[comm.rank + 1] - cuts[comm.rank])

    def init(weights: Vector) -> BlockMeanState:
        n = check_flat(weights, "block_mean").size if feedback else 0
        shard = np.zeros(length_of_shard(n), np.float32)
        return BlockMeanState(np.zeros(n, np.float32), shard, 0, 0, ExchangeReport(), comm.size)

    def check_state(state: BlockMeanState, weights: Vector) -> None:
        check_shape("block_mean", state.residual, weights)
        check_writable(state.residual, None, "block_mean: the residual")
        if state.server.size != length_of_shard(weights.size):
            raise ArgumentError(
                f"block_mean: the state is of {state.ranks} ranks, {comm.size} exchange: "
                "pass hpccomm.for_ranks(states, rank, size)"
            )
        check_writable(state.server, None, "block_mean: the residual of the shard")

    def update(gradient: Vector, state: BlockMeanState, weights: Vector) -> tuple[Vector, BlockMeanState]:
        if feedback:
            check_state(state, weights)
        began = time.perf_counter()
        check_flat(gradient, "block_mean")
        peak = kernels().largest_of_sum(gradient, state.residual if feedback else None)
        fine = peak * comm.size < LARGEST_SUM
        asked = allreduce_bytes(1, comm.size)
        if not all_ranks_true(comm, fine):
            cost = ExchangeReport(1, time.perf_counter() - began, asked)
            return np.zeros_like(gradient), state._replace(skipped=state.skipped + 1, report=state.report.add(cost))
        errors = (state.residual, state.server) if feedback else (None, None)
        mean, nbytes = mean_by_nodes(comm, gradient, code, *errors)
        cost = ExchangeReport(1, time.perf_counter() - began, nbytes + asked)
        return mean, state._replace(steps=state.steps + 1, report=state.report.add(cost))

    def flush_state(state: BlockMeanState) -> tuple[Vector, BlockMeanState]:
        total, cost = exchange_unsent(comm, state.residual, "mean")
        shards = np.zeros_like(total)
        counts = [each.size for each in np.array_split(total, comm.size)]
        comm.Allgatherv(state.server, [shards, counts])
        after = state._replace(residual=np.zeros_like(total), server=np.zeros_like(state.server))
        return total + shards, after._replace(report=state.report.add(cost))

    named: Any = {"comm": comm, "needs_whole": "block_mean"}
    if not feedback:
        return Transform(init, update, **named)
    return ResidualTransform.of(init, update, flush_state, None, **named)
