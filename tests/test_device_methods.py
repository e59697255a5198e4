"""Methods whose gradients lie on a device: all stays there, the kernels' own sources run, the host's bits come out.

The device is NumPy behind a wall (``fake_library.py``), the kernels run by ``emulated.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from fake_library import LIBRARY, Array

import hpccomm
from hpccomm import ArgumentError
from hpccomm.algorithms import states as state_trees
from hpccomm.algorithms.deep_gradient_compression import dgc
from hpccomm.algorithms.error_feedback import FeedbackState, feedback
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.algorithms.onebit import ef_signsgd, onebit_adam, onebit_lamb, onebit_sgd
from hpccomm.algorithms.reports import report
from hpccomm.algorithms.threshold_compression import gtc
from hpccomm.algorithms.transforms import Transform
from hpccomm.buckets import Bucket
from hpccomm.kernels import cuda
from hpccomm.testing.ranks import run_on_ranks

BUCKET = Bucket({"a": (40, 60), "b": (61,), "none": (0, 3), "c": (37, 31)})
SIZES = (1, 3)


class DeviceComm:
    """Ranks whose allreduce takes the fake's arrays, as :class:`hpccomm.Communicator` takes CuPy's."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Allreduce(self, send: Any, recv: Any, *rest: Any) -> None:
        assert type(send) is type(recv), "one buffer on the device, one on the host"
        self.comm.Allreduce(getattr(send, "host", send), getattr(recv, "host", recv), *rest)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    made = Emulated(LIBRARY)
    monkeypatch.setattr(cuda, "kernels", lambda: cuda.Kernels(made))
    return made


def gradient_of(rank: int, step: int, n: int = BUCKET.size) -> np.ndarray:
    rng = np.random.default_rng([rank, step])
    return (rng.normal(size=n) * rng.choice([0, 0.01, 1, 30], n)).astype("f4")


def leaves(state: Any) -> list[Any]:
    """All arrays in nested tuples, but for memory that is written before it is read."""
    if isinstance(state, tuple):
        names = getattr(state, "_fields", range(len(state)))
        return [leaf for name, each in zip(names, state, strict=True) if name != "spare" for leaf in leaves(each)]
    return [state] if getattr(state, "ndim", 0) else []


def has_same_bits(ours: Any, wanted: np.ndarray) -> bool:
    found = ours.get() if hasattr(ours, "get") else ours
    return found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes()


def run_steps(comm: Any, method: Transform, library: Any, odd: int | None = None) -> tuple[list[Any], Any, int]:
    """The steps and weights of a short run, and its last state; in step ``odd`` the last rank has an infinity."""
    weights, made = library.asarray(gradient_of(9, 9)), []
    state = method.init(weights)
    for step in range(6):
        gradient = gradient_of(comm.rank, step)
        if step == odd and comm.rank == comm.size - 1:
            gradient[17] = np.inf
        given = library.asarray(gradient)
        found, state = method.update(given, state, weights)
        weights = weights + found
        made.append(found)
        assert has_same_bits(given, gradient), "the gradient was written"
    return [*made, weights], state, len(leaves(state))


