"""What is probed of a machine is kept for its user; how shared memory moves bytes there follows by a model."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpccomm.kernels import objects
from hpccomm.kernels.shared_memory import probe as tasks
from hpccomm.kernels.shared_memory.records import RING
from hpccomm.performance import machine, probe
from hpccomm.performance.machine import (
    DEFAULTS,
    LIMITS,
    NEVER,
    REFERENCE,
    SINGLE_COPIES,
    Parameters,
    Probe,
    derive_parameters,
)

XEON = Probe(
    cpu="Intel Xeon",
    cores=2,
    cache_groups=1,
    l1=48 << 10,
    l2=2 << 20,
    memory_copy=3,
    handover=6.0,  # 29 GB/s for both cores' copies, 10 GB/s from the other core's cache
    handover_nontemporal=2.5,  # the same copies, then 3 GB/s from memory
)
"""Two cores of an Intel Xeon with slow lines between them, by the rates that were recorded there; the rest is unknown.
"""
AMD = [
    REFERENCE._replace(line_ns=92.4, handover=17.2, handover_nontemporal=12.1, single_copy=10.9, l3_copy=14.9),
    REFERENCE._replace(line_ns=127.1, handover=14.5, handover_nontemporal=10.1, single_copy=12.2, l3_copy=16.6),
    REFERENCE._replace(line_ns=190, handover=9.5, handover_nontemporal=9, single_copy=11.4, memory_copy=18),
]
"""An AMD EPYC at several times: its virtual cores are near each other or far apart."""


def choices(parameters: Parameters) -> Parameters:
    """Parameters without their origin."""
    return parameters._replace(source="")


def test_the_reference_machine_has_the_defaults() -> None:
    assert choices(derive_parameters(REFERENCE)) == choices(DEFAULTS)
    assert derive_parameters(None) == DEFAULTS


@pytest.mark.parametrize("recorded", AMD)
def test_another_probe_of_the_reference_machine_changes_nothing(recorded: Probe) -> None:
    assert choices(derive_parameters(recorded)) == choices(DEFAULTS)


def test_a_machine_with_slow_lines_and_memory_fills_slots_with_ordinary_stores() -> None:
    """There, blocks filled with non-temporal stores cost two to four times the time of native MPI at 4 MB."""
    found = derive_parameters(XEON)
    assert not found.fills_nontemporal
    assert found.slot == DEFAULTS.slot  # a quarter of L2 would be more than the memory of a slot
    assert found.nontemporal == DEFAULTS.nontemporal  # its L3 was not recorded


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"l2": 512 << 10}, "slot", 1 << 17),
        ({"l2": 256 << 10}, "slot", 1 << 16),
        ({"l2": 4 << 20}, "slot", 1 << 18),
        ({"line_ns": 440}, "direct_of_two", 32768),
        ({"line_ns": 440}, "direct", 4 * 98304),
        ({"handover": 4.0}, "direct", 98304 // 4),
        ({"handover": 4.0}, "registered", 2048),
        ({"handover": 4.0}, "in_tree", 384),
        ({"line_ns": 440}, "in_tree", 4096),
        ({"l3": 16 << 20}, "nontemporal", 1 << 24),
        ({"l3": 96 << 20}, "nontemporal", 1 << 26),
        ({"l3": 16 << 20, "cache_groups": 4}, "nontemporal", 1 << 26),
        ({"l3": 8 << 20}, "allgather_segment", 1 << 18),
        ({"l1": 64 << 10}, "long", 1 << 17),
        ({"poll_ns": 100}, "spin", 500),
        ({"yield_ns": 2200}, "crowded_spin", 80),
        ({"single_copy": 5.0}, "bcast_single_copy_of_two", NEVER),
        ({"single_copy": 0.0}, "bcast_single_copy_of_two", 1 << 18),
        ({"handover": 2.0, "handover_nontemporal": 1.0}, "bcast_single_copy", 1 << 19),
        ({"handover": 23.0}, "fills_nontemporal", False),
        ({"handover": 21.0}, "fills_nontemporal", True),
        ({"handover_nontemporal": 0.0}, "fills_nontemporal", True),
    ],
)
def test_each_parameter_follows_its_formula(changes: dict[str, Any], name: str, value: int) -> None:
    assert getattr(derive_parameters(REFERENCE._replace(**changes)), name) == value


def test_parameters_are_usable_whatever_a_probe_says() -> None:
    rng = np.random.default_rng(0)
    numbers = [name for name in Probe._fields if name != "cpu"]
    for _ in range(3000):
        figures = {name: float(10 ** rng.uniform(-6, 12)) * int(rng.integers(0, 4) > 0) for name in numbers}
        for name in ("cores", "cache_groups", "l1", "l2", "l3"):
            figures[name] = int(figures[name])
        found = derive_parameters(Probe(**figures))
        for name, (least, most) in LIMITS.items():
            assert least <= getattr(found, name) <= most
            assert isinstance(getattr(found, name), int)
        assert found.slot & (found.slot - 1) == 0
        assert all(0 < getattr(found, name) <= NEVER for name in SINGLE_COPIES)


@pytest.mark.parametrize("name", Probe._fields)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 1e13, None, [], True, {}, "1"])
def test_a_wrong_figure_is_refused(name: str, value: Any) -> None:
    if name == "cpu" and value == "1":
        return
    with pytest.raises(ValueError, match=name):
        machine.parse_probe(REFERENCE._asdict() | {name: value})


# Files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    return tmp_path


CORES = (0, 1)


def test_a_probe_is_read_back(home: Path) -> None:
    assert probe.load(CORES) == probe.Found()
    path = probe.save(REFERENCE, CORES)
    assert path is not None
    assert path.parent == home
    assert probe.load(CORES) == probe.Found(REFERENCE, path)
    assert [each.name for each in home.iterdir()] == [path.name]


def test_cores_without_a_probe_use_the_one_of_the_whole_machine(home: Path) -> None:
    probe.save(AMD[0], probe.all_cores())
    assert probe.load((0,)).probe == AMD[0]
    probe.save(AMD[1], (0,))
    assert probe.load((0,)).probe == AMD[1]


CONTENTS = {
    "empty": "",
    "half": '{"of": {"schema": 1, ',
    "list": "[]",
    "null": "null",
    "number": "7",
    "no figures": '{"of": %(of)s, "probe": {}}',
    "other machine": '{"of": {}, "probe": %(probe)s}',
    "negative": '{"of": %(of)s, "probe": %(negative)s}',
    "not a number": '{"of": %(of)s, "probe": %(nan)s}',
    "bytes": "\x00\xff",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_holds_no_probe_of_this_machine_is_as_good_as_none(home: Path, content: str) -> None:
    path = probe.save(REFERENCE, CORES)
    assert path is not None
    texts = {
        "of": json.dumps(probe.identify(CORES)),
        "probe": json.dumps(REFERENCE._asdict()),
        "negative": json.dumps(REFERENCE._asdict() | {"line_ns": -1}),
        "nan": json.dumps(REFERENCE._asdict() | {"line_ns": math.nan}),
    }
    path.write_text(CONTENTS[content] % texts if "%" in CONTENTS[content] else CONTENTS[content], encoding="latin-1")
    found = probe.load(CORES)
    assert found.probe is None
    assert str(path) in found.trouble
    assert "hpccomm tune --probe" in found.trouble
    assert probe.save(REFERENCE, CORES) == path
    assert probe.load(CORES).probe == REFERENCE


def test_a_folder_or_a_file_without_rights_is_as_good_as_none(home: Path) -> None:
    (home / probe.file_name(CORES)).mkdir()
    assert probe.load(CORES).probe is None
    assert probe.save(REFERENCE, CORES) is None
    assert [each.name for each in home.iterdir()] == [probe.file_name(CORES)]


def test_without_a_folder_to_write_to_the_probe_is_only_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "writable_folder", lambda: None)
    assert probe.save(REFERENCE, CORES) is None


WRITER = """
import sys
from hpccomm.performance import probe
from hpccomm.performance.machine import REFERENCE
for _ in range(20):
    probe.save(REFERENCE._replace(line_ns=float(sys.argv[1])), (0, 1))
    assert probe.load((0, 1)).probe is not None
