"""A parameter server: server ranks hold the model, worker ranks push gradients to them and pull weights.

*S servers, the first ranks, each with a shard of the flat model; N workers, the others; a worker's clock counts its
pushes; a server's version counts the applied clocks (BSP) or pushes.*

==================  ==========================================================  ===================================
mode                a worker with clock c reads when                            a push is applied
==================  ==========================================================  ===================================
``"bsp"``           all workers have pushed c times                             with all of that clock, in rank order
``("ssp", s)``      no clock is below c − s                                     when it arrives
``"asp"``           always                                                      when it arrives
==================  ==========================================================  ===================================

(Valiant 1990 for bulk-synchronous; Ho et al., NIPS 2013 for stale-synchronous.)  A worker sends and receives n
elements a step, a server N n/S in each direction: with many workers and few servers the servers' links are the
bottleneck, which allreduce avoids.  Pushes may be compressed; pulled weights are always dense.

A message is a header of 32 bytes and a payload.  A worker waits for a server only in a read, and a server never waits
for a worker to receive, so deadlock is impossible.

Workers come and go: nobody waits for one that has paused, or whose error was told to the servers, or that has been
silent for longer than their ``patience`` while others wait.  One that joins again takes the clock of the slowest; the
servers agree on it in one or two rounds.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import as_communicator, check_same_tensors, rows_of
from hpccomm.algorithms.blockwise_filtering import shard
from hpccomm.algorithms.row_sparse import RowCode
from hpccomm.algorithms.transforms import Transform, Vector, is_number, require
from hpccomm.algorithms.trees import check_alike
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError, HpccommError, MismatchError
from hpccomm.performance.units import format_count

if TYPE_CHECKING:
    from mpi4py import MPI

Mode = Literal["bsp", "asp"] | tuple[Literal["ssp"], int]

LOGGER = logging.getLogger("hpccomm")
HEADER = struct.Struct("<4sB3xqqq")
"""Mark, request, three bytes of padding, clock, version, bytes of payload; little-endian."""
MARK = b"HPS1"
TOO_LATE = -1
"""The clock of the notice to a worker that was given up: the servers have ended."""
PUSH, PULL, LEAVE, REPLY, PAUSE, JOIN, ABANDON = range(7)
TAG = 1


class Codec(Protocol):
    """A compressor, as pushes use it.  Vectors are float32."""

    def encode_feedback(self, backlog: Vector, gradient: Vector | None = None) -> npt.NDArray[np.uint8]:
        """The message for backlog + gradient; the backlog becomes the sum less the decoded message."""

    def decode(self, message: npt.NDArray[np.uint8], out: Vector) -> None:
        """Add the decoded message to ``out``."""


class Rules(NamedTuple):
    """When a worker may read, and how a push is applied."""

    slack: float
    """How many clocks a worker may be ahead of the slowest: 0 for BSP, infinity for ASP."""
    synchronous: bool
    """Whether the pushes of a clock are applied together."""
    backup: int = 0
    """Pushes of a clock that servers do not wait for."""
    mean: bool = True
    """Whether pushes are divided by the number of workers."""
    damp: Callable[[int], float] | None = None
    """The factor of a push, a function of its staleness."""
    limit: float = math.inf
    """Staler pushes are dropped."""


def rules_of(mode: Mode, **options: Any) -> Rules:
    """The rules of a mode; raises for an unknown mode."""
    stale = (
        isinstance(mode, tuple) and len(mode) == 2 and mode[0] == "ssp" and isinstance(mode[1], int) and mode[1] >= 0
    )
    require(
        stale or mode in ("bsp", "asp"),
        f"ParameterServer: mode is {mode!r}: pass 'bsp', 'asp', or ('ssp', s) with s of 0 or more",
    )
    slack = mode[1] if isinstance(mode, tuple) else 0 if mode == "bsp" else math.inf
    rules = Rules(slack, synchronous=slack == 0, **options)
    require(rules.backup >= 0, f"ParameterServer: backup is {rules.backup}: pass 0 or more workers")
    require(not rules.backup or rules.synchronous, "ParameterServer: only 'bsp' has backup workers")
    return rules


class Ledger:
    """The clocks of all workers and the pending pushes; ``apply(gradients)`` steps the model."""

    def __init__(self, workers: int, rules: Rules, apply: Callable[[list[Vector]], None]) -> None:
        self.rules, self.apply = rules, apply
        self.clocks: list[float] = [0] * workers
        self.last_clocks = [0] * workers
        """The clock of each worker when it was last here."""
        self.pending_pushes: dict[int, dict[int, Vector]] = {}
        self.version = 0
        """Clocks applied in BSP, else pushes applied."""
        self.staleness: Counter[int] = Counter()
        """Pushes by staleness: the number of versions applied since their worker's read."""
        self.dropped = 0

    def may_read(self, worker: int) -> bool:
        """Whether the weights are recent enough for the worker."""
        if self.rules.synchronous:
            return self.version >= self.clocks[worker] or all(map(math.isinf, self.clocks))
        return min(self.clocks) >= self.clocks[worker] - self.rules.slack

    def push(self, worker: int, gradient: Vector, version: int) -> int:
        """Take a gradient that was computed at a version; returns its staleness."""
        clock, stale = int(self.clocks[worker]), self.version - version
        self.clocks[worker] += 1
        self.staleness[stale] += 1
        if (self.rules.synchronous and clock < self.version) or stale > self.rules.limit:
            self.dropped += 1
        elif self.rules.synchronous:
            self.pending_pushes.setdefault(clock, {})[worker] = gradient
            self.settle()
        else:
            damped = gradient if self.rules.damp is None else gradient * self.rules.damp(stale)
            self.step([damped])
        return stale

    def leave(self, worker: int, pushed: float = math.inf) -> None:
        """Let no read wait for a worker; of its pending pushes only the first ``pushed`` count."""
        if not math.isinf(self.clocks[worker]):
            self.last_clocks[worker] = int(self.clocks[worker])
        self.clocks[worker] = math.inf
        for clock, pushes in list(self.pending_pushes.items()):
            if clock >= pushed and pushes.pop(worker, None) is not None:
                self.dropped += 1
            if not pushes:
                del self.pending_pushes[clock]
        if self.rules.synchronous:
            self.settle()

    def pace(self, worker: int) -> int:
        """The least clock at which a worker may join: that of the slowest, and none at which it has pushed."""
        here = [int(clock) for clock in self.clocks if not math.isinf(clock)]
        slowest = self.version if self.rules.synchronous else min(here, default=0)
        return max(slowest, self.last_clocks[worker])

    def join(self, worker: int, clock: int) -> bool:
        """Let a worker take part from a clock, unless it is too early; returns whether it does."""
        if clock < self.pace(worker):
            return False
        self.clocks[worker] = clock
        if self.rules.synchronous:
            self.settle()
        return True

    def settle(self) -> None:
        """Apply complete clocks, the pushes of each in rank order; pass over those at which nobody was here."""
        while True:
            pushes = self.pending_pushes.get(self.version, {})
            missing = sum(clock <= self.version for clock in self.clocks)
            others = bool(self.pending_pushes) or not all(map(math.isinf, self.clocks))
            if missing > self.rules.backup or (not pushes and (missing or not others)):
                return
            self.pending_pushes.pop(self.version, None)
            if pushes:
                self.step([pushes[worker] for worker in sorted(pushes)])
            else:
                self.version += 1

    def step(self, gradients: list[Vector]) -> None:
        """Apply gradients as one version."""
        self.apply(gradients)
        self.version += 1


