"""JAX: hpccomm's transforms in optax's chains, and an allreduce inside ``jit``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
import hpccomm.jax
from hpccomm.errors import ArgumentError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp: Any = pytest.importorskip("jax.numpy")

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3), timeout=200)


def params() -> dict[str, Any]:
    return {"layers": [{"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}], "scale": jnp.float32(2.0)}


def gradients(rank: int) -> dict[str, Any]:
    return jax.tree.map(lambda each: jnp.full(each.shape, rank + 1.0, each.dtype), params())


def test_a_mean_in_a_chain_of_optax(comm: MPI.Intracomm) -> None:
    ranks = hpccomm.Communicator(comm)
    chain = optax.chain(hpccomm.optax(hpccomm.mean(ranks)), optax.sgd(0.5))
    weights = params()
    state = chain.init(weights)
    for _ in range(2):
        updates, state = chain.update(gradients(comm.rank), state, weights)
        weights = optax.apply_updates(weights, updates)
    step = np.float32(comm.size + 1) / 2
    expected = jax.tree.map(lambda each: each - step, params())
    assert jax.tree.structure(weights) == jax.tree.structure(expected)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True))
    assert isinstance(weights["scale"], jax.Array)


@pytest.mark.parametrize("make", [lambda comm: hpccomm.gtc(comm, tau=0.5), hpccomm.onebit_sgd], ids=["gtc", "onebit"])
def test_compressed_exchanges_in_a_chain_of_optax(comm: MPI.Intracomm, make: Any) -> None:
    chain = optax.chain(hpccomm.optax(make(hpccomm.Communicator(comm))), optax.adam(0.1))
    weights = params()
    state = chain.init(weights)
    for _ in range(3):
        updates, state = chain.update(gradients(comm.rank), state, weights)
        weights = optax.apply_updates(weights, updates)
    flat = np.concatenate([np.ravel(each) for each in jax.tree.leaves(weights)])
    everyone = comm.allgather(flat)
    assert all(np.array_equal(each, flat) for each in everyone)
    assert float(weights["scale"]) < 2.0


def test_an_allreduce_inside_jit(comm: MPI.Intracomm) -> None:
    @jax.jit
    def step(tree: Any) -> Any:
        total = hpccomm.jax.allreduce(tree, "sum", comm)
        return jax.tree.map(lambda each: 2 * each, total)

    found = step(gradients(comm.rank))
    total = comm.size * (comm.size + 1)
    assert all(np.array_equal(each, np.full(each.shape, total, "f4")) for each in jax.tree.leaves(found))
    assert float(hpccomm.jax.allreduce(jnp.float32(comm.rank), "max", comm)) == comm.size - 1


def test_mistakes(comm: MPI.Intracomm) -> None:
    with pytest.raises(ArgumentError, match=r"pass hpccomm\.gtc"):
        hpccomm.optax(3)
    method = hpccomm.optax(hpccomm.mean(hpccomm.Communicator(comm)))
    state = method.init(params())
    with pytest.raises(ArgumentError, match="inside jit"):
        jax.jit(lambda tree: method.update(tree, state)[0])(gradients(0))
