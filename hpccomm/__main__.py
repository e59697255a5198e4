"""``hpccomm <command>``: a table of commands, of which only the selected one is imported."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import time
import zlib
from collections.abc import Sequence
from importlib import import_module

from hpccomm import HpccommError, __version__
from hpccomm.arguments import Parser, commands_of

COMMANDS = {
    "bench": "measure collectives and messages, in OSU's or nccl-tests' format",
    "train": "train a small network on real data and show what the exchange costs",
    "tune": "measure which algorithm is fastest on this machine, and save that for later jobs",
    "warm": "compile the functions of shared memory and probe the machine, so that programs start at once",
    "info": "show the software, ranks and devices found here, the settings in force, and which algorithms are used",
    "doctor": "check what a job needs on this machine, and say the cure for what is missing",
    "verify": "prove schedules correct for a range of sizes",
    "predict": "predict the time of every algorithm of a collective on a cluster of your choice",
    "plot": "print or draw a schedule, or draw benchmark results",
    "slurm": "write a job for Slurm from answers",
    "stacks": "print the calls and the Python stacks of all ranks of a running job",
    "report": "make a page of a trace: who waited for whom, time by collective, sizes",
    "completion": "print the lines that let a shell complete the commands",
}

MEASURING = ("bench", "train", "tune")
"""Commands that run what programs get in the end, so they wait until it is compiled."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
"""Variables in which launchers pass a process its rank."""
AGREEMENT_SECONDS = 10.0
"""Seconds within which all ranks reach the same error, on a loaded machine as well."""
RANK_0_SECONDS = 10.0
"""Seconds for which other ranks leave an error in the arguments to rank 0, whose exit ends them."""
INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def parser(chosen: str | None) -> argparse.ArgumentParser:
    """A parser with all commands in its help and the flags of the chosen one."""
    made = Parser(
        prog="hpccomm", description="Collectives on MPI: measured, proved, priced, drawn, and training that uses them."
    )
    made.add_argument("--version", action="version", version=f"hpccomm {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        added = commands.add_parser(name, help=summary, description=summary, add_help=name != "bench")
        if name == chosen:
            module = import_module(f"hpccomm.commands.{name}")
            module.add_arguments(added)
            added.set_defaults(run=module.run)
    return made


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; help and errors are printed once, by rank 0.

    The first rank that exits with an error ends the others.  Another rank with an error therefore waits for rank 0 to
    print it, and prints its own if rank 0 has none.
    """
    if all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES):
        return parse_words(words)
    with io.StringIO() as output:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
                return parse_words(words)
        except SystemExit as end:
            if end.code:
                time.sleep(RANK_0_SECONDS)
                sys.stderr.write(output.getvalue())
            raise


def parse_words(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; an error is that of the chosen command.  ``help bench`` is ``bench --help``."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    made = parser(next((word for word in words if not word.startswith("-")), None))
    args, unknown = made.parse_known_args(words)
    if unknown:
        commands_of(made)[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    status, sentence, prog = 1, "", "hpccomm"
    prepare_output()
    try:
        args = parse_arguments(list(sys.argv[1:] if argv is None else argv))
        prog = f"hpccomm {args.command}"
        if args.command in MEASURING:
            os.environ.setdefault("HPCCOMM_COMPILE", "wait")
        status = int(args.run(args))
        sys.stdout.flush()
    except (KeyboardInterrupt, EOFError):  # Ctrl-C, or Ctrl-D where a question was asked
        return leave_quietly()
    except BrokenPipeError:
        leave_reader()
    except (HpccommError, ImportError, RuntimeError, OSError, MemoryError) as error:
        status, sentence = getattr(error, "exit_status", 1), f"{prog}: {explain(error)}\n"
    except SystemExit:  # help, or an error in the arguments
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            leave_reader()
        raise
    if status and not exit_together(sentence):
        sys.stderr.write(sentence)
    return status


def prepare_output() -> None:
    """A character that cannot be encoded is written as an escape sequence; what is written to a closed stream is lost.

    Both would be errors in Python.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def leave_reader() -> None:
    """The reader, such as ``head``, has seen enough: what is left to write goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


CURES = {
    errno.ENOENT: "give the path of a file or folder that exists",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "give a folder, not a file",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
}
"""What to do about errors of the system."""


def explain(error: Exception) -> str:
    """The sentence of an error; raises an error that is not for users."""
    if isinstance(error, MemoryError):
        return f"{error or 'there is not enough memory'}: use fewer ranks or smaller sizes"
    if isinstance(error, OSError) and error.errno in CURES:
        return f"{error.filename or 'a file'}: {error.strerror}: {CURES[error.errno]}"
    if "mpi4py.MPI" not in sys.modules and not isinstance(error, HpccommError):
        from hpccomm.launcher import library

        try:
            library()
        except HpccommError as missing:
            return str(missing)
    if isinstance(error, HpccommError | ImportError):
        return str(error)
    raise error


def leave_quietly() -> int:
    """After Ctrl-C: a rank ends at once, as MPI would report that the others are gone."""
    sys.stdout.flush()
    module = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and module.COMM_WORLD.size > 1:
        os._exit(INTERRUPTED)
    return INTERRUPTED


def exit_together(sentence: str) -> bool:
    """If all ranks have the same error, rank 0 prints it and MPI is finalized; whether that was so."""
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized() or module.COMM_WORLD.size == 1:
        return False
    import numpy as np

    from hpccomm.transports.polling import await_request

    world = module.COMM_WORLD
    mine, all_of_them = np.array([zlib.crc32(sentence.encode())]), np.zeros(world.size, np.int64)
    if not await_request(world.Iallgather(mine.astype(np.int64), all_of_them), AGREEMENT_SECONDS):
        return False  # other ranks are elsewhere and must be ended
    if (all_of_them != all_of_them[0]).any():
        return False
    if world.rank == 0:
        sys.stderr.write(sentence)
        sys.stderr.flush()
    world.Barrier()
    module.Finalize()
    return True


if __name__ == "__main__":
    sys.exit(main())
