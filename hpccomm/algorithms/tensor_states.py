"""The state of a bucket as the states of its tensors, and back: a run continues with buckets of another size.

*A tensor's own state is the state of the same method on a bucket of that tensor alone.*  Leaf by leaf the state of a
bucket is one of these: its tensors' leaves one after the other (residuals, momenta, factors, messages tensor by
tensor); this rank's block of such a vector (``ShardedVector``); or one value for the whole bucket (the number of steps,
the threshold of a message that covers the bucket), which every tensor of the bucket gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpccomm.algorithms.reports import ExchangeReport
from hpccomm.algorithms.states import RankChange, Vector, children_of, copy_leaf, rebuild
from hpccomm.errors import ArgumentError


def split_state(state: Any, likes: Sequence[Any], comm: Any) -> list[Any]:
    """The state of each tensor from that of its bucket; ``likes`` are their forms, as ``init`` makes them (collective).

    The cost so far goes to the first tensor.
    """

    def split(whole: Any, parts: list[Any], change: RankChange | None) -> list[Any]:
        if change is RankChange.SHARDED:
            lengths = np.sum(comm.allgather([len(part) for part in parts]), axis=0)
            vector = np.concatenate(comm.allgather(whole))
            return [own_block(each, comm) for each in np.split(vector, np.cumsum(lengths)[:-1])]
        if are_rows_of(parts, whole):
            return [each.copy() for each in np.split(whole, np.cumsum([len(part) for part in parts])[:-1])]
        return [check_form(copy_leaf(whole), part, change) for part in parts]

    return walk(
        state, list(likes), split, lambda whole, parts: [whole, *(ExchangeReport() for _ in parts[1:])], len(likes)
    )


def join_states(states: Sequence[Any], like: Any, comm: Any) -> Any:
    """The state of a bucket from those of its tensors, in the form of ``like``, as ``init`` makes it (collective).

    What belongs to a bucket as a whole is that of its first tensor; of numbers it is the largest.
    """

    def join(whole: Any, parts: list[Any], change: RankChange | None) -> Any:
        if change is RankChange.SHARDED:
            everyone = comm.allgather(parts)
            return own_block(np.concatenate([each[k] for k in range(len(parts)) for each in everyone]), comm)
        if are_rows_of(parts, whole):
            return np.concatenate(parts)
        if isinstance(whole, bool | int | float):
            return max(parts)
        return check_form(copy_leaf(parts[0]), whole, change)

    def add(whole: Any, parts: list[Any]) -> ExchangeReport:
        total = ExchangeReport()
        for part in parts:
            total = total.add(part)
        return total

    return walk(like, list(states), join, add, 0)


def walk(
    whole: Any,
    parts: list[Any],
    leaf: Callable[[Any, list[Any], RankChange | None], Any],
    cost: Callable[[Any, list[Any]], Any],
    count: int,
    change: RankChange | None = None,
) -> Any:
    """What ``leaf`` and ``cost`` make of all leaves of a bucket's state beside those of its tensors, in its form.

    With a ``count`` they make so many leaves each, and the result is a list of so many states.
    """
    if isinstance(whole, ExchangeReport):
        return cost(whole, parts)
    if not isinstance(whole, tuple):
        return ([None] * count or None) if whole is None else leaf(whole, parts, change)
    columns = [[each for _, each, _ in children_of(part)] for part in parts]
    found = [
        walk(each, [column[k] for column in columns], leaf, cost, count, own or change)
        for k, (_, each, own) in enumerate(children_of(whole))
    ]
    if not count:
        return rebuild(whole, found)
    return [rebuild(whole, [each[k] for each in found]) for k in range(count)]


def are_rows_of(parts: list[Any], whole: Any) -> bool:
    """Whether an array is as long as all parts together, with rows of the same form."""
    if not np.ndim(whole) or not all(np.ndim(part) for part in parts):
        return False
    return sum(map(len, parts)) == len(whole) and all(part.shape[1:] == whole.shape[1:] for part in parts)


def own_block(vector: Vector, comm: Any) -> Vector:
    """This rank's block of a vector of which every rank has one."""
    return np.array_split(vector, comm.size)[comm.rank].copy()


def check_form(leaf: Any, like: Any, change: RankChange | None) -> Any:
    """The leaf, or where it is only a buffer of another length the new one; raises where its values count."""
    if np.shape(leaf) == np.shape(like):
        return leaf
    if change not in (None, RankChange.SCRATCH):
        raise ArgumentError(
            f"a state of shape {np.shape(leaf)} belongs to a whole bucket, its tensor's has shape {np.shape(like)}: "
            "continue with the bucket size of the run that saved"
        )
    return like
