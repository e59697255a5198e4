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
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hpccomm.backends import nccl
from hpccomm.backends.cuda_ipc import Peers, Phase
from hpccomm.calls.plans import Plan, Run
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.transports import cuda, cuda_probe
from hpccomm.transports.cuda import TRANSPORT, Chunk, Staging, wait
from hpccomm.transports.mpi import mpi_name

if TYPE_CHECKING:
    from hpccomm.context import Context

MANY_BYTES = 1 << 16
"""From here on bandwidth counts more than meetings of all ranks: an estimate, not measured."""


class Call(NamedTuple):
    """One collective, and what each way would make of it; ``None`` where its dtype, operation or algorithm forbid."""

    nbytes: int
    """The same on all ranks, as all that the choice depends on."""
    chunks: Callable[[], Sequence[Chunk]]
    turns: Callable[[int], Sequence[Phase]] | None = None
    """Of so many bytes at most."""
    native: Callable[[], Plan] | None = None
    dense: Callable[[nccl.Nccl], None] | None = None


class Backend(Protocol):
    """How calls go: it says which it takes, and makes them ready to run."""

    needs_barriers: bool
    """All ranks meet more than once in a call: too slow for short ones."""

    def takes(self, call: Call) -> bool:
        """Whether it can make this call; the same on all ranks."""

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """What makes a call that it takes; arrays are written and read on some streams."""

    def free(self) -> None:
        """Give back what it holds (collective)."""


class NcclBackend:
    """NCCL between devices: what it reduces as we define it, and what only moves."""

    needs_barriers = True

    def __init__(self, ranks: nccl.Nccl) -> None:
        self.ranks = ranks

    def takes(self, call: Call) -> bool:
        """Dense collectives."""
        return call.dense is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """One call of NCCL's."""
        ranks, dense = self.ranks, call.dense
        assert dense is not None
        return lambda: ranks.run(dense, streams)

    def free(self) -> None:
        """NCCL's memory."""
        self.ranks.free()


class IpcBackend:
    """Ranks of a node that read each other's memory: reductions with a kernel, and what only moves."""

    needs_barriers = True

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def takes(self, call: Call) -> bool:
        """What goes in turns."""
        return call.turns is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Turns as long as a part has room."""
        assert call.turns is not None
        peers, turns = self.peers, call.turns(self.peers.room)
        return lambda: peers.run(turns, streams)

    def free(self) -> None:
        """The parts."""
        self.peers.free()


class MpiBackend:
    """An MPI that understands pointers of a device: its own collectives of plain dtypes."""

    needs_barriers = False

    def __init__(self, device: cuda.Device) -> None:
        self.device = device

    def takes(self, call: Call) -> bool:
        """What MPI does right."""
        return call.native is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Between two waits for the streams."""
        assert call.native is not None
        bound, device = call.native(), self.device

        def run() -> None:
            wait(device, streams)
            bound.run()
            wait(device, streams)

        return run

    def free(self) -> None:
        """Nothing."""


