"""Sphinx configuration of the API reference; ``make docs`` builds it."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # pretrain/ is not installed

project = "flsl-d2"
release = metadata.version("flsl-d2")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# Each object is described once, in the module that defines it.
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Otherwise attributes listed in a class docstring are described twice.
napoleon_use_ivar = True
html_title = "flsl-d2 API"