class Push(NamedTuple):
    """One row of a timeline."""

    time: float
    worker: int
    clock: int
    staleness: int


def timeline(durations: Sequence[Sequence[float]], mode: Mode) -> list[Push]:
    """All pushes, timed as if messages took no time; ``durations[worker][clock]`` is the length of each step.

    Pushes at the same time are in rank order, before the reads of that time.  The last row's time is the makespan.
    """
    ledger = Ledger(len(durations), rules_of(mode), lambda gradients: None)
    reading, done, now = set(range(len(durations))), [0] * len(durations), 0.0
    running: dict[int, tuple[float, int]] = {}
    rows: list[Push] = []
    while reading or running:
        for worker in [w for w in sorted(reading) if done[w] == len(durations[w])]:
            ledger.leave(worker)
            reading.remove(worker)
        for worker in [w for w in sorted(reading) if ledger.may_read(w)]:
            running[worker] = now + durations[worker][done[worker]], ledger.version
            reading.remove(worker)
        if running:
            now = min(end for end, _ in running.values())
        for worker in [w for w in sorted(running) if running[w][0] == now]:
            stale = ledger.push(worker, np.zeros(0), running.pop(worker)[1])
            done[worker] += 1
            rows.append(Push(now, worker, done[worker], stale))
            reading.add(worker)
    return rows


