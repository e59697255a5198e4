"""Learning-rate schedules for large batches: scaling with the batch, warm-up and decay.

*B the batch, B₀ the batch for which the rate γ₀ was tuned, t the update from 0, T_w and T the numbers of updates in the
warm-up and in all.*  A schedule is a function of the update's count t.  The first update uses t = 0, as in optax and
TensorFlow; PyTorch's schedulers are stepped before they are read.
"""

from __future__ import annotations

import math

from hpccomm.algorithms.transforms import Schedule, require


def linear_scaling(lr: float, batch: int, base: int) -> float:
    """γ₀ B/B₀, for SGD and LARS, with a warm-up of some epochs (Goyal et al., 2017)."""
    check_batches("linear_scaling", batch, base)
    return lr * (batch / base)


def sqrt_scaling(lr: float, batch: int, base: int) -> float:
    """γ₀ √(B/B₀), for LAMB (You et al., ICLR 2020), whose warm-up's share of all updates grows by B/B₀."""
    check_batches("sqrt_scaling", batch, base)
    return lr * math.sqrt(batch / base)


def constant(lr: float) -> Schedule:
    """γ for every update."""
    return lambda t: lr


def warm_up(steps: int, then: float | Schedule) -> Schedule:
    """γ(t+1)/T_w in the first T_w updates, where γ is the first value of ``then``; then ``then``, counted from 0.

    The last update of the warm-up has the full rate γ.
    """
    require(steps >= 0, f"warm_up: steps is {steps}: pass 0 or more")
    after = then if callable(then) else constant(then)
    return lambda t: after(0) * (t + 1) / steps if t < steps else after(t - steps)


def polynomial(lr: float, steps: int, power: float = 1.0, end: float = 0.0) -> Schedule:
    """γ (1 − t/T)^q down to ``end`` at update T, then constant; q is 2 for LARS, 1 for LAMB in their recipes."""
    require(steps >= 1, f"polynomial: steps is {steps}: pass 1 or more")
    require(power > 0, f"polynomial: power is {power}: pass a positive number")
    return lambda t: end + (lr - end) * (1 - min(t, steps) / steps) ** power


def join_schedules(*phases: tuple[int, Schedule]) -> Schedule:
    """One schedule after the other, each for its number of updates with its own count; the last one continues.

    For batches that change during training, with a new warm-up at the change.
    """
    require(bool(phases), "join_schedules: no phases: pass (updates, schedule), one or more")

    def value(t: int) -> float:
        for steps, schedule in phases[:-1]:
            if t < steps:
                return schedule(t)
            t -= steps
        return phases[-1][1](t)

    return value


def check_batches(who: str, batch: int, base: int) -> None:
    """Raise unless both are positive."""
    require(batch > 0 and base > 0, f"{who}: batch {batch}, base {base}: pass positive numbers of samples")
