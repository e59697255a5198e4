"""One set of files: whole or not at all, whatever fails, and never believed where it is damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kill_saves import run as run_kills
from test_contract import CASES as METHOD_CASES
from test_contract import METHODS, NODES, N, advance
from test_mics import OPTIMIZERS, first_weights
from test_shards import weights_of
from test_train import strip_times, train_interrupted

import hpccomm
from hpccomm import files
from hpccomm.algorithms import checkpoint_sets
from hpccomm.algorithms.checkpoint_sets import load_set, read_manifest, save_set
from hpccomm.algorithms.checkpoints import load, save
from hpccomm.algorithms.sharded.checkpoints import load_shards
from hpccomm.algorithms.sharded.groups import mics
from hpccomm.algorithms.states import leaves
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

OLD = Path(__file__).parent / "old_checkpoints"
"""Files of format 1, as the version before sets wrote them."""


def save_numbers(folder: Path, value: float, ranks: int = 2, name: str = "run") -> None:
    """A set in which rank r has the vector (value + r, …)."""
    run_on_ranks(
        ranks, lambda comm: save_set(comm, folder, name, weights=np.full(3, float(value + comm.rank)), count=7)
    )


def load_numbers(folder: Path, ranks: int = 2, name: str = "run") -> list[float]:
    """The values of the ranks."""
    like = {"weights": np.zeros(3), "count": 0}
    found = run_on_ranks(ranks, lambda comm: load_set(comm, folder, name, **like))
    assert all(count == 7 and (weights == weights[0]).all() for weights, count in found)
    return [float(weights[0]) for weights, _ in found]


def check_refused(folder: Path, why: str, ranks: int = 2) -> None:
    """Every rank raises."""

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            load_set(comm, folder, "run", weights=np.zeros(3), count=0)

    run_on_ranks(ranks, body)


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# Older files


def test_a_file_of_format_1_is_read() -> None:
    brain = np.array([1.5, -3e38, np.inf], ml_dtypes.bfloat16)
    like = (0, 0.0, (np.zeros(3), np.float32(0), False), None, np.ones((0, 2), "f2"), np.zeros_like(brain))
    (state,) = load(OLD / "plain.npz", state=like)
    assert (state[:2], state[2][0].tolist(), state[2][1:]) == ((3, 0.1), [0, 1, 2], (2.5, True))
    assert (state[3], state[4].shape, state[5].tobytes()) == (None, (0, 2), brain.tobytes())


def test_a_run_of_format_1_goes_on(tmp_path: Path) -> None:
    """The processor that wrote the files may round products otherwise than this one, so the last bits may differ."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)

    def body(comm: Any) -> Any:
        again = train_interrupted(comm, "dgc", tmp_path, -1)
        return again, train_interrupted(comm, "dgc", tmp_path / "whole", -1)

    for (weights, epochs), (wanted, whole) in run_on_ranks(2, body):
        np.testing.assert_allclose(weights, wanted, rtol=1e-3, atol=1e-5)
        for found, want in zip(strip_times(epochs), strip_times(whole), strict=True):
            assert found == pytest.approx(want, rel=1e-3)
    assert not [name for name in names_in(tmp_path) if name.startswith("dgc.step")], "replaced by a set"


def test_shards_of_format_1_are_read(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)

    def body(comm: Any) -> Any:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 1)
        assert load_shards(tmp_path, "run", states)["told"] == {"epoch": 2}
        return states.steps, weights_of(states)["one.w"].tobytes()

    found = run_on_ranks(3, body)
    assert [steps for steps, _ in found] == [2, 2, 2]
    assert len({weights for _, weights in found}) == 1


# What is written


def test_a_newer_set_replaces_the_older_one_and_leaves_other_names_alone(tmp_path: Path) -> None:
    (tmp_path / "run.step3.txt").touch()
    save_numbers(tmp_path, 5, name="run.more")
    for value in (1.0, 2.0):
        save_numbers(tmp_path, value)
    assert load_numbers(tmp_path) == [2, 3]
    assert load_numbers(tmp_path, name="run.more") == [5, 6]
    assert len(names_in(tmp_path)) == 3 + 3 + 1


