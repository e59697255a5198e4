"""``hpccomm train DATASET``: a real training job, with what each step costs in time and bytes.

Only rank 0 prints, and every line is one write.  Every rank computes with one thread unless
``OMP_NUM_THREADS`` says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hpccomm.errors import ArgumentError, HpccommError
from hpccomm.train.methods import METHODS, MethodSetup

if TYPE_CHECKING:
    from hpccomm.communicator import Communicator
    from hpccomm.train.datasets import Dataset
    from hpccomm.train.kept import Folder
    from hpccomm.train.loop import Epoch, Settings

FolderType = TypeVar("FolderType", bound="Folder")

SUMMARY = "train a small network on real data and show what the exchange costs"


SHARDED = {
    "mics": "MiCS, model states divided over --partition-size ranks",
    "zero1": "ZeRO, optimizer state divided over all ranks",
    "zero2": "gradients too",
    "zero3": "parameters too",
    "ddp": "nothing divided",
}
"""Methods of :mod:`hpccomm.train.sharded`, all by the same code."""
DTYPES = ("float32", "float16", "bfloat16")


class Job(NamedTuple):
    """What a dataset takes when nothing is said."""

    epochs: int
    batch_size: int
    limit: int | None
    summary: str


DEEP = Job(1, 256, 20_000, "")
"""What the deep network takes instead."""

JOBS = {
    "digits": Job(20, 64, None, "1797 handwritten digits (scikit-learn), perceptron 64-64-10"),
    "stdlib": Job(3, 256, 200_000, "the text of Python's standard library, next character from 16"),
}

COLUMNS = (
    f"{'Loss':>10}{'Accuracy':>10}{'Compute(s)':>12}{'Exchange(s)':>13}{'Step(s)':>9}"
    f"{'Bytes/step':>12}{'Dense/sent':>12}\n"
)
HEADER = f"# {'Epoch':>5}{COLUMNS}"
TABLE = f"# {'Method':<12}{COLUMNS}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; names are checked in :func:`run`, so that one rank speaks for all."""
    datasets = "; ".join(f"{name}: {job.summary}" for name, job in JOBS.items())
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    deep = "; ".join(f"{name}: {summary}" for name, summary in SHARDED.items())
    parser.add_argument("dataset", help=datasets)
    parser.add_argument(
        "--method",
        default="dense",
        help=f"{methods}; all: one table of all these (default: dense); and on a deep network for text: {deep}",
    )
    parser.add_argument("--epochs", type=int, help="passes through the data")
    parser.add_argument("--batch-size", type=int, help="samples of a step, over all ranks")
    parser.add_argument("--samples", type=int, help="use at most so many training samples")
    parser.add_argument("--lr", type=float, help="learning rate (default: the method's)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--algorithm", default="auto", help="of the allreduce (default: auto)")
    parser.add_argument(
        "--period", type=int, default=16, help="steps of a block, where a method has blocks (default: 16)"
    )
    parser.add_argument("--group-size", type=int, help="ranks of a group of the hybrid (default: a node's)")
    parser.add_argument(
        "--density", type=float, default=0.01, help="share of the elements gtc and dgc send (default: 0.01)"
    )
    parser.add_argument("--servers", type=int, default=1, help="ranks that serve, for ps (default: 1)")
    parser.add_argument(
        "--mode", default="bsp", help="of ps: bsp, asp, or ssp:S for workers up to S steps ahead (default: bsp)"
    )
    group = parser.add_argument_group("the deep network", f"of {', '.join(SHARDED)}")
    group.add_argument("--partition-size", type=int, metavar="P", help="ranks that share a copy (default: a node's)")
    group.add_argument("--micro-steps", type=int, default=1, metavar="S", help="parts of a rank's batch (default: 1)")
    group.add_argument("--width", type=int, default=1024, help="of its layers (default: 1024)")
    group.add_argument("--layers", type=int, default=10, help="inner ones (default: 10, about 11 M parameters)")
    group.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of gathered weights and gradients (default: float32)"
    )
    group.add_argument("--export", type=Path, metavar="FILE", help="write the whole model there in the end (npz)")
    parser.add_argument("--device", default="cpu", help="who computes: cpu, or cuda by CuPy (default: cpu)")
    parser.add_argument("--progress", action="store_true", help="show a bar under a launcher too (tqdm, stderr)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss against bytes and time (png, svg or pdf)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="save there after every epoch, and on SIGUSR1, which ends the run; the same command goes on from it",
    )


