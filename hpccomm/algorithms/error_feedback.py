"""Compressed exchange with error feedback: each rank sends a compressed backlog and keeps the rounding error.

*p ranks; g gradient, e residual (not sent yet), C the compressor, D its decoder.*  Without momentum::

    message = C(g + e),   e ← g + e − D(message),   step = mean over the ranks of D(message)

(Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019).  With momentum μ the velocity is accumulated instead of
the gradient, and the momentum of the elements sent is set to 0 (Lin et al., ICLR 2018, sections 3.1 and 3.2)::

    u ← μu + g,   v ← v + u,   message = C(v),   v ← v − D(message),   u ← 0 where the message names elements

Decoded messages and residuals add up to all gradients.  Messages differ in length; an allgather gives every rank all
messages, and every rank adds them in rank order, so all ranks get the same bits.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.compression.format import (
    HEADER_BYTES,
    MAX_ELEMENTS,
    Compressor,
    Message,
    NotFiniteError,
    check_flat,
    header_of,
    read_indices,
)
from hpccomm.algorithms.exchange import exchange_unsent
from hpccomm.algorithms.message_paths import (
    ALLGATHER,
    AUTO,
    DENSE,
    EXCHANGES,
    LEADERS,
    NODE,
    PATHS,
    TRY_AGAIN,
    choose_path,
    elements_in,
    forwards_messages,
)
from hpccomm.algorithms.reports import ExchangeReport, MessageReport, norm_of
from hpccomm.algorithms.states import GroupSize, LocalVector, Scratch, Unsent
from hpccomm.algorithms.transforms import (
    ResidualTransform,
    Transform,
    Vector,
    check_choice,
    check_decay,
    check_shape,
    require,
)
from hpccomm.collectives.compressed.messages import MessageGather, NodeGather, join_messages, split_messages
from hpccomm.collectives.compressed.prices import place_of
from hpccomm.collectives.compressed.sparse import hierarchical_allreduce
from hpccomm.context import Once
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels

if TYPE_CHECKING:
    from mpi4py import MPI


class FeedbackState(NamedTuple):
    """The state of one rank; it differs between ranks."""

    residual: Unsent
    """e, or with momentum v: what this rank has not sent yet."""
    spare: Scratch
    """A buffer for the next residual."""
    momentum: LocalVector | None
    """u, with momentum."""
    headers: npt.NDArray[np.uint8]
    """The first 32 bytes of the last message of each part: an adaptive threshold continues from it."""
    steps: int
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    room: int
    """Bytes of a rank's messages that the first call of the next exchange carries."""
    ranks: GroupSize
    """How many ranks exchange."""
    summed: bool
    """The step is the sum over the ranks, not the mean."""
    path: int
    """The position in EXCHANGES of the exchange of the last step."""
    longest: int
    """Bytes of the longest message of all ranks, without headers, when messages were last sent."""

    def messages(self) -> MessageReport:
        """The messages of the last step that was not skipped."""
        headers = [header_of(each, "report") for each in self.headers if each.any()]
        return MessageReport(
            nbytes=sum(HEADER_BYTES + each.nbytes for each in headers),
            elements=sum(each.elements for each in headers),
            scale=max((each.scale for each in headers), default=0.0),
            residual_norm=norm_of(self.residual),
            skipped=self.skipped,
            path=EXCHANGES[self.path] if self.steps else "",
        )


class FeedbackTransform(ResidualTransform):
    """What :func:`feedback` returns.

    ``exchange(gradient, state, fine) -> (step, state)`` is its update on vectors; where ``fine`` is False on any rank,
    no rank steps.
    """

    exchange: Callable[[Vector, FeedbackState, bool], tuple[Vector, FeedbackState]]


