"""The handle of one collective, and the thread on which a group's asynchronous calls run in the order of issue.

Torch matches the calls of a group by their order alone: one rank may wait at once where another waits later.  So both
kinds run on the same communicator, one after the other: a synchronous call runs in its caller's thread if no other call
of the group is under way, and queues behind them otherwise.  An error is kept on the handle and raised by ``wait``.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpccomm.calls.watchdog import EXIT_SECONDS, abort_all
from hpccomm.errors import MismatchError, TransportError
from hpccomm.progress import has_thread

NO_LIMIT = timedelta(0)
"""Torch's time limit of a wait that has none."""
SETTLE_SECONDS = 1e-3
"""Time between two looks for threads that are busy when a group or the program ends."""


def make_futures(results: list[Any]) -> tuple[Any, Any]:
    """Two futures: the first one set to None gives the second one ``results``; set to an error, the second one fails.

    DDP takes the exception of a future whose ``set_exception`` was called as its value, and crashes.
    """

    def read(begin: Any) -> list[Any]:
        error = begin.value()
        if error is not None:
            raise error
        return results

    begin: Any = torch.futures.Future()
    return begin, begin.then(read)


class Work(dist.Work):
    """The handle of the call ``name``, which writes ``results``; ``missing`` describes what a late call lacks.

    ``limit`` is the time after which a wait raises that names none; 0 for none.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[], None],
        results: list[Any],
        missing: Callable[[], str],
        limit: timedelta = NO_LIMIT,
    ) -> None:
        super().__init__()
        self.name, self.limit, self._began = name, limit, time.monotonic()
        self._body: Callable[[], None] | None = body
        self._results, self._missing = results, missing
        self._error: BaseException | None = None
        self._complete, self._process = False, os.getpid()
        self._event: threading.Event | None = None
        self._future: Any = None
        self._begin_future: Any = None
        """The future before :attr:`_future`, see :func:`make_futures`."""
        self._expired = False
        self._lock = threading.Lock()

    def run(self) -> Any:
        """Run the call and keep its error; returns the future that :meth:`set_future` is to set, if there is one."""
        assert self._body is not None
        try:
            self._body()
        except Exception as error:  # raised by wait, in the thread that waits
            self._error = error
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._body = None  # and with it the tensors
            with self._lock:
                self._complete = True
                future, event = None if self._expired else self._begin_future, self._event
            if event is not None:
                event.set()
        return future

    def set_future(self, future: Any) -> None:
        """Set the future, which runs its callbacks."""
        future.set_result(self._error)

    def fail_future(self) -> None:
        """Let the future fail, which runs its callbacks, after :meth:`expire`."""
        self._begin_future.set_result(self._time_out(self.limit.total_seconds()))

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Wait for the call and raise its error; after ``timeout``, or the call's limit, raise MismatchError."""
        if self._complete and self._error is None:
            return True
        seconds = (timeout or self.limit).total_seconds()
        if not self.sleep(seconds if seconds > 0 else None):
            raise self._time_out(seconds)
        if self._error is not None:
            raise self._error
        return True

    def _time_out(self, seconds: float) -> MismatchError:
        """The error of a call that takes too long."""
        return MismatchError(f"{self.name} timed out after {seconds:g} s: {self._missing()}")

    def expire(self) -> bool:
        """Whether the future is to fail now, as the call has taken longer than its limit; ``wait`` raises by itself."""
        if not 0 < self.limit.total_seconds() < time.monotonic() - self._began:
            return False
        with self._lock:
            if self._complete or self._expired or self._future is None:
                return False
            self._expired = True
        return True

    def sleep(self, seconds: float | None) -> bool:
        """Sleep until the call has ended, at most for some seconds; returns whether it has."""
        if self._complete:
            return True
        if os.getpid() != self._process:
            raise TransportError(
                f"{self.name}: this process was forked while the call was under way, which its parent completes: "
                "wait before the fork, or start processes by spawn"
            )
        with self._lock:
            if self._event is None:
                self._event = threading.Event()
            if self._complete:
                return True
        return self._event.wait(seconds)

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
                self._begin_future, self._future = make_futures(self._results)
        if make and complete:
            self.set_future(self._begin_future)
        return self._future

    def source_rank(self) -> int:
        """Only a receive has one."""
        raise RuntimeError(f"{self.name} has no source rank")

    _source_rank = source_rank


class Done(dist.Work):
    """The handle of synchronous calls, which have ended before their caller has it."""

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Nothing is to be waited for."""
        return True

    def is_completed(self) -> bool:
        """The call has ended."""
        return True

    is_success = is_completed

    def synchronize(self) -> None:
        """As :meth:`wait`."""


DONE = Done()


class Together(dist.Work):
    """The handle of several calls, whose ``wait`` waits for all of them and raises their first error."""

    def __init__(self, works: Sequence[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Wait for all calls, each for so long."""
        errors = list[BaseException]()
        for each in self._works:
            try:
                each.wait(timeout)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return True

    def is_completed(self) -> bool:
        """Whether all calls have ended."""
        return all(each.is_completed() for each in self._works)

    is_success = is_completed

    def synchronize(self) -> None:
        """As :meth:`wait`."""
        self.wait()


