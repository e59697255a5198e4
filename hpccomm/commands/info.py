"""``hpccomm info``: software, launch, transports and devices found here, the settings, and the planner's decisions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

from hpccomm.launcher import read_launch_size
from hpccomm.performance.tuning import COLLECTIVES

EXAMPLES = (4, 1024, 65536, 1 << 20, 16 << 20, 256 << 20)
"""Sizes, in bytes, for which decisions are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--collective",
        default="allreduce",
        choices=COLLECTIVES,
        metavar="NAME",
        help=f"collective of the decisions: {', '.join(COLLECTIVES)} (default allreduce)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--live", action="store_true", help="show what running programs of yours have decided by trials"
    )


def run(args: argparse.Namespace) -> int:
    """Print from rank 0 (collective)."""
    if args.live:
        return show_live(args.json)
    from mpi4py import MPI

    import hpccomm

    given = dict(os.environ)
    os.environ["HPCCOMM_COMPILE"] = "wait"  # shows what programs get in the end, and starts no compiler
    comm = hpccomm.Communicator(MPI.COMM_WORLD)
    comm.context.prepare("hpccomm info")
    sections = {
        "Software": software(),
        "Launch": launch(comm),
        "Transports": transports(comm),
        "Machine": machine(comm),
        "GPU": gpu(comm),
        "Settings": settings(comm, given),
        f"Decisions for {args.collective} (float32)": decisions(comm, args.collective),
    }
    if comm.rank == 0:
        sys.stdout.write(json.dumps(sections, indent=1) + "\n" if args.json else render(sections))
        sys.stdout.flush()
    return 0


def show_live(as_json: bool = False) -> int:
    """Print what the programs of this user that run on this machine have decided by trials."""
    from hpccomm.backends.live import find_running

    found = find_running()
    if as_json:
        rows = [each._asdict() | {"decisions": [one._asdict() for one in each.decisions]} for each in found]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    sections = {
        f"{number}. {format_running(each)}": format_decisions(each.decisions) for number, each in enumerate(found, 1)
    }
    text = render(sections) if sections else "no program of yours uses shared memory on this machine\n"
    sys.stdout.write(text)
    return 0


def format_running(each: Any) -> str:
    """A communicator in words."""
    return f"Process {each.pid}: {each.facts['ranks']} ranks, parameters from {each.facts['parameters']['source']}"


def format_decisions(decisions: Any) -> dict[str, str]:
    """How slots are filled, by collective and size class."""
    return {
        f"{each.collective} from {each.first:,} bytes": (
            f"{each.way}; last trial {each.us_ordinary:g} us with ordinary stores, {each.us_nontemporal:g} us with "
            f"non-temporal ones; {each.decisions} trials, {each.changes} changes"
        )
        for each in decisions
    } or {"trials": "none has ended yet"}


def render(sections: dict[str, dict[str, str]]) -> str:
    """The sections as text: a title, then a name and a value on each line."""
    width = max((len(name) for rows in sections.values() for name in rows), default=0)
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join(lines)


def software() -> dict[str, str]:
    """The versions of the software."""
    import mpi4py
    import numpy as np
    from mpi4py import MPI

    import hpccomm

    return {
        "hpccomm": hpccomm.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "MPI": MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\x00 "),
        "MPI standard": ".".join(map(str, MPI.Get_version())),
        "mpi4py": mpi4py.__version__,
        "NumPy": np.__version__,
        "Numba": version_of("numba"),
        "CuPy": version_of("cupy"),
    }


def version_of(package: str) -> str:
    """The version of an optional package."""
    from hpccomm.bench.report import versions

    return next(iter(versions(package, f"{package}-cuda12x", f"{package}-cuda13x").values()), "not installed")


