"""Renders the pages and charts: ``templates/`` holds their markup, the other modules compute plain data for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def _coordinate(value: float) -> str:
    return f"{value:.1f}"


@cache
def _environment() -> Environment:
    # StrictUndefined: a misspelt name in a template is an error, not an empty place on the page.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format  # {{ value | number("+.3f") }}
    environment.filters["px"] = _coordinate
    return environment


def render_template(template: str, **values) -> Markup:
    """A template of ``templates/`` filled in. Values are escaped, except what this function returned itself."""
    return Markup(_environment().get_template(template).render(values))
