"""What a user may pass in: any array on the host is read as NumPy, and results go back as what came in.

======================================  ======================================================================
NumPy array, NumPy or Python scalar     as it is; a scalar comes back as a scalar of its type
PyTorch tensor on the CPU               read under ``detach``: the result carries no gradient history
JAX array, anything with DLPack         through DLPack, given back by its own ``asarray``
array on a CUDA device                  where it lies (:func:`read_device`), brought through the host by the collectives
list, tuple                             refused: mpi4py's own ``allreduce`` would concatenate lists
======================================  ======================================================================

Dtypes: bool, integers, floats, complex, float16 and bfloat16 (``ml_dtypes.bfloat16`` in NumPy).  The two
16-bit floats are reduced in float32: every element is widened before the first addition, and the complete
result is rounded once, to nearest even (overflow to infinity).  MPI itself adds float16 in float16, and
mpi4py passes bfloat16 as plain bytes.
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
"""DLPack's numbers of memory that the host may read: the host's own, and what CUDA or ROCm pinned there."""

REMEDIES = {
    "O": "give it a numeric dtype: x.astype('f8')",
    "U": "send text with the lower-case comm.bcast, or encode it as numbers",
    "S": "send text with the lower-case comm.bcast, or view it as x.view('u1')",
    "V": "pass one field at a time",
    "M": "view it as integers: x.view('i8')",
    "m": "view it as integers: x.view('i8')",
}


def borrow(x: Any, who: str = "hpccomm") -> tuple[Array, Converter]:
    """A NumPy view of ``x``, and the function that turns a result into the caller's kind.

    The view may be read-only and of any strides: read it, never write it.  ``who`` begins every error.
    Raises :class:`~hpccomm.errors.ArgumentError` for what cannot be read, with what to do instead.
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
    """NumPy in, NumPy out."""
    return result


def check_array(x: Array, who: str) -> Array:
    """A NumPy array whose elements MPI can move and reduce."""
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentError(f"{who}: a masked array would lose its mask: pass x.filled(value)")
    dtype = x.dtype
    if dtype.kind not in "biufc" and not is_bfloat16(dtype):
        remedy = "cast it to float32" if is_registered(dtype) else REMEDIES[dtype.kind]
        raise ArgumentError(f"{who}: an array of {dtype} cannot be exchanged: {remedy}")
    if not dtype.isnative:
        raise ArgumentError(
            f"{who}: {dtype.str} has another byte order than this machine: pass x.astype(x.dtype.newbyteorder('='))"
        )
    return np.asarray(x)


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether this is ``ml_dtypes.bfloat16``."""
    return dtype.name == "bfloat16"


def is_registered(dtype: np.dtype[Any]) -> bool:
    """Whether another package added this dtype to NumPy, as ml_dtypes does with its narrow floats."""
    return dtype.isbuiltin == 2


# Precision


def reduction_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to reduce in: float32 for the 16-bit floats, itself for all others."""
    return np.dtype(np.float32) if dtype == np.float16 or is_bfloat16(dtype) else dtype


def widen(x: Array) -> Array:
    """``x`` in C order and in the dtype to reduce in; ``x`` itself where it is so already.  Also on a device."""
    if is_on_device(x):
        return x.astype(reduction_dtype(x.dtype), order="C", copy=False)
    return np.asarray(x, dtype=reduction_dtype(x.dtype), order="C")


def narrow(x: Array, dtype: np.dtype[Any]) -> Array:
    """``x`` rounded to ``dtype``; ``x`` itself where it has that dtype."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


def view_for_mpi(x: Array) -> Array:
    """A C-ordered array seen as elements that every MPI has a datatype for."""
    return x.view(np.uint16) if reduction_dtype(x.dtype) != x.dtype else x


# Scalars and the other libraries


def read_scalar(x: Any, who: str) -> tuple[Array, Converter]:
    """A scalar as an array of shape ``()``; Python's integers are int64."""
    try:
        array = np.array(x, dtype=np.int64 if type(x) is int else None)
    except OverflowError:
        raise ArgumentError(f"{who}: {x} does not fit into 64 bits: pass float({x})") from None
    if isinstance(x, np.generic):
        return check_array(array, who), lambda result: result[()]
    return array, lambda result: result.item() if result.ndim == 0 else result


def refuse_device(x: Any, who: str) -> None:
    """Raise for an array whose memory the host cannot read."""
    if is_on_device(x):
        raise ArgumentError(
            f"{who}: this {type(x).__name__} lies on a device: copy it to the host first, "
            "with x.cpu() (PyTorch), x.get() (CuPy) or np.asarray(x) (JAX)"
        )


def dlpack_device(x: Any) -> int:
    """DLPack's number of the kind of memory; the host's for what does not say."""
    try:
        return int(x.__dlpack_device__()[0])
    except Exception:  # objects without it, and tensors without memory: reading them says what is wrong
        return HOST_DEVICES[0]


# Devices

DEFAULT_STREAM = 1
"""CUDA's handle of the stream of those who name none."""


