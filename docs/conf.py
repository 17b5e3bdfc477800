"""Configuration of the documentation: sphinx-build -W docs docs/_build/html."""

import sys
from pathlib import Path

import isthmus

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "isthmus"
author = "the isthmus authors"
project_copyright = author
version = release = isthmus.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "systems_pages",
]
exclude_patterns = ["_build", "examples", "_ext"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Fields are described under "Attributes:"; as ivars they are not described a second time.
napoleon_use_ivar = True
napoleon_numpy_docstring = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = f"isthmus {version}"
