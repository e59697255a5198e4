"""Calls beside the program: a progress thread runs the calls of a communicator in the order of issue.

*A call is a function of the channel, a private duplicate of the user's communicator that only the progress thread
uses.*  So a call beside the program never meets a call of the program, in messages, in shared memory or in the
consistency table, and ranks whose calls differ are named as in blocking calls.

Each communicator has a queue.  A progress thread takes one queue and runs it until it is empty; a second thread is
started only while two queues have calls, because ranks may issue the calls of two communicators in different orders.
A thread without a queue sleeps.  A blocking call waits for the calls that were issued before it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls import watchdog
from hpccomm.calls.consistency import error_reports
from hpccomm.calls.fingerprint import Fingerprint
from hpccomm.calls.watchdog import EXIT_SECONDS, FLUSH_SECONDS, log_line
from hpccomm.context import Context, create_private_comm
from hpccomm.errors import HpccommError, TransportError
from hpccomm.transports.polling import await_request

PR_SET_TIMERSLACK = 29
"""Linux's number of that request."""
DRIVE_SECONDS = 5e-4
"""Seconds between two calls of MPI with ``HPCCOMM_PROGRESS=all``."""


class Call:
    """A call under way: a future.  ``description`` names it in errors."""

    def __init__(
        self, function: Callable[[Any], Any], description: str | Fingerprint, rank: int, nbytes: int = 0
    ) -> None:
        self.text = f"rank {rank}: {description}"
        self.fingerprint = description if isinstance(description, Fingerprint) else Fingerprint(description)
        self.algorithm = "auto"
        self.nbytes = nbytes
        """The bytes of the call's array for the flight recorder, if they are known."""
        self.blocking_calls = self.number = 0
        """How many blocking calls this rank has made before it; its number among the others of its communicator."""
        self.error: BaseException | None = None
        """The exception that has ended the call."""
        self.requests: tuple[Any, ...] = ()
        """Requests of MPI to complete with the call; the last one is its generalized request."""
        self._function: Callable[[Any], Any] | None = function  # holds the call's arrays until it is complete
        self._result: Any = None
        self._complete = threading.Event()
        self._process = os.getpid()

    def done(self) -> bool:
        """Whether the call is complete, or has failed."""
        return self._complete.is_set()

    def wait(self) -> Any:
        """Sleep until the call is complete; returns its result or raises its exception."""
        self.sleep()
        if self.error is not None:
            raise self.error
        return self._result

    def sleep(self, seconds: float | None = None) -> bool:
        """Sleep until the call is complete, at most for some seconds; returns whether it is."""
        if not self.done() and os.getpid() != self._process:
            raise TransportError(
                f"{self.text}: this process was forked while the call was under way, which its parent completes: "
                "wait before the fork, or start processes by spawn"
            )
        counted = 0
        try:
            with _state.lock:
                _state.waiters[0] += (counted := 1)
            return self._complete.wait(seconds)
        finally:
            with _state.lock:
                _state.waiters[0] -= counted

    def run(self, find_channel: Callable[[Call], Any]) -> None:
        """Run the call on the channel and keep its result or its exception, which is also printed."""
        assert self._function is not None
        try:
            self._result = self._function(find_channel(self))
        except BaseException as error:
            self.error = error
            with suppress(Exception):  # those that wait for the call must go on
                report_failure(self.text, error)
        self._function = None

    def finish(self) -> None:
        """Wake those that wait."""
        if self.requests:
            self.requests[-1].Complete()
        self.requests = ()
        self._complete.set()


def report_failure(text: str, error: BaseException) -> None:
    """Write that a call has failed: of an error of ours its sentence, by one of the ranks that have it."""
    if isinstance(error, HpccommError) and os.environ.get("HPCCOMM_TRACEBACK") != "full":
        error_reports.write(str(error))
    else:
        trace = "".join(traceback.format_exception(error))
        os.write(2, f"[hpccomm] {text} has failed:\n{trace}".encode(errors="replace"))