class ServerReport(NamedTuple):
    """The result of a server."""

    weights: Vector
    """Its slice."""
    state: Any
    """The optimizer's state for the slice."""
    version: int
    staleness: dict[int, int]
    """Pushes by staleness."""
    dropped: int
    lost: tuple[int, ...] = ()
    """Ranks of the workers that were given up."""


class ParameterServer:
    """The model on ``servers`` ranks; the other ranks push gradients and pull weights (collective).

    The servers start from the ``weights`` (n,) of rank 0.  ``optimizer`` turns pushes into a step, slice by slice, so
    it must be elementwise.  ``mode``: see above.  ``reduce``: mean or sum over the N workers.  ``codec`` compresses
    pushes (float32 only): each worker keeps the compression error and adds it to the next gradient.
    ``damp`` multiplies a push by a function of its staleness, e.g. ``lambda s: 1 / (1 + s)``; pushes staler than
    ``limit`` are dropped.  ``backup``: BSP does not wait for this number of the slowest workers and drops their late
    pushes.  ``rows``: a bucket of the model and the names of its embeddings, of whose gradients only the rows that are
    not zero are pushed.

    A server calls :meth:`serve` once; a worker calls :meth:`pull` and :meth:`push` for each batch, then
    :meth:`leave`::

        ps = ParameterServer(comm, weights, synchronous_sgd(MPI.COMM_SELF, 0.1))
        if ps.serves:
            report = ps.serve()
        else:
            for batch in batches:
                ps.push(gradient(ps.pull(), batch))
            weights = ps.leave()

    A worker may :meth:`pause`, and :meth:`join` again later; one that begins late pauses first.  With ``with ps:``
    around its work an error makes it :meth:`abandon` the others, who go on without it.  ``patience``: seconds after
    which a silent worker for which others wait is given up; its late push is dropped, and its next read lets it join
    again, or raises an :class:`~hpccomm.errors.HpccommError` where the servers have ended.  A worker that dies between
    the messages of one push may have moved the slices of some servers only.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        weights: Vector,
        optimizer: Transform,
        *,
        servers: int = 1,
        mode: Mode = "bsp",
        reduce: Literal["mean", "sum"] = "mean",
        codec: Codec | None = None,
        damp: Callable[[int], float] | None = None,
        limit: float = math.inf,
        backup: int = 0,
        rows: tuple[Bucket, Collection[str]] | None = None,
        patience: float | None = None,
    ) -> None:
        comm = as_communicator("ParameterServer", comm)
        self.rules = rules_of(mode, backup=backup, mean=reduce == "mean", damp=damp, limit=limit)
        require(
            patience is None or (is_number(patience) and patience > 0),
            f"ParameterServer: patience is {patience!r}: pass a positive number of seconds, or None to wait for ever",
        )
        require(reduce in ("mean", "sum"), f"ParameterServer: reduce is {reduce!r}: pass 'mean' or 'sum'")
        require(
            1 <= servers < comm.size,
            f"rank {comm.rank}: ParameterServer: {servers} servers of {format_count(comm.size, 'rank')}: leave "
            "at least one server and one worker",
        )
        require(
            codec is None or weights.dtype == np.float32,
            f"ParameterServer: the weights are {weights.dtype}, a codec writes float32: cast them, or leave it out",
        )
        require(codec is None or rows is None, "ParameterServer: a codec and rows: pass one of them")
        size = weights.size if rows is None else rows[0].size
        require(size == weights.size, f"ParameterServer: a bucket of {size} elements for {weights.size} weights")
        check_optimizer(optimizer, servers)
        check_same_tensors(comm, "ParameterServer", rows_of_model(weights, rows))
        self.comm, self.servers, self.optimizer, self.codec = comm.Dup(), servers, optimizer, codec
        self.weights = np.array(weights, order="C")
        self.comm.Bcast(self.weights, 0)
        self.workers = comm.size - servers
        self.row_codes = [RowCode(*rows, self.slice_of(server)) for server in range(servers)] if rows else []
        self.serves, self.patience = comm.rank < servers, patience
        self.takes_part, self.closed = True, False
        self.version = [0] * servers
        """The version of this worker's last read from each server."""
        self.clock = 0
        self.backlog = np.zeros_like(self.weights)
        self.lost_workers = 0
        """Workers that have been given up or have abandoned the others, as a worker learns when it leaves."""

    def slice_of(self, server: int) -> slice:
        """The elements of a server."""
        return shard(self.weights.size, self.servers, server)

    def pull(self) -> Vector:
        """The model, as soon as the mode allows the read; a new vector."""
        self._check("pull", takes_part=True)
        return self._ask(PULL)

    def push(self, gradient: Vector) -> None:
        """Send a gradient, (n,), of the weights last pulled; advances the clock.  The array may be reused."""
        self._check("push", takes_part=True)
        check_alike(gradient, self.weights)
        require(
            bool(np.isfinite(gradient).all()),
            f"rank {self.comm.rank}: ParameterServer.push: the gradient is not finite: push zeros, or skip the batch",
        )
        for server in range(self.servers):
            self._send(server, PUSH, self._encode(gradient, server), self.version[server])
        self.clock += 1

    def leave(self) -> Vector:
        """End pushing; returns the model when all workers have left.  This object is then closed."""
        self._check("leave")
        final = self._ask(LEAVE)
        self._close(self.lost_workers > 0)
        return final

    def pause(self) -> None:
        """Take no part until :meth:`join`: nobody waits for this worker, whose pushes so far count."""
        self._check("pause", takes_part=True)
        self._tell(PAUSE)
        self.takes_part = False

    def join(self) -> Vector:
        """Take part again, at the clock of the slowest worker; returns the model."""
        self._check("join", takes_part=False)
        proposed = -1
        while True:
            self.clock = proposed
            self._tell(JOIN)
            slowest = max(self._receive(server)[2] for server in range(self.servers))
            if proposed >= slowest:
                break
            proposed = slowest
        self.takes_part = True
        return self.pull()

    def abandon(self) -> None:
        """End at once, without the model: servers drop what this worker has pushed to some of them only."""
        self._check("abandon")
        self._tell(ABANDON)
        self.closed = True

    def __enter__(self) -> ParameterServer:
        """This object."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        """Abandon where an error ends a worker."""
        if kind is not None and not self.serves and not self.closed:
            self.abandon()

    def _check(self, verb: str, takes_part: bool | None = None) -> None:
        """Raise for a call that this worker cannot make now."""
        who = f"rank {self.comm.rank}: ParameterServer.{verb}"
        require(not self.serves, f"{who}: this rank is a server: call serve()")
        require(not self.closed, f"{who}: this worker has left: make a new ParameterServer on all ranks")
        if takes_part is not None and takes_part != self.takes_part:
            require(takes_part, f"{who}: this worker takes part: pause() first")
            require(not takes_part, f"{who}: this worker has paused: join() first")

    def _close(self, lost: bool) -> None:
        """Free the communicator, unless a worker may be lost that would not take part in this."""
        self.closed = True
        if not lost and self.patience is None:
            self.comm.Free()

    def _encode(self, gradient: Vector, server: int) -> npt.NDArray[np.uint8]:
        part = self.slice_of(server)
        if self.row_codes:
            return self.row_codes[server].encode(gradient[part])
        if self.codec is None:
            return np.ascontiguousarray(gradient[part]).view(np.uint8)
        return self.codec.encode_feedback(self.backlog[part], np.ascontiguousarray(gradient[part]))

    def _tell(self, what: int) -> None:
        """Send a message without a payload to all servers."""
        for server in range(self.servers):
            self._send(server, what, np.zeros(0, np.uint8), self.version[server])

    def _ask(self, what: int) -> Vector:
        self._tell(what)
        for server in range(self.servers):
            _, _, lost, version, payload = self._receive(server)
            self.lost_workers = max(self.lost_workers, lost)
            part = self.weights[self.slice_of(server)]
            part[...] = self._read(server, "reply", read_elements, payload, part)
            self.version[server] = version
        return self.weights.copy()

    def serve(self, state: Any = None) -> ServerReport:
        """Apply pushes and answer reads until all workers have left.

        ``state``: of an earlier report of this server, to continue that run from the weights that ``leave`` returned;
        with a ``codec`` each worker also sets ``backlog`` to its last value of that run.
        """
        mine = self.slice_of(self.comm.rank)
        weights = self.weights[mine].copy()
        state = self.optimizer.init(weights) if state is None else state

        def apply(gradients: list[Vector]) -> None:
            nonlocal state
            total = gradients[0].copy()
            for each in gradients[1:]:
                total += each
            if self.rules.mean:
                total /= len(gradients) if self.rules.synchronous else self.workers
            step, state = self.optimizer.update(total, state, weights)
            weights[...] += step

        desk = Desk(self, Ledger(self.workers, self.rules, apply), weights)
        turn = 0
        while len(desk.leaving) + len(desk.lost) < self.workers:
            found = self._receive_next(turn)
            if found is None:
                desk.give_up_silent()
            else:
                turn = found[0] + 1
                desk.take(*found)
            desk.answer_reads()
        desk.end()
        self._close(bool(desk.lost))
        ledger, lost = desk.ledger, tuple(self.servers + worker for worker in sorted(desk.lost))
        return ServerReport(weights, state, ledger.version, dict(ledger.staleness), ledger.dropped, lost)

    def _receive_next(self, turn: int) -> tuple[int, int, int, int, npt.NDArray[np.uint8]] | None:
        """The next message, by round robin over the workers; None where none comes for a part of the patience."""
        order = [self.servers + (turn + k) % self.workers for k in range(self.workers)]
        until = None if self.patience is None else time.monotonic() + self.patience / 4
        while True:
            source = next((rank for rank in order if self.comm.Iprobe(rank, TAG)), None)
            if source is not None or until is None:
                rank, *rest = self._receive(source)
                return (rank - self.servers, *rest)  # type: ignore[return-value]
            if time.monotonic() > until:
                return None
            time.sleep(min(1e-3, self.patience / 100) if self.patience else 0)

    def decode(self, payload: npt.NDArray[np.uint8], weights: Vector, rank: int) -> Vector:
        """The gradient in a push of a rank, for the weights of this server."""
        if self.row_codes:
            return self._read(rank, "push", self.row_codes[self.comm.rank].decode, payload, weights.dtype)
        if self.codec is None:
            return self._read(rank, "push", read_elements, payload, weights)
        out = np.zeros_like(weights)
        self._read(rank, "push", self.codec.decode, payload, out)
        return out

    def _read(self, rank: int, what: str, read: Callable[..., Any], *arguments: Any) -> Any:
        """What ``read`` makes of a payload of another rank; raises MismatchError if it cannot be read."""
        try:
            return read(*arguments)
        except ArgumentError as error:
            raise MismatchError(
                f"rank {self.comm.rank}: ParameterServer: the {what} of rank {rank} cannot be read: {error}"
            ) from None

    def reply(self, worker: int, weights: Vector, number: int, version: int) -> tuple[MPI.Request, Any]:
        """Start to send weights to a worker."""
        message = pack_message(REPLY, number, version, weights.view(np.uint8))
        return self.comm.Isend(message, self.servers + worker, TAG), message

    def _send(self, to: int, what: int, payload: npt.NDArray[np.uint8], version: int) -> None:
        if self.patience is not None and self.comm.Iprobe(to, TAG):
            self._receive(to)  # nothing was asked for: a notice
        self.comm.Send(pack_message(what, self.clock, version, payload), to, TAG)

    def _receive(self, source: int | None) -> tuple[int, int, int, int, npt.NDArray[np.uint8]]:
        """(source, what, clock, version, payload) of a message; from any rank if ``source`` is None."""
        from mpi4py import MPI

        status = MPI.Status()
        self.comm.Probe(MPI.ANY_SOURCE if source is None else source, TAG, status)
        message = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.comm.Recv(message, status.source, TAG)
        header = message[: HEADER.size].tobytes().ljust(HEADER.size, b"\xff")
        mark, what, clock, version, nbytes = HEADER.unpack(header)
        payload = message[HEADER.size :]
        if mark != MARK or payload.size != nbytes or what not in (REQUESTS if self.serves else (REPLY,)):
            raise MismatchError(
                f"rank {self.comm.rank}: a message of {message.size} bytes from rank {status.source} is no message of "
                "a parameter server: let all ranks use the same release"
            )
        if what == REPLY and clock == TOO_LATE:
            self.closed = True
            raise HpccommError(
                f"rank {self.comm.rank}: this worker was silent for longer than the patience of {self.patience:g} s, "
                "the others have ended without it: raise patience, or make its steps shorter"
            )
        return status.source, what, clock, version, payload


def check_optimizer(optimizer: Any, servers: int) -> None:
    """Raise for an optimizer whose step on a server's slice is not that of the model, or that waits for workers."""
    part = getattr(optimizer, "needs_whole", "")
    require(
        servers == 1 or not part,
        f"ParameterServer: {part} in the optimizer needs the whole model, each of {servers} servers holds a slice: "
        "leave it out, or use one server",
    )
    require(
        all(comm.size == 1 for comm in getattr(optimizer, "comms", ())),
        "ParameterServer: the optimizer exchanges gradients itself, in which no worker takes part: pass one of "
        "MPI.COMM_SELF, synchronous_sgd(MPI.COMM_SELF, lr)",
    )


