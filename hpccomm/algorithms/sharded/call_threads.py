"""Threads that make the calls of one communicator beside the program, and the buffers that their calls use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from hpccomm.algorithms.transforms import Vector

Owner = TypeVar("Owner")


class CallThread:
    """Runs calls in a thread of its own, in the order in which they come; without one, at once."""

    def __init__(self, name: str, threaded: bool) -> None:
        self._thread = ThreadPoolExecutor(1, name) if threaded else None

    def submit(self, function: Callable[..., int], *arguments: Any) -> Future[int]:
        """Run a call; the future gives its result, the bytes sent, or raises its error."""
        if self._thread:
            return self._thread.submit(function, *arguments)
        made: Future[int] = Future()
        try:
            made.set_result(function(*arguments))
        except Exception as error:  # raised where the result is taken
            made.set_exception(error)
        return made

    def shutdown(self) -> None:
        """End the thread, after its calls."""
        if self._thread:
            self._thread.shutdown()


class Buffer(Generic[Owner]):
    """Room for a unit; ``under_way`` is the exchange that fills or sends it, until its result is taken."""

    def __init__(self, room: Vector) -> None:
        self.room = room
        self.unit: Owner | None = None
        self.under_way: Future[int] | None = None
        self.users: set[str] = set()
        """The names of the gathered units that use it."""


class GradientBuffers(Generic[Owner]):
    """Buffers for the gradients of whole units, which take turns."""

    def __init__(self, rooms: list[Vector]) -> None:
        self.buffers: list[Buffer[Owner]] = [Buffer(room) for room in rooms]
        """The one that was handed out longest ago comes first."""

    def find(self, unit: Owner) -> Buffer[Owner]:
        """The buffer handed out for this unit, or the oldest, whose exchange may be under way."""
        ready = (each for each in self.buffers if each.unit is unit and each.under_way is None)
        found = next(ready, self.buffers[0])
        self.buffers.remove(found)
        self.buffers.append(found)
        return found

    def __iter__(self) -> Iterator[Buffer[Owner]]:
        return iter(self.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.room.nbytes for each in self.buffers)
