"""What a checkpoint's own model card says of its licence and its languages, in the front matter for Hugging Face.

The card is untrusted input: it is parsed by YAML's safe loader, and only values of one plain line are taken from it.
"""

import re
from pathlib import Path
from typing import Any

import yaml

UNKNOWN = "unknown"
KEYS = ("license", "license_name", "license_link")
LONGEST_HEADER = 2**18  # bytes
HEADER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
PLAIN = re.compile(r"[^\s<>\[\]()`|]([^\n<>\[\]()`|]{0,198}[^\s<>\[\]()`|])?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*")


def read_terms(card: Path) -> dict[str, Any]:
    """`license`, `license_name`, `license_link` and `language` of a model card, each where the card has it.

    Empty where there is no such file, or its front matter has no licence or cannot be read.
    """
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(LONGEST_HEADER).decode("utf-8", errors="replace")
    header = HEADER.match(text.replace("\r\n", "\n"))
    try:
        content = yaml.safe_load(header[1]) if header else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        content = None
    if not isinstance(content, dict):
        return {}
    terms: dict[str, Any] = {}
    for key in KEYS:
        value = content.get(key)
        if isinstance(value, str) and PLAIN.fullmatch(value):
            terms[key] = value
    if terms.get("license_name", terms.get("license", UNKNOWN)) == UNKNOWN:
        return {}
    languages = content.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    if all(isinstance(language, str) and LANGUAGE.fullmatch(language) for language in listed):
        terms["language"] = listed
    return terms