def launch(comm: Any) -> dict[str, str]:
    """The launcher, and where the ranks are (collective)."""
    _, launcher = read_launch_size(os.environ)
    cores = len(set().union(*comm.context.node.allgather(os.sched_getaffinity(0))))
    crowd = max(comm.layout.per_node)
    shared = " (fewer than ranks on a node: a waiting rank yields its core)" if crowd > cores else ""
    return {
        "started by": launcher or "none (one rank)",
        "ranks": comm.layout.describe(),
        "cores": f"{cores} for the ranks of this node{shared}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def transports(comm: Any) -> dict[str, str]:
    """The transports of messages and of shared memory."""
    from hpccomm.kernels import objects
    from hpccomm.layout import ethernets, fast_networks

    resources = comm.context
    links = ", ".join(ethernets()) or "no link is up"
    where = "in use" if comm.layout.count == 1 else "used inside nodes by the hierarchical algorithms"
    return {
        "messages": "MPI point-to-point, with the fingerprint of the call in the tag",
        "network": ", ".join(fast_networks()) or f"Ethernet ({links}); decisions come from measurements over TCP",
        "shared memory": where if resources.node_memory else "not used" if comm.size > 1 else "not needed (one rank)",
        "compiled functions": objects.describe(),
        "consistency table": "ranks of a node compare their calls"
        if resources.consistency
        else "off: calls are not compared",
    }


CACHES = {"l1": "L1", "l2": "L2", "l3": "last-level cache"}


def machine(comm: Any) -> dict[str, str]:
    """What was probed of the cores of rank 0's node, and how shared memory moves bytes there (collective)."""
    from hpccomm.performance import probe
    from hpccomm.performance.machine import DEFAULTS, NEVER

    cores = sorted(set().union(*comm.context.node.allgather(os.sched_getaffinity(0))))
    found, memory = probe.load(cores), comm.context.node_memory
    rows = {"processor": probe.processor_name(), "probe": str(found.path or found.trouble or UNPROBED)}
    if found.probe:
        rows |= format_probe(found.probe)
    if memory is None:
        return rows
    used = memory.parameters
    changed = {name: value for name, value in used._asdict().items() if value != getattr(DEFAULTS, name)}
    changed.pop("source", None)
    words = (
        ", ".join(f"{name}={'never' if value == NEVER else value}" for name, value in changed.items())
        or "those of the reference machine"
    )
    single_copy = "permitted between the ranks of this node" if memory.reaches else "refused by the system"
    barriers = "each rank polls all others" if memory.size <= used.flat_ranks else "along a tree"
    return rows | {"parameters": f"{words}; from {used.source}", "single-copy": single_copy, "barriers": barriers}


UNPROBED = "none yet: run `hpccomm warm` on an idle machine"


def format_probe(known: Any) -> dict[str, str]:
    """The figures of a probe, with their units; unknown ones are left out."""
    sizes = {title: getattr(known, name) >> 10 for name, title in CACHES.items()}
    caches = ", ".join(f"{title} {size} KB" for title, size in sizes.items() if size)
    times = [(known.line_ns, "near"), (known.far_line_ns, "far"), (known.poll_ns, "poll"), (known.yield_ns, "yield")]
    copies = [(known.l2_copy, "in L2"), (known.l3_copy, "in L3"), (known.memory_copy, "memory")]
    copies += [(known.memory_copy_nontemporal, "non-temporal"), (known.single_copy, "single-copy")]
    handed = [(known.handover, "ordinary stores"), (known.handover_nontemporal, "non-temporal stores")]
    rows = {
        "cores": f"{known.cores} in {known.cache_groups} cache groups; {caches or 'caches unknown'}",
        "line transfer": join_figures(times, "ns"),
        "copies by one core": join_figures(copies, "GB/s"),
        "additions": join_figures([(known.memory_add, "memory")], "GB/s of results"),
        "core to core": join_figures(handed, "GB/s each way"),
    }
    return {name: text for name, text in rows.items() if text}


def join_figures(figures: list[tuple[float, str]], unit: str) -> str:
    """The known ones of some figures in words."""
    return ", ".join(f"{value:g} {unit} ({title})" for value, title in figures if value)


def gpu(comm: Any) -> dict[str, str]:
    """The device, and the transports of its arrays (collective)."""
    from hpccomm.errors import HpccommError
    from hpccomm.transports import cuda

    missing = [(rank, why) for rank, why in enumerate(comm.private_comm.allgather(cuda.unavailable_reason())) if why]
    if missing:
        rank, why = missing[0]
        return {"device": f"none: {why}" if len(missing) == comm.size else f"none on rank {rank}: {why}"}
    device = cuda.device()
    rows = {"device": f"{device.name}, device {device.number} of rank {comm.rank}", "driver": device.driver}
    try:
        return rows | comm.device_transports()
    except HpccommError as error:
        return rows | {"ways": str(error)}


def settings(comm: Any, given: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of rank 0 as they were given, and the tuning table in use."""
    rows = {name: given.get(name) or "not set" for name in comm.context.settings}
    rows["HPCCOMM_STALL_SECONDS"] = given.get("HPCCOMM_STALL_SECONDS", "not set (default 60)")
    rows["HPCCOMM_EXCEPTHOOK"] = given.get("HPCCOMM_EXCEPTHOOK", "not set (default on)")
    rows["tuning table"] = comm.context.table.source
    return rows


def decisions(comm: Any, collective: str) -> dict[str, str]:
    """The algorithm for each size, and the reason."""
    rows = {}
    for nbytes in EXAMPLES:
        choice = comm.explain(collective, nbytes)
        rows[f"{nbytes:,} bytes"] = f"{choice.algorithm}: {choice.reason}"
    return rows
