"""States are data: nested tuples of arrays and numbers, copied, walked, and divided anew over other ranks.

Weights beside them may also be dicts and lists, in each other, which are walked likewise.

``update`` consumes the state that it receives: it may overwrite the arrays.  Keep a :func:`snapshot` to go back.  What
happens to a leaf when a run continues with another number of ranks is declared by the type of its field, here and for
all leaves below it::

    class MyState(NamedTuple):
        residual: Unsent        # this rank's gradients that no step has applied yet
        velocity: LocalVector   # a rank's own, and not owed to anybody
        shard: ShardedVector    # this rank's block of a vector, the blocks in rank order
        mean: Vector            # all else is the same on all ranks, or a number of this rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import to_device_like, to_host
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count

Vector = npt.NDArray[Any]


class RankChange(Enum):
    """What happens to a field's leaves when the number of ranks changes."""

    UNSENT = "the mean over the old ranks, so that the pending update is preserved"
    LOCAL = "the mean over the old ranks"
    SHARDED = "concatenated and divided again"
    GROUP = "the number of ranks that exchange"
    BLOCK = "must be 0: the ranks' models differ inside a block"
    SCRATCH = "no step reads what it holds, and its length may depend on the number of ranks"


Unsent = Annotated[Vector, RankChange.UNSENT]
"""What a rank has not sent yet; policies of the two-tier methods and a flush act on it."""
LocalVector = Annotated[Vector, RankChange.LOCAL]
"""A vector of one rank, such as the momentum of its own gradients."""
ShardedVector = Annotated[Vector, RankChange.SHARDED]
"""This rank's block of a vector, cut as by ``numpy.array_split``."""
GroupSize = Annotated[int, RankChange.GROUP]
"""How many ranks exchange with this one."""
InBlock = Annotated[int, RankChange.BLOCK]
"""Steps of a rank alone."""
Scratch = Annotated[Vector, RankChange.SCRATCH]
"""A buffer of an exchange, which replaces one of another length."""
BRANCHES = (tuple, list, dict)
"""What holds other parts of a state."""
ANY_SHAPE = (RankChange.SHARDED, RankChange.SCRATCH)


@cache
def find_changes(kind: type) -> dict[str, RankChange]:
    """What a state's type declares, field by field."""
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # a type whose annotations name what its module does not hold declares nothing
        return {}
    return {name: change for name, hint in hints.items() for change in changes_in(hint)}


def changes_in(hint: Any) -> Iterator[RankChange]:
    """The declarations inside a type."""
    for each in getattr(hint, "__metadata__", ()):
        if isinstance(each, RankChange):
            yield each
    for part in get_args(hint):
        yield from changes_in(part)


def children_of(state: Any) -> list[tuple[str, Any, RankChange | None]]:
    """The names, values and declared changes directly inside a state."""
    if isinstance(state, dict):
        return [(str(name), each, None) for name, each in state.items()]
    kind: Any = type(state)
    names = getattr(state, "_fields", range(len(state)))
    changes = find_changes(kind) if hasattr(state, "_fields") else {}
    return [(str(name), each, changes.get(str(name))) for name, each in zip(names, state, strict=True)]


def leaves_with_changes(
    state: Any, path: str = "", change: RankChange | None = None
) -> Iterator[tuple[str, Any, RankChange | None]]:
    """The path, the value and the declared change of every array and number in a state, depth first."""
    if isinstance(state, BRANCHES):
        for name, each, own in children_of(state):
            yield from leaves_with_changes(each, f"{path}.{name}" if path else name, own or change)
    elif state is not None:
        yield path, state, change


def leaves(state: Any) -> Iterator[tuple[str, Any]]:
    """The path and value of every array and number in a state, depth first."""
    return ((path, leaf) for path, leaf, _ in leaves_with_changes(state))


