"""Device transports other than staging: CUDA IPC, CUDA-aware MPI and NCCL, with a fake device."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from fake_device import SIDE, FakeDevice, FakeNccl
from mpi4py import MPI
from test_device_arrays import CASES, F4, SIZES, Case, ThreadPlanner, operand, operand_sum, pending_array

import hpccomm
from hpccomm import ArgumentError, TransportError, arrays
from hpccomm.backends import cuda_ipc, device_selection, mpi_device, nccl
from hpccomm.backends.cuda_ipc import PeerCopy, PeerReduce, Peers, Phase, divide_bytes
from hpccomm.backends.device_selection import DeviceTransports
from hpccomm.errors import LaunchError
from hpccomm.kernels.reductions.reference import code_of, reduce
from hpccomm.settings import ON_HOST
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.transports import cuda, cuda_probe
from hpccomm.transports.cuda import Extent, Staging

ROOM = 256
"""Bytes of a rank's buffer in these tests."""


def address(x: Any) -> int:
    return arrays.read_device(x, "test").address


# CUDA IPC


def check_sums(comm: Any, n: int, dtype: str, eager: bool, wanted: Any = None) -> None:
    """Sums of n elements in several phases, three times."""
    device = FakeDevice(eager=eager)
    peers = Peers(device, comm, ROOM)
    width, here = np.dtype(dtype).itemsize, wanted is None or comm.rank == wanted
    step = peers.room // width
    for step_number in range(3):
        x, y = pending_array(device, operand(comm.rank + step_number, n, dtype)), device.array(np.zeros(n, dtype), SIDE)
        phases = []
        for lo in range(0, n, step):
            nbytes = width * (min(lo + step, n) - lo)
            reduction = PeerReduce("sum", code_of(dtype), 0, nbytes, address(y) + width * lo if here else 0)
            phases.append(Phase([Extent(address(x) + width * lo, 0, nbytes)], [reduction]))
        peers.run(phases, [SIDE])
        want = np.sum([operand(k + step_number, n, dtype) for k in range(comm.size)], axis=0, dtype=dtype)
        assert np.array_equal(y.memory, want if here else np.zeros(n)), (comm.rank, n)
    peers.free()
    assert not device.files


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("eager", [False, True])
def test_peers_reduce_the_whole_vector_or_divide_the_work(p: int, eager: bool) -> None:
    for n in (0, 1, 31, 32, 33, 200):
        run_on_ranks(p, lambda comm, n=n: check_sums(comm, n, "f4", eager))
    run_on_ranks(p, lambda comm: check_sums(comm, 21, "f2", eager, wanted=p - 1))


@pytest.mark.parametrize("p", SIZES)
def test_peers_copy_from_the_buffers_of_others(p: int) -> None:
    def body(comm: Any) -> None:
        device, n = FakeDevice(), 10
        peers = Peers(device, comm, ROOM)
        x, y = pending_array(device, operand(comm.rank, n)), device.array(np.zeros(n * p, "f4"))
        copies = [PeerCopy(k, 4 * 3, 4 * 7, address(y) + 4 * n * k) for k in range(p)]
        peers.run([Phase([Extent(address(x), 0, 4 * n)], copies=copies)], [SIDE])
        want = np.zeros((p, n))
        want[:, :7] = [operand(k, n)[3:] for k in range(p)]
        assert np.array_equal(y.memory, want.ravel())
        peers.free()

    run_on_ranks(p, body)


class NoBarrierPeers(Peers):
    """Does not complete its own copies before the barrier."""

    def barrier(self) -> None:
        self.ranks.Barrier()


def test_the_fake_device_detects_peers_that_do_not_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peers, "barrier", NoBarrierPeers.barrier)
    with pytest.raises(AssertionError):
        run_on_ranks(2, lambda comm: check_sums(comm, 40, "f4", False))


@pytest.mark.parametrize("p", [4, 5, 7])
@pytest.mark.parametrize("nbytes", [0, 2, 16, 62, 64, 1000])
def test_shares_cover_every_byte_once(p: int, nbytes: int) -> None:
    shares = divide_bytes(nbytes, p)
    assert len(shares) == p
    assert [lo for lo, _ in shares][1:] == [hi for _, hi in shares][:-1]
    assert (shares[0][0], shares[-1][1]) == (0, nbytes)
    assert all(lo % 16 == 0 for lo, _ in shares if lo < nbytes)