METHODS: dict[str, Callable[[Any], Transform]] = {
    "gtc auto": gtc,
    "gtc sum, rice": lambda comm: gtc(comm, 0.5, reduce="sum", code="rice"),
    "gtc by density": lambda comm: gtc(comm, density=0.2),
    "threshold with momentum": lambda comm: feedback(hpccomm.threshold(0.5), comm, 0.9),
    "top k": lambda comm: feedback(hpccomm.topk(0.02, values="fp16"), comm),
    "top k, bf16, momentum": lambda comm: feedback(hpccomm.topk(0.3, values="bf16"), comm, 0.9, nesterov=True),
    "dgc": lambda comm: dgc(comm, BUCKET, 0.01, smallest=1000, clip=2.0, weight_decay=0.1),
    "dgc, warming up": lambda comm: dgc(
        comm, BUCKET, 0.02, smallest=1000, nesterov=True, warmup=4, stages=(1.0, 0.1), exact=True, mask=False
    ),
    "1-bit SGD": lambda comm: onebit_sgd(comm, BUCKET),
    "EF-signSGD": lambda comm: ef_signsgd(comm, 0.1),
    "1-bit Adam": lambda comm: onebit_adam(comm, 0.01, 3, weight_decay=0.1),
    "1-bit Adam by tensor": lambda comm: onebit_adam(comm, lambda step: 0.1 / (1 + step), 2, bucket=BUCKET),
    "1-bit LAMB": lambda comm: onebit_lamb(comm, BUCKET, 0.01, 3),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
def test_an_exchange_on_the_device_gives_the_hosts_bits(launcher: Emulated, name: str, size: int) -> None:
    on_host = run_on_ranks(size, lambda comm: run_steps(comm, METHODS[name](comm), np, odd=4))
    there = run_on_ranks(size, lambda comm: run_steps(comm, METHODS[name](DeviceComm(comm)), LIBRARY, odd=4))
    for (steps, state, count), (ours, kept, number) in zip(on_host, there, strict=True):
        assert all(isinstance(each, Array) for each in ours), "a step on the host"
        assert all(has_same_bits(a, b) for a, b in zip(ours, steps, strict=True))
        assert number == count
        assert all(has_same_bits(a, b) for a, b in zip(leaves(kept), leaves(state), strict=True))
        large = [each for each in leaves(kept) if each.size >= 1000 and each.dtype == np.float32]
        assert large
        assert all(isinstance(each, Array) for each in large), "state on the host"
    assert launcher.launched


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda comm: gtc(comm, 0.5), "threshold_words"),
        (lambda comm: dgc(comm, BUCKET, 0.01, smallest=1000), "momentum_select"),
        (onebit_sgd, "pack_signs_feedback"),
        (lambda comm: onebit_adam(comm, 0.1, 1), "add_signs"),
    ],
)
def test_the_kernel_of_a_method_runs_on_the_device(launcher: Emulated, make: Any, kernel: str) -> None:
    run_on_ranks(2, lambda comm: run_steps(comm, make(DeviceComm(comm)), LIBRARY))
    assert kernel in launcher.launched


@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        (lars(BUCKET, 0.1, nesterov=True, weight_decay=0.1, max_norm=1.0), {"lars_sums", "lars_step", "lars_apply"}),
        (lars(BUCKET, 0.1, variant="simclr", weight_decay=0.1), {"lars_sums", "lars_step", "lars_apply"}),
        (lars(BUCKET, 0.1, variant="torch", clip=True), {"lars_sums", "lars_step", "lars_apply"}),
        (lamb(BUCKET, 0.1, grad_norm="clip"), {"lamb_moments", "scale_tensors", "add_scaled"}),
        (lamb(BUCKET, 0.1, adapt=(), bias_correction="in_step"), {"adam_step"}),
    ],
    ids=["lars", "lars, simclr", "larc", "lamb", "adamw"],
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_lars_and_lamb_on_the_device_give_the_hosts_bits(
    launcher: Emulated, method: Any, kernels: set[str], dtype: str
) -> None:
    found = []
    for library in (np, LIBRARY):
        weights, placed = (library.asarray(gradient_of(9, 9).astype(dtype)) for _ in range(2))
        state, used = method.init(weights), method.init(placed)
        for step in range(3):
            gradient = library.asarray(gradient_of(0, step).astype(dtype))
            delta, state = method.update(gradient, state, weights)
            weights = weights + delta
            used = method.apply(gradient, used, placed)
        found.append([weights, placed, *leaves(state), *leaves(used)])
    assert all(isinstance(each, Array) for each in found[1])
    assert all(has_same_bits(ours, wanted) for ours, wanted in zip(found[1], found[0], strict=True))
    assert {each.removesuffix(f"_{dtype}") for each in launcher.launched} >= kernels


def test_messages_of_a_state_on_the_device_are_reported(launcher: Emulated) -> None:
    for make in (lambda comm: gtc(comm, 0.5), lambda comm: dgc(comm, BUCKET, smallest=1000)):
        (_, host, _), (_, device, _) = (
            run_on_ranks(1, lambda comm, xp=xp: run_steps(comm, make(DeviceComm(comm)), xp))[0] for xp in (np, LIBRARY)
        )
        found, wanted = report(device).messages, report(host).messages
        assert found._replace(residual_norm=0.0) == wanted._replace(residual_norm=0.0)
        assert found.residual_norm == pytest.approx(wanted.residual_norm)  # the order of the sum is free