@pytest.mark.parametrize("name", ["a b", "ü\n日", "[x]*?", "-", ".hidden", "run.json"])
def test_names_of_any_characters(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    for value in (1.0, 2.0):
        save_numbers(folder, value, name=name)
    assert load_numbers(folder, name=name) == [2, 3]
    assert len(names_in(folder)) == 3


@pytest.mark.parametrize(
    ("name", "note", "why"),
    [
        ("a/b", {}, "rank 0: the name 'a/b' is no file name"),
        ("", {}, "rank 0: the name '' is no file name"),
        ("run", {"crc32": 1}, "the note has a key 'crc32', which the manifest uses itself"),
        ("run", {1: 2}, "the note has a key 1, which is no text: pass a dict by text"),
        ("run", [1], "the note is a list: pass a dict; a state needs another name"),
        ("run", {"now": object()}, "rank 0: the note cannot be kept .*object is not JSON serializable.: pass numbers"),
    ],
)
def test_names_and_notes_that_cannot_be_kept_are_refused(name: str, note: Any, why: str, tmp_path: Path) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            save_set(comm, tmp_path, name, note, weights=np.zeros(3))

    run_on_ranks(2, body)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("states", "why"),
    [
        ({"a": np.array([None])}, "a is of objects, object: pass arrays and numbers"),
        ({"a": (1, 2**70)}, "a.1 is 1180591620717411303424: .* numbers of at most 64 bits"),
        ({"a": ((1, 2), 3), "a.0": (4, 5)}, r"save: two states have leaves of one name"),
        ({"a": 1j}, "a is complex"),
    ],
)
def test_states_that_files_cannot_hold_are_refused(states: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=why):
        save(tmp_path / "a.npz", **states)
    assert names_in(tmp_path) == []


def test_every_name_of_a_state_is_kept(tmp_path: Path) -> None:
    """Also those that are arguments of ``numpy.savez``."""
    states = dict.fromkeys(("file", "path", "allow_pickle", "ü/.. \n", "hpccomm.json"), np.arange(2))
    save(tmp_path / "a.npz", **states)
    assert [each.tolist() for each in load(tmp_path / "a.npz", **states)] == [[0, 1]] * 5


@pytest.mark.parametrize("dtype", ["?", "i1", ">i4", "f2", "c16", "U3", "M8[s]", "bfloat16", "float8_e4m3fn", "i4,f8"])
def test_every_dtype_comes_back(dtype: str, tmp_path: Path) -> None:
    for array in (np.ones(4).astype(dtype), np.zeros((), dtype), np.asfortranarray(np.zeros((2, 3), dtype))):
        save(tmp_path / "a.npz", state=(array,), strided=array.T)
        ((found,), other) = load(tmp_path / "a.npz", state=(np.zeros_like(array),), strided=np.zeros_like(array.T))
        assert (found.dtype, found.tobytes(), other.shape) == (array.dtype, array.tobytes(), array.T.shape)


