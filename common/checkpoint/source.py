"""The record of a checkpoint in a manifest, and the checkpoint that a manifest records."""

from pathlib import Path
from typing import Any

from common.checkpoint.download import find_checkpoint
from common.checkpoint.format import format_of
from common.checkpoint.hub import DEFAULT_REVISION, commit_of, hub_name
from common.checkpoint.nemo import NEMO
from common.folder import CHECKPOINT, read_location, read_manifest


def source_record(checkpoint: Path, model_name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The record of a checkpoint that was found by `model_name`.

    The record has its Hugging Face `name`, the `revision` asked for and the `commit` used, or the name of its `file`;
    its `sha256`; and its `format`. The path is not published (common/folder.py).
    """
    known = format_of(checkpoint)
    digest = known.digest(checkpoint)
    name = hub_name(model_name)
    if name is None:
        return {"file": checkpoint.name, "sha256": digest, "format": known.name}
    return {
        "name": name,
        "revision": revision or DEFAULT_REVISION,
        "commit": commit_of(checkpoint),
        "sha256": digest,
        "format": known.name,
    }


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(
            f"expected a manifest that names its checkpoint in {folder}, got none; pass --model_name or --skip_nemo"
        )
    if "name" in source:
        # Folders made by earlier versions, which had one format only, record no format.
        checkpoint = find_checkpoint(source["name"], source.get("commit"), source.get("format", NEMO.name))
    else:
        checkpoint = read_location(folder, CHECKPOINT) or folder / source.get("file", "its checkpoint")
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"expected the checkpoint that {folder} records, got nothing at {checkpoint}; pass --model_name or "
            "--skip_nemo"
        )
    if format_of(checkpoint).digest(checkpoint) != source["sha256"]:
        raise ValueError(
            f"expected the checkpoint that {folder} was exported from, got another file at {checkpoint}; pass "
            "--model_name"
        )
    return checkpoint
