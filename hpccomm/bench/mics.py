"""``scripts/bench_mics``: steps of MiCS and ZeRO-3 on the nodes of a virtual cluster, and gathers in two levels.

*N nodes of k = 2 ranks, p = k, s = 4 micro-steps, M bytes of parameters in float32, layers of one size.*  All ways run
in every round, in turns; a time is that of the slowest rank.  Gradients are constants and a layer's computing is a wait
of a given length, as for a device that computes: sixteen ranks share the machine's cores, which could not compute for
all.  After its steps every way has the same weights, bit for bit.  "Alone" is MiCS without a second hop: what the
machine needs where nothing is sent between nodes.  Bytes are those that the first node's link has sent.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hpccomm.bench.kernels import where
from hpccomm.testing.cluster import Cluster

OUT = Path("docs/measurements/mics.json")
PER_NODE, MICRO_STEPS = 2, 4
NODES = (2, 4, 8)
GATHERED = (16384, 131072, 1048576, 8388608)
"""Bytes of a gathered vector."""
ROUNDS = 5
LR = 2.0**-10


class Setting(NamedTuple):
    """What is trained."""

    name: str
    layers: int
    elements: int
    """Of a layer."""
    wait_ms: float
    """A layer's computing forward; backward takes twice as long."""
    rate: str
    rounds: int

    @property
    def nbytes(self) -> int:
        """M."""
        return 4 * self.layers * self.elements

    @property
    def waits_s(self) -> float:
        """All computing of a step."""
        return 3e-3 * self.wait_ms * self.layers * MICRO_STEPS


SETTINGS = (
    Setting("links", 8, 1 << 18, 0.0, "1gbit", 5),
    Setting("slow links", 8, 1 << 16, 0.0, "100mbit", 5),
    Setting("device", 8, 1 << 16, 40.0, "1gbit", 3),
)

Ways = dict[str, Callable[[Any, Any, Any], Any]]


def ways() -> Ways:
    """Ways to divide the same states, from (communicator, units, optimizer)."""
    from mpi4py import MPI

    from hpccomm.algorithms.mics import mics, partition_groups
    from hpccomm.algorithms.zero import Sharded, zero
    from hpccomm.communicator import Communicator

    def alone(comm: Any, units: Any, optimizer: Any) -> Any:
        groups = partition_groups(comm, PER_NODE)
        return Sharded(groups._replace(replication=MPI.COMM_SELF), units, optimizer)

    return {
        "MiCS": lambda comm, units, optimizer: mics(comm, units, optimizer, PER_NODE),
        "ZeRO-3": zero,
        "ZeRO-3, rings": lambda comm, units, optimizer: zero(Communicator(comm, "ring"), units, optimizer),
        "ZeRO-3, two levels": lambda comm, units, optimizer: mics(comm, units, optimizer, comm.size),
        "alone": alone,
    }


def step(states: Any, names: Sequence[str], wait: float) -> None:
    """Four micro-steps and the boundary."""
    for _ in range(MICRO_STEPS):
        walk = [*names, *reversed(names)]
        for at, name in enumerate(walk):
            backward = at >= len(names)
            states.gather(name, ahead=walk[at + 1] if at + 1 < len(walk) else None)
            time.sleep(wait * (2 if backward else 1)) if wait else None
            states.release(name)
            if backward:
                states.reduce_accumulate(name, states.gradient(name))
    states.boundary()


def sent_bytes() -> int:
    """What this node's link has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


def steps_of(comm: Any, setting: Setting) -> dict[str, Any]:
    """All ways in turns: seconds of a step, bytes on the link, and bytes by formula of each hop."""
    import numpy as np

    from hpccomm.algorithms.transforms import scale

    units = {f"layer{n}": {"w": np.full(setting.elements, n, "f4")} for n in range(setting.layers)}
    made = {title: make(comm, units, scale(-LR)) for title, make in ways().items()}
    for states in made.values():
        states.gradients[...] = comm.rank + 1
    found: dict[str, Any] = {title: {"seconds": [], "sent": []} for title in made}
    for number in range(setting.rounds + 1):
        for title, states in made.items():
            comm.Barrier()
            before = sent_bytes()
            taken = timed(comm, partial(step, states, list(units), 1e-3 * setting.wait_ms))
            comm.Barrier()
            if number:
                found[title]["seconds"].append(taken)
                found[title]["sent"].append(sent_bytes() - before)
    first = (comm.size + 1) / 2
    for title, states in made.items():
        mean = first if title != "alone" else (comm.rank // PER_NODE * PER_NODE + 1.5) * PER_NODE / comm.size
        for n, (name, tensors) in enumerate(states.consolidated()):
            wanted = np.float32(n)
            for _ in range(setting.rounds + 1):
                wanted -= np.float32(LR) * np.float32(mean)
            assert (tensors["w"] == wanted).all(), (title, name, tensors["w"][0], wanted)
        found[title]["hops"] = {hop: each.wire_bytes / each.exchanges for hop, each in states.hops._asdict().items()
                                if each.exchanges}  # fmt: skip
        states.close()
    return found


def timed(comm: Any, call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call on the slowest rank."""
    import numpy as np
    from mpi4py import MPI

    comm.Barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    mine, most = np.array([(time.perf_counter() - began) / repeats]), np.empty(1)
    MPI.Intracomm(comm).Allreduce(mine, most, MPI.MAX)
    return float(most[0])


