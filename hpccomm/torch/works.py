"""The handle of one collective: an error is kept on it and raised by ``wait``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpccomm.errors import MismatchError
from hpccomm.progress import Call


class Work(dist.Work):
    """The handle of the call ``name``, which writes ``results``; ``missing`` describes what a late call lacks."""

    def __init__(self, name: str, results: list[Any], missing: Callable[[], str]) -> None:
        super().__init__()
        self._name, self._results, self._missing = name, results, missing
        self._call: Call | None = None
        self._error: BaseException | None = None
        self._complete = False
        self._future: Any = None
        self._lock = threading.Lock()

    def follow(self, call: Call) -> None:
        """The call runs beside the program."""
        self._call = call

    def run(self, body: Callable[[Any], None], on: Any) -> None:
        """Run the call; its error is kept and raised."""
        try:
            body(on)
        except BaseException as error:
            self._error = error
            raise
        finally:
            with self._lock:
                self._complete = True
                future = self._future
            if future is not None:
                self._finish(future)

    def run_here(self, body: Callable[[Any], None], on: Any) -> None:
        """Run the call; its error is kept for :meth:`wait`."""
        try:
            body(on)
        except Exception as error:
            self._error = error
        self._complete = True

    def _finish(self, future: Any) -> None:
        if self._error is None:
            future.set_result(self._results)
        else:
            future.set_exception(self._error)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait for the call and raise its error; after ``timeout``, if there is one, raise MismatchError."""
        if self._call is not None and not self._complete:
            seconds = timeout.total_seconds()
            if not self._call.sleep(seconds if seconds > 0 else None):
                raise MismatchError(f"{self._name} timed out after {seconds:g} s: {self._missing()}")
            self._error = self._error or self._call.error  # the channel could not be made
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
        raise RuntimeError(f"{self._name} has no source rank")

    _source_rank = source_rank
