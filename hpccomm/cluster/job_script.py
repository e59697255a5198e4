"""A Slurm job from answers: nodes, GPUs and their network ports, modules, a container, an array, requeueing.

The script is plain bash that a site's people can read and change; it needs nothing of hpccomm but the program.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

from hpccomm.errors import ArgumentError


class Answers(NamedTuple):
    """What the job needs; empty text and 0 stand for *not at all*."""

    program: str = "train.py"
    name: str = "hpccomm"
    nodes: int = 2
    ranks: int = 4
    """On a node."""
    cpus: int = 1
    """For a rank."""
    time: str = "01:00:00"
    partition: str = ""
    account: str = ""
    gpus: int = 0
    """On a node."""
    ports: str = ""
    """The network devices of a node, in the order of its GPUs: ``mlx5_0,mlx5_1``."""
    modules: str = ""
    environment: str = ""
    """The folder of a Python environment to activate."""
    container: str = ""
    """An Apptainer image."""
    array: str = ""
    """The tasks of an array: ``0-9``, ``0-9%2``."""
    requeue: bool = False
    launcher: str = "run"
    """``run`` (hpccomm-run), or what ``srun --mpi=`` takes: ``pmix``, ``pmi2``."""


class Question(NamedTuple):
    """One answer, asked on a terminal or given by a flag."""

    text: str
    check: Callable[[str], bool]
    remedy: str


def is_count(text: str) -> bool:
    """A number from 1."""
    return text.isdigit() and int(text) >= 1


def is_count_or_none(text: str) -> bool:
    """A number from 0."""
    return text.isdigit()


def fits(pattern: str) -> Callable[[str], bool]:
    """Whether a text is of a form."""
    return lambda text: re.fullmatch(pattern, text) is not None


WORD, ANYTHING = r"[\w.@+-]*", r"[^\n]*"
LAUNCHERS = "run|pmix|pmi2|pmix_v[0-9]"
QUESTIONS = {
    "program": Question("the Python program and its arguments", fits(r"\S[^\n]*"), "give a program, such as train.py"),
    "name": Question("name of the job", fits(r"[\w.-]+"), "use letters, digits, . _ -"),
    "nodes": Question("number of nodes", is_count, "give 1 or more"),
    "ranks": Question("ranks on a node", is_count, "give 1 or more"),
    "cpus": Question("cores of a rank", is_count, "give 1 or more"),
    "time": Question("time limit", fits(r"(\d+-)?\d+(:\d\d){0,2}"), "write 30, 01:30:00 or 2-00:00:00"),
    "partition": Question("partition (empty: the site's default)", fits(r"[\w.,-]*"), "give names of partitions"),
    "account": Question("account (empty: yours)", fits(WORD), "give the name of an account"),
    "gpus": Question("GPUs on a node", is_count_or_none, "give 0 or more"),
    "ports": Question(
        "network devices in the order of the GPUs (mlx5_0,mlx5_1; empty: MPI decides)",
        fits(r"[\w,]*"),
        "give names, with commas",
    ),
    "modules": Question("modules to load (empty: none)", fits(r"[\w./+ -]*"), "give names of modules, with spaces"),
    "environment": Question("folder of a Python environment (empty: none)", fits(ANYTHING), "give a folder"),
    "container": Question("Apptainer image (empty: none)", fits(ANYTHING), "give the path of an image"),
    "array": Question(
        "array tasks (0-9, 0-9%2; empty: no array)", fits(r"([\d,-]+(:\d+)?(%\d+)?)?"), "write 0-9 or 0-9%2"
    ),
    "requeue": Question("queue again at the time limit, from a checkpoint (yes, no)", fits("yes|no"), "say yes or no"),
    "launcher": Question("launcher: run (hpccomm-run), pmix or pmi2 (srun)", fits(LAUNCHERS), "use run, pmix or pmi2"),
}
"""In the order of asking; the names are those of :class:`Answers`."""


def read_answers(given: dict[str, str]) -> Answers:
    """Check texts and make answers of them; raises ArgumentError with the remedy for the first wrong one."""
    found: dict[str, object] = {}
    for name, text in given.items():
        question, usual = QUESTIONS[name], getattr(Answers(), name)
        if not question.check(text):
            raise ArgumentError(f"--{name} {text!r}: {question.remedy}")
        found[name] = text == "yes" if isinstance(usual, bool) else type(usual)(text)
    answers = Answers(**found)  # type: ignore[arg-type]
    if answers.gpus and answers.ranks % answers.gpus:
        raise ArgumentError(
            f"--ranks {answers.ranks} --gpus {answers.gpus}: give as many ranks on a node as GPUs, or a multiple"
        )
    return answers


def write_script(answers: Answers) -> str:
    """The job."""
    parts = [header(answers), surroundings(answers), binding(answers), launching(answers), ending(answers)]
    return "\n".join("\n".join(part) + "\n" for part in parts if part)


def header(a: Answers) -> list[str]:
    """What Slurm reads."""
    flags = {
        "job-name": a.name,
        "nodes": a.nodes,
        "ntasks-per-node": a.ranks,
        "cpus-per-task": a.cpus,
        "time": a.time,
        "partition": a.partition,
        "account": a.account,
        "gpus-per-node": a.gpus,
        "array": a.array,
        "output": "%x-%A_%a.out" if a.array else "%x-%j.out",
    }
    lines = ["#!/bin/bash", "# Written by `hpccomm slurm init`; submit it with sbatch."]
    lines += [f"#SBATCH --{name}={value}" for name, value in flags.items() if value]
    if a.requeue:
        lines += ["#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --open-mode=append"]
    return lines


def surroundings(a: Answers) -> list[str]:
    """Modules, environment, threads."""
    lines = ["set -euo pipefail"]
    if a.modules:
        lines += ["module purge", f"module load {a.modules}"]
    if a.environment:
        lines.append(f"source {shlex.quote(a.environment)}/bin/activate")
    lines.append("export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK")
    if a.array:
        lines.append("# the task's number for the program: $SLURM_ARRAY_TASK_ID")
    return lines


LOCAL_RANK = "${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${SLURM_LOCALID:-0}}}"


def binding(a: Answers) -> list[str]:
    """Each rank sees its GPU, and the network device beside it."""
    settings = []
    if a.gpus:
        settings.append(f"export CUDA_VISIBLE_DEVICES=$((local % {a.gpus}))")
    if a.ports:
        ports = a.ports.split(",")
        settings += [f"ports=({' '.join(ports)})", f'export UCX_NET_DEVICES="${{ports[local % {len(ports)}]}}:1"']
    if not settings:
        return []
    inner = "; ".join([f"local={LOCAL_RANK}", *settings, 'exec "$@"'])
    return [
        "# each rank sees its own GPU and the network device beside it",
        "# shellcheck disable=SC2016 # the ranks expand it",
        f"bind=(bash -c {shlex.quote(inner)} rank)",
    ]


def launching(a: Answers) -> list[str]:
    """The line that starts the ranks."""
    python = ["python", "-m", "mpi4py"]
    inside = ["apptainer", "exec", *(["--nv"] if a.gpus else []), a.container] if a.container else []
    start = ["hpccomm-run", "-n", '"$SLURM_NTASKS"'] if a.launcher == "run" else ["srun", f"--mpi={a.launcher}"]
    bound = ['"${bind[@]}"'] if a.gpus or a.ports else []
    command = " ".join([*start, *bound, *map(shlex.quote, inside), *python, a.program])
    if not a.requeue:
        return [command]
    return [
        "# two minutes before the limit the ranks get USR1: the program saves, and the job is queued again",
        f"{command} &",
        "child=$!",
        "trap 'signalled=yes; kill -USR1 \"$child\"' USR1",
        "status=0",
        'while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done',
    ]


def ending(a: Answers) -> list[str]:
    """What follows the program."""
    if not a.requeue:
        return []
    return ['[ -z "${signalled:-}" ] || scontrol requeue "$SLURM_JOB_ID"', 'exit "$status"']
