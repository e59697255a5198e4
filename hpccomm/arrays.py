"""Arrays of any library: an array on the host is read as a NumPy array, and results are converted back to its type.

======================================  ======================================================================
NumPy array, NumPy or Python scalar     read as it is; the result of a scalar is a scalar of its type
PyTorch tensor on the CPU               read under ``detach``: the result has no gradient history
JAX array, any array with DLPack        read through DLPack, converted back by its library's ``asarray``
array on a CUDA device                  described by :func:`read_device`; the device transports move it
list, tuple                             refused: mpi4py's own ``allreduce`` would concatenate lists
======================================  ======================================================================

Dtypes: bool, integers, floats, complex, float16 and bfloat16 (``ml_dtypes.bfloat16`` in NumPy).  The two 16-bit floats
travel in 16 bits and are added in float32 at every hop, each partial sum rounded to nearest even (overflow to
infinity): in shared memory once, by a ring p - 1 times.  Means are reduced in float32 and rounded once, after the
division.  MPI itself adds float16 in float16, and mpi4py moves bfloat16 as bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.errors import ArgumentError

Array = npt.NDArray[Any]
Converter = Callable[[Array], Any]

HOST_DEVICES = (1, 3, 11)
"""DLPack's device types that the host can read: host memory, and memory pinned by CUDA or ROCm."""

REMEDIES = {
    "O": "give it a numeric dtype: x.astype('f8')",
    "U": "send text with the lower-case comm.bcast, or encode it as numbers",
    "S": "send text with the lower-case comm.bcast, or view it as x.view('u1')",
    "V": "pass one field at a time",
    "M": "view it as integers: x.view('i8')",
    "m": "view it as integers: x.view('i8')",
}


def borrow(x: Any, who: str = "hpccomm") -> tuple[Array, Converter]:
    """A NumPy view of ``x``, and the function that converts a result to the type of ``x``.

    The view may be read-only and have any strides; it must not be written.  Every error begins with ``who``.
    Raises :class:`~hpccomm.errors.ArgumentError` with a remedy for arrays that cannot be read.
    """
    if isinstance(x, np.ndarray):
        return check_array(x, who), identity
    if isinstance(x, np.generic | bool | int | float | complex):
        return read_scalar(x, who)
    if isinstance(x, list | tuple):
        raise ArgumentError(f"{who}: a {type(x).__name__} is not an array: pass np.asarray(x)")
    refuse_device(x, who)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return read_torch(x, torch, who), to_torch
    return read_dlpack(x, who)


def identity(result: Array) -> Array:
    """The converter of NumPy arrays."""
    return result


def is_masked(x: Any) -> bool:
    """Whether an array has a mask; ``numpy.ma`` takes long to import, and who has such an array has imported it."""
    masked = sys.modules.get("numpy.ma")
    return isinstance(x, getattr(masked, "MaskedArray", ()))


def check_array(x: Array, who: str) -> Array:
    """A NumPy array; raises if MPI cannot move and reduce its elements."""
    if is_masked(x):
        raise ArgumentError(f"{who}: a masked array would lose its mask: pass x.filled(value)")
    dtype = x.dtype
    if dtype.kind not in "biufc" and not is_bfloat16(dtype):
        remedy = "cast it to float32" if is_registered(dtype) else REMEDIES[dtype.kind]
        raise ArgumentError(f"{who}: MPI cannot move an array of {dtype}: {remedy}")
    if not dtype.isnative:
        raise ArgumentError(
            f"{who}: {dtype.str} has another byte order than this machine: pass x.astype(x.dtype.newbyteorder('='))"
        )
    return np.asarray(x)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is ``ml_dtypes.bfloat16``."""
    return dtype.name == "bfloat16"


def is_registered(dtype: np.dtype[Any]) -> bool:
    """Whether another package registered this dtype with NumPy, as ml_dtypes does with its narrow floats."""
    return dtype.isbuiltin == 2


# Precision


def reduction_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the reduction: float32 for 16-bit floats, the same dtype for all others."""
    return np.dtype(np.float32) if dtype == np.float16 or is_bfloat16(dtype) else dtype


def widen(x: Array) -> Array:
    """``x`` in C order and in the dtype of its reduction, copied only if necessary; also on a device."""
    if is_on_device(x):
        return x.astype(reduction_dtype(x.dtype), order="C", copy=False)
    return np.asarray(x, dtype=reduction_dtype(x.dtype), order="C")


def narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """``x`` rounded to ``dtype``, copied only if necessary."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def view_for_mpi(x: Array) -> Array:
    """A view of a C-ordered array with a dtype that every MPI has: uint16 for 16-bit floats."""
    return x.view(np.uint16) if reduction_dtype(x.dtype) != x.dtype else x


# Scalars and the other libraries


def read_scalar(x: Any, who: str) -> tuple[Array, Converter]:
    """Read a scalar as an array of shape ``()``; Python integers as int64."""
    try:
        array = np.array(x, dtype=np.int64 if type(x) is int else None)
    except OverflowError:
        raise ArgumentError(f"{who}: {x} does not fit into 64 bits: pass float({x})") from None
    if isinstance(x, np.generic):
        return check_array(array, who), lambda result: result[()]
    return array, lambda result: result.item() if result.ndim == 0 else result


def refuse_device(x: Any, who: str) -> None:
    """Raise for an array on a device."""
    if is_on_device(x):
        raise ArgumentError(
            f"{who}: the {type(x).__name__} lies on a device: copy it to the host first, "
            "with x.cpu() (PyTorch), x.get() (CuPy) or np.asarray(x) (JAX)"
        )


def dlpack_device(x: Any) -> int:
    """DLPack's device type of an array; the host's for objects without one."""
    try:
        return int(x.__dlpack_device__()[0])
    except Exception:  # objects without the method, tensors without memory: reading them raises the right error
        return HOST_DEVICES[0]


# Devices

DEFAULT_STREAM = 1
"""CUDA's handle of the legacy default stream."""


class StreamBuffer:
    """An array, or a form of mpi4py, with pending work on a stream that the array does not declare."""

    def __init__(self, given: Any, stream: Any) -> None:
        self.buffer, self.stream = given, stream


def array_of(given: Any) -> Any:
    """The device array in a buffer or a form; ``None`` if there is none."""
    data = given.buffer if isinstance(given, StreamBuffer) else given
    data = data[0] if isinstance(data, list | tuple) and data else data
    return data if is_on_device(data) else None


class DeviceArray(NamedTuple):
    """An array on a CUDA device: its memory, and the streams to synchronise before it is read or written."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str
    writable: bool
    streams: tuple[int, ...]
    """Handles of the streams with pending work on it."""
    owner: Any

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def is_on_device(x: Any) -> bool:
    """Whether an array lies in memory that the host cannot read."""
    if x is None or isinstance(x, np.ndarray | np.generic | int | float | list | tuple):
        return False
    try:
        return hasattr(x, "__cuda_array_interface__") or dlpack_device(x) not in HOST_DEVICES
    except RuntimeError:  # a JAX array whose buffer was donated
        return True


def to_host(x: Any) -> Array:
    """An array on the host, copied only if necessary, after the stream that wrote it has been synchronised."""
    if not is_on_device(x):
        return x  # type: ignore[no-any-return]
    if hasattr(x, "get"):
        return x.get()  # type: ignore[no-any-return]
    return borrow(x.detach().cpu())[0] if hasattr(x, "cpu") else np.asarray(x)


def to_device_like(x: Any, like: Any) -> Any:
    """A host array as one of ``like``'s library (CuPy, PyTorch, JAX) on the device of ``like``."""
    if not is_on_device(like):
        return x
    if hasattr(like, "cpu"):
        return to_torch(np.asarray(x, order="C")).to(like.device)
    if hasattr(like, "sharding"):
        return sys.modules["jax"].device_put(np.asarray(x), like.sharding)
    return namespace(like).asarray(x)


def view_array(x: Any, who: str = "hpccomm") -> tuple[Any, Converter]:
    """``x`` as an array with NumPy's functions, and the function that converts such arrays to the library of ``x``.

    A NumPy view of an array on the host (:func:`borrow`), a CuPy view of one on a CUDA device; no element is copied.
    """
    if not is_on_device(x):
        return borrow(x, who)
    if hasattr(x, "__array_function__"):
        return x, identity
    import cupy

    library = namespace(x)
    return cupy.from_dlpack(x.detach() if hasattr(x, "detach") else x), library.from_dlpack


def library_of(array: Any) -> Any:
    """NumPy, or for an array that NumPy cannot read CuPy: the module that allocates arrays beside it."""
    return np if isinstance(array, np.ndarray) else namespace(array)