class BlindDevice(FakeDevice):
    """Maps other memory than the handle names."""

    def open(self, handle: bytes) -> int:
        if not self.files:  # its own
            return super().open(handle)
        memory = np.zeros(ROOM, np.uint8)
        self.memory[memory.ctypes.data] = memory, self.number
        return memory.ctypes.data


class RefusingDevice(FakeDevice):
    """A device whose driver opens no other process's memory."""

    def open(self, handle: bytes) -> int:
        if self.files:
            raise RuntimeError("cudaErrorNotSupported")
        return super().open(handle)


@pytest.mark.parametrize(
    ("kind", "words"), [(BlindDevice, "does not see what rank"), (RefusingDevice, "cudaErrorNotSupported")]
)
def test_all_ranks_raise_if_memory_is_not_shared(kind: Any, words: str) -> None:
    def body(comm: Any) -> None:
        device = (kind if comm.rank == 1 else FakeDevice)()
        with pytest.raises(TransportError, match=f"CUDA IPC does not work between these ranks: rank 1.*{words}"):
            Peers(device, comm, ROOM)
        for left in device.files.values():
            left.unlink()

    run_on_ranks(3, body)


# Every collective by every transport


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few elements per phase, so that a hundred make many phases."""
    monkeypatch.setattr(cuda_ipc, "BUFFER_BYTES", 2 * ROOM)
    monkeypatch.setattr(cuda, "LEAST_CHUNK", 16)
    monkeypatch.setattr(cuda, "MOST_CHUNK", 160)


BY_NCCL = ("allreduce", "allreduce_in_place", "reduce", "bcast", "allgather", "allgather_in_place", "alltoall")


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_the_setting_selects_the_transport_of_every_collective(
    transport: str, case: Case, p: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = []

    def record(transports: DeviceTransports, nbytes: int, takers: Any) -> str:
        took.append(choose(transports, nbytes, takers))
        return took[-1]

    choose = DeviceTransports.choose
    monkeypatch.setattr(DeviceTransports, "choose", record)
    libraries: dict[int, FakeNccl] = {}
    monkeypatch.setattr(nccl, "library", lambda: libraries[threading.get_ident()])

    def body(comm: Any) -> None:
        device = FakeDevice(number=comm.rank)
        libraries[threading.get_ident()] = FakeNccl(comm, device)
        planner = ThreadPlanner(comm, device, transport)
        for n, eager in itertools.product((0, 1, 7, 100), (False, True)):
            device.eager = eager
            bound, written, want = case(planner, device, n)
            for _ in range(1 if "in_place" in case.__name__ else 2):
                bound.run()
            assert written is not None
            assert np.array_equal(written.get().ravel(), np.ravel(want)), (comm.rank, n)
        planner.release()
        assert not device.files

    run_on_ranks(p, body)
    dense = transport == "nccl" and case.__name__ not in (*BY_NCCL, "reduce_scatter_block")
    assert set(took) == {"staged" if dense else transport}


def planner_of(comm: Any, transport: str = "ipc") -> tuple[ThreadPlanner, FakeDevice]:
    device = FakeDevice()
    return ThreadPlanner(comm, device, transport), device


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "c8", "i1", "u8", "?"])
def test_other_dtypes_are_reduced_by_the_kernels_as_on_the_host(dtype: Any) -> None:
    def body(comm: Any) -> None:
        planner, device = planner_of(comm)
        op = MPI.LOR if dtype == "?" else MPI.SUM
        values = [(operand(k, 50, "f4") / 8).astype(dtype) for k in range(comm.size)]
        x, y = pending_array(device, values[comm.rank]), device.array(np.zeros_like(values[0]))
        planner.bind(None, "Allreduce", x, y, op, None).run()
        want = np.empty_like(values[0])
        code = code_of(want.dtype)
        bits = [each.view(np.uint16) if code == "bf16" else each for each in values]
        reduce("lor" if dtype == "?" else "sum", code if code != "bf16" else "bfloat16", bits, bits[0])
        assert np.array_equal(y.get().view(bits[0].dtype), bits[0])
        planner.release()

    run_on_ranks(5, body)


def test_reduce_scatter_in_place_overwrites_only_what_was_read() -> None:
    def body(comm: Any) -> None:
        planner, device = planner_of(comm)
        p, r, n = comm.size, comm.rank, 90
        whole = pending_array(device, operand(r, n * p))
        planner.bind(None, "Reduce_scatter_block", MPI.IN_PLACE, whole, MPI.SUM, None).run()
        assert np.array_equal(whole.get()[:n], operand_sum(p, n * p)[r * n : (r + 1) * n])
        counts = (3, 200, 1)
        whole = pending_array(device, operand(r, sum(counts)))
        planner.bind(None, "Reduce_scatter", MPI.IN_PLACE, whole, counts, MPI.SUM, None).run()
        first = sum(counts[:r])
        assert np.array_equal(whole.get()[: counts[r]], operand_sum(p, sum(counts))[first : first + counts[r]])
        planner.release()

    run_on_ranks(3, body)


# Selection

AWARE = cuda_probe.Verdict("", "2026-01-02 03:04")
KILLED = cuda_probe.Verdict("the probe was killed by SIGSEGV", "2026-01-02 03:04")


def find_transports(
    comm: Any,
    setting: str = "",
    verdict: cuda_probe.Verdict = AWARE,
    number: int | None = None,
    version: int = 22703,
) -> DeviceTransports:
    """The transports of a thread-rank, by default on a device of its own."""
    device = FakeDevice(comm.rank if number is None else number)
    context: Any = SimpleNamespace(
        settings={cuda.TRANSPORT: setting}, layout=comm.layout, node=comm.intra_node, private_comm=comm
    )
    libraries[threading.get_ident()] = FakeNccl(comm, device, version)
    verdicts[threading.get_ident()] = verdict
    ours = SimpleNamespace(context=context, staging=Staging(device), comm=SimpleNamespace(_own_context=context))
    return DeviceTransports(ours)


libraries: dict[int, Any] = {}
verdicts: dict[int, cuda_probe.Verdict] = {}


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL and the probe's result for each rank."""
    monkeypatch.setattr(nccl, "library", lambda: libraries[threading.get_ident()])
    monkeypatch.setattr(cuda_probe, "verdict", lambda *_: verdicts[threading.get_ident()])


