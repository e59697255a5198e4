"""Which ranks share a node.

*p ranks on N nodes; nodes are numbered in the order of their lowest rank.*
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path


class Link(NamedTuple):
    """The cost of a message on one level of the network: ``alpha + beta * bytes``."""

    alpha: float
    """Latency in microseconds."""
    beta: float
    """Microseconds per byte."""


LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Environment variables in which launchers pass the number of ranks on this node."""
SHARED_MEMORY, ETHERNET = Link(1.5, 1.2e-4), Link(25.0, 8.4e-4)
"""Defaults within a node and between nodes if nothing was measured: a two-core virtual machine, 10 Gbit/s at 95 %."""


@dataclass(frozen=True)
class Layout:
    """The placement of one communicator's ranks on nodes."""

    nodes: npt.NDArray[np.int64]
    """``(p,)`` the node of each rank, 0 … N-1."""
    names: tuple[str, ...]
    """The host name of each node."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(self.nodes.size)

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.names)

    @cached_property
    def per_node(self) -> tuple[int, ...]:
        """Number of ranks on each node."""
        return tuple(np.bincount(self.nodes, minlength=self.count).tolist())

    @property
    def even(self) -> bool:
        """Whether all nodes have the same number of ranks."""
        return len(set(self.per_node)) == 1

    @property
    def contiguous(self) -> bool:
        """Whether each node's ranks are consecutive."""
        return bool((np.diff(self.nodes) >= 0).all())

    def members(self, node: int) -> tuple[int, ...]:
        """The ranks on a node, in order."""
        return tuple(np.flatnonzero(self.nodes == node).tolist())

    def select(self, ranks: tuple[int, ...]) -> Layout:
        """The layout of these ranks alone, in this order."""
        of = self.nodes[list(ranks)].tolist()
        kept = list(dict.fromkeys(of))
        return Layout(np.array([kept.index(each) for each in of], np.int64), tuple(self.names[each] for each in kept))

    def channel(self, rank: int) -> tuple[int, ...]:
        """The ranks with the same local rank as this one, in order."""
        place, nodes = self.local_rank(rank), map(self.members, range(self.count))
        return tuple(sorted(each[place] for each in nodes if place < len(each)))

    def local_rank(self, rank: int) -> int:
        """The position of a rank among the ranks of its node, from 0."""
        return self.members(int(self.nodes[rank])).index(rank)

    def describe(self) -> str:
        """One line for logs and commands."""
        if self.count == 1:
            return f"{self.size} rank{'s' * (self.size > 1)} on one node ({self.names[0]})"
        shape = f"{self.per_node[0]} each" if self.even else "/".join(map(str, self.per_node)) + " each"
        order = "in order" if self.contiguous else "interleaved"
        return f"{self.size} ranks on {self.count} nodes ({shape}, {order}): {', '.join(self.names)}"


def fast_networks(folder: str | Path = "/sys/class") -> list[str]:
    """This host's network devices that bypass TCP: InfiniBand, RoCE, EFA, Omni-Path, Slingshot."""
    return sorted(name for kind in ("infiniband", "cxi") for name in list_names(f"{folder}/{kind}"))


def ethernets(folder: str | Path = "/sys/class/net") -> list[str]:
    """Ethernet links of this host that are up."""
    wanted = {"type": "1", "operstate": "up"}
    return sorted(
        each
        for each in list_names(folder)
        if all(read_attribute(f"{folder}/{each}/{name}") == value for name, value in wanted.items())
    )


def list_names(folder: str | Path) -> list[str]:
    """The names in a folder of sysfs; none if there is no such folder."""
    with suppress(OSError):
        return os.listdir(folder)
    return []


def read_attribute(file: str | Path) -> str:
    """The contents of a file of sysfs; empty if it cannot be read."""
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def on_one_node(p: int, name: str) -> Layout:
    """The layout of p ranks that share a node."""
    return Layout(np.zeros(p, np.int64), (name,))


def discover(comm: Any, node: Any, name: str) -> Layout:
    """Determine the layout of ``comm`` (collective).

    ``node`` is the communicator of the ranks that share this rank's memory, ``name`` this host's name.
    """
    leader = node.bcast(comm.Get_rank(), root=0)
    found = comm.allgather((leader, name))
    leaders = [leader for leader, _ in found]
    order = sorted(set(leaders))
    nodes = np.array([order.index(leader) for leader in leaders], dtype=np.int64)
    return Layout(nodes, tuple(found[leader][1] for leader in order))
