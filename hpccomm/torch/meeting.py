"""The rendezvous of ranks that MPI's launcher has started: MPI tells them where torch's store listens.

Calls of MPI would wait for ever for a rank that does not come.  So the ranks agree before, in messages to and from rank
0, that all are here, each within its time limit, or in that of rank 0 once all have come:

1. Every rank sends COME.  If its time is over it sends GONE and raises; it may come again.
2. Once all have come rank 0 sends ASK, and every rank answers SURE: from then on it obeys rank 0.
3. If all are sure rank 0 sends GO; if one has gone, BACK to the others, which wait again as before.
4. If its time is over rank 0 sends ABSENT, with the missing ranks, to all that are here; all of them raise.
"""

from __future__ import annotations

import math
import os
import socket
import time
from datetime import timedelta
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed import distributed_c10d

from hpccomm import launcher
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.communicator import install_abort_hook
from hpccomm.errors import MismatchError, TransportError
from hpccomm.transports.polling import await_request

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10
"""How long a rank tries one address of the store."""
STORE_TAG, GROUP_TAG = 31_877, 31_878
"""The tags of the messages before ranks look for the store, and before they make the default group."""
GRACE_SECONDS = 1.0
"""How much longer than its limit a rank waits for rank 0, whose time may have begun later, and rank 0 for answers."""

COME, GONE, SURE, ASK, BACK, GO, ABSENT = range(7)
"""Kinds of messages; each holds its kind, the attempt of the rank, the round of the question, and marks of ranks."""
HEADER = 3
"""Numbers before the marks."""
HERE, NEVER_CAME, HAS_GONE = range(3)
"""Marks of ranks, in ABSENT."""

SEND_SECONDS = 0.1
"""How long a rank that raises lets MPI send its last messages."""

_attempts, _rounds = count(1), count(1)


def open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Torch's store, hosted by rank 0, this rank and the number of ranks (collective over all ranks of MPI)."""
    install_abort_hook()
    world = MPI.Intracomm(MPI.COMM_WORLD)
    launcher.check_world(world.size, os.environ)
    await_ranks(Place(world, STORE_TAG), timeout.total_seconds())
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = node.size == world.size
    local = node.rank
    node.Free()
    store, offer = None, None
    if world.rank == 0:
        hosts = [LOOPBACK] if one_node else addresses()
        store = dist.TCPStore("localhost", 0, world.size, True, timeout, wait_for_workers=False)
        offer = (hosts, store.port)
    hosts, port = world.bcast(offer)
    if store is None:
        store = connect(hosts, port, world.size, timeout)
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", local)):
        os.environ.setdefault(name, str(value))
    return store, world.rank, world.size


class Place(NamedTuple):
    """Where ranks meet: a communicator, and the tag of the messages, which no other meeting has."""

    world: Any
    tag: int


def await_ranks(place: Place, limit: float) -> None:
    """Wait until all ranks are here; after ``limit`` seconds raise MismatchError, naming the missing ones.

    Either no rank raises or each does, also one that comes after others have raised; and all may come again.
    """
    marks = await_others(place, limit) if place.world.rank == 0 else await_first(place, limit)
    if marks is not None:
        distributed_c10d._world.group_count = 0  # torch has counted this group; the names of others follow from it
        raise MismatchError(
            f"rank {place.world.rank}: init_process_group timed out after {limit:g} s, missing: {describe(marks)}: "
            "make all ranks call it"
        )


def describe(marks: Any) -> str:
    """The missing ranks, and those of them that were here before."""
    missing, gone = (np.flatnonzero(each).tolist() for each in (marks, marks == HAS_GONE))
    if not missing:
        return "rank 0, or ranks for which it waits"
    return format_ranks(missing) + (f" ({format_ranks(gone)} timed out before)" if gone else "")


def await_others(place: Place, limit: float) -> Any:
    """Rank 0: wait until all ranks are sure; None, or if the time is over the marks of all ranks."""
    arrivals, until = Arrivals(place), time.monotonic() + limit
    try:
        while not arrivals.is_complete:
            rank, message = receive(place, MPI.ANY_SOURCE, until - time.monotonic())
            if message is None:
                return arrivals.give_up()
            if arrivals.take(rank, *message[:HEADER].tolist()):
                until = max(until, time.monotonic() + GRACE_SECONDS)
    except BaseException:  # an interrupt
        arrivals.give_up()
        raise
    arrivals.tell_all(GO)
    return None


