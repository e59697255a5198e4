"""``hpccomm train DATASET``: a real training job that reports what each step costs in time and bytes.

Only rank 0 prints, and every line is one write.  Every rank computes with one thread unless ``OMP_NUM_THREADS`` is
set.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hpccomm.arguments import flag_of, unknown_name
from hpccomm.commands.files import check_file, check_folder, run_on_root
from hpccomm.commands.progress import Progress
from hpccomm.errors import ArgumentError, HpccommError
from hpccomm.performance.units import format_count, format_size
from hpccomm.train.methods import FLAGS, METHODS, Method, MethodSetup, find_methods, find_users, parse_mode

if TYPE_CHECKING:
    from hpccomm.communicator import Communicator
    from hpccomm.train.checkpointing import Folder
    from hpccomm.train.datasets import Dataset
    from hpccomm.train.loop import Epoch, Settings

FolderType = TypeVar("FolderType", bound="Folder")


class Job(NamedTuple):
    """Default size of a training run."""

    epochs: int
    batch_size: int
    limit: int | None
    summary: str


DEEP = Job(1, 256, 20_000, "")
"""Default size where a sharded model is trained."""

JOBS = {
    "digits": Job(20, 64, None, "1797 handwritten digits from scikit-learn, perceptron 64-64-10"),
    "stdlib": Job(
        3, 256, 200_000, "the source text of Python's standard library, predicting a character from the 16 before it"
    ),
}

TORCH_JOBS = {("torch", "digits"): Job(5, 64, None, ""), ("torch", "stdlib"): DEEP}
"""Default size by framework and dataset, where it is not that of the dataset."""


class Framework(NamedTuple):
    """What makes the networks."""

    module: str
    """The module that has ``network_for``."""
    rate: float
    """Default learning rates by those of the methods: ResNet-20 learns the digits at a fifth, hardly at the whole."""


FRAMEWORKS = {
    "numpy": Framework("hpccomm.train.networks", 1.0),
    "torch": Framework("hpccomm.train.torch_networks", 0.2),
}

COLUMNS = (
    f"{'Loss':>10}{'Accuracy':>10}{'Compute(s)':>12}{'Exchange(s)':>13}{'Step(s)':>9}"
    f"{'Bytes/step':>12}{'Dense/sent':>12}\n"
)
HEADER = f"# {'Epoch':>5}{COLUMNS}"
TABLE = f"# {'Method':<12}{COLUMNS}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; names are checked in :func:`run`, so that only rank 0 reports a mistake."""
    datasets = "; ".join(f"{name}: {job.summary}" for name, job in JOBS.items())
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    add = parser.add_argument
    add("dataset", help=datasets)
    add(
        "--method",
        default="dense",
        help=f"{methods}; all: every method but {', '.join(find_methods('shards'))}, in one table (default: dense)",
    )
    add("--epochs", type=int, help="passes through the data")
    add("--batch-size", type=int, help="samples of a step, over all ranks")
    add("--samples", type=int, help="number of training samples to use, at most")
    add("--lr", type=float, help="learning rate (default: the method's)")
    add("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add("--algorithm", default="auto", help="algorithm of dense allreduces (default: auto)")
    add_method_flags(parser)
    add("--device", default="cpu", help="where to compute: cpu, or cuda with CuPy (default: cpu)")
    add(
        "--framework",
        default="numpy",
        help="numpy: small networks of its own; torch: ResNet-20 for digits, a GPT of six layers for stdlib "
        "(default: numpy)",
    )
    add("--progress", action="store_true", help="show how far the run is even if stderr is no terminal")
    add("--json", type=Path, metavar="FILE", help="write the results into this file")
    add("--plot", type=Path, metavar="FILE", help="draw loss against bytes and time (png, svg or pdf)")
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="save the run in this folder after every epoch, and on SIGUSR1, which also ends the run; "
        "the same command resumes it, also with more --epochs",
    )
    add(
        "--export",
        type=Path,
        metavar="FILE",
        help=f"write the whole model into this npz file at the end; with {', '.join(find_methods('shards'))}",
    )


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that some methods take."""
    sharded = find_methods("shards")
    group = parser.add_argument_group("sharded models", f"a deep network for text, with {', '.join(sharded)}")
    for name, flag in FLAGS.items():
        users, default = find_users(name), flag.default if flag.unset == "" else flag.unset
        (group if set(users) <= set(sharded) else parser).add_argument(
            flag_of(name),
            type=flag.type,
            default=flag.default,
            metavar=flag.metavar,
            choices=flag.choices,
            help=f"{flag.summary}{'' if users == sharded else '; with ' + ', '.join(users)} (default: {default})",
        )


def run(args: argparse.Namespace) -> int:
    """Train on all ranks; returns 0, or the status of an error before the first step."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy loads its BLAS, whose threads would fight over cores
    from hpccomm.functional import communicator

    comm = communicator()
    try:
        methods = check(args, comm)
        data = load_data(args, comm)
    except HpccommError as error:
        print_on_root(comm, f"hpccomm train: {error}\n", sys.stderr)
        return error.exit_status
    runs: list[dict[str, Any]] = []
    for name in methods:
        result = LOOPS[METHODS[name].loop](name, args, data, comm)
        if result is None:
            return 0
        runs.append(result)
    if len(runs) > 1:
        print_on_root(comm, "\n" + TABLE + "".join(row(each["method"], each["epochs"]) for each in runs))
    if args.json and comm.rank == 0:
        args.json.write_text(json.dumps({"runs": runs} if args.method == "all" else runs[0], indent=1) + "\n")
    if args.plot and comm.rank == 0:
        from hpccomm.train.figure import draw

        draw(runs, args.plot)
    return 0


