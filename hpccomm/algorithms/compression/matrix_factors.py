"""The low-rank compressor: the vector as a matrix, sent as the product of two thin factors.

*r the rank.*  A message holds 4r(rows + columns) bytes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.compression.format import Compressor, Kind, Message, demand_finite, message_of
from hpccomm.algorithms.transforms import check_count, check_seed, require
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.vectors.reference import Vector, key_of, uniforms


def low_rank(rank: int, shape: tuple[int, int] | None = None, seed: int = 0) -> Compressor:
    """A matrix of rank ``rank``, close to the best approximation of the vector: PowerSGD (Vogels et al., NeurIPS 2019).

    The vector is seen as a matrix of ``shape``, by default nearly square and padded with zeros.  One power iteration
    starts from a factor that follows from ``seed``; the message holds the factors P̂ and Q = Mᵀ P̂.  The two-phase
    form, whose factors are averaged by ordinary allreduces, is :func:`hpccomm.algorithms.power_sgd.powersgd`.
    """
    name = f"low_rank({rank})"
    check_count(f"{name}: rank", rank, 1)
    check_seed(name, seed)
    fits = shape is None or (isinstance(shape, tuple | list) and len(shape) == 2)
    require(fits, f"{name}: shape is {shape!r}: pass (rows, columns), or None")

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        matrix = as_matrix(vector, shape, name)
        left = orthonormalise(matrix @ start_factor(matrix.shape[1], min(rank, *matrix.shape), seed))
        right = np.ascontiguousarray(matrix.T @ left)
        sizes = np.array([*matrix.shape, left.shape[1]], "<u8")
        return message_of(Kind.LOW_RANK, vector.size, [sizes, left, right])

    return Compressor(name, frozenset({Kind.LOW_RANK}), write)


def as_matrix(vector: Vector, shape: tuple[int, int] | None, name: str = "low_rank") -> npt.NDArray[np.float32]:
    """The vector in rows; by default nearly square, padded with zeros."""
    n = vector.size
    if shape is not None:
        if shape[0] * shape[1] != n or min(shape) < 0:
            raise ArgumentError(f"{name}: the shape {shape} does not hold {n} elements")
        return vector.reshape(shape)
    columns = math.isqrt(n - 1) + 1 if n else 0
    rows = -(-n // columns) if n else 0
    return np.pad(vector, (0, rows * columns - n)).reshape(rows, columns)


def start_factor(columns: int, rank: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """The initial Q, the same on all ranks: shape (columns, rank), uniform in [-1, 1)."""
    values = uniforms(key_of(seed, 0), columns * rank)
    return (2 * values - 1).reshape(columns, rank)


def orthonormalise(columns: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Gram-Schmidt in float64, twice; a column that is (nearly) a combination of those before becomes 0."""
    basis = columns.astype(np.float64)
    for j in range(basis.shape[1]):
        column = basis[:, j]
        before = math.sqrt(float(column @ column))
        for _ in range(2):
            column -= basis[:, :j] @ (basis[:, :j].T @ column)
        norm = math.sqrt(float(column @ column))
        basis[:, j] = column / norm if norm > 1e-6 * before else 0
    return basis.astype(np.float32)
