"""``hpccomm warm``: compile the functions of shared memory for this machine, so that programs start at once.

One process a core compiles; what is there already stays.  Programs on other processors need their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hpccomm.commands.progress import show_progress
from hpccomm.errors import HpccommError
from hpccomm.kernels import objects

SUMMARY = "compile the functions of shared memory, so that programs start at once"
MAX_PROCESSES = 16
LOWEST_PRIORITY = 19


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--quiet", action="store_true", help="print nothing where all went well")
    parser.add_argument("--background", action="store_true", help="use one core, and only while nothing else does")


def run(args: argparse.Namespace) -> int:
    """Compile what is missing and say where it is."""
    began, names, folder = time.monotonic(), objects.missing(), objects.writable_folder()
    if names and folder is None:
        raise HpccommError("no folder can be written to: set HPCCOMM_CACHE to one that can")
    if args.background:
        os.nice(LOWEST_PRIORITY)
        compile_alone(names, folder)
    else:
        compile_in_processes(names, quiet=args.quiet)
    if not args.quiet:
        print(f"compiled {len(names)} functions in {time.monotonic() - began:.0f} s: {objects.describe()}")
    return 0


def compile_alone(names: list[str], folder: Path | None) -> None:
    """Compile one after the other; leave it to another process that does so already."""
    with objects.lock(folder, "background", wait=False) as mine:
        for name in names if mine else []:
            objects.address(name)


def compile_in_processes(names: list[str], *, quiet: bool = False) -> None:
    """Compile in one process a core, the longest first."""
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES, len(names))
    if not processes:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(objects.address, name) for name in names]
        for future in futures if quiet else show_progress(futures, "hpccomm warm", "function"):
            future.result()
