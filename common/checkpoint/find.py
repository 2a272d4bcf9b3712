"""Which checkpoint a name or a path stands for."""

import argparse
from pathlib import Path

from common.checkpoint import Checkpoint, nemo, transformers
from common.checkpoint.hub import DEFAULT_MODEL, DEFAULT_REVISION, hub_name, on_disk, on_hub
from common.folder import CHECKPOINT, read_location, read_manifest

MODEL_NAME_HELP = (
    "Hugging Face name, .nemo file, or folder of a transformers checkpoint or an unpacked .nemo (%(default)s)"
)
REVISION_HELP = f"branch, tag or commit on Hugging Face ({DEFAULT_REVISION}); the commit used is in manifest.json"
FORMAT_HELP = "the format to use where a repository or a folder has both (nemo, if it is there)"
READERS = {nemo.NAME: nemo.read, transformers.NAME: transformers.read}  # the preferred format first
FORMAT_NAMES = tuple(READERS)
MOST_NAMED = 8  # files, in a message


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values `find_checkpoint` takes."""
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help=MODEL_NAME_HELP)
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument("--checkpoint_format", choices=FORMAT_NAMES, help=FORMAT_HELP)


def find_checkpoint(model_name: str, revision: str | None = None, checkpoint_format: str | None = None) -> Checkpoint:
    """The checkpoint for a path or a Hugging Face name (`owner/model`), downloaded if need be, read and checked.

    revision: a branch, tag or commit on Hugging Face. checkpoint_format: the name of the only format to take; without
    it, where a folder or a repository has both, the preferred one. Raises ValueError or OSError that says what to do:
    for a path that does not exist, a file that is not a complete checkpoint or not the published one, a model that is
    not on Hugging Face or may not be read, a network or a disk that fails.
    """
    name = hub_name(model_name)
    if name is None and revision is not None:
        raise ValueError(f"--revision is for a name on Hugging Face, and {model_name} is a path; leave it out")
    origin = on_hub(name, revision or DEFAULT_REVISION) if name else on_disk(Path(model_name))
    formats = [checkpoint_format] if checkpoint_format else FORMAT_NAMES
    for known in formats:
        if checkpoint := READERS[known](origin):
            return checkpoint
    found = ", ".join(list(origin.sizes)[:MOST_NAMED]) or "no file"
    raise ValueError(
        f"there is no checkpoint of the format {' or '.join(formats)} in {origin}, which has {found}; check "
        "--model_name and --checkpoint_format. A checkpoint is a .nemo file, or transformers' config.json and "
        "model.safetensors"
    )


def recorded_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source", {})
    path = read_location(folder, CHECKPOINT) or folder / source.get("file", "its checkpoint")
    # Folders made by earlier versions, which had one format only, record no format.
    recorded_format = source.get("format", nemo.NAME)
    if "name" not in source and not path.exists():
        raise FileNotFoundError(
            f"the checkpoint that the manifest of {folder} records is not at {path}; pass --model_name or --skip_nemo"
        )
    checkpoint = find_checkpoint(source.get("name", str(path.absolute())), source.get("commit"), recorded_format)
    if checkpoint.digest != source.get("sha256"):
        raise ValueError(
            f"{checkpoint.path} is not the checkpoint that {folder} was exported from; pass that one as --model_name"
        )
    return checkpoint
