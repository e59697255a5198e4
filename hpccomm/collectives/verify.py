"""Proves a schedule: the verifier moves the contributions of all ranks through it and checks the results.

*p ranks, b blocks, k the round; a cell is one block on one rank and holds a set of contributing ranks.*  It proves:

- the receiver of every message expects it in the same round with the same blocks, so no rank waits for ever, even
  where a send returns only when it is received;
- a rank sends, or sums into, initialised blocks only, and receives no block that it sends in the same round;
- no contribution is summed twice, and a block is replaced only by one that contains all of its contributions;
- at the end the postcondition of the collective holds; rounds and bytes are as the algorithm declares;
- if the algorithm claims rank order: every sum joins adjacent ranges of ranks, the lower rank's on the left;
- the steps generated for one rank are those of the whole round (for p up to 8).

That a collective *is* a precondition and a postcondition is Cowan et al., *MSCCLang*, ASPLOS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.schedule import NOBODY, Algorithm, NodeStep, Step, members_of_nodes
from hpccomm.collectives.volume import Volume
from hpccomm.errors import ArgumentError, ScheduleError

Ints = npt.NDArray[np.int64]
Sets = npt.NDArray[np.uint64]

SINGLE_RANK_LIMIT = 8
"""Up to this many ranks, the steps generated for each rank are compared with those of the whole round."""
REDUCING_COLLECTIVES = frozenset({"allreduce", "reduce_scatter", "reduce"})
ROOTED_COLLECTIVES = frozenset({"bcast", "reduce", "scatter", "gather"})
BLOCK_IS_RANK = frozenset({"reduce_scatter", "allgather", "scatter", "gather"})
COLLECTIVES = ("allreduce", "reduce_scatter", "allgather", "bcast", "reduce", "scatter", "gather")


class Report(NamedTuple):
    """The counts of a proved schedule."""

    rounds: int
    messages: int
    blocks: int
    """The number of blocks into which the vector is cut."""
    blocks_sent_max: int
    """Blocks sent by the rank that sends most."""
    blocks_sent_total: int
    ordered: bool | None
    """Whether rank order is kept for this p and root; ``None`` where nothing is reduced."""


class ScheduleTable(NamedTuple):
    """A whole schedule as arrays: a row a round, a column a rank."""

    to: Ints
    send_first: Ints
    send_count: Ints
    source: Ints
    recv_first: Ints
    recv_count: Ints
    reduce: npt.NDArray[np.bool_]
    meetings: dict[int, list[NodeStep]]
    """The node steps before each round, or after the last."""


class Moves(NamedTuple):
    """A whole schedule with one entry a moved block; round k has entries ``starts[k]:starts[k + 1]``."""

    source: Ints
    """The cell that is sent."""
    into: Ints
    """The cell that receives."""
    from_lower: npt.NDArray[np.bool_]
    """Whether the sender is the lower rank, whose operand is the left one."""
    starts: list[int]


class Contract(NamedTuple):
    """The precondition and the postcondition of a collective: the contents of each cell."""

    before: Sets
    after: Sets
    due: npt.NDArray[np.bool_]


class Proof(NamedTuple):
    """The title of a proof and its number of blocks, for error messages."""

    title: str
    blocks: int

    def refuse(self, k: Any, rank: Any, block: Any, why: str) -> NoReturn:
        """Raise the error, with round, rank and block."""
        raise ScheduleError(f"{self.title}: round {int(k)}, rank {int(rank)}, block {int(block)}: {why}")


def verify_algorithm(algorithm: Algorithm | str, collective: str, p: int, root: int = 0) -> Report:
    """Prove that ``algorithm`` (or the one of that name) implements ``collective`` on p ranks.

    Rounds and bytes are compared with the algorithm's ``volume``, if it declares one.
    Raises :class:`ScheduleError` with round, rank, block and the expectation.
    """
    name, algorithm = find_algorithm(algorithm, collective)
    blocks = algorithm.blocks(p)
    rooted = f", root={root}" if collective in ROOTED_COLLECTIVES else ""
    proof = Proof(f"{name} {collective}, p={p}{rooted}", blocks)
    if collective in BLOCK_IS_RANK and blocks != p:
        raise ScheduleError(f"{proof.title}: cuts the vector into {blocks} blocks; {collective} needs one a rank")
    table = tabulate(algorithm.steps(np.arange(p), p, *root_argument(collective, root)), p)
    check_messages(table, proof)
    check_matching(table, proof)
    check_meetings(table, proof)
    if p <= SINGLE_RANK_LIMIT:
        check_single_ranks(algorithm, collective, table, proof, root)
    in_order = flow(table, contract(collective, p, blocks, root, algorithm.own_blocks), proof)
    if algorithm.ordered and not in_order:
        raise ScheduleError(f"{proof.title}: claims to keep rank order, but does not")
    report = summary(table, blocks, in_order if collective in REDUCING_COLLECTIVES else None)
    if algorithm.volume:
        check_volume(report, algorithm.volume, p, root, proof)
    return report


def find_algorithm(algorithm: Algorithm | str, collective: str) -> tuple[str, Algorithm]:
    """The algorithm and its name in ``ALGORITHMS`` (else the name of its generator)."""
    if collective not in COLLECTIVES:
        raise ArgumentError(f"no collective is called {collective!r}: take one of {', '.join(COLLECTIVES)}")
    known = ALGORITHMS.get(collective, {})
    if isinstance(algorithm, str):
        if algorithm not in known:
            raise ArgumentError(f"{collective} has no algorithm {algorithm!r}: take one of {', '.join(known)}")
        return algorithm, known[algorithm]
    for name, each in known.items():
        if each == algorithm:
            return name, algorithm
    return getattr(algorithm.steps, "__name__", "schedule"), algorithm


def root_argument(collective: str, root: int) -> tuple[int, ...]:
    """The root as an argument of the generator, for rooted collectives."""
    return (root,) if collective in ROOTED_COLLECTIVES else ()


def tabulate(steps: Iterable[Step | NodeStep], p: int) -> ScheduleTable:
    """All rounds of all ranks."""
    rounds: list[Step] = []
    meetings: dict[int, list[NodeStep]] = {}
    for step in steps:
        if isinstance(step, NodeStep):
            meetings.setdefault(len(rounds), []).append(step)
        else:
            rounds.append(step)
    to, send_first, send_end, source, recv_first, recv_end = np.empty((6, len(rounds), p), dtype=np.int64)
    for k, step in enumerate(rounds):
        to[k], source[k] = step.to, step.source
        send_first[k], send_end[k] = step.send
        recv_first[k], recv_end[k] = step.recv
    reduce = np.array([step.reduce for step in rounds], dtype=bool)
    counts = send_end - send_first, recv_end - recv_first
    return ScheduleTable(to, send_first, counts[0], source, recv_first, counts[1], reduce, meetings)


def summary(table: ScheduleTable, blocks: int, ordered: bool | None) -> Report:
    """The counts of a verified schedule."""
    sent = np.where(table.to >= 0, table.send_count, 0).sum(axis=0)
    messages = int(((table.to >= 0) & (table.send_count > 0)).sum())
    return Report(len(table.reduce), messages, blocks, int(sent.max()), int(sent.sum()), ordered)


# --- messages -------------------------------------------------------------------------------------


def check_messages(table: ScheduleTable, proof: Proof) -> None:
    """Every peer is another rank that exists; intervals have at most b blocks."""
    p = table.to.shape[1]
    rank = np.arange(p)
    for peer, first, count, verb in (
        (table.to, table.send_first, table.send_count, "sends to"),
        (table.source, table.recv_first, table.recv_count, "receives from"),
    ):
        active = peer != NOBODY
        wrong = active & ((peer < 0) | (peer >= p) | (peer == rank))
        wrong |= active & ((count < 0) | (count > proof.blocks))
        if wrong.any():
            k, r = first_of(wrong)
            what = f"{verb} rank {peer[k, r]} {count[k, r]} of {proof.blocks} blocks: no such message"
            proof.refuse(k, r, first[k, r] % proof.blocks, what)
    check_overlap(table, proof)


def check_overlap(table: ScheduleTable, proof: Proof) -> None:
    """A rank must not replace a block in the round in which it sends that block."""
    after = (table.recv_first - table.send_first) % proof.blocks
    before = (table.send_first - table.recv_first) % proof.blocks
    both = (table.to >= 0) & (table.source >= 0) & (table.send_count > 0) & (table.recv_count > 0)
    overlap = both & ~table.reduce[:, None] & ((after < table.send_count) | (before < table.recv_count))
    if overlap.any():
        k, r = first_of(overlap)
        block = table.recv_first[k, r] if after[k, r] < table.send_count[k, r] else table.send_first[k, r]
        proof.refuse(k, r, block % proof.blocks, "is sent and replaced in the same round")


def check_matching(table: ScheduleTable, proof: Proof) -> None:
    """Every send has a matching receive in the same round, and every receive a send."""
    rank, k = np.arange(table.to.shape[1]), np.arange(len(table.reduce))[:, None]
    sends, receives = table.to >= 0, table.source >= 0
    unreceived = sends & (table.source[k, np.where(sends, table.to, 0)] != rank)
    awaited = receives & (table.to[k, np.where(receives, table.source, 0)] != rank)
    for wrong, peers, theirs, first, sentence in (
        (unreceived, table.to, table.source, table.send_first, "is sent to rank {}, which receives from {}"),
        (awaited, table.source, table.to, table.recv_first, "is awaited from rank {}, which sends to {}"),
    ):
        if wrong.any():
            at, r = first_of(wrong)
            why = sentence.format(peers[at, r], peer_name(theirs[at, peers[at, r]]))
            proof.refuse(at, r, first[at, r] % proof.blocks, f"{why} in this round{describe_deadlock(table)}")
    check_blocks(table, proof)


def check_blocks(table: ScheduleTable, proof: Proof) -> None:
    """Sender and receiver name the same blocks."""
    k, receives = np.arange(len(table.reduce))[:, None], table.source >= 0
    source = np.where(receives, table.source, 0)
    differs = (table.send_first[k, source] - table.recv_first) % proof.blocks != 0
    differs = receives & ((table.send_count[k, source] != table.recv_count) | (differs & (table.recv_count > 0)))
    if differs.any():
        at, r = first_of(differs)
        s = table.source[at, r]
        sent = format_interval(table.send_first[at, s], table.send_count[at, s], proof.blocks)
        expected = format_interval(table.recv_first[at, r], table.recv_count[at, r], proof.blocks)
        block = table.recv_first[at, r] % proof.blocks
        proof.refuse(at, r, block, f"expects blocks {expected} from rank {s}, which sends {sent}")


def check_meetings(table: ScheduleTable, proof: Proof) -> None:
    """The parts of a node are intervals of blocks, are disjoint, and ascend with its ranks."""
    for k, steps in table.meetings.items():
        for step in steps:
            wrong = (step.node != NOBODY) & ((step.first < 0) | (step.end > proof.blocks) | (step.first > step.end))
            if wrong.any():
                r = int(np.argmax(wrong))
                proof.refuse(k, r, step.first[r], f"a part of {step.collective} inside a node is no interval of blocks")
            having = np.flatnonzero((step.node != NOBODY) & (step.first < step.end))
            having = having[np.argsort(step.node[having], kind="stable")]
            a, b = having[:-1], having[1:]
            wrong = (step.node[a] == step.node[b]) & (step.end[a] > step.first[b])
            if wrong.any():
                at = int(np.argmax(wrong))
                why = f"{step.collective} inside a node: it is rank {a[at]}'s, too"
                proof.refuse(k, b[at], step.first[b[at]], why)


def describe_deadlock(table: ScheduleTable) -> str:
    """The deadlock that would result if every send waited for its receive, for error messages."""
    waiting = find_deadlock(table)
    if not waiting:
        return ": a send would match a receive of another round"
    rank, k = next(iter(waiting.items()))
    return f": {len(waiting)} ranks would wait for ever, rank {rank} in round {k}"


def find_deadlock(table: ScheduleTable) -> dict[int, int]:
    """Run all ranks with synchronous sends; the ranks that never finish, and the round in which each waits."""
    rounds, p = table.to.shape
    rank, nobody = np.arange(p), np.full((1, p), NOBODY)
    to, source = np.vstack([table.to, nobody]), np.vstack([table.source, nobody])
    at = np.zeros(p, dtype=np.int64)
    sent, received = np.zeros(p, dtype=bool), np.zeros(p, dtype=bool)
    while True:
        out, into = to[at, rank], source[at, rank]
        passes = (out >= 0) & ~sent & (into[out] == rank) & ~received[out]
        sent |= passes
        received[out[passes]] = True
        done = ((out < 0) | sent) & ((into < 0) | received) & (at < rounds)
        if not done.any() and not passes.any():
            return {int(r): int(at[r]) for r in np.flatnonzero(at < rounds)}
        at += done
        sent &= ~done
        received &= ~done


def check_single_ranks(algorithm: Algorithm, collective: str, table: ScheduleTable, proof: Proof, root: int) -> None:
    """The steps generated for rank r are column r of the table."""
    p = table.to.shape[1]
    for r in range(p):
        alone = tabulate(algorithm.steps(r, p, *root_argument(collective, root)), 1)
        if len(alone.reduce) != len(table.reduce):
            counts = f"{len(alone.reduce)} rounds, with all ranks {len(table.reduce)}"
            proof.refuse(0, r, 0, f"generated alone, the rank has {counts}")
        if {k: len(each) for k, each in alone.meetings.items()} != {k: len(each) for k, each in table.meetings.items()}:
            proof.refuse(0, r, 0, "generated alone, the rank has other steps inside its node than with all ranks")
        sends, receives = table.to[:, r] >= 0, table.source[:, r] >= 0
        differs = {name: getattr(alone, name)[:, 0] != getattr(table, name)[:, r] for name in table._fields[:6]}
        wrong = differs["to"] | differs["source"] | (alone.reduce != table.reduce)
        wrong |= sends & (differs["send_first"] | differs["send_count"])
        wrong |= receives & (differs["recv_first"] | differs["recv_count"])
        if wrong.any():
            k = int(np.argmax(wrong))
            block = table.send_first[k, r] % proof.blocks
            proof.refuse(k, r, block, "generated alone, the rank takes another step than with all ranks")


# --- contents -------------------------------------------------------------------------------------


def contract(
    collective: str, p: int, blocks: int, root: int = 0, own_blocks: Callable[[int], Any] | None = None
) -> Contract:
    """The pre- and postcondition of a collective; ``due`` is false in cells that the caller does not read."""
    own, all_ranks = singleton_sets(p), singleton_sets(p).sum(axis=0, dtype=np.uint64)
    before = np.zeros((p, blocks, own.shape[1]), dtype=np.uint64)
    after, due = before.copy(), np.zeros((p, blocks), dtype=bool)
    rank = np.arange(p)
    block = rank if own_blocks is None else np.asarray(own_blocks(p))
    if collective in REDUCING_COLLECTIVES:
        before[:] = own[:, None]
        after[:] = all_ranks
    elif collective in ("bcast", "scatter"):
        before[root] = own[root]
        after[:] = own[root]
    else:
        before[rank, block] = own
        after[:, block] = own[None]
    if collective in ("reduce", "gather"):
        due[root] = True
    elif collective in ("reduce_scatter", "scatter"):
        due[rank, block] = True
    else:
        due[:] = True
    return Contract(before, after, due)


def singleton_sets(p: int) -> Sets:
    """The set {r} of each rank r: one bit in as many 64-bit words as p ranks need."""
    rank = np.arange(p)
    bits = np.zeros((p, -(-p // 64)), dtype=np.uint64)
    bits[rank, rank // 64] = np.left_shift(np.uint64(1), (rank % 64).astype(np.uint64))
    return bits


def flow(table: ScheduleTable, promised: Contract, proof: Proof) -> bool:
    """Move contributions round by round; whether rank order was kept in every cell that is due."""
    moves, cells = expand_moves(table, proof.blocks), Cells(promised, proof)
    for k, reduce in enumerate([*table.reduce.tolist(), None]):
        for step in table.meetings.get(k, ()):
            meet(cells, k, step)
        if reduce is None:
            break
        lo, hi = moves.starts[k], moves.starts[k + 1]
        if lo < hi:
            cells.move(k, moves.source[lo:hi], moves.into[lo:hi], moves.from_lower[lo:hi], reduce)
    return cells.check_result(promised)


def meet(cells: Cells, k: int, step: NodeStep) -> None:
    """Run a node step: every rank of a node adds what it holds to each part, or receives each part."""
    blocks, (_, ranks) = cells.proof.blocks, members_of_nodes(step.node)
    count = np.where(step.node == NOBODY, 0, step.end - step.first)
    owner = np.repeat(np.arange(count.size), count)
    block = step.first[owner] + np.arange(owner.size) - (np.cumsum(count) - count)[owner]
    gathers, others = step.collective == "allgather", ranks[step.node[owner]].T
    for other in [others.ravel()] if gathers else others:  # received at once, but added in the order of ranks
        mine, its = (np.tile(each, len(others)) if gathers else each for each in (owner, block))
        there = (other >= 0) & (other != mine)
        here, away = (mine * blocks + its)[there], (other * blocks + its)[there]
        if not here.size:
            continue
        if gathers:
            cells.move(k, here, away, np.zeros(here.size, bool), False)
        else:  # parts are disjoint, so what is added has not been written in this step
            new = cells.get(away)
            if new.begin.min() == EMPTY:
                cells.refuse(k, away, new.begin == EMPTY, "is reduced inside a node before it is initialised")
            cells.join(k, here, new, cells.get(here), (other < mine)[there])


def expand_moves(table: ScheduleTable, blocks: int) -> Moves:
    """One entry for every block of every message."""
    k, sender = np.nonzero((table.to >= 0) & (table.send_count > 0))
    to, first, count = table.to[k, sender], table.send_first[k, sender], table.send_count[k, sender]
    message = np.repeat(np.arange(k.size), count)
    block = (first[message] + np.arange(message.size) - (np.cumsum(count) - count)[message]) % blocks
    starts = np.searchsorted(k[message], np.arange(len(table.reduce) + 1)).tolist()
    return Moves(sender[message] * blocks + block, to[message] * blocks + block, (sender < to)[message], starts)


EMPTY, UNORDERED_BEGIN, UNORDERED_END = -1, 1 << 60, -2
"""Ends of the range of ranks in a cell without contents, and in one whose contributions are out of rank order."""


class CellContents(NamedTuple):
    """The contents of some cells."""

    sets: Sets
    begin: Ints
    end: Ints


class Cells:
    """The contents of all cells: sets of ranks, and [begin, end) of each set that was joined in rank order."""

    def __init__(self, promised: Contract, proof: Proof) -> None:
        p, blocks, words = promised.before.shape
        rank = np.repeat(np.arange(p), blocks)
        self.proof = proof
        self.held = promised.before.reshape(-1, words).copy()
        self.begin = np.where(self.held.any(axis=1), rank, EMPTY)
        self.end = rank + 1
        self.written = np.zeros(rank.size, dtype=np.int64)

    def get(self, cells: Ints) -> CellContents:
        """A copy of the contents of some cells."""
        return CellContents(self.held[cells], self.begin[cells], self.end[cells])

    def put(self, cells: Ints, contents: CellContents) -> None:
        """Replace the contents of some cells."""
        self.held[cells], self.begin[cells], self.end[cells] = contents

    def move(self, k: int, source: Ints, into: Ints, from_lower: Any, reduce: bool) -> None:
        """Run one round; senders send the contents from before the round."""
        new, mine = self.get(source), self.get(into)
        if new.begin.min() == EMPTY:
            self.refuse(k, source, new.begin == EMPTY, "is sent before it is initialised")
        if reduce:
            self.join(k, into, new, mine, from_lower)
        else:
            missing = mine.sets & ~new.sets
            if missing.any():
                self.refuse(k, into, missing, "is replaced and loses the contribution of rank {}")
            self.put(into, new)
        self.written[into] = k

    def join(self, k: int, into: Ints, new: CellContents, mine: CellContents, from_lower: Any) -> None:
        """Sum received contents into local ones, the lower rank's on the left."""
        if mine.begin.min() == EMPTY:
            self.refuse(k, into, mine.begin == EMPTY, "is summed into before it is initialised")
        twice = new.sets & mine.sets
        if twice.any():
            self.refuse(k, into, twice, "counts the contribution of rank {} twice")
        adjacent = np.where(from_lower, new.end, mine.end) == np.where(from_lower, mine.begin, new.begin)
        begin = np.where(adjacent, np.minimum(new.begin, mine.begin), UNORDERED_BEGIN)
        end = np.where(adjacent, np.maximum(new.end, mine.end), UNORDERED_END)
        self.put(into, CellContents(new.sets | mine.sets, begin, end))

    def check_result(self, promised: Contract) -> bool:
        """Check the postcondition; whether every cell that is due was joined in rank order from rank 0 to the last."""
        due, after = promised.due.ravel(), promised.after.reshape(self.held.shape)
        wrong = due & (self.held != after).any(axis=1)
        if wrong.any():
            cell = int(np.argmax(wrong))
            missing, extra = members(after[cell] & ~self.held[cell]), members(self.held[cell] & ~after[cell])
            what = f"misses the contributions of ranks {missing}" if missing else f"holds those of {extra} too"
            self.proof.refuse(self.written[cell], *self.locate(cell), f"in the end {what}; this was its last round")
        return bool((self.begin[due] == 0).all() and (self.end[due] == promised.due.shape[0]).all())

    def locate(self, cell: Any) -> tuple[int, int]:
        """The rank and the block of a cell."""
        return divmod(int(cell), self.proof.blocks)

    def refuse(self, k: int, cells: Ints, wrong: Any, why: str) -> NoReturn:
        """Raise the error for the first wrong cell, and its first rank where ``wrong`` holds sets."""
        first = int(np.argmax(wrong if wrong.ndim == 1 else wrong.any(axis=1)))
        twice = members(wrong[first])[0] if wrong.ndim > 1 else None
        self.proof.refuse(k, *self.locate(cells[first]), why.format(twice))


