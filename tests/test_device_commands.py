"""The commands with a fake device, and without a device."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice
from mpi4py import MPI

import hpccomm
from benchmarks import gpu
from hpccomm import ArgumentError, TransportError
from hpccomm.__main__ import main
from hpccomm.bench import loop
from hpccomm.bench.loop import Options, measure
from hpccomm.commands import bench, info
from hpccomm.testing.jobs import run_under_mpi
from hpccomm.transports import cuda, cuda_probe

NONE = "no CUDA device: check CUDA_VISIBLE_DEVICES"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device."""
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: NONE)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A device whose pointers MPI accepts, since its memory is the host's."""
    made = FakeDevice()
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: "")
    monkeypatch.setattr(cuda, "device", lambda: made)
    monkeypatch.setattr(cuda_probe, "verdict", lambda *_: cuda_probe.Verdict("", "2026-01-02 03:04"))
    loop.staging.cache_clear()
    return made


# bench


COLLECTIVES = ("allreduce", "reduce", "bcast", "reduce_scatter", "reduce_scatter_block", "allgather", "alltoall")


@pytest.mark.mpi(sizes=(1, 3), timeout=60)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_collectives_of_buffers_on_a_device_are_measured_and_checked(
    comm: Any, device: FakeDevice, collective: str
) -> None:
    ours = hpccomm.Communicator(comm.Dup())
    options = Options(iterations=2, warmup=1, check=True, check_warmup=1, on_device=True, root=None)
    sizes = (12, 1200)
    rows = list(measure(ours, collective, sizes, ["auto", "native"], options))
    assert [(row.bytes, row.algorithm) for row in rows] == [(n, name) for n in sizes for name in ("auto", "native")]
    assert all(row.validated and row.avg_us > 0 for row in rows)
    assert all(isinstance(each, np.ndarray) for each, _ in device.memory.values())
    ours.Free()


class ForgetfulDevice(FakeDevice):
    """Loses the last byte of every copy."""

    def to_device(self, address: int, octets: np.ndarray, stream: int) -> None:
        super().to_device(address, octets[:-1], stream)


def test_a_wrong_result_on_a_device_is_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = ForgetfulDevice()
    monkeypatch.setattr(cuda, "device", lambda: forgetful)
    loop.staging.cache_clear()
    options = Options(iterations=1, warmup=1, check=True, on_device=True, dtype="i1")
    (row,) = measure(hpccomm.Communicator(MPI.COMM_SELF.Dup()), "allreduce", [64], ["auto"], options)
    assert row.wrong == 1
    assert "element 63" in row.complaint


def test_osus_title_names_the_kind_of_memory() -> None:
    asked: Any = SimpleNamespace(collective="allreduce", options=Options(on_device=True))
    assert bench.title_of(asked) == "# OSU MPI-CUDA Allreduce Latency Test v7.4"
    asked.options = Options()
    assert bench.title_of(asked) == "# OSU MPI Allreduce Latency Test v7.4"


