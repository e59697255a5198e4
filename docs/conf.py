"""Sphinx: ``sphinx-build docs docs/_build``."""

from __future__ import annotations

import importlib.metadata

project = "hpccomm"
author = "the hpccomm developers"
release = importlib.metadata.version("hpccomm")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
exclude_patterns = ["_build"]
