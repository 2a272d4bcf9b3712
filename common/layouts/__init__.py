"""The model folders of each runtime: which layouts there are, and which of them a folder has."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from common.checkpoint import Checkpoint
from common.cli import EXPORT_COMMAND
from common.folder import MANIFEST, read_manifest
from common.layouts.genai import GENAI
from common.layouts.layout import Layout
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX

LAYOUTS: dict[str, Layout] = {layout.runtime: layout for layout in (GENAI, ONNX_ASR, SHERPA_ONNX)}
ALL = "all"  # the value of --runtime for every layout


def layouts_for(runtime: str) -> dict[str, Layout]:
    """Subfolder → layout, for each layout that `--runtime` stands for; "" → GenAI's, whose files have no subfolder."""
    if runtime == GENAI.runtime:
        return {"": GENAI}
    return dict(LAYOUTS) if runtime == ALL else {runtime: LAYOUTS[runtime]}


def layouts_in(folder: Path) -> dict[str, Layout]:
    """Subfolder → layout, for a folder exported for several runtimes; "" → layout for a model folder.

    A model folder is recognized by its last graph; one without graphs is GenAI's.
    """
    found = {name: layout for name, layout in LAYOUTS.items() if (folder / name / layout.encoder.file).is_file()}
    own = (layout for layout in LAYOUTS.values() if (folder / layout.graphs[-1].file).is_file())
    return found or {"": next(own, GENAI)}


def genai_folder(folder: Path) -> Path:
    """`folder`, or its subfolder for ONNX Runtime GenAI. Raises ValueError for a folder of another runtime."""
    existing = layouts_in(folder)
    for name, layout in existing.items():
        if layout is GENAI:
            return folder / name
    runtimes = " and ".join(layout.runtime for layout in existing.values())
    raise ValueError(
        f"{folder} is a folder for {runtimes}, not for ONNX Runtime GenAI; make one with: "
        f"{EXPORT_COMMAND.format('./onnx_models')} --runtime genai"
    )


def check_same_layouts(folder: Path, planned: Mapping[str, Layout]) -> None:
    """Raise ValueError where `folder` is for one runtime and would become one for another or for several, or the other
    way round, since a reader would confuse them. Also where a manifest to be kept belongs to another project."""
    existing = layouts_in(folder)
    is_model_folder = "" not in existing or (folder / MANIFEST).is_file()
    if is_model_folder and existing.get("") is not planned.get(""):
        new, old = (" and ".join(layout.runtime for layout in each.values()) for each in (planned, existing))
        raise ValueError(f"{folder} is a folder for {old}, not for {new}; give another --output_dir")
    for name in planned:
        read_manifest(folder / name)  # where it is another project's, this raises before the work instead of after


def exported_vocabularies(checkpoint: Checkpoint, layouts: Iterable[Layout]) -> dict[str, Mapping[str, str]]:
    """Runtime → content of the vocabulary's files, by name, for the layouts whose vocabulary the export writes.

    Raises ValueError where a runtime would misread the checkpoint's tokens.
    """
    writing = [layout for layout in layouts if layout.exports_vocabulary]
    return {layout.runtime: layout.vocabulary_texts(checkpoint.tokenizer) for layout in writing}