def run(args: argparse.Namespace) -> int:
    """Train on all ranks; 0, or 2 after an error of the command line."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its BLAS, whose threads would fight over cores
    from hpccomm.functional import communicator

    comm = communicator()
    try:
        check(args, comm)
        data = load_data(args, comm)
    except HpccommError as error:
        print_on_root(comm, f"hpccomm train: {error}\n", sys.stderr)
        return 2
    methods = [name for name in METHODS if name != "ps" or comm.size > 1] if args.method == "all" else [args.method]
    runs: list[dict[str, Any]] = []
    for name in methods:
        found = (train_sharded if name in SHARDED else train_method)(name, args, data, comm)
        if found is None:
            return 0
        runs.append(found)
    if len(runs) > 1:
        print_on_root(comm, "\n" + TABLE + "".join(row(each["method"], each["epochs"]) for each in runs))
    if args.json and comm.rank == 0:
        args.json.write_text(json.dumps({"runs": runs} if args.method == "all" else runs[0], indent=1) + "\n")
    if args.plot and comm.rank == 0:
        from hpccomm.train.figure import draw

        draw(runs, args.plot)
    return 0


def check(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise, on every rank alike, for arguments that cannot be used, and fill in what was left out."""
    check_choice("dataset", args.dataset, JOBS)
    check_choice("--method", args.method, (*METHODS, "all", *SHARDED))
    check_choice("--algorithm", args.algorithm, comm.algorithms("allreduce"))
    job = DEEP if args.method in SHARDED else JOBS[args.dataset]
    args.epochs = job.epochs if args.epochs is None else args.epochs
    args.batch_size = job.batch_size if args.batch_size is None else args.batch_size
    args.samples = job.limit if args.samples is None else args.samples
    for flag, least in MINIMUMS.items():
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ArgumentError(f"--{flag.replace('_', '-')} {value}: give {least} or more")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise ArgumentError(f"--lr {args.lr}: give a positive number")
    if not 0 < args.density <= 1:
        raise ArgumentError(f"--density {args.density}: give a share above 0, at most 1")
    if args.method == "ps" and not 1 <= args.servers < comm.size:
        raise ArgumentError(f"--servers {args.servers} of {comm.size} ranks: leave at least one server and one worker")
    mode_of(args.mode)
    if args.method in ("hybrid", "all") and args.group_size and comm.size % args.group_size:
        raise ArgumentError(f"--group-size {args.group_size} does not divide {comm.size} ranks: give a divisor")
    if args.method in SHARDED and args.dataset != "stdlib":
        raise ArgumentError(f"--method {args.method} trains a deep network on text: name the dataset stdlib")
    if args.method == "mics":
        from hpccomm.algorithms.sharded.groups import check_placement, ranks_per_node

        nodes = comm.layout.nodes
        check_placement("--partition-size", nodes, args.partition_size or ranks_per_node(comm.rank, nodes))
    if args.export and args.method not in SHARDED:
        raise ArgumentError(f"--export with --method {args.method}: it is for {', '.join(SHARDED)}")
    if args.checkpoint and args.method in ("ps", "all"):
        raise ArgumentError(f"--checkpoint with --method {args.method}: servers are not saved: name another method")
    check_device(args, comm)
    check_file("--json", args.json, comm)
    run_on_root(lambda: check_folder("--export", args.export), comm)
    if args.plot:
        from hpccomm.train.figure import check_drawable

        run_on_root(lambda: check_drawable(args.plot), comm)
    check_file("--plot", args.plot, comm)


