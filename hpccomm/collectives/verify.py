"""Proves a schedule: flows every rank's contribution through it, all ranks at once, and looks where they end.

*p ranks, b blocks, k the round; a cell is one block on one rank and holds a set of ranks.*  Proved is:

- every message is expected, in the same round, by the rank it goes to, about the same blocks: so nobody waits
  for ever, even where a send returns only when it is received;
- nothing is sent, or summed into, before it is there; nothing received lands on what is being sent;
- no contribution is summed twice and none is overwritten before it is contained in what replaces it;
- at the end each rank has what the collective promises; rounds and bytes are those of the known formula;
- if the algorithm claims order: every sum joins neighbouring ranges of ranks, the lower rank's on the left;
- a rank that asks for its own steps alone gets the same ones (for p up to 8).

That a collective *is* a precondition and a postcondition is Cowan et al., *MSCCLang*, ASPLOS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.schedule import NOBODY, Algorithm, Step
from hpccomm.collectives.volume import Volume
from hpccomm.errors import ArgumentError, ScheduleError

Ints = npt.NDArray[np.int64]
Sets = npt.NDArray[np.uint64]

SINGLE_RANK_LIMIT = 8
"""Up to this many ranks, each rank's own steps are compared with the whole round's."""
REDUCING_COLLECTIVES = frozenset({"allreduce", "reduce_scatter", "reduce"})
ROOTED_COLLECTIVES = frozenset({"bcast", "reduce", "scatter", "gather"})
BLOCK_IS_RANK = frozenset({"reduce_scatter", "allgather", "scatter", "gather"})
COLLECTIVES = ("allreduce", "reduce_scatter", "allgather", "bcast", "reduce", "scatter", "gather")


class Report(NamedTuple):
    """What was proved."""

    rounds: int
    messages: int
    blocks: int
    """Into how many blocks the vector is cut."""
    blocks_sent_max: int
    """By the rank that sends most."""
    blocks_sent_total: int
    ordered: bool | None
    """Whether rank order is kept for this p and root; ``None`` where nothing is reduced."""


class ScheduleTable(NamedTuple):
    """A whole schedule as arrays: a row a round, a column a rank."""

    to: Ints
    first: Ints
    gives: Ints
    source: Ints
    at: Ints
    takes: Ints
    reduce: npt.NDArray[np.bool_]


class Moves(NamedTuple):
    """The same, one entry a block that moves; those of round k are ``starts[k]:starts[k + 1]``."""

    source: Ints
    """The cell it comes from."""
    into: Ints
    """The cell it goes to."""
    from_lower: npt.NDArray[np.bool_]
    """The sender is the lower rank: its part goes on the left."""
    starts: list[int]


class Contract(NamedTuple):
    """A collective: what each cell holds before, and what it must hold afterwards, where anything is due."""

    before: Sets
    after: Sets
    due: npt.NDArray[np.bool_]


class Verification(NamedTuple):
    """What is being verified, for the messages."""

    title: str
    blocks: int

    def refuse(self, k: Any, rank: Any, block: Any, why: str) -> NoReturn:
        """Say where it went wrong."""
        raise ScheduleError(f"{self.title}: round {int(k)}, rank {int(rank)}, block {int(block)}: {why}")


def verify(algorithm: Algorithm | str, collective: str, p: int, root: int = 0) -> Report:
    """Prove that ``algorithm`` (or the one of that name) does ``collective`` on p ranks.

    Rounds and bytes are compared with the algorithm's ``volume``, if it declares one.
    Raises :class:`ScheduleError` naming round, rank, block and what was expected.
    """
    name, algorithm = find_algorithm(algorithm, collective)
    blocks = algorithm.blocks(p)
    trial = Verification(
        f"{name} {collective}, p={p}" + (f", root={root}" if collective in ROOTED_COLLECTIVES else ""), blocks
    )
    if collective in BLOCK_IS_RANK and blocks != p:
        raise ScheduleError(f"{trial.title}: cuts the vector into {blocks} blocks; {collective} needs one a rank")
    table = tabulate(algorithm.steps(np.arange(p), p, *root_argument(collective, root)), p)
    check_messages(table, trial)
    check_matching(table, trial)
    if p <= SINGLE_RANK_LIMIT:
        check_single_ranks(algorithm, collective, table, trial, root)
    in_order = flow(table, contract(collective, p, blocks, root, algorithm.own_blocks), trial)
    if algorithm.ordered and not in_order:
        raise ScheduleError(f"{trial.title}: claims to keep the order of ranks, and does not")
    report = summary(table, blocks, in_order if collective in REDUCING_COLLECTIVES else None)
    if algorithm.volume:
        check_volume(report, algorithm.volume, p, root, trial)
    return report


def find_algorithm(algorithm: Algorithm | str, collective: str) -> tuple[str, Algorithm]:
    """The algorithm and the name it has in the table (else of its function)."""
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
    """The further arguments of a schedule."""
    return (root,) if collective in ROOTED_COLLECTIVES else ()


def tabulate(steps: Iterable[Step], p: int) -> ScheduleTable:
    """All rounds of all ranks."""
    rounds = list(steps)
    to, first, end, source, at, until = np.empty((6, len(rounds), p), dtype=np.int64)
    for k, step in enumerate(rounds):
        to[k], source[k] = step.to, step.source
        first[k], end[k] = step.send
        at[k], until[k] = step.recv
    reduce = np.array([step.reduce for step in rounds], dtype=bool)
    return ScheduleTable(to, first, end - first, source, at, until - at, reduce)


def summary(table: ScheduleTable, blocks: int, ordered: bool | None) -> Report:
    """The counts of a verified schedule."""
    sent = np.where(table.to >= 0, table.gives, 0).sum(axis=0)
    messages = int(((table.to >= 0) & (table.gives > 0)).sum())
    return Report(len(table.reduce), messages, blocks, int(sent.max()), int(sent.sum()), ordered)


# --- messages -------------------------------------------------------------------------------------


def check_messages(table: ScheduleTable, trial: Verification) -> None:
    """Peers exist and are somebody else; intervals have at most b blocks."""
    p = table.to.shape[1]
    rank = np.arange(p)
    for peer, first, count, verb in (
        (table.to, table.first, table.gives, "sends to"),
        (table.source, table.at, table.takes, "receives from"),
    ):
        active = peer != NOBODY
        wrong = active & ((peer < 0) | (peer >= p) | (peer == rank))
        wrong |= active & ((count < 0) | (count > trial.blocks))
        if wrong.any():
            k, r = first_of(wrong)
            what = f"{verb} rank {peer[k, r]} {count[k, r]} of {trial.blocks} blocks: no such message"
            trial.refuse(k, r, first[k, r] % trial.blocks, what)
    check_overlap(table, trial)


def check_overlap(table: ScheduleTable, trial: Verification) -> None:
    """What arrives to replace blocks must not land on blocks that are being sent."""
    after = (table.at - table.first) % trial.blocks
    before = (table.first - table.at) % trial.blocks
    both = (table.to >= 0) & (table.source >= 0) & (table.gives > 0) & (table.takes > 0) & ~table.reduce[:, None]
    overlap = both & ((after < table.gives) | (before < table.takes))
    if overlap.any():
        k, r = first_of(overlap)
        block = table.at[k, r] if after[k, r] < table.gives[k, r] else table.first[k, r]
        trial.refuse(k, r, block % trial.blocks, "is sent and replaced in the same round")


def check_matching(table: ScheduleTable, trial: Verification) -> None:
    """In every round, what a rank sends is what its peer waits for, and the other way round."""
    rank, k = np.arange(table.to.shape[1]), np.arange(len(table.reduce))[:, None]
    sends, receives = table.to >= 0, table.source >= 0
    lost = sends & (table.source[k, np.where(sends, table.to, 0)] != rank)
    awaited = receives & (table.to[k, np.where(receives, table.source, 0)] != rank)
    if lost.any():
        at, r = first_of(lost)
        to = table.to[at, r]
        why = f"is sent to rank {to}, which receives from {peer_name(table.source[at, to])}"
        trial.refuse(at, r, table.first[at, r] % trial.blocks, f"{why} in this round{describe_deadlock(table)}")
    if awaited.any():
        at, r = first_of(awaited)
        source = table.source[at, r]
        why = f"is awaited from rank {source}, which sends to {peer_name(table.to[at, source])}"
        trial.refuse(at, r, table.at[at, r] % trial.blocks, f"{why} in this round{describe_deadlock(table)}")
    check_blocks(table, trial)


def check_blocks(table: ScheduleTable, trial: Verification) -> None:
    """Sender and receiver mean the same blocks."""
    k, receives = np.arange(len(table.reduce))[:, None], table.source >= 0
    source = np.where(receives, table.source, 0)
    differs = (table.first[k, source] - table.at) % trial.blocks != 0
    differs = receives & ((table.gives[k, source] != table.takes) | (differs & (table.takes > 0)))
    if differs.any():
        at, r = first_of(differs)
        s = table.source[at, r]
        sent = format_interval(table.first[at, s], table.gives[at, s], trial.blocks)
        expected = format_interval(table.at[at, r], table.takes[at, r], trial.blocks)
        trial.refuse(
            at,
            r,
            table.at[at, r] % trial.blocks,
            f"expects blocks {expected} from rank {s}, which sends {sent}",
        )


def describe_deadlock(table: ScheduleTable) -> str:
    """What would happen if each rank ran at its own pace, every send waiting to be received."""
    stuck = find_deadlock(table)
    if not stuck:
        return ": messages of different rounds would meet"
    rank, k = next(iter(stuck.items()))
    return f": {len(stuck)} ranks would wait for ever, rank {rank} in round {k}"


def find_deadlock(table: ScheduleTable) -> dict[int, int]:
    """Run all ranks, each at its own pace; the ranks that never finish and the round in which each waits."""
    rounds, p = table.to.shape
    rank, nobody = np.arange(p), np.full((1, p), NOBODY)
    to, source = np.vstack([table.to, nobody]), np.vstack([table.source, nobody])
    at = np.zeros(p, dtype=np.int64)
    sent, got = np.zeros(p, dtype=bool), np.zeros(p, dtype=bool)
    while True:
        out, into = to[at, rank], source[at, rank]
        meets = (out >= 0) & ~sent & (into[out] == rank) & ~got[out]
        sent |= meets
        got[out[meets]] = True
        done = ((out < 0) | sent) & ((into < 0) | got) & (at < rounds)
        if not done.any() and not meets.any():
            return {int(r): int(at[r]) for r in np.flatnonzero(at < rounds)}
        at += done
        sent &= ~done
        got &= ~done


def check_single_ranks(
    algorithm: Algorithm, collective: str, table: ScheduleTable, trial: Verification, root: int
) -> None:
    """The steps of rank r alone are column r."""
    p = table.to.shape[1]
    for r in range(p):
        alone = tabulate(algorithm.steps(r, p, *root_argument(collective, root)), 1)
        if len(alone.reduce) != len(table.reduce):
            trial.refuse(0, r, 0, f"alone the rank has {len(alone.reduce)} rounds, among all {len(table.reduce)}")
        sends, receives = table.to[:, r] >= 0, table.source[:, r] >= 0
        wrong = (alone.to[:, 0] != table.to[:, r]) | (alone.source[:, 0] != table.source[:, r])
        wrong |= sends & ((alone.first[:, 0] != table.first[:, r]) | (alone.gives[:, 0] != table.gives[:, r]))
        wrong |= receives & ((alone.at[:, 0] != table.at[:, r]) | (alone.takes[:, 0] != table.takes[:, r]))
        wrong |= alone.reduce != table.reduce
        if wrong.any():
            k = int(np.argmax(wrong))
            trial.refuse(k, r, table.first[k, r] % trial.blocks, "alone the rank takes another step than among all")


# --- contents -------------------------------------------------------------------------------------


def contract(
    collective: str, p: int, blocks: int, root: int = 0, slots: Callable[[int], Any] | None = None
) -> Contract:
    """The pre- and postcondition of a collective; nothing is due where the caller does not look."""
    own, everybody = singleton_sets(p), singleton_sets(p).sum(axis=0, dtype=np.uint64)
    before = np.zeros((p, blocks, own.shape[1]), dtype=np.uint64)
    after, due = before.copy(), np.zeros((p, blocks), dtype=bool)
    rank = np.arange(p)
    slot = rank if slots is None else np.asarray(slots(p))
    if collective in REDUCING_COLLECTIVES:
        before[:] = own[:, None]
        after[:] = everybody
    elif collective in ("bcast", "scatter"):
        before[root] = own[root]
        after[:] = own[root]
    else:
        before[rank, slot] = own
        after[:, slot] = own[None]
    if collective in ("reduce", "gather"):
        due[root] = True
    elif collective in ("reduce_scatter", "scatter"):
        due[rank, slot] = True
    else:
        due[:] = True
    return Contract(before, after, due)


def singleton_sets(p: int) -> Sets:
    """For each rank the set of itself: one bit in as many 64-bit words as p ranks need."""
    rank = np.arange(p)
    bits = np.zeros((p, -(-p // 64)), dtype=np.uint64)
    bits[rank, rank // 64] = np.left_shift(np.uint64(1), (rank % 64).astype(np.uint64))
    return bits


def flow(table: ScheduleTable, promised: Contract, trial: Verification) -> bool:
    """Move contributions round by round; whether rank order was kept wherever something is due."""
    moves, cells = expand_moves(table, trial.blocks), Cells(promised, trial)
    for k, reduce in enumerate(table.reduce.tolist()):
        lo, hi = moves.starts[k], moves.starts[k + 1]
        if lo < hi:
            cells.move(k, moves.source[lo:hi], moves.into[lo:hi], moves.from_lower[lo:hi], reduce)
    return cells.check_result(promised)


def expand_moves(table: ScheduleTable, blocks: int) -> Moves:
    """Every block of every message."""
    k, sender = np.nonzero((table.to >= 0) & (table.gives > 0))
    to, first, count = table.to[k, sender], table.first[k, sender], table.gives[k, sender]
    message = np.repeat(np.arange(k.size), count)
    block = (first[message] + np.arange(message.size) - (np.cumsum(count) - count)[message]) % blocks
    starts = np.searchsorted(k[message], np.arange(len(table.reduce) + 1)).tolist()
    return Moves(sender[message] * blocks + block, to[message] * blocks + block, (sender < to)[message], starts)


EMPTY, UNTIDY, NEVER = -1, 1 << 60, -2


class CellContents(NamedTuple):
    """What some cells hold."""

    sets: Sets
    begin: Ints
    end: Ints


class Cells:
    """What each cell holds: a set of ranks; while that is a range joined in order, its [begin, end)."""

    def __init__(self, promised: Contract, trial: Verification) -> None:
        p, blocks, words = promised.before.shape
        rank = np.repeat(np.arange(p), blocks)
        self.trial = trial
        self.held = promised.before.reshape(-1, words).copy()
        self.begin = np.where(self.held.any(axis=1), rank, EMPTY)
        self.end = rank + 1
        self.written = np.zeros(rank.size, dtype=np.int64)

    def get(self, cells: Ints) -> CellContents:
        """A copy of what some cells hold."""
        return CellContents(self.held[cells], self.begin[cells], self.end[cells])

    def put(self, cells: Ints, what: CellContents) -> None:
        """Write it there."""
        self.held[cells], self.begin[cells], self.end[cells] = what

    def move(self, k: int, source: Ints, into: Ints, from_lower: Any, reduce: bool) -> None:
        """One round: what is sent is what stood there before it."""
        new, mine = self.get(source), self.get(into)
        if new.begin.min() == EMPTY:
            self.refuse(k, source, new.begin == EMPTY, "is sent before anything is there")
        if reduce:
            self.join(k, into, new, mine, from_lower)
        else:
            gone = mine.sets & ~new.sets
            if gone.any():
                self.refuse(k, into, gone, "is replaced and loses the contribution of rank {}")
            self.put(into, new)
        self.written[into] = k

    def join(self, k: int, into: Ints, new: CellContents, mine: CellContents, from_lower: Any) -> None:
        """Sum what arrives into what is here, the lower rank's part on the left."""
        if mine.begin.min() == EMPTY:
            self.refuse(k, into, mine.begin == EMPTY, "is summed into before anything is there")
        twice = new.sets & mine.sets
        if twice.any():
            self.refuse(k, into, twice, "counts the contribution of rank {} twice")
        tidy = np.where(from_lower, new.end, mine.end) == np.where(from_lower, mine.begin, new.begin)
        begin = np.where(tidy, np.minimum(new.begin, mine.begin), UNTIDY)
        end = np.where(tidy, np.maximum(new.end, mine.end), NEVER)
        self.put(into, CellContents(new.sets | mine.sets, begin, end))

    def check_result(self, promised: Contract) -> bool:
        """Check the postcondition; whether everything due is in order from rank 0 to the last."""
        due, after = promised.due.ravel(), promised.after.reshape(self.held.shape)
        wrong = due & (self.held != after).any(axis=1)
        if wrong.any():
            cell = int(np.argmax(wrong))
            missing, extra = members(after[cell] & ~self.held[cell]), members(self.held[cell] & ~after[cell])
            what = f"misses the contributions of ranks {missing}" if missing else f"holds those of {extra} too"
            self.trial.refuse(self.written[cell], *self.place(cell), f"in the end {what}; this was its last round")
        return bool((self.begin[due] == 0).all() and (self.end[due] == promised.due.shape[0]).all())

    def place(self, cell: Any) -> tuple[int, int]:
        """Rank and block of a cell."""
        return divmod(int(cell), self.trial.blocks)

    def refuse(self, k: int, cells: Ints, wrong: Any, why: str) -> NoReturn:
        """Name the first cell that is wrong, and the first rank where ``wrong`` holds sets."""
        first = int(np.argmax(wrong if wrong.ndim == 1 else wrong.any(axis=1)))
        twice = members(wrong[first])[0] if wrong.ndim > 1 else None
        self.trial.refuse(k, *self.place(cells[first]), why.format(twice))