class Arrivals:
    """What rank 0 knows of the other ranks."""

    def __init__(self, place: Place) -> None:
        self.place, self.size = place, place.world.size
        self.here: dict[int, int] = {}
        """The attempt of each rank that has come."""
        self.gone: set[int] = set()
        self.sure: set[int] = set()
        self.round = 0
        """The number of the question that is under way, 0 if there is none."""

    @property
    def is_complete(self) -> bool:
        """Whether all ranks are sure."""
        return len(self.sure) == self.size - 1

    def take(self, rank: int, kind: int, attempt: int, round_: int) -> bool:
        """Take a message of a rank; ask all when the last one has come, and return whether it has."""
        if kind == COME:
            self.here[rank] = attempt
            self.gone.discard(rank)
        elif kind == SURE and round_ == self.round:
            self.sure.add(rank)
        elif kind == GONE:
            self.here.pop(rank, None)
            self.gone.add(rank)
            if self.round:
                self.tell_all(BACK)
                self.round, self.sure = 0, set()
        asks = not self.round and len(self.here) == self.size - 1
        if asks:
            self.round = next(_rounds)
            self.tell_all(ASK)
        return asks

    def give_up(self) -> Any:
        """Tell all ranks that are here which ones are missing, as marks of all ranks."""
        marks = self.marks()
        self.tell_all(ABSENT, marks)
        await_request(OUTBOX, SEND_SECONDS)
        return marks

    def marks(self) -> Any:
        """A mark for each rank."""
        present = self.sure if self.round else self.here
        found = [HERE if rank in present else HAS_GONE if rank in self.gone else NEVER_CAME for rank in self.everyone]
        return np.array([HERE, *found], np.int32)

    @property
    def everyone(self) -> range:
        """The other ranks."""
        return range(1, self.size)

    def tell_all(self, kind: int, marks: Any = ()) -> None:
        """Send a message to all ranks that are here."""
        for rank, attempt in self.here.items():
            post(self.place, rank, kind, attempt, self.round, marks)


def await_first(place: Place, limit: float) -> Any:
    """The other ranks: answer rank 0 until it sends GO; None, or the marks of all ranks, which it may not know."""
    attempt = next(_attempts)
    try:
        marks = answer_first(place, attempt, time.monotonic() + limit + GRACE_SECONDS)
    except BaseException:
        leave(place, attempt)
        raise
    return marks


def leave(place: Place, attempt: int) -> None:
    """Tell rank 0 that this rank no longer waits."""
    post(place, 0, GONE, attempt)
    await_request(OUTBOX, SEND_SECONDS)


def answer_first(place: Place, attempt: int, until: float) -> Any:
    """What :func:`await_first` does in one attempt, until its time is over, or as long as rank 0 once it is sure."""
    sure = False
    post(place, 0, COME, attempt)
    while True:
        _, message = receive(place, 0, math.inf if sure else until - time.monotonic())
        if message is None:
            leave(place, attempt)
            return np.zeros(place.world.size, np.int32)
        kind, told, round_ = message[:HEADER].tolist()
        if told != attempt:  # to an earlier one, which has raised
            continue
        if kind in (GO, ABSENT):
            return None if kind == GO else message[HEADER:]
        sure = kind == ASK
        if sure:
            post(place, 0, SURE, attempt, round_)


def post(place: Place, rank: int, kind: int, attempt: int, round_: int = 0, marks: Any = ()) -> None:
    """Send a message without waiting for it."""
    OUTBOX.Test()
    message = np.array([kind, attempt, round_, *marks], np.int32)
    OUTBOX.requests.append(place.world.Isend([message, MPI.INT32_T], rank, place.tag))


def receive(place: Place, source: int, seconds: float) -> tuple[int, Any]:
    """The sender of the next message and what it holds, None if there is none within some seconds."""
    mail, status = Mail(place, source), MPI.Status()
    if not await_request(mail, seconds):
        return source, None
    message = np.zeros(HEADER + place.world.size, np.int32)
    mail.message.Recv([message, MPI.INT32_T], status)
    return status.source, message


class Mail:
    """The next message of a rank, or of any, as a request."""

    def __init__(self, place: Place, source: int) -> None:
        self.place, self.source = place, source
        self.message: Any = None

    def Test(self) -> bool:
        """Whether it has come."""
        self.message = self.message or self.place.world.Improbe(self.source, self.place.tag)
        return self.message is not None


class Outbox:
    """The messages that may not have been sent, as one request."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Test(self) -> bool:
        """Whether all have been sent."""
        self.requests = [each for each in self.requests if not each.Test()]
        return not self.requests


OUTBOX = Outbox()


def connect(hosts: list[str], port: int, size: int, timeout: timedelta) -> Any:
    """The store at the first of these addresses that can be reached."""
    for host in hosts:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError:
            continue
        return dist.TCPStore(host, port, size, False, timeout)
    raise TransportError(
        f"torch's store of rank 0 cannot be reached at port {port} of {', '.join(hosts)}: set MASTER_ADDR and "
        "MASTER_PORT to an address and a free port of rank 0's node, and RANK and WORLD_SIZE of every rank"
    )


def addresses() -> list[str]:
    """The addresses of this node that others may reach, that of its name first."""
    found = []
    for name in (socket.gethostname(), socket.getfqdn()):
        try:
            found += [each[4][0] for each in socket.getaddrinfo(name, None, socket.AF_INET)]
        except OSError:
            continue
    found += local_addresses()
    return [each for each in dict.fromkeys(map(str, found)) if not each.startswith("127.")] or [LOOPBACK]


def local_addresses() -> list[str]:
    """The addresses of this node's interfaces, as Linux lists them."""
    try:
        with open("/proc/net/fib_trie", encoding="ascii") as file:
            lines = file.read().split("\n")
    except OSError:
        return []
    return [before.split()[-1] for before, line in pairwise(lines) if "/32 host LOCAL" in line]