def test_messages_on_a_device_require_a_cuda_aware_mpi(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    comm, asked = (
        hpccomm.Communicator(MPI.COMM_SELF.Dup()),
        bench.parse_command(bench_arguments("latency -d cuda D D"), SILENT),
    )
    assert asked is not None
    bench.claim_devices(comm, asked)
    monkeypatch.setattr(cuda_probe, "verdict", lambda *_: cuda_probe.Verdict("the probe failed", "2026-01-02 03:04"))
    with pytest.raises(
        ArgumentError, match=r"latency -d cuda needs an MPI that takes device memory: .*the probe failed"
    ):
        bench.claim_devices(hpccomm.Communicator(MPI.COMM_SELF.Dup()), asked)


SILENT = bench.Printer(False)


def bench_arguments(line: str) -> Any:
    collective, *flags = line.split()
    return SimpleNamespace(help=False, collective=collective, flags=flags)


def test_without_a_device_bench_says_so_once() -> None:
    done = run_under_mpi(2, "-m", "hpccomm", "bench", "allreduce", "-d", "cuda", timeout=60)
    if not cuda.unavailable_reason():
        pytest.skip("there is a device on this machine")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("hpccomm bench: -d cuda needs a device, rank 0 has none") == 1
    assert "leave -d out to measure host memory" in done.stderr
    assert "Traceback" not in done.stderr


# train


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--device cuda", f"--device cuda needs a device, rank 0 has none: {NONE}; or use --device cpu"),
        (
            "--device cuda --method bmuf",
            "--device cuda with --method bmuf: this method keeps its models in host memory: use one of dense, sgd",
        ),
        ("--device cuda --checkpoint /tmp", "this command saves no models on a device"),
        ("--device gpu", "--device 'gpu' is not known: use one of cpu, cuda"),
    ],
)
def test_what_cannot_be_trained_on_a_device_is_said(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", *line.split()]) == 2
    assert words in capsys.readouterr().err


# info


def rows() -> dict[str, str]:
    return info.gpu(hpccomm.Communicator(MPI.COMM_SELF.Dup()))


@pytest.mark.usefixtures("nothing")
def test_info_says_that_there_is_no_device() -> None:
    assert rows() == {"device": f"none: {NONE}"}


def test_info_names_the_device_and_its_transports(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows()
    assert found["device"] == "fake, device 0 of rank 0"
    assert [found[name] for name in ("ipc", "aware", "staged")] == ["yes"] * 3
    assert found["nccl"].startswith("no: ")
    monkeypatch.setenv(cuda.TRANSPORT, "nccl")
    assert "HPCCOMM_GPU_TRANSPORT=nccl does not work here" in rows()["ways"]


def test_one_rank_without_a_device_is_named() -> None:
    comm: Any = SimpleNamespace(size=2, rank=0, allgather=lambda mine: ["", NONE])
    comm.private_comm = comm
    assert info.gpu(comm) == {"device": f"none on rank 1: {NONE}"}
    comm.context = SimpleNamespace(node=SimpleNamespace(rank=0))
    with pytest.raises(ArgumentError, match="flag needs a device, rank 1 has none"):
        cuda.claim_device(comm, "flag", "leave it out")


# Importing


def test_importing_hpccomm_loads_no_array_library_and_no_cuda_module() -> None:
    loaded = imports_of("import hpccomm")
    assert not {"mpi4py.MPI", "cupy", "torch", "jax", "numba"} & loaded
    assert not [name for name in loaded if name.startswith("hpccomm.") and "cuda" in name]


def test_a_communicator_of_host_arrays_loads_no_cupy_and_no_cuda_kernels() -> None:
    loaded = imports_of(
        "import numpy as np, hpccomm; from mpi4py import MPI; "
        "hpccomm.Communicator(MPI.COMM_WORLD).Allreduce(MPI.IN_PLACE, np.ones(3)); hpccomm.allreduce(np.ones(3))"
    )
    assert not {"cupy", "torch", "jax", "numba.cuda", "hpccomm.kernels.cuda"} & loaded


def imports_of(body: str) -> set[str]:
    """The modules that a program loads."""
    code = f"{body}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


class NoDriverError(RuntimeError):
    """What CuPy raises."""


@pytest.mark.parametrize(("count", "words"), [(None, "no CUDA driver, or one that is too old"), (0, "no CUDA device")])
def test_a_missing_driver_and_a_missing_device_have_different_errors(
    monkeypatch: pytest.MonkeyPatch, count: int | None, words: str
) -> None:
    def count_devices() -> int:
        if count is None:
            raise NoDriverError("cudaErrorInsufficientDriver")
        return count

    runtime = SimpleNamespace(getDeviceCount=count_devices, CUDARuntimeError=NoDriverError)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    cuda.unavailable_reason.cache_clear()
    try:
        assert cuda.unavailable_reason().startswith(words)
        with pytest.raises(TransportError, match=words):
            cuda.device.__wrapped__()
    finally:
        cuda.unavailable_reason.cache_clear()


# The run on a device


def results(**changed: Any) -> gpu.Results:
    """Made up."""
    rows = {
        (2, "staged"): ([{"bytes": 1024, "p50_us": 40.4, "validated": True}, large_row(9000.0)], ""),
        (2, "ipc"): ([large_row(1500.0)], ""),
        (2, "nccl"): ([], "ranks share a device"),
        (4, "staged"): ([{**large_row(9.0), "validated": False}], ""),
    }
    speeds = [gpu.Speed("copy", 50.0, 1.0, None), gpu.Speed("a step", 100.0, 0.8125, 612.0)]
    found = gpu.Results("NVIDIA X", "CUDA driver 13000", "12 passed", speeds, rows, 100.4, "2026-01-02")
    return found._replace(**changed)


def large_row(us: float) -> dict[str, Any]:
    return {"bytes": 64 << 20, "p50_us": us, "validated": True}


def test_the_page_says_what_was_measured_and_what_was_meant() -> None:
    lines = gpu.page(results()).splitlines()
    assert lines[0] == "# NVIDIA X"
    assert lines[2].startswith("`scripts/test_gpu`, 2026-01-02, 100 s; CUDA driver 13000;")
    assert "| copy | 50 | 100% | - | - |" in lines
    assert "| a step | 100 | 81% | 612 | 6.1× |" in lines
    assert lines.index("| bytes | staged | ipc |") < lines.index("| 1024 | 40 | - |")
    assert "| 67108864 | 9000 | 1500 |" in lines
    assert "| 67108864 | 9 (wrong) |" in lines
    assert "nccl: ranks share a device" in lines
    assert "At 64 MiB on 2 ranks IPC or NCCL is 6.0 times as fast as staging; meant: 4." in lines
    assert "as fast as staging" not in gpu.page(results(collectives={(2, "ipc"): ([large_row(1.0)], "")}))


def test_kernels_that_end_their_process_leave_what_was_measured_before() -> None:
    rows = [["copy", 50.0, 1.0, None], ["a step", 100.0, 0.5, 200.0, ""]]
    body = f"import json, os; [print(json.dumps(row), flush=True) for row in {rows!r}]; os.kill(os.getpid(), 11)"
    found = gpu.measure_in_subprocess([sys.executable, "-c", body])
    assert [each.title for each in found] == ["copy", "a step", "the next"]
    assert found[1] == gpu.Speed("a step", 100.0, 0.5, 200.0)
    assert gpu.kernel_line(found[2]) == "| the next | the child ended with status -11 | - | - | - |"


def test_a_step_that_fails_says_why_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(xp: Any, k: Any) -> Any:
        raise RuntimeError("no such kernel\nat all")

    pool = SimpleNamespace(free_all_blocks=lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(get_default_memory_pool=lambda: pool))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    monkeypatch.setattr(gpu, "copy_microseconds", lambda xp: 50.0)
    monkeypatch.setattr(gpu, "cupy_microseconds", lambda xp, step: step())
    monkeypatch.setattr(gpu, "TASKS", (gpu.Task("one", 8, broken), gpu.Task("two", 8, lambda xp, k: lambda: 100.0)))
    copy, one, two = gpu.measure_speeds()
    assert one.trouble == "RuntimeError: no such kernel"
    assert (two.us, two.share, two.trouble) == (100.0, 0.5, "")
    assert copy.us == 50.0


@pytest.mark.usefixtures("nothing")
def test_the_run_on_a_device_says_that_there_is_none(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"scripts/test_gpu needs a device: {NONE}\n"
    assert not list(tmp_path.iterdir())


def test_the_run_on_a_device_writes_a_page_named_after_it(
    device: FakeDevice, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = results()
    monkeypatch.setattr(device, "name", "NVIDIA X 9", raising=False)
    monkeypatch.setattr(gpu, "measure_in_subprocess", lambda: made.kernels)
    monkeypatch.setattr(gpu, "bench_allreduce", lambda ranks, way: made.collectives.get((ranks, way), ([], "none")))
    for said, status in (("12 passed", 0), ("1 failed, 11 passed", 1), ("not through after 330 s", 1)):
        monkeypatch.setattr(gpu, "run_tests", lambda seconds, said=said: said)
        assert gpu.main(["--out", str(tmp_path)]) == status
        text = (tmp_path / "gpu-nvidia-x-9.md").read_text()
        assert text.startswith("# NVIDIA X 9\n")
        assert f"{said}.\n" in text
