"""What a new user meets first: installing beside the clone, a missing MPI, mistyped words, Ctrl-C, and waiting."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hpccomm import launcher
from hpccomm.__main__ import COMMANDS, main
from hpccomm.__main__ import parser as command_parser
from hpccomm.arguments import complete
from hpccomm.commands import doctor
from hpccomm.commands.completion import SHELLS, complete_words
from hpccomm.commands.progress import Progress, show_progress
from hpccomm.performance.tuning import COLLECTIVES, Row, Table
from hpccomm.performance.units import format_seconds, format_time
from hpccomm.testing.jobs import run_under_mpi, start, stop

ROOT = Path(__file__).parent.parent


# --- installing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with an editable install of this tree in it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("editable")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_editable(sys.argv[1]))"
    build = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    wheel = folder / build.stdout.split()[-1]
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(folder)], check=True)
    return folder


def test_a_program_beside_the_clone_imports_the_package_and_not_the_clones_folder(
    editable: Path, tmp_path: Path
) -> None:
    (tmp_path / "hpccomm").symlink_to(ROOT)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, site, sys\n"  # any other install must not be found
        "sys.path = [p for p in sys.path if not os.path.exists(os.path.join(p, 'hpccomm', '__init__.py'))]\n"
        "sys.meta_path = [each for each in sys.meta_path if 'editable' not in repr(each)]\n"
        f"site.addsitedir({str(editable)!r}); import hpccomm; print(hpccomm.__file__)"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, program], check=False, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(ROOT / "hpccomm" / "__init__.py"), done.stderr


@pytest.mark.parametrize("command", ["info", "bench", "tune", "train"])
def test_without_an_mpi_a_command_says_how_to_get_one(command: str) -> None:
    words = {"bench": ["allreduce"], "train": ["digits"]}.get(command, [])
    env = {**os.environ, "MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    done = subprocess.run(
        [sys.executable, "-m", "hpccomm", command, *words],
        check=False,
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"hpccomm {command}: mpi4py of ")
    assert "pip install" in done.stderr
    assert "load your site's MPI module" in done.stderr


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("setting", ["", "wait", "background"])
def test_info_shows_the_memory_in_use_and_only_the_settings_that_were_made(setting: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "HPCCOMM_COMPILE"}
    environ |= {"HPCCOMM_COMPILE": setting} if setting else {}
    done = run_under_mpi(2, "-m", "hpccomm", "info", "--json", timeout=60, environ=environ)
    found = json.loads(done.stdout)
    assert found["Transports"]["shared memory"] == "in use"
    assert found["Settings"]["HPCCOMM_COMPILE"] == (setting or "not set")
    assert any(each.startswith("shared: ") for each in found["Decisions for allreduce (float32)"].values())


# --- wrong turns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["benhc"], "did you mean bench?"),
        (["info", "--collective", "alreduce"], "did you mean allreduce?"),
        (["info", "--colective", "allreduce"], "did you mean --collective?"),
        (["verify", "all", "--sizes=4"], "did you mean --size?"),
        (["plot", "ring", "--outt", "x.png"], "did you mean --out?"),
        (["predict", "allreduse"], "did you mean allreduce?"),
        (["completion", "bsh"], "did you mean bash?"),
        (["train", "digits", "--epocs", "3"], "did you mean --epochs?"),
        (["INFO"], "did you mean info?"),
        (["train", "digts"], "did you mean digits?"),
        (["train", "digits", "--method", "dcg"], "did you mean dgc?"),
        (["train", "digits", "--framework", "pytorch"], "did you mean torch?"),
        (["plot", "rnig"], "did you mean ring?"),
        (["verify", "buterfly"], "did you mean butterfly?"),
        (["bench", "osu_alreduce"], "did you mean allreduce?"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_right_one(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("words", [["help"], ["help", "bench"], ["help", "train"]])
def test_help_is_a_word_as_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main(words) == 0
    assert "usage: hpccomm" in capsys.readouterr().out


def test_a_word_that_is_like_no_other_gets_no_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", "--xyzzy"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nosuch", "", "barrier"])
def test_info_on_an_unknown_collective_fails(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["info", "--collective", name])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert all(each in said for each in COLLECTIVES)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plot", "ring", "--out", "{}/no/ring.png"], "the folder {}/no does not exist"),
        (["plot", "ring", "--out", "{}/ring.jpeg2"], "must end in .png, .svg or .pdf"),
        (["plot", "{}/in.json", "--out", "{}/no/in.png"], "the folder {}/no does not exist"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.json").write_text("{}")
    assert main([word.format(tmp_path) for word in words]) == 2
    assert sentence.format(tmp_path) in capsys.readouterr().err


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "bench allreduce -m 4:8 --cold --json {}/no/out.json"),
        (2, "train digits --epochs 1 --json {}/no/out.json"),
        (2, "train digits --epochs 1 --plot {}/no/out.png"),
        (2, "tune --quick --out {}/no/table.json"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_the_first_measurement(
    ranks: int, words: str, tmp_path: Path
) -> None:
    done = run_under_mpi(ranks, "-m", "hpccomm", *words.format(tmp_path).split(), timeout=60)
    assert done.returncode != 0
    assert done.stdout == ""
    assert (done.stderr + done.stdout).count(f"{tmp_path}/no") >= 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "missing: command (hpccomm --help)"),
        ("report {}/none.json", "is no trace: write one with"),
        ("report {}/text", "is no trace: write one with hpccomm-run --timeline trace.json"),
        ("report", "missing: trace (hpccomm report --help)"),
        ("plot {}/none.json", "is neither a file nor an algorithm: use one of"),
        ("plot {}/text --out {}/x.png", "holds no measurements: write them with"),
        ("plot {}/text", "add --out FILE.png"),
        ("plot ring --size 0", "use 1 or more, and up to 256 ranks"),
        ("plot ring --size 100000", "use 1 or more, and up to 256 ranks"),
        ("plot ring --size four", "--size 'four': give a whole number"),
        ("plot ring --size", "--size needs a value behind it"),
        ("verify ring --size 0:4", "give numbers of ranks from 1 to 4,096"),
        ("verify ring --size 4:1", "give numbers of ranks from 1 to 4,096"),
        ("verify ring --size 1:1000000000000000", "give numbers of ranks from 1 to 4,096"),
        ("verify ring --size 3,1000000000", "give numbers of ranks from 1 to 4,096"),
        ("verify ring --size many", "give numbers of ranks from 1 to 4,096"),
        ("predict allreduce --nodes 0", "give 1 or more of each, and up to 1,048,576 ranks"),
        ("predict allreduce --nodes 1000000000", "give 1 or more of each, and up to 1,048,576 ranks"),
        ("predict allreduce --bytes lots", "'lots' is no size: write 4, 64Ki, 100M"),
        ("predict allreduce --rate fast", "'fast' is no rate: write 100gbit or 12.5GB"),
        ("predict allreduce --density much", "--density 'much': give a number"),
        ("slurm init --out {}/no/job", "does not exist: create it or name another file"),
        ("slurm init --out {} --force", "this is a folder: name a file"),
        ("slurm init --nodes none", "--nodes"),
        ("slurm", "missing: action (hpccomm slurm --help)"),
        ("stacks 999999999", "belongs to no job of yours"),
        ("stacks train.py", "PID 'train.py': give a whole number"),
        ("completion tcsh", "invalid choice"),
        ("tune", "one rank has nothing to tune: hpccomm-run -n 4 -m hpccomm tune"),
        ("bench", "the name of a benchmark is missing"),
        ("bench allreduce", "at least two processes: hpccomm-run -n 2"),
        ("bench osu_allreduce --nosuch", "unrecognized arguments: --nosuch"),
        ("bench osu_iallreduce", "iallreduce: non-blocking calls are not measured: use allreduce"),
        ("bench osu_ibcast -m 4:8", "ibcast: non-blocking calls are not measured: use bcast"),
        ("bench compare --nosuch", "unrecognized arguments: --nosuch"),
        ("bench allreduce -n 4", "ranks are started with hpccomm-run -n 4 -m hpccomm"),
        ("train digits -n 4", "ranks are started with hpccomm-run -n 4 -m hpccomm"),
        ("tune -np4", "ranks are started with hpccomm-run -n 4 -m hpccomm"),
        ("bench latency", "exactly two processes: hpccomm-run -n 2"),
        ("bench allreduce -m 64:4", "there is no size from 64 to 4 bytes"),
        ("bench allreduce -i many", "give 1 or more"),
        ("bench allreduce --itterations 5", "did you mean --iterations?"),
        ("train", "missing: dataset (hpccomm train --help)"),
        ("train digits --epochs 0", "--epochs 0: give 1 or more"),
        ("train digits --lr fast", "--lr 'fast': give a number"),
        ("train digits --json {}/no/x.json", "name a file that can be written"),
        ("train digits --json /sys/x.json", "name a file that can be written"),
    ],
)
def test_a_wrong_turn_is_answered_in_one_line_with_the_cure(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no JSON")
    try:
        status = main(words.format(*[tmp_path] * 2).split())
    except SystemExit as end:
        status = int(end.code or 0)
    out, said = capsys.readouterr()
    assert status == 2
    assert sentence in said
    assert said.count("\n") == 1
    assert "Traceback" not in said + out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "missing: -n/-np/--np/--ranks"),
        ("-n 2", "pass the number of ranks, 1 or more, and a program: hpccomm-run -n 4 train.py"),
        ("-n 0 here.py", "pass the number of ranks, 1 or more, and a program: hpccomm-run -n 4 train.py"),
        ("-n two here.py", "give a whole number"),
        ("-n 2 --timelime x.json here.py", "did you mean --timeline?"),
        ("-n 2 nowhere.py", "nowhere.py does not exist in"),
        ("-n 2 notes.txt", "notes.txt is not executable: pass a script"),
        ("-n 2 nosuchprogram", "nosuchprogram is no command: pass a script"),
        ("-n 2 -m", "-m needs a module behind it"),
        ("-n 2 -m nosuchmodule.part", "has no module nosuchmodule: install it"),
        ("-n 2 --mpi-args=--x' here.py", "close the quotation marks"),
        ("-n 2 --timeline no/x.json here.py", "name a file in a folder that exists"),
        ("-n 2 --timeline . here.py", "name a file in a folder that exists"),
        ("-n 2 --timeline /proc/x.json here.py", "and that can be written"),
        ("-n 10000000 here.py", "ranks need more memory than the"),
        ("-n 2 -x NAME=1 here.py", "give mpirun its own flags with --mpi-args='-x …'"),
        ("-n 2 --hostfile hosts here.py", "give mpirun its own flags with --mpi-args='--hostfile …'"),
        ("-n 2 --bind-to core here.py", "give mpirun its own flags with --mpi-args='--bind-to …'"),
        ("--oversubscribe -n 2 here.py", "give mpirun its own flags with --mpi-args='--oversubscribe …'"),
    ],
)
def test_a_wrong_turn_at_the_launcher_is_answered_in_one_line_with_the_cure(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").touch()
    (tmp_path / "notes.txt").touch()
    try:
        status = launcher.main(words.split())
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr().err
    assert status == (1 if "memory" in sentence else 2)
    assert sentence in said
    assert said.count("\n") == 1


def test_programs_that_can_be_started_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "alone.py").touch()
    for program in (
        "-c pass",
        "-m own.part",
        "-m alone",
        "-m hpccomm info",
        "-m __main__",
        "alone.py",
        "hpccomm info",
        "sh x.sh",
    ):
        launcher.check_program(program.split())
    launcher.check_memory(64)


@pytest.mark.parametrize(("program", "status"), [("hostname", 0), ("-c pass", 1)])
def test_only_ranks_that_start_mpi_need_its_memory(program: str, status: int) -> None:
    assert launcher.main(["-n", "1000000", "--dry-run", *program.split()]) == status


def run_in_shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell in which ``hpccomm`` is the command of this tree."""
    shell = f'hpccomm() {{ "{sys.executable}" -m hpccomm "$@"; }}; set -o pipefail; {line}'
    env = {**os.environ, **environ}
    return subprocess.run(["bash", "-c", shell], check=False, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    "line", ["verify all --size 1:8", "--help", "bench allreduce -h", "plot ring --size 64", "info", "completion bash"]
)
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(line: str) -> None:
    done = run_in_shell(f"hpccomm {line} | (read -r first; echo read)", PYTHONUNBUFFERED="1")
    assert done.stdout == "read\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "environ"),
    [
        ("info", {"PYTHONIOENCODING": "ascii"}),
        ("info", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("train --help", {"PYTHONIOENCODING": "latin-1", "COLUMNS": "20"}),
        ("verify ring --size 1:4", {"COLUMNS": "0"}),
        ("plot ring --size 3", {"PYTHONIOENCODING": "ascii"}),
        ("info > /dev/null", {"HOME": "/nonexistent"}),
        ("verify ring --size 1:4 >&-", {}),
    ],
)
def test_a_command_works_on_any_terminal(line: str, environ: dict[str, str]) -> None:
    done = run_in_shell(f"hpccomm {line}", **environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("environ", "mark"),
    [({}, "\x1b[33m!\x1b[0m"), ({"NO_COLOR": "1"}, "! "), ({"encoding": "ascii"}, "\x1b[33mnote ")],
)
def test_doctor_has_colours_and_signs_only_where_they_are_wanted(
    environ: dict[str, str], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        encoding = environ.get("encoding", "utf-8")

        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in set(environ) - {"encoding"}:
        monkeypatch.setenv(name, environ[name])
    monkeypatch.setattr(sys, "stdout", Screen())
    said = doctor.line("user", "note", "root", "export it")
    assert said.startswith(mark)
    assert said.isascii() == ("encoding" in environ)


# --- Ctrl-C ----------------------------------------------------------------------------------------


def interrupt(process: Any, first_line: str) -> str:
    """Send Ctrl-C to a job once it has printed a line; the rest of its output."""
    for line in process.stdout:
        if first_line in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    try:
        return process.communicate(timeout=60)[0]
    finally:
        stop(process)


def test_ctrl_c_ends_all_ranks_without_a_traceback() -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = ["-m", "hpccomm", "bench", "allreduce", "-m", "4:8M", "-i", "1000000"]
    process = start(2, words, start_new_session=True, **pipes)
    said = interrupt(process, "# Size")
    assert process.returncode != 0
    assert "Traceback" not in said
    assert "MPI_ABORT" not in said.upper()


def interrupt_now(*args: Any, **named: Any) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("at", ["add_arguments", "run"])
def test_ctrl_c_ends_any_command_with_the_status_of_shells(
    name: str, at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"hpccomm.commands.{name}")
    monkeypatch.setattr(module, at, interrupt_now)
    if at == "run":
        monkeypatch.setattr(module, "add_arguments", lambda parser: None)
    assert main([name]) == 130
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_ends_the_launcher_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "launch_command", interrupt_now)
    assert launcher.main(["-n", "2", "-c", "pass"]) == 130
    assert capsys.readouterr() == ("", "")


