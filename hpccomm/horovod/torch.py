"""Horovod's functions for PyTorch, on a communicator of all ranks that MPI's launcher has started.

::

    import hpccomm.horovod.torch as hvd                # was: import horovod.torch as hvd

    hvd.init()
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

Unlike Horovod's, calls are not negotiated: all ranks make the same calls in the same order, and a mistake names the
ranks.  The gradients of a step travel in one message when ``step`` is called.  A rank that calls :func:`join` takes
part in the steps of the others with zeros.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from hpccomm import functional, progress
from hpccomm.algorithms.agreement import check_same_tensors
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError
from hpccomm.observe.flight_recorder import count_bytes
from hpccomm.torch.wrapper import OptimizerWrapper

Average, Sum, Adasum, Min, Max, Product = "mean", "sum", "adasum", "min", "max", "prod"
"""Operations of :func:`allreduce`; Adasum is refused."""

_made: dict[str, Communicator] = {}


def init(comm: Any = None) -> None:
    """Make the communicator: of all ranks, or of those of ``comm`` (collective)."""
    if "world" not in _made:
        _made["world"] = Communicator(MPI.Intracomm(MPI.COMM_WORLD if comm is None else comm).Dup())


def is_initialized() -> bool:
    """Whether :func:`init` was called."""
    return "world" in _made


def shutdown() -> None:
    """Free the communicator (collective)."""
    if _made:
        _made.pop("world").Free()


def world() -> Communicator:
    """The communicator."""
    if "world" not in _made:
        raise ArgumentError("Horovod has not been initialized: call hvd.init() first")
    return _made["world"]


def size() -> int:
    """The number of ranks."""
    return world().size


def rank() -> int:
    """This rank."""
    return world().rank


def local_size() -> int:
    """The number of ranks on this node."""
    return world().intra_node.size


def local_rank() -> int:
    """The number of this rank on its node."""
    return world().intra_node.rank


def cross_size() -> int:
    """The number of ranks with this local rank."""
    return world().inter_node.size


def cross_rank() -> int:
    """The number of this rank's node among them."""
    return world().inter_node.rank


def mpi_threads_supported() -> bool:
    """Whether several threads may call MPI at once."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def mpi_built() -> bool:
    """Whether calls go through MPI, as they do."""
    return True


mpi_enabled = mpi_built


def nccl_built() -> bool:
    """Whether calls go through another library, as none does."""
    return False


gloo_built = gloo_enabled = cuda_built = rocm_built = ddl_built = ccl_built = nccl_built


# Collectives


class NoCompression:
    """Gradients travel as they are."""

    dtype = None


class HalfCompression:
    """Gradients of 32 and 64 bits travel as float16, and are added in float32."""

    dtype = torch.float16


class Compression:
    """The compressions of Horovod; hpccomm's own are those of :func:`hpccomm.torch.compress`."""

    none = NoCompression
    fp16 = HalfCompression


def resolve(average: bool | None, op: str | None) -> str:
    """The operation of Horovod's two arguments."""
    if op is None:
        return Sum if average is False else Average
    if average is not None:
        raise ArgumentError("allreduce: pass op or average, not both")
    if op == Adasum:
        raise ArgumentError("allreduce: Adasum is not implemented: use op=hvd.Average")
    return op


def pack(tensor: Any, compression: Any) -> Any:
    """The tensor as it travels."""
    wide = compression.dtype is not None and tensor.is_floating_point() and tensor.element_size() > 2
    return tensor.detach().to(compression.dtype) if wide else tensor.detach()


