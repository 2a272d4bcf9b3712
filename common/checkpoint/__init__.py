"""Checkpoints, treated as untrusted input.

`find` says which one a name or a path stands for. `nemo` or `transformers`, the modules of the two formats, reads and
checks it, once, and everything later asks the `Checkpoint` that they return.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.hub import MODEL_CARD, Origin, file_digest
from common.checkpoint.tokenizer import parse_model

LICENCE_KEYS = ("license", "license_name", "license_link")
# Values of a model card that are taken from it: they can break out of no Markdown, YAML or line.
PLAIN = re.compile(r"[^\s<>\[\]()`|]([^\n<>\[\]()`|]{0,198}[^\s<>\[\]()`|])?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{1,8})*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found, read except for its weights, and checked."""

    origin: Origin
    format: str  # as --checkpoint_format takes it
    path: Path  # a .nemo file, or the folder of an unpacked one or of a checkpoint of transformers
    files: Sequence[Path]  # in a fixed order
    loaded_bytes: int  # of the weights in float32, in which they are used; to estimate memory
    sentencepiece: bytes  # its tokenizer's model
    # (device="cpu", scratch=None) → the model in evaluation mode, with NeMo's `preprocessor`, `encoder`, `decoder`,
    # `joint` and `decoding`. scratch: a folder for temporary files. Raises ValueError for what cannot be built.
    load_model: Callable[..., Any]
    notes: Sequence[str] = ()  # what a user should know of how it is read: what it lacks, what of it is left out

    @property
    def name(self) -> str | None:
        """`owner/model` on Hugging Face; None for a path."""
        return self.origin.repository

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def tokenizer(self) -> ModelProto:
        """Its SentencePiece model. Raises ValueError where SentencePiece cannot load it."""
        return parse_model(self.sentencepiece)

    @property
    def digest(self) -> str:
        """SHA-256 of its only file, or of the list that `sha256sum` prints of its files."""
        if len(self.files) == 1:
            return file_digest(self.files[0])
        lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What a manifest has of it as `source`.

        This is its Hugging Face `name`, the `revision` asked for and the `commit` used, or the name of its `file`; its
        `sha256`; its `format`; its `notes`, and the `terms` that its own model card states, if it has any. The path is
        not published (write_locations in common/folder.py).
        """
        origin = self.origin
        place: dict[str, Any] = {"file": self.path.name}
        if self.name is not None:
            place = {"name": self.name, "revision": origin.revision, "commit": origin.folder.name}
        more = {"notes": list(self.notes), "terms": read_terms(origin.folder / MODEL_CARD)}
        given = {key: value for key, value in more.items() if value}
        return {**place, "sha256": self.digest, "format": self.format, **given}


def read_terms(card: Path) -> dict[str, Any]:
    """`license`, `license_name`, `license_link` and `language` of a model card, each where it has a plain value.

    Empty where there is no such file, or its front matter has no licence or cannot be read.
    """
    import yaml
    from huggingface_hub.repocard import metadata_load  # which uses YAML's safe loader

    try:
        content = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    values = {key: content.get(key) for key in LICENCE_KEYS}
    terms: dict[str, Any] = {
        key: value for key, value in values.items() if isinstance(value, str) and PLAIN.fullmatch(value)
    }
    if terms.get("license_name", terms.get("license", "unknown")) == "unknown":
        return {}
    languages = content.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    if all(isinstance(language, str) and LANGUAGE.fullmatch(language) for language in listed):
        terms["language"] = listed
    return terms