def read_device(x: Any, who: str, stream: Any = None) -> DeviceArray:
    """Describe an array on a CUDA device; ``stream`` has pending work on it that the array does not declare itself.

    A stream is a CUDA handle, or a stream object of CuPy or PyTorch.  PyTorch's current stream is always included.
    Raises :class:`~hpccomm.errors.ArgumentError` for arrays that cannot be read.
    """
    try:
        known, dtype = interface_of(x, who)
    except (AttributeError, RuntimeError, TypeError, ValueError, BufferError, ImportError) as error:
        raise ArgumentError(
            f"{who}: {type(x).__name__} cannot be read as an array on a CUDA device "
            f"({str(error).partition(chr(10))[0]}): pass a dense array that is alive, of a dtype that MPI knows"
        ) from None
    shape, (address, read_only) = tuple(known["shape"]), known["data"]
    order = memory_order(shape, known.get("strides"), dtype.itemsize)
    if not order:
        raise ArgumentError(
            f"{who}: the array is not contiguous (shape {shape}, strides {known['strides']}): "
            "pass cupy.ascontiguousarray(x) or x.contiguous()"
        )
    named = [handle_of(each) for each in (stream, known.get("stream"), current_torch_stream(x)) if each is not None]
    immutable = type(x).__module__.partition(".")[0] in ("jax", "jaxlib")
    streams = tuple(dict.fromkeys(named)) or (DEFAULT_STREAM,)
    return DeviceArray(int(address or 0), shape, dtype, order, not (read_only or immutable), streams, x)


def interface_of(x: Any, who: str) -> tuple[dict[str, Any], np.dtype[Any]]:
    """The CUDA array interface, and the dtype, which the interface cannot express for bfloat16."""
    brain = str(getattr(x, "dtype", "")).endswith("bfloat16")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        x = x.detach().view(torch.int16) if brain else x.detach()
    if hasattr(x, "block_until_ready"):
        x.block_until_ready()
    if not hasattr(x, "__cuda_array_interface__"):
        import cupy

        x = cupy.from_dlpack(x)
    known = x.__cuda_array_interface__
    return known, bfloat16(who) if brain else np.dtype(known["typestr"])


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> str:
    """``"C"``, ``"F"``, or an empty string for an array that is not contiguous."""
    if strides is None or 0 in shape:
        return "C"
    for order, axes in (("C", reversed(range(len(shape)))), ("F", iter(range(len(shape))))):
        step = itemsize
        for axis in axes:
            if shape[axis] != 1 and strides[axis] != step:
                break
            step *= shape[axis]
        else:
            return order
    return ""


def handle_of(stream: Any) -> int:
    """The CUDA handle of a stream object."""
    for name in ("ptr", "cuda_stream"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    return int(stream)


def current_torch_stream(x: Any) -> Any:
    """PyTorch's current stream for its tensors; ``None`` for other arrays."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    return torch.cuda.current_stream(x.device)


def convert_like(made: Any, x: Any) -> Any:
    """A device array converted to ``x``'s library."""
    if type(made) is type(x):
        return made
    library = namespace(x)
    return getattr(library, "from_dlpack", library.asarray)(made)


def read_torch(x: Any, torch: Any, who: str) -> Array:
    """Read a strided tensor on the CPU, without its gradient history."""
    try:
        data = x.detach().resolve_conj().resolve_neg()
        if data.dtype == torch.bfloat16:
            return data.view(torch.int16).numpy().view(bfloat16(who))
        return check_array(data.numpy(), who)
    except (TypeError, RuntimeError) as error:
        raise read_error(x, error, who) from None


def to_torch(result: Array) -> Any:
    """A tensor that shares the memory of ``result``."""
    torch = sys.modules["torch"]
    if is_bfloat16(result.dtype):
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def bfloat16(who: str) -> np.dtype[Any]:
    """The NumPy dtype of bfloat16."""
    try:
        import ml_dtypes
    except ImportError:
        raise ArgumentError(f"{who}: bfloat16 needs a package: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def read_dlpack(x: Any, who: str) -> tuple[Array, Converter]:
    """Read a host array of any other library."""
    if not hasattr(x, "__dlpack__"):
        raise ArgumentError(f"{who}: {type(x).__name__} is not an array: pass np.asarray(x)")
    library = namespace(x)
    back = getattr(library, "asarray", None) or getattr(library, "from_dlpack", None)
    if back is None:
        raise ArgumentError(f"{who}: a result cannot be converted back to {type(x).__name__}: pass np.from_dlpack(x)")
    try:
        return check_array(host_view(x), who), back
    except (TypeError, RuntimeError, BufferError) as error:
        raise read_error(x, error, who) from None


def namespace(x: Any) -> ModuleType | Any:
    """The library of an array."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules.get(type(x).__module__.partition(".")[0])


def host_view(x: Any) -> Array:
    """A NumPy view through DLPack, or by ``__array__``, which supports bfloat16 where NumPy's DLPack does not."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        if not hasattr(x, "__array__"):
            raise
        return np.asarray(x)


def read_error(x: Any, error: Exception, who: str) -> ArgumentError:
    """The error for a tensor that does not export its memory."""
    reason = str(error).partition("\n")[0]
    return ArgumentError(
        f"{who}: {type(x).__name__} cannot be read as an array ({reason}): pass a dense copy on the host"
    )