FEW, MANY = device_selection.MANY_BYTES - 1, device_selection.MANY_BYTES


@pytest.mark.usefixtures("surroundings")
def test_long_calls_use_the_fastest_transport_and_short_ones_avoid_barriers() -> None:
    def body(comm: Any) -> None:
        transports = find_transports(comm)
        assert transports.describe() == dict.fromkeys(device_selection.device_rows(), "yes")
        assert transports.choose(MANY, {"nccl", "ipc", "aware", "staged"}) == "nccl"
        assert transports.choose(MANY, {"ipc", "aware", "staged"}) == "ipc"
        assert transports.choose(MANY, {"aware", "staged"}) == "aware"
        assert transports.choose(MANY, {"staged"}) == "staged"
        assert transports.choose(FEW, {"nccl", "ipc", "aware", "staged"}) == "aware"
        assert transports.choose(FEW, {"nccl", "ipc", "staged"}) == "staged"
        transports.free()

    run_on_ranks(3, body)


@pytest.mark.usefixtures("surroundings")
def test_an_unavailable_transport_names_its_reason() -> None:
    def apart(comm: Any) -> None:
        transports = find_transports(comm, verdict=KILLED if comm.rank == 2 else AWARE, number=0)
        assert transports.troubles["ipc"] == "the ranks are on 2 nodes"
        assert (
            "does not accept device pointers (2026-01-02 03:04: the probe was killed by SIGSEGV)"
            in (transports.troubles["aware"])
        )
        assert transports.troubles["nccl"].startswith("ranks share a device: that requires NCCL 2.30, NCCL_MULTI_RANK")
        assert transports.choose(MANY, {"nccl", "ipc", "aware", "staged"}) == "staged"

    run_on_ranks(4, apart, nodes=[0, 0, 1, 1])


@pytest.mark.usefixtures("surroundings")
def test_a_failed_probe_is_reported_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: Any) -> Any:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cuda_probe, "verdict", homeless)

    def body(comm: Any) -> str:
        transports = find_transports(comm)
        transports.free()
        return transports.troubles["aware"]

    assert all("not probed: Could not determine home directory." in each for each in run_on_ranks(2, body))


