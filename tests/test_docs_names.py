"""Everything that README and the documentation name exists: modules, functions, files, commands, flags, variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import hpccomm
from hpccomm import __main__ as command_line
from hpccomm.bench import compare, flags

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page]

DOTTED = re.compile(r"(?<![\w./-])hpccomm(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^from (hpccomm[\w.]*) import ([\w, ]+)$", re.MULTILINE)
FILE = re.compile(r"(?<![\w./-])(?:scripts|slurm|examples|docs|tests|hpccomm|benchmarks)/[\w./-]*\w")
COMMAND = re.compile(rf"(?:^|[\s`$])(?:-m )?hpccomm ({'|'.join(command_line.COMMANDS)})\b([^`#|\n]*)", re.MULTILINE)
VARIABLE = re.compile(r"HPCCOMM_[A-Z_]+")
WRITTEN = re.compile(r"docs/(_build|measurements/.*)|.*\.(json|png)|hpccomm/collectives/linear\.py")
"""Files that a command writes, or that a page tells the reader to make."""


class Page(NamedTuple):
    """One page of the documentation."""

    name: str
    text: str


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(request.param, (ROOT / request.param).read_text())


def resolve(dotted: str) -> Any:
    """The object of a dotted name; raises where there is none."""
    found: Any = hpccomm
    path = "hpccomm"
    for part in dotted.split(".")[1:]:
        path += f".{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            found = import_module(path)
    return found


def is_real(dotted: str) -> bool:
    """Whether a name can be imported."""
    try:
        resolve(dotted)
    except ImportError:
        return False
    return True


def test_dotted_names_exist(page: Page) -> None:
    names = set(DOTTED.findall(page.text))
    names |= {f"{home}.{name.strip()}" for home, line in IMPORT.findall(page.text) for name in line.split(",")}
    assert not sorted(name for name in names if not is_real(name))


def test_files_exist(page: Page) -> None:
    named = {each for each in FILE.findall(page.text) if not WRITTEN.fullmatch(each)}
    assert not sorted(each for each in named if not (ROOT / each).exists())


def test_names_beside_a_file_are_defined_in_it(page: Page) -> None:
    pairs = re.findall(r"`hpccomm/([\w/]+)\.py`, `([\w.]+)`", page.text)
    names = [f"hpccomm.{path.replace('/', '.').removesuffix('.__init__')}.{name}" for path, name in pairs]
    assert not sorted(name for name in names if not is_real(name))


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of a command of ``hpccomm``."""
    known = command_line.parser(command)._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr,index]
    found = set(known._option_string_actions)
    if command == "bench":
        found.update(*(flags.parser(each)._option_string_actions for each in ("allreduce", "latency")))
        found.update(compare.make_parser()._option_string_actions)
    return frozenset(found)


def used_flags(text: str) -> Iterator[tuple[str, str]]:
    """Each command and each long flag that is given to it, also on the lines that a backslash continues."""
    for command, rest in COMMAND.findall(text.replace("\\\n", " ")):
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", rest.split(" -- ")[0]):
            yield command, flag


def test_commands_know_their_flags(page: Page) -> None:
    assert not sorted(f"{command} {flag}" for command, flag in used_flags(page.text) if flag not in flags_of(command))


@cache
def source() -> str:
    """All code that reads the environment."""
    files = [*ROOT.glob("hpccomm/**/*.py"), *ROOT.glob("scripts/*"), *ROOT.glob("tests/*.py")]
    return "\n".join(each.read_text() for each in files if each.is_file() and each.suffix in ("", ".py"))


def test_environment_variables_are_read_somewhere(page: Page) -> None:
    assert not sorted(
        name
        for name in set(VARIABLE.findall(page.text))
        if f'"{name}"' not in source() and f"${{{name}" not in source()
    )


def test_links_lead_to_files(page: Page) -> None:
    home = (ROOT / page.name).parent
    targets = {each.split("#")[0] for each in re.findall(r"\]\(([^)\s]+)\)", page.text) if "://" not in each}
    assert not sorted(each for each in targets if each and not (home / each).exists())


@pytest.mark.parametrize("name", [each for each in PAGES if "measurements" not in each])
def test_prose_is_wrapped_at_100_columns(name: str) -> None:
    fenced = False
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        fenced ^= line.lstrip().startswith(("```", ":::"))
        if not (fenced or line.startswith(("|", "    ", "![", "```"))):
            assert len(line) <= 100, f"{name}:{number} has {len(line)} columns: wrap it"