def members(words: Sets) -> list[int]:
    """The ranks in a set."""
    return [64 * w + bit for w, word in enumerate(words.tolist()) for bit in range(64) if word >> bit & 1]


def first_of(wrong: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Round and rank of the first true entry."""
    k, r = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return int(k), int(r)


def format_interval(first: Any, count: Any, blocks: int) -> str:
    """An interval of blocks, for people: ``[3, 5)``."""
    return f"[{int(first) % blocks}, {int(first) % blocks + int(count)})"


def peer_name(peer: Any) -> str:
    """A rank or nobody, for people."""
    return "nobody" if peer == NOBODY else f"rank {peer}"


# --- volumes --------------------------------------------------------------------------------------


def check_volume(report: Report, volume: Volume, p: int, root: int, trial: Verification) -> None:
    """Rounds and bytes are what the formula says."""
    for what, is_, should in (
        ("rounds", Fraction(report.rounds), Fraction(volume.rounds(p, root))),
        (
            "vectors sent by the busiest rank",
            Fraction(report.blocks_sent_max, trial.blocks),
            volume.busiest(p, root),
        ),
        ("vectors sent in total", Fraction(report.blocks_sent_total, trial.blocks), volume.total(p, root)),
    ):
        if is_ != should:
            raise ScheduleError(f"{trial.title}: {is_} {what}, the formula ({volume.text}) says {should}")


# --- layouts --------------------------------------------------------------------------------------


def layouts(p: int) -> dict[str, list[int]]:
    """The node of each rank, for several ways in which p ranks may lie on nodes."""
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
