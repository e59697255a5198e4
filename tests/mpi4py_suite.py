"""mpi4py's own tests of blocking, non-blocking and persistent collectives, run with ``COMM`` set to our communicator.

Usage: ``hpccomm-run -n 3 tests/mpi4py_suite.py FOLDER [algorithm …]``, where FOLDER contains mpi4py's tests.
``scripts/test_mpi4py`` downloads that folder and runs this script on several numbers of ranks.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from collections.abc import Iterator
from typing import Any

from mpi4py import MPI

from hpccomm import Communicator
from hpccomm.collectives import ALGORITHMS

MODULES = [f"test_cco_{kind}{form}" for kind in ("", "nb_", "pr_") for form in ("buf", "vec")]
"""Blocking, non-blocking and persistent."""


def import_host_arrays() -> None:
    """Import mpi4py's array implementations without those that need a device."""
    hidden = {name: sys.modules.pop(name, None) for name in ("numba", "cupy")}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    importlib.import_module("arrayimpl")
    for name, module in hidden.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


def cases(world: Communicator, alone: Communicator) -> Iterator[Any]:
    """Every test class that runs on the world or on a single rank."""
    for name in MODULES:
        for label, each in vars(importlib.import_module(name)).items():
            if isinstance(each, type) and issubclass(each, unittest.TestCase) and label.endswith(("World", "Self")):
                each.COMM = world if label.endswith("World") else alone
                yield each


def run(algorithm: str) -> bool:
    """Run all test classes with one algorithm; return whether they passed on every rank."""
    world, alone = Communicator(MPI.COMM_WORLD, algorithm), Communicator(MPI.COMM_SELF, algorithm)
    load = unittest.TestLoader().loadTestsFromTestCase
    suite = unittest.TestSuite(load(case) for case in cases(world, alone))
    with open(os.devnull, "w") as devnull:
        result = unittest.TextTestRunner(stream=devnull).run(suite)
    failures = [f"{test}: {text}" for test, text in result.failures + result.errors]
    gathered = MPI.COMM_WORLD.gather((result.testsRun, len(result.skipped), failures))
    for rank, (count, skipped, texts) in enumerate(gathered or []):
        if rank == 0 or texts:
            passed = count - len(texts) - skipped
            print(f"{algorithm:>13}, rank {rank} of {world.size}: {passed} passed, {len(texts)} failed")
        for text in texts[:3]:
            print(text)
    sys.stdout.flush()
    return not MPI.COMM_WORLD.allreduce(len(failures))


def main() -> int:
    """Run the suite with the given algorithms, or with all."""
    folder, *wanted = sys.argv[1:]
    sys.path.insert(0, folder)
    import_host_arrays()
    every = dict.fromkeys(name for row in ALGORITHMS.values() for name in row)
    return 0 if all([run(name) for name in wanted or ["auto", "native", "shared", "hierarchical", *every]]) else 1


if __name__ == "__main__":
    sys.exit(main())
