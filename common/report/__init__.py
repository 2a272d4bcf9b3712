"""The report of an optimization, the model card, and the page of clips to listen to."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from common.cli import size_text


def render(template: str, **values: Any) -> str:
    """A text from one of this folder's templates. In a page of HTML all text that is inserted is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size_text
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(**values)


def _breakable(name: str) -> Markup:
    """A name that may be broken behind `_`, `/` and `.`, and only there, if it is too long for a line."""
    return Markup(re.sub(r"([_/.])", r"\1<wbr>", str(escape(name))))