# --- waiting ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_quiet_at_first_and_then_says_how_long_it_takes() -> None:
    now, out = [0.0], io.StringIO()
    progress = Progress("hpccomm bench", "size", 10, stream=out, clock=lambda: now[0])
    for done, at in enumerate([0, 1, 2.9, 4, 5, 13.9, 14, 60]):
        now[0] = at
        progress.show(done, f"step {done}")
    progress.close()
    assert out.getvalue().splitlines() == [
        "hpccomm bench: step 3, 4 s so far, about 9 s left",
        "hpccomm bench: step 6, 14 s so far, about 9 s left",
        "hpccomm bench: step 7, 60 s so far, about 26 s left",
    ]


def test_progress_of_a_resumed_run_takes_its_rate_from_its_own_steps() -> None:
    """50 steps of an earlier run, then 10 s to load it and one step every 2 s."""
    now, out = [0.0], io.StringIO()
    progress = Progress("hpccomm train", "step", 100, stream=out, clock=lambda: now[0])
    now[0] = 10.0
    progress.begin(51)
    for done in range(51, 58):
        progress.show(done, f"step {done} of 100")
        now[0] += 2.0
    assert out.getvalue().splitlines() == [
        "hpccomm train: step 51 of 100, 10 s so far",
        "hpccomm train: step 56 of 100, 20 s so far, about 88 s left",
    ]


