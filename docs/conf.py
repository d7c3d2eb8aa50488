"""How Sphinx makes the site of these pages (`make docs`): no network is needed, and there every warning is an error."""

import importlib.metadata

project = "headstart"
version = release = importlib.metadata.version("headstart")
html_title = "headstart"
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["wrap.css"]
html_copy_source = html_show_sphinx = html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3  # as GitHub has them, where the pages can be read as well

default_role = "code"  # docstrings have single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
nitpick_ignore_regex = [("py:.*", ".*")]  # what annotations name lies in other libraries, or in rooms not shown