def test_a_compressor_without_device_support_is_named() -> None:
    vector = LIBRARY.asarray(np.ones(5, "f4"))
    with pytest.raises(ArgumentError, match=r"qsgd.*lies on a device.*on_host"):
        hpccomm.qsgd().encode(vector)
    with pytest.raises(ArgumentError, match="float64 of shape"):
        hpccomm.threshold(0.5).encode(LIBRARY.asarray(np.ones(5)))


@pytest.mark.parametrize("path", ["dense", "split", "recursive_doubling", "ok_topk"])
def test_a_named_exchange_that_the_device_does_not_have_is_refused(launcher: Emulated, path: str) -> None:
    def refuse(comm: Any) -> bool:
        method = feedback(hpccomm.topk(0.1), DeviceComm(comm), exchange=path)
        with pytest.raises(ArgumentError, match=f"exchange is '{path}', but the gradients lie on a device"):
            run_steps(comm, method, LIBRARY)
        return True

    assert run_on_ranks(2, refuse) == [True, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda comm: gtc(comm, 0.5),
        lambda comm: dgc(comm, BUCKET, 0.05, smallest=1, momentum=0.5),
        lambda comm: onebit_adam(comm, 0.1, 2, bucket=BUCKET),
        hpccomm.block_mean,
    ],
)
def test_states_on_a_device_are_divided_over_other_ranks_as_those_on_the_host(make: Callable[[Any], Transform]) -> None:
    def body(comm: Any) -> Any:
        method, weights = make(comm), np.ones(BUCKET.size, "f4")
        state = method.init(weights)
        for step in range(3):
            state = method.update(gradient_of(comm.rank, step), state, weights)[1]
        return state

    def move(path: str, leaf: Any) -> Any:
        return LIBRARY.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    states = run_on_ranks(3, body)
    moved = [state_trees.map_leaves(move, each) for each in states]
    for size in (1, 2, 3, 5):
        for rank in range(size):
            wanted, found = hpccomm.for_ranks(states, rank, size), hpccomm.for_ranks(moved, rank, size)
            for (path, host), (_, leaf) in zip(state_trees.leaves(wanted), state_trees.leaves(found), strict=True):
                assert isinstance(leaf, Array) == isinstance(host, np.ndarray), path
                assert np.array_equal(host, leaf.get() if isinstance(leaf, Array) else leaf), path


def test_a_nan_gradient_leaves_the_state_on_the_device_unchanged(launcher: Emulated) -> None:
    method = feedback(hpccomm.topk(0.1), DeviceComm(run_on_ranks(1, lambda comm: comm)[0]), 0.9)
    state: FeedbackState = method.init(LIBRARY.asarray(gradient_of(0, 0)))
    _, state = method.update(LIBRARY.asarray(gradient_of(0, 1)), state, LIBRARY.asarray(gradient_of(0, 0)))
    before = [each.copy() for each in leaves(state)]
    odd = gradient_of(0, 2)
    odd[-1] = np.nan
    step, after = method.update(LIBRARY.asarray(odd), state, LIBRARY.asarray(odd))
    assert after.skipped == 1
    assert not step.get().any()
    assert all(
        has_same_bits(a, b.get() if isinstance(b, Array) else b) for a, b in zip(leaves(after), before, strict=True)
    )


class ForeignVector:
    """A vector of a library that only lends by DLPack."""

    def __init__(self, lent: Array) -> None:
        self.lent, self.shape = lent, lent.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=ForeignVector, asarray=None)


def test_vectors_of_other_libraries_are_passed_to_cupy(launcher: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(from_dlpack=lambda x: x.lent))
    method = lars(BUCKET, 0.1)
    weights, gradient = (LIBRARY.asarray(gradient_of(0, step)) for step in range(2))
    wanted, _ = method.update(gradient, method.init(weights), weights)
    state = method.init(ForeignVector(weights))
    step, _ = method.update(ForeignVector(gradient), state, ForeignVector(weights))
    assert isinstance(step, ForeignVector)
    assert has_same_bits(step.lent, wanted.get())
