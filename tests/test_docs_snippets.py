"""Every Python block of the documentation runs as it stands, in surroundings that only hold what its text names."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.cluster.nodes import Cluster as RealCluster
from hpccomm.testing import faults

ROOT = Path(__file__).parent.parent
Names = dict[str, Any]


def model(comm: Any) -> Names:
    """A small model, and a gradient of this rank."""
    tensors = {"w": np.ones((8, 4), "f4"), "b": np.zeros(4, "f4")}
    bucket = hpccomm.Bucket(tensors)
    weights = np.ones(bucket.size, "f4")
    gradient = np.full_like(weights, comm.rank + 1)
    return {"tensors": tensors, "bucket": bucket, "weights": weights, "gradient": gradient, "lr": 0.1}


def blocks_of_steps(comm: Any) -> Names:
    """Batches, and a gradient that is a function of weights and batch."""
    found = model(comm)
    return found | {"batches": range(3 + comm.rank), "gradient": lambda weights, batch: weights * 0.01}


def make_units(comm: Any) -> Names:
    """Two units, and the arithmetic of a model that does nothing."""
    units = {name: {"w": np.ones(6, "f4"), "b": np.zeros(2, "f4")} for name in ("layer0", "layer1")}

    def backward(name: str, weights: Names, error: Any, gradient: Names) -> Any:
        for each in gradient.values():
            each[...] = 0.5
        return error

    return {
        "units": units,
        "batches": [[0.0, 1.0]] * 2,
        "forward": lambda name, weights, activity: activity,
        "backward": backward,
    }


def shared_memory(comm: Any) -> Names:
    """The page of shared memory assumes nothing but a communicator; its array of 64 MiB is made a small one."""
    return {"comm": SmallArrays(comm)}


class SmallArrays(hpccomm.Communicator):
    """Registered arrays of at most 1,024 elements."""

    def empty(self, shape: Any, dtype: Any = "f4") -> Any:
        return super().empty(min(shape, 1024), dtype)


def overlap(comm: Any) -> Names:
    return {"gradient": np.ones(100), "total": np.empty(100), "x": np.ones(5), "compute": lambda: None}


SURROUNDINGS: dict[str, Callable[[Any], Names]] = {
    "buckets.md": lambda comm: {},
    "index.md": lambda comm: {},
    "for-mpi4py-users.md": lambda comm: {},
    "tutorial.md": model,
    "for-training.md": lambda comm: {**model(comm), "torch": FakeTorch(), "model": None},
    "inside-a-node.md": shared_memory,
    "methods-compressed.md": model,
    "methods-large-batches.md": lambda comm: {**model(comm), "partition": comm},
    "methods-mics.md": make_units,
    "methods-slow-links.md": blocks_of_steps,
    "mistakes.md": lambda comm: {"train": lambda comm: comm.Barrier()},
    "overlap.md": overlap,
    "programs.md": lambda comm: {"args": SimpleNamespace(mpi4py=False)},
    "see-a-job.md": lambda comm: {"model": abs, "batch": 1},
    "gpus.md": lambda comm: {**model(comm), "y": np.ones(4, "f4"), "side": None},
    "cluster.md": lambda comm: {},
}
"""By page: what the reader has before its first block, beside MPI, hpccomm, numpy and a communicator."""


class FakeTorch:
    """PyTorch's own page runs these two lines with PyTorch; here they only have to be calls."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self


class Cluster:
    """In place of nodes, which need root: the call must be one that the real class takes."""

    def __init__(self, **named: Any) -> None:
        RealCluster(**named)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, program: list[str], per_node: int, **more: Any) -> None:
        assert set(more) == {"capture_output", "text"}


@contextmanager
def name_fault(comm: Any, fault: str, rank: int, call: int) -> Iterator[None]:
    """In place of a fault, which would end the test."""
    assert fault in faults.FAULTS
    yield


FAKES: dict[str, Names] = {
    "cluster.md": {"hpccomm.cluster.nodes.Cluster": Cluster},
    "mistakes.md": {"hpccomm.testing.faults.inject": name_fault},
}
"""By page: what must not happen in a test."""


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = (ROOT / "docs" / page).read_text()
    found = re.finditer(r"^( *)```python\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(2)].count("\n"), textwrap.dedent(match[2])) for match in found]


def test_every_page_with_python_is_run_here_or_in_a_test_that_names_it() -> None:
    pages = {each.name for each in (ROOT / "docs").rglob("*.md") if "_build" not in each.parts and blocks_in(each)}
    others = "".join(
        each.read_text() for each in (ROOT / "tests").glob("test_*.py") if each.name != Path(__file__).name
    )
    assert not sorted(page for page in pages if page not in SURROUNDINGS and page not in others)
    assert not set(SURROUNDINGS) - pages


def blocks_in(file: Path) -> bool:
    return re.search(r"^ *```python$", file.read_text(), re.MULTILINE) is not None


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("page", SURROUNDINGS)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = hpccomm.Communicator(MPI.COMM_WORLD)
    monkeypatch.chdir(comm.bcast(str(tmp_path)))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(arange=np.arange))  # type: ignore[arg-type]
    for name, value in FAKES.get(page, {}).items():
        monkeypatch.setattr(name, value)
    module = ModuleType("page")
    module.__dict__.update({"MPI": MPI, "hpccomm": hpccomm, "np": np, "comm": comm, "folder": Path.cwd() / "saved"})
    module.__dict__.update(SURROUNDINGS[page](comm))
    for line, code in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), module.__dict__)
    comm.Barrier()
