"""The handle of one call, and the thread on which a group's asynchronous calls run in the order of issue.

A synchronous call runs at once in its caller's thread where no other call of the group is under way; otherwise it
queues behind them.  An error is kept on the handle and raised by ``wait``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpccomm.errors import MismatchError


class Work(dist.Work):
    """The handle of one call; ``name`` and ``results`` are those of torch."""

    def __init__(self, name: str, run: Callable[[], None], results: list[Any], late: Callable[[], str]) -> None:
        super().__init__()
        self.name = name
        self._run: Callable[[], None] | None = run
        self._results, self._late = results, late
        self._error: BaseException | None = None
        self._complete = False
        self._event: threading.Event | None = None
        self._future: Any = None
        self._lock = threading.Lock()

    def execute(self) -> None:
        """Run the call and keep its error."""
        assert self._run is not None
        try:
            self._run()
        except BaseException as error:  # raised by wait, in the thread that waits
            self._error = error
        self._run = None  # and with it the tensors
        with self._lock:
            self._complete = True
            if self._event is not None:
                self._event.set()
            future = self._future
        if future is not None:
            self._finish(future)

    def _finish(self, future: Any) -> None:
        if self._error is None:
            future.set_result(self._results)
        else:
            with suppress(RuntimeError):  # a callback of the future may fail as well
                future.set_exception(self._error)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the call and raise its error; after ``timeout``, if there is one, raise MismatchError."""
        if not self._complete:
            with self._lock:
                if self._event is None:
                    self._event = threading.Event()
                    if self._complete:
                        self._event.set()
            seconds = timeout.total_seconds()
            if not self._event.wait(seconds if seconds > 0 else None):
                raise MismatchError(f"{self.name} timed out after {seconds:g} s: {self._late()}")
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether the call has ended."""
        return self._complete

    def is_success(self) -> bool:
        """Whether the call has ended without an error."""
        return self._complete and self._error is None

    def exception(self) -> BaseException | None:
        """The error of the call."""
        return self._error

    def result(self) -> list[Any]:
        """The tensors that the call has written."""
        return self._results

    def synchronize(self) -> None:
        """As :meth:`wait`."""
        self.wait()

    def get_future(self) -> Any:
        """A future of the tensors that the call writes."""
        with self._lock:
            make, complete = self._future is None, self._complete
            if make:
                self._future = torch.futures.Future()
        if make and complete:
            self._finish(self._future)
        return self._future

    def source_rank(self) -> int:
        """Only a receive has one."""
        raise RuntimeError(f"{self.name} has no source rank")

    _source_rank = source_rank


class CallQueue:
    """Runs the calls of one group one after the other, in the order in which they are given."""

    def __init__(self) -> None:
        self._running, self._lock = threading.Lock(), threading.Lock()
        self._pending = 0
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Work) -> None:
        """Run a call in this thread if no other is under way, else behind the others."""
        if self._pending == 0 and self._running.acquire(blocking=False):
            try:
                work.execute()
            finally:
                self._running.release()
        else:
            self.submit(work)

    def submit(self, work: Work) -> None:
        """Run a call on the group's thread."""
        with self._lock:
            self._pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="hpccomm calls", daemon=True)
                self._thread.start()
            self._waiting.put(work)

    def _serve(self) -> None:
        while (work := self._waiting.get()) is not None:
            with self._running:
                work.execute()
            with self._lock:
                self._pending -= 1
            del work

    def close(self) -> None:
        """End the thread after the calls that it has been given."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread = None