def check(args: argparse.Namespace, comm: Communicator) -> list[str]:
    """The methods to train with; raises, on every rank alike, for arguments that cannot be used.

    Fills in the defaults that depend on dataset and method.
    """
    check_choice("dataset", args.dataset, JOBS)
    check_choice("--method", args.method, (*METHODS, "all"))
    check_choice("--algorithm", args.algorithm, comm.algorithms("allreduce"))
    methods = [args.method]
    if args.method == "all":
        methods = find_methods("replicas", "servers") if comm.size > 1 else find_methods("replicas")
    sharded = METHODS[methods[0]].loop == "shards"
    check_framework(args, sharded)
    fill_in(args, DEEP if sharded else TORCH_JOBS.get((args.framework, args.dataset), JOBS[args.dataset]))
    check_values(args)
    if sharded and args.dataset != "stdlib":
        raise ArgumentError(f"--method {args.method} trains a deep network on text: use the dataset stdlib")
    for name in methods:
        METHODS[name].check(comm, args)
    if args.export and not sharded:
        users = ", ".join(find_methods("shards"))
        raise ArgumentError(f"--export with --method {args.method}: only {users} have a sharded model to export")
    if args.checkpoint and args.method in ("all", *find_methods("servers")):
        raise ArgumentError(
            f"--checkpoint with --method {args.method}: a parameter server cannot be saved: use another method"
        )
    check_device(args, comm)
    check_files(args, comm)
    args.planned_epochs = args.epochs
    if args.checkpoint:
        from hpccomm.train.checkpointing import read_epochs

        note = args.checkpoint / f"{args.dataset}-{args.method}.json"
        args.planned_epochs = run_on_root(lambda: read_epochs(note, args.epochs), comm)
    return methods


def fill_in(args: argparse.Namespace, job: Job) -> None:
    """The defaults of a dataset."""
    args.epochs = job.epochs if args.epochs is None else args.epochs
    args.batch_size = job.batch_size if args.batch_size is None else args.batch_size
    args.samples = job.limit if args.samples is None else args.samples


MINIMUMS = {"epochs": 1, "batch_size": 1, "samples": 1, "seed": 0}
"""The smallest values of arguments that every method takes."""


def check_values(args: argparse.Namespace) -> None:
    """Raise for a number that is out of range."""
    for name, least in MINIMUMS.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ArgumentError(f"{flag_of(name)} {value}: give {least} or more")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise ArgumentError(f"--lr {args.lr}: give a positive number")
    for name, flag in FLAGS.items():
        value = getattr(args, name)
        if value is not None and not flag.valid(value):
            raise ArgumentError(f"{flag_of(name)} {value}: {flag.remedy}")


def check_framework(args: argparse.Namespace, sharded: bool) -> None:
    """Raise for a framework that is not known or not installed, and for runs that it cannot do."""
    check_choice("--framework", args.framework, FRAMEWORKS)
    if args.framework == "numpy":
        return
    if sharded or args.device != "cpu":
        what = f"--method {args.method}" if sharded else f"--device {args.device}"
        raise ArgumentError(f"--framework {args.framework} with {what}: leave one flag out")
    try:
        import_module(FRAMEWORKS[args.framework].module)
    except ImportError:
        raise ArgumentError("--framework torch needs PyTorch: pip install torch") from None


