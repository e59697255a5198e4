"""The default process group of an MPI test, and numbers whose sums are exact in every dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpccomm

torch = pytest.importorskip("torch")
dist: Any = pytest.importorskip("torch.distributed")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[Any]:
    """The group of all ranks, made as under ``mpirun``."""
    from hpccomm.torch.plugin import register

    register()
    dist.init_process_group("hpccomm", init_method="mpi://")
    yield dist.group.WORLD
    dist.destroy_process_group()
    for name in VARIABLES:
        os.environ.pop(name, None)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
COMPLEX = (torch.complex64, torch.complex128)
REDUCED = (*FLOATS, *INTEGERS, *COMPLEX, torch.bool)
MOVED = (*REDUCED, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32)
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (4099,))


def numbers(rank: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Small numbers, others on every rank and at every place."""
    n = int(torch.tensor(shape).prod()) if shape else 1
    values = (torch.arange(n) * 5 + rank * 3) % 7 % 3
    if dtype == torch.bool:
        return (values > 0).reshape(shape)
    return ((values + 1).to(torch.float32) if dtype.is_floating_point else values + 1).to(dtype).reshape(shape)


def same(x: Any, y: Any) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
        y.contiguous().reshape(-1).view(torch.uint8).numpy()
    )


@pytest.fixture(scope="session")
def entry_point(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a program in which ``import torch`` finds the backend, whatever is installed."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "hpccomm_of_this_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hpccomm-of-this-test\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nhpccomm = hpccomm.torch.plugin:register\n")
    paths = [str(Path(hpccomm.__file__).parent.parent), str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
