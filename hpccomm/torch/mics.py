"""MiCS under FSDP2: the model is sharded inside a group of ranks, and a second hop averages over the groups.

``fully_shard`` on a one-dimensional mesh reduces and scatters the gradients inside the group; before the optimizer sees
a shard, FSDP2 calls a hook with it, and the hook exchanges it with the ranks of the other groups that hold the same
shard.  With torch's own HSDP, a two-dimensional mesh, the hook would come after the dense all-reduce.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hpccomm.algorithms import checkpoints
from hpccomm.algorithms.agreement import check_same_tensors
from hpccomm.algorithms.bucketed import Make, make_method
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.torch.parameters import communicator, from_tensors, to_tensors


class SecondHop:
    """What :func:`second_hop` returns: the state of each sharded module, for checkpoints and for reports."""

    def __init__(self, comm: Any, make: Make) -> None:
        self.comm, self.make = comm, make
        self.methods: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self._saved: dict[str, Any] = {}

    def exchange(self, name: str, shard: Any) -> None:
        """Exchange the gradient of one module's shard, in place."""
        vector = shard.detach().to("cpu", torch.float32).reshape(-1).numpy()
        if name not in self.methods:
            self._start(name, vector)
        step, self.states[name] = self.methods[name].update(vector, self.states[name], vector)
        shard.detach().copy_(torch.from_numpy(np.ascontiguousarray(step, np.float32)).view(shard.shape))

    def _start(self, name: str, vector: Any) -> None:
        self.methods[name] = make_method(self.make, self.comm, Bucket({"shard": vector.shape}, np.float32))
        self.states[name] = self.methods[name].init(vector)
        if name in self._saved:
            saved = from_tensors(self._saved.pop(name))
            self.states[name] = checkpoints.load_state_dict(self.states[name], saved)

    def state_dict(self) -> dict[str, Any]:
        """The state of every module's shard on this rank, loaded states that no step has taken yet included."""
        stepped = {name: to_tensors(checkpoints.state_dict(each)) for name, each in self.states.items()}
        return {**self._saved, **stepped}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit; each module takes its own at its next step."""
        self._saved = dict(saved)
        self.methods.clear()
        self.states.clear()


def second_hop(model: Any, comm: Any, make: Make) -> SecondHop:
    """Average the gradients of a model of ``fully_shard`` between the groups, densely or by a compressed exchange.

    ``model`` was sharded on a one-dimensional mesh of one group's ranks; ``comm`` holds the ranks that have the same
    shard in all groups: a process group of hpccomm or a communicator.  ``make(comm)`` makes the exchange:
    ``hpccomm.mean``, ``hpccomm.gtc``, ``lambda comm: hpccomm.feedback(hpccomm.qsgd(), comm)``.  The state belongs to
    the shards, module by module.  Needs torch 2.7 or newer.
    """
    from torch.distributed.fsdp import FSDPModule

    modules = {name: each for name, each in model.named_modules() if isinstance(each, FSDPModule)}
    if not modules:
        raise ArgumentError("second_hop: the model has no module of fully_shard: call fully_shard(model, mesh=…) first")
    hop = SecondHop(communicator(comm), make)
    check_same_tensors(hop.comm, "second_hop", [repr(name) for name in modules], "shard the same modules on all ranks")
    for name, each in modules.items():
        each.set_all_reduce_hook(make_hook(hop, name))
    return hop


def make_hook(hop: SecondHop, name: str) -> Any:
    """The hook of one module."""
    return lambda shard: hop.exchange(name, shard)