def feedback(
    compressor: Compressor,
    comm: MPI.Intracomm,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    mask: bool = True,
    reduce: Literal["mean", "sum"] = "mean",
    parts: Sequence[slice] | None = None,
    exchange: str = AUTO,
) -> FeedbackTransform:
    """Exchange gradients of shape (n,), float32, as messages of ``compressor``; the step is their mean, or sum.

    ``momentum`` μ > 0 selects momentum correction and, with ``mask``, momentum factor masking, as above; the optimizer
    that follows then has no momentum of its own.  ``parts``, such as the slices of tensors, are compressed one by one;
    by default the vector is one part.  With a compressor of votes the step is the majority.  If the gradient of any
    rank, or its sum with what was not sent, is not finite, no rank steps, and only ``skipped`` changes in the state.
    Compressors that round at random draw other numbers on every rank.

    ``exchange``: a path of :mod:`hpccomm.algorithms.message_paths`, ``"allgather"``, ``"node"``, ``"split"``,
    ``"recursive_doubling"``, ``"ok_topk"``, ``"leaders"`` or ``"dense"``.  ``"auto"`` takes ``"node"`` where several
    ranks of a node exchange with other nodes, else gathers; from the second step of long vectors on it takes the path
    of the least price, but for ``"ok_topk"`` (:mod:`hpccomm.collectives.compressed.prices`).  With ``"leaders"`` a
    node sends the message of one rank: its ranks' gradients and residuals are added first, in the units of their mean.

    Each rank sends its messages to all others, with 8 bytes for the length of each, and 16 bytes more, 32 with
    momentum; short messages are padded to a common length
    (:class:`~hpccomm.collectives.compressed.messages.MessageGather`).  :func:`~hpccomm.report` reports them.  CuPy
    gradients and their residuals stay on the device, messages pass through the host (compressors with ``on_device``).
    When a run continues with another number of ranks, :func:`~hpccomm.for_ranks` redistributes the residuals.

    Raises ArgumentError for gradients that are not flat float32, and on all ranks where ranks pass different
    compressors or a message is damaged.  The state is then unchanged, except that u and v have advanced where a message
    was damaged in transit: continue from a checkpoint.  :func:`~hpccomm.flush` sends the residuals at the end of a run.
    """
    require(hasattr(compressor, "decode_all"), f"feedback: {compressor!r} is no compressor: pass topk(0.01) …")
    comm = as_communicator("feedback", comm)
    check_decay("feedback: momentum", momentum)
    check_choice("feedback: reduce", reduce, ("mean", "sum"))
    require(not nesterov or momentum > 0, "feedback: nesterov needs momentum: pass one above 0")
    check_choice("feedback: exchange", exchange, EXCHANGES)
    require(
        exchange not in (DENSE, LEADERS) or compressor.agree is None,
        f"feedback: exchange is {exchange!r}, but {compressor.name} counts votes: pass 'allgather' or 'auto'",
    )
    shorter = compressor.contraction or compressor
    sends = FeedbackExchange(shorter, comm, momentum, nesterov, mask, reduce, parts, exchange)
    made = FeedbackTransform(sends.init, sends.update, comm=comm, needs_whole=compressor.name)
    made.exchange, made.flush_state = sends.exchange, sends.flush
    return made