class Queue:
    """The calls of one MPI communicator that are not complete, in the order of issue."""

    def __init__(self, context: Context, make_channel: Callable[[MPI.Intracomm, str], Any]) -> None:
        self.calls: deque[Call] = deque()
        """The first one is running."""
        self._context, self._make_channel = context, make_channel
        self._thread = 0
        self._channel: Any = None
        self.failure: HpccommError | None = None
        """The error after which the communicator is out of step."""

    def submit(self, call: Call) -> None:
        """Append a call."""
        with _state.lock:
            self.calls.append(call)
            self._issue(call)
            for each in list(self._context.users):
                each.hold(self.let_pass)
            first = len(self.calls) == 1
        if first:
            give_to_thread(self)

    def run(self) -> None:
        """Run all calls, in a progress thread."""
        self._thread = threading.get_ident()
        while self.calls:
            call = self.calls[0]
            with self._context.begin_issued(call.fingerprint, call.nbytes):
                call.run(self._find_channel)
            with _state.lock:
                if len(self.calls) == 1:
                    self._thread = 0
                    for each in list(self._context.users):
                        each.let_go()
                    release_thread()
                self.calls.popleft()
                last = not self.calls
            call.finish()
            if last:
                return

    def let_pass(self) -> None:
        """Let a blocking call pass after all calls of the queue; raise if the ranks are out of step."""
        self.drain()
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)

    def drain(self) -> None:
        """Wait for all calls; the progress thread itself does not wait."""
        if self._thread == threading.get_ident():
            return
        while self.calls:
            with _state.lock:
                last = self.calls[-1] if self.calls else None
            if last:
                last.sleep()

    def _issue(self, call: Call) -> None:
        """Write a call that this rank issues to the consistency table."""
        table = self._context.consistency
        if table:
            call.blocking_calls = table.blocking_calls_here()
            call.number = table.issue(call.fingerprint, call.blocking_calls)

    def _find_channel(self, call: Call) -> Any:
        """The channel, as soon as all ranks have issued this call, which until then costs no core.

        The first call makes it (collective).
        """
        table = self._context.consistency
        try:
            if table:
                table.await_issue(call.number, call.blocking_calls, call.fingerprint)
            if self._context.layout.count > 1:
                check = partial(table.check_issued, call.number, call.fingerprint) if table else lambda: None
                await_request((self._channel or self._context).private_comm.Ibarrier(), check=check)
        except HpccommError as error:
            self.failure = error
            raise
        if self._channel is None:
            self._channel = self._make_channel(create_private_comm(self._context.private_comm), call.algorithm)
            self._channel._own_context.waiters = _state.waiters.ctypes.data
        if self._channel.algorithm != call.algorithm:
            self._channel.algorithm = call.algorithm
        return self._channel

    def close(self) -> None:
        """Wait for all calls and free the channel (collective)."""
        self.drain()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.Free()


def submit(
    comm: Any,
    function: Callable[[Any], Any],
    text: str | Fingerprint = "a submitted function",
    wrap: Callable[[Call], Any] = lambda call: call,
    here: bool = False,
    nbytes: int = 0,
) -> Any:
    """Run ``function(channel)`` beside the program, after what was issued on ``comm`` before; returns a future.

    ``comm`` is a :class:`hpccomm.Communicator`; all ranks submit in the same order, also in the order of their blocking
    calls.  ``channel`` is a Communicator of the same ranks on which the function makes blocking calls, as many as it
    likes, and which no other thread uses; the function must not call ``comm``.  The future has ``wait()``, which sleeps
    until the function has returned and gives its result or raises its exception, and ``done()``.  ``function`` and
    what it refers to are kept alive until then; arrays must not be changed before.  ``text`` names the call in errors;
    ``nbytes`` are the bytes of its array, for timelines.  ``wrap`` turns the future into what is returned, before the
    call begins.

    A blocking call on ``comm`` waits for all submitted functions.  Where no thread may call MPI (:func:`has_thread`),
    on a single rank, and with ``here``, the function runs at once, on ``comm`` itself.
    """
    call = Call(function, text, comm.rank, nbytes)
    future = wrap(call)
    if here or comm.size == 1 or not has_thread():
        call.run(lambda call: comm)
        call.finish()
        return future
    context = comm._own_context
    if context.queue is None:
        context.queue = Queue(context, comm._make_channel)
        _state.queues.add(context.queue)
    call.algorithm = comm.algorithm
    context.queue.submit(call)
    return future


