"""``hpccomm warm``: compile the functions of shared memory and probe the machine, so that programs start at once.

One process a core compiles; what is there already stays.  Programs on other processors need their own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

from hpccomm.commands.progress import show_progress
from hpccomm.errors import HpccommError
from hpccomm.kernels import objects
from hpccomm.performance import probe

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
        prepare_alone(names, folder)
        return 0
    compile_in_processes(names, quiet=args.quiet)
    found, idle = probe.ensure(os.sched_getaffinity(0))
    if not args.quiet:
        print(f"compiled {len(names)} functions in {time.monotonic() - began:.0f} s: {objects.describe()}")
        print(f"machine: {describe_probe(found, idle)}")
    return 0


def describe_probe(found: probe.Found, idle: bool) -> str:
    """In words, where the probe is, or why there is none."""
    if found.probe is None:
        return found.trouble
    if not idle:
        return "probed, but busy, so the figures are not kept: repeat `hpccomm warm` when it is idle"
    return f"{found.probe.cpu}, probe in {found.path}" if found.path else "probed, but no folder can be written to"


LOOPS = ("selection", "quantized", "signs", "index_codes", "vectors")
"""The families of loops of compressed gradients, which Numba keeps."""


def compile_loops(family: str) -> int:
    """Compile the loops of a family, or find them compiled; returns their number."""
    from hpccomm.kernels.compiler import machine_code

    module = import_module(f"hpccomm.kernels.{family}.loops")
    found = [
        each for each in vars(module).values() if hasattr(each, "signature") and each.__module__ == module.__name__
    ]
    for each in found:
        machine_code(each)
    return len(found)


def prepare_alone(names: list[str], folder: Path | None) -> None:
    """Compile one after the other, then probe; leave it to another process that does so already."""
    with objects.lock(folder, "background", wait=False) as mine:
        if mine:
            for name in names:
                objects.address(name)
            probe.ensure(os.sched_getaffinity(0))


def compile_in_processes(names: list[str], *, quiet: bool = False) -> None:
    """Compile the loops of gradient compression and then the functions, the longest first, in one process a core."""
    processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES, len(names))
    if not processes:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        loops = [pool.submit(compile_loops, family) for family in LOOPS]
        futures: list[Future[int]] = [pool.submit(objects.address, name) for name in names]
        for future in futures if quiet else show_progress(futures, "hpccomm warm", "function"):
            future.result()
        for future in loops:
            future.result()
