"""The jobs of ``slurm/`` on a real Slurm, on the nodes of a virtual cluster."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpccomm.cluster import nodes as clusters
from hpccomm.cluster import slurm
from hpccomm.cluster.nodes import Cluster

JOBS = Path(__file__).parents[1] / "slurm"
WHY_NOT = clusters.unavailable_reason() or slurm.unavailable_reason()
SECONDS = 90.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "Slurm is available")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two nodes with Slurm, and a folder to submit from."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(JOBS, folder / "slurm")
    with Cluster(2, "", f"s{os.getpid() % 10**6}") as cluster:
        began = time.monotonic()
        slurm.start(cluster)
        assert time.monotonic() - began < slurm.IDLE_SECONDS
        yield Site(cluster, folder)


class Site:
    """Where jobs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder

    def run(self, *command: str, **env: str) -> str:
        """What a command says on the first node."""
        done = self.cluster.run_on(
            "n0", ["env", "-C", str(self.folder), *command], env=env, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def submit(self, job: str, *flags: str, **env: str) -> tuple[str, Path]:
        """Submit a job and wait for its end: what it wrote, and its folder of results."""
        given = {"PYTHON": sys.executable, **env}
        number = self.run("sbatch", "--parsable", "--ntasks-per-node=2", *flags, f"slurm/{job}.sbatch", **given).strip()
        ended = clusters.wait_until(lambda: not self.run("squeue", "-h", "-j", number).strip(), SECONDS)
        said = "".join(each.read_text() for each in sorted(self.folder.glob(f"*-{number}*.out")))
        assert ended, f"{self.run('squeue')}\n{said}"
        return said, self.folder / f"results-{number}"


def test_the_allreduce_sweep_measures_and_draws(site: Site) -> None:
    said, results = site.submit(
        "allreduce", "--nodes=2", ALGORITHMS="native,auto,hierarchical", SIZES="8:65536", ITERATIONS="3"
    )
    rows = json.loads((results / "allreduce.json").read_text())["rows"]
    assert {row["algorithm"] for row in rows} == {"native", "auto", "hierarchical"}, said
    assert "4 ranks on 2 nodes (2 each, in order): n0, n1" in said
    assert "Fail" not in said
    assert (results / "allreduce.png").read_bytes().startswith(b"\x89PNG")


def test_osus_benchmarks_print_and_keep_their_tables(site: Site) -> None:
    said, results = site.submit(
        "osu", "--nodes=1", COLLECTIVES="bcast barrier", PAIRS="latency", SIZES="8:64", FLAGS="-i 3 -x 1"
    )
    names = ["osu-barrier.json", "osu-bcast.json", "osu-latency.json", "osu.png"]
    assert sorted(each.name for each in results.iterdir()) == names
    assert "OSU MPI Broadcast Latency Test" in said


def test_an_array_takes_more_nodes_with_each_element(site: Site) -> None:
    _, results = site.submit("scaling", "--nodes=2", "--array=0-1", STEPS="1 2", BYTES="65536", EPOCHS="1")
    ranks = {file.name: json.loads(file.read_text())["ranks"] for file in results.glob("train-*.json")}
    assert ranks == {"train-1.json": 2, "train-2.json": 4}


def test_training_goes_through_its_methods(site: Site) -> None:
    _, results = site.submit("train", "--nodes=2", METHODS="dense adam", EPOCHS="1")
    for method in ("dense", "adam"):
        assert json.loads((results / f"train-{method}.json").read_text())["method"] == method


def test_training_that_is_told_to_end_is_queued_again_and_goes_on(site: Site) -> None:
    number = site.run(
        "sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "slurm/train.sbatch",
        PYTHON=sys.executable, METHODS="adam", DATASET="stdlib", EPOCHS="4", FLAGS="--samples 20000",
    ).strip()  # fmt: skip
    results, output = site.folder / f"results-{number}", site.folder / f"train-{number}.out"
    assert clusters.wait_until(lambda: any(results.glob("checkpoints/*.json")), SECONDS)
    site.run("scancel", "--batch", "--signal=USR1", number)
    ended = clusters.wait_until(lambda: not site.run("squeue", "-h", "-j", number).strip(), SECONDS)
    said = output.read_text()
    assert ended, said
    assert "saved: run the same command again to resume" in said
    assert "received USR1: the job is queued again" in said
    assert len(json.loads((results / "train-adam.json").read_text())["epochs"]) == 4


def test_tuning_writes_the_table_of_this_site(site: Site) -> None:
    table = site.folder / "table.json"
    site.submit("tune", "--nodes=2", COLLECTIVES="bcast", SIZES="64", TABLE=str(table))
    assert {(row["nodes"], row["per_node"]) for row in json.loads(table.read_text())["rows"]} == {(2, 2)}


def test_the_wrong_mpi_of_srun_is_named_with_its_cure(site: Site) -> None:
    words = ["srun", "--mpi=none", "-N2", "-n4", sys.executable, "-m", "hpccomm", "info"]
    done = site.cluster.run_on("n0", words, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0
    assert "srun started 4 ranks, but each of them sees a world of one" in done.stderr
    assert "srun --mpi=pmix (Open MPI) or srun --mpi=pmi2" in done.stderr
