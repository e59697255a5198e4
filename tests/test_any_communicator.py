"""Every public function that takes a communicator takes any intracommunicator of mpi4py, and refuses all else."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import Bucket, chain, descend, scale, topk
from hpccomm.errors import ArgumentError

BUCKET = Bucket({"w": (4, 6)})
N, RANK = BUCKET.size, MPI.COMM_WORLD.rank


def gradient_of(rank: int) -> Any:
    return np.random.default_rng(rank).normal(size=N).astype("f4")


def train(make: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    """Two steps of a method."""

    def body(comm: Any, folder: Path) -> Any:
        method, weights = make(comm), np.zeros(N, "f4")
        state = method.init(weights)
        for _ in range(2):
            step, state = method.update(gradient_of(RANK), state, weights)
            weights = weights + step
        return weights

    return body


def shard(make: Callable[..., Any]) -> Callable[[Any, Path], Any]:
    """A step of sharded states."""

    def body(comm: Any, folder: Path) -> Any:
        states = make(comm, {"layer": {"w": np.zeros(N, "f4")}}, scale(-0.5))
        states.gather("layer")
        states.reduce_accumulate("layer", {"w": gradient_of(RANK)})
        states.release("layer")
        states.boundary()
        weights = states.gather("layer")["w"].copy()
        states.close()
        return weights

    return body


def serve(comm: Any, folder: Path) -> Any:
    """A step of a parameter server; one rank alone has no server."""
    if isinstance(comm, MPI.Intracomm) and comm.size == 1:
        return None
    server = hpccomm.ParameterServer(comm, np.zeros(N, "f4"), scale(-0.5))
    if server.serves:
        server.serve()
        return server.weights
    server.push(gradient_of(1) + 0 * server.pull())
    return server.leave()


def exchange_in_buckets(comm: Any, folder: Path) -> Any:
    exchange = hpccomm.BucketedExchange(comm, {"w": np.zeros(N, "f4")}, hpccomm.mean)
    exchange.add({"w": gradient_of(RANK)})
    return exchange.finish()["w"]


def save(comm: Any, folder: Path) -> Any:
    hpccomm.save_set(comm, folder, "run", weights=gradient_of(RANK))
    return hpccomm.load_set(comm, folder, "run", weights=np.zeros(N, "f4"))[0]


SGD = chain(scale(1.0), descend(0.1))
TABLE: dict[str, Callable[[Any, Path], Any]] = {
    "allreduce": lambda comm, folder: hpccomm.allreduce(gradient_of(RANK), comm=comm),
    "reduce_scatter": lambda comm, folder: hpccomm.reduce_scatter(gradient_of(RANK), comm=comm),
    "allgather": lambda comm, folder: hpccomm.allgather(gradient_of(RANK), comm),
    "broadcast": lambda comm, folder: hpccomm.broadcast(gradient_of(RANK), 0, comm),
    "allreduce_rows": lambda comm, folder: hpccomm.allreduce_rows(comm, [RANK], np.ones((1, 3), "f4"), 9).values,
    "block_mean": train(hpccomm.block_mean),
    "mean_rows": train(lambda comm: hpccomm.mean_rows(comm, BUCKET, ["w"])),
    "BucketedExchange": exchange_in_buckets,
    "scale_loss": train(lambda comm: hpccomm.scale_loss(comm, hpccomm.mean(comm))),
    "mean": train(hpccomm.mean),
    "synchronous_sgd": train(lambda comm: hpccomm.synchronous_sgd(comm, 0.1)),
    "synchronous_adam": train(lambda comm: hpccomm.synchronous_adam(comm, 0.1)),
    "feedback": train(lambda comm: hpccomm.feedback(topk(0.5), comm)),
    "without_feedback": train(lambda comm: hpccomm.without_feedback(hpccomm.qsgd(), comm)),
    "gtc": train(lambda comm: hpccomm.gtc(comm, 0.5)),
    "dgc": train(lambda comm: hpccomm.dgc(comm, BUCKET, 0.25, smallest=1)),
    "onebit_sgd": train(hpccomm.onebit_sgd),
    "ef_signsgd": train(lambda comm: hpccomm.ef_signsgd(comm, 0.1)),
    "onebit_adam": train(lambda comm: hpccomm.onebit_adam(comm, 0.1, 1)),
    "onebit_lamb": train(lambda comm: hpccomm.onebit_lamb(comm, BUCKET, 0.1, 1)),
    "powersgd": train(lambda comm: hpccomm.powersgd(comm, BUCKET, 2)),
    "bmuf": train(lambda comm: hpccomm.bmuf(comm, SGD, 2)),
    "bmuf_adam": train(lambda comm: hpccomm.bmuf_adam(comm, 0.1, 2)),
    "hybrid": train(lambda comm: hpccomm.hybrid(comm, hpccomm.gtc, descend(0.1), period=2)),
    "local_sgd": train(lambda comm: hpccomm.local_sgd(comm, SGD, 2)),
    "post_local_sgd": train(lambda comm: hpccomm.post_local_sgd(comm, SGD, 2, 1)),
    "slowmo": train(lambda comm: hpccomm.slowmo(comm, SGD, 0.1, 2)),
    "diloco": train(lambda comm: hpccomm.diloco(comm, SGD, 2)),
    "mics": shard(hpccomm.mics),
    "zero": shard(hpccomm.zero),
    "data_parallel": shard(hpccomm.data_parallel),
    "ParameterServer": serve,
    "save_set": save,
    "load_set": save,
}
"""Public functions that take a communicator, and what each does on one."""

PATHS = ("auto", "allgather", "node", "split", "recursive_doubling", "ok_topk", "leaders", "dense")


def takes_communicator(name: str) -> bool:
    """Whether a public function or class has an argument ``comm``."""
    try:
        return "comm" in inspect.signature(getattr(hpccomm, name)).parameters
    except ValueError:
        return False


def test_the_table_has_every_public_function_with_a_communicator() -> None:
    other = {"Communicator", "Transform"}  # the class itself, and the pair whose functions hold communicators already
    assert {name for name in hpccomm.__all__ if takes_communicator(name)} - other == set(TABLE)


@pytest.fixture
def native(comm: Any) -> Iterator[Any]:
    """The same ranks as mpi4py's own class."""
    made = MPI.Intracomm(comm).Dup()
    assert type(made) is MPI.Intracomm
    yield made
    made.Free()


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("name", TABLE)
def test_a_communicator_of_mpi4py_gives_what_ours_gives(comm: Any, native: Any, name: str) -> None:
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    assert np.array_equal(TABLE[name](native, folder), TABLE[name](comm, folder))
    comm.Barrier()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_an_exchange_takes_one(comm: Any, native: Any, path: str) -> None:
    found, wanted = (
        train(lambda each: hpccomm.feedback(topk(0.5), each, exchange=path))(on, Path()) for on in (native, comm)
    )
    assert np.array_equal(found, wanted)


ALL_RANKS = {"allreduce", "reduce_scatter", "allgather", "broadcast", "BucketedExchange"}
"""Functions for which None means all ranks."""


@pytest.mark.parametrize("name", TABLE)
def test_anything_else_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    for wrong in (3, MPI.COMM_NULL, *([] if name in ALL_RANKS else [None])):
        with pytest.raises(ArgumentError, match=r"is no communicator: pass|pass an MPI.Intracomm"):
            TABLE[name](wrong, tmp_path)
