"""Messages whose handles nobody keeps."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from hpccomm.torch import messages


class Request:
    """A request that completes when it is told to."""

    def __init__(self) -> None:
        self.complete = False

    def Test(self, status: Any) -> bool:
        return self.complete


class Comm:
    """A communicator without ranks, whose requests hold no memory."""

    size = 2

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def Isend(self, buffer: Any, rank: int, tag: int) -> Request:
        self.requests.append(Request())
        return self.requests[-1]

    Irecv = Isend


def begin(call: Any, comm: Comm, tensor: Any) -> messages.Message:
    return call(comm, tensor, 1, 0, "rank 0: a message", timedelta(0))


@pytest.mark.parametrize("call", [messages.send, messages.receive])
def test_the_memory_of_a_message_lives_until_mpi_has_done_with_it(call: Any) -> None:
    comm, tensor = Comm(), torch.ones(3)
    alive = weakref.ref(tensor)
    begin(call, comm, tensor)
    del tensor
    for _ in range(5):
        begin(call, comm, torch.ones(3))
        gc.collect()
        assert alive() is not None
    for each in comm.requests:
        each.complete = True
    for _ in range(5):
        begin(call, comm, torch.ones(3))
        comm.requests[-1].complete = True
    gc.collect()
    assert alive() is None
    assert len(messages._under_way) <= messages.VISITS


@pytest.mark.parametrize("call", [messages.send, messages.receive])
def test_a_message_that_has_been_waited_for_is_not_kept(call: Any) -> None:
    comm, tensor = Comm(), torch.ones(3)
    alive, work = weakref.ref(tensor), begin(call, comm, tensor)
    comm.requests[-1].complete = True
    assert work.is_completed()
    del tensor, work
    gc.collect()
    assert alive() is None
