"""The report of an optimization, the model card, and the page of clips to listen to."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.cli import size_text


def render(template: str, **values: Any) -> str:
    """An HTML page from one of this folder's templates, which escapes all text that is inserted."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size_text
    return environment.get_template(template).render(**values)
