"""``hpccomm``: every command exists, only the selected one is imported, and an error is one line."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from hpccomm import __main__ as command_line
from hpccomm import __version__
from hpccomm.__main__ import COMMANDS, main
from hpccomm.launcher import launch_command


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
    assert f"usage: hpccomm {name}" in capsys.readouterr().out


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    words = capsys.readouterr().out.split()
    assert set(COMMANDS) <= set(words)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["hpccomm", __version__]


@pytest.mark.parametrize("words", [["benhc"], [], ["--nonsense"]])
def test_a_command_that_does_not_exist_ends_with_status_2_and_the_list(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "command" in capsys.readouterr().err


def test_an_hpccomm_error_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "spiral"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hpccomm verify: ")
    assert "Traceback" not in said


def test_only_the_chosen_command_is_imported_and_no_mpi() -> None:
    code = (
        "import sys; from hpccomm.__main__ import main\n"
        "try: main(['verify', '--help'])\n"
        "except SystemExit: print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "hpccomm.commands.verify" in loaded
    assert not {"hpccomm.commands.bench", "hpccomm.commands.train", "mpi4py", "numba", "matplotlib"} & set(loaded)


def test_python_m_hpccomm_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "hpccomm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hpccomm", __version__]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["tune", "--collective", "nonsense"], "hpccomm tune: --collective nonsense: use one or several of allreduce"),
        (["bench", "allreduce", "--algorithm", "rign"], "hpccomm bench: allreduce has no algorithm 'rign': use auto"),
        (["train", "mnist"], "hpccomm train: dataset 'mnist' is not known"),
        (["tune", "--nonsense"], "hpccomm tune: unrecognized arguments: --nonsense"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once(words: list[str], error: str) -> None:
    command, env = launch_command(3, ["-m", "hpccomm", *words])
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count(error) == 1
    assert "MPI_ABORT" not in said
    assert "application called MPI_Abort" not in said


def test_an_error_of_another_rank_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setattr(command_line, "RANK_0_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--nonsense"])
    assert capsys.readouterr().err.count("unrecognized arguments: --nonsense") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert capsys.readouterr() == ("", "")
