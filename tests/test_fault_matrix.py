"""A rank that ends inside a collective ends the job, by a status that is not 0, and leaves no process and no memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_matrix import Cell, all_cells, run_cell

LIMIT = 20.0
"""Seconds from the fault to the end of a job on a loaded machine; quietly it is one."""

SAMPLE = (
    Cell("Allreduce", "shared", "kill", "inside", 3, 2),
    Cell("Bcast", "tree", "leave", "at", 3, 1),
    Cell("Scatterv", "native", "raise", "inside", 2, 1),
    Cell("sparse_allreduce", "auto", "exit", "inside", 2, 0),
    Cell("MiCS gather", "auto", "memory", "at", 2, 1),
    Cell("Allgather", "ring", "kill", "at", 4, 2, 2),
)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("cell", SAMPLE, ids=lambda each: f"{each.fault} {each.when} {each.collective}")
def test_a_fault_ends_the_job_and_leaves_nothing(cell: Cell) -> None:
    assert run_cell(cell, LIMIT).problem == ""


def test_the_matrix_has_every_fault_of_every_rank_in_every_collective() -> None:
    cells = all_cells((2, 3))
    assert set(SAMPLE[:-1]) <= set(cells)
    assert SAMPLE[-1] in all_cells((4,), 2)
    for ranks in (2, 3):
        ended = {(each.collective, each.path, each.victim) for each in cells if each.ranks == ranks}
        assert len(ended) == ranks * len({each[:2] for each in ended})
