"""Ways to turn gradients into steps, by name: what ``hpccomm train --method`` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hpccomm.algorithms.transforms import Transform
    from hpccomm.buckets import Bucket


class MethodSetup(NamedTuple):
    """What a method is made for."""

    comm: Any
    bucket: Bucket
    lr: float
    steps: int
    """Of the whole run."""
    algorithm: str = "auto"
    """Of dense allreduces."""
    period: int = 16
    """Steps of a block."""
    group_size: int | None = None
    """Ranks of a group of the hybrid; a node's if not said."""
    density: float = 0.01
    """Share of the elements that DGC sends."""


class Method(NamedTuple):
    """One way."""

    summary: str
    lr: float
    """Learning rate when none is given."""
    make: Callable[[MethodSetup], Transform]
    steps_locally: bool = False
    """Ranks step on gradients of their own samples."""
    on_device: bool = False
    """It takes CuPy's vectors as they are; for others they are brought to the host."""


def heavy_ball(plan: MethodSetup) -> Transform:
    """What a rank does alone: momentum 0.9."""
    from hpccomm.algorithms.transforms import chain, momentum, scale

    return chain(momentum(0.9), scale(-plan.lr))


def dense(plan: MethodSetup) -> Transform:
    """The yardstick: dense, with momentum."""
    from hpccomm.algorithms.exchange import synchronous_sgd

    return synchronous_sgd(plan.comm, plan.lr, momentum=0.9, algorithm=plan.algorithm)


def sgd(plan: MethodSetup) -> Transform:
    """Dense, without momentum."""
    from hpccomm.algorithms.exchange import synchronous_sgd

    return synchronous_sgd(plan.comm, plan.lr, algorithm=plan.algorithm)


def adam(plan: MethodSetup) -> Transform:
    """Dense Adam."""
    from hpccomm.algorithms.exchange import synchronous_adam

    return synchronous_adam(plan.comm, plan.lr, algorithm=plan.algorithm)


def lars(plan: MethodSetup) -> Transform:
    """Dense, a trust ratio for each tensor; the trust coefficient is 0.02, these networks' layers being few."""
    from hpccomm.algorithms.exchange import mean
    from hpccomm.algorithms.large_batch import lars as optimizer
    from hpccomm.algorithms.transforms import chain

    return chain(mean(plan.comm, plan.algorithm), optimizer(plan.bucket, plan.lr, trust=0.02))


def lamb(plan: MethodSetup) -> Transform:
    """Dense Adam with a trust ratio for each tensor."""
    from hpccomm.algorithms.exchange import mean
    from hpccomm.algorithms.large_batch import lamb as optimizer
    from hpccomm.algorithms.transforms import chain

    return chain(mean(plan.comm, plan.algorithm), optimizer(plan.bucket, plan.lr))


def gtc(plan: MethodSetup) -> Transform:
    """Threshold compression."""
    from hpccomm.algorithms.threshold_compression import gtc as exchange
    from hpccomm.algorithms.transforms import chain, scale

    return chain(exchange(plan.comm, density=plan.density), scale(-plan.lr))


