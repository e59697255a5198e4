"""A run that goes on from a checkpoint takes the steps of the one that was never interrupted, to the last bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hpccomm import arrays
from hpccomm.algorithms import checkpoints
from hpccomm.algorithms.blockwise_filtering import bmuf, bmuf_adam
from hpccomm.algorithms.checkpoint_sets import load_set, save_set
from hpccomm.algorithms.checkpoints import load, load_state_dict, save, state_dict
from hpccomm.algorithms.exchange import synchronous_adam
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.algorithms.local_steps import diloco, post_local_sgd, slowmo
from hpccomm.algorithms.lr_schedules import polynomial, warm_up
from hpccomm.algorithms.states import for_ranks, leaves, map_leaves, scale_unsent, snapshot
from hpccomm.algorithms.transforms import adam, chain, every, momentum, scale
from hpccomm.algorithms.two_tier import hybrid
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.files import replace_file
from hpccomm.testing.ranks import run_on_ranks

Vector = Any
BUCKET = Bucket({"w": (5, 7), "b": (2,)}, np.float64)
INNER = chain(momentum(0.9), scale(-0.1))

METHODS: dict[str, Callable[[Any], Any]] = {
    "synchronous_adam": lambda comm: synchronous_adam(comm, warm_up(3, polynomial(0.1, 20)), weight_decay=0.1),
    "every": lambda comm: every(3, INNER),
    "bmuf": lambda comm: bmuf(comm, INNER, 4),
    "bmuf nesterov, warm-up": lambda comm: bmuf(comm, INNER, 4, nesterov="paper", warmup=3),
    "bmuf sharded": lambda comm: bmuf(comm, INNER, 4, shard_state=True, local_state="average"),
    "bmuf_adam": lambda comm: bmuf_adam(comm, 0.01, 4),
    "slowmo": lambda comm: slowmo(comm, scale(-0.1), polynomial(0.1, 30), 4),
    "post_local_sgd": lambda comm: post_local_sgd(comm, INNER, 2, after=6),
    "diloco": lambda comm: diloco(comm, chain(adam(), scale(-0.01)), 4),
    "hybrid": lambda comm: hybrid(comm, lambda group: scale(0.5), INNER, comm.size // 2, period=4),
    "lars": lambda comm: bmuf(comm, lars(BUCKET, 0.1, weight_decay=0.01), 4),
    "lamb": lambda comm: bmuf(comm, lamb(BUCKET, warm_up(5, 0.1)), 4),
}


def continue_run(method: Any, state: Any, weights: Vector, rank: int, steps: range) -> tuple[Any, Vector]:
    """Noisy gradients of ½‖w − c_r‖² that follow from rank and step alone."""
    weights = weights.copy()
    for number in steps:
        noise = np.random.default_rng((rank, number)).standard_normal(weights.size)
        step, state = method.update(weights - rank + noise, state, weights)
        weights += step
    return state, weights


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [0, 5, 7])
def test_a_restored_run_takes_the_steps_of_an_uninterrupted_one_bit_for_bit(name: str, at: int, tmp_path: Path) -> None:
    """Interrupted before the first step, inside a block, and inside another one."""

    def body(comm: Any) -> None:
        method, begin = METHODS[name](comm), np.linspace(-1, 1, 37)
        whole, expected = continue_run(method, method.init(begin), begin, comm.rank, range(14))
        state, weights = continue_run(method, method.init(begin), begin, comm.rank, range(at))
        path = tmp_path / f"rank{comm.rank}.npz"
        save(path, weights=weights, method=state)
        again = METHODS[name](comm)
        blank = np.zeros(37)
        weights, state = load(path, weights=blank, method=again.init(blank))
        after, found = continue_run(again, state, weights, comm.rank, range(at, 14))
        assert np.array_equal(found, expected)
        timed = [path for path, _ in leaves(whole) if path.endswith("seconds")]
        one, other = state_dict(whole), state_dict(after)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[path], other[path]) for path in one.keys() - timed)

    run_on_ranks(4, body)


class Pair(NamedTuple):
    count: int
    rate: float


STATE = (Pair(3, 0.1), (np.arange(3.0), np.float32(2.5), True), (), None, np.zeros((0, 2), "f2"))


@pytest.mark.parametrize("name", METHODS)
def test_a_state_holds_no_uninitialised_memory(name: str, empty_arrays_are_nan: None) -> None:
    """Such memory differs from run to run, and where it holds a NaN a state does not equal its copy."""

    def body(comm: Any) -> list[dict[str, Any]]:
        method, begin = METHODS[name](comm), np.linspace(-1, 1, 37)
        state = method.init(begin)
        return [state_dict(state), state_dict(continue_run(method, state, begin, comm.rank, range(1))[0])]

    for states in run_on_ranks(4, body):
        assert all(np.isfinite(leaf).all() for state in states for leaf in state.values())


def test_paths_name_the_leaves() -> None:
    assert [path for path, _ in leaves(STATE)] == ["0.count", "0.rate", "1.0", "1.1", "1.2", "4"]
    assert [path for path, _ in leaves(7)] == [""]


def test_mapping_leaves_keeps_the_structure() -> None:
    doubled = map_leaves(lambda path, leaf: leaf * 2, STATE)
    assert doubled[0] == Pair(6, 0.2)
    assert doubled[1][0].tolist() == [0, 2, 4]
    assert (doubled[2], doubled[3]) == ((), None)


def test_every_kind_of_leaf_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "state.npz", state=STATE, number=0.1)
    blank = (Pair(0, 0.0), (np.zeros(3), np.float32(0), False), (), None, np.ones((0, 2), "f2"))
    state, number = load(tmp_path / "state.npz", state=blank, number=0.0)
    assert number == 0.1
    assert state[0] == STATE[0]
    assert type(state[0].count) is int
    assert state[1][0].tolist() == [0, 1, 2]
    assert (state[1][1], state[1][1].dtype, state[1][2]) == (2.5, np.float32, True)
    assert (state[2:4], state[4].shape, state[4].dtype) == (((), None), (0, 2), np.float16)
    assert blank[1][0].tolist() == [0, 0, 0], "what was handed in is not written"


def test_bfloat16_and_extreme_numbers_come_back(tmp_path: Path) -> None:
    import ml_dtypes

    brain = np.array([1.5, -3e38, np.inf], ml_dtypes.bfloat16)
    odd = np.array([-0.0, np.nan, 5e-324, np.inf])
    save(tmp_path / "odd.npz", state=(brain, odd, 1e308))
    found, back, number = load(tmp_path / "odd.npz", state=(np.zeros_like(brain), np.zeros(4), 0.0))[0]
    assert found.dtype == brain.dtype
    assert found.tobytes() == brain.tobytes()
    assert back.tobytes() == odd.tobytes()
    assert number == 1e308


def test_a_state_dict_is_a_copy() -> None:
    values = np.arange(3.0)
    saved = state_dict((values, 1))
    values[0] = 9
    assert saved["0"].tolist() == [0, 1, 2]
    loaded = load_state_dict((np.zeros(3), 0), saved)
    saved["0"][1] = 7
    assert loaded[0].tolist() == [0, 1, 2]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.npz"
    save(path, state=(np.arange(3.0),))
    whole = path.read_bytes()

    def write_half(stream: Any, array: Any, **how: Any) -> None:
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", write_half)
    with pytest.raises(OSError, match="no space"):
        save(path, state=(np.zeros(3),))
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    for value in (1.0, 2.0):
        save(path, state=(np.full(2, value),))
    assert load(path, state=(np.zeros(2),))[0][0].tolist() == [2, 2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ((np.zeros(4), 0), r"0 was saved as float64 of shape \(3,\), this method has float64 of shape \(4,\)"),
        ((np.zeros(3, "f4"), 0), "0 was saved as float64 .* this method has float32"),
        ((np.zeros(3),), r"it also holds \['1'\]: pass every state that was saved, under its name"),
        ((np.zeros(3), 0, 0), r"it lacks \['2'\]: pass"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(like: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_state_dict(like, state_dict((np.arange(3.0), 1)))


def test_a_file_with_other_names_or_no_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "state.npz", state=(1,))
    with pytest.raises(ArgumentError, match=r"it lacks \['method.0'\], it also holds \['state.0'\]"):
        load(tmp_path / "state.npz", method=(1,))
    for content in (b"", b"no archive"):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ArgumentError, match="is no checkpoint"):
            load(tmp_path / "broken.npz", state=(1,))


def test_a_state_of_other_types_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"1.a is set: pass arrays and numbers"):
        state_dict((1, {"a": {2}}))


def torch_tensor(array: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(array)


def jax_array(array: Any) -> Any:
    return pytest.importorskip("jax.numpy").asarray(array)


@pytest.mark.parametrize("make", [np.copy, torch_tensor, jax_array])
def test_weights_may_be_dicts_and_lists_of_arrays_of_any_library(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """They are found by name, in any order; a set of them is loaded by another number of ranks."""

    def tree(values: Any, turned: bool = False) -> dict[str, Any]:
        layers = [{"w": make(values[:4].reshape(2, 2).copy()), "b": make(values[4:6].copy())}, make(values[6:].copy())]
        found = {"layers": layers, "rate": 0.5, 3: (make(values.copy()),)}
        return dict(reversed(found.items())) if turned else found

    def flatten(found: Any) -> list[float]:
        parts = [found["layers"][0]["w"], found["layers"][0]["b"], found["layers"][1]]
        return [float(x) for part in parts for x in np.asarray(part).ravel()]

    values, blank = np.arange(8, dtype="f4"), np.zeros(8, "f4")
    save(tmp_path / "a.npz", weights=tree(values), count=3)
    found, count = load(tmp_path / "a.npz", weights=tree(blank, turned=True), count=0)
    assert (flatten(found), found["rate"], np.asarray(found[3][0]).tolist(), count) == (
        list(range(8)),
        0.5,
        [*range(8)],
        3,
    )
    assert list(found) == [3, "rate", "layers"]
    assert type(found["layers"][1]) is type(make(blank))
    run_on_ranks(3, lambda comm: save_set(comm, tmp_path, "run", weights=tree(values)))
    for (each,) in run_on_ranks(2, lambda comm: load_set(comm, tmp_path, "run", weights=tree(blank))):
        assert flatten(each) == list(range(8))
    with pytest.raises(ArgumentError, match=r"a.npz: it lacks \['count.a'\], it also holds \['count'\]: pass every"):
        load(tmp_path / "a.npz", weights=tree(blank), count={"a": 0})


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 1), (1, 3)])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_accumulated_gradients_keep_their_mean_on_another_number_of_ranks(old: int, new: int, dtype: str) -> None:
    method, weights = every(3, scale(-0.5)), np.zeros(2, dtype)

    def begin(rank: int) -> Any:
        state = method.init(weights)
        for step in range(2):
            _, state = method.update(np.full(2, rank * 6 + step, dtype), state, weights)
        return state

    states = [begin(rank) for rank in range(old)]
    wanted = np.mean([each.total for each in states], axis=0, dtype=np.float64)
    for rank in range(new):
        found = for_ranks(states, rank, new)
        assert found.micro_steps == 2
        assert found.total.tolist() == wanted.tolist()
    assert scale_unsent(states[-1], 0.0).total.tolist() == states[-1].total.tolist()


@pytest.mark.parametrize("make", [np.copy, torch_tensor, jax_array])
@pytest.mark.parametrize("copy", [snapshot, lambda s: for_ranks([s, s], 0, 2), lambda s: for_ranks([s], 1, 2)])
def test_a_copy_of_a_tree_shares_no_memory_with_it(make: Callable[[Any], Any], copy: Callable[[Any], Any]) -> None:
    values = np.ones(3, "f4")
    tree = {"layers": [{"w": make(values)}], "rate": 0.5}
    kept = copy(tree)
    values += 1
    if hasattr(tree["layers"][0]["w"], "__setitem__") and make is not jax_array:
        tree["layers"][0]["w"][:] = 7
    assert (np.asarray(kept["layers"][0]["w"]).tolist(), kept["rate"]) == ([1, 1, 1], 0.5)
    assert type(kept["layers"][0]["w"]) is type(make(values))


def test_a_state_under_the_name_of_an_argument_of_load_is_refused(tmp_path: Path) -> None:
    why = "a state is called 'other_ranks', which is an argument of load: rename the state"
    with pytest.raises(ArgumentError, match=why):
        save(tmp_path / "a.npz", other_ranks=np.zeros(3))

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            save_set(comm, tmp_path, "run", other_ranks=np.zeros(3))

    run_on_ranks(2, body)
    assert not [each for each in tmp_path.iterdir() if each.suffix != ".lock"]


def torch_values(dtype: str, shape: tuple[int, ...]) -> Any:
    torch = pytest.importorskip("torch")
    return torch.arange(8).to(getattr(torch, dtype))[: int(np.prod(shape))].reshape(shape)


def jax_values(dtype: str, shape: tuple[int, ...]) -> Any:
    numbers = pytest.importorskip("jax.numpy")
    return numbers.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


@pytest.mark.parametrize("values", [torch_values, jax_values])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_tensors_on_a_device_are_saved_and_restored(
    values: Any, dtype: str, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the host, of which these two are taken to lie on a device."""
    saved, like = values(dtype, shape), values(dtype, shape) * 0
    for module in (arrays, checkpoints):
        monkeypatch.setattr(module, "is_on_device", lambda x: x is saved or x is like)
    save(tmp_path / "a.npz", weights={"w": saved})
    (found,) = load(tmp_path / "a.npz", weights={"w": like})
    assert (type(found["w"]), found["w"].dtype, found["w"].shape) == (type(like), like.dtype, like.shape)
    assert found["w"].tolist() == saved.tolist()


