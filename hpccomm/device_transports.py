"""Which way arrays on a device go: found out once for a communicator, then chosen for each operation.

==========  ===========================================  =====================================================
``staged``  through pinned memory of the host in chunks  always works: every dtype, operation and algorithm
``ipc``     ranks of one node read each other's memory   reductions that have a kernel, and whatever moves
``nccl``    NCCL between ranks on different devices      integers, sums and products of floats; what moves
``aware``   MPI's own collective on device pointers      plain dtypes, where a child has lived to say so
==========  ===========================================  =====================================================

``HPCCOMM_GPU_TRANSPORT`` names one: it takes all calls that it can, the rest is staged; an error on all ranks where it
does not work at all.  A call that names an algorithm, or wants reproducible bits, is staged: algorithms are the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hpccomm.errors import ArgumentError, TransportError
from hpccomm.resources import Bound, Resources, Run, mpi_name
from hpccomm.transports import cuda, cuda_probe, nccl
from hpccomm.transports.cuda import TRANSPORT, Chunk, Staging, wait
from hpccomm.transports.cuda_ipc import Peers, Turn

WAYS = ("nccl", "ipc", "aware", "staged")
"""In the order of preference for many bytes."""
SETTINGS = ("auto", *WAYS, cuda.ON_HOST)

MANY_BYTES = 1 << 16
"""From here on bandwidth counts more than meetings of all ranks: an estimate, not measured."""


class Call(NamedTuple):
    """One collective, and how each way would make it; ``None`` for a way that cannot."""

    nbytes: int
    """The same on all ranks, as all that the choice depends on."""
    chunks: Callable[[], Sequence[Chunk]]
    turns: Callable[[int], Sequence[Turn]] | None = None
    """Of so many bytes at most."""
    native: Callable[[], Bound] | None = None
    dense: Callable[[nccl.Nccl], None] | None = None


def wanted(setting: str) -> str:
    """What ``HPCCOMM_GPU_TRANSPORT`` says; raises ArgumentError for other words."""
    if setting and setting not in SETTINGS:
        raise ArgumentError(f"{TRANSPORT}={setting!r} is not known: use one of {', '.join(SETTINGS)}")
    return setting or "auto"


class DeviceTransports:
    """The ways of one communicator; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks where the way that is wanted does not work.
    """

    def __init__(self, resources: Resources, device: cuda.Device) -> None:
        self.resources, self.device = resources, device
        self.wanted = wanted(resources.settings[TRANSPORT])
        self.peers: Peers | None = None
        self.nccl: nccl.Nccl | None = None
        self.troubles = {"staged": ""}
        """Why a way is not to be had; nothing where it is."""
        for name, look in {"nccl": self._find_nccl, "ipc": self._find_peers, "aware": self._ask_mpi}.items():
            if self.wanted not in ("auto", name):
                self.troubles[name] = f"{TRANSPORT} says {self.wanted}"
                continue
            try:
                look()
                self.troubles[name] = ""
            except TransportError as error:
                self.troubles[name] = str(error)
        if self.troubles.get(self.wanted):
            self.free()
            raise TransportError(
                f"{TRANSPORT}={self.wanted} does not work here: {self.troubles[self.wanted]}: leave it out"
            )

    def _find_peers(self) -> None:
        count = self.resources.topology.count
        if count > 1:
            raise TransportError(f"the ranks are on {count} nodes")
        self.peers = Peers(self.device, self.resources.node)

    def _ask_mpi(self) -> None:
        """A child on each node; all must have lived."""
        node, found = self.resources.node, None
        if node.rank == 0:
            try:
                found = cuda_probe.verdict(self.device.number, self.device.driver)
            except (OSError, RuntimeError) as error:  # no home, no driver: the others wait for an answer
                found = cuda_probe.Verdict(str(error), "not asked")
        for each in self.resources.channel.allgather(node.bcast(found)):
            if each.trouble:
                raise TransportError(
                    f"{mpi_name()} does not understand pointers of a device ({each.when}: {each.trouble})"
                )

    def _find_nccl(self) -> None:
        """Between different devices; ranks that share one must be allowed to, and want it."""
        channel, library, trouble = self.resources.channel, None, ""
        try:
            library = nccl.library()
        except TransportError as error:
            trouble = str(error)
        place = (int(self.resources.topology.nodes[channel.rank]), self.device.identity)
        shared = library is not None and self.wanted == "nccl" and nccl.shareable(library)
        everyone = channel.allgather((trouble, place, shared))
        for each, _, _ in everyone:
            if each:
                raise TransportError(each)
        places = [each for _, each, _ in everyone]
        if len(set(places)) < len(places) and not all(each for _, _, each in everyone):
            raise TransportError(
                f"ranks share a device: that takes NCCL 2.30, {nccl.SHARING}=1 and {TRANSPORT}=nccl on all ranks"
            )
        self.nccl = nccl.Nccl(self.device, channel, library)

    def way(self, call: Call) -> str:
        """Which way a call goes, the same on all ranks."""
        able = {"nccl": call.dense, "ipc": call.turns, "aware": call.native, "staged": call.chunks}
        open_ways = [name for name in WAYS if able[name] is not None and not self.troubles[name]]
        if self.wanted != "auto":
            return self.wanted if self.wanted in open_ways else "staged"
        few = [name for name in open_ways if name in ("aware", "staged")]
        return few[0] if call.nbytes < MANY_BYTES else open_ways[0]

    def describe(self) -> dict[str, str]:
        """Each way, and why it is not to be had where it is not."""
        return {name: f"no: {self.troubles[name]}" if self.troubles[name] else "yes" for name in WAYS}

    def free(self) -> None:
        """Give everything back (collective)."""
        if self.peers:
            self.peers.free()
        if self.nccl:
            self.nccl.free()
        self.peers = self.nccl = None


def bind(call: Call, way: str, transports: DeviceTransports, staging: Staging, streams: Sequence[int]) -> Run:
    """What makes a call its way; arrays are written and read on some streams."""
    if way == "ipc" and call.turns and transports.peers:
        peers, turns = transports.peers, call.turns(transports.peers.room)
        return lambda: peers.run(turns, streams)
    if way == "nccl" and call.dense and transports.nccl:
        ranks, dense = transports.nccl, call.dense
        return lambda: ranks.run(dense, streams)
    if way == "aware" and call.native:
        bound, device = call.native(), transports.device

        def run() -> None:
            wait(device, streams)
            bound.run()
            wait(device, streams)

        return run
    chunks = call.chunks()
    return lambda: staging.run(chunks, streams)
