"""What messages and sums cost on a machine: a latency and a bandwidth for each level of its network."""

from __future__ import annotations

from typing import NamedTuple

from hpccomm.layout import ETHERNET, SHARED_MEMORY, Link
from hpccomm.performance.measured import CostCurve


class Machine(NamedTuple):
    """What messages and sums cost."""

    intra: Link = SHARED_MEMORY
    """Between ranks of a node."""
    inter: Link = ETHERNET
    """Between nodes; beta is that of the link a node's ranks share."""
    gamma: float = 7.5e-5
    """Microseconds to sum a byte into another."""
    source: str = "defaults: two-core virtual machine, 10 Gbit/s Ethernet at 95 % of its rate; fit your own with tune"
    """Where the numbers come from."""
    curves: tuple[CostCurve, ...] = ()
    """What rounds took on several nodes."""