def gathers_of(comm: Any, rounds: int) -> dict[str, dict[int, list[float]]]:
    """A vector gathered by all ranks, in two levels and flat: seconds by way and length."""
    import numpy as np

    from hpccomm.algorithms.mics import TwoLevelGather

    two = TwoLevelGather(comm, PER_NODE)
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "two levels": two,
        "flat ring": lambda shard, whole: comm.Allgather(shard, whole, algorithm="ring"),
        "native": lambda shard, whole: comm.Allgather(shard, whole, algorithm="native"),
    }
    found: dict[str, dict[int, list[float]]] = {title: {} for title in calls}
    for nbytes in GATHERED:
        shard = np.full(nbytes // 4 // comm.size, comm.rank, "f4")
        whole = np.empty(shard.size * comm.size, "f4")
        repeats = max(1, min(20, (1 << 22) // nbytes))
        for number in range(rounds + 1):
            for title, call in calls.items():
                whole[...] = -1
                taken = timed(comm, partial(call, shard, whole), repeats)
                assert (whole == np.repeat(np.arange(comm.size), shard.size)).all(), title
                if number:
                    found[title].setdefault(nbytes, []).append(taken)
    two.free()
    return found


def work(out: Path, name: str, rounds: int) -> None:
    """What each rank does; rank 0 writes."""
    from mpi4py import MPI

    from hpccomm.communicator import Communicator

    world = Communicator(MPI.COMM_WORLD)
    setting = next((each for each in SETTINGS if each.name == name), None)
    found: Any = steps_of(world, setting) if setting else gathers_of(world, rounds)
    if world.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")


def measured(name: str, nodes: int, rounds: int) -> dict[str, Any]:
    """One setting, or the gathers, on so many nodes."""
    setting = next((each for each in SETTINGS if each.name == name), None)
    rate = setting.rate if setting else "1gbit"
    with Cluster(nodes, rate, "mics") as cluster, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        program = ["-m", "hpccomm.bench.mics", "--work", str(file), "--only", name, "--rounds", str(rounds)]
        done = cluster.run(program, PER_NODE, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
        if done.returncode:
            raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
        found = json.loads(file.read_text(encoding="utf-8"))
    return {"what": name, "nodes": nodes, "per_node": PER_NODE, "rate": rate, "found": found}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="scripts/bench_mics", description=__doc__)
    parser.add_argument("--nodes", type=int, action="append", help=f"default {', '.join(map(str, NODES))}")
    parser.add_argument("--only", help=f"one of {', '.join(each.name for each in SETTINGS)}, gathers")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the gathers (default {ROUNDS})")
    parser.add_argument("--json", type=Path, help=f"what it holds is kept, beside what is measured now (such as {OUT})")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.work:
        work(args.work, args.only, args.rounds)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken away
    records: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        records = json.loads(args.json.read_text(encoding="utf-8"))["records"]
    for name in [args.only] if args.only else [*(each.name for each in SETTINGS), "gathers"]:
        for nodes in args.nodes or NODES:
            made = measured(name, nodes, args.rounds)
            records = [each for each in records if (each["what"], each["nodes"]) != (name, nodes)] + [made]
            for title, each in made["found"].items():
                if "seconds" in each:
                    print(name, nodes, title, f"{median(each['seconds']):.4f}", f"{median(each['sent']):.4g}")
                else:
                    print(name, nodes, title, {n: f"{1e3 * median(times):.3g} ms" for n, times in each.items()})
            sys.stdout.flush()
            if args.json:
                found = {**where(["scripts/bench_mics", *sys.argv[1:]]), "records": records}
                args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
