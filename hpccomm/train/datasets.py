"""Real data that needs no download: scikit-learn's handwritten digits, and the source text of Python's library."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.errors import ArgumentError

CONTEXT = 16
"""Characters from which a text network predicts the next one."""
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The characters that are told apart; all others share one more class."""
TEST_EVERY = 10
"""Every tenth source file belongs to the test set."""
TEST_SHARE = 5
"""A fifth of the digits is the test set."""


class Dataset(NamedTuple):
    """Samples along axis 0: inputs for a network, targets as class numbers (int64)."""

    inputs: npt.NDArray[Any]
    targets: npt.NDArray[np.int64]
    test_inputs: npt.NDArray[Any]
    test_targets: npt.NDArray[np.int64]
    classes: int


def digits(limit: int | None = None) -> Dataset:
    """1797 images of 64 pixels, float32, in 10 classes; the last fifth of a fixed shuffle is for testing."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        raise ArgumentError("the dataset digits needs scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)
    train = len(labels) - len(labels) // TEST_SHARE
    return Dataset(images[:train][:limit], labels[:train][:limit], images[train:], labels[train:], 10)


def stdlib(limit: int | None = 60_000) -> Dataset:
    """Every position in the source text of Python's library: 16 characters (uint8) and the one after them.

    ``limit`` is the number of training samples; a fifth as many, from other files, are the test set.  ``None`` takes
    everything.
    """
    train: list[str] = []
    test: list[str] = []
    needed = None if limit is None else limit + CONTEXT
    for number, text in enumerate(sources()):
        (test if number % TEST_EVERY == TEST_EVERY - 1 else train).append(text)
        if needed is not None and is_long_enough(train, needed) and is_long_enough(test, needed // TEST_SHARE):
            break
    test_limit = None if limit is None else max(1, limit // TEST_SHARE)
    return Dataset(*windows(train, limit), *windows(test, test_limit), len(CHARACTERS) + 1)


def sources() -> Iterator[str]:
    """The source files of the standard library's top folder, in order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < TEST_EVERY:
        raise ArgumentError(
            f"{sysconfig.get_paths()['stdlib']} holds {len(files)} source files, too few: "
            "use a Python that is installed with the source of its library"
        )
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def is_long_enough(texts: list[str], characters: int) -> bool:
    """Whether the texts hold more than so many characters."""
    return sum(map(len, texts)) > characters


def windows(texts: list[str], limit: int | None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Contexts of shape (samples, 16) and the characters that follow them."""
    codes = encode("".join(texts))
    view = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[:limit]
    return view[:, :CONTEXT].copy(), view[:, CONTEXT].astype(np.int64)


def encode(text: str) -> npt.NDArray[np.uint8]:
    """Class numbers of characters; the last class holds all that are not in :data:`CHARACTERS`."""
    table = np.full(256, len(CHARACTERS), np.uint8)
    table[np.frombuffer(CHARACTERS.encode("ascii"), np.uint8)] = np.arange(len(CHARACTERS))
    return table[np.frombuffer(text.encode("latin-1", errors="replace"), np.uint8)]


DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits, "stdlib": stdlib}
