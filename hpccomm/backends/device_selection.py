"""The backends for arrays on a device: each is tried once per communicator, then one is selected for each plan.

Users know these backends as *transports*, so that is the word of settings, errors and the rest of this module.


==========  ===========================================  ========================================================
``staged``  through pinned host memory in chunks         every dtype, operation and algorithm; always available
``ipc``     ranks of one node read each other's memory   reductions that have a kernel, and all data movement
``nccl``    NCCL between ranks on different devices      integers, sums and products of floats, all data movement
``aware``   MPI's own collective on device pointers      dtypes of MPI, if the probe has succeeded
==========  ===========================================  ========================================================

``HPCCOMM_GPU_TRANSPORT`` names one, which then takes all calls that it supports; other calls are staged.  If it does
not work at all, all ranks raise an error.  Calls that name an algorithm or ask for reproducible bits are staged,
because the algorithms run on the host.
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
"""From this size on bandwidth matters more than barriers of all ranks: an estimate, not measured."""


class Call(NamedTuple):
    """One collective for each transport; ``None`` if a transport does not support its dtype, operation or algorithm."""

    nbytes: int
    """Equal on all ranks, as everything on which the selection depends."""
    chunks: Callable[[], Sequence[Chunk]]
    phases: Callable[[int], Sequence[Phase]] | None = None
    """``phases(room)``: phases of at most ``room`` bytes, for CUDA IPC."""
    native: Callable[[], Plan] | None = None
    dense: Callable[[nccl.Nccl], None] | None = None


class Backend(Protocol):
    """A backend tells which calls it takes, and binds them."""

    needs_barriers: bool
    """Whether a call contains more than one barrier of all ranks, which is too slow for short calls."""

    def takes(self, call: Call) -> bool:
        """Whether the backend supports this call; equal on all ranks."""

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Bind a call that it takes; ``streams`` have pending work on the arrays."""

    def free(self) -> None:
        """Free its resources (collective)."""


class NcclBackend:
    """NCCL between devices: the reductions that match our definition, and data movement."""

    needs_barriers = True

    def __init__(self, ranks: nccl.Nccl) -> None:
        self.ranks = ranks

    def takes(self, call: Call) -> bool:
        """Calls that NCCL supports."""
        return call.dense is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """One NCCL call."""
        ranks, dense = self.ranks, call.dense
        assert dense is not None
        return lambda: ranks.run(dense, streams)

    def free(self) -> None:
        """Destroy NCCL's communicator (collective)."""
        self.ranks.free()


class IpcBackend:
    """CUDA IPC between the ranks of a node: reductions that have a kernel, and data movement."""

    needs_barriers = True

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def takes(self, call: Call) -> bool:
        """Calls that can be divided into phases."""
        return call.phases is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Phases as long as the buffers allow."""
        assert call.phases is not None
        peers, phases = self.peers, call.phases(self.peers.room)
        return lambda: peers.run(phases, streams)

    def free(self) -> None:
        """Free the buffers (collective)."""
        self.peers.free()


class MpiBackend:
    """A CUDA-aware MPI: its own collectives on dtypes of MPI."""

    needs_barriers = False

    def __init__(self, device: cuda.Device) -> None:
        self.device = device

    def takes(self, call: Call) -> bool:
        """Calls whose result MPI defines as hpccomm does: no 16-bit floats, no minima that may lose a NaN."""
        return call.native is not None

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """MPI's call between two synchronisations of the streams."""
        assert call.native is not None
        bound, device = call.native(), self.device

        def run() -> None:
            wait(device, streams)
            bound.run()
            wait(device, streams)

        return run

    def free(self) -> None:
        """Nothing to free."""


class StagedBackend:
    """Through pinned host memory in chunks: every call."""

    needs_barriers = False

    def __init__(self, staging: Staging) -> None:
        self.staging = staging

    def takes(self, call: Call) -> bool:
        """Every call."""
        return True

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """The chunks of the call."""
        staging, chunks = self.staging, call.chunks()
        return lambda: staging.run(chunks, streams)

    def free(self) -> None:
        """Nothing: the staging area belongs to the planner."""


def read_setting(setting: str) -> str:
    """The value of ``HPCCOMM_GPU_TRANSPORT``; raises ArgumentError for an unknown one."""
    if setting and setting not in SETTINGS:
        raise ArgumentError(f"{TRANSPORT}={setting!r} is not known: use one of {', '.join(SETTINGS)}")
    return setting or "auto"