class DeviceArray(NamedTuple):
    """An array on a CUDA device: where it lies, and what has to be waited for before it is read or written."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: str
    writable: bool
    streams: tuple[int, ...]
    """Handles of the streams that work on it."""
    owner: Any

    @property
    def size(self) -> int:
        """How many elements there are."""
        return int(np.prod(self.shape, dtype=np.int64))


def is_on_device(x: Any) -> bool:
    """Whether this is an array whose memory the host cannot read."""
    if x is None or isinstance(x, np.ndarray | np.generic | int | float | list | tuple):
        return False
    try:
        return hasattr(x, "__cuda_array_interface__") or dlpack_device(x) not in HOST_DEVICES
    except RuntimeError:  # a JAX array whose memory was given away
        return True


def to_host(x: Any) -> Array:
    """An array on the host; one that lies there already is not copied.  The stream that wrote it is waited for."""
    if not is_on_device(x):
        return x  # type: ignore[no-any-return]
    copy: Array = x.get() if hasattr(x, "get") else x.detach().cpu().numpy()
    return copy


def to_device_like(x: Any, like: Any) -> Any:
    """An array of the host where ``like`` lies, as one of its library (CuPy, PyTorch)."""
    if not is_on_device(like):
        return x
    library: Any = sys.modules[type(like).__module__.partition(".")[0]]
    if hasattr(library, "as_tensor"):
        return library.as_tensor(np.ascontiguousarray(x), device=like.device)
    return library.asarray(x)


def read_device(x: Any, who: str, stream: Any = None) -> DeviceArray:
    """An array on a CUDA device, as it lies there; ``stream`` is one that works on it, if it does not tell itself.

    A stream is CUDA's handle, or CuPy's or PyTorch's object.  PyTorch's current stream is always waited for, too.
    Raises :class:`~hpccomm.errors.ArgumentError` for what cannot be read.
    """
    try:
        known, dtype = interface_of(x, who)
    except (AttributeError, RuntimeError, TypeError, ValueError, BufferError, ImportError) as error:
        raise ArgumentError(
            f"{who}: {type(x).__name__} cannot be read as an array on a CUDA device "
            f"({str(error).partition(chr(10))[0]}): pass a dense array that was not freed, of a dtype that MPI knows"
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
    """CUDA's array interface, and the dtype, which the interface cannot say of bfloat16."""
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
    """``"C"``, ``"F"``, or nothing for an array that is not contiguous."""
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
    """CUDA's handle of a stream."""
    for name in ("ptr", "cuda_stream"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    return int(stream)


def current_torch_stream(x: Any) -> Any:
    """The stream that PyTorch works on now, for its tensors."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return None
    return torch.cuda.current_stream(x.device)


def convert_like(made: Any, x: Any) -> Any:
    """An array on a device as one of the library that ``x`` belongs to."""
    if type(made) is type(x):
        return made
    library = namespace(x)
    return getattr(library, "from_dlpack", library.asarray)(made)


def read_torch(x: Any, torch: Any, who: str) -> Array:
    """A strided tensor on the CPU, without its gradient history."""
    try:
        data = x.detach().resolve_conj().resolve_neg()
        if data.dtype == torch.bfloat16:
            return data.view(torch.int16).numpy().view(bfloat16(who))
        return check_array(data.numpy(), who)
    except (TypeError, RuntimeError) as error:
        raise read_error(x, error, who) from None


def to_torch(result: Array) -> Any:
    """A tensor on the memory of ``result``."""
    torch = sys.modules["torch"]
    if is_bfloat16(result.dtype):
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def bfloat16(who: str) -> np.dtype[Any]:
    """NumPy's bfloat16."""
    try:
        import ml_dtypes
    except ImportError:
        raise ArgumentError(f"{who}: bfloat16 needs a package: pip install ml_dtypes") from None
    return np.dtype(ml_dtypes.bfloat16)


def read_dlpack(x: Any, who: str) -> tuple[Array, Converter]:
    """An array of any other library on the host."""
    if not hasattr(x, "__dlpack__"):
        raise ArgumentError(f"{who}: {type(x).__name__} is not an array: pass np.asarray(x)")
    library = namespace(x)
    back = getattr(library, "asarray", None) or getattr(library, "from_dlpack", None)
    if back is None:
        raise ArgumentError(f"{who}: no way back to {type(x).__name__}: pass np.from_dlpack(x)")
    try:
        return check_array(host_view(x), who), back
    except (TypeError, RuntimeError, BufferError) as error:
        raise read_error(x, error, who) from None


def namespace(x: Any) -> ModuleType | Any:
    """The library that an array belongs to."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules.get(type(x).__module__.partition(".")[0])


def host_view(x: Any) -> Array:
    """Through DLPack; NumPy's DLPack knows no bfloat16, ``__array__`` does."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        if not hasattr(x, "__array__"):
            raise
        return np.asarray(x)


def read_error(x: Any, error: Exception, who: str) -> ArgumentError:
    """The error for a tensor that does not give its memory away."""
    reason = str(error).partition("\n")[0]
    return ArgumentError(
        f"{who}: {type(x).__name__} cannot be read as an array ({reason}): pass a dense copy on the host"
    )
