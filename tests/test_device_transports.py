"""Other ways than through the host: memory that ranks read of each other, MPI and NCCL; with a stand-in device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stand_in import SIDE, StandIn

from hpccomm import TransportError, arrays
from hpccomm.kernels import reductions
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.transports.cuda import Piece
from hpccomm.transports.cuda_ipc import Fold, Peers, Take, Turn, divided

SIZES = (1, 2, 3, 5, 7)
ROOM = 256
"""Bytes of a rank's part in these tests."""


def operand(rank: int, n: int, dtype: Any = "f4") -> np.ndarray:
    """Distinct per rank and position, small enough that every order of summation is exact."""
    return ((rank + 1) * 10 + np.arange(n) % 97).astype(dtype)


def written(device: StandIn, values: np.ndarray) -> Any:
    """An array whose contents a kernel is still writing."""
    x = device.array(np.zeros_like(values), SIDE)
    x.fill(values)
    return x


def address(x: Any) -> int:
    return arrays.read_device(x, "test").address


# Memory that ranks read of each other


def summed(comm: Any, n: int, dtype: str, eager: bool, wanted: Any = None) -> None:
    """Sums of n elements in as many turns as it takes, three times over."""
    device = StandIn(eager=eager)
    peers = Peers(device, comm, ROOM)
    width, here = np.dtype(dtype).itemsize, wanted is None or comm.rank == wanted
    step = peers.room // width
    for step_number in range(3):
        x, y = written(device, operand(comm.rank + step_number, n, dtype)), device.array(np.zeros(n, dtype), SIDE)
        turns = []
        for lo in range(0, n, step):
            nbytes = width * (min(lo + step, n) - lo)
            fold = Fold("sum", reductions.code_of(dtype), 0, nbytes, address(y) + width * lo if here else 0)
            turns.append(Turn([Piece(address(x) + width * lo, 0, nbytes)], [fold]))
        peers.run(turns, [SIDE])
        want = np.sum([operand(k + step_number, n, dtype) for k in range(comm.size)], axis=0, dtype=dtype)
        assert np.array_equal(y.memory, want if here else np.zeros(n)), (comm.rank, n)
    peers.free()
    assert not device.files


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("eager", [False, True])
def test_peers_reduce_alone_or_divide_the_work(p: int, eager: bool) -> None:
    for n in (0, 1, 31, 32, 33, 200):
        run_on_ranks(p, lambda comm, n=n: summed(comm, n, "f4", eager))
    run_on_ranks(p, lambda comm: summed(comm, 21, "f2", eager, wanted=p - 1))


@pytest.mark.parametrize("p", SIZES)
def test_peers_take_what_others_have_brought(p: int) -> None:
    def body(comm: Any) -> None:
        device, n = StandIn(), 10
        peers = Peers(device, comm, ROOM)
        x, y = written(device, operand(comm.rank, n)), device.array(np.zeros(n * p, "f4"))
        takes = [Take(k, 4 * 3, 4 * 7, address(y) + 4 * n * k) for k in range(p)]
        peers.run([Turn([Piece(address(x), 0, 4 * n)], takes=takes)], [SIDE])
        want = np.zeros((p, n))
        want[:, :7] = [operand(k, n)[3:] for k in range(p)]
        assert np.array_equal(y.memory, want.ravel())
        peers.free()

    run_on_ranks(p, body)


class NoMeeting(Peers):
    """Forgets to wait for its own copies before it tells the others."""

    def meet(self) -> None:
        self.ranks.Barrier()


def test_peers_that_do_not_wait_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peers, "meet", NoMeeting.meet)
    with pytest.raises(AssertionError):
        run_on_ranks(2, lambda comm: summed(comm, 40, "f4", False))


@pytest.mark.parametrize("p", [4, 5, 7])
@pytest.mark.parametrize("nbytes", [0, 2, 16, 62, 64, 1000])
def test_shares_cover_every_byte_once(p: int, nbytes: int) -> None:
    shares = divided(nbytes, p)
    assert len(shares) == p
    assert [lo for lo, _ in shares][1:] == [hi for _, hi in shares][:-1]
    assert (shares[0][0], shares[-1][1]) == (0, nbytes)
    assert all(lo % 16 == 0 for lo, _ in shares if lo < nbytes)


class Blind(StandIn):
    """Opens the memory of somebody else."""

    def open(self, handle: bytes) -> int:
        if not self.files:  # its own
            return super().open(handle)
        memory = np.zeros(ROOM, np.uint8)
        self.memory[memory.ctypes.data] = memory, self.number
        return memory.ctypes.data


class Refusing(StandIn):
    """A device whose driver opens no other process's memory."""

    def open(self, handle: bytes) -> int:
        if self.files:
            raise RuntimeError("cudaErrorNotSupported")
        return super().open(handle)


@pytest.mark.parametrize(("kind", "words"), [(Blind, "does not see what rank"), (Refusing, "cudaErrorNotSupported")])
def test_all_ranks_learn_that_memory_is_not_shared(kind: Any, words: str) -> None:
    def body(comm: Any) -> None:
        device = (kind if comm.rank == 1 else StandIn)()
        with pytest.raises(TransportError, match=f"CUDA IPC does not work between these ranks: rank 1.*{words}"):
            Peers(device, comm, ROOM)
        for left in device.files.values():
            left.unlink()

    run_on_ranks(3, body)
