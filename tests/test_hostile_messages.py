"""Messages and cache files that are damaged: refused by a sentence, or harmless; nothing outside is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_messages import Guard, N, decoders, run
from mpi4py import MPI

from hpccomm import first_use
from hpccomm.algorithms.compression.format import HEADER_BYTES, read_indices
from hpccomm.collectives.compressed.sparse import octets_of, sparse_allgather
from hpccomm.errors import ArgumentError
from hpccomm.performance import machine, probe, tuning
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.transports import segment


def test_altered_and_random_messages_are_refused_or_decoded() -> None:
    """A few thousand of what ``tests/fuzz_messages.py`` does a million times."""
    found = run(4000, seed=1)
    assert found["refused"] + found["decoded"] == 4000
    assert found["refused"] > 1000


@pytest.mark.parametrize("each", decoders(), ids=lambda each: each.name)
def test_every_message_is_decoded_at_the_end_of_memory_and_cut_at_every_byte_refused(each: Any) -> None:
    guard, out = Guard(), np.zeros(N, np.float32)
    each.decode(guard.place(each.message), out)
    assert np.isfinite(out).all()
    for length in range(len(each.message)):
        if each.name in ("sparse pairs", "packed sparse", "packed dense") and length % 8 == 0:
            continue  # fewer pairs than were sent
        with pytest.raises(ArgumentError):
            each.decode(guard.place(each.message[:length]), out)


@pytest.mark.parametrize(
    ("indices", "why"),
    [
        ([N], f"indices out of order, or not below {N}"),
        ([2**32 - 1], f"indices out of order, or not below {N}"),
        ([5, 4], "indices out of order"),
        ([4, 4], "indices out of order"),
    ],
)
def test_a_sparse_vector_of_another_rank_is_checked_before_it_is_added(
    indices: list[int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes change on the way."""
    octets = octets_of(np.array(indices, np.uint32), np.ones(len(indices), np.float32))

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            sparse_allgather(comm, np.arange(3, dtype=np.uint32), np.ones(3, np.float32), N)

    monkeypatch.setattr("hpccomm.collectives.compressed.messages.CountingComm.gather", lambda *_: [octets, octets])
    run_on_ranks(2, body)


def test_indices_of_a_message_for_more_elements_than_memory_are_refused() -> None:
    for each in decoders():
        message = np.frombuffer(each.message, np.uint8).copy()
        if bytes(message[:4]) != b"GCM1":
            continue
        message[8:16] = np.array([2**62], "<u8").view(np.uint8)
        try:
            assert read_indices(message).size <= 8 * len(each.message)
        except ArgumentError:
            assert message.size >= HEADER_BYTES


# Files of measurements


def flip(file: Path, load: Any) -> None:
    """A bit of each byte in turn: whatever is read, is read without an error."""
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        load()
    file.write_bytes(whole)


def test_every_flipped_bit_of_a_probe_is_refused_or_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    path = probe.save(machine.DEFAULTS, range(2))
    assert path is not None

    def load() -> None:
        found = probe.load(range(2))
        if found.probe is not None:
            values = [each for each in found.probe if isinstance(each, int | float)]
            assert np.isfinite(values).all(), found.probe
            assert min(values) >= 0, found.probe

    flip(path, load)


ROWS = (tuning.Row("allreduce", "ring", 1, 2, 64, 1.5, mpi="Open MPI 5.0", when="2026-01-01", cpu="x"),)


def test_every_flipped_bit_of_a_tuning_table_is_refused_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "table.json"
    tuning.write(tuning.Table(ROWS), file)
    monkeypatch.setenv("HPCCOMM_TUNING", str(file))

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            table = tuning.load("Open MPI 5.0", "node1")
        for ranks in (2, 3):
            table.choose("allreduce", 1, ranks, nbytes=64)

    flip(file, load)


def test_every_flipped_bit_of_a_first_use_file_is_refused_or_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    row = ROWS[0]._replace(cpu=probe.processor_name())
    path = first_use.save(row.mpi, [row])
    assert path is not None
    assert first_use.load(row.mpi) == (row,)

    def load() -> None:
        for each in first_use.load(row.mpi):
            assert 0 < each.us < np.inf

    flip(path, load)


@pytest.mark.parametrize("us", ["NaN", "Infinity", "-1", "1e999", "true", "null", '"1"'])
def test_a_table_with_a_time_that_is_none_is_refused(us: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    tuning.write(tuning.Table(ROWS), file)
    file.write_text(file.read_text().replace('"us": 1.5', f'"us": {us}'))
    with pytest.raises((ValueError, TypeError), match="us of"):
        tuning.read(file)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "[" * 100000, '{"of": 1}', '{"schema": NaN}', "\ud800"])
def test_files_that_are_none_are_left_alone(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    monkeypatch.setenv("HPCCOMM_TUNING", str(tmp_path / "table.json"))
    names = probe.file_name(range(2)), first_use.file_name("Open MPI 5.0"), "table.json"
    for name in names:
        (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
    assert probe.load(range(2)).probe is None
    assert first_use.load("Open MPI 5.0") == ()
    with pytest.warns(RuntimeWarning, match="is no tuning table"):
        assert tuning.load("Open MPI 5.0", "node1").rows


def test_caches_in_a_folder_that_nobody_may_write_to_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCCOMM_CACHE", "/proc/self")
    assert first_use.save("Open MPI 5.0", ROWS) is None
    assert probe.save(machine.DEFAULTS, range(2)) is None


@pytest.mark.slow
def test_processes_that_start_with_an_empty_cache_write_one_file(tmp_path: Path) -> None:
    script = """
from hpccomm import first_use
from hpccomm.performance import machine, probe, tuning
row = tuning.Row("allreduce", "ring", 1, 2, 64, 1.5, mpi="M 1", cpu=probe.processor_name())
for _ in range(20):
    assert first_use.save("M 1", [row]) and probe.save(machine.DEFAULTS, range(2))
    assert first_use.load("M 1") == (row,)
"""
    environ = {**os.environ, "HPCCOMM_CACHE": str(tmp_path / "new")}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=environ) for _ in range(4)]
    assert [each.wait(timeout=90) for each in processes] == [0] * 4
    assert len(list((tmp_path / "new").iterdir())) == 2
    for file in (tmp_path / "new").iterdir():
        json.loads(file.read_text())


# Shared memory


def test_shared_memory_is_private_and_has_no_name() -> None:
    """An anonymous file, or one that only this user can open and that is unlinked before anybody maps it."""
    for opens in (segment.open_memfd, segment.open_shm_file):
        found = opens(MPI.COMM_SELF, 4096)
        assert found is not None
        file = found[0]
        seen = os.fstat(file)
        assert (seen.st_nlink, seen.st_uid, seen.st_size) == (0, os.geteuid(), 4096)
        assert seen.st_mode & 0o077 == 0 or os.readlink(f"/proc/self/fd/{file}").startswith("/memfd:")
        os.close(file)


@pytest.mark.parametrize("trick", ["another file", "a link", "another user's"])
def test_a_file_that_is_not_rank_0s_is_not_mapped(trick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "segment"
    path.write_bytes(bytes(10))
    inode = path.stat().st_ino
    if trick == "another file":
        (tmp_path / "other").write_bytes(bytes(10))
        path.unlink()
        (tmp_path / "other").rename(path)
    elif trick == "a link":
        path.rename(tmp_path / "there")
        path.symlink_to(tmp_path / "there")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(OSError, match=r"not the file of rank 0|symbolic links"):
        segment.open_own_file(str(path), inode)
