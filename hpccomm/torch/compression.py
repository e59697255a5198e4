"""Compressed gradients under DDP: one exchange a step over all parameters, by any exchanging method of hpccomm.

DDP hands over its buckets one by one, and divides the parameters over other buckets after the first step.  So a state
belongs to the parameters, in the order of the model: the gradients are collected in one vector, exchanged when the last
bucket has come, and copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hpccomm.algorithms import checkpoints, states
from hpccomm.errors import ArgumentError
from hpccomm.torch.parameters import (
    Make,
    ParameterVector,
    communicator,
    from_tensors,
    make_method,
    to_tensors,
)


class Compression:
    """What :func:`compress` returns: the method's state, for checkpoints (torch's ``Stateful``) and for reports."""

    def __init__(self, ddp: Any, make: Make) -> None:
        self.comm = communicator(ddp.process_group)
        named = {name: each for name, each in ddp.module.named_parameters() if each.requires_grad}
        self.vector = ParameterVector(named)
        self.method = make_method(make, self.comm, self.vector.bucket)
        self.state = self.method.init(self.vector.weights())
        self._names = {id(each): name for name, each in named.items()}
        self._gradient = np.zeros(self.vector.bucket.size, np.float32)
        self._places = self.vector.views(self._gradient)
        self._waiting: list[tuple[Any, Any, Any]] = []

    def hook(self, state: Any, bucket: Any) -> Any:
        """DDP's communication hook: a future of the bucket's new gradients."""
        future = torch.futures.Future()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self._places[self._names[id(parameter)]].copy_(gradient)
        self._waiting.append((bucket.buffer(), list(zip(bucket.parameters(), bucket.gradients(), strict=True)), future))
        if bucket.is_last():
            self._exchange()
        return future

    def _exchange(self) -> None:
        """Exchange all gradients, and hand every bucket its own."""
        waiting, self._waiting = self._waiting, []
        step, self.state = self.method.update(self._gradient, self.state, self._gradient)
        means = self.vector.views(np.ascontiguousarray(step, np.float32))
        for buffer, pairs, future in waiting:
            for parameter, gradient in pairs:
                gradient.copy_(means[self._names[id(parameter)]])
            future.set_result(buffer)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state under a name of its own: every rank has another one, and all belong in a checkpoint."""
        return {rank_name(self.comm.rank, self.comm.size): to_tensors(checkpoints.state_dict(self.state))}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit.

        ``saved`` may also hold the states of all ranks of another number of ranks (:meth:`merge` their dicts): what
        they have not sent is divided anew (:func:`hpccomm.for_ranks`).
        """
        name = rank_name(self.comm.rank, self.comm.size)
        if name in saved:
            self.state = checkpoints.load_state_dict(self.state, from_tensors(saved[name]))
            return
        size = len(saved)
        names = [rank_name(rank, size) for rank in range(size)]
        if set(names) != set(saved):
            raise ArgumentError(
                f"load_state_dict: the state of {name} is not among {', '.join(sorted(saved)) or 'none'}: pass this "
                "rank's state, or those of all ranks of the run that saved"
            )
        olds = [checkpoints.load_state_dict(self.state, from_tensors(saved[each])) for each in names]
        self.state = states.for_ranks(olds, self.comm.rank, self.comm.size)

    @staticmethod
    def merge(dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state dicts of several ranks in one."""
        return {name: each for saved in dicts for name, each in saved.items()}


def rank_name(rank: int, size: int) -> str:
    """The name of a rank's state."""
    return f"rank {rank} of {size}"


def compress(ddp: Any, method: Make) -> Compression:
    """Let ``DistributedDataParallel`` exchange its gradients by a method of hpccomm instead of a dense mean.

    ``ddp`` is a model wrapped on a group of hpccomm.  ``method(comm)``, or ``method(comm, bucket)`` for methods that
    treat tensors one by one, makes a transform that exchanges gradients: ``hpccomm.gtc``, ``hpccomm.dgc``,
    ``hpccomm.onebit_sgd``, ``hpccomm.powersgd``, ``lambda comm: hpccomm.feedback(hpccomm.qsgd(), comm)``; all are
    float32.  Call it once, before the first step.  Gradients are exchanged when the backward pass is complete.  DGC's
    step has the momentum in it: use it with ``torch.optim.SGD(momentum=0)``.
    """
    if not isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"compress: {type(ddp).__name__} is no DistributedDataParallel: wrap the model first")
    made = Compression(ddp, method)
    ddp.register_comm_hook(None, make_hook(made))
    return made


def make_hook(compression: Compression) -> Any:
    """The hook as DDP wants it: a function whose second parameter is named ``bucket``, with types."""

    def hook(state: Any, bucket: Any) -> Any:
        return compression.hook(state, bucket)

    hook.__annotations__ = {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]}
    return hook
