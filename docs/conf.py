"""Sphinx: ``sphinx-build -W docs site``."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

project = "hpccomm"
author = "the hpccomm developers"
html_show_copyright = False
release = importlib.metadata.version("hpccomm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
highlight_language = "none"
pygments_dark_style = "github-dark"
html_title = f"hpccomm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#0060a0", "color-brand-content": "#0060a0"},
    "dark_css_variables": {"color-brand-primary": "#5ab0ee", "color-brand-content": "#5ab0ee"},
}
myst_enable_extensions = ["colon_fence", "attrs_block"]
viewcode_follow_imported_members = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("npt.DTypeLike", "npt.NDArray", "Array", "Arrays")}
python_use_unqualified_type_names = True
maximum_signature_line_length = 110
autodoc_mock_imports = [name for name in ("torch", "jax", "cupy") if importlib.util.find_spec(name) is None]
exclude_patterns = ["_build"]


def setup(app: object) -> None:
    """Register the directives that read the package itself, so that no page can fall behind it."""
    from docutils import nodes
    from docutils.parsers.rst import Directive, directives
    from docutils.statemachine import StringList

    import hpccomm
    from hpccomm import launcher
    from hpccomm.__main__ import COMMANDS, parser

    class CommandHelp(Directive):
        """The help of every command."""

        def run(self) -> list[nodes.Node]:
            os.environ["COLUMNS"] = "100"
            texts = {"hpccomm-run": launcher.parser().format_help()}
            for name in COMMANDS:
                command = parser(name)._subparsers._group_actions[0].choices[name]
                texts[f"hpccomm {name}"] = command.format_help()
            found: list[nodes.Node] = []
            for title, text in texts.items():
                section = nodes.section(ids=[title.replace(" ", "-")])
                section += nodes.title(text=title)
                section += nodes.literal_block(text, text, language="none")
                found.append(section)
            return found

    class PublicNames(Directive):
        """A table of all public names, each with the first line of its description."""

        def run(self) -> list[nodes.Node]:
            lines, missing = [".. list-table::", "   :widths: 25 75", ""], [""]
            for name in hpccomm.__all__:
                home = hpccomm._HOME[name]
                kind, first = describe(name, home)
                lines += [f"   * - :any:`hpccomm.{name} <{target(name, home)}>`", f"     - {first}"]
                if not is_described(name, home):
                    missing += [f".. auto{kind}:: {home}.{name}", ""]
            lines += missing
            node = nodes.Element()
            self.state.nested_parse(StringList(lines, "public-names"), 0, node)
            return node.children

    def describe(name: str, home: str) -> tuple[str, str]:
        """Kind and first line of a name, read from the source: its module may need a library that is not here."""
        file = Path(importlib.util.find_spec(home).origin)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if getattr(node, "name", "") == name:
                text = ast.get_docstring(node) or ""
                return "class" if isinstance(node, ast.ClassDef) else "function", text.split("\n")[0]
        return "data", ""

    def target(name: str, home: str) -> str:
        return "hpccomm.Communicator" if name == "Communicator" else f"{home}.{name}"

    pages = sorted((Path(__file__).parent / "reference").glob("*.md"))
    page = "\n".join(each.read_text(encoding="utf-8") for each in pages)
    modules = dict(re.findall(r"automodule:: ([\w.]+)\n   :members: ?(.*)", page))

    def is_described(name: str, home: str) -> bool:
        """Whether a block of the reference describes a name: all members of its module, or this one."""
        listed = modules.get(home)
        if re.search(rf"auto\w+:: {re.escape(home)}\.{name}\b", page):
            return True
        return name == "Communicator" or (listed is not None and (not listed or name in re.split(r",\s*", listed)))

    directives.register_directive("command-help", CommandHelp)
    directives.register_directive("public-names", PublicNames)
