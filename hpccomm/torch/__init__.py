"""PyTorch on hpccomm: a backend of ``torch.distributed``.

::

    torch.distributed.init_process_group("hpccomm")     # under hpccomm-run, mpirun or srun; nothing else to import

Importing this package imports neither torch nor MPI: every public name is imported when it is first used.
"""

from __future__ import annotations

from typing import Any

from hpccomm import import_name

_MODULES = {
    "options": "Options",
    "barrier": "monitored_barrier",
    "parameters": "communicator",
    "compression": "compress",
    "optimizers": "LAMB LARS OneBitAdam",
    "local_steps": "local",
    "mics": "second_hop",
}
"""Where the public names are defined, module by module."""

_HOME = {name: f"hpccomm.torch.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    return import_name(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