def rows_of_model(weights: Vector, rows: tuple[Bucket, Collection[str]] | None) -> list[str]:
    """The model and the names of its embeddings, as they must be on all ranks."""
    if rows is None:
        return [f"weights {weights.dtype}{list(weights.shape)}"]
    return [*rows_of(rows[0]), f"rows {sorted(rows[1])}"]


class Desk:
    """What a server does with a message: one method for each request, in :data:`REQUESTS`."""

    def __init__(self, server: ParameterServer, ledger: Ledger, weights: Vector) -> None:
        self.server, self.ledger, self.weights = server, ledger, weights
        self.readers: list[int] = []
        """Workers whose reads wait."""
        self.leaving: list[int] = []
        self.lost: set[int] = set()
        """Workers that were given up or have abandoned the others."""
        self.sent: list[tuple[MPI.Request, Any]] = []
        self.heard = [time.monotonic()] * server.workers

    def take(self, worker: int, what: int, clock: int, version: int, payload: npt.NDArray[np.uint8]) -> None:
        """Take a message."""
        self.heard[worker] = time.monotonic()
        REQUESTS[what](self, worker, clock, version, payload)

    def push(self, worker: int, clock: int, version: int, payload: npt.NDArray[np.uint8]) -> None:
        """Apply a push, or drop that of a worker that was given up."""
        if worker in self.lost:
            self.ledger.dropped += 1
        else:
            rank = self.server.servers + worker
            self.ledger.push(worker, self.server.decode(payload, self.weights, rank), version)

    def pull(self, worker: int, *rest: Any) -> None:
        """Let a worker read; one that was given up takes part again."""
        if worker in self.lost:
            self.lost.remove(worker)
            self.ledger.join(worker, self.ledger.pace(worker))
        self.readers.append(worker)

    def leave(self, worker: int, *rest: Any) -> None:
        """A worker has made its last push."""
        self.lost.discard(worker)
        self.ledger.leave(worker)
        self.leaving.append(worker)

    def pause(self, worker: int, *rest: Any) -> None:
        """A worker takes no part until it joins."""
        self.lost.discard(worker)
        self.ledger.leave(worker)

    def join(self, worker: int, clock: int, *rest: Any) -> None:
        """A worker proposes a clock, or asks for one by -1; the answer is the least one."""
        self.lost.discard(worker)
        pace = self.ledger.pace(worker)
        self.ledger.join(worker, clock)
        self.sent.append(self.server.reply(worker, self.weights[:0], pace, self.ledger.version))

    def abandon(self, worker: int, clock: int, *rest: Any) -> None:
        """A worker has failed after ``clock`` whole pushes."""
        self.ledger.leave(worker, clock)
        self.lost.add(worker)

    def answer_reads(self) -> None:
        """Answer the reads that the mode allows."""
        ready = [reader for reader in self.readers if self.ledger.may_read(reader)]
        self.readers = [reader for reader in self.readers if reader not in ready]
        self.sent = [each for each in self.sent if not each[0].Test()]
        self.sent += [self._model_for(reader) for reader in ready]

    def give_up_silent(self) -> None:
        """Give up the workers for whose messages others have waited too long."""
        patience = self.server.patience or math.inf
        before, waiting = time.monotonic() - patience, [*self.readers, *self.leaving]
        for worker, when in enumerate(self.heard):
            if waiting and when < before and worker not in waiting and not math.isinf(self.ledger.clocks[worker]):
                self.ledger.leave(worker)
                self.lost.add(worker)
                rank = self.server.servers + worker
                LOGGER.warning(
                    "ParameterServer: rank %d has been silent for %g s, the others go on without it", rank, patience
                )

    def end(self) -> None:
        """Send the last model to all that have left, and a notice to those that were given up."""
        self.sent += [self._model_for(worker) for worker in self.leaving]
        for request, _ in self.sent:
            request.Wait()
        if self.server.patience is not None:
            for worker in self.lost:  # 32 bytes, which wait at a worker that is only slow
                self.sent.append(self.server.reply(worker, self.weights[:0], TOO_LATE, self.ledger.version))

    def _model_for(self, worker: int) -> tuple[MPI.Request, Any]:
        return self.server.reply(worker, self.weights, len(self.lost), self.ledger.version)


REQUESTS: dict[int, Callable[..., None]] = {
    PUSH: Desk.push,
    PULL: Desk.pull,
    LEAVE: Desk.leave,
    PAUSE: Desk.pause,
    JOIN: Desk.join,
    ABANDON: Desk.abandon,
}


def read_elements(payload: npt.NDArray[np.uint8], like: Vector) -> Vector:
    """The elements in a payload, which must be as many as ``like`` has."""
    require(
        payload.size == like.nbytes,
        f"{payload.size} bytes for {like.size} elements of {like.dtype}: pass the same weights, rows and codec on all "
        "ranks",
    )
    return payload.view(like.dtype)


def pack_message(what: int, clock: int, version: int, payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Header and payload as one message."""
    message = np.empty(HEADER.size + payload.size, np.uint8)
    message[: HEADER.size] = np.frombuffer(HEADER.pack(MARK, what, clock, version, payload.size), np.uint8)
    message[HEADER.size :] = payload
    return message
