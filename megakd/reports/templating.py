"""The jinja2 templates of the report's page and of the model card."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

TEMPLATES = Environment(
    loader=PackageLoader("megakd.reports", "templates"),
    autoescape=select_autoescape(("html.jinja", "svg.jinja")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