def map_declared(
    function: Callable[[str, Any, RankChange | None], Any],
    state: Any,
    path: str = "",
    change: RankChange | None = None,
) -> Any:
    """A state of the same form whose leaves are ``function(path, leaf, change)``."""
    if not isinstance(state, BRANCHES):
        return None if state is None else function(path, state, change)
    parts = [
        map_declared(function, each, f"{path}.{name}" if path else name, own or change)
        for name, each, own in children_of(state)
    ]
    return rebuild(state, parts)


def map_leaves(function: Callable[[str, Any], Any], state: Any) -> Any:
    """A state of the same form whose leaves are ``function(path, leaf)``."""
    return map_declared(lambda path, leaf, change: function(path, leaf), state)


def snapshot(state: Any) -> Any:
    """A copy of a state, to which a run can go back; ``update`` consumes the state that it receives.

    >>> from hpccomm import momentum
    >>> method, weights = momentum(0.5), np.zeros(2)
    >>> _, state = method.update(np.ones(2), method.init(weights), weights)
    >>> kept = snapshot(state)
    >>> _, state = method.update(np.ones(2), state, weights)
    >>> kept.tolist(), state.tolist()
    ([1.0, 1.0], [1.5, 1.5])
    """
    return map_leaves(lambda path, leaf: copy_leaf(leaf), state)


def copy_leaf(leaf: Any) -> Any:
    """A copy of an array of any library, without its gradient history; a number is its own copy."""
    if hasattr(leaf, "copy"):
        return leaf.copy()
    return leaf.detach().clone() if hasattr(leaf, "clone") else leaf


def skip_step(state: Any) -> Any:
    """The state after a step that all ranks skip: as it was, but for the steps that it counts as skipped.

    A type that counts anything else then says so by a method ``skip()``.
    """
    if hasattr(state, "skip"):
        return state.skip()
    if hasattr(state, "skipped"):
        return state._replace(skipped=state.skipped + 1)
    return map_parts(skip_step, state)


def count_skipped(state: Any) -> int:
    """What all parts of a state count as skipped, together; it grows with every step that one of them skips."""
    if not isinstance(state, tuple):
        return 0
    return int(getattr(state, "skipped", 0)) + sum(map(count_skipped, parts_now(state)))


def parts_now(state: tuple[Any, ...]) -> Iterator[Any]:
    """The parts of a state, without the copy of one that a block of local steps began from."""
    return (each for name, each, _ in children_of(state) if name != "inner_start")


