"""All-to-all in rounds: a rank sends one block and receives another, and all ranks begin a round together.

*p ranks, r this one, k the round, from 1 to p-1: to r+k, from r-k.*  Without a barrier before each round, long messages
of ranks in different rounds meet at one receiver, where TCP drops packets.  Blocks travel in segments below the length
from which Open MPI's TCP sends in one direction at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from hpccomm.backends.base import Backend
from hpccomm.calls.call import Call
from hpccomm.calls.plans import KEPT, Plan, compose
from hpccomm.collectives.engine import Vector
from hpccomm.collectives.hierarchical import MESSAGE_BYTES
from hpccomm.transports.polling import await_request

SEGMENT_BYTES, WINDOW_BYTES = MESSAGE_BYTES, 256 * MESSAGE_BYTES
"""Bytes of a message, and those that are under way at one time in each direction."""


class Pairwise(Backend):
    """Pairwise exchange (Thakur, Rabenseifner & Gropp 2005) with a barrier before each round."""

    name = "pairwise"

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """One, for alltoall."""
        return (self.name,) if collective == "alltoall" else ()

    def takes(self, call: Call, algorithm: str) -> bool:
        """Every call whose elements can be read."""
        return call.readable

    def bind(self, call: Call) -> Plan:
        """Bind the blocks; messages are made in each call, as a plan of them would need much memory."""
        messages, rank, p, tag = self.context.messages, call.rank, call.size, call.fingerprint.digest
        before, after = call.before, call.after  # a plan holds no call, which holds the user's arrays
        octets = [each.vector(p * each.block_length(p)).view("u1") for each in (call.send, call.recv)]
        sent, received = ([each[k * each.size // p :][: each.size // p] for k in range(p)] for each in octets)

        def exchange(send: Vector, to: int, recv: Vector, source: int) -> None:
            pairs = zip(segments(send, SEGMENT_BYTES), segments(recv, SEGMENT_BYTES), strict=True)
            bound = [messages.exchange(here, to, there, source, tag) for here, there in pairs]
            try:
                for act in chain.from_iterable([*(each.starts for each in bound), *(each.waits for each in bound)]):
                    act()
            except BaseException:
                KEPT.append((bound, before, after))  # and the memory of a rewritten call
                raise
            for each in bound:
                each.free()

        def run() -> None:
            received[rank][...] = sent[rank]
            for k in range(1, p):
                await_request(messages.comm.Ibarrier())
                to, source = (rank + k) % p, (rank - k) % p
                for send, recv in zip(
                    segments(sent[to], WINDOW_BYTES), segments(received[source], WINDOW_BYTES), strict=True
                ):
                    exchange(send, to, recv, source)

        return Plan(compose([before, run, after]), pends=True)


def segments(vector: Vector, length: int) -> Iterator[Vector]:
    """The segments of a vector, of at most so many elements."""
    for first in range(0, vector.size, length):
        yield vector[first : first + length]
