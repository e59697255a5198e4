"""The parameters of a model as one float32 vector, on which hpccomm's methods work, and the communicator of a group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.buckets import Bucket
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError
from hpccomm.functional import communicator as world_communicator
from hpccomm.torch.group import Group

Vector = npt.NDArray[np.float32]


def communicator(group: Any = None) -> Communicator:
    """The communicator of a process group of hpccomm, by default of the default group; without one, of all ranks.

    That of a group is another one than that of its calls, so the first use is collective.  A communicator of mpi4py
    becomes ours, as in :func:`hpccomm.allreduce`.
    """
    if isinstance(group, MPI.Intracomm):
        return world_communicator(group)
    if group is None and not dist.is_initialized():
        return world_communicator(None)
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, Group):
        raise ArgumentError(f"{found!r} is not a group of hpccomm: make it with backend='hpccomm'")
    return found.methods_comm()


class ParameterVector:
    """Named parameters as one float32 vector, one after the other."""

    def __init__(self, parameters: Mapping[str, Any], exempt: Iterable[str] | None = None) -> None:
        self.parameters = dict(parameters)
        for name, each in self.parameters.items():
            check_parameter(name, each)
        shapes = {name: tuple(each.shape) for name, each in self.parameters.items()}
        self.bucket = Bucket(shapes, np.float32, None if exempt is None else list(exempt))

    def empty(self) -> Vector:
        """A new vector."""
        return np.empty(self.bucket.size, np.float32)

    def views(self, vector: Vector) -> dict[str, Any]:
        """Each parameter's place in a vector, as a tensor on the same memory."""
        return {name: torch.from_numpy(part) for name, part in self.bucket.views(vector).items()}

    def weights(self) -> Vector:
        """A copy of the weights."""
        vector = self.empty()
        for name, part in self.views(vector).items():
            part.copy_(self.parameters[name].detach())
        return vector

    def gradients(self) -> Vector:
        """A copy of the gradients; zeros where there is none."""
        vector = self.empty()
        for name, part in self.views(vector).items():
            gradient = self.parameters[name].grad
            if gradient is None:
                part.zero_()
            else:
                part.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        return vector

    def set_weights(self, vector: Vector) -> None:
        """Copy a vector into the weights."""
        for name, part in self.views(np.ascontiguousarray(vector, np.float32)).items():
            self.parameters[name].detach().copy_(part)

    def set_gradients(self, vector: Vector) -> None:
        """Copy a vector into the gradients of all parameters that have one, or are to have one."""
        for name, part in self.views(np.ascontiguousarray(vector, np.float32)).items():
            parameter = self.parameters[name]
            if parameter.grad is None:
                parameter.grad = part.to(parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(part)


def check_parameter(name: str, parameter: Any) -> None:
    """Raise for parameters of which this rank holds a part, and for those that are no real floats."""
    if hasattr(parameter, "full_tensor"):
        raise ArgumentError(f"the parameter {name} is sharded: use hpccomm.torch.second_hop, or an unsharded model")
    if not parameter.dtype.is_floating_point:
        raise ArgumentError(f"the parameter {name} is {parameter.dtype}: pass parameters of floating point")


def name_parameters(parameters: Any) -> dict[str, Any]:
    """The parameters of an optimizer's argument by name: pairs keep theirs, others are numbered."""
    found: dict[str, Any] = {}
    for number, each in enumerate(parameters):
        name, parameter = each if isinstance(each, tuple) else (str(number), each)
        found[name] = parameter
    return found


def name_groups(optimizer: Any) -> dict[str, Any]:
    """All parameters of an optimizer by name: the group's number, and the name or number in it."""
    found: dict[str, Any] = {}
    for k, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or range(len(group["params"]))
        found |= {f"{k}.{name}": each for name, each in zip(names, group["params"], strict=True)}
    return found


def to_tensors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a state, whose arrays become tensors on the same memory."""
    return {path: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf for path, leaf in leaves.items()}


def from_tensors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a state, whose tensors become arrays."""
    return {path: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in leaves.items()}