def test_a_float_of_16_bits_is_not_taken_for_another(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", state=np.ones(2, ml_dtypes.bfloat16))
    for other in ("f2", "V2", "i2"):
        with pytest.raises(ArgumentError, match=r"a.npz: state was saved as bfloat16 of shape \(2,\), this method has"):
            load(tmp_path / "a.npz", state=np.ones(2, other))


def test_an_array_is_not_taken_for_a_number(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", state=(np.ones(1), 2.0))
    with pytest.raises(ArgumentError, match=r"state.0 was saved as float64 of shape \(1,\), this method has a number"):
        load(tmp_path / "a.npz", state=(0.0, 0.0))
    with pytest.raises(ArgumentError, match=r"state.1 was saved as float64 of shape \(\), this method has float64"):
        load(tmp_path / "a.npz", state=(np.ones(1), np.ones(1)))


def test_a_thousand_small_arrays_and_empty_ones(tmp_path: Path) -> None:
    state = tuple(np.full(each % 3, each) for each in range(1000))
    save(tmp_path / "a.npz", state=state)
    (found,) = load(tmp_path / "a.npz", state=tuple(np.zeros_like(each) for each in state))
    assert all(np.array_equal(one, other) for one, other in zip(found, state, strict=True))
    with pytest.raises(
        ArgumentError, match=r"it lacks \['state'\], it also holds .*and 992 more: pass every state that was saved"
    ):
        load(tmp_path / "a.npz", state=np.zeros(3))


# What fails


FAILURES: dict[str, tuple[Any, str, int]] = {
    "a disk is full": (np.lib.format, "write_array", errno.ENOSPC),
    "a flush fails": (os, "fsync", errno.EIO),
    "a rename fails": (os, "replace", errno.EROFS),
    "an open fails": (files, "open_part", errno.EDQUOT),
}


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("at", range(7))
def test_whatever_fails_the_old_set_or_the_new_one_is_there(
    what: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each use of the function in a save of two ranks; a save that follows leaves nothing of the failed one."""
    save_numbers(tmp_path, 1)
    before, calls = names_in(tmp_path), []
    module, name, number = FAILURES[what]
    real = getattr(module, name)

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == at + 1:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **named)

    def body(comm: Any) -> str:
        try:
            save_set(comm, tmp_path, "run", weights=np.full(3, 10.0 + comm.rank), count=7)
        except ArgumentError as error:
            return str(error)
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        told = run_on_ranks(2, body)
    failed = len(calls) > at
    assert all(os.strerror(number) in each for each in told) == failed
    found = load_numbers(tmp_path)
    assert found in ([[1, 2], [10, 11]] if failed else [[10, 11]])
    if failed and at < len(calls) - 2:
        assert names_in(tmp_path) == before
    save_numbers(tmp_path, 20)
    assert load_numbers(tmp_path) == [20, 21]
    assert len(names_in(tmp_path)) == 3


def test_a_folder_that_vanishes_or_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def body(comm: Any, folder: Path) -> None:
        with pytest.raises(ArgumentError, match=r"save_set .*: rank 0: "):
            save_set(comm, folder, "run", weights=np.zeros(3))

    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        run_on_ranks(2, lambda comm, folder=folder: body(comm, folder))
    save_numbers(tmp_path / "gone", 1)
    shutil.rmtree(tmp_path / "gone")
    check_refused(tmp_path / "gone", "there is no run.json: name the folder and the name")
    save_numbers(tmp_path / "gone", 2)
    assert load_numbers(tmp_path / "gone") == [2, 3]


def test_a_name_under_which_another_program_saves_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_sets, "WAIT_S", 0.2)

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=r"rank 0: another program has been saving 'run' for 0.2 s: save under"):
            save_set(comm, tmp_path, "run", weights=np.zeros(3))

    with files.hold(tmp_path / ".run.lock") as held:
        assert held
        run_on_ranks(2, body)
        save_numbers(tmp_path, 1, name="other")
    save_numbers(tmp_path, 1)
    assert load_numbers(tmp_path) == [1, 2]
    assert len(names_in(tmp_path)) == 6


def test_programs_that_save_under_one_name_leave_a_whole_set(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint_sets import Path, save_numbers
for number in range(15):
    save_numbers(Path({str(tmp_path)!r}), 100 * int(sys.argv[1]) + number)
"""
    programs = [subprocess.Popen([sys.executable, "-c", script, str(each)]) for each in range(2)]
    assert [each.wait(timeout=90) for each in programs] == [0, 0]
    assert load_numbers(tmp_path) in ([14, 15], [114, 115])
    assert len(names_in(tmp_path)) == 3


def test_new_files_have_the_permissions_of_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_numbers(tmp_path, 1)
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {0o640}


def test_a_killed_save_leaves_the_old_set_or_the_new_one(tmp_path: Path) -> None:
    found = run_kills(12, tmp_path)
    assert found["the old set"] + found["a newer set"] == 12


# What is damaged


def test_files_of_two_sets_are_not_mixed(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 10.0)):
        save_numbers(tmp_path / folder, value)
    files_of = {each: sorted((tmp_path / each).glob("*.npz")) for each in "ab"}
    wrong, right = files_of["b"][1], files_of["a"][1]
    content = right.read_bytes()
    shutil.copy(wrong, right)
    check_refused(tmp_path / "a", rf"rank 1: .*{right.name} is not the file that the manifest names .*another set")
    shutil.copy(files_of["a"][0], right)
    check_refused(tmp_path / "a", rf"rank 1: .*{right.name} is not the file that the manifest names .*another set")
    right.write_bytes(content)
    assert load_numbers(tmp_path / "a") == [1, 2]
    shutil.copy(tmp_path / "b" / "run.json", tmp_path / "a")
    check_refused(
        tmp_path / "a", r"rank 0: .*0of2.npz cannot be read .*but run.json names it: copy all files of the set"
    )


def flip_each_byte(file: Path, load: Callable[[], Any], wanted: Any) -> int:
    """Flip a bit, and then all bits, of each byte; returns how often the flip was refused."""
    whole, refused = file.read_bytes(), 0
    for place in range(len(whole)):
        for mask in (1 << place % 8, 0xFF):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
            try:
                assert load() == wanted, f"byte {place} of {file.name}, mask {mask}"
            except ArgumentError:
                refused += 1
    file.write_bytes(whole)
    assert load() == wanted
    return refused


def test_every_flipped_byte_of_a_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, w=np.arange(3.0), n=-7)

    def values() -> Any:
        weights, number = load(path, w=np.zeros(3), n=0)
        return weights.tobytes(), number

    assert flip_each_byte(path, values, values()) > path.stat().st_size


class Alone:
    """One rank, without threads."""

    rank, size = 0, 1

    def allgather(self, mine: Any) -> list[Any]:
        return [mine]

    def bcast(self, mine: Any, root: int = 0) -> Any:
        return mine


def test_every_flipped_byte_of_a_manifest_is_refused_or_harmless(tmp_path: Path) -> None:
    save_set(Alone(), tmp_path, "run", {"epoch": 3, "loss": [0.25]}, n=1)
    file = tmp_path / "run.json"

    def values() -> Any:
        manifest = read_manifest(tmp_path, "run")
        return load_set(Alone(), tmp_path, "run", n=0), manifest and manifest.note

    flip_each_byte(file, values, ((1,), {"epoch": 3, "loss": [0.25]}))


def write_archive(path: Path, members: dict[str, bytes], **how: Any) -> None:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def header(shape: str, dtype: str = "'<f8'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "2^40 elements": ({"w.npy": header("(1099511627776,)") + bytes(8)}, "w has 8 bytes for float64 of shape"),
    "negative lengths": ({"w.npy": header("(-1, -1)") + bytes(8)}, "negative dimensions"),
    "zero times 2^80": ({"w.npy": header(f"(0, {1 << 80})")}, "is no checkpoint, or is damaged"),
    "more bytes": ({"w.npy": header("(1,)") + bytes(9)}, "w has 9 bytes for float64"),
    "objects": ({"w.npy": header("(1,)", "'|O'") + bytes(8)}, "w has 8 bytes for object"),
    "no header": ({"w.npy": b"\x93NUMPY"}, "is no checkpoint, or is damaged"),
    "python code": ({"w.npy": header("__import__('os').abort()")}, "is no checkpoint, or is damaged"),
    "deep source": ({"w.npy": header("(" * 3000 + ")" * 3000)}, "is no checkpoint, or is damaged"),
    "another version": ({"w.npy": header("(1,)").replace(b"\1\0", b"\7\0", 1)}, "is no checkpoint, or is damaged"),
    "a program": ({"w.npy": header("(1,)") + bytes(8), "setup.py": b"boom"}, "it holds more than arrays"),
    "a newer format": ({"hpccomm.json": b'{"format": 3}'}, "its format is 3, this version of hpccomm reads formats 1"),
    "no format": ({"hpccomm.json": b"[]"}, "is no checkpoint, or is damaged"),
    "deep JSON": ({"hpccomm.json": b"[" * 100000}, "is no checkpoint, or is damaged"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_before_memory_is_taken(what: str, tmp_path: Path) -> None:
    members, why = HOSTILE[what]
    write_archive(tmp_path / "a.npz", members)
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError, match=why):
            load(tmp_path / "a.npz", w=np.zeros(1))
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.npz", {"w.npy": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArgumentError, match="its parts are longer than the file"):
        load(tmp_path / "a.npz", w=np.zeros(1))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"checkpoint": 1}', '{"step": 1, "crc32": 0}', "[" * 100000]
)
def test_manifests_of_other_programs_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    check_refused(tmp_path, r"run.json does not describe a saved run \(.+\): name another folder", 1)
    save_numbers(tmp_path, 1)
    assert load_numbers(tmp_path) == [1, 2]