def test_on_a_terminal_progress_is_one_line_that_disappears() -> None:
    now, out = [0.0], Terminal()
    progress = Progress("x", "size", 4, stream=out, clock=lambda: now[0])
    for done, at in ((0, 0.0), (1, 4.0), (2, 4.2), (3, 5.0)):
        now[0] = at
        progress.show(done, "y" * (4 - done))
    progress.close()
    first, second, clear = out.getvalue().split("\r")[1:4]
    assert first == "x: yyy, 4 s so far, about 12 s left"
    assert second == "x: y, 5 s so far, about 2 s left".ljust(len(first))
    assert not clear.strip()


def test_items_of_progress_are_those_given_and_a_short_command_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(show_progress([3, 1, 2], "x", "size", weigh=float)) == [3, 1, 2]
    assert list(show_progress([], "x", "size")) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "1 s"), (59, "59 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h")]
)
def test_seconds_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


@pytest.mark.parametrize(
    ("us", "words"),
    [
        (0.0, "0 us"),
        (0.125, "0.125 us"),
        (999.94, "999.9 us"),
        (1220.0, "1.22 ms"),
        (999_999.0, "1,000 ms"),
        (5e11, "500,000 s"),
    ],
)
def test_times_have_no_exponent(us: float, words: str) -> None:
    assert format_time(us).replace("1000 ms", "1,000 ms") == words


