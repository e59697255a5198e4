"""The measurement over slow links: an exchange without messages does the same work; the break-even density."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hpccomm
from benchmarks.slow_links import PATH_METHODS, Echo, break_even_density, leader_exchange, path_table
from hpccomm.algorithms.error_feedback import feedback
from hpccomm.collectives.compressed.onebit import onebit_allreduce, server_elements
from hpccomm.collectives.compressed.sparse import sparse_allreduce
from hpccomm.testing.ranks import run_on_ranks

F32 = np.float32
N = 64


def gradient() -> np.ndarray:
    return np.random.default_rng(3).integers(-9, 10, N).astype(F32)


def run_topk(comm: Any) -> np.ndarray:
    method = feedback(hpccomm.topk(0.2, exact=True), comm, 0.5)
    state, total = method.init(gradient()), np.zeros(N, F32)
    for _ in range(3):
        step, state = method.update(gradient(), state, gradient())
        total += step
    return total


def run_onebit(comm: Any) -> np.ndarray:
    worker, server = np.zeros(N, F32), np.zeros(server_elements(N, comm.rank, comm.size), F32)
    return onebit_allreduce(comm, np.ones(N, F32) * np.tile([1, -1], N // 2).astype(F32), worker, server).mean


def run_sparse(comm: Any) -> np.ndarray:
    index = np.arange(0, N, 3, dtype=np.uint32)
    return sparse_allreduce(comm, index, gradient()[index], N, algorithm="allgather").total


@pytest.mark.parametrize("exchange", [run_topk, run_onebit, run_sparse])
def test_an_echo_gives_the_result_of_ranks_with_equal_gradients(exchange: Any) -> None:
    expected = run_on_ranks(4, exchange)
    assert expected[0].any()
    assert np.array_equal(exchange(Echo(1, 4)), expected[1])


def test_an_echo_replaces_the_other_nodes_of_a_two_level_exchange() -> None:
    def exchange(comm: Any) -> Any:
        method = leader_exchange(lambda nodes, total: lambda: sparse_sum(nodes, total))
        real = method(comm, gradient())()
        half = SimpleNamespace(intra_node=comm.intra_node, inter_node=Echo(0, 3))
        return real, method(half, gradient())()

    def sparse_sum(nodes: Any, total: np.ndarray) -> np.ndarray:
        index = np.flatnonzero(total).astype(np.uint32)
        return sparse_allreduce(nodes, index, total[index], N, algorithm="allgather").total

    for real, echoed in run_on_ranks(6, exchange, nodes=[0, 0, 1, 1, 2, 2]):
        assert np.array_equal(real, 6 * gradient())
        assert np.array_equal(echoed, real)


@pytest.mark.parametrize("name", PATH_METHODS)
def test_flat_and_node_aware_messages_are_measured_beside_each_other(name: str) -> None:
    def exchange(comm: Any) -> Any:
        return PATH_METHODS[name](comm, gradient() + 1)()

    found = run_on_ranks(4, exchange, nodes=[0, 0, 1, 1])
    assert all(np.array_equal(each, found[0]) for each in found)


def test_ratios_of_paths_are_taken_round_by_round() -> None:
    seconds = {name: [1.0, 2.0] for name in PATH_METHODS} | {"int8": [0.25, 0.25], "GTC 0.1 %, node": [0.5, 0.5]}
    line = path_table([{"rate": "100mbit", "shape": (4, 2), "seconds": seconds}]).splitlines()[2]
    assert line.startswith("| 100mbit | 4 x 2 | 64 | ")
    assert line.endswith("| **0.19** (0.12–0.25) | **1.00** (1.00–1.00) | **3.00** (2.00–4.00) |")


def test_the_break_even_density_is_interpolated_on_logarithmic_scales() -> None:
    assert break_even_density({d: 4 * d for d in (0.01, 0.1, 0.9)}) == pytest.approx(0.25)
    assert break_even_density({0.1: 1.0, 0.2: 2.0}) == 0.1
    assert math.isnan(break_even_density({0.1: 0.2, 0.2: 0.3}))
