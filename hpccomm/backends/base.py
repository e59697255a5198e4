"""A backend runs calls: the interface, which the table :data:`hpccomm.backends.table.BACKENDS` has in every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan

if TYPE_CHECKING:
    from hpccomm.context import Context


class Backend:
    """One way to run calls, for one communicator.

    A subclass takes some calls and binds them.  Its :attr:`context` has what it may use: ``private_comm``, a
    communicator for its own messages, ``layout``, ``settings`` and shared memory.  It does not exist yet while a
    backend of the host is made.
    """

    name = ""
    compares_itself = False
    """Whether a plan compares the calls of all ranks before it moves data; else the planner does around it."""
    meets_from = 0
    """From so many bytes on, no rank begins a call that synchronises before the calls of all have been compared."""
    rewrites = True
    """Whether it wants calls with derived datatypes as calls on contiguous memory."""

    def __init__(self, planner: Any) -> None:
        self.planner = planner

    @property
    def context(self) -> Context:
        """The communicator's context, also while calls are under way."""
        found: Context = self.planner.context
        return found

    def algorithms(self, collective: str) -> Sequence[str]:
        """Its values of ``algorithm=`` for ``"allreduce"``, ``"bcast"``, ….; all ranks must have the same."""
        raise NotImplementedError

    def takes(self, call: Call, algorithm: str) -> bool:
        """Whether one of its algorithms can run a call; the same answer on all ranks."""
        raise NotImplementedError

    def bind(self, call: Call) -> Plan:
        """The plan of a call that it takes; it may run many times.

        A plan that holds a reference to the user's arrays says ``lasts=False`` and is not kept.
        """
        raise NotImplementedError