def allreduce(
    tensor: Any,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Any:
    """The reduction of a tensor over the ranks, by default the mean."""
    return synchronize(allreduce_async(tensor, average, name, op, prescale_factor, postscale_factor, compression))


def allreduce_(tensor: Any, average: bool | None = None, name: str | None = None, op: str | None = None) -> Any:
    """:func:`allreduce` in place."""
    return synchronize(allreduce_async_(tensor, average, name, op))


def allreduce_async(
    tensor: Any,
    average: bool | None = None,
    name: str | None = None,
    op: str | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    compression: Any = Compression.none,
) -> Handle:
    """:func:`allreduce` beside the program; returns a handle for :func:`poll` and :func:`synchronize`."""
    meaning = resolve(average, op)

    def body(comm: Communicator) -> Any:
        given = pack(tensor, compression)
        given = given * prescale_factor if prescale_factor != 1.0 else given
        total = functional.allreduce(given, meaning, comm).to(tensor.dtype)
        return total * postscale_factor if postscale_factor != 1.0 else total

    return Handle(body, f"allreduce({name})" if name else "allreduce", tensor)


def allreduce_async_(
    tensor: Any, average: bool | None = None, name: str | None = None, op: str | None = None
) -> Handle:
    """:func:`allreduce_` beside the program."""
    meaning = resolve(average, op)

    def body(comm: Communicator) -> Any:
        tensor.detach().copy_(functional.allreduce(tensor.detach(), meaning, comm))
        return tensor

    return Handle(body, f"allreduce({name})" if name else "allreduce", tensor)


def allreduce_group(tensors: Iterable[Any], average: bool | None = None, op: str | None = None) -> list[Any]:
    """The reductions of several tensors."""
    return [allreduce(each, average, op=op) for each in tensors]


grouped_allreduce = allreduce_group
"""Horovod's name."""


def allgather(tensor: Any, name: str | None = None) -> Any:
    """The tensors of all ranks one after the other along their first dimension, in which they may differ."""
    return synchronize(allgather_async(tensor, name))


def allgather_async(tensor: Any, name: str | None = None) -> Handle:
    """:func:`allgather` beside the program."""
    return Handle(lambda comm: functional.allgather(tensor.detach(), comm), f"allgather({name or ''})", tensor)


def broadcast(tensor: Any, root_rank: int, name: str | None = None) -> Any:
    """A copy of the root's tensor."""
    return synchronize(broadcast_async(tensor, root_rank, name))


def broadcast_async(tensor: Any, root_rank: int, name: str | None = None) -> Handle:
    """:func:`broadcast` beside the program."""
    return Handle(
        lambda comm: functional.broadcast(tensor.detach(), root_rank, comm), f"broadcast({name or ''})", tensor
    )


def broadcast_(tensor: Any, root_rank: int, name: str | None = None) -> Any:
    """The root's tensor, in place."""
    return synchronize(broadcast_async_(tensor, root_rank, name))


def broadcast_async_(tensor: Any, root_rank: int, name: str | None = None) -> Handle:
    """:func:`broadcast_` beside the program."""

    def body(comm: Communicator) -> Any:
        tensor.detach().copy_(functional.broadcast(tensor.detach(), root_rank, comm))
        return tensor

    return Handle(body, f"broadcast({name or ''})", tensor)


def broadcast_object(obj: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The root's object, pickled."""
    return pickle.loads(world().private_comm.bcast(pickle.dumps(obj) if rank() == root_rank else None, root_rank))


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """The objects of all ranks, pickled."""
    return list(world().private_comm.allgather(obj))


def barrier() -> None:
    """Wait for all ranks."""
    world().Barrier()


class Handle:
    """A call under way."""

    def __init__(self, body: Callable[[Communicator], Any], text: str, tensor: Any) -> None:
        self.call = progress.submit(world(), body, text, nbytes=count_bytes((tensor,)))


def poll(handle: Handle) -> bool:
    """Whether a call is complete."""
    return handle.call.done()


def synchronize(handle: Handle) -> Any:
    """Wait for a call; its result, or its error."""
    return handle.call.wait()


# Training


def broadcast_parameters(params: Any, root_rank: int) -> None:
    """Copy the root's tensors: of a state dict, or of pairs of name and tensor."""
    pairs = sorted(params.items()) if isinstance(params, Mapping) else list(params)
    tensors = [(name, each) for name, each in pairs if isinstance(each, torch.Tensor)]
    check_same_tensors(world(), "broadcast_parameters", rows_of(tensors))
    for _, each in tensors:
        broadcast_(each, root_rank)


def broadcast_optimizer_state(optimizer: Any, root_rank: int) -> None:
    """Copy the root's state of an optimizer of torch, and the options of its groups."""
    own = getattr(optimizer, "optimizer", optimizer)
    state = broadcast_object(own.state_dict() if rank() == root_rank else None, root_rank)
    if rank() != root_rank:
        own.load_state_dict(state)


def rows_of(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """Named tensors as rows for :func:`~hpccomm.algorithms.agreement.check_same_tensors`."""
    return [f"{name!r} {str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for name, each in tensors]


ACTIVE, JOINED = 1, 0


class DistributedOptimizer(OptimizerWrapper):
    """An optimizer of torch that averages the gradients over the ranks in ``step``.

    ``backward_passes_per_step`` backward passes add up to one step; their gradients are divided by that number if
    ``op`` is Average.  ``compression=Compression.fp16`` halves the bytes; ``gradient_predivide_factor`` divides before
    the sum, which may overflow in 16 bits, and multiplies after it.  All gradients must have one dtype.
    """

    def __init__(
        self,
        optimizer: Any,
        named_parameters: Iterable[tuple[str, Any]] | None = None,
        compression: Any = Compression.none,
        backward_passes_per_step: int = 1,
        op: str = Average,
        gradient_predivide_factor: float = 1.0,
    ) -> None:
        resolve(None, op)
        if gradient_predivide_factor != 1.0 and op != Average:
            raise ArgumentError(f"DistributedOptimizer: gradient_predivide_factor with op={op!r}: use op=hvd.Average")
        super().__init__(optimizer)
        self._compression, self._op = compression, op
        self._passes, self._before = backward_passes_per_step, gradient_predivide_factor
        names = {id(each): name for name, each in named_parameters or ()}
        self._parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
        unknown = [each for each in self._parameters if names and id(each) not in names]
        if unknown:
            raise ArgumentError(
                f"DistributedOptimizer: {len(unknown)} parameters of the optimizer are not among named_parameters: "
                "pass model.named_parameters()"
            )
        self._rows = rows_of((names.get(id(each), str(k)), each) for k, each in enumerate(self._parameters))
        self._compared = self._synchronized = False
        _optimizers.append(self)

    def synchronize(self) -> None:
        """Average the gradients now, for example to clip them before ``step`` (collective)."""
        count_active(ACTIVE)
        self.exchange(joined=False)
        self._synchronized = True

    def exchange(self, joined: bool) -> None:
        """Average all gradients in one message; a rank that has joined adds zeros."""
        if not self._compared:
            check_same_tensors(world(), "DistributedOptimizer", self._rows, "make the model and the optimizer alike")
            self._compared = True
        parts = [self._part(each, joined) for each in self._parameters]
        if not parts:
            return
        row = pack(torch.cat(parts).div_(self._before), self._compression)
        total = functional.allreduce(row, "sum", world()).to(parts[0].dtype)
        if self._op == Average:
            total /= world().size * self._passes / self._before
        if joined:
            return
        for each, part in zip(self._parameters, total.split([part.numel() for part in parts]), strict=True):
            each.grad = part.view(each.shape) if each.grad is None else each.grad.copy_(part.view(each.shape))

    def _part(self, parameter: Any, joined: bool) -> Any:
        gradient = None if joined else parameter.grad
        if gradient is None:
            return torch.zeros(parameter.numel(), dtype=parameter.dtype)
        return (gradient.to_dense() if gradient.is_sparse else gradient).detach().reshape(-1)

    def skip_synchronize(self) -> Any:
        """A context in which ``step`` does not average, after :meth:`synchronize`."""
        return SkipSynchronize(self)

    def step(self, closure: Any = None) -> Any:
        """Average the gradients, unless :meth:`synchronize` has, and step (collective)."""
        if not self._synchronized:
            self.synchronize()
        self._synchronized = False
        return self.optimizer.step(closure)


class SkipSynchronize:
    """What :meth:`DistributedOptimizer.skip_synchronize` returns."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer

    def __enter__(self) -> None:
        self._optimizer._synchronized = True

    def __exit__(self, *error: object) -> None:
        self._optimizer._synchronized = False


_optimizers: list[DistributedOptimizer] = []
"""The optimizers of this process; a rank that has joined takes part in the steps of the last one."""


def count_active(mine: int) -> tuple[int, int]:
    """How many ranks still train, and the highest rank that does, or -1 (collective)."""
    flags = np.empty(world().size, np.int64)
    world().Allgather(np.array([mine], np.int64), flags)
    active = np.flatnonzero(flags)
    return len(active), int(active[-1]) if len(active) else -1


def join() -> int:
    """Call it when this rank has no more batches: it adds zeros to the steps of the others until all ranks have joined.

    Returns the rank that joined last, the highest of those that did at the same time (collective).
    """
    last = rank()
    while True:
        active, highest = count_active(JOINED)
        if not active:
            return int(functional.allreduce(np.array([last]), "max", world())[0])
        last = highest
        if _optimizers:
            _optimizers[-1].exchange(joined=True)
