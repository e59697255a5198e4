"""Persistent collectives: a call bound once and started many times, with the methods of MPI's persistent requests."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from hpccomm.calls.plans import Plan
from hpccomm.errors import ArgumentError


class PersistentRequest:
    """A persistent collective: repeat ``Start`` and ``Wait``, then ``Free`` the request.

    :meth:`Wait` and :meth:`Test` do the work, as in MPI libraries without a progress thread.
    """

    def __init__(self, bound: Plan, buffers: tuple[Any, ...]) -> None:
        self._plan: Plan | None = bound
        self._buffers = buffers
        self._started = False

    def Start(self) -> None:
        """Start the call; the buffers belong to it until :meth:`Wait` returns."""
        if self._plan is None or self._started:
            state = "freed: make a new one" if self._plan is None else "already started: Wait for it first"
            raise ArgumentError(f"Start: the persistent request is {state}")
        self._started = True

    def Wait(self, status: MPI.Status | None = None) -> bool:
        """Complete this rank's part of the call."""
        if self._started and self._plan is not None:
            self._started = False
            self._plan.run()
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Complete this rank's part of the call; always returns True."""
        return self.Wait(status)

    def Free(self) -> None:
        """Free the plan."""
        if self._plan is not None:
            self._plan.free()
            self._plan = None
            self._buffers = ()

    wait, test = Wait, Test

    def __bool__(self) -> bool:
        return self._plan is not None
