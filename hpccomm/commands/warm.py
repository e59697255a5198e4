"""``hpccomm warm``: compile the functions of shared memory for this machine, so that programs start at once.

One process a core compiles; what is there already stays.  Programs on other processors need their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

from hpccomm.commands.verify import show_progress
from hpccomm.errors import HpccommError
from hpccomm.kernels import objects

SUMMARY = "compile the functions of shared memory, so that programs start at once"
MAX_PROCESSES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--quiet", action="store_true", help="print nothing where all went well")


def run(args: argparse.Namespace) -> int:
    """Compile what is missing and say where it is."""
    began, names = time.monotonic(), objects.missing()
    if names and objects.writable_folder() is None:
        raise HpccommError("no folder can be written to: set HPCCOMM_CACHE to one that can")
    compile_all(names)
    if not args.quiet:
        print(f"compiled {len(names)} functions in {time.monotonic() - began:.0f} s: {objects.describe()}")
    return 0


def compile_all(names: list[str]) -> None:
    """Compile in parallel, the longest first."""
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES, len(names))
    if not processes:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for future in show_progress([pool.submit(objects.address, name) for name in names], "compiling", "function"):
            future.result()