def check_device(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise on all ranks for what cannot be trained on a device, or where one of them has none; else take one each."""
    check_choice("--device", args.device, ("cpu", "cuda"))
    if args.device == "cpu":
        return
    from hpccomm.transports.cuda import claim_device

    able = [name for name, method in METHODS.items() if not method.steps_locally and name != "ps"]
    if args.method not in able:
        why = f"--device cuda with --method {args.method}: its models are the host's"
        raise ArgumentError(f"{why}: use {', '.join(able)}")
    if args.checkpoint:
        raise ArgumentError(
            "--checkpoint with --device cuda: what lies on a device is not saved: leave one of them out"
        )
    claim_device(comm, "--device cuda", "use --device cpu")


MINIMUMS = dict.fromkeys(("epochs", "batch_size", "samples", "period", "group_size", "partition_size"), 1)
MINIMUMS |= {"seed": 0, "micro_steps": 1, "width": 1, "layers": 0}
"""The smallest value of an argument."""


def mode_of(given: str) -> Any:
    """``bsp``, ``asp``, or ``ssp:3`` as the parameter server says it."""
    kind, _, slack = given.partition(":")
    if given in ("bsp", "asp"):
        return given
    if kind == "ssp" and slack.isdigit():
        return ("ssp", int(slack))
    raise ArgumentError(f"--mode {given}: use bsp, asp, or ssp:3 for workers up to 3 steps ahead")


def check_choice(what: str, value: str, known: Any) -> None:
    """Raise for a name that is not known."""
    if value not in known:
        raise ArgumentError(f"{what} {value!r} is not known: use one of {', '.join(known)}")


def check_file(flag: str, file: Path | None, comm: Communicator) -> None:
    """Raise on all ranks where rank 0 cannot write the results, before the work and not after it."""

    def opened() -> None:
        try:
            if file:
                file.open("a").close()
        except OSError as error:
            raise ArgumentError(f"{flag} {file}: {error.strerror}: name a file that can be written") from None

    run_on_root(opened, comm)


def check_folder(flag: str, file: Path | None) -> None:
    """Raise for a file in a folder that is not there."""
    if file and not file.parent.is_dir():
        raise ArgumentError(f"{flag} {file}: there is no folder {file.parent}: name a file that can be written")


def run_on_root(action: Callable[[], Any], comm: Communicator) -> Any:
    """What ``action`` gives on rank 0, on all ranks; what it raises there is raised on all."""
    found: Any = None
    if comm.rank == 0:
        try:
            found = action()
        except HpccommError as error:
            found = error
    found = comm.bcast(found)
    if isinstance(found, HpccommError):
        raise found
    return found


def load_data(args: argparse.Namespace, comm: Communicator) -> Dataset:
    """Rank 0's copy of the data on all ranks: nodes may carry other versions of it."""
    from hpccomm.train.datasets import DATASETS

    data: Dataset = run_on_root(lambda: DATASETS[args.dataset](args.samples), comm)
    return data


STOPPED_MESSAGE = "# stopped in epoch {} and saved: the same command goes on from there\n"


def train_method(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> dict[str, Any] | None:
    """One method's run: the object for ``--json``; None where it was told to stop."""
    from hpccomm.algorithms.device import run_on_host
    from hpccomm.buckets import Bucket
    from hpccomm.train.kept import Folder
    from hpccomm.train.loop import Servers, Settings, count_steps, train, train_by_servers
    from hpccomm.train.networks import network_for

    method, network = METHODS[name], network_for(data)
    library = import_module("cupy" if args.device == "cuda" else "numpy")
    settings = Settings(args.epochs, args.batch_size, args.seed, method.steps_locally, library)
    lr = method.lr if args.lr is None else args.lr
    print_on_root(comm, headline(name, lr, args, comm) + HEADER)
    bar = progress_bar(comm, len(data.targets), settings, args.progress)

    def tell(epoch: Epoch) -> None:
        bar.clear()
        print_on_root(comm, line(f"{epoch.epoch:>7}", epoch))

    steps = count_steps(len(data.targets), settings)
    plan = MethodSetup(
        comm, Bucket(network.shapes), lr, steps, args.algorithm, args.period, args.group_size, args.density
    )
    made = method.make(plan)
    if args.device == "cuda" and not method.on_device:
        made = run_on_host(made)
    if name == "ps":
        served = Servers(args.servers, mode_of(args.mode))
        epochs = train_by_servers(comm, data, network, made, settings, served, on_step=bar.update)[1]
        for each in epochs:
            tell(each)
    else:
        run = {"method": name, "ranks": comm.size, "lr": lr, **{key: getattr(args, key) for key in RUN_ARGUMENTS}}
        with keeper_for(Folder, name, run, args, comm) as keeper:
            epochs = train(comm, data, network, made, settings, on_step=bar.update, on_epoch=tell, keeper=keeper)[1]
    bar.close()
    if len(epochs) < args.epochs:
        print_on_root(comm, STOPPED_MESSAGE.format(len(epochs) + 1))
        return None
    return record(name, args, comm, steps, epochs)


def train_sharded(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> dict[str, Any] | None:
    """As :func:`train_method`, with divided model states."""
    from hpccomm.train import sharded
    from hpccomm.train.kept import ShardFolder
    from hpccomm.train.layered import deep_network_for
    from hpccomm.train.loop import Settings, count_steps

    network, settings = (
        deep_network_for(data, args.width, args.layers),
        Settings(args.epochs, args.batch_size, args.seed),
    )
    job = sharded.Job(name, args.lr or DEEP_LR, args.partition_size, args.micro_steps, args.dtype)
    states = sharded.states_for(comm, network, settings, job)
    training = sharded.Training(comm, data, network, states, settings, args.micro_steps)
    print_on_root(comm, deep_headline(job, training, args) + HEADER)
    bar = progress_bar(comm, len(data.targets), settings, args.progress)

    def tell(epoch: Epoch) -> None:
        bar.clear()
        print_on_root(comm, line(f"{epoch.epoch:>7}", epoch))

    run = {"method": name, "lr": job.lr, **{key: getattr(args, key) for key in (*DEEP_ARGUMENTS, *RUN_ARGUMENTS[:5])}}
    with keeper_for(ShardFolder, name, run, args, comm) as keeper:
        epochs = sharded.train(training, on_step=bar.update, on_epoch=tell, keeper=keeper)
    bar.close()
    if len(epochs) < args.epochs:
        print_on_root(comm, STOPPED_MESSAGE.format(len(epochs) + 1))
        return None
    spent = sharded.account(training)
    hops = ", ".join(f"{hop} {each:,}" for hop, each in spent["hops"].items())
    print_on_root(comm, f"# bytes of a rank in a step, at most: {hops}\n")
    if args.export:
        from hpccomm.algorithms.sharded.checkpoints import export

        export(args.export, states)
    states.close()
    return {
        **record(name, args, comm, count_steps(len(data.targets), settings), epochs),
        **spent,
        "deep": job._asdict(),
    }


def deep_headline(job: Any, training: Any, args: argparse.Namespace) -> str:
    """What is trained, how it is divided, and what that takes on rank 0."""
    states, parameters = training.states, training.network.parameters
    memory = states.memory
    return (
        f"# hpccomm train {args.dataset}: {job.division}, lr {job.lr:g}, batch {args.batch_size} over "
        f"{training.comm.size} ranks in {job.micro_steps} micro-steps, seed {args.seed}, {job.dtype}\n"
        f"# {parameters:,} parameters; a copy on {states.ranks} ranks, stage {states.stage}; bytes of rank 0: "
        f"states {memory.states:,} ({memory.states / parameters:.2f} a parameter), gathered {memory.parameters:,}, "
        f"working {memory.workspace:,}\n"
    )


def record(name: str, args: argparse.Namespace, comm: Communicator, steps: int, epochs: list[Epoch]) -> dict[str, Any]:
    """The object for ``--json``."""
    return {
        "dataset": args.dataset,
        "method": name,
        "ranks": comm.size,
        "seed": args.seed,
        "steps_an_epoch": steps // args.epochs,
        "command": shlex.join(["hpccomm", *sys.argv[1:]]),
        "epochs": [epoch._asdict() for epoch in epochs],
    }


DEEP_LR = 0.001
DEEP_ARGUMENTS = ("width", "layers", "dtype", "micro_steps")
RUN_ARGUMENTS = ("dataset", "epochs", "batch_size", "samples", "seed", "algorithm", "period", "group_size", "density")
"""Arguments that a run goes on with."""


@contextlib.contextmanager
def keeper_for(
    kind: type[FolderType], name: str, run: dict[str, Any], args: argparse.Namespace, comm: Communicator
) -> Iterator[FolderType | None]:
    """Who saves the run, and hears of SIGUSR1."""
    if args.checkpoint is None:
        yield None
        return
    folder = kind(comm, args.checkpoint, f"{args.dataset}-{name}", run)
    before = signal.signal(signal.SIGUSR1, folder.request_stop)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


def headline(name: str, lr: float, args: argparse.Namespace, comm: Communicator) -> str:
    """What is trained, and how."""
    return (
        f"# hpccomm train {args.dataset}: {name}, lr {lr:g}, batch {args.batch_size} over {comm.size} ranks, "
        f"seed {args.seed}, allreduce {args.algorithm}{', on ' + args.device if args.device != 'cpu' else ''}\n"
    )


def line(first: str, epoch: Epoch) -> str:
    """One epoch, or the sum of a run."""
    ratio = "-" if epoch.ratio is None else f"{epoch.ratio:.2f}"
    return (
        f"{first}{epoch.loss:>10.4f}{epoch.accuracy:>10.2%}{epoch.compute_s:>12.3f}"
        f"{epoch.communication_s:>13.3f}{epoch.step_s:>9.3f}{epoch.wire_bytes:>12}{ratio:>12}\n"
    )


def row(name: str, epochs: list[dict[str, Any]]) -> str:
    """A run: the last epoch's loss and accuracy, the times of all, the bytes of a mean step."""
    from hpccomm.train.loop import Epoch

    times = {key: sum(each[key] for each in epochs) for key in ("compute_s", "communication_s", "step_s")}
    sent, last = sum(each["wire_bytes"] for each in epochs) // len(epochs), epochs[-1]
    ratio = last["ratio"] * last["wire_bytes"] / sent if sent and last["ratio"] else None
    return line(f"  {name:<12}", Epoch(**last)._replace(**times, wire_bytes=sent, ratio=ratio))


class NoBar:
    """A progress bar for whoever looks at no terminal."""

    def update(self) -> object:
        """One step is done."""

    def clear(self) -> object:
        """Make room for a line of text."""

    def close(self) -> object:
        """All steps are done."""


def progress_bar(comm: Communicator, samples: int, settings: Settings, wanted: bool) -> NoBar:
    """A bar on rank 0's terminal, or where ``wanted``: most launchers hide the terminal.  Needs tqdm."""
    from hpccomm.train.loop import count_steps

    if comm.rank or not (wanted or sys.stderr.isatty()):
        return NoBar()
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return NoBar()
    bar: NoBar = tqdm(total=count_steps(samples, settings), unit="step", leave=False, file=sys.stderr)
    return bar


def print_on_root(comm: Communicator, text: str, stream: Any = None) -> None:
    """Rank 0 writes, at once."""
    if comm.rank == 0:
        stream = stream or sys.stdout
        stream.write(text)
        stream.flush()