def has_thread() -> bool:
    """Whether a progress thread may call MPI beside the program (``HPCCOMM_PROGRESS``, the same on all ranks)."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE) and os.environ.get("HPCCOMM_PROGRESS") != "off"


# Threads


def wake_in_time() -> None:
    """Let the sleeps of this thread end when they should: Linux ends them up to 50 µs later by default."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(1000))


class Worker(threading.Thread):
    """A progress thread; it sleeps until it is given a queue."""

    def __init__(self) -> None:
        super().__init__(name="hpccomm-progress", daemon=True)
        self._given = threading.Semaphore(0)
        self._queue: Queue | None = None
        self.start()

    def give(self, queue: Queue) -> None:
        """Wake the thread to run a queue."""
        self._queue = queue
        self._given.release()

    def run(self) -> None:
        """Run queues."""
        wake_in_time()
        while True:
            self._given.acquire()
            queue, self._queue = self._queue, None
            assert queue is not None
            queue.run()


class Driver(threading.Thread):
    """A thread that drives the messages and requests of MPI while the program computes."""

    def __init__(self) -> None:
        super().__init__(name="hpccomm-driver", daemon=True)
        self._ends = threading.Event()
        self.start()

    def run(self) -> None:
        """Call MPI from time to time, in which it drives everything that is under way."""
        while not self._ends.wait(DRIVE_SECONDS):
            MPI.COMM_SELF.Iprobe()

    def end(self) -> None:
        """End the thread, which must not call MPI any more."""
        self._ends.set()
        self.join()


class State:
    """The progress threads of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may ask for another call
        self.waiters = np.zeros(1, np.int64)
        """The number of threads that wait for calls, for compiled code."""
        self.idle: list[Worker] = []
        self.queues: weakref.WeakSet[Queue] = weakref.WeakSet()
        self.driver: Driver | None = None


_state = State()


def give_to_thread(queue: Queue) -> None:
    """Let a progress thread run a queue."""
    with _state.lock:
        worker = _state.idle.pop() if _state.idle else None
    (worker or Worker()).give(queue)


def release_thread() -> None:
    """This thread is free for another queue."""
    worker = threading.current_thread()
    assert isinstance(worker, Worker)
    _state.idle.append(worker)


def get_ready() -> None:
    """Let the end of the program complete the calls of a communicator that has been made.

    With ``HPCCOMM_PROGRESS=all``, also let a thread drive MPI's own requests and messages from now on.
    """
    if not has_thread():
        return
    complete_at_end(complete_all)
    if _state.driver is None and os.environ.get("HPCCOMM_PROGRESS") == "all":
        _state.driver = Driver()


def forget_threads() -> None:
    """In a forked process there are none."""
    _state.__init__()  # type: ignore[misc]


def complete_all() -> None:
    """At the end of the program, wait for calls that are not complete; abort all ranks if that takes too long."""
    if _state.driver:
        _state.driver.end()
        _state.driver = None
    pending = [call for queue in list(_state.queues) for call in list(queue.calls)]
    if not pending:
        return
    names = ", ".join(call.text.partition(": ")[2] for call in pending[:4]) + (", …" if len(pending) > 4 else "")
    log_line(
        f"rank {MPI.COMM_WORLD.rank}: the program ends while calls are under way ({names}): "
        "wait for every request and future before the end"
    )
    until = time.monotonic() + EXIT_SECONDS
    if not all(call.sleep(max(0.0, until - time.monotonic())) for call in pending):
        log_line(f"rank {MPI.COMM_WORLD.rank} aborts all ranks: {names} cannot complete")
        time.sleep(FLUSH_SECONDS)
        MPI.COMM_WORLD.Abort(1)


@cache
def complete_at_end(complete: Callable[[], None]) -> None:
    """Let the end of the program, and that of MPI, begin with a function that completes calls, before the watchdog's.

    Handlers are registered while no call is under way: Python never runs one that a thread registers during the end.
    """
    watchdog.end_with_mpi()
    atexit.register(complete)
    keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, value: complete())
    MPI.COMM_SELF.Set_attr(keyval, None)


os.register_at_fork(after_in_child=forget_threads)
