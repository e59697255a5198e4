"""The parameters of a machine: latency and bandwidth of each level of its network, and the cost of a sum."""

from __future__ import annotations

from typing import NamedTuple

from hpccomm.layout import ETHERNET, SHARED_MEMORY, Link
from hpccomm.performance.measured import CostCurve


class Machine(NamedTuple):
    """The cost of messages and sums."""

    intra: Link = SHARED_MEMORY
    """Between ranks of a node."""
    inter: Link = ETHERNET
    """Between nodes; beta is that of the link that the ranks of a node share."""
    gamma: float = 7.5e-5
    """Microseconds to sum one byte."""
    source: str = "defaults: two-core virtual machine, 10 Gbit/s Ethernet at 95 % of its rate; fit your own with tune"
    """The origin of the numbers."""
    curves: tuple[CostCurve, ...] = ()
    """The measured costs of rounds on several nodes."""
