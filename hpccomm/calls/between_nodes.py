"""Compares the calls of ranks of several nodes by a small message, before calls that MPI's own algorithms make.

*p ranks; seq the number of the call.*  Ranks of one node compare every call in shared memory.  Ranks of several nodes
compare the calls that make a communicator (:mod:`hpccomm.calls.makers`), the first other call and then every 64th;
with ``HPCCOMM_DEBUG=detail`` every call.  All ranks gather number and digest of all ranks' calls, so all of them see
the same differences and raise the same error; then, where blocks may have any length, every two ranks exchange how
many bytes one sends and the other receives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.blocks import Amounts
from hpccomm.calls.fingerprint import (
    REMEDIES,
    TEXT_BYTES,
    Fingerprint,
    decode,
    find_difference,
    format_ranks,
    mismatch_message,
)
from hpccomm.calls.makers import MAKERS
from hpccomm.errors import MismatchError
from hpccomm.kernels.entry.records import DIGEST_BITS
from hpccomm.transports.polling import await_request

MASKS = {"detail": 0, "sample": 63, "off": -1}
"""Calls whose number has none of these bits are compared."""


class BetweenNodes:
    """The comparisons of one communicator; ``comm`` is a private communicator of its ranks, ``table`` that of its node.

    ``mask`` is one of :data:`MASKS`.
    """

    def __init__(self, comm: MPI.Intracomm, table: Any, mask: int) -> None:
        self._comm, self._table, self.mask = comm, table, mask
        self._me = comm.rank
        self._compatible: set[bytes] = set()
        self._has_compared = False
        """Whether a call that is no maker has been compared, without an error: the same on all ranks."""

    def takes(self, seq: int, always: bool = False) -> bool:
        """Whether a call is compared, or one of those that ``always`` are; the same on all ranks."""
        return self.mask >= 0 and (always or not self._has_compared or not seq & self.mask)

    def compare(self, entry: int, call: Fingerprint | None, amounts: Amounts | None) -> None:
        """Compare a call with those of all ranks (collective); all ranks raise if one differs."""
        entries = np.empty(self._comm.size, np.int64)
        self._gather(np.array([entry]), entries, call)
        digests, numbers = entries & ((1 << DIGEST_BITS) - 1), entries >> DIGEST_BITS
        same = (numbers == numbers[0]).all()
        if not same or ((digests != digests[0]).any() and digests.tobytes() not in self._compatible):
            self._compare_texts(call, numbers)
            self._compatible.add(digests.tobytes())
        if amounts is not None:
            self._compare_amounts(amounts)
        self._has_compared = self._has_compared or (call is not None and call.collective not in MAKERS)

    def _gather(self, send: Any, recv: Any, call: Fingerprint | None) -> None:
        """Gather before ``call``, and sleep while ranks are missing; raise if one can never come."""
        request = self._comm.Iallgather(send, recv)
        try:
            await_request(request, check=partial(self.check_departures, call))
        except BaseException as error:
            if isinstance(error, MismatchError) and request.Test():  # it came before that rank has left
                return
            _abandoned.append(request)  # MPI may still write what the request holds
            raise

    def check_departures(self, call: Fingerprint | None) -> None:
        """Raise if a rank has left without ``call``; one of this node may leave after it, or by an error of it."""
        rank = self._table.find_departure(entered=True)
        if rank is not None:
            raise MismatchError(self._table.explain_departure(rank, call))

    def _compare_texts(self, call: Fingerprint | None, numbers: Any) -> None:
        """Raise if the fingerprints or the numbers of two calls contradict each other."""
        size = self._comm.size
        octets = call.encode() if call else bytes(TEXT_BYTES)
        texts = np.empty((size, TEXT_BYTES), np.uint8)
        self._gather(np.frombuffer(octets, np.uint8), texts, call)
        calls = {rank: decode(each.tobytes()) for rank, each in enumerate(texts)}
        if find_difference(calls.values()):
            raise MismatchError(mismatch_message(calls, self._me))
        if (numbers != numbers[0]).any():
            groups = {number: np.flatnonzero(numbers == number).tolist() for number in sorted(set(numbers.tolist()))}
            made = ", ".join(f"{format_ranks(ranks)} made call {number}" for number, ranks in groups.items())
            raise MismatchError(f"{made} of this communicator: {REMEDIES['collective']} (noticed by rank {self._me})")

    def _compare_amounts(self, amounts: Amounts) -> None:
        """Raise on all ranks if one sends another amount than the receiver expects."""
        mine = np.array([amounts.sends, amounts.receives], np.int64).T.copy()
        theirs = np.empty_like(mine)
        self._comm.Alltoall(mine, theirs)
        pairs = zip(mine.tolist(), theirs.tolist(), strict=True)
        found = [self._table.explain_amounts(rank, *pair) for rank, pair in enumerate(pairs)]
        troubles = [each for each in self._comm.allgather(next(filter(None, found), "")) if each]
        if troubles:
            raise MismatchError(troubles[0])


_abandoned: list[MPI.Request] = []
"""Gathers that this rank has left by an error, and MPI has not ended."""
