"""What ranks must agree on when they make a communicator: the methods that do it, and which arguments are compared.

*A maker is a method of mpi4py's communicators that all ranks of one call to make another.*  MPI may hang, or give a
communicator of the wrong ranks, where the ranks call different makers or pass arguments that must be equal and are not.
Arguments that may differ (color and key of Split, a rank's own edges, hints) are not compared.  A group of Create may
differ between ranks whose groups have no rank in common.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint, format_ranks, mismatch_message
from hpccomm.errors import MismatchError

Check = Callable[[MPI.Intracomm], None]
MOST_BYTES = 150
"""Longer arguments are told in a fingerprint by their beginning and a checksum."""


def shorten(text: str) -> str:
    """Arguments as text that fits into a fingerprint and differs if they do."""
    if len(text) <= MOST_BYTES:
        return text
    return f"{text[: MOST_BYTES - 24]}... checksum {zlib.crc32(text.encode()):08x}"


def list_numbers(given: Any) -> list[int]:
    """An argument of whole numbers as a list."""
    return [int(each) for each in np.atleast_1d(np.asarray(given)).tolist()]


def describe_cart(dims: Any, periods: Any = None, reorder: bool = False) -> str:
    """Dimensions, which of them are periodic, and whether ranks may be reordered."""
    sizes = list_numbers(dims)
    wraps = list_numbers(False if periods is None else periods)
    around = [bool(each) for each in (wraps * len(sizes) if len(wraps) == 1 else wraps)]
    return f"dims={sizes}, periods={around}, reorder={bool(reorder)}"


def describe_graph(index: Any, edges: Any, reorder: bool = False) -> str:
    """The whole graph; mpi4py takes an index with a 0 in front as well."""
    ends, neighbours = list_numbers(index), list_numbers(edges)
    first = ends[:1] == [0] and ends[-1] == len(neighbours)
    return f"index={ends[first:]}, edges={neighbours}, reorder={bool(reorder)}"


def has_edges(ranks: Any) -> bool:
    """Whether an argument of ranks has some; None has none."""
    return ranks is not None and np.size(ranks) > 0


def describe_edges(edges: Any, weights: Any, reorder: bool) -> str:
    """Whether edges have weights, which a rank without edges need not tell, and whether ranks may be reordered."""
    if not has_edges(edges):
        return UNKNOWN
    return f"{'no ' if weights is None or weights is MPI.UNWEIGHTED else ''}weights, reorder={bool(reorder)}"


def describe_dist_graph(
    sources: Any, degrees: Any, destinations: Any, weights: Any = None, info: Any = None, reorder: bool = False
) -> str:
    """What ranks must agree on besides their edges."""
    return describe_edges(destinations, weights, reorder)


def describe_adjacent(
    sources: Any,
    destinations: Any,
    sourceweights: Any = None,
    destweights: Any = None,
    info: Any = None,
    reorder: bool = False,
) -> str:
    """What ranks must agree on besides their edges."""
    own = (sources, sourceweights) if has_edges(sources) else (destinations, destweights)
    return describe_edges(*own, reorder)


def describe_type(split_type: int, key: int = 0, info: Any = None) -> str:
    """The type by its name, which a rank that stays outside need not tell."""
    if split_type == MPI.UNDEFINED:
        return UNKNOWN
    names = [name for name in dir(MPI) if name.startswith("COMM_TYPE_") and getattr(MPI, name) == split_type]
    return f"split_type={names[0] if names else split_type}"


def describe_intercomm(local_leader: int, peer_comm: Any, remote_leader: int, tag: int = 0) -> str:
    """What the ranks of one side must agree on; the rest is read on the leader only."""
    return f"local_leader={local_leader}"


def describe_remaining(remain_dims: Any) -> str:
    """The dimensions that remain."""
    return f"remain_dims={[bool(each) for each in list_numbers(remain_dims)]}"


DUPLICATES = dict.fromkeys(("Dup", "Clone", "Dup_with_info"), "Dup")
"""Makers that MPI's libraries run alike."""
ARGUMENTS: dict[str, Callable[..., str]] = {
    "Split_type": describe_type,
    "Create_cart": describe_cart,
    "Create_graph": describe_graph,
    "Create_dist_graph": describe_dist_graph,
    "Create_dist_graph_adjacent": describe_adjacent,
    "Create_intercomm": describe_intercomm,
    "Sub": describe_remaining,
}
"""What the arguments of a maker say that all ranks must pass alike."""
MAKERS = (*DUPLICATES, "Split", "Create", *ARGUMENTS)
"""Those that all ranks of a communicator call."""


def describe_making(
    comm: MPI.Intracomm, name: str, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Fingerprint, Check | None]:
    """The fingerprint of a maker's call, and what compares more than that says.

    Raises an exception of any kind for arguments that mpi4py does not take.
    """
    arguments = ARGUMENTS[name](*args, **named) if name in ARGUMENTS else ""
    check = check_groups(comm, *args, **named) if name == "Create" else None
    return Fingerprint(DUPLICATES.get(name, name), arguments=shorten(arguments)), check


def check_groups(comm: MPI.Comm, group: MPI.Group) -> Check:
    """The comparison of the groups of Create, each as ranks of ``comm``."""
    own = comm.Get_group()
    ranks = tuple(group.Translate_ranks(list(range(group.size)), own))
    own.Free()
    return partial(compare_groups, ranks)


def compare_groups(ranks: tuple[int, ...], comm: MPI.Intracomm) -> None:
    """Raise on all ranks if a group has a rank that has passed another one (collective)."""
    sums = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([zlib.crc32(repr(ranks).encode())]), sums)
    if (sums == sums[0]).all():
        return
    groups = comm.allgather(ranks)
    if all(groups[rank] == group for group in {*groups} for rank in group if 0 <= rank < comm.size):
        return
    calls = {rank: describe_group(group) for rank, group in enumerate(groups)}
    raise MismatchError(mismatch_message({**calls}, comm.rank))


def describe_group(ranks: Sequence[int]) -> Fingerprint:
    """The fingerprint of Create for a group."""
    text = f"group of {format_ranks([*ranks])}" if 0 < len(ranks) <= 8 else f"group of {len(ranks)} ranks {[*ranks]}"
    return Fingerprint("Create", arguments=shorten(text))
