"""``hpccomm slurm init``: write a Slurm job from answers; on a terminal, ask for those that no flag gives."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpccomm.cluster.job_script import QUESTIONS, Answers, read_answers, write_script
from hpccomm.commands.files import check_folder
from hpccomm.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: one flag for each question."""
    parser.add_argument("action", choices=("init",), help="init: write a job")
    for name, question in QUESTIONS.items():
        usual = describe(getattr(Answers(), name))
        parser.add_argument(f"--{name}", metavar="X", help=f"{question.text} [{usual}]".replace("%", "%%"))
    parser.add_argument("--out", type=Path, default=Path("job.sbatch"), metavar="FILE", help="default job.sbatch")
    parser.add_argument("--force", action="store_true", help="write over a file that exists")


def run(args: argparse.Namespace) -> int:
    """Ask, check, write."""
    check_folder("--out", args.out)
    if args.out.exists() and not args.force:
        raise ArgumentError(f"--out {args.out} exists: name another file, or add --force")
    given = {name: value for name in QUESTIONS if (value := getattr(args, name)) is not None}
    if sys.stdin.isatty():
        given |= ask([name for name in QUESTIONS if name not in given])
    script = write_script(read_answers(given))
    args.out.write_text(script, encoding="utf-8")
    print(f"wrote {args.out}: sbatch {args.out}")
    return 0


def ask(names: list[str]) -> dict[str, str]:
    """Ask for answers, again where one is wrong; an empty line takes the usual one."""
    found = {}
    for name in names:
        question, usual = QUESTIONS[name], describe(getattr(Answers(), name))
        while True:
            text = input(f"{question.text} [{usual}]: ").strip() or usual
            if question.check(text):
                break
            print(question.remedy)
        found[name] = text
    return found


def describe(value: object) -> str:
    """A usual answer as text."""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