class CallQueue:
    """Runs the calls of one group one after the other, in the order in which they are given.

    One thread serves the queue at a time.  It leaves that to another one before it runs the callbacks of a future:
    they may make calls of the group, and wait for them.
    """

    def __init__(self) -> None:
        self._running, self._lock = threading.Lock(), threading.Lock()
        self._calls: deque[Work] = deque()
        """The calls that have not ended; a thread runs the first one."""
        self._served = self._runs = False
        """Whether a thread serves the queue, and whether it is in a call."""
        self.limit_here = NO_LIMIT
        """The limit of the call that :meth:`run` runs."""
        self._wake, self._idle, self._busy, self._leaving = threading.Semaphore(0), 0, 0, 0
        self._closed = False
        _queues.add(self)

    def enter(self) -> bool:
        """Whether this thread may run a call: no other is under way, and none will be before :meth:`leave`."""
        if self._calls or not self._running.acquire(blocking=False):
            return False
        if self._closed:
            self._running.release()
            return False
        return True

    def leave(self) -> None:
        """End what :meth:`enter` has begun."""
        self._running.release()

    def run(self, work: Work) -> None:
        """Run a call in this thread if no other is under way, else behind the others."""
        if not self.enter():
            self.put(work)
            return
        try:
            self.limit_here = work.limit
            future = work.run()
        finally:
            self.limit_here = NO_LIMIT
            self.leave()
        if future is not None:
            work.set_future(future)

    def submit(self, work: Work) -> None:
        """Run a call on the group's thread, or at once where no thread may call MPI."""
        if has_thread():
            self.put(work)
        else:
            self.run(work)

    def put(self, work: Work) -> None:
        """Run a call on the group's thread, behind the others."""
        if self._closed:
            raise TransportError(f"{work.name}: the group has been destroyed: make a new one")
        with self._lock:
            self._calls.append(work)
            needs_thread, self._served = not self._served, True
        if needs_thread:
            self._find_thread()

    def _find_thread(self) -> None:
        """Let an idle thread, or a new one, serve the queue."""
        with self._lock:
            start = not self._idle
            self._idle -= not start
            self._busy += 1
        if start:
            threading.Thread(target=self._live, name="hpccomm-group", daemon=True).start()
        else:
            self._wake.release()

    def _live(self) -> None:
        """A thread: it serves the queue, and sleeps until it is to serve it again."""
        while True:
            self._serve()
            with self._lock:
                self._busy -= 1
                if self._closed:
                    return
                self._idle += 1
            self._wake.acquire()
            with self._lock:
                if self._leaving:
                    self._leaving -= 1
                    return

    def _serve(self) -> None:
        """Run calls until there is none, or one has a future."""
        future = None
        while future is None:
            with self._lock:
                if not self._calls:
                    self._served = False
                    return
                work = self._calls[0]
            with self._running:
                self._runs = True
                try:
                    future = work.run()
                finally:
                    self._runs = False
            with self._lock:
                self._calls.popleft()
                if future is not None:
                    self._served = more = bool(self._calls)
        if more:
            self._find_thread()
        work.set_future(future)

    def expire(self) -> bool:
        """Let futures of calls that have taken too long fail; returns whether one of the queue's calls runs."""
        with self._lock:
            late = [each for each in self._calls if each.expire()]
            self._busy += len(late)
        for each in late:  # callbacks may make calls
            threading.Thread(target=self._fail, args=[each], name="hpccomm-future", daemon=True).start()
        return self._runs

    def _fail(self, work: Work) -> None:
        """A thread: it lets the future of a call fail."""
        try:
            work.fail_future()
        finally:
            with self._lock:
                self._busy -= 1

    def settle(self, until: float) -> bool:
        """Wait until no thread runs a call or callbacks of a future; returns whether none does.

        Python ends a thread that comes back from C++ after the program, and C++ then ends the process by an abort.
        """
        while (self._busy or self._running.locked()) and time.monotonic() < until:
            time.sleep(SETTLE_SECONDS)
        return not (self._busy or self._running.locked())

    @property
    def last(self) -> Work | None:
        """The last call, while it has not ended."""
        with self._lock:
            return self._calls[-1] if self._calls else None

    def close(self) -> None:
        """End the threads; calls that were given end first."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, 0
            self._leaving += idle
        for _ in range(idle):
            self._wake.release()


_queues: weakref.WeakSet[CallQueue] = weakref.WeakSet()


def complete_all() -> None:
    """At the end of the program, wait for calls under way; abort all ranks if that takes too long."""
    until = time.monotonic() + EXIT_SECONDS
    for work in [each.last for each in list(_queues)]:
        if work is not None and not work.sleep(max(0.0, until - time.monotonic())):
            abort_all(f"{work.name} cannot complete, and the program ends: wait for every call before the end")
    for each in list(_queues):
        each.settle(until)


os.register_at_fork(after_in_child=_queues.clear)  # a child of fork has none of the threads
