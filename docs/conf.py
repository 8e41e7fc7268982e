"""Configuration of the documentation; `make docs` builds it with warnings as errors."""

from pytorch_accelerated import __version__

project = "pytorch_accelerated"
copyright = "2026, the pytorch_accelerated team"
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build", "performance_results.md"]  # the latter is a part of a page
html_theme = "furo"
html_title = f"pytorch_accelerated {__version__}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# README is included in pages of this folder, where its links to files of the repository lead nowhere.
suppress_warnings = ["myst.xref_missing"]
