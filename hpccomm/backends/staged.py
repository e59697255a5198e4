"""Through the host: a call on a device's arrays is made in chunks, each an ordinary call on the host.

*p ranks; n elements.*  Element-wise collectives are cut into chunks of elements, collectives with a block per rank into
chunks of columns, the same columns of every block.  Every chunk has the same algorithms, the same shared memory, the
same bits.  Calls with blocks of any length are one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from hpccomm.backends.device import (
    DeviceBackend,
    extent,
    host_dtype,
    own_block,
    sides,
    streams_of,
    take_columns,
)
from hpccomm.calls.blocks import EQUAL, NONE, PARTS
from hpccomm.calls.buffers import Buffer
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Chunk, Extent, Octets

Host = Callable[[Any, Any], Any]
"""A collective of host arrays: ``host(send, recv)``, each ``None`` on ranks that have none."""


class Staged(DeviceBackend):
    """Pinned host memory, which takes every call."""

    def takes(self, call: Call, algorithm: str) -> bool:
        """Every call."""
        return True

    def bind(self, call: Call) -> Plan:
        """Bind the chunks."""
        host = host_call(getattr(self.planner.comm, call.name), call)
        return Plan(partial(self.staging.run, divide_call(call, host), streams_of(call)))


def host_call(method: Callable[..., None], call: Call) -> Host:
    """A communicator's method with the arguments that follow the buffers."""
    form = call.signature
    rest = [*(getattr(call, name) for name in form.arguments), call.algorithm]
    rest += [call.reproducible] if call.op is not None else []
    if form.send == NONE:
        return lambda send, recv: method(recv if send is None else send, *rest)
    if form.recv == PARTS:
        counts = list(call.blocks()[0])
        return lambda send, recv: method(send, [recv, counts], *rest)
    return lambda send, recv: method(send, recv, *rest)


def divide_call(call: Call, host: Host) -> list[Chunk]:
    """The chunks of a call."""
    form, p, (send, recv), first = call.signature, call.size, sides(call), own_block(call)
    if call.uneven:
        return [whole_chunk(call, host)]
    parts = p if form.blockwise else 1
    row = parts * call.data.width
    each = call.nbytes // row

    def extents(buffer: Buffer | None, kind: str, first: int, lo: int, hi: int) -> list[Extent]:
        if buffer is None:
            return []
        return take_columns(buffer, each, p, lo, hi) if kind == EQUAL else [extent(buffer, first + lo, hi - lo)]

    return [
        chunk(extents(send, form.send, first, lo, hi), extents(recv, form.recv, 0, lo, hi), send, recv, host)
        for lo, hi in columns(each, row)
    ]


def whole_chunk(call: Call, host: Host) -> Chunk:
    """A call with blocks of any length as one chunk."""
    send, recv, me = call.send, call.recv, call.rank
    if call.counts:
        reads, writes = [extent(send, 0, sum(call.counts))], [extent(recv, 0, call.counts[me])]
    else:
        counts, displs = call.blocks()
        cuts = np.cumsum([0, *counts]).tolist()
        reads = [extent(send, own_block(call), counts[me])]
        writes = [extent(recv, displs[k], counts[k], cuts[k]) for k in range(call.size)]
    return chunk(reads, writes, send, recv, host)


def columns(count: int, bytes_each: int) -> list[tuple[int, int]]:
    """[lo, hi) of the chunks of ``count`` columns; one empty chunk if there are none."""
    step = max(1, cuda.chunk_bytes(count * bytes_each) // bytes_each)
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def chunk(reads: list[Extent], writes: list[Extent], send: Buffer | None, recv: Buffer | None, host: Host) -> Chunk:
    """A chunk whose collective runs on arrays; empty extents are left out."""

    def view(octets: Octets, buffer: Buffer | None) -> Any:
        return None if buffer is None else octets.view(host_dtype(buffer))

    def body(incoming: Octets, outgoing: Octets) -> None:
        host(view(incoming, send), view(outgoing, recv))

    return Chunk([each for each in reads if each.nbytes], body, [each for each in writes if each.nbytes])
