"""The code of the PyTorch page runs as it stands, and the example trains by every method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch_world import entry_point

from hpccomm.testing.jobs import run_under_mpi

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pytorch.md"
sys.path.insert(0, str(ROOT / "examples"))


@pytest.mark.mpi(sizes=(4,), timeout=300)
def test_the_code_of_the_page_runs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optax")
    from hpccomm.torch.plugin import register

    register()
    text = PAGE.read_text()
    module: Any = ModuleType("page")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines = "\n" * text[: match.start(1)].count("\n")  # so that a traceback names the page's line
        exec(compile(lines + match[1], PAGE, "exec"), module.__dict__)
    out = capfd.readouterr().out
    assert "of 4: loss 0." in out
    assert "Allreduce(sum, 8 float32)" in out
    assert "bytes sent" in out
    module.hvd.shutdown()
    module.dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "method"), [("resnet", "dense"), ("resnet", "gtc"), ("gpt", "bmuf")])
def test_the_example_trains(network: str, method: str, entry_point: dict[str, str]) -> None:
    steps = {"resnet": "12", "gpt": "4"}[network]
    program = [str(ROOT / "examples" / "pytorch_training.py"), "--network", network, "--method", method]
    done = run_under_mpi(2, *program, "--steps", steps, timeout=200, environ=entry_point)
    assert done.returncode == 0, done.stderr
    assert f"{network} {method}:" in done.stdout


@pytest.mark.slow
def test_the_example_in_horovods_spelling_trains(entry_point: dict[str, str], tmp_path: Path) -> None:
    program = [str(ROOT / "examples" / "horovod_digits.py"), "--epochs", "4", "--save", str(tmp_path / "model")]
    done = run_under_mpi(2, *program, "--fp16", timeout=200, environ=entry_point)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.8
    assert (tmp_path / "model").exists()


__all__ = ["entry_point"]
