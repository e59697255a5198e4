"""``hpccomm slurm init`` writes jobs that bash and a fake Slurm run as the answers say."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hpccomm.__main__ import main
from hpccomm.cluster.job_script import QUESTIONS, Answers, read_answers, write_script
from hpccomm.errors import ArgumentError

FAKES = {
    "hpccomm-run": 'echo "hpccomm-run $*"; shift 2; [ "$1" != bash ] || "$@"; [ -z "${SLEEP:-}" ] || exec sleep 30',
    "srun": 'echo "srun $*"; shift; "$@"',
    "python": 'echo "python $* gpu=${CUDA_VISIBLE_DEVICES:-} port=${UCX_NET_DEVICES:-} threads=$OMP_NUM_THREADS"',
    "apptainer": 'echo "apptainer $*"',
    "module": 'echo "module $*"',
    "scontrol": 'echo "scontrol $*"',
}


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on a site whose programs only say what they are told."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_NTASKS": "8",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_JOB_ID": "77",
        "SLURM_LOCALID": "1",
    }


def run(answers: Answers, site: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", write_script(answers)], env=site, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_plain_job_starts_hpccomm_run(site: dict[str, str]) -> None:
    assert run(Answers(program="train.py --epochs 3"), site) == [
        "hpccomm-run -n 8 python -m mpi4py train.py --epochs 3"
    ]


def test_ranks_see_their_gpu_and_the_port_beside_it(site: dict[str, str]) -> None:
    said = run(Answers(gpus=4, ports="mlx5_0,mlx5_1", launcher="pmix"), site)
    assert said[0].startswith("srun --mpi=pmix bash -c ")
    assert said[-1] == "python -m mpi4py train.py gpu=1 port=mlx5_1:1 threads=3"


def test_modules_environments_and_containers(site: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my env" / "bin").mkdir(parents=True)
    (tmp_path / "my env" / "bin" / "activate").write_text("echo activated\n")
    image = "my image.sif"
    said = run(
        Answers(
            modules="gcc/12 openmpi", environment=str(tmp_path / "my env"), container=image, gpus=1, launcher="pmi2"
        ),
        site,
    )
    assert said[:3] == ["module purge", "module load gcc/12 openmpi", "activated"]
    assert said[-1] == f"apptainer exec --nv {image} python -m mpi4py train.py"


def test_a_job_that_is_told_to_stop_passes_it_on_and_queues_itself_again(site: dict[str, str]) -> None:
    job = subprocess.Popen(
        ["bash", "-c", write_script(Answers(requeue=True))],
        env=site | {"SLEEP": "yes"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout
    assert job.stdout.readline().startswith("hpccomm-run -n 8")
    time.sleep(0.5)
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=60)[0].splitlines()[-1] == "scontrol requeue 77"


def test_what_slurm_reads() -> None:
    lines = write_script(Answers(array="0-9%2", account="me", partition="gpu", requeue=True)).splitlines()
    assert lines[0] == "#!/bin/bash"
    flags = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=2", "ntasks-per-node=4", "array=0-9%2", "account=me", "partition=gpu", "requeue"} <= set(flags)
    assert "output=%x-%A_%a.out" in flags
    assert not [flag for flag in flags if flag.endswith("=") or "gpus" in flag]
    last = max(k for k, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # Slurm stops reading at the first command


def test_every_combination_is_bash() -> None:
    for gpus, ports, box, array, again, how in itertools.product(
        (0, 2), ("", "mlx5_0"), ("", "a b.sif"), ("", "1-3"), (False, True), ("run", "pmix")
    ):
        answers = Answers(gpus=gpus, ports=ports, container=box, array=array, requeue=again, launcher=how)
        done = subprocess.run(["bash", "-n", "-c", write_script(answers)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("nodes", "0", "give 1 or more"),
        ("nodes", "two", "give 1 or more"),
        ("time", "soon", "write 30"),
        ("array", "x", "write 0-9"),
        ("launcher", "mpirun", "use run, pmix or pmi2"),
        ("requeue", "maybe", "say yes or no"),
        ("name", "a b", "use letters"),
        ("modules", "gcc; rm -r x", "names of modules"),
        ("program", "", "give a program"),
        ("program", "a\nb", "give a program"),
        ("gpus", "3", "as many ranks on a node as GPUs"),
    ],
)
def test_a_wrong_answer_is_refused_with_a_remedy(name: str, text: str, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        read_answers({name: text})


def test_answers_have_the_types_of_the_usual_ones() -> None:
    assert read_answers({}) == Answers()
    assert read_answers({"nodes": "3", "requeue": "yes"}) == Answers(nodes=3, requeue=True)
    assert set(QUESTIONS) == set(Answers._fields)


def test_the_command_writes_a_job_and_nothing_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "job.sbatch"
    words = ["slurm", "init", "--nodes", "3", "--out", str(out)]
    assert main(words) == 0
    assert "--nodes=3" in out.read_text()
    assert main(words) == 2
    assert "exists: name another file, or add --force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert main(["slurm", "init", "--nodes", "none", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()