@dataclass
class FeedbackExchange:
    """The arguments of :func:`feedback`, and the functions of its transform."""

    compressor: Compressor
    comm: MPI.Intracomm
    momentum: float
    nesterov: bool
    mask: bool
    reduce: str
    parts: Sequence[slice] | None
    how: str = ALLGATHER
    keeps_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.everyone = MessageGather(self.comm)
        self.whole_paths = {DENSE: self.send_all, LEADERS: self.send_by_leaders}
        """The paths on which a rank hands out all that it has."""

    @Once
    def by_nodes(self) -> MessageGather | NodeGather:
        """Gathers the messages of all ranks between the nodes, and then in them, where there are both."""
        return NodeGather(self.comm) if place_of(self.comm).has_nodes else self.everyone

    @Once
    def between_nodes(self) -> MessageGather:
        """Gathers the messages of the nodes' first ranks."""
        comm: Any = self.comm
        return MessageGather(comm.inter_node)

    def init(self, weights: Vector) -> FeedbackState:
        """Nothing is unsent."""
        check_flat(weights, self.compressor.name, self.compressor.on_device)
        require(weights.size < MAX_ELEMENTS, f"{self.compressor.name}: {weights.size} elements: {TOO_LONG}")
        zeros = np.zeros_like(weights)
        headers = np.zeros((len(self.slices_of(weights)), HEADER_BYTES), np.uint8)
        moved = np.zeros_like(zeros) if self.momentum else None
        summed = self.reduce == "sum"
        return FeedbackState(
            zeros, np.zeros_like(zeros), moved, headers, 0, 0, ExchangeReport(), 0, self.comm.size, summed, 0, 0
        )

    def slices_of(self, vector: Vector) -> Sequence[slice]:
        """The parts of a vector."""
        return [slice(0, vector.size)] if self.parts is None else self.parts

    def update(self, gradient: Vector, state: FeedbackState, weights: Vector) -> tuple[Vector, FeedbackState]:
        """Exchange a gradient."""
        if self.keeps_residual:
            check_shape(self.compressor.name, state.residual, weights)
        return self.exchange(gradient, state, True)

    def exchange(self, gradient: Vector, state: FeedbackState, fine: bool) -> tuple[Vector, FeedbackState]:
        """As :meth:`update`; where ``fine`` is False on any rank, no rank steps."""
        began, asked = time.perf_counter(), 0
        check_flat(gradient, self.compressor.name, self.compressor.on_device)
        path = self.choose(gradient, state)
        whole = self.whole_paths.get(path)
        if self.momentum or whole:
            fine = fine and self.can_accumulate(gradient, state, self.comm.size if whole else 1)
            fine, _, asked = check_agreement(self.comm, fine, self.compressor.name)  # before u and v are written
        else:
            fine = fine and kernels(gradient).all_finite(gradient)
        if whole:
            return whole(gradient, state, began, asked) if fine else self.skip(gradient, state, began, asked)
        messages = self.encode(gradient, state) if fine else None
        gather = self.gather_of(path, gradient, state)
        if gather is None:
            return self.add_messages(path, messages, gradient, state, began, asked)
        gather.set_room(state.room)
        received, nbytes = exchange_messages(gather, messages)
        nbytes += asked
        if received is None:
            return self.skip(gradient, state, began, nbytes)
        total = self.decode(received, gradient)
        cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
        residual, spare = (state.residual, state.spare) if self.momentum else (state.spare, state.residual)
        after = state._replace(
            residual=residual,
            spare=spare,
            headers=headers_of(received[self.comm.rank]),
            steps=state.steps + 1,
            report=state.report.add(cost),
            room=gather.room,
            path=EXCHANGES.index(path),
            longest=max(sum(each.size - HEADER_BYTES for each in mine) for mine in received),
        )
        return total, after

    def choose(self, gradient: Vector, state: FeedbackState) -> str:
        """The path of this step, the same on all ranks."""
        if self.comm.size == 1:
            return ALLGATHER
        if not isinstance(gradient, np.ndarray):
            require(
                self.how in (AUTO, ALLGATHER),
                f"feedback: exchange is {self.how!r}, but the gradients lie on a device: pass 'allgather' or 'auto'",
            )
            return ALLGATHER
        if self.how != AUTO:
            return self.how
        if self.compressor.agree is not None:
            return ALLGATHER
        tries = EXCHANGES[state.path] == DENSE and state.steps % TRY_AGAIN == 0
        return choose_path(self.comm, gradient.size, *self.length_of(state, gradient) if not tries else (0, 0))

    def length_of(self, state: FeedbackState, gradient: Vector) -> tuple[int, int]:
        """The bytes of the longest message of all ranks when messages were last sent, and about its elements."""
        return state.longest, elements_in(state.longest, self.compressor.kinds, gradient.size)

    def gather_of(self, path: str, gradient: Vector, state: FeedbackState) -> MessageGather | NodeGather | None:
        """What gathers the messages of all ranks; None where they are added on the way."""
        if path == NODE and forwards_messages(self.comm, gradient.size, *self.length_of(state, gradient)):
            return self.by_nodes
        return self.everyone if path == ALLGATHER else None

    def skip(self, gradient: Vector, state: FeedbackState, began: float, nbytes: int) -> tuple[Vector, FeedbackState]:
        """A step of zero."""
        cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
        return np.zeros_like(gradient), state._replace(skipped=state.skipped + 1, report=state.report.add(cost))

    def add_messages(
        self,
        path: str,
        messages: list[Message] | None,
        gradient: Vector,
        state: FeedbackState,
        began: float,
        asked: int,
    ) -> tuple[Vector, FeedbackState]:
        """Add the decoded messages of all ranks along a path."""
        length = sum(each.size - HEADER_BYTES for each in messages or ())
        fine, longest, more = check_agreement(self.comm, messages is not None, self.compressor.name, length)
        if not fine or messages is None:
            return self.skip(gradient, state, began, asked + more)
        own = np.zeros_like(gradient)
        for message, part in zip(messages, self.slices_of(gradient), strict=True):
            self.compressor.decode_all([message], own[part])
        headers = [header_of(each) for each in messages]
        largest_k = agree_on_most(self.comm, sum(each.elements for each in headers)) if path == "ok_topk" else 0
        found = PATHS[path](self.comm, own, largest_k)
        for part in self.slices_of(gradient):
            if self.reduce == "mean" or self.compressor.agree is not None:
                self.compressor.conclude(found.total[part], self.comm.size)
        residual, spare = (state.residual, state.spare) if self.momentum else (state.spare, state.residual)
        if found.returned is not None:
            residual[found.returned[0]] += found.returned[1]
        cost = ExchangeReport(1, time.perf_counter() - began, asked + more + found.bytes_sent)
        after = state._replace(
            residual=residual,
            spare=spare,
            headers=headers_of(messages),
            steps=state.steps + 1,
            report=state.report.add(cost),
            path=EXCHANGES.index(path),
            longest=longest,
        )
        return found.total, after

    def send_all(
        self, gradient: Vector, state: FeedbackState, began: float, asked: int
    ) -> tuple[Vector, FeedbackState]:
        """Gradient and residual in an ordinary allreduce; nothing waits afterwards."""
        whole, after = accumulate_all(gradient, state, self.momentum, self.nesterov)
        total, cost = exchange_unsent(self.comm, whole, self.reduce)
        cost = ExchangeReport(1, time.perf_counter() - began, cost.wire_bytes + asked)
        path = EXCHANGES.index(DENSE)
        return total, after._replace(steps=state.steps + 1, report=state.report.add(cost), path=path)

    def send_by_leaders(
        self, gradient: Vector, state: FeedbackState, began: float, asked: int
    ) -> tuple[Vector, FeedbackState]:
        """The first rank of each node sends what its ranks have together, and keeps what it has not sent."""
        whole, after = accumulate_all(gradient, state, self.momentum, self.nesterov)
        comm: Any = self.comm
        node, ranks = comm.intra_node, np.float32(comm.size / comm.layout.count)
        masks, told = after.momentum is not None and self.mask, cast(Any, None)
        sent = whole.nbytes if node.rank else whole.nbytes * (node.size - 1)

        def between(leaders: Any, total: Vector) -> Vector:
            nonlocal told, sent
            total /= ranks
            messages = self.encode_backlog(total, state)
            after.residual[...] = total * ranks
            self.between_nodes.set_room(state.room)
            received, nbytes = exchange_messages(self.between_nodes, messages)
            if received is None or messages is None:
                raise ArgumentError(f"{self.compressor.name}: it cannot hold the sum of a node's gradients: scale them")
            longest = max(sum(each.size - HEADER_BYTES for each in one) for one in received)
            names, sent = self.names(messages, total) if masks else None, sent + nbytes
            told = headers_of(messages), names, longest, self.between_nodes.room
            return self.decode(received, gradient)

        total = hierarchical_allreduce(self.comm, whole, between)
        headers, names, longest, room = node.bcast(told)
        if self.reduce == "sum":
            total *= ranks
        if after.momentum is not None and masks:
            after.momentum[names] = 0
        cost = ExchangeReport(1, time.perf_counter() - began, sent + asked)
        return total, after._replace(
            headers=headers,
            steps=state.steps + 1,
            report=state.report.add(cost),
            room=room,
            path=EXCHANGES.index(LEADERS),
            longest=longest,
        )

    def encode_backlog(self, backlog: Vector, state: FeedbackState) -> list[Message] | None:
        """The message of each part of a backlog, which becomes what is left; None where it holds too large a number."""
        step, parts = self.count_of(state), zip(self.slices_of(backlog), state.headers, strict=True)
        try:
            return [self.compressor.encode_feedback(backlog[part], step=step, last=last) for part, last in parts]
        except NotFiniteError:
            return None

    def names(self, messages: Sequence[Message], like: Vector) -> npt.NDArray[np.int64]:
        """The elements that messages of all parts name."""
        places = zip(messages, self.slices_of(like), strict=True)
        found = [read_indices(each).astype(np.int64) + place.start for each, place in places]
        return np.concatenate([np.empty(0, np.int64), *found])

    def decode(self, received: list[list[Message]], like: Vector) -> Vector:
        """The mean or sum of the messages of all senders."""
        total = np.zeros_like(like)
        for number, part in enumerate(self.slices_of(like)):
            self.compressor.decode_all([each[number] for each in received], total[part])
            if self.reduce == "mean" or self.compressor.agree is not None:
                self.compressor.conclude(total[part], len(received))
        return total

    def count_of(self, state: FeedbackState) -> int:
        """The number of this message, by which compressors that round at random draw."""
        return state.steps * self.comm.size + self.comm.rank if self.compressor.is_random else state.steps

    def encode(self, gradient: Vector, state: FeedbackState) -> list[Message] | None:
        """The message of each part; None where a sum of gradient and residual exceeds float32."""
        step, messages = self.count_of(state), []
        try:
            for part, last in zip(self.slices_of(gradient), state.headers, strict=True):
                if state.momentum is None:
                    message = self.compressor.encode_feedback(
                        state.residual[part], gradient[part], step=step, last=last, out=state.spare[part]
                    )
                else:
                    vectors = gradient[part], state.momentum[part], state.residual[part]
                    message = self.compressor.encode_momentum(
                        *vectors,
                        self.momentum,
                        nesterov=self.nesterov,
                        mask=self.mask,
                        step=step,
                        last=last,
                        finite=True,
                    )
                messages.append(message)
        except NotFiniteError:
            return None
        return messages

    def can_accumulate(self, gradient: Vector, state: FeedbackState, ranks: int) -> bool:
        """Whether u and v of so many ranks together stay finite, now and when the momentum of today has run out."""
        peak = largest(gradient)
        if peak <= NEVER_OVERFLOWS and (ranks == 1 or largest(state.residual) <= NEVER_OVERFLOWS):
            return True
        moving = 0.0 if state.momentum is None else largest(state.momentum)
        ahead = (moving + peak) / (1 - self.momentum)
        return peak < math.inf and largest(state.residual) + ahead < LARGEST_SUM / ranks

    def flush(self, state: FeedbackState) -> tuple[Vector, FeedbackState]:
        """Exchange the residuals densely."""
        total, cost = exchange_unsent(self.comm, state.residual, self.reduce)
        return total, state._replace(residual=np.zeros_like(total), report=state.report.add(cost))


