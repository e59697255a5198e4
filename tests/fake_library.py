"""A fake of CuPy on host memory, which refuses NumPy arrays as CuPy does."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Array(NDArrayOperatorsMixin):
    """An array with NumPy's operators, views and methods; the host reads it by :meth:`get` only."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        known = dict(self.host.__array_interface__)
        strides = None if self.host.flags.c_contiguous else self.host.strides
        return {**{name: known[name] for name in ("shape", "typestr", "data")}, "version": 3, "strides": strides}

    def get(self) -> np.ndarray:
        return self.host.copy()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **named: Any) -> Any:
        assert method == "__call__"
        assert not any(isinstance(each, np.ndarray) and each.ndim for each in inputs), (
            "NumPy's array among the device's"
        )
        out = named.pop("out", None)
        into = {} if out is None else {"out": tuple(each.host for each in out)}
        result = ufunc(*map(to_numpy, inputs), **named, **into)
        return Array(np.asarray(result)) if out is None else out[0]

    def __array_function__(self, function: Any, types: Any, inputs: Any, named: Any) -> Any:
        if function is np.array_split:
            return [Array(each) for each in function(to_numpy(inputs[0]), *inputs[1:], **named)]
        assert function in AS_CUPY
        return from_numpy(function(*map(to_numpy, inputs), **named))

    def __getitem__(self, key: Any) -> Array:
        return Array(np.asarray(self.host[tuple(map(to_numpy, key)) if isinstance(key, tuple) else to_numpy(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[tuple(map(to_numpy, key)) if isinstance(key, tuple) else to_numpy(key)] = to_numpy(value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self.host, name)
        if not callable(found):
            return Array(found) if isinstance(found, np.ndarray) else found
        return lambda *given, **named: from_numpy(found(*map(to_numpy, given), **named))

    def __len__(self) -> int:
        return len(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __int__(self) -> int:
        return int(self.host)


AS_CUPY = (
    np.empty_like,
    np.zeros_like,
    np.ones_like,
    np.concatenate,
    np.where,
    np.repeat,
    np.may_share_memory,
    np.size,
)
"""NumPy's functions that dispatch CuPy's arrays to CuPy."""


def to_numpy(x: Any) -> Any:
    if isinstance(x, list):
        return [to_numpy(each) for each in x]
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"Unsupported type {type(x)}")
    return x.host if isinstance(x, Array) else x


def from_numpy(x: Any) -> Any:
    return Array(np.asarray(x)) if isinstance(x, np.ndarray | np.generic) else x


def asarray(x: Any, dtype: Any = None) -> Array:
    return x if isinstance(x, Array) else Array(np.array(x, dtype))


def add_at(x: Array, index: Array, values: Array) -> None:
    np.add.at(x.host, index.host, values.host)


add = SimpleNamespace(at=add_at)


def __getattr__(name: str) -> Any:
    function = getattr(np, name)

    def call(*given: Any, **named: Any) -> Any:
        return from_numpy(function(*map(to_numpy, given), **{key: to_numpy(each) for key, each in named.items()}))

    return call


LIBRARY: ModuleType = sys.modules[__name__]