# Other numbers of ranks


CHANGES = [(2, 4), (4, 2), (1, 4)]
CASES = [
    (name, at, *CHANGES[place % 3]) for place, (name, at) in enumerate(METHOD_CASES) if at % METHODS[name].repeats == 0
]


@pytest.mark.parametrize(("name", "at", "old", "new"), CASES)
def test_another_number_of_ranks_loads_what_for_ranks_makes(
    name: str, at: int, old: int, new: int, tmp_path: Path
) -> None:
    row, begin = METHODS[name], np.ones(N, np.float32)
    old += old % 2 if name.startswith("hybrid") else 0

    def first(comm: Any) -> Any:
        method = row.make(comm)
        weights, state = advance(method, method.init(begin), begin, comm.rank, 0, at)
        save_set(comm, tmp_path, "run", weights=weights, method=state)
        return hpccomm.snapshot(state)

    def then(comm: Any) -> Any:
        like = row.make(comm).init(begin)
        wanted = dict(leaves(hpccomm.for_ranks(states, comm.rank, new, like)))
        return *load_set(comm, tmp_path, "run", weights=begin * 0, method=like), wanted

    states = run_on_ranks(old, first, nodes=NODES[old])
    for weights, state, wanted in run_on_ranks(new, then, nodes=NODES[new]):
        assert weights.shape == (N,)
        for path, leaf in leaves(state):
            assert np.array_equal(leaf, wanted[path]), path


