"""What ``import torch`` runs: it makes the backend ``"hpccomm"`` and the rendezvous of MPI known to torch.

PyTorch loads the entry points of the group ``torch.backends``, so a program imports nothing of ours.  MPI is started
when a group is made, not before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from hpccomm import launcher

NAME = "hpccomm"
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
"""Environment variables without which ``env://`` cannot work; torchrun sets them."""

Handler = Callable[..., Iterator[tuple[Any, int, int]]]


def register() -> None:
    """Register the backend and the rendezvous ``mpi://``, which is also that of ``env://`` where MPI started us."""
    import torch.distributed as dist

    if not dist.is_available() or NAME in dist.Backend.backend_list:
        return
    # a str would be read as a list of characters
    dist.Backend.register_backend(NAME, make_group, extended_api=True, devices=["cpu", "cuda"])
    handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers  # type: ignore[attr-defined]
    handlers.setdefault("mpi", meet_through_mpi)
    handlers["env"] = prefer_mpi(handlers["env"])


def make_group(given: Any, options: Any = None) -> Any:
    """The process group for torch's description of it."""
    if not given.global_ranks_in_group:  # the default group
        from hpccomm.torch import placeholders

        placeholders.join(given.store, given.group_rank, given.group_size)
    from hpccomm.torch.group import make_group as make

    return make(given, options)


def prefer_mpi(native: Handler) -> Handler:
    """``env://`` that meets through MPI where an MPI launcher, and nothing else, says which ranks there are."""

    def meet(url: str, **named: Any) -> Iterator[tuple[Any, int, int]]:
        _, mpi_launcher = launcher.read_launch_size(os.environ)
        told = all(name in os.environ for name in TORCH_VARIABLES)
        return meet_through_mpi(url, **named) if mpi_launcher and not told else native(url, **named)

    return meet


def meet_through_mpi(
    url: str, timeout: timedelta = timedelta(minutes=30), **named: Any
) -> Iterator[tuple[Any, int, int]]:
    """A store, the rank and the number of ranks, for programs that MPI's launcher has started (collective)."""
    from hpccomm.torch.meeting import open_store

    yield open_store(timeout)
    raise RuntimeError("mpi:// meets once: call torch.distributed.destroy_process_group, then init_process_group")
