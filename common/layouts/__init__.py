"""The model folders of each runtime: which layouts there are, and which of them a folder has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.cli import EXPORT_COMMAND
from common.folder import MANIFEST, check_output_dir, read_manifest
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
    raise ValueError(
        f"{folder} is a folder for {_runtimes(existing)}, not for ONNX Runtime GenAI; make one with: "
        f"{EXPORT_COMMAND.format('./onnx_models')} --runtime genai"
    )


def former_manifests(folder: Path, planned: Mapping[str, Layout]) -> dict[str, dict[str, Any]]:
    """Check before the work that `folder` can be written; subfolder → the manifest that is there, empty for none.

    Raises as check_output_dir does, and ValueError where `folder` is for one runtime and would become one for another
    or for several, or the other way round, since a reader would confuse them.
    """
    existing = layouts_in(folder)
    check_output_dir(folder)
    is_model_folder = "" not in existing or (folder / MANIFEST).is_file()
    if is_model_folder and existing.get("") is not planned.get(""):
        raise ValueError(
            f"{folder} is a folder for {_runtimes(existing)}, not for {_runtimes(planned)}; give another --output_dir"
        )
    return {name: read_manifest(folder / name) for name in planned}


def _runtimes(layouts: Mapping[str, Layout]) -> str:
    return " and ".join(layout.runtime for layout in layouts.values())
