"""A collective bound once and started often, with the methods of MPI's persistent requests."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from hpccomm.calls.plans import Plan
from hpccomm.errors import ArgumentError


class Persistent:
    """``Start`` it, do something else, ``Wait`` for it; again and again; then ``Free`` it.

    The work is done inside :meth:`Wait` and :meth:`Test`, as in MPI libraries without a progress thread.
    """

    def __init__(self, bound: Plan, buffers: tuple[Any, ...]) -> None:
        self._plan: Plan | None = bound
        self._buffers = buffers
        self._started = False

    def Start(self) -> None:
        """Begin; the buffers belong to the call until it is waited for."""
        if self._plan is None or self._started:
            raise ArgumentError("Start of a request that is freed or running: Wait for it first")
        self._started = True

    def Wait(self, status: MPI.Status | None = None) -> bool:
        """Return when this rank's part is done."""
        if self._started and self._plan is not None:
            self._started = False
            self._plan.run()
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Do this rank's part; always done afterwards."""
        return self.Wait(status)

    def Free(self) -> None:
        """Give back what was bound."""
        if self._plan is not None:
            self._plan.free()
            self._plan = None
            self._buffers = ()

    wait, test = Wait, Test

    def __bool__(self) -> bool:
        return self._plan is not None
