"""The table of training methods: what ``hpccomm train --method`` knows, and the table of the flags that methods take.

To add a method is to add a row to :data:`METHODS`: the command line, its help, its checks and its defaults are read
from the two tables.  Neither NumPy nor MPI is imported before a method is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import hpccomm
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count

if TYPE_CHECKING:
    from hpccomm.algorithms.sharded.units import ShardedModel
    from hpccomm.algorithms.transforms import Transform
    from hpccomm.buckets import Bucket


class Flag(NamedTuple):
    """A flag of the command line that some methods take."""

    summary: str
    default: Any = None
    type: Callable[[str], Any] = int
    valid: Callable[[Any], bool] = lambda value: value >= 1
    remedy: str = "give 1 or more"
    """What a user is told to do about a value that is not valid."""
    unset: str = ""
    """What applies where the flag is not given and has no default value."""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    may_change: bool = False
    """A saved run may be resumed with another value."""


def parse_mode(text: str) -> Any:
    """The parameter server's mode: ``bsp``, ``asp``, or ``("ssp", 3)`` for ``ssp:3``; ``None`` for any other text."""
    kind, _, slack = text.partition(":")
    if text in ("bsp", "asp"):
        return text
    return ("ssp", int(slack)) if kind == "ssp" and slack.isdigit() else None


CODES = ("int8", "e4m3", "e5m2", "mx", "int4")
"""Those of :mod:`hpccomm.collectives.compressed.two_phase`."""

FLAGS = {
    "period": Flag("steps of a block, at whose end the models are combined", 16),
    "group_size": Flag("ranks of a group", unset="the ranks of a node"),
    "density": Flag(
        "share of the elements that a rank sends", 0.01, float, lambda d: 0 < d <= 1, "give a share above 0, at most 1"
    ),
    "servers": Flag("ranks that act as servers", 1),
    "mode": Flag(
        "bsp, asp, or ssp:S, which lets a worker be S steps ahead of the slowest",
        "bsp",
        str,
        lambda text: parse_mode(text) is not None,
        "use bsp, asp, or ssp:3 for workers up to 3 steps ahead",
    ),
    "partition_size": Flag(
        "ranks that share one copy of the model", unset="the ranks of a node", metavar="P", may_change=True
    ),
    "micro_steps": Flag("parts into which a rank divides its batch", 1, metavar="S"),
    "width": Flag("width of the inner layers", 1024),
    "layers": Flag("inner layers; ten of width 1024 have 11 M parameters", 10, int, lambda n: n >= 0, "give 0 or more"),
    "dtype": Flag(
        "type in which weights are gathered and gradients reduced",
        "float32",
        str,
        lambda name: True,
        choices=("float32", "float16", "bfloat16"),
    ),
    "weight_code": Flag(
        "code in which weights are gathered (qwZ of ZeRO++)", None, str, lambda code: True, unset="none", choices=CODES
    ),
    "gradient_code": Flag(
        "code in which gradients are reduced (qgZ)", None, str, lambda code: True, unset="none", choices=CODES
    ),
    "secondary_shard": Flag(
        "keep gathered weights divided over the ranks of a node until they change (hpZ)",
        "off",
        str,
        lambda name: True,
        choices=("off", "on"),
    ),
}
"""Flags of methods by the name that ``args`` has them by."""


class MethodSetup(NamedTuple):
    """What a method is made for; the last fields are the values of its flags."""

    comm: Any
    bucket: Bucket
    lr: float
    steps: int
    """Steps of the whole run."""
    algorithm: str = "auto"
    """Algorithm of dense allreduces."""
    period: int = FLAGS["period"].default
    group_size: int | None = None
    density: float = FLAGS["density"].default


class Method(NamedTuple):
    """One training method."""

    summary: str
    lr: float
    """Learning rate when none is given."""
    make: Callable[..., Any]
    """``make(setup)`` returns a Transform; of a sharded model: ``make(comm, units, optimizer, partition_size, …)``."""
    flags: tuple[str, ...] = ()
    """Names in :data:`FLAGS`."""
    steps_locally: bool = False
    """Ranks step on gradients of their own samples."""
    on_device: bool = False
    """It takes CuPy vectors; for other methods they are copied to the host."""
    loop: str = "replicas"
    """The training loop: every rank a replica, ``"servers"`` and workers, or a model in ``"shards"``."""
    check: Callable[[Any, Any], None] = lambda comm, args: None
    """``check(comm, args)`` raises, on every rank alike, for flags that these ranks cannot satisfy."""


def heavy_ball(setup: MethodSetup) -> Transform:
    """The step of one rank on its own, or of a server: SGD with momentum 0.9."""
    return hpccomm.chain(hpccomm.momentum(0.9), hpccomm.scale(-setup.lr))


def dense(setup: MethodSetup) -> Transform:
    """The baseline: the mean gradient, momentum 0.9."""
    return hpccomm.synchronous_sgd(setup.comm, setup.lr, momentum=0.9, algorithm=setup.algorithm)


