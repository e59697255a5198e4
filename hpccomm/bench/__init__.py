"""The measuring library: one loop, a table of benchmarks, the output tables of OSU and nccl-tests, and figures.

::

    from hpccomm.bench import Options, measure
    for row in measure(comm, "allreduce", [4096, 1 << 20], algorithms=("native", "auto"), options=Options(check=True)):
        print(row.bytes, row.algorithm, row.p50_us)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpccomm.bench.loop import Options, Row, measure

__all__ = ["Options", "Row", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hpccomm.bench' has no attribute {name!r}")
    from hpccomm.bench import loop  # starts MPI

    return getattr(loop, name)
