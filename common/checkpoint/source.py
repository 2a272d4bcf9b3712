"""XXX docstring of checkpoint.source"""

from pathlib import Path

from common.checkpoint.download import find_checkpoint
from common.folder.manifest import read_manifest, relative_path, sha256


def source_record(checkpoint: Path, model_name: str, output_dir: Path) -> dict:
    """What a manifest says of the source: its Hugging Face `name`, or its `path` relative to the folder; checksum."""
    hub = Path(model_name) != checkpoint
    source = {"name": model_name} if hub else {"path": relative_path(checkpoint, output_dir)}
    return {**source, "sha256": sha256(checkpoint)}


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(f"{folder} has no manifest that names its checkpoint; pass --model_name or --skip_nemo")
    checkpoint = find_checkpoint(source["name"]) if "name" in source else folder / source["path"]
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}, recorded in {folder}, is gone; pass --model_name or --skip_nemo")
    if sha256(checkpoint) != source["sha256"]:
        raise ValueError(f"{checkpoint} is not the file that {folder} was exported from; pass --model_name")
    return checkpoint