@pytest.mark.usefixtures("surroundings")
def test_ranks_share_a_device_by_nccl_only_if_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nccl.SHARING, "1")
    run_on_ranks(2, lambda comm: find_transports(comm, "nccl", number=0, version=23000).free())
    for version, setting in ((22907, "nccl"), (23000, "")):

        def body(comm: Any, version: int = version, setting: str = setting) -> None:
            if setting:
                with pytest.raises(TransportError, match="TRANSPORT=nccl does not work here: ranks share a device"):
                    find_transports(comm, setting, number=0, version=version)
            else:
                transports = find_transports(comm, setting, number=0, version=version)
                assert transports.troubles["nccl"].startswith("ranks share a device")
                transports.free()

        run_on_ranks(2, body)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize(
    ("setting", "verdict", "words"),
    [("ipc", AWARE, "the ranks are on 2 nodes"), ("aware", KILLED, "does not accept device pointers")],
)
def test_a_selected_transport_that_does_not_work_raises_on_all_ranks(
    setting: str, verdict: cuda_probe.Verdict, words: str
) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(
            TransportError, match=f"HPCCOMM_GPU_TRANSPORT={setting} does not work here: .*{words}.*: unset"
        ):
            find_transports(comm, setting, verdict)

    run_on_ranks(2, body, nodes=[0, 1])


@pytest.mark.usefixtures("surroundings")
def test_calls_that_a_selected_transport_does_not_support_are_staged() -> None:
    def body(comm: Any) -> None:
        for setting in ("ipc", "nccl", "aware", "staged"):
            transports = find_transports(comm, setting)
            assert transports.choose(4, {"nccl", "ipc", "aware", "staged"}) == setting
            assert transports.choose(MANY, {"staged"}) == "staged"
            transports.free()

    run_on_ranks(2, body)


@pytest.mark.usefixtures("surroundings")
def test_memory_that_the_host_can_address_is_staged() -> None:
    transports = run_on_ranks(2, lambda comm: find_transports(comm, ON_HOST))[0]
    assert transports.describe()["ipc"] == "no: HPCCOMM_GPU_TRANSPORT is host"
    assert transports.choose(MANY, {"nccl", "ipc", "aware", "staged"}) == "staged"


def test_unknown_settings_are_refused() -> None:
    assert device_selection.read_setting("") == device_selection.read_setting("auto") == "auto"
    with pytest.raises(ArgumentError, match="HPCCOMM_GPU_TRANSPORT='pcie' is not known: use one of auto, nccl, ipc"):
        device_selection.read_setting("pcie")


def takers(planner: ThreadPlanner, x: Any, op: Any, algorithm: str | None, reproducible: bool) -> tuple[bool, ...]:
    """Whether CUDA IPC, MPI and NCCL take an allreduce, or without an operation an allgather."""
    name, rest = ("Allgather", ()) if op is None else ("Allreduce", (op,))
    call = planner.reader.read(name, MPI.IN_PLACE, planner.describe(x, "test"), *rest, algorithm)
    call.reproducible = reproducible
    named = planner.host_algorithm(call)
    rows = (cuda_ipc.CudaIpc, mpi_device.CudaAwareMpi, nccl.NcclRanks)
    return tuple(row.takes(cast(Any, None), call, named) for row in rows)


@pytest.mark.parametrize(
    ("dtype", "op", "algorithm", "reproducible", "expected"),
    [
        ("f4", MPI.SUM, None, False, (True, True, True)),
        ("f4", MPI.SUM, "auto", False, (True, True, True)),
        ("f4", MPI.SUM, "ring", False, (False, False, False)),
        ("f4", MPI.SUM, "native", False, (False, True, False)),
        ("f4", MPI.SUM, None, True, (False, False, False)),
        ("f4", MPI.MAX, None, False, (True, False, False)),  # MPI and NCCL may lose a NaN
        ("i4", MPI.MAX, None, False, (True, True, True)),
        ("f2", MPI.SUM, None, False, (True, False, False)),
        ("c8", MPI.SUM, None, False, (True, True, False)),
        ("f4", None, None, False, (True, True, True)),
        ("f2", None, None, False, (True, False, True)),
    ],
)
def test_transports_take_only_calls_that_they_compute_exactly(
    dtype: str, op: Any, algorithm: str | None, reproducible: bool, expected: tuple[bool, ...]
) -> None:
    def body(comm: Any) -> None:
        planner, device = planner_of(comm)
        assert takers(planner, device.array(np.zeros(3 * comm.size, dtype)), op, algorithm, reproducible) == expected

    run_on_ranks(2, body)