"""


@pytest.mark.slow
def test_many_processes_may_write_and_read_at_once(home: Path) -> None:
    """Each reads a whole file, and nothing is left beside it."""
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(k + 1)]) for k in range(8)]
    assert [each.wait(120) for each in runs] == [0] * 8
    assert [each.name for each in home.iterdir()] == [probe.file_name(CORES)]
    assert probe.load(CORES).probe is not None


def test_the_file_of_another_user_is_not_shared(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of other users are not read: :func:`objects.folders` names folders of this user only."""
    path = probe.save(REFERENCE, CORES)
    assert path is not None
    assert path.stat().st_uid == os.getuid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# What the system says


def cpu(folder: Path, number: int, package: int, group: str, sizes: tuple[str, ...] = ("32K", "1M", "32M")) -> None:
    """A core as the system describes it; a package has one memory."""
    topology = folder / f"cpu{number}" / "topology"
    topology.mkdir(parents=True)
    (folder / f"cpu{number}" / f"node{package}").mkdir()
    (topology / "physical_package_id").write_text(f"{package}\n")
    (topology / "thread_siblings_list").write_text(f"{number % 8},{number % 8 + 8}\n")
    for level, size in enumerate(sizes, 1):
        cache = folder / f"cpu{number}" / "cache" / f"index{level}"
        cache.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("type", "Data"), ("shared_cpu_list", group)):
            (cache / name).write_text(f"{text}\n")


