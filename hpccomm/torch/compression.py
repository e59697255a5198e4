"""Compressed gradients under DDP: exchanged in buckets while the backward pass goes on, by any method of hpccomm.

DDP hands over its buckets one by one, and divides the parameters over other buckets after the first step.  So the
exchanges have buckets of their own (:class:`~hpccomm.BucketedExchange`), which follow from the order of the parameters
in the model; their state belongs to the parameters.  A bucket of DDP is complete when all of its parameters are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpccomm.algorithms import checkpoints, states
from hpccomm.algorithms.bucketed import BucketedExchange, BucketInFlight, Make
from hpccomm.errors import ArgumentError
from hpccomm.torch.parameters import check_parameter, communicator, from_tensors, to_tensors


class DdpBucket:
    """A bucket of DDP whose future is not set: its buffer, its gradients by name, and the names that are missing."""

    def __init__(self, buffer: Any, gradients: dict[str, Any]) -> None:
        self.buffer, self.gradients = buffer, gradients
        self.missing, self.future = set(gradients), torch.futures.Future()


class Compression:
    """What :func:`compress` returns: the method's state, for checkpoints (torch's ``Stateful``) and for reports."""

    def __init__(self, ddp: Any, make: Make, bucket_bytes: int) -> None:
        self.comm = communicator(ddp.process_group)
        self._parameters = {
            name: each
            for name, each in ddp.module.named_parameters()
            if each.requires_grad and name not in ddp.parameters_to_ignore
        }
        for name, each in self._parameters.items():
            check_parameter(name, each)
        self._weights = weights_apart(self._parameters)
        self.exchange = BucketedExchange(self.comm, self._weights, make, bucket_bytes, self._deliver)
        self._names = {id(each): name for name, each in self._parameters.items()}
        self._waiting: list[DdpBucket] = []

    @property
    def state(self) -> tuple[Any, ...]:
        """The states of all buckets, for :func:`hpccomm.report`."""
        return self.exchange.state

    def hook(self, state: Any, bucket: Any) -> Any:
        """DDP's communication hook: a future of the bucket's new gradients."""
        self._end_step()
        names = [self._names[id(each)] for each in bucket.parameters()]
        given = DdpBucket(bucket.buffer(), dict(zip(names, bucket.gradients(), strict=True)))
        self._waiting.append(given)
        for name in names:
            if self._weights[name].data_ptr() != self._parameters[name].data_ptr():
                self._weights[name].copy_(self._parameters[name].detach())
        self.exchange.add({name: as_float32(each) for name, each in given.gradients.items()})
        return given.future.then(self._check)

    def _end_step(self) -> None:
        """Make the exchange ready for the next step where all gradients of one have been handed over."""
        if not self._waiting and all(each.begun for each in self.exchange.buckets):
            self.exchange.finish()

    def _deliver(self, bucket: BucketInFlight) -> None:
        """Hand DDP the gradients of a bucket of ours, in the progress thread; after a failure complete all futures."""
        failed = self.exchange.failure
        for given in list(self._waiting):
            for name in given.missing & bucket.weights.keys():
                if self.exchange.skips or self.exchange.skips_here:
                    given.gradients[name].fill_(torch.nan)  # as in DDP's own mean: GradScaler then skips the step
                elif not failed:
                    given.gradients[name].copy_(bucket.step[name])
                given.missing.discard(name)
            if failed or not given.missing:
                self._waiting.remove(given)
                given.future.set_result(given.buffer)

    def _check(self, future: Any) -> Any:
        """The gradients; raises where the exchange has failed."""
        if self.exchange.failure:
            raise self.exchange.failure
        return future.value()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state under a name of its own: every rank has another one, and all belong in a checkpoint.

        Collective, between steps; it holds the states of the parameters, whatever the size of the buckets.
        """
        self._end_step()
        state = self.exchange.collect_state()
        return {rank_name(self.comm.rank, self.comm.size): to_tensors(checkpoints.state_dict(state))}

    def load_state_dict(self, saved: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit with buckets of the same size (collective).

        ``saved`` may also be a list of what all ranks returned, or these dicts in one (:meth:`merge`).  Another number
        of ranks needs those of all old ranks: what they have not sent is divided anew (:func:`hpccomm.for_ranks`).
        """
        self._end_step()
        saved = saved if isinstance(saved, Mapping) else self.merge(saved)
        name, like = rank_name(self.comm.rank, self.comm.size), self.exchange.collect_state()
        if name in saved:
            self.exchange.restore_state(checkpoints.load_state_dict(like, from_tensors(saved[name])))
            return
        size = len(saved)
        names = [rank_name(rank, size) for rank in range(size)]
        if set(names) != set(saved):
            raise ArgumentError(
                f"load_state_dict: the state of {name} is not among {', '.join(sorted(saved)) or 'none'}: pass this "
                "rank's state dict, or a list of those of all ranks of the run that saved"
            )
        olds = [checkpoints.load_state_dict(like, from_tensors(saved[each]), other_ranks=True) for each in names]
        self.exchange.restore_state(states.for_ranks(olds, self.comm.rank, self.comm.size, like))

    @staticmethod
    def merge(dicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state dicts of several ranks in one."""
        return {name: each for saved in dicts for name, each in saved.items()}


def rank_name(rank: int, size: int) -> str:
    """The name of a rank's state."""
    return f"rank {rank} of {size}"


def compress(ddp: Any, method: Make, bucket_bytes: int | None = None) -> Compression:
    """Let ``DistributedDataParallel`` exchange its gradients by a method of hpccomm instead of a dense mean.

    ``ddp`` is a model wrapped on a group of hpccomm.  ``method(comm)``, or ``method(comm, bucket)`` for methods that
    treat tensors one by one, makes a transform that exchanges gradients: ``hpccomm.gtc``, ``hpccomm.dgc``,
    ``hpccomm.onebit_sgd``, ``hpccomm.powersgd``, ``lambda comm: hpccomm.feedback(hpccomm.qsgd(), comm)``; all are
    float32.  Call it once, on all ranks, before the first step.  A progress thread exchanges each bucket of up to
    ``bucket_bytes``, by default DDP's ``bucket_cap_mb``, while the backward pass goes on; where no thread may call MPI,
    the backward pass waits.  DGC's step has the momentum in it: use it with ``torch.optim.SGD(momentum=0)``.
    """
    if not isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"compress: {type(ddp).__name__} is no DistributedDataParallel: wrap the model first")
    made = Compression(ddp, method, ddp.bucket_bytes_cap if bucket_bytes is None else bucket_bytes)
    ddp.register_comm_hook(None, make_hook(made))
    return made


def make_hook(compression: Compression) -> Any:
    """The hook as DDP wants it: a function whose second parameter is named ``bucket``, with types."""

    def hook(state: Any, bucket: Any) -> Any:
        return compression.hook(state, bucket)

    hook.__annotations__ = {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]}
    return hook


def as_float32(tensor: Any) -> Any:
    """A tensor in float32 on the host, the same memory where it is that already."""
    return tensor.detach().to("cpu", torch.float32)


def weights_apart(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in float32; a second one on the same memory, whose gradient DDP keeps apart, is copied."""
    found: dict[str, Any] = {}
    places: set[int] = set()
    for name, each in parameters.items():
        weights = as_float32(each)
        found[name] = weights.clone() if weights.data_ptr() in places else weights
        places.add(weights.data_ptr())
    return found