# --- completion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ([""], set(COMMANDS)),
        (["in"], {"info"}),
        (["info", "--"], {"--collective", "--json", "--help", "--live"}),
        (["info", "--collective", "all"], {"allreduce", "allgather", "alltoall"}),
        (["bench", "allr"], {"allreduce"}),
        (["bench", "osu_allreduce", "--js"], {"--json"}),
        (["bench", "allreduce", "-b", "8", "--iter"], {"--iters"}),
        (["bench", "allreduce", "--iter"], {"--iterations"}),
        (["bench", "mumble", "--x"], set()),
        (["nosuch", "x"], set()),
        ([], set(COMMANDS)),
    ],
)
def test_a_shell_is_told_which_words_may_follow(words: list[str], some: set[str]) -> None:
    assert set(complete_words(words)) == some


def test_every_flag_of_every_command_is_completed() -> None:
    for name in COMMANDS:
        assert "--help" in complete(command_parser(name), [name], "--h")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_gets_its_lines(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "hpccomm completion --words" in capsys.readouterr().out


def test_bash_completes() -> None:
    script = (
        f'eval "$({sys.executable} -m hpccomm completion bash)"\n'
        f'hpccomm() {{ {sys.executable} -m hpccomm "$@"; }}\n'
        "COMP_WORDS=(hpccomm info --) COMP_CWORD=2\n_hpccomm\necho ${COMPREPLY[*]}"
    )
    done = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["--collective", "--help", "--json", "--live"]


# --- what is said of times -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "how"),
    [
        (1024, "measured on"),
        (4096, "interpolated between sizes measured on"),
        (1 << 20, "measured on"),
        (1 << 28, "extrapolated from sizes up to 1,048,576 bytes measured on"),
        (4, "extrapolated from sizes from 1,024 bytes measured on"),
    ],
)
def test_a_computed_time_is_not_called_measured(nbytes: int, how: str) -> None:
    rows = [
        Row("allreduce", name, 1, 2, size, us * size / 1024)
        for name, us in (("native", 9.0), ("shared", 1.0))
        for size in (1024, 1 << 20)
    ]
    choice = Table(tuple(rows)).choose("allreduce", 1, 2, nbytes)
    assert choice.algorithm == "shared"
    assert choice.reason.startswith(how)


