"""Faults at a chosen call of a chosen rank, for tests of programs that must report them or go on.

::

    with faults.inject(comm, "kill", rank=1, call=17):
        train(comm)

Calls are the blocking collectives of one communicator, counted from 1 after the injection.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

from hpccomm.calls.blocks import OBJECT_SIGNATURES, SIGNATURES
from hpccomm.errors import ArgumentError

METHODS = (*SIGNATURES, "Allreduce_view", *OBJECT_SIGNATURES, "barrier")
"""The methods whose calls are counted."""

Call = Callable[[], Any]


def kill(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """End this process by SIGKILL, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """End this process without any clean-up."""
    os._exit(1)


def leave(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """End this process as a program does, without the other ranks."""
    sys.exit(1)


def stop(call: Call, arguments: tuple[Any, ...], seconds: float) -> Any:
    """Stop this process, threads included, for some seconds; it cannot be told from a slow one."""
    wake = f"sleep {seconds}; kill -CONT {os.getpid()}"
    with subprocess.Popen(["/bin/sh", "-c", wake]):
        os.kill(os.getpid(), signal.SIGSTOP)
        return call()


def delay(call: Call, arguments: tuple[Any, ...], seconds: float) -> Any:
    """Make the call some seconds late."""
    time.sleep(seconds)
    return call()


def drop(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """Leave the call out."""


def fail(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """Raise an exception in place of the call."""
    raise RuntimeError("an injected fault")


def exhaust(call: Call, arguments: tuple[Any, ...], seconds: float) -> None:
    """Raise the error of NumPy and Python where memory runs out."""
    raise MemoryError("an injected fault")


def corrupt(call: Call, arguments: tuple[Any, ...], seconds: float) -> Any:
    """Flip the lowest bit of the first byte of the first array, then make the call."""
    array = next((each for each in arguments if isinstance(each, np.ndarray) and each.size), None)
    if array is None or not array.flags.c_contiguous:
        raise ArgumentError("faults.inject: the call has no contiguous array to corrupt: choose another call")
    array.reshape(-1).view(np.uint8)[0] ^= 1
    return call()


FAULTS: dict[str, Callable[[Call, tuple[Any, ...], float], Any]] = {
    "kill": kill,
    "exit": exit_at_once,
    "leave": leave,
    "stop": stop,
    "slow": delay,
    "drop": drop,
    "raise": fail,
    "memory": exhaust,
    "corrupt": corrupt,
}
"""The faults by name."""


@contextmanager
def inject(comm: Any, fault: str, rank: int, call: int, seconds: float = 1.0) -> Iterator[None]:
    """Let one rank have a fault at its ``call``-th collective call on ``comm`` (a :class:`hpccomm.Communicator`).

    ``fault``: ``"kill"``, ``"exit"`` (``os._exit``), ``"leave"`` (``sys.exit``), ``"stop"`` (for ``seconds``),
    ``"slow"`` (by ``seconds``), ``"drop"``, ``"raise"``, ``"memory"`` (a MemoryError) or ``"corrupt"``.  Every rank
    passes the same arguments.  Raises ArgumentError for a fault, a rank or a number that does not exist.
    """
    if fault not in FAULTS:
        raise ArgumentError(f"faults.inject: {fault!r} is not known: use one of {', '.join(FAULTS)}")
    if not 0 <= rank < comm.size or call < 1:
        raise ArgumentError(f"faults.inject: rank {rank}, call {call}: pass a rank of {comm.size} and a call from 1 on")
    if comm.rank != rank:
        yield
        return
    names = [name for name in METHODS if hasattr(comm, name)]
    before = {name: vars(comm)[name] for name in names if name in vars(comm)}
    made = [0]

    def watch(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*arguments: Any, **named: Any) -> Any:
            made[0] += 1
            if made[0] != call:
                return method(*arguments, **named)
            return FAULTS[fault](lambda: method(*arguments, **named), (*arguments, *named.values()), seconds)

        return run

    vars(comm).update({name: watch(getattr(comm, name)) for name in names})
    try:
        yield
    finally:
        for name in names:
            vars(comm).pop(name, None)
        vars(comm).update(before)
