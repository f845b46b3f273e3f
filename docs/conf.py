"""The site that `make docs` builds of the Markdown pages and of the docstrings, with Sphinx.

The source directory is the repository, so that a link between two files is the same on the site and
where a git host shows the page.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import switchworks  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, release = PROJECT["name"], PROJECT["version"]
project_copyright = f"the authors of {project}, licence {PROJECT['license']}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "experiments/*.md", "examples/*.md"]
exclude_patterns = ["docs/_*"]
nitpicky = False  # annotations name types of torch, whose inventory is not here

myst_heading_anchors = 4  # links to sections, as git hosts have them
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": False}
autodoc_class_signature = "mixed"
default_role = "code"
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["_templates"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False


def plain_text(_: Any, __: str, ___: str, ____: Any, _____: Any, lines: list[str]) -> None:
    """Make a docstring, which is plain text with names in `backquotes`, safe reStructuredText.

    The list of fields that `help` shows ends it: here they have entries of their own."""
    if "Attributes:" in lines:
        del lines[lines.index("Attributes:") :]
    parts = re.split(r"(`[^`]+`)", "\n".join(lines))
    for place, part in enumerate(parts):
        is_code = part.startswith("`") and part.endswith("`") and len(part) > 2
        parts[place] = f"``{part[1:-1]}``" if is_code else re.sub(r"([\\*_|])", r"\\\1", part)
    lines[:] = "".join(parts).splitlines()


def is_public(_: Any, __: str, ___: str, obj: Any, ____: bool, _____: Any) -> bool | None:
    """Leave what stands on the page of the public names out of the packages' page."""
    names = {id(getattr(switchworks, public)) for public in switchworks.__all__}
    return True if id(obj) in names else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-skip-member", is_public)
