"""The documentation site: Sphinx, Markdown by MyST, the theme of the PyData community. It needs no network to be read.

Why these: Material for MkDocs gets security fixes only, MkDocs 1 not even those; Sphinx and this theme are what NumPy,
SciPy and Jupyter are documented with, and MyST keeps the pages plain Markdown.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402 - beside this file

import lbgym  # noqa: E402

log = logging.getLogger(__name__)

project = "lbgym"
author = "The lbgym authors"
project_copyright = author
release = version = lbgym.__version__

extensions = ["myst_parser", "sphinx_design", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
exclude_patterns = ["README.md"]
nitpicky = True
# A prompt is not copied, nor what a command printed.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "lbgym"
html_static_path = ["assets"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    # Pages of wide tables have the width of the screen.
    "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "learning-curves": [], "results": []},
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 7,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": []}
html_context = {"default_mode": "auto"}


def make_pages(app: Sphinx) -> None:
    """Write the generated pages; one that has not changed keeps its time, so that it is not built again."""
    folder = Path(app.srcdir)
    for name, text in reference.pages().items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def fill_in(app: Sphinx, docname: str, content: list[str]) -> None:
    """Fill in tables of settings, and turn links that leave docs/ into paths."""
    text = re.sub(r"<!-- settings: (\S+) (\w+) -->", lambda m: reference.settings_table(m[1], m[2]), content[0])
    folder = Path(app.srcdir, docname).parent
    content[0] = re.sub(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)", lambda m: _outside(m, folder, Path(app.srcdir)), text)


def _outside(link: re.Match[str], folder: Path, docs: Path) -> str:
    label, target = link.groups()
    # Not resolved: folders of a checkout may be links.
    path = Path(os.path.normpath(folder / target.split("#")[0]))
    if path.is_relative_to(docs):
        return link[0]
    if not path.is_relative_to(docs.parent) or not path.exists():
        log.warning("a link to %s, which does not exist", target)
        return link[0]
    name = path.relative_to(docs.parent).as_posix()
    return f"`{name}`" if label.strip("`") == name else f"{label} (`{name}`)"


def _mathml(source: str, block: bool) -> str:
    """A formula as MathML, which browsers show without a script."""
    # The converter forgets that a single letter is upright, and does not know arg.
    upright = re.sub(r"\\mathrm\{(\w)\}", r"\\text{\1}", source.strip())
    upright = re.sub(r"\\arg\b", r"\\text{arg}\\,", upright)
    try:
        shown = convert(upright, display="block" if block else "inline")
        # A command it does not know comes back as text.
        if re.search(r"\\|&#x0*5C;", shown):
            raise ValueError("unknown command")
        return shown
    except Exception as error:
        log.warning("a formula that cannot be shown, %r: %r", source, error)
        return source


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_mathml(node.astext(), False))
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(_mathml(node.astext(), True))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Add what is ours."""
    app.connect("builder-inited", make_pages)
    app.connect("source-read", fill_in)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