@pytest.fixture
def machine_with_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores with two threads each, four caches, two packages."""
    for core in range(16):
        place = core % 8
        cpu(tmp_path, core, place // 4, f"{place // 2 * 2}-{place // 2 * 2 + 1}")
    monkeypatch.setattr(probe, "SYSTEM_CPUS", tmp_path)
    probe.place_of.cache_clear()
    yield
    probe.place_of.cache_clear()


@pytest.mark.usefixtures("machine_with_two_packages")
def test_pairs_of_cores_are_near_and_as_far_apart_as_possible() -> None:
    assert probe.whole_cores(range(16)) == tuple(range(8))
    assert probe.choose_pairs(tuple(range(8))) == ((0, 1), (0, 4))
    assert probe.choose_pairs((0, 1, 2, 3)) == ((0, 1), (0, 2))
    assert probe.choose_pairs((0, 1)) == ((0, 1), ())
    assert probe.choose_pairs((0, 6)) == ((), (0, 6))
    assert probe.choose_pairs((5,)) == ((), ())


@pytest.mark.usefixtures("machine_with_two_packages")
def test_a_rank_is_where_all_of_its_cores_are() -> None:
    assert probe.common_place((0, 1)) == ("0", "node0", "0-1")
    assert probe.common_place((0, 2)) == ("0", "node0", "")
    assert probe.common_place(range(8)) == ("", "", "")
    assert probe.common_place(()) == ("", "", "")
    assert probe.read_caches(0)[:3] == (32 << 10, 1 << 20, 32 << 20)


def test_a_system_that_says_nothing_gives_unknown_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SYSTEM_CPUS", tmp_path)
    assert probe.read_caches(0) == probe.Caches()
    cpu(tmp_path, 0, 0, "0", ("odd", "", "12X"))
    assert probe.read_caches(0)[:3] == (0, 0, 0)


@pytest.mark.parametrize(("cores", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2,5"), ((7, 1, 2), "1-2,7")])
def test_cores_are_written_as_ranges(cores: tuple[int, ...], text: str) -> None:
    assert probe.describe_cores(cores) == text


# Measuring


def test_this_machine_can_be_probed() -> None:
    found, _ = probe.measure(os.sched_getaffinity(0))
    alone = ("poll_ns", "yield_ns", "l2_copy", "l3_copy")
    assert all(getattr(found, name) > 0 for name in alone)
    assert machine.parse_probe(json.loads(json.dumps(found._asdict()))) == found
    assert found.cores == len(probe.whole_cores(os.sched_getaffinity(0)))


def test_one_core_can_be_probed() -> None:
    found, _ = probe.measure((min(os.sched_getaffinity(0)),))
    assert found.line_ns == found.handover == 0
    assert choices(derive_parameters(found)).direct == DEFAULTS.direct


@pytest.mark.parametrize("task", [tasks.HANDOVERS, tasks.NONTEMPORAL_HANDOVERS])
def test_what_is_handed_over_is_what_was_sent(task: int) -> None:
    """The probe measures a path that moves the right bytes."""
    cores = sorted(os.sched_getaffinity(0))
    pair = [probe.Worker(cores[0]), probe.Worker(cores[-1])]
    n = 1 << 15
    rings, sent = np.zeros((2, RING * n), np.uint8), np.zeros((2, n), np.uint8)
    received = np.zeros((2, n), np.uint8)
    sent[0], sent[1] = np.arange(n) % 251, np.arange(n) % 241
    fields = [
        {
            **{"slot": rings[k].ctypes.data, "their_slot": rings[1 - k].ctypes.data, "nbytes": n},
            **{"source": sent[k].ctypes.data, "to": received[k].ctypes.data},
        }
        for k in range(2)
    ]
    assert probe.together(pair, task, 10, fields) > 0
    assert np.array_equal(received[0], sent[1])
    assert np.array_equal(received[1], sent[0])


def test_a_thread_whose_partner_never_comes_gives_up() -> None:
    worker, nobody = probe.Worker(0), np.zeros(16, np.int64)
    fields = {"mine": worker.flag_address, "theirs": nobody.ctypes.data, "first": 1}
    assert probe.alone(worker, tasks.ECHOES, 3, **fields) == tasks.FAILED


def test_a_busy_machine_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure", lambda cores: (REFERENCE, False))
    found, idle = probe.ensure(CORES)
    assert (found.probe, found.path, idle) == (REFERENCE, None, False)
    assert not list(home.iterdir())
    monkeypatch.setattr(probe, "measure", lambda cores: (REFERENCE, True))
    found, idle = probe.ensure(CORES)
    assert found.path is not None
    assert probe.load(CORES).probe == REFERENCE


def test_a_machine_is_measured_once_unless_asked_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def measure(cores: Any) -> tuple[Probe, bool]:
        counted.append(cores)
        return AMD[len(counted) % 2], True

    monkeypatch.setattr(probe, "measure", measure)
    first, _ = probe.ensure(CORES)
    second, _ = probe.ensure(CORES)
    assert first == second
    third, _ = probe.ensure(CORES, again=True)
    assert len(counted) == 2
    assert third.probe != first.probe


def test_without_kernels_there_is_no_probe(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cores: Any) -> Any:
        raise ImportError("no Numba")

    monkeypatch.setattr(probe, "measure", refuse)
    found, _ = probe.ensure(CORES)
    assert found.probe is None
    assert "no Numba" in found.trouble


def test_uneven_rounds_are_those_of_a_busy_machine() -> None:
    assert probe.is_steady("line_ns", [100, 110, 120, 130, 900])
    assert not probe.is_steady("line_ns", [100, 300, 310, 320, 330])
    assert probe.is_steady("handover", [10, 9, 1])
    assert not probe.is_steady("handover", [10, 2, 1])
    assert probe.best_of("line_ns", [3, 1, 2]) == 1
    assert probe.best_of("handover", [3, 1, 2]) == 3