def test_a_save_removes_what_a_killed_save_has_left(tmp_path: Path) -> None:
    script = f"""
import os, numpy as np
from hpccomm.algorithms import checkpoints
os.replace = lambda *names: os.kill(os.getpid(), 9)
checkpoints.save({str(tmp_path / "step1.npz")!r}, weights=np.ones(5))
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=False)
    assert len(list(tmp_path.iterdir())) == 1  # the second has removed what the first had left
    save(tmp_path / "step2.npz", weights=np.ones(5))
    assert [each.name for each in tmp_path.iterdir()] == ["step2.npz"]


def test_a_save_leaves_what_another_process_is_writing(tmp_path: Path) -> None:
    with replace_file(tmp_path / "a.npz") as file:
        file.write(b"some")
        file.flush()
        save(tmp_path / "b.npz", weights=np.ones(5))
    assert (tmp_path / "a.npz").read_bytes() == b"some"


def test_processes_that_save_into_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    script = f"""
import os, sys
from pathlib import Path
from hpccomm.files import remove_parts, replace_file
for _ in range(100):
    remove_parts(Path({str(tmp_path)!r}))
    with replace_file(Path({str(tmp_path)!r}) / sys.argv[1]) as file:
        file.write(bytes(2000))
        file.flush()
"""
    names = [f"{k}.bin" for k in range(5)]
    processes = [subprocess.Popen([sys.executable, "-c", script, name]) for name in names]
    assert [each.wait(timeout=80) for each in processes] == [0] * len(names)
    assert sorted(each.name for each in tmp_path.iterdir()) == names