# --- resuming --------------------------------------------------------------------------------------


def train(tmp_path: Path, method: str, epochs: int, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["train", "digits", "--samples", "256", "--method", method, "--epochs", str(epochs), *more]
    return run_under_mpi(2, "-m", "hpccomm", *words, timeout=120)


def epochs_of(file: Path) -> list[tuple[float, float]]:
    return [(each["loss"], each["accuracy"]) for each in json.loads(file.read_text())["epochs"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dgc", "bmuf"])
def test_a_saved_run_goes_on_with_more_epochs_and_not_with_fewer(method: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "saved", tmp_path / "out.json"
    assert train(tmp_path, method, 2, "--checkpoint", str(folder)).returncode == 0
    done = train(tmp_path, method, 3, "--checkpoint", str(folder), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert len(epochs_of(out)) == 3
    fewer = train(tmp_path, method, 1, "--checkpoint", str(folder))
    assert fewer.returncode != 0
    assert "3 finished epochs: pass --epochs 3 or more" in fewer.stderr


@pytest.mark.slow
def test_a_resumed_dense_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    resumed, straight = tmp_path / "resumed.json", tmp_path / "straight.json"
    folder = str(tmp_path / "saved")
    assert train(tmp_path, "dense", 1, "--checkpoint", folder).returncode == 0
    assert train(tmp_path, "dense", 3, "--checkpoint", folder, "--json", str(resumed)).returncode == 0
    assert train(tmp_path, "dense", 3, "--json", str(straight)).returncode == 0
    assert epochs_of(resumed) == epochs_of(straight)
    words = ["train", "digits", "--epochs", "3", "--checkpoint", folder]
    done = run_under_mpi(2, "-m", "hpccomm", *words, timeout=120)
    assert done.returncode != 0
    assert "describes a run with samples 256, this command has no samples" in done.stderr


EAGER = """
import sys
from hpccomm.commands import progress
from hpccomm.__main__ import main

progress.QUIET_SECONDS = progress.LINE_SECONDS = 0.0
sys.exit(main(["bench", *sys.argv[1:]]))
"""


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("line", ["allreduce -m 4:16 -i 5", "all_reduce_perf -b 8 -e 32 -f 2 -n 5 -w 1"])
def test_rank_0_says_how_long_a_measurement_still_takes(line: str) -> None:
    done = run_under_mpi(2, "-c", EAGER, *line.split(), timeout=120)
    lines = [each for each in done.stderr.splitlines() if each.startswith("hpccomm bench: ")]
    assert done.returncode == 0, done.stderr
    assert len(lines) >= 3
    assert all("measured, " in each and "so far, about" in each for each in lines)
    assert lines[0].startswith(f"hpccomm bench: {line.split()[2].partition(':')[0]} B of mpi_float measured")
