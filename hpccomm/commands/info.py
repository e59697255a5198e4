"""``hpccomm info``: the MPI, the launcher, where the ranks are, what is in force and why."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

from hpccomm.launcher import read_launch_size

SUMMARY = "what was found here, what is in force, and why"

EXAMPLES = (4, 1024, 65536, 1 << 20, 16 << 20, 256 << 20)
"""Bytes whose decisions are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--collective", default="allreduce", help="whose decisions to show (allreduce)")


def run(args: argparse.Namespace) -> int:
    """Print from rank 0 (collective)."""
    from mpi4py import MPI

    import hpccomm

    comm = hpccomm.Communicator(MPI.COMM_WORLD)
    sections = {
        "Software": software(),
        "Launch": launch(comm),
        "Ways to move bytes": transports(comm),
        "GPU": gpu(comm),
        "Settings": settings(comm),
        f"Decisions for {args.collective} (float32)": decisions(comm, args.collective),
    }
    if comm.rank == 0:
        sys.stdout.write(render(sections))
        sys.stdout.flush()
    return 0


def render(sections: dict[str, dict[str, str]]) -> str:
    """Titles, and names beside values."""
    width = max(len(name) for rows in sections.values() for name in rows)
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]
    return "\n".join(lines)


def software() -> dict[str, str]:
    """Versions."""
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
    """An optional package's version."""
    from importlib import metadata

    for name in (package, f"{package}-cuda12x", f"{package}-cuda13x"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def launch(comm: Any) -> dict[str, str]:
    """Who started the ranks, and where they are."""
    _, launcher = read_launch_size(os.environ)
    cores = len(set().union(*comm.context.node.allgather(os.sched_getaffinity(0))))
    crowd = max(comm.layout.per_node)
    ranks = f"{cores} for the ranks of this node" + (
        " (fewer than ranks on the node: waiting yields)" if crowd > cores else ""
    )
    return {
        "started by": launcher or "no launcher (one rank)",
        "ranks": comm.layout.describe(),
        "cores": ranks,
        "threads a rank": os.environ.get("OMP_NUM_THREADS", "not set (OMP_NUM_THREADS)"),
    }


def transports(comm: Any) -> dict[str, str]:
    """What there is to carry bytes."""
    from hpccomm.layout import ethernets, fast_networks

    resources = comm.context
    links = ", ".join(ethernets()) or "none is up"
    where = "yes" if comm.layout.count == 1 else "inside the nodes, by the hierarchical algorithms"
    return {
        "messages": "point-to-point, digest of the call in the tag",
        "network": ", ".join(fast_networks()) or f"Ethernet ({links}): what is shipped for TCP counts",
        "shared memory": where if resources.node_memory else "no" if comm.size > 1 else "not needed (one rank)",
        "consistency table": "ranks of a node compare their calls" if resources.consistency else "off",
    }


def gpu(comm: Any) -> dict[str, str]:
    """The device, and which ways its arrays can go (collective)."""
    from hpccomm.errors import HpccommError
    from hpccomm.transports import cuda

    missing = [(rank, why) for rank, why in enumerate(comm.allgather(cuda.unavailable_reason())) if why]
    if missing:
        rank, why = missing[0]
        return {"device": f"none: {why}" if len(missing) == comm.size else f"none on rank {rank}: {why}"}
    device = cuda.device()
    rows = {"device": f"{device.name}, number {device.number} on rank {comm.rank}", "driver": device.driver}
    try:
        return rows | comm.device_transports()
    except HpccommError as error:
        return rows | {"ways": str(error)}


def settings(comm: Any) -> dict[str, str]:
    """The variables in force, rank 0's, and the table."""
    rows = {name: value or "not set" for name, value in comm.context.settings.items()}
    rows["HPCCOMM_STALL_SECONDS"] = os.environ.get("HPCCOMM_STALL_SECONDS", "not set (60)")
    rows["tuning table"] = comm.context.table.source
    return rows


def decisions(comm: Any, collective: str) -> dict[str, str]:
    """Which algorithm takes which size, and why."""
    rows = {}
    for nbytes in EXAMPLES:
        choice = comm.explain(collective, nbytes)
        rows[f"{nbytes} B"] = f"{choice.algorithm}: {choice.reason}"
    return rows
