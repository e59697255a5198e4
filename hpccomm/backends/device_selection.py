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
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hpccomm.backends import nccl
from hpccomm.backends.cuda_ipc import Peers, Phase
from hpccomm.calls.plans import Plan, Run
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.settings import ON_HOST
from hpccomm.transports import cuda_probe
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


class Backend(NamedTuple):
    """A transport that is available."""

    field: str
    """The field of :class:`Call` that is ``None`` if the transport does not support a call."""
    bind: Callable[[Any, Sequence[int]], Run]
    """Bind a call by that field; the streams have pending work on the arrays."""
    free: Run = lambda: None
    """Free its resources (collective)."""
    needs_barriers: bool = False
    """Whether a call contains more than one barrier of all ranks, which is too slow for short calls."""


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
        ranks = nccl.Nccl(self.device, comm, library)
        return Backend("dense", lambda dense, streams: partial(ranks.run, dense, streams), ranks.free, True)

    def find_peers(self) -> Backend:
        """CUDA IPC, if all ranks share one node."""
        count = self.context.layout.count
        if count > 1:
            raise TransportError(f"the ranks are on {count} nodes")
        peers = Peers(self.device, self.context.node)
        return Backend("phases", lambda phases, on: partial(peers.run, phases(peers.room), on), peers.free, True)

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
        device = self.device

        def bind(native: Callable[[], Plan], streams: Sequence[int]) -> Run:
            bound = native()

            def run() -> None:
                wait(device, streams)
                bound.run()
                wait(device, streams)

            return run

        return Backend("native", bind)

    def open_staging(self) -> Backend:
        """Pinned host memory, which belongs to the planner."""
        staging = self.staging
        return Backend("chunks", lambda chunks, streams: partial(staging.run, chunks(), streams))

    def choose(self, call: Call) -> str:
        """The transport for a call, the same on all ranks."""
        able = [name for name, each in self.backends.items() if getattr(call, each.field) is not None]
        if self.setting != "auto":
            return self.setting if self.setting in able else FALLBACK
        if call.nbytes < MANY_BYTES:
            able = [name for name in able if not self.backends[name].needs_barriers]
        return able[0]

    def bind(self, call: Call, streams: Sequence[int]) -> Run:
        """Bind a call to its transport; ``streams`` have pending work on the arrays."""
        backend = self.backends[self.choose(call)]
        return backend.bind(getattr(call, backend.field), streams)

    def describe(self) -> dict[str, str]:
        """Each transport: whether it is available, or the reason why not."""
        available = {name: f"yes ({self.remarks[name]})" if name in self.remarks else "yes" for name in self.troubles}
        return {name: f"no: {why}" if why else available[name] for name, why in self.troubles.items()}

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
    FALLBACK: DeviceTransports.open_staging,
}
"""How to open each transport, in order of preference for long calls; raises TransportError on all ranks or none."""
SETTINGS = ("auto", *BACKENDS, ON_HOST)
