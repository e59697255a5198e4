"""Selects a backend for calls on a device's arrays: each is tried once per communicator, one is taken for each plan.

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

from collections.abc import Callable, Collection
from typing import Any, cast

from hpccomm.backends.base import Backend
from hpccomm.backends.device import DeviceBackend
from hpccomm.backends.table import BACKENDS
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.settings import ON_HOST
from hpccomm.transports.cuda import TRANSPORT

MANY_BYTES = 1 << 16
"""From this size on bandwidth matters more than barriers of all ranks: an estimate, not measured."""
FALLBACK = "staged"
"""The transport that takes every call."""


def device_rows() -> dict[str, Callable[[Any], Backend]]:
    """The rows of the table for device arrays, in order; that which takes every call is the last."""
    rows = {name: row.make for name, row in BACKENDS.items() if row.on_device}
    return {**{name: make for name, make in rows.items() if name != FALLBACK}, FALLBACK: rows[FALLBACK]}


def read_setting(setting: str) -> str:
    """The value of ``HPCCOMM_GPU_TRANSPORT``; raises ArgumentError for an unknown one."""
    known = ("auto", *device_rows(), ON_HOST)
    if setting and setting not in known:
        raise ArgumentError(f"{TRANSPORT}={setting!r} is not known: use one of {', '.join(known)}")
    return setting or "auto"


class DeviceTransports:
    """The device transports of one communicator; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks if the transport of the setting does not work.
    """

    def __init__(self, planner: Any) -> None:
        self.setting = read_setting(planner.context.settings[TRANSPORT])
        self.backends: dict[str, DeviceBackend] = {}
        """The available transports, in order of preference for long calls."""
        self.troubles: dict[str, str] = {}
        """Why each transport is not available; empty if it is."""
        for name, make in device_rows().items():
            if self.setting not in ("auto", name) and name != FALLBACK:
                self.troubles[name] = f"{TRANSPORT} is {self.setting}"
                continue
            try:
                self.backends[name] = cast(DeviceBackend, make(planner))
                self.troubles[name] = ""
            except TransportError as error:
                self.troubles[name] = str(error)
        if self.troubles.get(self.setting):
            self.free()
            raise TransportError(
                f"{TRANSPORT}={self.setting} does not work here: {self.troubles[self.setting]}: unset {TRANSPORT}"
            )

    def choose(self, nbytes: int, takers: Collection[str]) -> str:
        """The transport for a call of ``nbytes`` bytes among those that take it, the same on all ranks."""
        able = [name for name in self.backends if name in takers]
        if self.setting != "auto":
            return self.setting if self.setting in able else FALLBACK
        if nbytes < MANY_BYTES:
            able = [name for name in able if not self.backends[name].needs_barriers]
        return able[0]

    def bind(self, call: Call, algorithm: str) -> Plan:
        """Bind a call to its transport; ``algorithm`` is named for the host, empty for none."""
        takers = [name for name, each in self.backends.items() if each.takes(call, algorithm)]
        return self.backends[self.choose(call.nbytes, takers)].bind(call)

    def describe(self) -> dict[str, str]:
        """Each transport: whether it is available, or the reason why not."""
        return {name: f"no: {why}" if why else self._describe_found(name) for name, why in self.troubles.items()}

    def _describe_found(self, name: str) -> str:
        remark = self.backends[name].remark
        return f"yes ({remark})" if remark else "yes"

    def free(self) -> None:
        """Free all transports (collective)."""
        for each in self.backends.values():
            each.free()
        self.backends = {}