def test_a_user_defined_operation_never_gets_device_pointers() -> None:
    def body(comm: Any) -> None:
        planner, device = planner_of(comm)
        own = MPI.Op.Create(lambda a, b, datatype: None)
        assert takers(planner, device.array(np.zeros(3, F4)), own, None, False) == (False, False, False)
        own.Free()

    run_on_ranks(1, body)


# The probe


def child_command(body: str) -> list[str]:
    return [sys.executable, "-c", body]


CHILD_PROGRAM = """
import ctypes, sys
sys.path.insert(0, {tests!r})
from fake_device import FakeDevice
from hpccomm.transports.cuda_probe import report

protect = ctypes.CDLL(None).mprotect

class Unreachable(FakeDevice):
    '''Memory that only its own copies can access, as a processor sees device memory.'''
    def locked(self, address, copy, *arguments):
        page = ctypes.c_void_p(address), ctypes.c_size_t(4096)
        protect(*page, 3)
        copy(*arguments)
        protect(*page, 0)
    def to_host(self, out, address, stream):
        self.locked(address, super().to_host, out, address, stream)
    def to_device(self, address, octets, stream):
        self.locked(address, super().to_device, address, octets, stream)

class Deaf(FakeDevice):
    '''Rank 1 loses the messages of another process.'''
    def to_host(self, out, address, stream):
        super().to_host(out, address, stream)
        from mpi4py import MPI
        if MPI.COMM_WORLD.rank == 1:
            out[:] = 0

report({kind}(eager=True))
"""


@pytest.mark.parametrize(("kind", "words"), [("FakeDevice", ""), ("Unreachable", "the probe")])
def test_an_mpi_that_reads_device_memory_with_the_processor_fails_the_probe(kind: str, words: str) -> None:
    body = CHILD_PROGRAM.format(tests=str(Path(__file__).parent), kind=kind)
    found = cuda_probe.run_probe(child_command(body), os.environ)
    assert found.startswith(words) if words else found == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "not finished after 0.5 s"),
        ("print('Allreduce of 3 elements gave another result than on the host')", "Allreduce of 3 elements gave"),
        ("raise SystemExit(3)", "ended with status 3: no output"),
    ],
)
def test_the_job_survives_every_failure_of_the_probe(body: str, words: str) -> None:
    assert words in cuda_probe.run_probe(child_command(body), os.environ, 0.5 if "sleep" in body else 30)


def test_a_probe_that_cannot_start_fails() -> None:
    assert "the probe could not start" in cuda_probe.run_probe(["/nowhere/python"], os.environ)


class GarblingDevice(FakeDevice):
    """Corrupts the data that it copies to the host."""

    def to_host(self, out: np.ndarray, address: int, stream: int) -> None:
        super().to_host(out, address, stream)
        out[0] ^= 1


def test_the_probe_checks_results() -> None:
    assert cuda_probe.exercise(FakeDevice(eager=True), MPI.COMM_SELF) == ""
    words = cuda_probe.exercise(GarblingDevice(eager=True), MPI.COMM_SELF)
    assert words == "Sendrecv of 3 elements gave another result than on the host"


def test_the_result_is_cached_until_something_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[int] = []

    def ask() -> tuple[str, str]:
        asked.append(1)
        return "the probe was killed by SIGSEGV", ""

    for _ in range(2):
        assert cuda_probe.verdict(0, "driver 1", ask).trouble.endswith("SIGSEGV")
    assert len(asked) == 1
    cuda_probe.verdict(0, "driver 2", ask)
    cuda_probe.verdict(1, "driver 1", ask)
    monkeypatch.setenv("UCX_TLS", "cuda_ipc")
    cuda_probe.verdict(0, "driver 1", ask)
    assert len(asked) == 4
    for file in (tmp_path / "hpccomm").iterdir():
        file.write_text("{broken")
    cuda_probe.verdict(0, "driver 1", ask)
    assert len(asked) == 5


# Ranks that are processes


