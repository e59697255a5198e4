"""The exceptions of hpccomm.

::

    HpccommError
    ├── ArgumentError      this rank's call is wrong; raised before the first message     (ValueError)
    ├── MismatchError      ranks of one communicator made different calls                 (RuntimeError)
    ├── LaunchError        the launcher and the MPI library do not belong together        (RuntimeError)
    ├── ScheduleError      a schedule does not do what its collective promises            (AssertionError)
    └── TransportError     a transport is not available here                              (OSError)

Every message names the rank, the mistake and what to do.
"""

from __future__ import annotations


class HpccommError(Exception):
    """The base class of all errors of hpccomm."""

    exit_status = 1
    """The status with which a command ends after this error."""


class ArgumentError(HpccommError, ValueError):
    """A wrong argument on this rank: buffer, count, datatype, root, operation or algorithm; or of a command."""

    exit_status = 2


class MismatchError(HpccommError, RuntimeError):
    """Ranks of one communicator made different calls at the same time."""


class LaunchError(HpccommError, RuntimeError):
    """The launcher started more ranks than the MPI library sees."""


class ScheduleError(HpccommError, AssertionError):
    """A schedule breaks its collective's promise; names rank, round and block."""


class TransportError(HpccommError, OSError):
    """Shared memory, a device or a library that a transport needs is missing or too small."""