def dgc(plan: MethodSetup) -> Transform:
    """The largest elements of tensors from 2,048 on, Nesterov's momentum corrected; a fifth of the run warms up."""
    from hpccomm.algorithms.deep_gradient_compression import dgc as exchange
    from hpccomm.algorithms.transforms import chain, scale

    made = exchange(plan.comm, plan.bucket, plan.density, nesterov=True, warmup=plan.steps // 5, smallest=2048)
    return chain(made, scale(-plan.lr))


def onebit_sgd(plan: MethodSetup) -> Transform:
    """Signs of each tensor and two scales; momentum behind the exchange."""
    from hpccomm.algorithms.onebit import onebit_sgd as exchange
    from hpccomm.algorithms.transforms import chain

    return chain(exchange(plan.comm, plan.bucket), heavy_ball(plan))


def ef_signsgd(plan: MethodSetup) -> Transform:
    """Signs of each tensor and its mean magnitude."""
    from hpccomm.algorithms.onebit import ef_signsgd as exchange

    return exchange(plan.comm, plan.lr, plan.bucket)


def onebit_adam(plan: MethodSetup) -> Transform:
    """Adam, its momentum in one bit after a fifth of the run; eps spares what rarely moves the noise of signs."""
    from hpccomm.algorithms.onebit import onebit_adam as exchange

    return exchange(plan.comm, plan.lr, plan.steps // 5, bucket=plan.bucket, eps=1e-3)


def onebit_lamb(plan: MethodSetup) -> Transform:
    """LAMB, its momentum in one bit after a fifth of the run."""
    from hpccomm.algorithms.onebit import onebit_lamb as exchange

    return exchange(plan.comm, plan.bucket, plan.lr, max(1, plan.steps // 5))


def powersgd(plan: MethodSetup) -> Transform:
    """Each matrix as two of rank 4; momentum behind the exchange."""
    from hpccomm.algorithms.power_sgd import powersgd as low_rank
    from hpccomm.algorithms.transforms import chain

    return chain(low_rank(plan.comm, plan.bucket, 4), heavy_ball(plan))


def bmuf(plan: MethodSetup) -> Transform:
    """Blocks of local steps with block momentum; a tenth of the run is synchronous."""
    from hpccomm.algorithms.blockwise_filtering import bmuf as blocks

    return blocks(plan.comm, heavy_ball(plan), plan.period, warmup=plan.steps // 10)


def bmuf_adam(plan: MethodSetup) -> Transform:
    """Blocks of local Adam."""
    from hpccomm.algorithms.blockwise_filtering import bmuf_adam as blocks

    return blocks(plan.comm, plan.lr, plan.period, warmup=plan.steps // 10)


def local_sgd(plan: MethodSetup) -> Transform:
    """Models averaged after each block."""
    from hpccomm.algorithms.local_steps import local_sgd as blocks

    return blocks(plan.comm, heavy_ball(plan), plan.period)


def slowmo(plan: MethodSetup) -> Transform:
    """Slow momentum over the blocks."""
    from hpccomm.algorithms.local_steps import slowmo as blocks

    return blocks(plan.comm, heavy_ball(plan), plan.lr, plan.period)


def diloco(plan: MethodSetup) -> Transform:
    """Nesterov's momentum over blocks of Adam."""
    from hpccomm.algorithms.local_steps import diloco as blocks
    from hpccomm.algorithms.transforms import adam as inner
    from hpccomm.algorithms.transforms import chain, scale

    return blocks(plan.comm, chain(inner(), scale(-plan.lr)), plan.period)


def hybrid(plan: MethodSetup) -> Transform:
    """Threshold compression inside groups, block momentum between them."""
    from hpccomm.algorithms.threshold_compression import gtc as exchange
    from hpccomm.algorithms.transforms import scale
    from hpccomm.algorithms.two_tier import hybrid as two_tiers

    return two_tiers(
        plan.comm,
        lambda group: exchange(group, density=plan.density),
        scale(-plan.lr),
        plan.group_size,
        period=plan.period,
        reduce="mean",
    )


def server_optimizer(plan: MethodSetup) -> Transform:
    """What a parameter server does with the mean of its workers' gradients."""
    return heavy_ball(plan)


METHODS = {
    "dense": Method("mean gradient, SGD with momentum 0.9", 0.1, dense, on_device=True),
    "sgd": Method("mean gradient, SGD without momentum", 0.3, sgd, on_device=True),
    "adam": Method("mean gradient, Adam", 0.003, adam, on_device=True),
    "lars": Method("layer-wise trust ratios, momentum 0.9", 0.3, lars, on_device=True),
    "lamb": Method("layer-wise trust ratios, Adam", 0.01, lamb, on_device=True),
    "gtc": Method("threshold compression", 1.0, gtc, on_device=True),
    "dgc": Method("deep gradient compression", 0.1, dgc, on_device=True),
    "onebit-sgd": Method("1-bit SGD, momentum 0.9", 0.1, onebit_sgd, on_device=True),
    "ef-signsgd": Method("signs with error feedback", 0.3, ef_signsgd, on_device=True),
    "onebit-adam": Method("1-bit Adam", 0.003, onebit_adam, on_device=True),
    "onebit-lamb": Method("1-bit LAMB", 0.01, onebit_lamb, on_device=True),
    "powersgd": Method("rank 4 with error feedback, momentum 0.9", 0.03, powersgd),
    "local-sgd": Method("models averaged after blocks of local steps", 0.1, local_sgd, steps_locally=True),
    "bmuf": Method("blocks of local steps, block momentum", 0.02, bmuf, steps_locally=True),
    "bmuf-adam": Method("blocks of local Adam, block momentum", 0.003, bmuf_adam, steps_locally=True),
    "slowmo": Method("blocks of local steps, slow momentum", 0.1, slowmo, steps_locally=True),
    "diloco": Method("blocks of local Adam, Nesterov's momentum", 0.003, diloco, steps_locally=True),
    "hybrid": Method("gtc inside groups, block momentum between them", 0.5, hybrid, steps_locally=True),
    "ps": Method("a parameter server, SGD with momentum 0.9", 0.1, server_optimizer),
}
"""To add a method is to add a row."""