def members(words: Sets) -> list[int]:
    """The ranks in a set."""
    return [64 * w + bit for w, word in enumerate(words.tolist()) for bit in range(64) if word >> bit & 1]


def first_of(wrong: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Round and rank of the first true entry."""
    k, r = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return int(k), int(r)


def format_interval(first: Any, count: Any, blocks: int) -> str:
    """An interval of blocks for error messages: ``[3, 5)``."""
    return f"[{int(first) % blocks}, {int(first) % blocks + int(count)})"


def peer_name(peer: Any) -> str:
    """A rank or nobody, for error messages."""
    return "nobody" if peer == NOBODY else f"rank {peer}"


# --- volumes --------------------------------------------------------------------------------------


def check_volume(report: Report, volume: Volume, p: int, root: int, proof: Proof) -> None:
    """Compare rounds and bytes with the declared ones."""
    for quantity, counted, declared in (
        ("rounds", Fraction(report.rounds), Fraction(volume.rounds(p, root))),
        ("vectors sent by the busiest rank", Fraction(report.blocks_sent_max, proof.blocks), volume.busiest(p, root)),
        ("vectors sent in total", Fraction(report.blocks_sent_total, proof.blocks), volume.total(p, root)),
    ):
        if counted != declared:
            raise ScheduleError(f"{proof.title}: {counted} {quantity}, but {volume.text} declares {declared}")


# --- layouts --------------------------------------------------------------------------------------


def layouts(p: int) -> dict[str, list[int]]:
    """Several placements of p ranks on nodes, by name: the node of each rank."""
    width = max(1, round(p**0.5))
    random = np.random.default_rng(p).integers(0, max(1, p // 3), p)
    return {
        "one node": [0] * p,
        "a node each": list(range(p)),
        "block": [r // width for r in range(p)],
        "cyclic": [r % width for r in range(p)],
        "uneven": [0 if r < max(1, p // 4) else 1 for r in range(p)],
        "random": random.tolist(),
    }