class UnbiasedExchange(FeedbackExchange):
    """The exchange of :func:`without_feedback`: there is no residual."""

    keeps_residual = False

    def init(self, weights: Vector) -> FeedbackState:
        """Nothing is ever unsent."""
        state, nothing = super().init(weights), weights[:0].copy()
        return state._replace(residual=nothing, spare=nothing.copy())

    def encode(self, gradient: Vector, state: FeedbackState) -> list[Message] | None:
        """The message of each part."""
        step = state.steps * self.comm.size + self.comm.rank
        try:
            parts = zip(self.slices_of(gradient), state.headers, strict=True)
            return [self.compressor.encode(gradient[part], step, last) for part, last in parts]
        except NotFiniteError:
            return None


def without_feedback(
    compressor: Compressor,
    comm: MPI.Intracomm,
    *,
    reduce: Literal["mean", "sum"] = "mean",
    parts: Sequence[slice] | None = None,
) -> Transform:
    """Exchange gradients of shape (n,), float32, as messages of a compressor that rounds at random, without feedback.

    The step is the mean, or sum, of the decoded messages; its mean over the random numbers, which differ on every rank
    and in every step, is that of the gradients.  Right where the error is small, or averages out over many ranks and
    steps: QSGD with many levels, natural compression, TernGrad with small steps.  With error feedback the error of a
    step is made up for in later ones, at the price of a vector of memory and of delay.  ``parts`` as in
    :func:`feedback`; steps with a gradient that is not finite are skipped on all ranks.

    Raises ArgumentError for a compressor whose error has a direction, such as topk: it needs :func:`feedback`.
    """
    require(
        hasattr(compressor, "decode_all"),
        f"without_feedback: {compressor!r} is no compressor: pass qsgd(), ternary() …",
    )
    require(
        compressor.unbiased,
        f"without_feedback: {compressor.name} leaves out the same elements again and again: pass qsgd, ternary or "
        "natural, or use feedback",
    )
    comm = as_communicator("without_feedback", comm)
    check_choice("without_feedback: reduce", reduce, ("mean", "sum"))
    sends = UnbiasedExchange(compressor, comm, 0.0, False, False, reduce, parts)
    return Transform(sends.init, sends.update, comm=comm, needs_whole=compressor.name)


