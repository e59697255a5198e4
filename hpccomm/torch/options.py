"""The options of a process group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Pass them as ``pg_options`` of ``init_process_group`` or ``new_group``, the same on all ranks.

    ``algorithm`` is that of the group's reductions, gathers and broadcasts, one of
    :meth:`Communicator.algorithms <hpccomm.Communicator.algorithms>`.  ``reproducible=True``: the bits of sums of
    floats depend on the summands alone, not on order, placement, algorithm or number of ranks.  A group made without
    options has those of the default group.
    """

    algorithm: str = "auto"
    reproducible: bool = False