def check_device(args: argparse.Namespace, comm: Communicator) -> None:
    """Take a device for each rank; raises on all ranks for a run that cannot be there, or where a device is missing."""
    check_choice("--device", args.device, ("cpu", "cuda"))
    if args.device == "cpu":
        return
    from hpccomm.transports.cuda import claim_device

    able = [name for name in find_methods("replicas") if not METHODS[name].steps_locally]
    if args.method not in able:
        why = f"--device cuda with --method {args.method}: this method keeps its models in host memory"
        raise ArgumentError(f"{why}: use one of {', '.join(able)}")
    if args.checkpoint:
        why = "--checkpoint with --device cuda: this command saves no models on a device"
        raise ArgumentError(f"{why}: leave one flag out")
    claim_device(comm, "--device cuda", "use --device cpu")


def check_files(args: argparse.Namespace, comm: Communicator) -> None:
    """Raise on all ranks where rank 0 cannot write the results: before the work and not after it."""
    run_on_root(lambda: check_file("--json", args.json), comm)
    run_on_root(lambda: check_folder("--export", args.export), comm)
    if args.plot:
        from hpccomm.train.figure import check_drawable

        run_on_root(lambda: check_drawable(args.plot), comm)
    run_on_root(lambda: check_file("--plot", args.plot), comm)


def check_choice(what: str, value: str, known: Any) -> None:
    """Raise for a name that is not known."""
    if value not in known:
        raise unknown_name(f"{what} {value!r} is not known", value, known)


def load_data(args: argparse.Namespace, comm: Communicator) -> Dataset:
    """Rank 0's copy of the data, on all ranks: the nodes may hold different versions of it."""
    from hpccomm.train.datasets import DATASETS

    data: Dataset = run_on_root(lambda: DATASETS[args.dataset](args.samples), comm)
    return data


