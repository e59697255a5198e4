"""The parameters of a machine: costs of its network and of a sum, what was probed of its nodes, and what follows.

:class:`Machine` prices messages.  :class:`Probe` holds what :mod:`hpccomm.performance.probe` measured of the cores of
one node, and :func:`derive_parameters` computes from it how shared memory moves bytes there.  The model:

*L1, L2, L3: bytes of the caches of a core; x: what a probe gives, x' the same of the reference machine.*  Every
parameter was found by measuring collectives on the reference machine.  On another machine it is multiplied by the
ratio that the formula gives, rounded to a power of two.  Ratios between 1/3 and 3 count as 1: a probe of the reference
machine itself varies by so much with the placement of its virtual cores, and the model is no better.

==================  ==============================================================================================
parameter           formula
==================  ==============================================================================================
slot                L2 / 4, so that the ring of a rank fits in its own cache; at most 256 KB, for memory
direct_of_two       bytes that cross between two cores while two flags do: a second phase costs two flags
direct              the same, for all ranks together
registered          largest power of two up to direct_of_two: in place costs a second barrier, and saves the copy
in_tree             direct_of_two / 8: bytes that cross once more while the lines of all other ranks are not read
nontemporal         sum of the L3 caches in use, at most 64 MB: larger results leave the cache anyway
long                2 L1: longer blocks have left L1 when another core reads them
fills_nontemporal   unless the probe handed blocks over faster by half with ordinary stores
single_copy         setup / (1/h + 1/l - 1/c): h by slots from cache to cache, l copied from L3, c by single-copy
allgather_segment   L3 / 32: what four ranks read and write of a step takes a quarter of the cache
spin                polls in 60 µs, after which a waiting rank leaves its core to others
crowded_spin        polls in the time of one sched_yield, where ranks share cores
==================  ==============================================================================================

None of them changes a bit of a result: every path adds the ranks' values in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hpccomm.layout import ETHERNET, SHARED_MEMORY, Link

if TYPE_CHECKING:
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


class Probe(NamedTuple):
    """What was measured of the cores in use on one node; 0 is unknown.  Rates are in GB/s, of bytes copied once."""

    cpu: str = ""
    """Model name of the processor."""
    cores: int = 0
    """How many cores were in use."""
    cache_groups: int = 0
    """How many last-level caches they have."""
    l1: int = 0
    l2: int = 0
    """Bytes of the data caches of one core."""
    l3: int = 0
    """Bytes of one last-level cache."""
    line_ns: float = 0
    """One transfer of a cache line from one core to another."""
    far_line_ns: float = 0
    """The same between two cores that share no cache; 0 if all share one."""
    poll_ns: float = 0
    """One poll of a flag, with the pause after it."""
    yield_ns: float = 0
    """One ``sched_yield`` with nobody else to run."""
    l2_copy: float = 0
    l3_copy: float = 0
    memory_copy: float = 0
    """Copies by one core within its second-level cache, within the last-level cache, and beyond it."""
    memory_copy_nontemporal: float = 0
    """Copies beyond the caches with non-temporal stores."""
    memory_add: float = 0
    """Bytes of the result of an addition of two vectors beyond the caches, a second."""
    handover: float = 0
    handover_nontemporal: float = 0
    """Bytes that each of two cores hands to the other through slots, filled with ordinary or non-temporal stores."""
    single_copy: float = 0
    """Bytes copied by ``process_vm_readv``; 0 where it is not permitted."""


REFERENCE = Probe(
    cpu="AMD EPYC",
    cores=2,
    cache_groups=1,
    l1=32 << 10,
    l2=1 << 20,
    l3=32 << 20,
    line_ns=110,
    poll_ns=24.4,
    yield_ns=540,
    l2_copy=45,
    l3_copy=16.7,
    memory_copy=11,
    memory_copy_nontemporal=16.5,
    memory_add=7.4,
    handover=16,
    handover_nontemporal=11,
    single_copy=12,
)
"""The machine on which the defaults of :class:`Parameters` were found, by its own probe."""


class Parameters(NamedTuple):
    """How shared memory moves bytes on a machine; lengths in bytes.  The defaults are those of the reference."""

    slot: int = 1 << 18
    """One slot of a rank; halved above 32 ranks."""
    direct: int = 98304
    """Up to so many bytes of all ranks together, every rank reduces everything: one barrier instead of two."""
    direct_of_two: int = 12288
    """The same for an allreduce of two ranks, which copying half of it twice suits earlier."""
    registered: int = 8192
    """From here on registered arrays are reduced in place; below, one barrier instead of two is worth a copy."""
    nontemporal: int = 1 << 25
    """From so many bytes of all ranks together on, out-of-place results are written with non-temporal stores."""
    long: int = 1 << 16
    """From here on slots are filled as ``fills_nontemporal`` says until a trial decides, and trials are frequent."""
    fills_nontemporal: bool = True
    bcast_single_copy: int = 1 << 23
    alltoall_single_copy: int = 1 << 23
    allgather_single_copy: int = 1 << 25
    """From so many bytes on these collectives use single-copy: one copy instead of two, but a system call."""
    bcast_single_copy_of_two: int = 1 << 18
    alltoall_single_copy_of_two: int = 1 << 20
    allgather_single_copy_of_two: int = 1 << 22
    """The same between two ranks, which copying through slots would keep busy all the time."""
    allgather_segment: int = 1 << 20
    """Bytes of each rank that a single-copy allgather of more than two ranks copies in one step: a whole block would no
    longer be in the cache when the last rank copies it (16 MB of each of four ranks: 14.8 ms in steps, 18.8
    without)."""
    spin: int = 2000
    """Most polls of a flag before a rank yields, where every rank has a core of its own."""
    crowded_spin: int = 20
    """The same where ranks share cores; also the least number anywhere."""
    flat_ranks: int = 16
    """Up to so many ranks each polls all others at a barrier; above, they meet along a tree."""
    tree_arity: int = 8
    """Children of a rank in a tree, on each level of caches."""
    in_tree: int = 1536
    """Up to so many bytes a rank, small calls of ranks that meet along a tree send their data along it too."""
    source: str = "defaults of the reference machine; `hpccomm warm` or `hpccomm tune` probes this one"
    """The origin of the numbers."""


DEFAULTS = Parameters()
SAME = 3.0
"""Ratios below this, and above its inverse, count as 1."""
CLEARLY = 2.0
"""Non-temporal stores cost up to twice the time where they are wrong, ordinary ones four to eight times (measured on
two cores, with and without a shared cache), and a virtual machine's cores may lie elsewhere in the next launch.  So
ordinary stores must be faster by this factor to be what calls begin with."""
LIMITS = {
    "slot": (1 << 15, 1 << 18),
    "direct": (4096, 1 << 20),
    "direct_of_two": (1024, 32768),
    "registered": (1024, 32768),
    "in_tree": (64, 4096),
    "nontemporal": (1 << 21, 1 << 26),
    "long": (1 << 14, 1 << 18),
    "allgather_segment": (1 << 18, 1 << 22),
    "spin": (250, 16000),
    "crowded_spin": (5, 160),
}
"""The least and the largest value of a parameter, whatever a probe says."""
NEVER = 1 << 62
SINGLE_COPIES = tuple(name for name in Parameters._fields if "single_copy" in name)


def derive_parameters(probe: Probe | None) -> Parameters:
    """The parameters for a machine; without a probe, or for what it lacks, those of the reference."""
    if probe is None:
        return DEFAULTS
    crossing = ratio(probe, "handover", "line_ns")
    values: dict[str, Any] = {
        "slot": quarter(probe.l2) or DEFAULTS.slot,
        "direct": scale(DEFAULTS.direct, crossing),
        "direct_of_two": scale(DEFAULTS.direct_of_two, crossing),
        "nontemporal": floor_power(probe.l3 * max(1, probe.cache_groups)) or DEFAULTS.nontemporal,
        "long": floor_power(2 * probe.l1) or DEFAULTS.long,
        "allgather_segment": floor_power(probe.l3 // 32) or DEFAULTS.allgather_segment,
        "spin": scale(DEFAULTS.spin, 1 / ratio(probe, "poll_ns")),
        "crowded_spin": scale(DEFAULTS.crowded_spin, ratio(probe, "yield_ns") / ratio(probe, "poll_ns")),
    }
    values["registered"] = floor_power(values["direct_of_two"])
    values["in_tree"] = values["direct_of_two"] // 8
    values = {name: min(max(value, LIMITS[name][0]), LIMITS[name][1]) for name, value in values.items()}
    if probe.handover and probe.handover_nontemporal:
        values["fills_nontemporal"] = probe.handover < CLEARLY * probe.handover_nontemporal
    gain = compute_gain(probe)
    values |= {name: scale_single_copy(getattr(DEFAULTS, name), gain) for name in SINGLE_COPIES}
    return Parameters(**values, source=f"probe of {probe.cpu or 'an unnamed processor'}")


def ratio(probe: Probe, *names: str) -> float:
    """The product of some figures of a probe over that of the reference; 1 if one of them is unknown."""
    mine = math.prod(getattr(probe, name) for name in names)
    return mine / math.prod(getattr(REFERENCE, name) for name in names) if mine else 1.0


def scale(value: int, factor: float) -> int:
    """A value times the nearest power of two of a factor; the value itself where the factor is close to 1."""
    if 1 / SAME < factor < SAME:
        return value
    return max(1, int(value * 2.0 ** min(40, max(-40, round(math.log2(factor))))))


def floor_power(value: int) -> int:
    """The largest power of two up to a value; 0 for 0."""
    return 1 << value.bit_length() >> 1


def quarter(nbytes: int) -> int:
    """The largest power of two up to a quarter."""
    return floor_power(nbytes // 4)


def compute_gain(probe: Probe) -> float | None:
    """Nanoseconds a byte that single-copy saves, over those of the reference; None if unknown."""
    if not probe.single_copy or not probe.l3_copy or not max(probe.handover, probe.handover_nontemporal):
        return None

    def saves(each: Probe) -> float:
        return 1 / max(each.handover, each.handover_nontemporal) + 1 / each.l3_copy - 1 / each.single_copy

    return saves(probe) / saves(REFERENCE)


def scale_single_copy(value: int, gain: float | None) -> int:
    """The length from which single-copy pays, for what it saves a byte."""
    if gain is None:
        return value
    return scale(value, 1 / gain) if gain > 0 else NEVER


def parse_probe(data: Mapping[str, Any]) -> Probe:
    """The probe in a file; raises ``ValueError``, ``KeyError`` or ``TypeError`` if there is none."""
    values = {name: data[name] for name in Probe._fields}
    wrong = [name for name, value in values.items() if not is_figure(name, value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be numbers from 0 up to {MOST:.0e}")
    return Probe(**values)


MOST = 1e12


def is_figure(name: str, value: Any) -> bool:
    """Whether a value is possible for a field of a probe."""
    default = Probe._field_defaults[name]
    if isinstance(default, str):
        return isinstance(value, str)
    kinds = (int, float) if isinstance(default, float) or name in FLOATS else (int,)
    return type(value) in kinds and 0 <= value <= MOST


FLOATS = frozenset(name for name, kind in Probe.__annotations__.items() if "float" in str(kind))
