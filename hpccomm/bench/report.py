"""Results as one JSON object: the machine, the software, the command and the date, and the measured rows."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from hpccomm.performance.probe import processor_name

if TYPE_CHECKING:
    from hpccomm.bench.loop import Row


def describe(comm: Any, command: Sequence[str]) -> dict[str, Any]:
    """The machine, the software, the command and the date (collective where the layout is not known yet)."""
    from hpccomm.transports.mpi import mpi_name  # starts MPI

    return {
        "machine": {
            "hosts": list(comm.layout.names),
            "ranks": comm.layout.describe(),
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "mpi": mpi_name(),
        "versions": {"python": platform.python_version(), **versions("hpccomm", "mpi4py", "numpy", "numba")},
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def text(where: dict[str, Any], rows: Sequence[Row]) -> str:
    """The object as text, with one line for each row."""
    head = json.dumps(where, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row.record()) for row in rows)
    return f'{head},\n "rows": [\n{lines}\n ]\n}}\n'