def train_replicas(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> dict[str, Any] | None:
    """Train one model, a replica on every rank; returns the object for ``--json``, None for a run that was stopped."""
    from hpccomm.train.checkpointing import Folder
    from hpccomm.train.loop import train

    lr = learning_rate(args, METHODS[name])
    settings, network, transform, console = prepare(name, args, data, comm)
    with keeper_for(Folder, name, {"lr": lr}, args, comm) as keeper:
        step, show = console.count, console.show
        epochs = train(comm, data, network, transform, settings, on_step=step, on_epoch=show, keeper=keeper)[1]
    return finish(name, args, comm, console, epochs)


def train_servers(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> dict[str, Any] | None:
    """As :func:`train_replicas`, with a parameter server."""
    from hpccomm.train.loop import Servers, train_by_servers

    settings, network, transform, console = prepare(name, args, data, comm)
    servers = Servers(args.servers, parse_mode(args.mode))
    epochs = train_by_servers(comm, data, network, transform, settings, servers, on_step=console.count)[1]
    for epoch in epochs:
        console.show(epoch)
    return finish(name, args, comm, console, epochs)


def train_shards(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> dict[str, Any] | None:
    """As :func:`train_replicas`, with model states divided over ranks."""
    from hpccomm.train import sharded
    from hpccomm.train.checkpointing import ShardFolder
    from hpccomm.train.layered import deep_network_for
    from hpccomm.train.loop import Settings

    network = deep_network_for(data, args.width, args.layers)
    settings = Settings(args.epochs, args.batch_size, args.seed)
    lr = learning_rate(args, METHODS[name])
    job = sharded.Job(name, lr, args.partition_size, args.micro_steps, args.dtype, *zero_plus_plus(name, args))
    states = sharded.states_for(comm, network, settings, job)
    training = sharded.Training(comm, data, network, states, settings, args.micro_steps)
    print_on_root(comm, deep_headline(job, training, args) + HEADER)
    console = Console(comm, len(data.targets), settings, args.progress)
    with keeper_for(ShardFolder, name, {"lr": lr}, args, comm) as keeper:
        epochs = sharded.train(training, on_step=console.count, on_epoch=console.show, keeper=keeper)
    result = finish(name, args, comm, console, epochs)
    if result is None:
        return None
    costs = sharded.account(training)
    hops = ", ".join(f"{hop} {format_size(each)}" for hop, each in costs["hops"].items())
    print_on_root(comm, f"# a rank sends in one step, at most: {hops}\n")
    if args.export:
        from hpccomm.algorithms.sharded.checkpoints import export

        export(args.export, states)
    states.close()
    return {**result, **costs, "deep": job._asdict()}


def zero_plus_plus(name: str, args: argparse.Namespace) -> tuple[str | None, str | None, bool]:
    """The codes of weights and gradients, and whether there are secondary shards, where a method takes these flags."""
    taken = {flag: getattr(args, flag) for flag in METHODS[name].flags}
    return taken.get("weight_code"), taken.get("gradient_code"), taken.get("secondary_shard") == "on"


LOOPS = {"replicas": train_replicas, "servers": train_servers, "shards": train_shards}
"""What trains by the name in a method's row."""


def learning_rate(args: argparse.Namespace, method: Method) -> float:
    """The rate that was given, or the method's for this framework."""
    return method.lr * FRAMEWORKS[args.framework].rate if args.lr is None else float(args.lr)


def prepare(name: str, args: argparse.Namespace, data: Dataset, comm: Communicator) -> tuple[Any, Any, Any, Console]:
    """Settings, network, transform and console of a run of replicas; prints its headline."""
    from hpccomm.algorithms.device import run_on_host
    from hpccomm.buckets import Bucket
    from hpccomm.train.loop import TRIAL_STEPS, Settings, count_steps

    method, network = METHODS[name], import_module(FRAMEWORKS[args.framework].module).network_for(data)
    library = import_module("cupy" if args.device == "cuda" else "numpy")
    settings = Settings(args.epochs, args.batch_size, args.seed, method.steps_locally, library)
    lr = learning_rate(args, method)
    print_on_root(comm, headline(name, lr, args, comm) + HEADER)
    flags = {flag: getattr(args, flag) for flag in method.flags if flag in MethodSetup._fields}
    steps = count_steps(len(data.targets), settings._replace(epochs=args.planned_epochs))

    def make(count: int) -> Any:
        made = method.make(MethodSetup(comm, Bucket(network.shapes), lr, count, args.algorithm, **flags))
        return run_on_host(made) if args.device == "cuda" and not method.on_device else made

    if method.loop == "replicas":
        compile_first(comm, make(TRIAL_STEPS), library.zeros(Bucket(network.shapes).size, "f4"))
    transform, steps_on = make(steps), args.servers if method.loop == "servers" else 0
    return settings, network, transform, Console(comm, len(data.targets), settings, args.progress, steps_on)


def compile_first(comm: Communicator, method: Any, weights: Any) -> None:
    """Compile a method's kernels before the clock of the training starts; says so where it takes over a second."""
    from hpccomm.train.loop import compile_kernels

    notice = threading.Timer(1.0, print_on_root, (comm, "# compiling the method's kernels, once for each machine …\n"))
    notice.start()
    try:
        compile_kernels(method, weights)
    finally:
        notice.cancel()


def finish(
    name: str, args: argparse.Namespace, comm: Communicator, console: Console, epochs: list[Epoch]
) -> dict[str, Any] | None:
    """The object for ``--json``; None for a run that was stopped and saved."""
    console.progress.close()
    if len(epochs) < args.epochs:
        print_on_root(comm, f"# stopped in epoch {len(epochs) + 1} and saved: run the same command again to resume\n")
        return None
    return {
        "dataset": args.dataset,
        "framework": args.framework,
        "method": name,
        "ranks": comm.size,
        "seed": args.seed,
        "steps_an_epoch": console.steps // args.epochs,
        "command": shlex.join(["hpccomm", *sys.argv[1:]]),
        "epochs": [epoch._asdict() for epoch in epochs],
    }


RUN_ARGUMENTS = ("dataset", "framework", "batch_size", "samples", "seed", "algorithm")
"""Arguments beside the method's that must be the same when a saved run is resumed."""


@contextlib.contextmanager
def keeper_for(
    kind: type[FolderType], name: str, values: dict[str, Any], args: argparse.Namespace, comm: Communicator
) -> Iterator[FolderType | None]:
    """The folder that saves the run, and is told by SIGUSR1 to stop it; None without ``--checkpoint``."""
    if args.checkpoint is None:
        yield None
        return
    fixed = (*RUN_ARGUMENTS, *(flag for flag in METHODS[name].flags if not FLAGS[flag].may_change))
    run = {"method": name, "epochs": args.planned_epochs, **values, **{key: getattr(args, key) for key in fixed}}
    folder = kind(comm, args.checkpoint, f"{args.dataset}-{name}", run)
    before = signal.signal(signal.SIGUSR1, folder.request_stop)
    try:
        yield folder
    finally:
        signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)


def headline(name: str, lr: float, args: argparse.Namespace, comm: Communicator) -> str:
    """What is trained, and how."""
    return (
        f"# hpccomm train {args.dataset}: {name}, lr {lr:g}, batch {args.batch_size} over "
        f"{format_count(comm.size, 'rank')}, seed {args.seed}, allreduce {args.algorithm}"
        f"{', ' + args.framework if args.framework != 'numpy' else ''}"
        f"{', on ' + args.device if args.device != 'cpu' else ''}\n"
    )


def deep_headline(job: Any, training: Any, args: argparse.Namespace) -> str:
    """What is trained, how it is sharded, and the memory that this takes on rank 0."""
    states, parameters = training.states, training.network.parameters
    memory = states.memory
    return (
        f"# hpccomm train {args.dataset}: {job.division}, lr {job.lr:g}, batch {args.batch_size} over "
        f"{format_count(training.comm.size, 'rank')} in {format_count(job.micro_steps, 'micro-step')}, "
        f"seed {args.seed}, {job.dtype}\n"
        f"# {format_count(parameters, 'parameter')}; a copy on {format_count(states.ranks, 'rank')}, stage "
        f"{states.stage}; memory of rank 0: states {format_size(memory.states)} "
        f"({memory.states / parameters:.2f} bytes a parameter), gathered parameters {format_size(memory.parameters)}, "
        f"workspace {format_size(memory.workspace)}\n"
    )


def line(first: str, epoch: Epoch) -> str:
    """The line of an epoch, or of a whole run."""
    ratio = "-" if epoch.ratio is None else f"{epoch.ratio:.2f}"
    return (
        f"{first}{epoch.loss:>10.4f}{epoch.accuracy:>10.2%}{epoch.compute_s:>12.3f}"
        f"{epoch.communication_s:>13.3f}{epoch.step_s:>9.3f}{epoch.wire_bytes:>12}{ratio:>12}\n"
    )


def row(name: str, epochs: list[dict[str, Any]]) -> str:
    """The line of a run: loss and accuracy of the last epoch, the time of all epochs, the mean bytes of a step."""
    from hpccomm.train.loop import Epoch

    times = {key: sum(each[key] for each in epochs) for key in ("compute_s", "communication_s", "step_s")}
    sent, last = sum(each["wire_bytes"] for each in epochs) // len(epochs), epochs[-1]
    ratio = last["ratio"] * last["wire_bytes"] / sent if sent and last["ratio"] else None
    return line(f"  {name:<12}", Epoch(**last)._replace(**times, wire_bytes=sent, ratio=ratio))


class Console:
    """What a run shows: on rank 0 a line for each epoch; on rank ``steps_on``, the first that steps, how far it is."""

    def __init__(self, comm: Communicator, samples: int, settings: Settings, wanted: bool, steps_on: int = 0) -> None:
        from hpccomm.train.loop import count_steps

        self.comm, self.steps, self.begun = comm, count_steps(samples, settings), False
        shown = comm.rank == steps_on and (wanted or sys.stderr.isatty())
        self.progress = Progress("hpccomm train", "step", self.steps, stream=None if shown else io.StringIO())

    def count(self, done: int) -> None:
        """So many steps are done, those before a resume included."""
        if not self.begun:
            self.begun = True
            self.progress.begin(done)
        self.progress.show(done, f"step {done} of {self.steps}")
        if done == self.steps:
            self.progress.close()  # before rank 0 prints what follows

    def show(self, epoch: Epoch) -> None:
        """Print the line of an epoch."""
        self.progress.close()
        print_on_root(self.comm, line(f"{epoch.epoch:>7}", epoch))


def print_on_root(comm: Communicator, text: str, stream: Any = None) -> None:
    """Write and flush on rank 0."""
    if comm.rank == 0:
        stream = stream or sys.stdout
        stream.write(text)
        stream.flush()
