"""Learning-rate schedules for large batches: scaling with the batch, warm-up and decay.

*B the batch, B₀ the batch for which the rate γ₀ was tuned, t the update from 0, T_w and T the numbers of updates in the
warm-up and in all.*  A schedule is a function of the update's count t.  The first update uses t = 0, as in optax and
TensorFlow; PyTorch's schedulers are stepped before they are read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from hpccomm.algorithms.transforms import Schedule, check_not_negative, check_positive, require


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
    check_not_negative("warm_up: steps", steps)
    after = then if callable(then) else constant(then)
    return lambda t: after(0) * (t + 1) / steps if t < steps else after(t - steps)


def polynomial(lr: float, steps: int, power: float = 1.0, end: float = 0.0) -> Schedule:
    """γ (1 − t/T)^q down to ``end`` at update T, then constant; q is 2 for LARS, 1 for LAMB in their recipes."""
    require(steps >= 1, f"polynomial: steps is {steps}: pass 1 or more")
    check_positive("polynomial: power", power)
    return lambda t: end + (lr - end) * (1 - min(t, steps) / steps) ** power


def cosine(lr: float, steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from γ down to ``end`` at update T, then constant (Loshchilov & Hutter, ICLR 2017)."""
    require(steps >= 1, f"cosine: steps is {steps}: pass 1 or more")
    return lambda t: end + (lr - end) * (1 + math.cos(math.pi * min(t, steps) / steps)) / 2


def step_decay(lr: float, at: Sequence[int], factor: float = 0.1) -> Schedule:
    """γ times ``factor`` once for each of the updates ``at`` that t has reached, which ascend."""
    ascending = all(a < b for a, b in pairwise(at))
    require(ascending and all(each >= 0 for each in at), f"step_decay: at is {list(at)}: pass updates that ascend")
    check_positive("step_decay: factor", factor)
    return lambda t: lr * factor ** bisect_right(at, t)


def warm_up_stable_decay(lr: float, warmup: int, stable: int, decay: int, end: float = 0.0) -> Schedule:
    """A linear warm-up, γ for ``stable`` updates, then linearly down to ``end`` in ``decay`` updates (WSD).

    Hu et al., *MiniCPM*, 2024: the plateau can be prolonged without a new plan of the whole run.
    """
    check_not_negative("warm_up_stable_decay: stable", stable)
    return warm_up(warmup, join_schedules((stable, constant(lr)), (decay, polynomial(lr, decay, end=end))))


def one_cycle(lr: float, steps: int, *, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> Schedule:
    """From γ/``start`` up to γ in a share ``rise`` of T, then down to γ/(``start`` · ``end``), each by half a cosine.

    Smith & Topin, *Super-convergence*, 2018, with PyTorch's defaults; the peak is at update ``rise`` · T − 1 and the
    least rate at T − 1.
    """
    require(steps >= 1, f"one_cycle: steps is {steps}: pass 1 or more")
    require(0 <= rise <= 1, f"one_cycle: rise is {rise}: pass a share from 0 to 1")
    require(start > 0 and end > 0, f"one_cycle: start is {start}, end is {end}: pass positive numbers")
    peak, last = rise * steps - 1, max(steps - 1, 0)

    def value(t: int) -> float:
        if t <= peak and peak > 0:
            return between(lr / start, lr, t / peak)
        return between(lr, lr / (start * end), (min(t, last) - max(peak, 0)) / max(last - max(peak, 0), 1e-9))

    return value


def between(first: float, last: float, share: float) -> float:
    """A rate on half a cosine from ``first`` to ``last``."""
    return last + (first - last) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


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
