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

import time
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.compression.format import HEADER_BYTES, Compressor, Message, check_flat, header_of
from hpccomm.algorithms.exchange import ExchangeReport
from hpccomm.algorithms.transforms import Transform, Vector, check_alike, check_decay, require
from hpccomm.collectives.compressed.messages import MessageGather
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels

if TYPE_CHECKING:
    from mpi4py import MPI


class FeedbackState(NamedTuple):
    """The state of one rank; it differs between ranks."""

    residual: Vector
    """e, or with momentum v: what this rank has not sent yet."""
    spare: Vector
    """A buffer for the next residual."""
    momentum: Vector | None
    """u, with momentum."""
    headers: npt.NDArray[np.uint8]
    """The first 32 bytes of the last message of each part: an adaptive threshold continues from it."""
    steps: int
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    room: int
    """Bytes of a rank's messages that the first call of the next exchange carries."""


class MessageReport(NamedTuple):
    """The messages of a rank's last step."""

    nbytes: int
    elements: int
    """Elements that the messages name."""
    scale: float
    """The largest threshold or scale of the messages."""
    residual_norm: float
    """Norm of the residual."""
    skipped: int
    """Steps skipped so far."""
    path: str
    """The exchange: "allgather" of messages, "two phases" of bits, "dense" allreduce, "" before the first step."""


def feedback(
    compressor: Compressor,
    comm: MPI.Intracomm,
    momentum: float = 0.0,
    *,
    nesterov: bool = False,
    mask: bool = True,
    reduce: Literal["mean", "sum"] = "mean",
    parts: Sequence[slice] | None = None,
) -> Transform:
    """Exchange gradients of shape (n,), float32, as messages of ``compressor``; the step is their mean, or sum.

    ``momentum`` μ > 0 selects momentum correction and, with ``mask``, momentum factor masking, as above; the optimizer
    that follows then has no momentum of its own.  ``parts``, such as the slices of tensors, are compressed one by one;
    by default the vector is one part.  With a compressor of votes the step is the majority.  If the gradient of any
    rank is not finite, no rank steps, and only ``skipped`` changes in the state.

    Each rank sends its messages to all others, with 8 bytes for the length of each, and 16 bytes more, 32 with
    momentum; short messages are padded to a common length
    (:class:`~hpccomm.collectives.compressed.messages.MessageGather`).  :func:`message_report` reports them.  CuPy
    gradients and their residuals stay on the device, messages pass through the host (compressors with ``on_device``).
    When a run continues with another number of ranks, :func:`~hpccomm.for_ranks` redistributes the residuals.

    Raises ArgumentError for gradients that are not flat float32, and on all ranks where ranks pass different
    compressors or a message is damaged.  The state is then unchanged, except that u and v have advanced where a message
    was damaged in transit: continue from a checkpoint.
    """
    require(hasattr(compressor, "decode_all"), f"feedback: {compressor!r} is no compressor: pass topk(0.01) …")
    require(hasattr(comm, "Allgather"), f"feedback: {comm!r} is no communicator: pass hpccomm.Communicator(comm)")
    check_decay("feedback: momentum", momentum)
    require(reduce in ("mean", "sum"), f"feedback: reduce is {reduce!r}: pass 'mean' or 'sum'")
    require(not nesterov or momentum > 0, "feedback: nesterov needs momentum: pass one above 0")
    everyone = MessageGather(comm)

    def init(weights: Vector) -> FeedbackState:
        zeros = np.zeros_like(check_flat(weights, compressor.name, compressor.on_device))
        headers = np.zeros((len(slices_of(weights)), HEADER_BYTES), np.uint8)
        moved = np.zeros_like(zeros) if momentum else None
        return FeedbackState(zeros, np.zeros_like(zeros), moved, headers, 0, 0, ExchangeReport(), 0)

    def slices_of(vector: Vector) -> Sequence[slice]:
        return [slice(0, vector.size)] if parts is None else parts

    def update(gradient: Vector, state: FeedbackState, weights: Vector) -> tuple[Vector, FeedbackState]:
        check_alike(gradient, weights)
        began = time.perf_counter()
        check_flat(gradient, compressor.name, compressor.on_device)
        fine, asked = kernels(gradient).all_finite(gradient), 0
        if momentum:
            fine, asked = check_agreement(comm, fine, compressor.name)  # before u and v are written in place
        messages = encode(gradient, state) if fine else None
        everyone.set_room(state.room)
        received, nbytes = exchange_messages(everyone, messages)
        nbytes += asked
        if received is None:
            cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
            return np.zeros_like(gradient), state._replace(skipped=state.skipped + 1, report=state.report.add(cost))
        total = np.zeros_like(gradient)
        for number, part in enumerate(slices_of(gradient)):
            compressor.decode_all([each[number] for each in received], total[part])
            if reduce == "mean" or compressor.agree is not None:
                compressor.conclude(total[part], comm.size)
        cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
        residual, spare = (state.residual, state.spare) if momentum else (state.spare, state.residual)
        headers = np.stack([each[:HEADER_BYTES] for each in received[comm.rank]])
        report = state.report.add(cost)
        return total, FeedbackState(
            residual, spare, state.momentum, headers, state.steps + 1, state.skipped, report, everyone.room
        )

    def encode(gradient: Vector, state: FeedbackState) -> list[Message]:
        messages = []
        for part, last in zip(slices_of(gradient), state.headers, strict=True):
            if state.momentum is None:
                message = compressor.encode_feedback(
                    state.residual[part], gradient[part], step=state.steps, last=last, out=state.spare[part]
                )
            else:
                vectors = gradient[part], state.momentum[part], state.residual[part]
                message = compressor.encode_momentum(
                    *vectors, momentum, nesterov=nesterov, mask=mask, step=state.steps, last=last, finite=True
                )
            messages.append(message)
        return messages

    return Transform(init, update)