NEVER_OVERFLOWS, LARGEST_SUM = 1e20, 3e38
"""Gradients up to the first do not add up to more than float32 holds in any run; sums are refused from the second."""
TOO_LONG = "split them into buckets below 2**31"


def accumulate_all(
    gradient: Vector, state: FeedbackState, momentum: float, nesterov: bool
) -> tuple[Vector, FeedbackState]:
    """u and v after this gradient; all of v is handed out, so that v is 0, and u is this rank's own as ever."""
    nothing, velocity = np.zeros_like(gradient), state.momentum
    if velocity is None:
        return gradient + state.residual, state._replace(residual=nothing)
    velocity, step = heavy_ball(gradient, velocity, momentum, nesterov)
    return step + state.residual, state._replace(residual=nothing, momentum=velocity)


def heavy_ball(gradient: Vector, velocity: Vector, momentum: float, nesterov: bool) -> tuple[Vector, Vector]:
    """The new velocity, and the step."""
    factor = np.float32(momentum)
    if nesterov:
        velocity = factor * (velocity + gradient)
        return velocity, velocity + gradient
    velocity = factor * velocity + gradient
    return velocity, velocity


def headers_of(messages: Sequence[Message]) -> npt.NDArray[np.uint8]:
    """The first bytes of the message of each part."""
    return np.array([each[:HEADER_BYTES] for each in messages], np.uint8).reshape(-1, HEADER_BYTES)