def test_another_number_of_ranks_is_refused_inside_a_block(tmp_path: Path) -> None:
    def first(comm: Any) -> None:
        method, weights = METHODS["bmuf"].make(comm), np.ones(N, np.float32)
        _, state = advance(method, method.init(weights), weights, comm.rank, 0, 4)
        save_set(comm, tmp_path, "run", method=state)

    def then(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=r"load_set .*rank 0: for_ranks: rank 0 saved 1 step into a block"):
            load_set(comm, tmp_path, "run", method=METHODS["bmuf"].make(comm).init(np.ones(N, np.float32)))

    run_on_ranks(2, first)
    run_on_ranks(3, then)


def test_a_set_of_another_method_is_refused_by_name(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1)

    def body(comm: Any) -> None:
        with pytest.raises(
            ArgumentError, match=r"rank 0: load: .*0of2.npz: it lacks \['method'\], it also holds \['count'\]"
        ):
            load_set(comm, tmp_path, "run", weights=np.zeros(3), method=1)

    run_on_ranks(2, body)


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -0.0], np.float16)
    state = (odd, odd.astype(ml_dtypes.bfloat16), float("nan"), float("-inf"))
    save_set(Alone(), tmp_path, "run", {"loss": float("nan")}, state=state)
    (found,) = load_set(Alone(), tmp_path, "run", state=(np.zeros_like(odd), np.zeros_like(state[1]), 0.0, 0.0))
    assert [each.tobytes() for each in found[:2]] == [each.tobytes() for each in state[:2]]
    assert np.isnan(found[2])
    assert found[3] == float("-inf")
    assert "NaN" in (tmp_path / "run.json").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["checkpoint"]["format"] == 2