def sgd(setup: MethodSetup) -> Transform:
    """The mean gradient, no momentum."""
    return hpccomm.synchronous_sgd(setup.comm, setup.lr, algorithm=setup.algorithm)


def adam(setup: MethodSetup) -> Transform:
    """Adam on the mean gradient."""
    return hpccomm.synchronous_adam(setup.comm, setup.lr, algorithm=setup.algorithm)


def lars(setup: MethodSetup) -> Transform:
    """A trust ratio for each tensor; the trust coefficient is 0.02, as these networks have few layers."""
    step = hpccomm.lars(setup.bucket, setup.lr, trust=0.02)
    return hpccomm.chain(hpccomm.mean(setup.comm, setup.algorithm), hpccomm.apply_if_finite(step))


def lamb(setup: MethodSetup) -> Transform:
    """Adam with a trust ratio for each tensor."""
    step = hpccomm.lamb(setup.bucket, setup.lr)
    return hpccomm.chain(hpccomm.mean(setup.comm, setup.algorithm), hpccomm.apply_if_finite(step))


def gtc(setup: MethodSetup) -> Transform:
    """Threshold compression."""
    return hpccomm.chain(hpccomm.gtc(setup.comm, density=setup.density), hpccomm.scale(-setup.lr))


def dgc(setup: MethodSetup) -> Transform:
    """The largest elements of tensors of 2,048 or more, Nesterov momentum correction; a fifth of the run warms up."""
    how: Any = {"nesterov": True, "warmup": setup.steps // 5, "smallest": 2048}
    return hpccomm.chain(hpccomm.dgc(setup.comm, setup.bucket, setup.density, **how), hpccomm.scale(-setup.lr))


def onebit_sgd(setup: MethodSetup) -> Transform:
    """The signs of each tensor and two scales; momentum after the exchange."""
    return hpccomm.chain(hpccomm.onebit_sgd(setup.comm, setup.bucket), heavy_ball(setup))


def ef_signsgd(setup: MethodSetup) -> Transform:
    """The signs of each tensor and its mean magnitude."""
    return hpccomm.ef_signsgd(setup.comm, setup.lr, setup.bucket)


def onebit_adam(setup: MethodSetup) -> Transform:
    """Adam; after a fifth of the run its momentum travels in one bit.

    ``eps`` is 1e-3, as parameters whose gradients are rarely other than zero would follow the noise of the signs.
    """
    return hpccomm.onebit_adam(setup.comm, setup.lr, setup.steps // 5, bucket=setup.bucket, eps=1e-3)


def onebit_lamb(setup: MethodSetup) -> Transform:
    """LAMB; after a fifth of the run its momentum travels in one bit."""
    return hpccomm.onebit_lamb(setup.comm, setup.bucket, setup.lr, max(1, setup.steps // 5))


def powersgd(setup: MethodSetup) -> Transform:
    """Each matrix as the product of two of rank 4; momentum after the exchange."""
    return hpccomm.chain(hpccomm.powersgd(setup.comm, setup.bucket, 4), heavy_ball(setup))


def int8(setup: MethodSetup) -> Transform:
    """Blocks of 8-bit numbers with a common scale, in two phases; momentum after the exchange."""
    return hpccomm.chain(hpccomm.block_mean(setup.comm, "int8"), heavy_ball(setup))


def bmuf(setup: MethodSetup) -> Transform:
    """Blocks of local steps, then a step with block momentum; the first tenth of the run is synchronous."""
    return hpccomm.bmuf(setup.comm, heavy_ball(setup), setup.period, warmup=setup.steps // 10)


def bmuf_adam(setup: MethodSetup) -> Transform:
    """Blocks of local Adam, then a step with block momentum; the first tenth of the run is synchronous."""
    return hpccomm.bmuf_adam(setup.comm, setup.lr, setup.period, warmup=setup.steps // 10)


def local_sgd(setup: MethodSetup) -> Transform:
    """The mean of the models after each block of local steps."""
    return hpccomm.local_sgd(setup.comm, heavy_ball(setup), setup.period)


def slowmo(setup: MethodSetup) -> Transform:
    """Slow momentum over blocks of local steps."""
    return hpccomm.slowmo(setup.comm, heavy_ball(setup), setup.lr, setup.period)


def diloco(setup: MethodSetup) -> Transform:
    """Nesterov momentum over blocks of local Adam."""
    return hpccomm.diloco(setup.comm, hpccomm.chain(hpccomm.adam(), hpccomm.scale(-setup.lr)), setup.period)


def hybrid(setup: MethodSetup) -> Transform:
    """Threshold compression inside groups, block momentum between them."""
    return hpccomm.hybrid(
        setup.comm,
        lambda group: hpccomm.gtc(group, density=setup.density),
        hpccomm.scale(-setup.lr),
        setup.group_size,
        period=setup.period,
        warmup=setup.steps // 10,
    )


def check_groups(comm: Any, args: Any) -> None:
    """Groups of equal size."""
    if args.group_size and comm.size % args.group_size:
        ranks = format_count(comm.size, "rank")
        raise ArgumentError(f"--group-size {args.group_size} does not divide {ranks}: give a divisor")


def check_servers(comm: Any, args: Any) -> None:
    """A server and a worker."""
    if args.servers >= comm.size:
        ranks = format_count(comm.size, "rank")
        raise ArgumentError(f"--servers {args.servers} of {ranks}: leave at least one server and one worker")


def mics(comm: Any, units: Any, optimizer: Any, partition_size: int | None, **how: Any) -> ShardedModel:
    """MiCS."""
    return hpccomm.mics(comm, units, optimizer, partition_size, **how)


def zero(stage: int) -> Callable[..., ShardedModel]:
    """ZeRO of a stage; it has no partition size."""
    return lambda comm, units, optimizer, size, **how: hpccomm.zero(comm, units, optimizer, stage=stage, **how)


def ddp(comm: Any, units: Any, optimizer: Any, partition_size: int | None, **how: Any) -> ShardedModel:
    """A whole copy on every rank."""
    return hpccomm.data_parallel(comm, units, optimizer, **how)


def check_partition(comm: Any, args: Any) -> None:
    """A partition size that fits the nodes."""
    from hpccomm.algorithms.sharded.groups import check_placement, ranks_per_node

    nodes = comm.layout.nodes
    check_placement("--partition-size", nodes, args.partition_size or ranks_per_node(comm.rank, nodes))


DEEP = ("micro_steps", "width", "layers", "dtype")
ZERO_PLUS_PLUS = ("weight_code", "gradient_code", "secondary_shard")

METHODS = {
    "dense": Method("mean gradient, SGD with momentum 0.9", 0.1, dense, on_device=True),
    "sgd": Method("mean gradient, SGD without momentum", 0.3, sgd, on_device=True),
    "adam": Method("mean gradient, Adam", 0.003, adam, on_device=True),
    "lars": Method("mean gradient, a trust ratio for each tensor, momentum 0.9", 0.3, lars, on_device=True),
    "lamb": Method("mean gradient, Adam, a trust ratio for each tensor", 0.01, lamb, on_device=True),
    "gtc": Method("threshold compression", 1.0, gtc, ("density",), on_device=True),
    "dgc": Method("deep gradient compression", 0.1, dgc, ("density",), on_device=True),
    "onebit-sgd": Method("1-bit SGD, momentum 0.9", 0.1, onebit_sgd, on_device=True),
    "ef-signsgd": Method("signs with error feedback", 0.3, ef_signsgd, on_device=True),
    "onebit-adam": Method("1-bit Adam", 0.003, onebit_adam, on_device=True),
    "onebit-lamb": Method("1-bit LAMB", 0.01, onebit_lamb, on_device=True),
    "powersgd": Method("rank 4 with error feedback, momentum 0.9", 0.03, powersgd),
    "int8": Method("mean in blocks of 8-bit numbers with error feedback, momentum 0.9", 0.1, int8),
    "local-sgd": Method("mean of the models after local steps", 0.1, local_sgd, ("period",), steps_locally=True),
    "bmuf": Method("blocks of local steps, block momentum", 0.02, bmuf, ("period",), steps_locally=True),
    "bmuf-adam": Method("blocks of local Adam, block momentum", 0.003, bmuf_adam, ("period",), steps_locally=True),
    "slowmo": Method("blocks of local steps, slow momentum", 0.1, slowmo, ("period",), steps_locally=True),
    "diloco": Method("blocks of local Adam, Nesterov momentum", 0.003, diloco, ("period",), steps_locally=True),
    "hybrid": Method(
        "gtc inside groups, block momentum between them",
        0.5,
        hybrid,
        ("period", "group_size", "density"),
        steps_locally=True,
        check=check_groups,
    ),
    "ps": Method(
        "parameter server, SGD, momentum 0.9", 0.1, heavy_ball, ("servers", "mode"), loop="servers", check=check_servers
    ),
    "mics": Method(
        "MiCS, model states divided over --partition-size ranks",
        0.001,
        mics,
        ("partition_size", *DEEP, *ZERO_PLUS_PLUS),
        loop="shards",
        check=check_partition,
    ),
    "zero1": Method(
        "ZeRO-1, optimizer state divided over all ranks", 0.001, zero(1), (*DEEP, "gradient_code"), loop="shards"
    ),
    "zero2": Method("ZeRO-2, gradients divided too", 0.001, zero(2), (*DEEP, "gradient_code"), loop="shards"),
    "zero3": Method("ZeRO-3, parameters divided too", 0.001, zero(3), (*DEEP, *ZERO_PLUS_PLUS), loop="shards"),
    "ddp": Method("data parallelism, nothing divided", 0.001, ddp, DEEP, loop="shards"),
}
"""To add a method is to add a row."""


def find_methods(*loops: str) -> list[str]:
    """The methods that train with one of these loops."""
    return [name for name, method in METHODS.items() if method.loop in loops]


def find_users(flag: str) -> list[str]:
    """The methods that take a flag."""
    return [name for name, method in METHODS.items() if flag in method.flags]