class StagedBackend:
    """Through pinned memory of the host, in chunks: every call."""

    needs_barriers = False

    def __init__(self, staging: Staging) -> None:
        self.staging = staging

    def takes(self, call: Call) -> bool:
        """All."""
        return True

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Chunk by chunk."""
        staging, chunks = self.staging, call.chunks()
        return lambda: staging.run(chunks, streams)

    def free(self) -> None:
        """Nothing: others stage, too."""


def read_setting(setting: str) -> str:
    """What ``HPCCOMM_GPU_TRANSPORT`` says; raises ArgumentError for other words."""
    if setting and setting not in SETTINGS:
        raise ArgumentError(f"{TRANSPORT}={setting!r} is not known: use one of {', '.join(SETTINGS)}")
    return setting or "auto"


class DeviceTransports:
    """The ways of one communicator; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks where the way that is wanted does not work.
    """

    def __init__(self, resources: Context, staging: Staging) -> None:
        self.context, self.staging, self.device = resources, staging, staging.device
        self.setting = read_setting(resources.settings[TRANSPORT])
        self.backends: dict[str, Backend] = {}
        """Those that are to be had, in the order of preference for many bytes."""
        self.troubles: dict[str, str] = {}
        """Why a way is not to be had; nothing where it is."""
        self.remarks: dict[str, str] = {}
        """What else is known of a way."""
        for name, look in BACKENDS.items():
            if self.setting not in ("auto", name) and name != FALLBACK:
                self.troubles[name] = f"{TRANSPORT} says {self.setting}"
                continue
            try:
                self.backends[name] = look(self)
                self.troubles[name] = ""
            except TransportError as error:
                self.troubles[name] = str(error)
        if self.troubles.get(self.setting):
            self.free()
            raise TransportError(
                f"{TRANSPORT}={self.setting} does not work here: {self.troubles[self.setting]}: leave it out"
            )

    def find_nccl(self) -> Backend:
        """Between different devices; ranks that share one must be allowed to, and want it."""
        channel, library, trouble = self.context.private_comm, None, ""
        try:
            library = nccl.library()
        except TransportError as error:
            trouble = str(error)
        place = (int(self.context.layout.nodes[channel.rank]), self.device.identity)
        shared = library is not None and self.setting == "nccl" and nccl.can_share_device(library)
        everyone = channel.allgather((trouble, place, shared))
        for each, _, _ in everyone:
            if each:
                raise TransportError(each)
        places = [each for _, each, _ in everyone]
        if len(set(places)) < len(places) and not all(each for _, _, each in everyone):
            raise TransportError(
                f"ranks share a device: that takes NCCL 2.30, {nccl.SHARING}=1 and {TRANSPORT}=nccl on all ranks"
            )
        return NcclBackend(nccl.Nccl(self.device, channel, library))

    def find_peers(self) -> Backend:
        """Between ranks of one node."""
        count = self.context.layout.count
        if count > 1:
            raise TransportError(f"the ranks are on {count} nodes")
        return IpcBackend(Peers(self.device, self.context.node))

    def find_mpi(self) -> Backend:
        """Children on each node; all must have lived."""
        node, found = self.context.node, None
        if node.rank == 0:
            try:
                found = cuda_probe.verdict(self.device.number, self.device.driver)
            except (OSError, RuntimeError) as error:  # no home, no driver: the others wait for an answer
                found = cuda_probe.Verdict(str(error), "not asked")
        for each in self.context.private_comm.allgather(node.bcast(found)):
            if each.trouble:
                raise TransportError(
                    f"{mpi_name()} does not understand pointers of a device ({each.when}: {each.trouble})"
                )
            if each.alone:
                self.remarks["aware"] = f"asked of one process only: {each.alone}"
        return MpiBackend(self.device)

    def choose(self, call: Call) -> str:
        """Which way a call goes, the same on all ranks."""
        able = [name for name, each in self.backends.items() if each.takes(call)]
        if self.setting != "auto":
            return self.setting if self.setting in able else FALLBACK
        if call.nbytes < MANY_BYTES:
            able = [name for name in able if not self.backends[name].needs_barriers]
        return able[0]

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """What makes a call its way; arrays are written and read on some streams."""
        return self.backends[self.choose(call)].bind(call, streams)

    def describe(self) -> dict[str, str]:
        """Each way, and why it is not to be had where it is not."""
        return {name: f"no: {why}" if why else self.availability(name) for name, why in self.troubles.items()}

    def availability(self, name: str) -> str:
        """That a way is to be had, and what else is known of it."""
        return f"yes ({self.remarks[name]})" if name in self.remarks else "yes"

    def free(self) -> None:
        """Give everything back (collective)."""
        for each in self.backends.values():
            each.free()
        self.backends = {}


FALLBACK = "staged"
"""What takes all that is left."""
BACKENDS: dict[str, Callable[[DeviceTransports], Backend]] = {
    "nccl": DeviceTransports.find_nccl,
    "ipc": DeviceTransports.find_peers,
    "aware": DeviceTransports.find_mpi,
    FALLBACK: lambda transports: StagedBackend(transports.staging),
}
"""What looks for each, in the order of preference for many bytes; it raises TransportError on all ranks or none."""
SETTINGS = ("auto", *BACKENDS, cuda.ON_HOST)