def agree_on_most(comm: MPI.Intracomm, count: int) -> int:
    """The largest count of all ranks, at least 1 (collective)."""
    counts = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([count], np.int64), counts)
    return max(1, int(counts.max()))


def largest(vector: Any) -> float:
    """max |x|, not finite where an element is not; 0 without elements."""
    if isinstance(vector, np.ndarray):
        return kernels().largest_magnitude(vector)
    return float(abs(vector).max()) if vector.size else 0.0


def all_ranks_true(comm: MPI.Intracomm, fine: bool) -> bool:
    """Whether ``fine`` holds on all ranks (collective)."""
    if comm.size == 1:
        return fine
    from mpi4py import MPI

    least = np.empty(1, np.uint8)
    comm.Allreduce(np.array([fine], np.uint8), least, MPI.MIN)
    return bool(least[0])


def check_agreement(comm: MPI.Intracomm, fine: bool, name: str, length: int = 0) -> tuple[bool, int, int]:
    """Whether ``fine`` holds on all ranks, the largest length, and the bytes that this rank sends (collective).

    Raises ArgumentError on all ranks where ranks pass different compressors.
    """
    if comm.size == 1:
        return fine, length, 0
    mine, rows = np.array([2 * length + fine, zlib.crc32(name.encode())]), np.empty((comm.size, 2), np.int64)
    comm.Allgather(mine, rows)
    for rank in np.flatnonzero(rows[:, 1] != rows[0, 1]):
        raise ArgumentError(f"{name}: ranks 0 and {rank} use different compressors: make them alike; nothing was sent")
    return bool((rows[:, 0] % 2).all()), int(rows[:, 0].max()) // 2, mine.nbytes * (comm.size - 1)


def exchange_messages(
    everyone: MessageGather | NodeGather, messages: Sequence[Message] | None
) -> tuple[list[list[Message]] | None, int]:
    """The messages of all ranks, the same number from each, and the bytes that this rank sends (collective).

    If any rank passes ``None`` (it has no messages), all ranks get ``None``.
    """
    packed = np.empty(0, np.uint8) if messages is None else join_messages(messages)
    received, nbytes = everyone.gather(packed) if everyone.size > 1 else ([packed], 0)
    return (None if any(not each.size for each in received) else [split_messages(each) for each in received]), nbytes
