"""The report of an optimization, the model card, and the page of clips to listen to."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


def page_environment() -> "Environment":
    """The environment of this folder's templates of HTML pages, which escapes all text that is inserted.

    Call this before the work, since it raises ModuleNotFoundError without Jinja.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