def message_report(state: FeedbackState) -> MessageReport:
    """The messages of a rank in its last step that was not skipped."""
    norm = float(np.sqrt(np.square(state.residual, dtype=np.float64).sum()))
    headers = [header_of(each, "sent") for each in state.headers if each.any()]
    nbytes = sum(HEADER_BYTES + each.nbytes for each in headers)
    scale = max((each.scale for each in headers), default=0.0)
    path = "allgather" if state.steps else ""
    return MessageReport(nbytes, sum(each.elements for each in headers), scale, norm, state.skipped, path)


def all_ranks_true(comm: MPI.Intracomm, fine: bool) -> bool:
    """Whether ``fine`` holds on all ranks (collective)."""
    if comm.size == 1:
        return fine
    from mpi4py import MPI

    least = np.empty(1, np.uint8)
    comm.Allreduce(np.array([fine], np.uint8), least, MPI.MIN)
    return bool(least[0])


def check_agreement(comm: MPI.Intracomm, fine: bool, name: str) -> tuple[bool, int]:
    """Whether ``fine`` holds on all ranks, and the bytes that this rank sends (collective).

    Raises ArgumentError on all ranks where ranks pass different compressors.
    """
    if comm.size == 1:
        return fine, 0
    mine, rows = np.array([fine, zlib.crc32(name.encode())]), np.empty((comm.size, 2), np.int64)
    comm.Allgather(mine, rows)
    for rank in np.flatnonzero(rows[:, 1] != rows[0, 1]):
        raise ArgumentError(f"{name}: ranks 0 and {rank} use different compressors: make them alike; nothing was sent")
    return bool(rows[:, 0].all()), mine.nbytes * (comm.size - 1)


def exchange_messages(
    everyone: MessageGather, messages: Sequence[Message] | None
) -> tuple[list[list[Message]] | None, int]:
    """The messages of all ranks, the same number from each, and the bytes that this rank sends (collective).

    If any rank passes ``None`` (it has no messages), all ranks get ``None``.
    """
    packed = np.empty(0, np.uint8)
    if messages is not None:
        lengths = np.array([len(messages), *(each.size for each in messages)], "<u8")
        packed = np.concatenate([lengths.view(np.uint8), *messages])
    received, nbytes = everyone.gather(packed) if everyone.comm.size > 1 else ([packed], 0)
    return (None if any(not each.size for each in received) else [unpack_messages(each) for each in received]), nbytes


def unpack_messages(packed: Message) -> list[Message]:
    """The messages in an array of bytes that holds their number, their lengths, and then the messages."""
    first = 8 * (int(packed[:8].view("<u8")[0]) + 1)
    ends = accumulate(packed[8:first].view("<u8").tolist(), initial=first)
    return [packed[lo:hi] for lo, hi in pairwise(ends)]
