"""XXX docstring of checkpoint.source"""

from pathlib import Path

from common.checkpoint.download import DEFAULT_REVISION, checksum, commit_of, find_checkpoint, hub_name
from common.folder.locations import CHECKPOINT, read_location
from common.folder.manifest import read_manifest


def source_record(checkpoint: Path, model_name: str, *, revision: str | None = None) -> dict:
    """What a manifest says of the source: its Hugging Face `name`, the `revision` asked for and the `commit` used, or
    the name of its `file`; and its `sha256`. Where the file lies is not published (files.write_locations)."""
    name = hub_name(model_name)
    source = {"file": checkpoint.name}
    if name is not None:
        source = {"name": name, "revision": revision or DEFAULT_REVISION, "commit": commit_of(checkpoint)}
    return {**source, "sha256": checksum(checkpoint)}


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(f"{folder} has no manifest that names its checkpoint; pass --model_name or --skip_nemo")
    if "name" in source:
        checkpoint = find_checkpoint(source["name"], source.get("commit"))
    else:
        checkpoint = read_location(folder, CHECKPOINT) or folder / source.get("file", "its checkpoint")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}, recorded in {folder}, is gone; pass --model_name or --skip_nemo")
    if checksum(checkpoint) != source["sha256"]:
        raise ValueError(f"{checkpoint} is not the file that {folder} was exported from; pass --model_name")
    return checkpoint
