"""Self-contained HTML pages: one frame with one style, and the body of each from a template of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template


def page(template: str, title: str, parts: Mapping[str, str]) -> str:
    """A page as text.

    Args:
        template: The body's file beside this one.
        title: Escaped here.
        parts: HTML by the template's names, whose text is escaped already.
    """
    return _template("page.html").substitute(title=escape(title), body=_template(template).substitute(parts))


def _template(name: str) -> Template:
    return Template(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