@pytest.mark.mpi(sizes=(1, 3), timeout=60)
@pytest.mark.parametrize("setting", ["ipc", "aware", "auto"])
def test_every_collective_between_processes(comm: Any, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    device = FakeDevice()  # its memory is the host's, so every MPI accepts its pointers
    monkeypatch.setattr(cuda, "device", lambda: device)
    monkeypatch.setattr(cuda_probe, "verdict", lambda *_: AWARE)
    monkeypatch.setattr(device_selection, "MANY_BYTES", 100)
    monkeypatch.setenv(cuda.TRANSPORT, setting)
    ours = hpccomm.Communicator(comm.Dup())
    for case, n in itertools.product(CASES, (0, 1, 90)):
        bound, written, want = case(ours._device_planner, device, n)
        bound.run()
        assert written is not None
        assert np.array_equal(written.get().ravel(), np.ravel(want)), (case.__name__, n)
    found = ours.device_transports()
    others = f"no: {cuda.TRANSPORT} is {setting}"
    assert found["staged"] == "yes"
    assert found["ipc"] == ("yes" if setting in ("ipc", "auto") else others)
    assert found["aware"] == ("yes" if setting in ("aware", "auto") else others)
    assert found["nccl"].startswith("no: CuPy has no NCCL" if setting == "auto" else others)
    ours.Free()
    assert not device.files


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_an_unknown_setting_is_refused_before_the_first_message(comm: Any, monkeypatch: Any) -> None:
    device = FakeDevice()
    monkeypatch.setattr(cuda, "device", lambda: device)
    monkeypatch.setenv(cuda.TRANSPORT, "pcie")
    ours = hpccomm.Communicator(comm.Dup())
    with pytest.raises(ArgumentError, match="HPCCOMM_GPU_TRANSPORT='pcie' is not known"):
        ours.Allreduce(MPI.IN_PLACE, device.array(np.zeros(3, F4)))
    ours.Free()


def pair(tmp_path: Path, kind: str) -> list[str]:
    """The probe between two processes, with a fake device."""
    file = tmp_path / "pair.py"
    file.write_text(CHILD_PROGRAM.format(tests=str(Path(__file__).parent), kind=kind))
    return [str(file)]


@pytest.mark.parametrize(
    ("kind", "words"), [("FakeDevice", ""), ("Deaf", "the probe between two processes ended with status 0: Sendrecv")]
)
def test_the_pair_probe_detects_lost_messages(tmp_path: Path, kind: str, words: str) -> None:
    trouble, alone = cuda_probe.run_pair_probe(pair(tmp_path, kind), os.environ)
    assert (trouble.startswith(words) and trouble.endswith("on rank 1")) if words else trouble == ""
    assert not alone


def test_without_a_launcher_the_probe_uses_one_process_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise LaunchError("no launcher of Open MPI was found")

    monkeypatch.setattr(cuda_probe, "launch_command", missing)
    assert cuda_probe.run_pair_probe(["-c", ""], os.environ) == ("", "no launcher of Open MPI was found")
    monkeypatch.setattr(nccl, "library", lambda: libraries[threading.get_ident()])
    monkeypatch.setattr(cuda_probe, "verdict", lambda *_: cuda_probe.Verdict("", "", "no launcher was found"))
    found = run_on_ranks(1, lambda comm: find_transports(comm, "aware").describe())[0]
    assert found["aware"] == "yes (probed with one process only: no launcher was found)"


def test_the_pair_probe_does_not_run_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_probe, "run_probe", lambda *_: "the probe was killed by SIGSEGV")
    monkeypatch.setattr(cuda_probe, "run_pair_probe", lambda *_: pytest.fail("the pair probe ran"))
    assert cuda_probe.run_probes(0) == ("the probe was killed by SIGSEGV", "")


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_all_ranks_use_the_setting_of_rank_0(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(eager=True)
    monkeypatch.setattr(cuda, "device", lambda: device)
    for mine, theirs, staged in (("staged", "host", True), ("host", "staged", False)):
        monkeypatch.setenv(cuda.TRANSPORT, mine if comm.rank == 0 else theirs)
        ours, x = hpccomm.Communicator(comm.Dup()), device.array(operand(comm.rank, 5))
        device.log.clear()
        ours.Allreduce(MPI.IN_PLACE, x, stream=SIDE)
        assert np.array_equal(x.memory, operand_sum(2, 5))
        assert bool(device.log) == staged
        ours.Free()


@pytest.mark.mpi(sizes=(2,), timeout=120)
def test_a_probe_started_by_a_rank_has_a_world_of_its_own(comm: Any) -> None:
    body = CHILD_PROGRAM.format(tests=str(Path(__file__).parent), kind="FakeDevice")
    if comm.rank == 0:
        assert cuda_probe.run_probe(child_command(body), os.environ) == ""
    comm.Barrier()