class DeviceTransports:
    """The device transports of one communicator; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks if the transport of the setting does not work.
    """

    def __init__(self, context: Context, staging: Staging) -> None:
        self.context, self.staging, self.device = context, staging, staging.device
        self.setting = read_setting(context.settings[TRANSPORT])
        self.backends: dict[str, Backend] = {}
        """The available transports, in order of preference for long calls."""
        self.troubles: dict[str, str] = {}
        """Why each transport is not available; empty if it is."""
        self.remarks: dict[str, str] = {}
        """Remarks on available transports."""
        for name, look in BACKENDS.items():
            if self.setting not in ("auto", name) and name != FALLBACK:
                self.troubles[name] = f"{TRANSPORT} is {self.setting}"
                continue
            try:
                self.backends[name] = look(self)
                self.troubles[name] = ""
            except TransportError as error:
                self.troubles[name] = str(error)
        if self.troubles.get(self.setting):
            self.free()
            raise TransportError(
                f"{TRANSPORT}={self.setting} does not work here: {self.troubles[self.setting]}: unset {TRANSPORT}"
            )

    def find_nccl(self) -> Backend:
        """NCCL, if every rank has a device of its own, or all ranks are configured to share devices."""
        comm, library, trouble = self.context.private_comm, None, ""
        try:
            library = nccl.library()
        except TransportError as error:
            trouble = str(error)
        place = (int(self.context.layout.nodes[comm.rank]), self.device.identity)
        shared = library is not None and self.setting == "nccl" and nccl.can_share_device(library)
        everyone = comm.allgather((trouble, place, shared))
        for each, _, _ in everyone:
            if each:
                raise TransportError(each)
        places = [each for _, each, _ in everyone]
        if len(set(places)) < len(places) and not all(each for _, _, each in everyone):
            raise TransportError(
                f"ranks share a device: that requires NCCL 2.30, {nccl.SHARING}=1 and {TRANSPORT}=nccl on all ranks"
            )
        return NcclBackend(nccl.Nccl(self.device, comm, library))

    def find_peers(self) -> Backend:
        """CUDA IPC, if all ranks share one node."""
        count = self.context.layout.count
        if count > 1:
            raise TransportError(f"the ranks are on {count} nodes")
        return IpcBackend(Peers(self.device, self.context.node))

    def find_mpi(self) -> Backend:
        """A CUDA-aware MPI, if the probe has succeeded on every node."""
        node, found = self.context.node, None
        if node.rank == 0:
            try:
                found = cuda_probe.verdict(self.device.number, self.device.driver)
            except (OSError, RuntimeError) as error:  # no home, no driver: the other ranks wait for the result
                found = cuda_probe.Verdict(str(error), "not probed")
        for each in self.context.private_comm.allgather(node.bcast(found)):
            if each.trouble:
                raise TransportError(f"{mpi_name()} does not accept device pointers ({each.when}: {each.trouble})")
            if each.alone:
                self.remarks["aware"] = f"probed with one process only: {each.alone}"
        return MpiBackend(self.device)

    def choose(self, call: Call) -> str:
        """The transport for a call, the same on all ranks."""
        able = [name for name, each in self.backends.items() if each.takes(call)]
        if self.setting != "auto":
            return self.setting if self.setting in able else FALLBACK
        if call.nbytes < MANY_BYTES:
            able = [name for name in able if not self.backends[name].needs_barriers]
        return able[0]

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Bind a call to its transport; ``streams`` have pending work on the arrays."""
        return self.backends[self.choose(call)].bind(call, streams)

    def describe(self) -> dict[str, str]:
        """Each transport: whether it is available, or the reason why not."""
        return {name: f"no: {why}" if why else self.availability(name) for name, why in self.troubles.items()}

    def availability(self, name: str) -> str:
        """``yes``, and the remark on a transport if there is one."""
        return f"yes ({self.remarks[name]})" if name in self.remarks else "yes"

    def free(self) -> None:
        """Free all transports (collective)."""
        for each in self.backends.values():
            each.free()
        self.backends = {}


FALLBACK = "staged"
"""The transport that takes every call."""
BACKENDS: dict[str, Callable[[DeviceTransports], Backend]] = {
    "nccl": DeviceTransports.find_nccl,
    "ipc": DeviceTransports.find_peers,
    "aware": DeviceTransports.find_mpi,
    FALLBACK: lambda transports: StagedBackend(transports.staging),
}
"""How to open each transport, in order of preference for long calls; raises TransportError on all ranks or none."""
SETTINGS = ("auto", *BACKENDS, cuda.ON_HOST)
