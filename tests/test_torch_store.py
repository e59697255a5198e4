"""How ranks wait for each other in torch's store: they drive MPI meanwhile, and leave no keys behind."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch.distributed as dist

from hpccomm.torch import barrier, members


class Drives:
    """Takes the place of MPI, and counts how often it is driven."""

    def __init__(self) -> None:
        self.COMM_SELF, self.times = SimpleNamespace(Iprobe=self.drive), 0

    def drive(self) -> None:
        self.times += 1


class BehindMessage:
    """The store of a rank that waits for another one, which waits for a message of this rank."""

    def __init__(self, drives: Drives) -> None:
        self.drives = drives

    def check(self, keys: list[str]) -> bool:
        return self.drives.times > 0

    def set(self, key: str, value: str) -> None: ...

    def delete_key(self, key: str) -> None: ...

    def get(self, key: str) -> bytes:
        return b"0,1"

    def compare_set(self, key: str, expected: str, choice: str) -> bytes:
        return choice.encode()


@pytest.fixture
def drives(monkeypatch: pytest.MonkeyPatch) -> Drives:
    made = Drives()
    monkeypatch.setattr(members, "MPI", made)
    monkeypatch.setattr(members, "find_left", lambda comm: [])
    monkeypatch.setitem(members._base, "comm", None)
    return made


WAITS: dict[str, Callable[[Any], None]] = {
    "monitored_barrier": lambda store: barrier.await_all(store, 0, 2, 1, 0.5),
    "new_group": lambda store: members.await_members(store, [0, 1], 0, 0.5),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_rank_that_waits_in_the_store_drives_its_messages(name: str, drives: Drives) -> None:
    WAITS[name](BehindMessage(drives))
    assert drives.times


def test_barriers_leave_no_keys_but_those_of_the_last_one(drives: Drives) -> None:
    store, size = dist.HashStore(), 2

    def run(rank: int) -> None:
        for number in range(1, 11):
            barrier.await_all(store, rank, size, number, 60)

    threads = [Thread(target=run, args=[rank]) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert store.num_keys() <= size + 1
