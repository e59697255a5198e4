"""Rewrites of a call into others: derived datatypes become contiguous bytes, floats integers whose sums are exact."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.calls.blocks import EQUAL, find_blocks, total_bytes
from hpccomm.calls.buffers import Buffer, read, view_at
from hpccomm.calls.call import Call
from hpccomm.calls.reader import Reader
from hpccomm.kernels import reproducible
from hpccomm.kernels.reductions.reference import code_of, narrow, widen


def make_contiguous(call: Call, reader: Reader) -> Call:
    """The same call on contiguous memory, so that this rank runs the same algorithm as ranks that have it.

    An all-to-all in place sends from a copy.
    """
    form, comm = call.signature, reader.comm
    copies = call.in_place and form.send == form.recv == EQUAL
    if not (copies or any(each.opaque and each.raw is not None for each in (call.send, call.recv))):
        return call
    into = PackedBuffer(call.recv, comm, total_bytes(call.recv, form.recv, call.size))
    out = into
    if copies or not call.in_place:
        out = PackedBuffer(call.send, comm, total_bytes(call.send, form.send, call.size), copies)
    if call.gathers and out is not into:
        reader.check_own_block(out.buffer, find_blocks(into.buffer, form.recv, call.size, call.who), call.who)
    before = out.pack if call.here else None
    after = into.unpack if call.root != call.rank else None
    return replace(call, send=out.buffer, recv=into.buffer, before=before, after=after)


class PackedBuffer:
    """Data of any datatype in contiguous memory; contiguous data is itself, or with ``copy`` a copy."""

    pack: Any = None
    unpack: Any = None

    def __init__(self, data: Buffer, comm: MPI.Intracomm, nbytes: int, copy: bool = False) -> None:
        self.buffer = data
        if not (data.opaque or copy):
            return
        datatype = data.datatype or MPI.BYTE
        size, (_, extent) = datatype.Get_size(), datatype.Get_extent()
        if size == extent and datatype.is_predefined:
            whole = view_at(data.address, nbytes, np.dtype("u1"))
            octets = np.empty_like(whole) if copy else whole
            self.pack = partial(np.copyto, octets, whole) if copy else None
        else:
            octets = np.empty(nbytes, "u1")
            memory = MPI.memory.fromaddress(data.address, nbytes // max(1, size) * extent)
            self.pack = partial(datatype.Pack, memory, octets, 0, comm)
            self.unpack = partial(datatype.Unpack, octets, 0, memory, comm)
        self.buffer = read(octets.view(data.dtype or data.base or np.dtype("u1")), "")


class ExactSum:
    """Floats split into integers whose sum does not depend on order (:mod:`hpccomm.kernels.reproducible`)."""

    def __init__(self, buffer: Buffer) -> None:
        assert buffer.dtype is not None
        stored = buffer.vector()
        self._half = code_of(buffer.half) if buffer.half else ""
        if buffer.dtype.kind == "c":
            stored = stored.view(f"f{buffer.dtype.itemsize // 2}")
        self._stored = stored.view(buffer.half) if buffer.half == "float16" else stored
        self.elements = len(stored)
        self.exponents = np.empty(self.elements, np.int16)
        """The exponents, to be reduced by max."""
        self.parts = np.empty((reproducible.limbs("f2" if self._half else stored.dtype), self.elements), np.int64)
        """The integer parts, each to be summed."""
        self.totals = np.empty_like(self.parts)
        """Room for the sums of the parts."""
        self._name, self._order = f"{buffer.kind} reproducibly", buffer.order

    def as_buffer(self, array: npt.NDArray[Any]) -> Buffer:
        """An array of exponents or parts as the buffer of a call."""
        return replace(read(array, ""), order=self._order, element_name=self._name)

    def _values(self) -> npt.NDArray[np.float64]:
        wide = widen(self._stored, self._half) if self._half else self._stored
        return wide.astype(np.float64)

    def find_exponents(self) -> None:
        """Compute this rank's exponents."""
        self.exponents[...] = reproducible.exponents(self._values())

    def split(self) -> None:
        """Split this rank's values by the common exponents."""
        self.parts[...] = reproducible.split(self._values(), self.exponents, len(self.parts))

    def store(self, exponents: npt.NDArray[np.int16]) -> None:
        """Join the sums and store them in the user's memory."""
        value = reproducible.join(self.totals, exponents)
        with np.errstate(over="ignore"):
            self._stored[...] = narrow(value.astype("f4"), self._half) if self._half else value