def map_parts(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """A state of the same form whose parts are ``function(part, …)`` of this one and of others like it."""
    if not isinstance(state, tuple):
        return state
    return rebuild(state, [function(*each) for each in zip(state, *others, strict=True)])


def rebuild(like: Any, values: list[Any]) -> Any:
    """A tuple, list or dict of the form of ``like``."""
    if isinstance(like, dict):
        return dict(zip(like, values, strict=True))
    return (
        type(like)(*values) if hasattr(like, "_fields") else list(values) if isinstance(like, list) else tuple(values)
    )


def move_to_host(state: Any) -> Any:
    """The state with all arrays in the host's memory; those on a device are copied."""
    return map_leaves(lambda path, leaf: to_host(leaf), state)


def move_like(state: Any, like: Any) -> Any:
    """The state with all arrays where those of a state of the same form are."""
    places = dict(leaves(like))
    return map_leaves(lambda path, leaf: to_device_like(leaf, places[path]), state)


def scale_unsent(state: Any, factor: float) -> Any:
    """The state with all that was not sent multiplied by a number."""

    def scale(path: str, leaf: Any, change: RankChange | None) -> Any:
        return leaf * leaf.dtype.type(factor) if change is RankChange.UNSENT else leaf

    return map_declared(scale, state)


def unsent_leaves(state: Any) -> list[Vector]:
    """The arrays of a state that hold what was not sent."""
    return [leaf for _, leaf, change in leaves_with_changes(state) if change is RankChange.UNSENT]


def for_ranks(states: Sequence[Any], rank: int, size: int, like: Any = None) -> Any:
    """The state of rank ``rank`` of ``size`` ranks, from the states of all old ranks in rank order.

    What ranks have not sent, and vectors of their own, become the mean of the old ranks', or where the exchange sums,
    their sum over the new number: the pending update is preserved, to one rounding an element after sums in float64.
    Shards are concatenated and divided again.  All else is the same on all old ranks, or copied from one of them; the
    types of the states declare which is which.  Arrays on a device are divided on the host, and the new ones lie on
    that device.  Groups of a two-tier method keep their size; ``like``, what ``init`` returns on the new ranks, tells
    it where one group was all old ranks.  Where ``size`` is the old number, each rank gets a copy of its own state.

    Raises ArgumentError for states of different methods or sizes, and inside a block of local steps, where the ranks'
    models differ: change the number of ranks at the end of one.
    """
    if isinstance(states, str | dict) or not hasattr(states, "__len__"):
        raise ArgumentError(f"for_ranks: the states are a {type(states).__name__}: pass a list, one for each old rank")
    old = len(states)
    if not old or not 0 <= rank < size:
        raise ArgumentError(f"for_ranks: rank {rank} of {size}, {old} states: pass all old ranks' states")
    if size == old:
        return snapshot(states[rank])
    columns = [dict(leaves(move_to_host(each))) for each in states]
    for number, each in enumerate(columns):
        if each.keys() != columns[0].keys():
            raise ArgumentError(f"for_ranks: the states of ranks 0 and {number} are of different methods")
        for path, _, change in leaves_with_changes(states[0]):
            shapes = np.shape(columns[0][path]), np.shape(each[path])
            if change not in ANY_SHAPE and shapes[0] != shapes[1]:
                raise ArgumentError(
                    f"for_ranks: {path} has shape {shapes[0]} on rank 0, {shapes[1]} on rank {number}: "
                    "pass the states of one model"
                )
    groups = {path: leaf for path, leaf, change in leaves_with_changes(like) if change is RankChange.GROUP}
    own = states[rank % old]
    return move_like(divide_anew(move_to_host(own), columns, rank, size, groups), own)


def divide_anew(state: Any, columns: list[dict[str, Any]], rank: int, size: int, groups: Mapping[str, int]) -> Any:
    """One old rank's state as that of a rank of ``size``; ``columns`` are the leaves of all old ranks.

    ``groups`` are the new numbers of ranks that exchange, as far as they are known.
    """

    def place(path: str, name: str) -> str:
        """The path of another field of the state that has a field at this path."""
        return f"{path.rpartition('.')[0]}.{name}".lstrip(".")

    def beside(path: str, name: str, default: Any) -> Any:
        return columns[0].get(place(path, name), default)

    def new_group(path: str, group: int) -> int:
        return groups.get(path, size if group == len(columns) else group)

    def growth(path: str) -> float:
        """The factor of the mean of unsent vectors that are summed over the ranks of a group."""
        if not beside(path, "summed", False):
            return 1.0
        group = beside(path, "ranks", len(columns))
        return float(group / new_group(place(path, "ranks"), group))

    def leaf_of(path: str, leaf: Any, change: RankChange | None) -> Any:
        values = [each[path] for each in columns]
        if change is RankChange.GROUP:
            return new_group(path, leaf)
        if change is RankChange.BLOCK and any(values):
            raise ArgumentError(
                f"for_ranks: rank {int(np.argmax(values))} saved {format_count(max(values), 'step')} into a block "
                f"({path}), when the ranks' models differ: continue with {format_count(len(columns), 'rank')} to the "
                "end of a block, or call finish, and save there"
            )
        if change is RankChange.SHARDED:
            return np.array_split(np.concatenate(values), size)[rank].copy()
        if change in (RankChange.UNSENT, RankChange.LOCAL) and getattr(leaf, "dtype", np.dtype(int)).kind in "fV":
            total = np.sum(values, axis=0, dtype=np.float64) / len(values)
            return (total * growth(path)).astype(leaf.dtype)
        return copy_leaf(leaf)

    return map_declared(leaf_of, state)
