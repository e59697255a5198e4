"""Decode random and altered messages: each is refused by a sentence or decoded, and nothing outside is touched.

``python tests/fuzz_messages.py --messages 1000000``.  A message ends where the memory ends, at a page that may not be
read, and outputs lie between canary bytes: a decoder that reads or writes beyond them crashes or is seen.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from test_compressors import ALL

import hpccomm
from hpccomm.algorithms.compression.format import HEADER_BYTES
from hpccomm.algorithms.row_sparse import RowCode
from hpccomm.collectives.compressed.messages import split_messages
from hpccomm.collectives.compressed.onebit import decode_signs, encode_signs
from hpccomm.collectives.compressed.sparse import add_vector, octets_of, pack_vector, pairs_in
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels

CANARY, MARGIN = 0xA5, 64
N = 203
EDGES = np.r_[0:MARGIN, -MARGIN:0]
EXTREMES = (0, 1, 2, 7, 31, 32, 127, 255, N - 1, N, N + 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)

COMPRESSORS = [*ALL, *(hpccomm.topk(0.1, values=values, code="u32") for values in ("fp32", "fp16", "bf16"))]


class Decoder(NamedTuple):
    """A message as it is sent, and what the receiver does with it."""

    name: str
    message: bytes
    decode: Callable[[Any, Any], None]
    """(message, out)"""


def gradient() -> Any:
    return np.random.default_rng(3).standard_normal(N).astype(np.float32)


def add_pairs(message: Any, out: Any) -> None:
    kernels().scatter_add([pairs_in(message, out.size)], out)


def add_bits(message: Any, out: Any) -> None:
    kernels().add_signs([decode_signs(message, out.size)], out, fresh=True)


def unpack(message: Any, out: Any) -> None:
    for each in split_messages(message):
        COMPRESSORS[0].decode(each, out)


TABLE = RowCode(hpccomm.Bucket({"w": (3,), "table": (50, 4)}), ["table"], slice(0, N))
"""A table of 50 rows behind three numbers."""


def rows_of(vector: Any) -> Any:
    """The message of a vector in which one row in ten is not zero."""
    few = vector.copy()
    few[3:].reshape(50, 4)[np.arange(50) % 10 > 0] = 0
    return TABLE.encode(few)


def add_rows(message: Any, out: Any) -> None:
    out[...] = TABLE.decode(message, out.dtype)


def decoders() -> list[Decoder]:
    """All of them."""
    vector = gradient()
    indices = np.flatnonzero(np.abs(vector) > 1.5).astype(np.uint32)
    sparse, part = octets_of(indices, vector[indices]), COMPRESSORS[0].encode(vector)
    lengths = np.array([2, part.size, part.size], "<u8").view(np.uint8)
    found = [Decoder(each.name, each.encode(vector).tobytes(), each.decode) for each in COMPRESSORS]
    return [
        *found,
        Decoder("sparse pairs", sparse.tobytes(), add_pairs),
        Decoder("packed sparse", pack_vector(indices, vector[indices], N).tobytes(), add_vector),
        Decoder("packed dense", pack_vector(np.arange(N, dtype=np.uint32), vector, N).tobytes(), add_vector),
        Decoder("signs", encode_signs(np.zeros_like(vector), vector, 1.0).tobytes(), add_bits),
        Decoder("few rows", rows_of(vector).tobytes(), add_rows),
        Decoder("all rows", TABLE.encode(vector).tobytes(), add_rows),
        Decoder("several", np.concatenate([lengths, part, part]).tobytes(), unpack),
    ]


class Guard:
    """Memory whose end is the end of what may be read."""

    def __init__(self, pages: int = 4) -> None:
        self.size = pages * mmap.PAGESIZE
        self.map = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        self.octets = np.frombuffer(self.map, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        last = ctypes.c_void_p(self.octets.ctypes.data + self.size)
        assert libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def place(self, message: bytes) -> Any:
        """The message, as the last bytes."""
        view = self.octets[self.size - len(message) : self.size]
        view[:] = np.frombuffer(message, np.uint8)
        return view


def alter(message: bytes, draw: random.Random) -> bytes:
    """One of the ways in which a message is damaged."""
    octets = bytearray(message)
    kind = draw.randrange(7)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 2, 8))):
            octets[draw.randrange(len(octets))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del octets[draw.randrange(len(octets)) :]
    elif kind == 2:
        octets += draw.randbytes(draw.choice((1, 4, 8, 100)))
    elif kind == 3:  # a field of the header, or of the payload's beginning
        width = draw.choice((1, 4, 8))
        at = draw.randrange(min(len(octets) - width, HEADER_BYTES + 24))
        octets[at : at + width] = (draw.choice(EXTREMES) % 256**width).to_bytes(width, "little")
    elif kind == 4:  # a header that is whole, before noise
        octets[HEADER_BYTES:] = draw.randbytes(max(0, len(octets) - HEADER_BYTES))
    elif kind == 5:
        octets = bytearray(draw.randbytes(draw.randrange(200)))
    else:
        at = draw.randrange(len(octets))
        octets[at:] = octets[at:][::-1]
    return bytes(octets)


def run(messages: int, seed: int = 0) -> Counter[str]:
    """Decode so many; returns how many were refused and decoded."""
    draw, guard, found = random.Random(seed), Guard(), Counter[str]()
    room = np.full(4 * N + 2 * MARGIN, CANARY, np.uint8)
    out = room[MARGIN : MARGIN + 4 * N].view(np.float32)
    table = decoders()
    for number in range(messages):
        name, message, decode = table[number % len(table)]
        out[...] = 1
        try:
            with np.errstate(invalid="ignore", over="ignore"):
                decode(guard.place(alter(message, draw)), out)
            found["decoded"] += 1
        except ArgumentError:
            found["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name}, message {number} of seed {seed}: {error!r}") from error
        assert (room[EDGES] == CANARY).all(), f"{name}, message {number} of seed {seed}: written outside"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(dict(run(args.messages, args.seed)))
    sys.exit(0)
